"""A plan, slow and obvious: which programs attend from which queries to which keys, and how the parts are merged.

Queries of one key head are packed: row r of a tile is token r // group, head r % group. A **segment** is a run of tokens and
a run of blocks of keys that all of them see, at least in part: a request's own keys, or a prefix that its neighbours share.
Tiles of segments, times key heads, lie end to end on a line whose length is their cost, and the line is cut into equal pieces,
one a program (stream-K: Osama et al., arXiv 2301.03598; FlashInfer, section 3.3.1, deals out chunks by a heap instead).
"""

from typing import NamedTuple

import numpy as np

from trainkit.kernels.paged._tables import Numbers, Tables, check

PIECE = 12
"""Numbers of a piece: see `Plan.pieces`."""
START = 3
"""What a piece costs beside its blocks, in blocks: its numbers, queries and first keys are loaded one after the other, and its
part is merged; about 5 us, where a block of 64 keys takes a program 2 us (one H200)."""


class Shape(NamedTuple):
    """What of a call a plan depends on, beside its tables."""

    page_size: int
    num_pages: int
    group: int
    """Query heads a key head."""
    kv_heads: int
    causal: bool
    window: int
    """0: none."""
    bm: int
    """Rows of a tile."""
    bn: int
    """Keys of a block."""
    workers: int
    share: bool
    """Whether shared prefixes are segments of their own."""


class Plan(NamedTuple):
    """Arrays of int32 that the kernel follows."""

    worker_indptr: Numbers
    """`[workers + 1]`: the pieces of each program."""
    pieces: Numbers
    """`[n, 12]`: first token, tokens, the first of its pages in kv_indices, keys there, key head, blocks lo, full_lo, full_hi
    and hi (those from full_lo to full_hi are seen wholly by every row), first row of the part (-1: it has all keys), 0, 0."""
    tokens: Numbers
    """`[tokens, 3]`: request, query index, keys minus queries."""
    merge_indptr: Numbers
    """`[tokens * kv_heads + 1]`: the parts of each token and key head."""
    merge_rows: Numbers
    """Their first rows among all parts'."""
    rows: int
    """Rows of all parts."""


class Segment(NamedTuple):
    """Tokens [first, first + count) and blocks [lo, hi) of the keys of `request`."""

    first: int
    count: int
    request: int
    lo: int
    hi: int


