# mypy: ignore-errors
# (Gluon's language, which Python's types do not describe.)
"""What the Hopper kernels share: a program's tile, the blocks it visits, score and mask of one tile of scores."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)


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
        b = gl.load(TILES + 2 * tile)
        tile = gl.load(TILES + 2 * tile + 1)
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
    """Key blocks of queries [m0, m0 + BM), visited from the last: (last, masked, masked or whole, count).

    The first `masked` are seen in part, then come whole ones, then from `masked or whole` on those in part again.
    """
    lo = 0
    hi = Sk
    whole_lo = 0
    whole_hi = Sk // BN
    if CAUSAL:
        hi = gl.minimum(hi, gl.maximum(m0 + BM + off, 0))
        whole_hi = gl.minimum(whole_hi, gl.maximum(m0 + off + 1, 0) // BN)
    if WINDOW:
        lo = gl.maximum(m0 + off - w + 1, 0) // BN
        whole_lo = gl.cdiv(gl.maximum(m0 + BM + off - w, 0), BN)
        if not CAUSAL:
            hi = gl.minimum(hi, gl.maximum(m0 + BM - 1 + off + w, 0))
            whole_hi = gl.minimum(whole_hi, gl.maximum(m0 + off + w, 0) // BN)
    hi = gl.maximum(gl.cdiv(hi, BN), lo)
    whole_lo = gl.minimum(gl.maximum(whole_lo, lo), hi)
    whole_hi = gl.minimum(gl.maximum(whole_hi, whole_lo), hi)
    if ALL_MASKED:
        whole_lo = lo
        whole_hi = lo
    return hi - 1, hi - whole_hi, hi - whole_lo, hi - lo


@gluon.jit
def query_blocks(n0, BN: gl.constexpr, BM: gl.constexpr, Sq, off, w, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
                 ALL_MASKED: gl.constexpr):  # fmt: skip
    """Query blocks of keys [n0, n0 + BN), visited from the first: (first, masked, masked or whole, count)."""
    lo = 0
    hi = Sq
    whole_lo = 0
    whole_hi = Sq // BM
    if CAUSAL:
        lo = gl.maximum(n0 - off, 0) // BM
        whole_lo = gl.cdiv(gl.maximum(n0 + BN - 1 - off, 0), BM)
    if WINDOW:
        hi = gl.minimum(hi, gl.maximum(n0 + BN - 1 + w - off, 0))
        whole_hi = gl.minimum(whole_hi, gl.maximum(n0 + w - off, 0) // BM)
        if not CAUSAL:
            lo = gl.maximum(n0 - w - off + 1, 0) // BM
            whole_lo = gl.cdiv(gl.maximum(n0 + BN - w - off, 0), BM)
    hi = gl.maximum(gl.cdiv(hi, BM), lo)
    whole_lo = gl.minimum(gl.maximum(whole_lo, lo), hi)
    whole_hi = gl.minimum(gl.maximum(whole_hi, whole_lo), hi)
    if ALL_MASKED:
        whole_lo = hi
        whole_hi = hi
    return lo, whole_lo - lo, whole_hi - lo, hi - lo


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
    gap = q + off - k
    seen = (k < Sk) & (gap == gap)
    if c.CAUSAL:
        seen = seen & (gap >= 0)
    if c.WINDOW:
        seen = seen & (gap < w) & (gap > -w)
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
