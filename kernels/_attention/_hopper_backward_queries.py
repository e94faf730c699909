# mypy: ignore-errors
# (Gluon's language, which Python's types do not describe.)
"""dQ on Hopper by itself: without atomics, the same bits every time, for two of seven products more."""

from typing import NamedTuple

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from trainkit.kernels._attention._hopper_bits import bits_of
from trainkit.kernels._attention._hopper_gradients import row_stats, score_gradient, slope_of, weigh
from trainkit.kernels._attention._hopper_tiles import (
    Items,
    Lists,
    Paging,
    Problem,
    Rows,
    Sizes,
    barriers,
    block_at,
    clear_rows,
    expect_rows,
    key_list,
    key_rows,
    load_rows,
    opaque_zero,
    row_of,
    rows_of,
    store_rows,
    take,
)


class QueryMemory(NamedTuple):
    """Shared memory: the tile's queries and output gradients, stages of keys and values."""

    q: gl.tensor
    do: gl.tensor
    k: gl.tensor
    v: gl.tensor


class QueryBarriers(NamedTuple):
    """Of each stage: that it is full, that it is free again."""

    q_ready: gl.tensor
    k_ready: gl.tensor
    k_free: gl.tensor
    v_ready: gl.tensor
    v_free: gl.tensor


class Sides(NamedTuple):
    """Where the program's tensors lie."""

    q: Rows
    do: Rows
    k: Rows
    v: Rows
    dq: Rows


class Walk(NamedTuple):
    """The key blocks to visit: the list, the last one, how many are masked at first, masked or full, and in all."""

    blocks: gl.tensor
    last: gl.tensor
    masked: gl.tensor
    masked_or_full: gl.tensor
    count: gl.tensor
    words: gl.tensor


class Slope(NamedTuple):
    """ALiBi's slope, and the key that positions count from."""

    slope: gl.tensor
    first: gl.tensor


