# mypy: ignore-errors
# (Triton's language, which Python's types do not describe.)
"""The seams of the Triton template, which forward and backward share: where rows lie, which work a program takes, what is
known of a tile; and dropout.

A kernel's body asks these three, and knows nothing of batches, packed sequences, pages or splits:

- `Work`: one program's piece of work, from arithmetic over a grid or from a list that a plan made (`take`).
- `Rows`: the rows of one head of one sequence, wherever they lie: dense, packed or in pages (`rows_of`, `load_rows`).
- `Problem`: what score and mask are told of the tile.

Where results go (`output_rows`) is a `Rows` too: the final tensor, or, of work that sees a part of the keys, the part's own.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from trainkit.kernels._attention._dropout import HEAD as _HEAD
from trainkit.kernels._attention._dropout import MIX_A as _MIX_A
from trainkit.kernels._attention._dropout import MIX_B as _MIX_B
from trainkit.kernels._attention._dropout import ROW as _ROW
from trainkit.kernels._attention._ranges import ranges
from trainkit.kernels._attention._work import ITEM as _ITEM

HEAD: tl.constexpr = tl.constexpr(_HEAD)
MIX_A: tl.constexpr = tl.constexpr(_MIX_A)
MIX_B: tl.constexpr = tl.constexpr(_MIX_B)
ROW: tl.constexpr = tl.constexpr(_ROW)
ITEM: tl.constexpr = tl.constexpr(_ITEM)

key_range, query_range, visible = ranges(triton.jit)


class Work(NamedTuple):
    """What one program does."""

    tile: tl.tensor
    """Which tile of the sequence's queries (or keys)."""
    request: tl.tensor
    """Batch entry, or packed sequence: `b` of score and mask."""
    head: tl.tensor
    entry: tl.tensor
    """Batch entry of the tensors, int64; 0 for packed sequences."""
    q0: tl.tensor
    """The sequence's first row among its entry's queries, int64; k0 among its keys."""
    k0: tl.tensor
    Sq: tl.tensor
    Sk: tl.tensor
    start: tl.tensor
    """Keys [start, stop) of the sequence are this program's, in whole blocks."""
    stop: tl.tensor
    part: tl.tensor
    """Which of the parts of a result that several programs share, int64; 0 where one has all keys."""


class Rows(NamedTuple):
    """Rows of one head of one sequence: row i at base + i * stride, in pages at
    base + pages[i // PAGE] * page_stride + i % PAGE * stride.
    """

    base: tl.tensor
    stride: tl.tensor
    pages: tl.tensor
    page_stride: tl.tensor


class Problem(NamedTuple):
    """What score, mask and dropout are told of a tile."""

    b: tl.tensor
    h: tl.tensor
    b_head: tl.tensor
    """b * Hq + h, which dropout hashes."""
    Sq: tl.tensor
    Sk: tl.tensor
    off: tl.tensor
    """Sk - Sq."""
    w: tl.tensor
    scale: tl.tensor
    seed: tl.tensor
    threshold: tl.tensor
    keep_scale: tl.tensor
    score_args: tl.tuple
    mask_args: tl.tuple


@triton.jit
def take(ITEMS, CU_Q, CU_K, heads, Sq, Sk, tiles, LAST_FIRST: tl.constexpr, c: tl.constexpr):
    """This program's work: of `tiles` a head, of `heads` a batch entry.

    LISTED_WORK: ITEMS int32 `[tiles, 5]` has each tile's request, tile, first key, key after the last, and part; sequences
    lie end to end, cumulative lengths in CU_Q and CU_K.
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    h = pid // tiles % heads
    zero = tl.zeros([], tl.int64)
    if c.LISTED_WORK:
        ITEMS += ITEM * tile.to(tl.int64)
        b = tl.load(ITEMS)
        q0 = tl.load(CU_Q + b).to(tl.int64)
        k0 = tl.load(CU_K + b).to(tl.int64)
        queries = tl.load(CU_Q + b + 1) - tl.load(CU_Q + b)
        keys = tl.load(CU_K + b + 1) - tl.load(CU_K + b)
        stop = tl.minimum(tl.load(ITEMS + 3), keys)
        part = tl.load(ITEMS + 4).to(tl.int64)
        return Work(tl.load(ITEMS + 1), b, h, zero, q0, k0, queries, keys, tl.load(ITEMS + 2), stop, part)
    else:
        if LAST_FIRST:
            # The last queries see the most keys under a causal mask: they start first.
            tile = tiles - 1 - tile
        b = pid // tiles // heads
        return Work(tile, b, h, b.to(tl.int64), zero, zero, Sq, Sk, tile * 0, Sk, zero)


@triton.jit
def rows_of(x, entry, first, head):
    """Rows of one head from row `first` of a batch entry on; `x` is (pointer, strides of batch, tokens and heads)."""
    X, sb, ss, sh = x
    return Rows(X + entry * sb + head.to(tl.int64) * sh + first * ss, ss, X, ss)


@triton.jit
def key_rows(x, paging, work, head, c: tl.constexpr):
    """Keys (or values, or their gradients) of one head of the work's sequence.

    PAGE: `x` is (pointer, strides of pages, tokens and heads), and `paging` (INDPTR, PAGES): the pages of request b are
    PAGES[INDPTR[b]], PAGES[INDPTR[b] + 1], and so on.
    """
    X, sb, ss, sh = x
    if c.PAGE:
        INDPTR, PAGES = paging
        pages = PAGES + tl.load(INDPTR + work.request)
        return Rows(X + head.to(tl.int64) * sh, ss, pages, sb)
    else:
        return rows_of(x, work.entry, work.k0, head)


@triton.jit
def output_rows(x, work, part_stride, head):
    """Where the work's queries have their results: of part 0 in the tensor, of others `part_stride` elements further."""
    rows = rows_of(x, work.entry, work.q0, head)
    return Rows(rows.base + work.part * part_stride, rows.stride, rows.pages, rows.page_stride)


