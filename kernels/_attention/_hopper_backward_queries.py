# mypy: ignore-errors
# (Gluon's language, which Python's types do not describe.)
"""dQ on Hopper by itself: without atomics, the same bits every time, for two of seven products more."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from trainkit.kernels._attention._hopper_gradients import put, row_stats, weigh
from trainkit.kernels._attention._hopper_tiles import barriers, block_at, key_blocks, locate


@gluon.jit
def queries_producer(
    q_d, k_d, v_d, do_d, qs, ks, vs, dos, q_ready, k_ready, k_free, v_ready, v_free, BLOCKS, qr, qc, kr, kc, vr, vc,
    dr, dc,
    last, count, BN: gl.constexpr, ST: gl.constexpr, LISTED: gl.constexpr,
):  # fmt: skip
    """Bring the tile's queries and output gradients once, then its key and value blocks."""
    mbarrier.expect(q_ready.index(0), 2 * q_d.block_type.nbytes + 2 * do_d.block_type.nbytes)
    for j in gl.static_range(2):
        tma.async_copy_global_to_shared(q_d, [qr + 64 * j, qc], q_ready.index(0), qs.index(j))
        tma.async_copy_global_to_shared(do_d, [dr + 64 * j, dc], q_ready.index(0), dos.index(j))
    for n in range(0, count):
        at = block_at(BLOCKS, last, n, -1, LISTED) * BN
        s = n % ST
        phase = (n // ST) & 1
        mbarrier.wait(k_free.index(s), phase ^ 1)
        mbarrier.expect(k_ready.index(s), k_d.block_type.nbytes)
        tma.async_copy_global_to_shared(k_d, [kr + at, kc], k_ready.index(s), ks.index(s))
        mbarrier.wait(v_free.index(s), phase ^ 1)
        mbarrier.expect(v_ready.index(s), v_d.block_type.nbytes)
        tma.async_copy_global_to_shared(v_d, [vr + at, vc], v_ready.index(s), vs.index(s))


@gluon.jit
def queries_step(
    dq, S, qt, dot, ks, vs, lse, delta, k_ready, k_free, v_ready, v_free, BLOCKS, last, n, count, rows, b, h, Sk,
    off, w,
    scale, score_args, mask_args, BN: gl.constexpr, ST: gl.constexpr, L: gl.constexpr, LO: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, MASKED: gl.constexpr, LISTED: gl.constexpr, SCORE: gl.constexpr,
    GRAD: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Block n. On entry its S and the dQ of the block before are in flight, in that order."""
    s = n % ST
    zero = gl.zeros([64, BN], gl.float32, L)
    mbarrier.wait(v_ready.index(s), (n // ST) & 1)
    dP = warpgroup_mma(dot, vs.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
    S = warpgroup_mma_wait(2, deps=[S])
    cols = block_at(BLOCKS, last, n, -1, LISTED) * BN + gl.arange(0, BN, gl.SliceLayout(0, L))
    kv = gl.minimum(cols, Sk - 1)
    p = weigh(
        S, lse[:, None], rows[:, None], cols[None, :], rows, kv, b, h, Sk, off, w, scale, score_args, mask_args, CAUSAL,
        WINDOW, MASKED, SCORE, MASK,
    )  # fmt: skip
    dq = warpgroup_mma_wait(1, deps=[dq])
    if n > 0:
        mbarrier.arrive(k_free.index((n - 1) % ST))
    dP = warpgroup_mma_wait(0, deps=[dP])
    mbarrier.arrive(v_free.index(s))
    ds = p * (dP - delta[:, None])
    if GRAD is not None:
        ds = GRAD(S * scale, ds, b, h, rows, kv, off, p > 0.0, score_args, score_args, False)
        ds = gl.where(p > 0.0, ds, 0.0)
    dS = gl.convert_layout(ds.to(ks.dtype), gl.DotOperandLayout(0, LO, 2))
    t = (n + 1) % ST
    if n + 1 < count:
        mbarrier.wait(k_ready.index(t), ((n + 1) // ST) & 1)
    S = warpgroup_mma(qt, ks.index(t).permute((1, 0)), zero, use_acc=False, is_async=True)
    dq = warpgroup_mma(dS, ks.index(s), dq, is_async=True)
    return dq, S


@gluon.jit
def queries_consumer(
    dq_d, DQ, LSE, DELTA, qs, ks, vs, dos, q_ready, k_ready, k_free, v_ready, v_free, BLOCKS, out_row, out_col,
    dq_stride,
    m0, b, h, Sq, Sk, off, w, scale, last, n1, n2, count, score_args, mask_args, W: gl.constexpr, D: gl.constexpr,
    BN: gl.constexpr, ST: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, LISTED: gl.constexpr,
    SCORE: gl.constexpr, GRAD: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Queries [m0 + 64 W, m0 + 64 W + 64): their gradient over the keys they see."""
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    LO: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    qt = qs.index(W)
    dot = dos.index(W)
    offsets = m0 + 64 * W + gl.arange(0, 64, gl.SliceLayout(1, L))
    lse, delta = row_stats(LSE, DELTA, offsets, Sq)
    rows = gl.minimum(offsets, Sq - 1)
    dq = warpgroup_mma_init(gl.zeros([64, D], gl.float32, LO))
    zero = gl.zeros([64, BN], gl.float32, L)
    mbarrier.wait(q_ready.index(0), 0)
    if count > 0:
        mbarrier.wait(k_ready.index(0), 0)
        S = warpgroup_mma(qt, ks.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
        # The first step has no product of a block before it in flight: what it counts on must be done already.
        S = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[S]))
        for n in range(0, n1):
            dq, S = queries_step(dq, S, qt, dot, ks, vs, lse, delta, k_ready, k_free, v_ready, v_free, BLOCKS, last,
            n, count,
                                 rows, b, h, Sk, off, w, scale, score_args, mask_args, BN, ST, L, LO, CAUSAL, WINDOW,
                                 True,
                                 LISTED, SCORE, GRAD, MASK)  # fmt: skip
        for n in range(n1, n2):
            dq, S = queries_step(dq, S, qt, dot, ks, vs, lse, delta, k_ready, k_free, v_ready, v_free, BLOCKS, last,
            n, count,
                                 rows, b, h, Sk, off, w, scale, score_args, mask_args, BN, ST, L, LO, CAUSAL, WINDOW,
                                 False,
                                 LISTED, SCORE, GRAD, MASK)  # fmt: skip
        if WINDOW or LISTED:
            for n in range(n2, count):
                dq, S = queries_step(dq, S, qt, dot, ks, vs, lse, delta, k_ready, k_free, v_ready, v_free, BLOCKS,
                last, n,
                                     count, rows, b, h, Sk, off, w, scale, score_args, mask_args, BN, ST, L, LO, CAUSAL,
                                     WINDOW, True, LISTED, SCORE, GRAD, MASK)  # fmt: skip
        S = warpgroup_mma_wait(0, deps=[S])
    dq = warpgroup_mma_wait(0, deps=[dq])
    put(dq_d, DQ, (dq * scale).to(qs.dtype), qt, out_row, m0, out_col, dq_stride, Sq, W, D, LO)


@gluon.jit(do_not_specialize=["Sq", "Sk", "w"])
def backward_queries(
    q_d, k_d, v_d, do_d, dq_d, DQ, LSE, DELTA, TILES, CU_Q, CU_K, BLOCKS, COUNTS, FULL, sbb, sbh, NB,
    q_batch, q_head, q_col, k_batch, k_head, k_col, v_batch, v_head, v_col, do_batch, do_head, do_col, dq_stride,
    Hq, Sq, Sk, w, scale, score_args, mask_args, GROUP: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    BN: gl.constexpr, ST: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, PACKED: gl.constexpr,
    LISTED: gl.constexpr, SCORE: gl.constexpr, GRAD: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Compute dQ of 128 queries of one head."""
    total_q = Sq
    tile, b, h, zb, q0, k0, stats, Sq, Sk = locate(TILES, CU_Q, CU_K, Hq, Sq, Sk, CAUSAL, PACKED)
    m0 = tile * 128
    off = Sk - Sq
    g = h // GROUP
    if LISTED:
        row = b * sbb + h * sbh + tile
        BLOCKS += row.to(gl.int64) * NB
        last = 0
        n1 = 0
        n2 = gl.load(FULL + row)
        count = gl.load(COUNTS + row)
    else:
        last, n1, n2, count = key_blocks(m0, 128, BN, Sk, off, w, CAUSAL, WINDOW, MASK is not None)
    qs = gl.allocate_shared_memory(q_d.dtype, [2, 64, D], q_d.layout)
    dos = gl.allocate_shared_memory(do_d.dtype, [2, 64, DV], do_d.layout)
    ks = gl.allocate_shared_memory(k_d.dtype, [ST, BN, D], k_d.layout)
    vs = gl.allocate_shared_memory(v_d.dtype, [ST, BN, DV], v_d.layout)
    q_ready = barriers(1, 1)
    k_ready = barriers(ST, 1)
    v_ready = barriers(ST, 1)
    k_free = barriers(ST, 2)
    v_free = barriers(ST, 2)
    qr = zb * q_batch + h * q_head + q0 + m0
    dr = zb * do_batch + h * do_head + q0 + m0
    kr = zb * k_batch + g * k_head + k0
    vr = zb * v_batch + g * v_head + k0
    out_row = zb * total_q + q0
    LSE += stats
    DELTA += stats
    gl.warp_specialize([
        (queries_consumer, (dq_d, DQ, LSE, DELTA, qs, ks, vs, dos, q_ready, k_ready, k_free, v_ready, v_free, BLOCKS,
        out_row,
                            h * D, dq_stride, m0, b, h, Sq, Sk, off, w, scale, last, n1, n2, count, score_args,
                            mask_args, 0,
                            D, BN, ST, CAUSAL, WINDOW, LISTED, SCORE, GRAD, MASK)),
        (queries_consumer, (dq_d, DQ, LSE, DELTA, qs, ks, vs, dos, q_ready, k_ready, k_free, v_ready, v_free, BLOCKS,
        out_row,
                            h * D, dq_stride, m0, b, h, Sq, Sk, off, w, scale, last, n1, n2, count, score_args,
                            mask_args, 1,
                            D, BN, ST, CAUSAL, WINDOW, LISTED, SCORE, GRAD, MASK)),
        (queries_producer, (q_d, k_d, v_d, do_d, qs, ks, vs, dos, q_ready, k_ready, k_free, v_ready, v_free, BLOCKS, qr,
                            h * q_col, kr, g * k_col, vr, g * v_col, dr, h * do_col, last, count, BN, ST, LISTED)),
    ], [4, 1], [240, 24])  # fmt: skip