@gluon.jit
def queries_producer(sides, m0, walk, Sk, memory, bars, c: gl.constexpr):
    """Bring the tile's queries and output gradients once, then its key and value blocks."""
    expect_rows(bars.q_ready.index(0), sides.q, 128, sides.do, 128)
    for j in gl.static_range(2):
        load_rows(sides.q, m0 + 64 * j, 0, bars.q_ready.index(0), memory.q.index(j), 64, 0)
        load_rows(sides.do, m0 + 64 * j, 0, bars.q_ready.index(0), memory.do.index(j), 64, 0)
    for n in range(0, walk.count):
        at = block_at(walk.blocks, walk.last, n, -1, c.BLOCK_SPARSE) * c.BN
        s = n % c.ST
        v = n % c.SV
        mbarrier.wait(bars.k_free.index(s), ((n // c.ST) & 1) ^ 1)
        expect_rows(bars.k_ready.index(s), sides.k, c.BN, sides.k, 0)
        load_rows(sides.k, at, Sk, bars.k_ready.index(s), memory.k.index(s), c.BN, c.PAGE)
        mbarrier.wait(bars.v_free.index(v), ((n // c.SV) & 1) ^ 1)
        expect_rows(bars.v_ready.index(v), sides.v, c.BN, sides.v, 0)
        load_rows(sides.v, at, Sk, bars.v_ready.index(v), memory.v.index(v), c.BN, c.PAGE)


@gluon.jit
def queries_step(
    dq, dS, lse, delta, slope, rows, n, walk, problem, memory, bars, MASKED: gl.constexpr, W: gl.constexpr, L: gl.constexpr,
    LO: gl.constexpr, c: gl.constexpr,
):  # fmt: skip
    """Block n's dS, while that of block n - 1 (0 before the first) meets its keys."""
    at = block_at(walk.blocks, walk.last, n, -1, c.BLOCK_SPARSE) * c.BN
    s = n % c.ST
    t = gl.maximum(n - 1, 0) % c.ST
    mine = W + opaque_zero(n)
    v = n % c.SV + opaque_zero(n)
    zero = gl.zeros([64, c.BN], gl.float32, L)
    words = 0
    if MASKED:
        words = bits_of(walk.words, n, W, c.BM, c.BN, L, c)
    mbarrier.wait(bars.k_ready.index(s), (n // c.ST) & 1)
    if c.PAGE:  # noqa: SIM102 (one is known when compiling, the other is not)
        # The first block visited holds the last key.
        if n == 0:
            mbarrier.wait(bars.v_ready.index(v), 0)
            clear_rows(memory.k.index(s), problem.Sk - at, c.BN, c.D)
            clear_rows(memory.v.index(v), problem.Sk - at, c.BN, c.DV)
    S = warpgroup_mma(memory.q.index(mine), memory.k.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(bars.v_ready.index(v), (n // c.SV) & 1)
    dP = warpgroup_mma(memory.do.index(mine), memory.v.index(v).permute((1, 0)), zero, use_acc=False, is_async=True)
    dq = warpgroup_mma(dS, memory.k.index(t), dq, is_async=True)
    S = warpgroup_mma_wait(2, deps=[S])
    cols = at + gl.arange(0, c.BN, gl.SliceLayout(0, L))
    kv = gl.minimum(cols, problem.Sk - 1) if MASKED else cols
    shift = 0.0
    if c.ALIBI:
        shift = slope.slope * (cols - slope.first).to(gl.float32)[None, :]
    _p, weight = weigh(S, lse[:, None], shift, rows[:, None], cols[None, :], rows, kv, problem, words, MASKED, c)
    dP = warpgroup_mma_wait(1, deps=[dP])
    mbarrier.arrive(bars.v_free.index(v))
    ds = score_gradient(weight, dP - delta[:, None], S, rows, kv, problem, c)
    dq = warpgroup_mma_wait(0, deps=[dq])
    if n > 0:
        mbarrier.arrive(bars.k_free.index(t))
    return dq, gl.convert_layout(ds.to(memory.k.dtype), gl.DotOperandLayout(0, LO, 2))


@gluon.jit
def queries_consumer(problem, stats, sides, DQ, stride, m0, walk, memory, bars, W: gl.constexpr, c: gl.constexpr):
    """Queries [m0 + 64 W, m0 + 64 W + 64): their gradient over the keys they see."""
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, c.BN, 16])
    LO: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, c.D, 16])
    LSE, DELTA = stats
    Sq = problem.Sq
    first = m0 + 64 * W
    offsets = first + gl.arange(0, 64, gl.SliceLayout(1, L))
    lse, delta = row_stats(LSE, DELTA, offsets, Sq)
    slope = Slope(0.0, m0)
    if c.ALIBI:
        slope = Slope(slope_of(problem, c), m0 + problem.off)
        lse += slope.slope * (offsets - m0).to(gl.float32)
    rows = gl.minimum(offsets, Sq - 1)
    dq = gl.zeros([64, c.D], gl.float32, LO)
    dS = gl.zeros([64, c.BN], memory.q.dtype, gl.DotOperandLayout(0, LO, 2))
    mbarrier.wait(bars.q_ready.index(0), 0)
    for n in range(0, walk.masked):
        dq, dS = queries_step(dq, dS, lse, delta, slope, rows, n, walk, problem, memory, bars, True, W, L, LO, c)
    for n in range(walk.masked, walk.masked_or_full):
        dq, dS = queries_step(dq, dS, lse, delta, slope, rows, n, walk, problem, memory, bars, False, W, L, LO, c)
    if c.WINDOW or c.BLOCK_SPARSE:
        for n in range(walk.masked_or_full, walk.count):
            dq, dS = queries_step(dq, dS, lse, delta, slope, rows, n, walk, problem, memory, bars, True, W, L, LO, c)
    if walk.count > 0:
        dq = warpgroup_mma(dS, memory.k.index((walk.count - 1) % c.ST), dq, is_async=True)
        dq = warpgroup_mma_wait(0, deps=[dq])
    dq = (dq * problem.scale).to(memory.q.dtype)
    store_rows(sides.dq, DQ, stride, dq, memory.q.index(W), first, Sq, c.D, LO, 0)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["Hq", "Sq", "Sk", "w", "tiles", "dq_part"])
def backward_queries(
    q_d, k_d, v_d, do_d, dq_d, DQ, LSE, DELTA, ITEMS, CU_Q, CU_K, BLOCKS, COUNTS, FULL, FIRST, WORDS, INDPTR, PAGES, list_strides,
    views, dq_stride, dq_part, Hq, Sq, Sk, w, scale, cap, score_args, mask_args, tiles, c: gl.constexpr,
):  # fmt: skip
    """Compute dQ of 128 queries of one head; of a part of the keys it is a part of dQ, `dq_part` rows after the one before."""
    q_view, k_view, v_view, do_view = views
    stride_b, stride_h, width = list_strides
    paging = Paging(INDPTR, PAGES)
    work = take(gl.program_id(0), Items(ITEMS, CU_Q, CU_K), Sizes(Hq, Sq, Sk, tiles), c.CAUSAL, c)
    h = work.head
    m0 = work.tile * 128
    lists = Lists(BLOCKS, COUNTS, FULL, stride_b, stride_h, width)
    blocks, last, n1, n2, count = key_list(work, w, lists, c)
    if c.BITS:
        WORDS += (gl.load(FIRST + row_of(lists, work.request, h, work.tile)) - n2) * (4 * c.BM)
    memory = QueryMemory(
        gl.allocate_shared_memory(q_d.dtype, [2, 64, c.D], q_d.layout),
        gl.allocate_shared_memory(do_d.dtype, [2, 64, c.DV], do_d.layout),
        gl.allocate_shared_memory(k_d.dtype, [c.ST, c.BN, c.D], k_d.layout),
        gl.allocate_shared_memory(v_d.dtype, [c.SV, c.BN, c.DV], v_d.layout),
    )
    bars = QueryBarriers(barriers(1, 1), barriers(c.ST, 1), barriers(c.ST, 2), barriers(c.SV, 1), barriers(c.SV, 2))
    dq_row = work.entry * Sq + work.q0
    if c.LISTED_WORK:
        dq_row += work.part * dq_part
    sides = Sides(
        rows_of(q_d, q_view, work.entry, work.q0, h), rows_of(do_d, do_view, work.entry, work.q0, h),
        key_rows(k_d, k_view, paging, work, h // c.GROUP, c), key_rows(v_d, v_view, paging, work, h // c.GROUP, c),
        Rows(dq_d, dq_row, h * c.D, 0, 0),
    )  # fmt: skip
    problem = Problem(work.request, h, work.Sq, work.Sk, work.Sk - work.Sq, w, scale, cap, score_args, mask_args)
    stats = (LSE + work.stats, DELTA + work.stats)
    walk = Walk(blocks, last, n1, n2, count, WORDS)
    gl.warp_specialize([
        (queries_consumer, (problem, stats, sides, DQ, dq_stride, m0, walk, memory, bars, 0, c)),
        (queries_consumer, (problem, stats, sides, DQ, dq_stride, m0, walk, memory, bars, 1, c)),
        (queries_producer, (sides, m0, walk, work.Sk, memory, bars, c)),
    ], [4, 1], [240, 24])  # fmt: skip
