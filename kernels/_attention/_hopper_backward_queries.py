# mypy: ignore-errors
# (Gluon's language, which Python's types do not describe.)
"""dQ on Hopper by itself: without atomics, the same bits every time, for two of seven products more."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from trainkit.kernels._attention._hopper_bits import bits_of
from trainkit.kernels._attention._hopper_gradients import put, row_stats, score_gradient, slope_of, weigh
from trainkit.kernels._attention._hopper_tiles import barriers, block_at, key_list, locate, opaque_zero


@gluon.jit
def queries_producer(task, starts, BLOCKS, last, count, c: gl.constexpr):
    """Bring the tile's queries and output gradients once, then its key and value blocks."""
    descs, memory, bars = task
    q_d, k_d, v_d, do_d, _ = descs
    qs, dos, ks, vs = memory
    q_ready, k_ready, k_free, v_ready, v_free = bars
    qr, qc, kr, kc, vr, vc, dr, dc = starts
    mbarrier.expect(q_ready.index(0), 2 * q_d.block_type.nbytes + 2 * do_d.block_type.nbytes)
    for j in gl.static_range(2):
        tma.async_copy_global_to_shared(q_d, [qr + 64 * j, qc], q_ready.index(0), qs.index(j))
        tma.async_copy_global_to_shared(do_d, [dr + 64 * j, dc], q_ready.index(0), dos.index(j))
    for n in range(0, count):
        at = block_at(BLOCKS, last, n, -1, c.LISTED) * c.BN
        s = n % c.ST
        v = n % c.SV
        mbarrier.wait(k_free.index(s), ((n // c.ST) & 1) ^ 1)
        mbarrier.expect(k_ready.index(s), k_d.block_type.nbytes)
        tma.async_copy_global_to_shared(k_d, [kr + at, kc], k_ready.index(s), ks.index(s))
        mbarrier.wait(v_free.index(v), ((n // c.SV) & 1) ^ 1)
        mbarrier.expect(v_ready.index(v), v_d.block_type.nbytes)
        tma.async_copy_global_to_shared(v_d, [vr + at, vc], v_ready.index(v), vs.index(v))


@gluon.jit
def queries_step(
    dq, dS, lse, delta, slope, rows, n, at, WORDS, problem, memory, bars, MASKED: gl.constexpr, W: gl.constexpr,
    L: gl.constexpr, LO: gl.constexpr, c: gl.constexpr,
):  # fmt: skip
    """Block n's dS, while that of block n - 1 (0 before the first) meets its keys."""
    qs, dos, ks, vs = memory
    _, k_ready, k_free, v_ready, v_free = bars
    s = n % c.ST
    t = gl.maximum(n - 1, 0) % c.ST
    mine = W + opaque_zero(n)
    v = n % c.SV + opaque_zero(n)
    zero = gl.zeros([64, c.BN], gl.float32, L)
    words = 0
    if MASKED:
        words = bits_of(WORDS, n, W, c.BM, c.BN, L, c)
    mbarrier.wait(k_ready.index(s), (n // c.ST) & 1)
    S = warpgroup_mma(qs.index(mine), ks.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(v), (n // c.SV) & 1)
    dP = warpgroup_mma(dos.index(mine), vs.index(v).permute((1, 0)), zero, use_acc=False, is_async=True)
    dq = warpgroup_mma(dS, ks.index(t), dq, is_async=True)
    S = warpgroup_mma_wait(2, deps=[S])
    cols = at + gl.arange(0, c.BN, gl.SliceLayout(0, L))
    kv = gl.minimum(cols, problem[3] - 1) if MASKED else cols
    shift = 0.0
    if c.ALIBI:
        shift = slope[0] * (cols - slope[1]).to(gl.float32)[None, :]
    _p, weight = weigh(S, lse[:, None], shift, rows[:, None], cols[None, :], rows, kv, problem, words, MASKED, c)
    dP = warpgroup_mma_wait(1, deps=[dP])
    mbarrier.arrive(v_free.index(v))
    ds = score_gradient(weight, dP - delta[:, None], S, rows, kv, problem, c)
    dq = warpgroup_mma_wait(0, deps=[dq])
    if n > 0:
        mbarrier.arrive(k_free.index(t))
    return dq, gl.convert_layout(ds.to(ks.dtype), gl.DotOperandLayout(0, LO, 2))


@gluon.jit
def queries_consumer(task, problem, stats, places, m0, BLOCKS, WORDS, walk, W: gl.constexpr, c: gl.constexpr):
    """Queries [m0 + 64 W, m0 + 64 W + 64): their gradient over the keys they see."""
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, c.BN, 16])
    LO: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, c.D, 16])
    descs, memory, bars = task
    qs, _, ks, _ = memory
    LSE, DELTA = stats
    DQ, dq_stride, out_row, out_col = places
    last, n1, n2, count = walk
    Sq, scale = problem[2], problem[6]
    offsets = m0 + 64 * W + gl.arange(0, 64, gl.SliceLayout(1, L))
    lse, delta = row_stats(LSE, DELTA, offsets, Sq)
    slope = (0.0, m0)
    if c.ALIBI:
        slope = (slope_of(problem, c), m0 + problem[4])
        lse += slope[0] * (offsets - m0).to(gl.float32)
    rows = gl.minimum(offsets, Sq - 1)
    dq = gl.zeros([64, c.D], gl.float32, LO)
    dS = gl.zeros([64, c.BN], qs.dtype, gl.DotOperandLayout(0, LO, 2))
    mbarrier.wait(bars[0].index(0), 0)
    for n in range(0, n1):
        at = block_at(BLOCKS, last, n, -1, c.LISTED) * c.BN
        dq, dS = queries_step(dq, dS, lse, delta, slope, rows, n, at, WORDS, problem, memory, bars, True, W, L, LO, c)
    for n in range(n1, n2):
        at = block_at(BLOCKS, last, n, -1, c.LISTED) * c.BN
        dq, dS = queries_step(dq, dS, lse, delta, slope, rows, n, at, WORDS, problem, memory, bars, False, W, L, LO, c)
    if c.WINDOW or c.LISTED:
        for n in range(n2, count):
            at = block_at(BLOCKS, last, n, -1, c.LISTED) * c.BN
            dq, dS = queries_step(
                dq, dS, lse, delta, slope, rows, n, at, WORDS, problem, memory, bars, True, W, L, LO, c
            )
    if count > 0:
        dq = warpgroup_mma(dS, ks.index((count - 1) % c.ST), dq, is_async=True)
        dq = warpgroup_mma_wait(0, deps=[dq])
    put(descs[4], DQ, (dq * scale).to(qs.dtype), qs.index(W), out_row, m0, out_col, dq_stride, Sq, W, c.D, LO)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["Hq", "Sq", "Sk", "w", "tiles"])
def backward_queries(
    q_d, k_d, v_d, do_d, dq_d, DQ, LSE, DELTA, TILES, CU_Q, CU_K, BLOCKS, COUNTS, FULL, FIRST, WORDS, sbb, sbh, NB,
    q_batch, q_head, q_col, k_batch, k_head, k_col, v_batch, v_head, v_col, do_batch, do_head, do_col, dq_stride, Hq, Sq, Sk,
    w, scale, cap, score_args, mask_args, tiles, c: gl.constexpr,
):  # fmt: skip
    """Compute dQ of 128 queries of one head."""
    total_q = Sq
    tile, b, h, zb, q0, k0, stats, Sq, Sk = locate(
        gl.program_id(0), (TILES, CU_Q, CU_K), (Hq, Sq, Sk, tiles), c.CAUSAL, c.PACKED
    )
    m0 = tile * 128
    off = Sk - Sq
    g = h // c.GROUP
    BLOCKS, last, n1, n2, count = key_list(tile, b, h, Sq, Sk, w, (BLOCKS, COUNTS, FULL, sbb, sbh, NB), c)
    if c.BITS:
        WORDS += (gl.load(FIRST + (b * sbb + h * sbh + tile)) - n2) * (4 * c.BM)
    memory = (
        gl.allocate_shared_memory(q_d.dtype, [2, 64, c.D], q_d.layout),
        gl.allocate_shared_memory(do_d.dtype, [2, 64, c.DV], do_d.layout),
        gl.allocate_shared_memory(k_d.dtype, [c.ST, c.BN, c.D], k_d.layout),
        gl.allocate_shared_memory(v_d.dtype, [c.SV, c.BN, c.DV], v_d.layout),
    )
    bars = (barriers(1, 1), barriers(c.ST, 1), barriers(c.ST, 2), barriers(c.SV, 1), barriers(c.SV, 2))
    starts = (
        zb * q_batch + h * q_head + q0 + m0, h * q_col, zb * k_batch + g * k_head + k0, g * k_col,
        zb * v_batch + g * v_head + k0, g * v_col, zb * do_batch + h * do_head + q0 + m0, h * do_col,
    )  # fmt: skip
    task = ((q_d, k_d, v_d, do_d, dq_d), memory, bars)
    problem = (b, h, Sq, Sk, off, w, scale, cap, score_args, mask_args)
    rows = (LSE + stats, DELTA + stats)
    places = (DQ, dq_stride, zb * total_q + q0, h * c.D)
    walk = (last, n1, n2, count)
    gl.warp_specialize([
        (queries_consumer, (task, problem, rows, places, m0, BLOCKS, WORDS, walk, 0, c)),
        (queries_consumer, (task, problem, rows, places, m0, BLOCKS, WORDS, walk, 1, c)),
        (queries_producer, (task, starts, BLOCKS, last, count, c)),
    ], [4, 1], [240, 24])  # fmt: skip
