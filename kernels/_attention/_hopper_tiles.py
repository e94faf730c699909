# mypy: ignore-errors
# (Gluon's language, which Python's types do not describe.)
"""What the Hopper kernels share: a program's tile, the blocks it visits, score and mask of one tile of scores."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from trainkit.kernels._attention._ranges import ranges
from trainkit.kernels._attention._work import ITEM as _ITEM

ITEM = gl.constexpr(_ITEM)
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)

key_range, query_range, visible = ranges(gluon.jit, gl)


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
def post(box, page, numbers):
    """Write what describes a tile where all partitions read it: 16 numbers a page."""
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for i in gl.static_range(len(numbers)):
        box.index(16 * page + i).store(gl.full([1], numbers[i], gl.int32, lanes))


@gluon.jit
def posted(box, page, i: gl.constexpr, warps: gl.constexpr = 4):
    return gl.max(box.index(16 * page + i).load(gl.BlockedLayout([1], [32], [warps], [0])), 0)


@gluon.jit
def locate(t, tables, sizes, LAST_FIRST: gl.constexpr, PACKED: gl.constexpr):
    """Find tile number t.

    Args:
        tables: sequence and tile of each tile of a head, cumulative lengths of queries and of keys (packed only).
        sizes: heads, queries, keys, tiles a head.

    Returns:
        Tile, batch entry or sequence, head, batch entry of the tensors, first row, first key, rows before the head's in
        lse, queries, keys.
    """
    TILES, CU_Q, CU_K = tables
    H, Sq, Sk, tiles = sizes
    tile = t % tiles
    h = t // tiles
    if PACKED:
        b = gl.load(TILES + ITEM * tile)
        tile = gl.load(TILES + ITEM * tile + 1)
        zb = 0
        q0 = gl.load(CU_Q + b)
        k0 = gl.load(CU_K + b)
        stats = h * Sq + q0
        Sq = gl.load(CU_Q + b + 1) - q0
        Sk = gl.load(CU_K + b + 1) - k0
    else:
        if LAST_FIRST:
            tile = tiles - 1 - tile
        b = h // H
        h = h % H
        zb = b
        q0 = 0
        k0 = 0
        stats = (b * H + h) * Sq
    return tile, b, h, zb, q0, k0, stats, Sq, Sk


@gluon.jit
def key_blocks(m0, BM: gl.constexpr, BN: gl.constexpr, Sk, off, w, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
               ALL_MASKED: gl.constexpr):  # fmt: skip
    """Key blocks of queries [m0, m0 + BM), visited from the last: (last, masked, masked or full, count).

    The first `masked` are partial, then come full ones, then from `masked or full` on partial ones again.
    """
    lo, full_lo, full_hi, hi = key_range(m0, BM, BN, Sk, off, w, CAUSAL, WINDOW)
    if ALL_MASKED:
        full_lo = lo
        full_hi = lo
    return hi - 1, hi - full_hi, hi - full_lo, hi - lo


@gluon.jit
def query_blocks(n0, BN: gl.constexpr, BM: gl.constexpr, Sq, off, w, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
                 ALL_MASKED: gl.constexpr):  # fmt: skip
    """Query blocks of keys [n0, n0 + BN), visited from the first: (first, masked, masked or full, count)."""
    lo, full_lo, full_hi, hi = query_range(n0, BN, BM, Sq, off, w, CAUSAL, WINDOW)
    if ALL_MASKED:
        full_lo = hi
        full_hi = hi
    return lo, full_lo - lo, full_hi - lo, hi - lo


@gluon.jit
def block_at(BLOCKS, start, n, STEP: gl.constexpr, LISTED: gl.constexpr):
    """The n-th block to visit: listed, or counted from `start`."""
    if LISTED:
        return gl.load(BLOCKS + n)
    else:
        return start + STEP * n


@gluon.jit
def masked(S, q, k, qv, kv, problem, c: gl.constexpr):
    """Scores with -inf where query q does not see key k; `qv` and `kv` are those vectors, kept inside."""
    b, h, _, Sk, off, w, _, _, _, args = problem
    seen = visible(q, k, Sk, off, w, c.CAUSAL, c.WINDOW)
    if c.MASK is not None:
        seen = seen & c.MASK(b, h, qv, kv, off, args)
    return gl.where(seen, S, -float("inf"))


@gluon.jit
def key_list(tile, b, h, Sq, Sk, w, lists, c: gl.constexpr):
    """Key blocks of a tile of queries: (list of them, last, masked, masked or whole, count); see `key_blocks`."""
    BLOCKS, COUNTS, FULL, sbb, sbh, NB = lists
    if c.LISTED:
        row = b * sbb + h * sbh + tile
        BLOCKS += row.to(gl.int64) * NB
        last = 0
        n1 = 0
        n2 = gl.load(FULL + row)
        count = gl.load(COUNTS + row)
    else:
        last, n1, n2, count = key_blocks(tile * c.BM, c.BM, c.BN, Sk, Sk - Sq, w, c.CAUSAL, c.WINDOW,
                                         c.MASK is not None)  # fmt: skip
    return BLOCKS, last, n1, n2, count