@triton.jit
def at_rows(rows, i, count, PAGE: tl.constexpr):
    """Addresses of rows i, a vector, of which those below `count` exist."""
    if PAGE:
        page = tl.load(rows.pages + i // PAGE, mask=i < count, other=0).to(tl.int64)
        return rows.base + page * rows.page_stride + (i % PAGE).to(tl.int64) * rows.stride
    else:
        return rows.base + i.to(tl.int64) * rows.stride


@triton.jit
def load_rows(rows, first, count, B: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr,
              MASKED: tl.constexpr):  # fmt: skip
    """Rows [first, first + B) as a tile, zeros beyond `count` rows and D columns."""
    i = first + tl.arange(0, B)
    cols = tl.arange(0, BD)
    at = at_rows(rows, i, count, PAGE)[:, None] + cols[None, :]
    if MASKED and D != BD:
        return tl.load(at, mask=(i < count)[:, None] & (cols < D)[None, :], other=0.0)
    elif MASKED:
        return tl.load(at, mask=(i < count)[:, None], other=0.0)
    elif D != BD:
        return tl.load(at, mask=(cols < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def pages_at(rows, first, count, B: tl.constexpr, PAGE: tl.constexpr):
    """The pages of rows [first, first + B), which are then read without waiting for the table."""
    i = first + tl.arange(0, B)
    return tl.load(rows.pages + i // PAGE, mask=i < count, other=0)


@triton.jit
def load_paged(rows, pages, first, count, B: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr,
               MASKED: tl.constexpr):  # fmt: skip
    """As `load_rows`, of known pages."""
    i = first + tl.arange(0, B)
    cols = tl.arange(0, BD)
    at = rows.base + pages.to(tl.int64) * rows.page_stride + (i % PAGE).to(tl.int64) * rows.stride
    at = at[:, None] + cols[None, :]
    if MASKED or D != BD:
        return tl.load(at, mask=(i < count)[:, None] & (cols < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def store_rows(rows, x, first, count, B: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PAGE: tl.constexpr):
    """Write a tile to rows [first, first + B), as far as they exist."""
    i = first + tl.arange(0, B)
    cols = tl.arange(0, BD)
    at = at_rows(rows, i, count, PAGE)[:, None] + cols[None, :]
    tl.store(at, x.to(rows.base.dtype.element_ty), mask=(i < count)[:, None] & (cols < D)[None, :])


@triton.jit
def block_spans(work, m0, w, lists, h, c: tl.constexpr):
    """Key blocks of a tile of queries, in the order of their visit, as three spans of which the second is of full blocks.

    Returns:
        The listed blocks (block-sparse masks), and the spans' borders.
    """
    BLOCKS, COUNTS, FULL, sbb, sbh, NB = lists
    if c.BLOCK_SPARSE:
        row = work.request * sbb + h * sbh + work.tile
        full = tl.load(FULL + row)
        return BLOCKS + row.to(tl.int64) * NB, full * 0, full * 0, full, tl.load(COUNTS + row)
    else:
        off = work.Sk - work.Sq
        lo, full_lo, full_hi, hi = key_range(m0, c.BM, c.BN, work.Sk, off, w, c.CAUSAL, c.WINDOW)
        # Of a part of the keys: whole blocks.
        lo = tl.maximum(lo, work.start // c.BN)
        hi = tl.maximum(tl.minimum(hi, tl.cdiv(work.stop, c.BN)), lo)
        full_lo = tl.minimum(tl.maximum(full_lo, lo), hi)
        full_hi = tl.minimum(tl.maximum(full_hi, full_lo), hi)
        if c.MASK is not None:
            full_lo = lo
            full_hi = lo
        return work.tile, lo, full_lo, full_hi, hi


@triton.jit
def first_of(blocks, i, SIZE: tl.constexpr, c: tl.constexpr):
    """Where a block begins: listed, the i-th of the list; otherwise i itself, which the loop counts in whole blocks (and not
    block by block: its registers did not suffice).
    """
    if c.BLOCK_SPARSE:
        return tl.load(blocks + i) * SIZE
    else:
        return i


@triton.jit
def mix(x):
    """The 32-bit hash of the dropout mask."""
    x = (x ^ (x >> 16)) * MIX_A
    x = (x ^ (x >> 15)) * MIX_B
    return x ^ (x >> 16)


@triton.jit
def keep(problem, q, k):
    """Which probabilities the dropout keeps."""
    row = mix(mix(problem.seed.to(tl.uint32) + problem.b_head.to(tl.uint32) * HEAD) ^ (q.to(tl.uint32) * ROW))
    return (mix(row ^ k.to(tl.uint32)) >> 8) >= problem.threshold.to(tl.uint32)
