# mypy: ignore-errors
# (Gluon's language, which Python's types do not describe.)
"""The seams of the Hopper templates, which forward and backward share, and what is known of a tile.

They are those of `_triton_tiles`, for kernels whose programs stay and whose tiles are brought by TMA:

- `Work`: a piece of work, from arithmetic over a grid or from a list that a plan made (`take`).
- `Rows`: the rows of one head of one sequence in a tensor seen as a matrix, wherever they lie: dense, packed or in pages
  (`rows_of`, `key_rows`, `load_rows`, `store_rows`).
- `Problem`: what score and mask are told of the tile.

The epilogue writes the final result, or, of work that sees a part of the keys, that part's own output with its lse.
"""

from typing import NamedTuple

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from trainkit.kernels._attention._ranges import ranges
from trainkit.kernels._attention._work import ITEM as _ITEM

ITEM = gl.constexpr(_ITEM)
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)

key_range, query_range, visible = ranges(gluon.jit, gl)


class Work(NamedTuple):
    """What is to be done: see `_triton_tiles.Work`."""

    tile: gl.tensor
    request: gl.tensor
    head: gl.tensor
    entry: gl.tensor
    q0: gl.tensor
    k0: gl.tensor
    stats: gl.tensor
    """Where the sequence's rows begin in lse and delta."""
    Sq: gl.tensor
    Sk: gl.tensor
    start: gl.tensor
    stop: gl.tensor
    part: gl.tensor


class Items(NamedTuple):
    """The list of work, and the cumulative lengths that its requests number: of LISTED_WORK alone."""

    items: gl.tensor
    cu_q: gl.tensor
    cu_k: gl.tensor


class Sizes(NamedTuple):
    """Of the tensors: heads (of the side whose tiles are taken), queries, keys, and tiles a head."""

    heads: gl.tensor
    Sq: gl.tensor
    Sk: gl.tensor
    tiles: gl.tensor


class Paging(NamedTuple):
    """The pages of request b are pages[indptr[b]], pages[indptr[b] + 1], and so on: of PAGE alone."""

    indptr: gl.tensor
    pages: gl.tensor


class Rows(NamedTuple):
    """Rows of one head of one sequence: row i at `row + i` of the matrix, in pages at
    `pages[i // PAGE] * page_rows + row + i % PAGE`; from column `col` on.
    """

    desc: gl.tensor
    row: gl.tensor
    col: gl.tensor
    pages: gl.tensor
    page_rows: gl.tensor


class Lists(NamedTuple):
    """BLOCK_SPARSE: the blocks of each tile, the full ones first, how many there are, and how many of them are full."""

    blocks: gl.tensor
    counts: gl.tensor
    full: gl.tensor
    stride_b: gl.tensor
    stride_h: gl.tensor
    width: gl.tensor


class Bits(NamedTuple):
    """BITS: of each tile its first block of words, and the words; see `_block_lists.bits`."""

    first: gl.tensor
    words: gl.tensor


class Problem(NamedTuple):
    """What score and mask are told of a tile."""

    b: gl.tensor
    h: gl.tensor
    Sq: gl.tensor
    Sk: gl.tensor
    off: gl.tensor
    """Sk - Sq."""
    w: gl.tensor
    scale: gl.tensor
    cap: gl.tensor
    score_args: gl.tuple
    mask_args: gl.tuple


@gluon.jit
def take(t, items, sizes, LAST_FIRST: gl.constexpr, c: gl.constexpr):
    """Work number t."""
    tile = t % sizes.tiles
    h = t // sizes.tiles
    if c.LISTED_WORK:
        at = items.items + ITEM * tile
        b = gl.load(at)
        q0 = gl.load(items.cu_q + b)
        k0 = gl.load(items.cu_k + b)
        Sq = gl.load(items.cu_q + b + 1) - q0
        Sk = gl.load(items.cu_k + b + 1) - k0
        stop = gl.minimum(gl.load(at + 3), Sk)
        return Work(gl.load(at + 1), b, h, 0, q0, k0, h * sizes.Sq + q0, Sq, Sk, gl.load(at + 2), stop, gl.load(at + 4))
    else:
        if LAST_FIRST:
            tile = sizes.tiles - 1 - tile
        b = h // sizes.heads
        h = h % sizes.heads
        return Work(tile, b, h, b, 0, 0, (b * sizes.heads + h) * sizes.Sq, sizes.Sq, sizes.Sk, 0, sizes.Sk, 0)