def segments(tables: Tables, shape: Shape) -> list[Segment]:
    """Each request's keys, or what it shares with its neighbours and the rest."""
    lengths = tables.lengths(shape.page_size)
    queries = np.diff(tables.qo_indptr)
    alike = [0] * len(lengths)
    for i in range(1, len(lengths)) if shape.share else ():
        a, b = (tables.kv_indices[tables.kv_indptr[r] : tables.kv_indptr[r + 1]] for r in (i - 1, i))
        n = min(len(a), len(b))
        differ = np.flatnonzero(a[:n] != b[:n])
        pages = int(differ[0]) if differ.size else n
        # What every query of both sees wholly.
        sees = min(int(lengths[r] - (queries[r] - 1 if shape.causal else 0)) for r in (i - 1, i))
        alike[i] = 0 if 0 in (queries[i - 1], queries[i]) else max(0, min(pages * shape.page_size, sees)) // shape.bn
    found: list[Segment] = []

    def divide(first: int, last: int, lo: int) -> None:
        start = int(tables.qo_indptr[first])
        count = int(tables.qo_indptr[last]) - start
        if last - first == 1:
            found.append(Segment(start, count, first, lo, -(-int(lengths[first]) // shape.bn)))
            return
        common = min(alike[first + 1 : last])
        tiles = -(-count // (shape.bm // shape.group))
        # Shared if it spares more blocks than it adds parts to merge.
        shared = (last - first - tiles) * (common - lo) >= last - first + tiles
        if shared:
            found.append(Segment(start, count, first, lo, common))
        begin = first
        for i in range(first + 1, last + 1):
            if i == last or alike[i] <= common:
                divide(begin, i, common if shared else lo)
                begin = i

    begin = 0
    for i in range(1, len(lengths) + 1):
        if i == len(lengths) or alike[i] == 0:
            divide(begin, i, 0)
            begin = i
    return found


def _clip(x: int, lo: int, hi: int) -> int:
    return max(lo, min(x, hi))


def tiles(tables: Tables, shape: Shape) -> list[tuple[int, ...]]:
    """All but the key head of each piece, uncut: tokens, pages, keys and blocks."""
    lengths = tables.lengths(shape.page_size)
    request = np.repeat(np.arange(len(lengths)), np.diff(tables.qo_indptr))
    stands = np.arange(len(request)) - tables.qo_indptr[request] + lengths[request] - np.diff(tables.qo_indptr)[request]
    found = []
    step = shape.bm // shape.group
    for s in segments(tables, shape):
        keys = int(lengths[s.request])
        for first in range(s.first, s.first + s.count, step):
            count = min(step, s.first + s.count - first)
            p = stands[first : first + count]
            low, high = int(p.min()), int(p.max())
            lo, full_lo, full_hi, hi = 0, 0, keys // shape.bn, -(-keys // shape.bn)
            if shape.causal:
                full_hi = max(low + 1, 0) // shape.bn
                hi = -(-max(high + 1, 0) // shape.bn)
            if shape.window:
                lo = max(low - shape.window + 1, 0) // shape.bn
                full_lo = -(-max(high - shape.window + 1, 0) // shape.bn)
                if not shape.causal:
                    full_hi = max(low + shape.window, 0) // shape.bn
                    hi = -(-max(high + shape.window, 0) // shape.bn)
            full_hi = min(full_hi, keys // shape.bn)
            hi = min(hi, -(-keys // shape.bn))
            lo = _clip(lo, s.lo, s.hi)
            hi = _clip(hi, lo, s.hi)
            full_lo = _clip(full_lo, lo, hi)
            full_hi = _clip(full_hi, full_lo, hi)
            found.append((first, count, int(tables.kv_indptr[s.request]), keys, lo, full_lo, full_hi, hi))
    return found


def plan(tables: Tables, shape: Shape) -> Plan:
    """Cut the work of all key heads into equal shares.

    Raises:
        ValueError: tables that a kernel could not follow.
    """
    check(tables, shape.page_size, shape.num_pages)
    work = tiles(tables, shape)
    T = int(tables.qo_indptr[-1])
    parts_of: list[list[int]] = [[] for _ in range(T * shape.kv_heads)]
    covers = np.zeros(T, np.int64)
    for first, count, *_ in work:
        covers[first : first + count] += 1
    blocks = shape.kv_heads * sum(t[7] - t[4] for t in work)
    # Every cut adds a piece.
    budget = max(START + 1, -(-(blocks + START * (shape.kv_heads * len(work) + shape.workers)) // shape.workers))
    pieces: list[tuple[int, ...]] = []
    worker_indptr = [0]
    left, rows = budget, 0
    for first, count, page, keys, lo, full_lo, full_hi, hi in work:
        for head in range(shape.kv_heads):
            at = lo
            while True:
                if left <= START and len(worker_indptr) < shape.workers:
                    worker_indptr.append(len(pieces))
                    left = budget
                last = len(worker_indptr) == shape.workers
                stop = hi if last else min(hi, at + left - START)
                whole = (at, stop) == (lo, hi) and covers[first : first + count].max() == 1
                if not whole:
                    for t in range(first, first + count):
                        parts_of[t * shape.kv_heads + head].append(rows + (t - first) * shape.group)
                span = (at, _clip(full_lo, at, stop), _clip(full_hi, at, stop), stop)
                pieces.append((first, count, page, keys, head, *span, -1 if whole else rows, 0, 0))
                rows += 0 if whole else count * shape.group
                left -= stop - at + START
                at = stop
                if at >= hi:
                    break
    worker_indptr += [len(pieces)] * (shape.workers + 1 - len(worker_indptr))
    lengths, queries = tables.lengths(shape.page_size), np.diff(tables.qo_indptr)
    told = [(b, i, int(lengths[b]) - int(n)) for b, n in enumerate(queries) for i in range(n)]
    return Plan(
        np.array(worker_indptr, np.int32),
        np.array(pieces, np.int32).reshape(-1, PIECE),
        np.array(told, np.int32).reshape(-1, 3),
        np.cumsum([0, *map(len, parts_of)]).astype(np.int32),
        np.array([r for parts in parts_of for r in parts], np.int32),
        rows,
    )
