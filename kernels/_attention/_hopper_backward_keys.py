# mypy: ignore-errors
# (Gluon's language, which Python's types do not describe.)
"""dK and dV on Hopper, and dQ in the same pass where the order of its sums may vary.

Computed transposed (S^T = K Q^T), weights and their gradients are wgmma's register operand of the next product. For dQ
they go through shared memory, each warpgroup multiplies half of the columns, and TMA adds the tile to global memory while
dK is still being multiplied (as in FlashAttention-3, section 3.2, with the copy engine for its writer warp).
"""

import triton.experimental.gluon.language as gl
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from trainkit.kernels._attention._hopper_gradients import put, row_stats, weigh
from trainkit.kernels._attention._hopper_tiles import barriers, block_at, locate, query_blocks


@builtin
def reduce_add(desc, coord, src, _semantic=None):
    """Add a tile of shared memory to global memory by TMA; Gluon of Triton 3.6 has the instruction and no name for it."""
    builder = _semantic.builder
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    builder.create_async_tma_reduce(
        kind, desc.handle, _semantic._convert_to_ir_values(coord, require_i64=False), src.handle
    )


@gluon.jit
def keys_producer(
    q_d, k_d, v_d, do_d, qs, ks, vs, dos, lses, deltas, LSE, DELTA, head0, total_q, Sq, kv_ready, q_ready, q_free,
    do_ready,
    do_free, BLOCKS, COUNTS, row, row_head, NB, qr, qc, q_head, q_col, kr, kc, vr, vc, dr, dc, do_head, do_col,
    first, count, GROUP: gl.constexpr, BM: gl.constexpr,
    ST: gl.constexpr, LISTED: gl.constexpr,
):  # fmt: skip
    """Bring the tile's keys and values once, then each query head's blocks of queries and output gradients."""
    mbarrier.expect(kv_ready.index(0), 2 * k_d.block_type.nbytes + 2 * v_d.block_type.nbytes)
    for j in gl.static_range(2):
        tma.async_copy_global_to_shared(k_d, [kr + 64 * j, kc], kv_ready.index(0), ks.index(j))
        tma.async_copy_global_to_shared(v_d, [vr + 64 * j, vc], kv_ready.index(0), vs.index(j))
    base = 0
    lanes = gl.arange(0, BM, gl.BlockedLayout([1], [32], [1], [0]))
    for g in range(GROUP):
        blocks = BLOCKS
        if LISTED:
            blocks = BLOCKS + (row + g * row_head).to(gl.int64) * NB
            count = gl.load(COUNTS + row + g * row_head)
        for i in range(0, count):
            at = block_at(blocks, first, i, 1, LISTED) * BM
            here = (head0 + g) * total_q
            lse, delta = row_stats(LSE + here, DELTA + here, at + lanes, Sq)
            n = base + i
            s = n % ST
            phase = (n // ST) & 1
            # Row statistics travel with their tiles: lse with q, delta with the output's gradient.
            mbarrier.wait(q_free.index(s), phase ^ 1)
            lses.index(s).store(lse)
            mbarrier.arrive(q_ready.index(s))
            mbarrier.expect(q_ready.index(s), q_d.block_type.nbytes)
            tma.async_copy_global_to_shared(q_d, [qr + g * q_head + at, qc + g * q_col], q_ready.index(s), qs.index(s))
            mbarrier.wait(do_free.index(s), phase ^ 1)
            deltas.index(s).store(delta)
            mbarrier.arrive(do_ready.index(s))
            mbarrier.expect(do_ready.index(s), do_d.block_type.nbytes)
            tma.async_copy_global_to_shared(
                do_d, [dr + g * do_head + at, dc + g * do_col], do_ready.index(s), dos.index(s)
            )
        base += count


@gluon.jit
def keys_step(
    dk, dv, S, kt, vt, ks, qs, dos, lses, deltas, q_ready, q_free, do_ready, do_free, dss, dqs, s_ready, s_free,
    dq_d, dq_row, dq_col, blocks, first, n, i, count, cols,
    b, h,
    Sq, Sk, off, w, scale, score_args, mask_args, BM: gl.constexpr, ST: gl.constexpr, L: gl.constexpr, LK: gl.constexpr,
    LV: gl.constexpr, WANT_DK: gl.constexpr, WANT_DV: gl.constexpr, FUSED: gl.constexpr, W: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
    MASKED: gl.constexpr, LISTED: gl.constexpr, SCORE: gl.constexpr, GRAD: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Block n of the ring (i of this head). On entry S^T of it and dK of the block before are in flight, in that order."""
    s = n % ST
    rows = block_at(blocks, first, i, 1, LISTED) * BM + gl.arange(0, BM, gl.SliceLayout(0, L))
    zero = gl.zeros([64, BM], gl.float32, L)
    mbarrier.wait(do_ready.index(s), (n // ST) & 1)
    if WANT_DK:
        dP = warpgroup_mma(vt, dos.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
        S = warpgroup_mma_wait(2, deps=[S])
    else:
        S = warpgroup_mma_wait(0, deps=[S])
    qv = gl.minimum(rows, Sq - 1)
    kv = gl.minimum(cols, Sk - 1)
    lse = lses.index(s).load(gl.SliceLayout(0, L))
    p = weigh(
        S, lse[None, :], qv[None, :], cols[:, None], qv, kv, b, h, Sk, off, w, scale, score_args, mask_args, CAUSAL,
        WINDOW, MASKED, SCORE, MASK,
    )  # fmt: skip
    if WANT_DV:
        P = gl.convert_layout(p.to(dos.dtype), gl.DotOperandLayout(0, LV, 2))
        if not WANT_DK:
            mbarrier.arrive(q_free.index(s))
    if WANT_DK:
        dk = warpgroup_mma_wait(1, deps=[dk])
        if i > 0:
            mbarrier.arrive(q_free.index((n - 1) % ST))
        dP = warpgroup_mma_wait(0, deps=[dP])
    if WANT_DV:
        dv = warpgroup_mma(P, dos.index(s), dv, is_async=True)
    if WANT_DK:
        ds = p * (dP - deltas.index(s).load(gl.SliceLayout(0, L))[None, :])
        if GRAD is not None:
            ds = GRAD(S * scale, ds, b, h, qv, kv, off, p > 0.0, score_args, score_args, False)
            # Where the weight is 0 the score may be anything: 0 times its derivative, and not NaN.
            ds = gl.where(p > 0.0, ds, 0.0)
        dS = gl.convert_layout(ds.to(qs.dtype), gl.DotOperandLayout(0, LK, 2))
        if not WANT_DV:
            mbarrier.arrive(do_free.index(s))
    if FUSED:
        # Both warpgroups' dS, through shared memory, make dQ: each multiplies half of the columns.
        u = n % 2
        turn = (n // 2) & 1
        mbarrier.wait(s_free.index(u), turn ^ 1)
        dss.index(u * 2 + W).store(ds.to(qs.dtype))
        fence_async_shared()
        mbarrier.arrive(s_ready.index(u))
    t = (n + 1) % ST
    if i + 1 < count:
        mbarrier.wait(q_ready.index(t), ((n + 1) // ST) & 1)
    S = warpgroup_mma(kt, qs.index(t).permute((1, 0)), zero, use_acc=False, is_async=True)
    if FUSED:
        mbarrier.wait(s_ready.index(u), turn)
        near = ks.index(0).slice(64 * W, 64, 1)
        far = ks.index(1).slice(64 * W, 64, 1)
        dq = warpgroup_mma(dss.index(u * 2).permute((1, 0)), near, zero, use_acc=False, is_async=True)
        dq = warpgroup_mma(dss.index(u * 2 + 1).permute((1, 0)), far, dq, is_async=True)
    if WANT_DK:
        dk = warpgroup_mma(dS, qs.index(s), dk, is_async=True)
        if WANT_DV:
            dv = warpgroup_mma_wait(4 if FUSED else 2, deps=[dv])
            mbarrier.arrive(do_free.index(s))
        if FUSED:
            # dK is still being multiplied while dQ leaves.
            dq = warpgroup_mma_wait(1, deps=[dq])
            mbarrier.arrive(s_free.index(u))
            tma.store_wait(0)
            gl.thread_barrier()
            dqs.index(W).store(dq * scale)
            fence_async_shared()
            reduce_add(dq_d, [dq_row + block_at(blocks, first, i, 1, LISTED) * BM, dq_col + 64 * W], dqs.index(W))
    else:
        dv = warpgroup_mma_wait(1, deps=[dv])
        mbarrier.arrive(do_free.index(s))
    return dk, dv, S


@gluon.jit
def keys_consumer(
    dk_d, dv_d, DK, DV_OUT, qs, ks, vs, dos, lses, deltas, kv_ready, q_ready, q_free, do_ready, do_free, dss, dqs,
    s_ready, s_free, dq_d, dq_base, BLOCKS,
    COUNTS, FULL,
    row, row_head, NB, out_row, kv_head, n0, b, Sq, Sk, off, w, scale, first, n1, n2, count, score_args, mask_args,
    W: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, BM: gl.constexpr, ST: gl.constexpr,
    dk_stride, dv_stride, WANT_DK: gl.constexpr, WANT_DV: gl.constexpr, FUSED: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,
    LISTED: gl.constexpr, SCORE: gl.constexpr, GRAD: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Keys [n0 + 64 W, n0 + 64 W + 64): what every query of the group's heads brings them."""
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    LK: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    LV: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    cols = n0 + 64 * W + gl.arange(0, 64, gl.SliceLayout(1, L))
    kt = ks.index(W)
    vt = vs.index(W)
    dk = warpgroup_mma_init(gl.zeros([64, D if WANT_DK else 16], gl.float32, LK))
    dv = gl.zeros([64, DV if WANT_DV else 16], gl.float32, LV)
    zero = gl.zeros([64, BM], gl.float32, L)
    mbarrier.wait(kv_ready.index(0), 0)
    base = 0
    for g in range(GROUP):
        h = kv_head * GROUP + g
        blocks = BLOCKS
        if LISTED:
            blocks = BLOCKS + (row + g * row_head).to(gl.int64) * NB
            n2 = gl.load(FULL + row + g * row_head)
            count = gl.load(COUNTS + row + g * row_head)
        if count > 0:
            mbarrier.wait(q_ready.index(base % ST), (base // ST) & 1)
            S = warpgroup_mma(kt, qs.index(base % ST).permute((1, 0)), zero, use_acc=False, is_async=True)
            # The first step has no product of a block before it in flight: what it counts on must be done already.
            S = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[S]))
            for i in range(0, n1):
                dk, dv, S = keys_step(dk, dv, S, kt, vt, ks, qs, dos, lses, deltas, q_ready, q_free, do_ready,
                do_free, dss, dqs, s_ready, s_free, dq_d,
                dq_base, h * D, blocks,
                                      first, base + i, i, count, cols, b, h, Sq, Sk, off, w, scale, score_args,
                                      mask_args,
                                      BM, ST, L, LK, LV, WANT_DK, WANT_DV, FUSED, W, CAUSAL, WINDOW, True, LISTED,
                                      SCORE, GRAD,
                                      MASK)  # fmt: skip
            for i in range(n1, n2):
                dk, dv, S = keys_step(dk, dv, S, kt, vt, ks, qs, dos, lses, deltas, q_ready, q_free, do_ready,
                do_free, dss, dqs, s_ready, s_free, dq_d,
                dq_base, h * D, blocks,
                                      first, base + i, i, count, cols, b, h, Sq, Sk, off, w, scale, score_args,
                                      mask_args,
                                      BM, ST, L, LK, LV, WANT_DK, WANT_DV, FUSED, W, CAUSAL, WINDOW, False, LISTED,
                                      SCORE,
                                      GRAD, MASK)  # fmt: skip
            # Blocks after the whole ones: a window's far edge, listed ones, the ragged end of the queries.
            for i in range(n2, count):
                dk, dv, S = keys_step(dk, dv, S, kt, vt, ks, qs, dos, lses, deltas, q_ready, q_free, do_ready,
                do_free, dss, dqs, s_ready, s_free, dq_d,
                dq_base, h * D, blocks,
                                      first, base + i, i, count, cols, b, h, Sq, Sk, off, w, scale, score_args,
                                      mask_args,
                                      BM, ST, L, LK, LV, WANT_DK, WANT_DV, FUSED, W, CAUSAL, WINDOW, True, LISTED,
                                      SCORE, GRAD,
                                      MASK)  # fmt: skip
            S = warpgroup_mma_wait(0, deps=[S])
            if WANT_DK:
                dk = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[dk]))
                mbarrier.arrive(q_free.index((base + count - 1) % ST))
        base += count
    if FUSED:
        tma.store_wait(0)
    if WANT_DK:
        dk = warpgroup_mma_wait(0, deps=[dk])
        if FUSED:
            # The other warpgroup's last dQ may still read this half of K, over which dK is about to be written.
            last = gl.maximum(base - 1, 0)
            if base > 0:
                mbarrier.wait(s_free.index(last % 2), (last // 2) & 1)
        put(dk_d, DK, (dk * scale).to(ks.dtype), kt, out_row, n0, kv_head * D, dk_stride, Sk, W, D, LK)
    if WANT_DV:
        put(dv_d, DV_OUT, dv.to(vs.dtype), vt, out_row, n0, kv_head * DV, dv_stride, Sk, W, DV, LV)


@gluon.jit(do_not_specialize=["Sq", "Sk", "w"])
def backward_keys(
    q_d, k_d, v_d, do_d, dk_d, dv_d, dq_d, DK, DV_OUT, LSE, DELTA, TILES, CU_Q, CU_K, BLOCKS, COUNTS, FULL, sbb, sbh,
    NB,
    q_batch, q_head, q_col, k_batch, k_head, k_col, v_batch, v_head, v_col, do_batch, do_head, do_col, dk_stride,
    dv_stride, Hq, Sq, Sk, w, scale, score_args, mask_args, GROUP: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    BM: gl.constexpr, ST: gl.constexpr, WANT_DK: gl.constexpr, WANT_DV: gl.constexpr, FUSED: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr, PACKED: gl.constexpr, LISTED: gl.constexpr, SCORE: gl.constexpr, GRAD: gl.constexpr,
    MASK: gl.constexpr,
):  # fmt: skip
    """Compute dK, dV, or both, of 128 keys of one key head."""
    total_q = Sq
    total_k = Sk
    tile, b, g, zb, q0, k0, _, Sq, Sk = locate(TILES, CU_Q, CU_K, 0, Sq, Sk, False, PACKED)
    n0 = tile * 128
    off = Sk - Sq
    h0 = g * GROUP
    if LISTED:
        row = b * sbb + h0 * sbh + tile
        first = 0
        n1 = 0
        n2 = 0
        count = 0
    else:
        row = 0
        first, n1, n2, count = query_blocks(n0, 128, BM, Sq, off, w, CAUSAL, WINDOW, MASK is not None)
        if FUSED:  # noqa: SIM102 (one is known when compiling, the other is not)
            # dQ sums over the tile's keys: those beyond the end must weigh nothing.
            if n0 + 128 > Sk:
                n1 = count
                n2 = count
    qs = gl.allocate_shared_memory(q_d.dtype, [ST, BM, D], q_d.layout)
    dos = gl.allocate_shared_memory(do_d.dtype, [ST, BM, DV], do_d.layout)
    ks = gl.allocate_shared_memory(k_d.dtype, [2, 64, D], k_d.layout)
    vs = gl.allocate_shared_memory(v_d.dtype, [2, 64, DV], v_d.layout)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lses = gl.allocate_shared_memory(gl.float32, [ST, BM], flat)
    deltas = gl.allocate_shared_memory(gl.float32, [ST, BM], flat)
    # Without the fused dQ these are never touched: one row each stands for them.
    half: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], q_d.dtype)
    dss = gl.allocate_shared_memory(q_d.dtype, [4 if FUSED else 1, 64 if FUSED else 8, 64], half)
    dqs = gl.allocate_shared_memory(gl.float32, [2 if FUSED else 1, 64 if FUSED else 8, 64], dq_d.layout)
    s_ready = barriers(2, 2)
    s_free = barriers(2, 2)
    kv_ready = barriers(1, 1)
    # Complete after two arrivals: the row statistics, and the bytes of the tile.
    q_ready = barriers(ST, 2)
    do_ready = barriers(ST, 2)
    q_free = barriers(ST, 2)
    do_free = barriers(ST, 2)
    qr = zb * q_batch + h0 * q_head + q0
    dr = zb * do_batch + h0 * do_head + q0
    kr = zb * k_batch + g * k_head + k0 + n0
    vr = zb * v_batch + g * v_head + k0 + n0
    out_row = zb * total_k + k0
    # Rows of lse and delta lie by query head: [B, Hq, Sq].
    LSE += zb * Hq * total_q + q0
    DELTA += zb * Hq * total_q + q0
    gl.warp_specialize([
        (keys_consumer, (dk_d, dv_d, DK, DV_OUT, qs, ks, vs, dos, lses, deltas, kv_ready, q_ready, q_free, do_ready,
        do_free, dss, dqs, s_ready, s_free, dq_d, zb * total_q + q0,
                         BLOCKS, COUNTS, FULL, row, sbh, NB, out_row, g, n0, b, Sq, Sk, off, w, scale, first, n1,
                         n2, count, score_args, mask_args, 0, GROUP, D, DV, BM, ST, dk_stride, dv_stride, WANT_DK,
                         WANT_DV, FUSED,
                         CAUSAL, WINDOW, LISTED, SCORE, GRAD, MASK)),
        (keys_consumer, (dk_d, dv_d, DK, DV_OUT, qs, ks, vs, dos, lses, deltas, kv_ready, q_ready, q_free, do_ready,
        do_free, dss, dqs, s_ready, s_free, dq_d, zb * total_q + q0,
                         BLOCKS, COUNTS, FULL, row, sbh, NB, out_row, g, n0, b, Sq, Sk, off, w, scale, first, n1,
                         n2, count, score_args, mask_args, 1, GROUP, D, DV, BM, ST, dk_stride, dv_stride, WANT_DK,
                         WANT_DV, FUSED,
                         CAUSAL, WINDOW, LISTED, SCORE, GRAD, MASK)),
        (keys_producer, (q_d, k_d, v_d, do_d, qs, ks, vs, dos, lses, deltas, LSE, DELTA, h0, total_q, Sq, kv_ready,
        q_ready,
                         q_free, do_ready, do_free, BLOCKS, COUNTS, row, sbh, NB, qr, h0 * q_col, q_head, q_col, kr,
                         g * k_col, vr, g * v_col, dr, h0 * do_col, do_head,
                         do_col, first, count, GROUP, BM, ST, LISTED)),
    ], [4, 1], [240, 24])  # fmt: skip