@gluon.jit
def rows_of(desc, view, entry, first, head):
    """Rows of one head from row `first` of a batch entry on; `view` has rows of a batch entry and of a head, and columns of
    a head, as `_views.MatrixView` counts them.
    """
    batch, head_rows, head_cols = view
    return Rows(desc, entry * batch + head * head_rows + first, head * head_cols, 0, 0)


@gluon.jit
def key_rows(desc, view, paging, work, head, c: gl.constexpr):
    """Keys (or values, or their gradients) of one head of the work's sequence; in pages a page is what a batch entry is."""
    if c.PAGE:
        page_rows, head_rows, head_cols = view
        return Rows(
            desc, head * head_rows, head * head_cols, paging.pages + gl.load(paging.indptr + work.request), page_rows
        )
    else:
        return rows_of(desc, view, work.entry, work.k0, head)


@gluon.jit
def expect_rows(ready, a, A: gl.constexpr, b, B: gl.constexpr):
    """Announce A rows of `a` and B rows of `b` at a barrier, before they are loaded."""
    of_a: gl.constexpr = a.desc.block_type.nbytes * (A // a.desc.block_type.shape[0])
    of_b: gl.constexpr = b.desc.block_type.nbytes * (B // b.desc.block_type.shape[0])
    mbarrier.expect(ready, of_a + of_b)


@gluon.jit
def load_rows(rows, first, count, ready, buffer, B: gl.constexpr, PAGE: gl.constexpr):
    """Start to copy rows [first, first + B) to shared memory; whoever waits for `ready` expects their bytes.

    What follows the last of `count` rows is another row, or zero; in pages it may be anything: see `clear_rows`.
    """
    if PAGE:
        BOX: gl.constexpr = rows.desc.block_type.shape[0]
        for i in gl.static_range(B // BOX):
            at = first + BOX * i
            row = gl.load(rows.pages + at // PAGE, mask=at < count, other=0) * rows.page_rows + rows.row + at % PAGE
            tma.async_copy_global_to_shared(rows.desc, [row, rows.col], ready, buffer.slice(BOX * i, BOX, 0))
    else:
        tma.async_copy_global_to_shared(rows.desc, [rows.row + first, rows.col], ready, buffer)


@gluon.jit
def clear_rows(buffer, first, B: gl.constexpr, D: gl.constexpr):
    """Zero rows [first, B) of a tile in shared memory, for this warpgroup's next products.

    What follows the last key in its page may be anything, and 0 times NaN is NaN.
    """
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    for i in gl.static_range(B // 16):
        if first < 16 * i + 16:
            part = buffer.slice(16 * i, 16, 0)
            kept = 16 * i + gl.arange(0, 16, gl.SliceLayout(1, LINES)) < first
            x = part.load(LINES)
            part.store(gl.where(kept[:, None], x, 0.0).to(buffer.dtype))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def store_rows(rows, OUT, stride, x, buffer, first, count, D: gl.constexpr, LO: gl.constexpr, PAGE: gl.constexpr):
    """Write a tile to rows [first, first + 64) through `buffer` by TMA (not waited for), at a sequence's end row by row.

    What went through the buffer before has left it by then.
    """
    if first + 64 <= count:
        tma.store_wait(0)
        gl.thread_barrier()
        buffer.store(x)
        fence_async_shared()
        if PAGE:
            BOX: gl.constexpr = rows.desc.block_type.shape[0]
            for i in gl.static_range(64 // BOX):
                at = first + BOX * i
                row = gl.load(rows.pages + at // PAGE) * rows.page_rows + rows.row + at % PAGE
                tma.async_copy_shared_to_global(rows.desc, [row, rows.col], buffer.slice(BOX * i, BOX, 0))
        else:
            tma.async_copy_shared_to_global(rows.desc, [rows.row + first, rows.col], buffer)
    else:
        at = first + gl.arange(0, 64, gl.SliceLayout(1, LO))
        cols = gl.arange(0, D, gl.SliceLayout(0, LO))
        if PAGE:
            page = gl.load(rows.pages + at // PAGE, mask=at < count, other=0).to(gl.int64)
            row = page * rows.page_rows + rows.row + at % PAGE
            to = OUT + row[:, None] * stride + (rows.col + cols[None, :])
        else:
            to = OUT + (rows.row + at[:, None]).to(gl.int64) * stride + (rows.col + cols[None, :])
        gl.store(to, x, mask=(at < count)[:, None] & (cols >= 0)[None, :])


@gluon.jit
def barriers(n: gl.constexpr, count: gl.constexpr):
    """Allocate n barriers, each complete after `count` arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [n, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(n):
        mbarrier.init(bars.index(i), count=count)
    return bars


@gluon.jit
def opaque_zero(n):
    """0 for a loop's counter, which the compiler cannot know: what it enters is computed anew, not kept in registers."""
    return n >> 30


@gluon.jit
def post(mailbox, stage, numbers):
    """Write what describes a tile where all partitions read it: 16 numbers a stage."""
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for i in gl.static_range(len(numbers)):
        mailbox.index(16 * stage + i).store(gl.full([1], numbers[i], gl.int32, lanes))


@gluon.jit
def posted(mailbox, stage, i: gl.constexpr, warps: gl.constexpr = 4):
    return gl.max(mailbox.index(16 * stage + i).load(gl.BlockedLayout([1], [32], [warps], [0])), 0)


@gluon.jit
def key_blocks(work, w, c: gl.constexpr):
    """Key blocks of a tile of queries, visited from the last: (last, masked, masked or full, count).

    The first `masked` are partial, then come full ones, then from `masked or full` on partial ones again.
    """
    lo, full_lo, full_hi, hi = key_range(
        work.tile * c.BM, c.BM, c.BN, work.Sk, work.Sk - work.Sq, w, c.CAUSAL, c.WINDOW
    )
    if c.LISTED_WORK:
        # Of a part of the keys: whole blocks.
        lo = gl.maximum(lo, work.start // c.BN)
        hi = gl.maximum(gl.minimum(hi, gl.cdiv(work.stop, c.BN)), lo)
        full_lo = gl.minimum(gl.maximum(full_lo, lo), hi)
        full_hi = gl.minimum(gl.maximum(full_hi, full_lo), hi)
    if c.MASK is not None:
        full_lo = lo
        full_hi = lo
    return hi - 1, hi - full_hi, hi - full_lo, hi - lo


@gluon.jit
def query_blocks(n0, BN: gl.constexpr, Sq, off, w, c: gl.constexpr):
    """Query blocks of keys [n0, n0 + BN), visited from the first: (first, masked, masked or full, count)."""
    lo, full_lo, full_hi, hi = query_range(n0, BN, c.BM, Sq, off, w, c.CAUSAL, c.WINDOW)
    if c.MASK is not None:
        full_lo = hi
        full_hi = hi
    return lo, full_lo - lo, full_hi - lo, hi - lo


@gluon.jit
def row_of(lists, b, h, tile):
    """A tile's row in the lists of blocks."""
    return b * lists.stride_b + h * lists.stride_h + tile


@gluon.jit
def key_list(work, w, lists, c: gl.constexpr):
    """Key blocks of a tile of queries: (list of them, last, masked, masked or full, count); see `key_blocks`."""
    if c.BLOCK_SPARSE:
        row = row_of(lists, work.request, work.head, work.tile)
        blocks = lists.blocks + row.to(gl.int64) * lists.width
        return blocks, 0, 0, gl.load(lists.full + row), gl.load(lists.counts + row)
    else:
        last, masked, masked_or_full, count = key_blocks(work, w, c)
        return lists.blocks, last, masked, masked_or_full, count


@gluon.jit
def block_at(blocks, start, n, STEP: gl.constexpr, BLOCK_SPARSE: gl.constexpr):
    """The n-th block to visit: listed, or counted from `start`."""
    if BLOCK_SPARSE:
        return gl.load(blocks + n)
    else:
        return start + STEP * n


@gluon.jit
def masked(S, q, k, qv, kv, problem, c: gl.constexpr):
    """Scores with -inf where query q does not see key k; `qv` and `kv` are those vectors, kept inside."""
    seen = visible(q, k, problem.Sk, problem.off, problem.w, c.CAUSAL, c.WINDOW)
    if c.MASK is not None:
        seen = seen & c.MASK(problem.b, problem.h, qv, kv, problem.off, problem.mask_args)
    return gl.where(seen, S, -float("inf"))
