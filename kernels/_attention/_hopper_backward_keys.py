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
    warpgroup_mma_wait,
)

from trainkit.kernels._attention._hopper_gradients import put, row_stats, score_gradient, slope_of, weigh
from trainkit.kernels._attention._hopper_ring import announce, enter, leave
from trainkit.kernels._attention._hopper_tiles import barriers, block_at, locate, opaque_zero, query_blocks


@builtin
def reduce_add(desc, coord, src, _semantic=None):
    """Add a tile of shared memory to global memory by TMA; Gluon of Triton 3.6 has the instruction and no name for it."""
    builder = _semantic.builder
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    builder.create_async_tma_reduce(
        kind, desc.handle, _semantic._convert_to_ir_values(coord, require_i64=False), src.handle
    )


@gluon.jit
def keys_producer(task, starts, stats, count, c: gl.constexpr):
    """Bring the tile's keys and values once, then each query head's blocks of queries and output gradients."""
    descs, lists, walk, memory, bars = task
    q_d, k_d, v_d, do_d, _, _, _ = descs
    BLOCKS, COUNTS, _, row, row_head, NB, live = lists
    first, _, _, _ = walk
    qs, dos, ks, vs, lses, deltas, _, _ = memory
    kv_ready, q_ready, q_free, do_ready, do_free, _, _ = bars
    qr, qc, q_head, q_col, kr, kc, vr, vc, dr, dc, do_head, do_col = starts
    LSE, DELTA, head0, total_q, Sq = stats
    # The weights alone need no values: dV by itself leaves their room to longer blocks.
    values: gl.constexpr = 2 if c.VALUES else 0
    if live:
        mbarrier.expect(kv_ready.index(0), 2 * k_d.block_type.nbytes + values * v_d.block_type.nbytes)
        for j in gl.static_range(2):
            tma.async_copy_global_to_shared(k_d, [kr + 64 * j, kc], kv_ready.index(0), ks.index(j))
        for j in gl.static_range(values):
            tma.async_copy_global_to_shared(v_d, [vr + 64 * j, vc], kv_ready.index(0), vs.index(j))
    base = 0
    lanes = gl.arange(0, c.BM, gl.BlockedLayout([1], [32], [1], [0]))
    for g in range(c.GROUP):
        blocks = BLOCKS
        if c.LISTED:
            blocks = BLOCKS + (row + g * row_head).to(gl.int64) * NB
            count = gl.load(COUNTS + row + g * row_head) * live
        for i in range(0, count):
            at = block_at(blocks, first, i, 1, c.LISTED) * c.BM
            here = (head0 + g) * total_q
            lse, delta = row_stats(LSE + here, DELTA + here, at + lanes, Sq)
            n = base + i
            s = n % c.ST
            o = n % c.SO
            # Row statistics travel with their tiles: lse with q, delta with the output's gradient.
            mbarrier.wait(q_free.index(s), ((n // c.ST) & 1) ^ 1)
            lses.index(s).store(lse)
            mbarrier.arrive(q_ready.index(s))
            mbarrier.expect(q_ready.index(s), q_d.block_type.nbytes)
            tma.async_copy_global_to_shared(q_d, [qr + g * q_head + at, qc + g * q_col], q_ready.index(s), qs.index(s))
            mbarrier.wait(do_free.index(o), ((n // c.SO) & 1) ^ 1)
            deltas.index(o).store(delta)
            mbarrier.arrive(do_ready.index(o))
            mbarrier.expect(do_ready.index(o), do_d.block_type.nbytes)
            tma.async_copy_global_to_shared(
                do_d, [dr + g * do_head + at, dc + g * do_col], do_ready.index(o), dos.index(o)
            )
        base += count


@gluon.jit
def issue_dq(n, memory, bars, W: gl.constexpr, c: gl.constexpr):
    """Start this warpgroup's half of block n's dQ, columns or rows, from both warpgroups' dS; what n = -1 gives is unused."""
    HALF: gl.constexpr = c.D * c.BM // 128
    LQ: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16])
    ks, dss = memory[2], memory[6]
    u = (n + 2) % 2
    if n >= 0:
        mbarrier.wait(bars[5].index(u), (n // 2) & 1)
    zero = opaque_zero(n + 1)
    near = ks.index(zero)
    far = ks.index(1 + zero)
    near_dS = dss.index(u * 2)
    far_dS = dss.index(u * 2 + 1)
    if c.BM == 64:
        near = near.slice(HALF * W, HALF, 1)
        far = far.slice(HALF * W, HALF, 1)
    else:
        near_dS = near_dS.slice(64 * W, 64, 1)
        far_dS = far_dS.slice(64 * W, 64, 1)
    none = gl.zeros([64, HALF], gl.float32, LQ)
    dq = warpgroup_mma(near_dS.permute((1, 0)), near, none, use_acc=False, is_async=True)
    return warpgroup_mma(far_dS.permute((1, 0)), far, dq, is_async=True)


@gluon.jit
def add_dq(dq, n, row, dq_d, memory, bars, W: gl.constexpr, c: gl.constexpr):
    """Give block n's dS back, and add its dQ to the sums."""
    dqs = memory[7]
    tma.store_wait(0)
    gl.thread_barrier()
    dqs.index(W).store(dq)
    fence_async_shared()
    if n >= 0:
        mbarrier.arrive(bars[6].index((n + 2) % 2))
        if c.BM == 64:
            reduce_add(dq_d, [row, c.D // 2 * W], dqs.index(W))
        else:
            reduce_add(dq_d, [row + 64 * W, 0], dqs.index(W))


@gluon.jit
def keys_step(
    dk, dv, cols, alibi, n, at, before, problem, dq_d, dq_row, memory, bars, MASKED: gl.constexpr, W: gl.constexpr,
    L: gl.constexpr, c: gl.constexpr,
):  # fmt: skip
    """Block n of the ring, queries from `at` on; `before` is where dQ of block n - 1 goes.

    Nothing is in flight when it starts or ends: ptxas makes every product wait for the one before where an accumulator
    is being written across the edge of a loop. LATE: dQ of the block before is multiplied here, when both warpgroups'
    dS have long been there; otherwise this block's.
    """
    LK: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, c.D, 16])
    LV: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, c.DV, 16])
    Sq, Sk = problem[2], problem[3]
    qs, dos, ks, vs, lses, deltas, dss, _dqs = memory
    _, q_ready, q_free, do_ready, do_free, s_ready, s_free = bars
    s = n % c.ST
    mine = W + opaque_zero(n)
    o = n % c.SO + opaque_zero(n)
    u = n % 2
    o_phase = (n // c.SO) & 1
    rows = at + gl.arange(0, c.BM, gl.SliceLayout(0, L))
    # Whole blocks have no query over the end.
    qv = gl.minimum(rows, Sq - 1) if MASKED else rows
    kv = gl.minimum(cols, Sk - 1)
    zero = gl.zeros([64, c.BM], gl.float32, L)
    mbarrier.wait(q_ready.index(s), (n // c.ST) & 1)
    S = warpgroup_mma(ks.index(mine), qs.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
    if c.LATE:
        dq = issue_dq(n - 1, memory, bars, W, c)
        S = warpgroup_mma_wait(2, deps=[S])
    else:
        mbarrier.wait(do_ready.index(o), o_phase)
        if c.WANT_DK:
            dP = warpgroup_mma(vs.index(mine), dos.index(o).permute((1, 0)), zero, use_acc=False, is_async=True)
            S = warpgroup_mma_wait(1, deps=[S])
        else:
            S = warpgroup_mma_wait(0, deps=[S])
    lse = lses.index(s).load(gl.SliceLayout(0, L))
    slope, shift, first_key = alibi
    if c.ALIBI:
        lse += slope * (rows + (Sk - Sq - first_key)).to(gl.float32)
    p, weight = weigh(S, lse[None, :], shift, qv[None, :], cols[:, None], qv, kv, problem, MASKED, c)
    if c.WANT_DV:
        P = gl.convert_layout(p.to(dos.dtype), gl.DotOperandLayout(0, LV, 2))
    if c.LATE:
        dq = warpgroup_mma_wait(0, deps=[dq])
        mbarrier.wait(do_ready.index(o), o_phase)
        add_dq(dq, n - 1, before, dq_d, memory, bars, W, c)
        dP = warpgroup_mma(vs.index(mine), dos.index(o).permute((1, 0)), zero, use_acc=False, is_async=True)
        dv = warpgroup_mma(P, dos.index(o), dv, is_async=True)
        dP = warpgroup_mma_wait(1, deps=[dP])
    else:
        if c.WANT_DK:
            dP = warpgroup_mma_wait(0, deps=[dP])
        if c.WANT_DV:
            dv = warpgroup_mma(P, dos.index(o), dv, is_async=True)
    if c.WANT_DK:
        delta = deltas.index(o).load(gl.SliceLayout(0, L))
        if not c.WANT_DV:
            mbarrier.arrive(do_free.index(o))
        ds = score_gradient(weight, dP - delta[None, :], S, qv, kv, problem, c)
        dS = gl.convert_layout(ds.to(qs.dtype), gl.DotOperandLayout(0, LK, 2))
        if c.LATE:
            dk = warpgroup_mma(dS, qs.index(s), dk, is_async=True)
        if c.FUSED:
            mbarrier.wait(s_free.index(u), ((n // 2) & 1) ^ 1)
            dss.index(u * 2 + W).store(ds.to(qs.dtype))
            fence_async_shared()
            mbarrier.arrive(s_ready.index(u))
        if c.FUSED and not c.LATE:
            dq = issue_dq(n, memory, bars, W, c)
        if not c.LATE:
            dk = warpgroup_mma(dS, qs.index(s), dk, is_async=True)
        if c.WANT_DV:
            dv = warpgroup_mma_wait(3 if c.FUSED and not c.LATE else 1, deps=[dv])
            mbarrier.arrive(do_free.index(o))
        if c.FUSED and not c.LATE:
            # dK is still being multiplied while dQ leaves.
            dq = warpgroup_mma_wait(1, deps=[dq])
            add_dq(dq, n, dq_row + at, dq_d, memory, bars, W, c)
        dk = warpgroup_mma_wait(0, deps=[dk])
    else:
        dv = warpgroup_mma_wait(0, deps=[dv])
        mbarrier.arrive(do_free.index(o))
    mbarrier.arrive(q_free.index(s))
    return dk, dv


@gluon.jit
def keys_consumer(task, problem, places, ring, n0, count, W: gl.constexpr, c: gl.constexpr):
    """Keys [n0 + 64 W, n0 + 64 W + 64): what every query of the group's heads brings them."""
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, c.BM, 16])
    LK: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, c.D, 16])
    LV: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, c.DV, 16])
    descs, lists, walk, memory, bars = task
    dk_d, dv_d, dq_d = descs[4], descs[5], descs[6]
    BLOCKS, COUNTS, FULL, row, row_head, NB, live = lists
    first, n1, n2, dq_rows = walk
    _qs, _dos, ks, vs, _lses, _deltas, _dss, _dqs = memory
    kv_ready, s_free = bars[0], bars[6]
    DK, DV_OUT, dk_stride, dv_stride, out_row, kv_head = places
    b, h, Sq, Sk, off, w, scale, cap, score_args, mask_args = problem
    cols = n0 + 64 * W + gl.arange(0, 64, gl.SliceLayout(1, L))
    dk = gl.zeros([64, c.D if c.WANT_DK else 16], gl.float32, LK)
    dv = gl.zeros([64, c.DV if c.WANT_DV else 16], gl.float32, LV)
    if c.FUSED:
        enter(ring, W, c)
    mbarrier.wait(kv_ready.index(0), 0, pred=live > 0)
    base = 0
    before = dq_rows
    for g in range(c.GROUP):
        h = kv_head * c.GROUP + g
        here = (b, h, Sq, Sk, off, w, scale, cap, score_args, mask_args)
        blocks = BLOCKS
        if c.LISTED:
            blocks = BLOCKS + (row + g * row_head).to(gl.int64) * NB
            n2 = gl.load(FULL + row + g * row_head) * live
            count = gl.load(COUNTS + row + g * row_head) * live
        alibi = (0.0, 0.0, n0)
        if c.ALIBI:
            slope = slope_of(here, c)
            alibi = (slope, slope * (cols - n0).to(gl.float32)[:, None], n0)
        dq_row = dq_rows
        if c.FUSED:
            dq_row += g * ring[11]
        for i in range(0, n1):
            at = block_at(blocks, first, i, 1, c.LISTED) * c.BM
            dk, dv = keys_step(
                dk, dv, cols, alibi, base + i, at, before, here, dq_d, dq_row, memory, bars, True, W, L, c
            )
            before = dq_row + at
        if c.FUSED:  # noqa: SIM102 (one is known when compiling, the other is not)
            if g == 0:
                announce(ring)
        for i in range(n1, n2):
            at = block_at(blocks, first, i, 1, c.LISTED) * c.BM
            dk, dv = keys_step(
                dk, dv, cols, alibi, base + i, at, before, here, dq_d, dq_row, memory, bars, False, W, L, c
            )
            before = dq_row + at
        # Blocks after the whole ones: a window's far edge, listed ones, the ragged end of the queries.
        for i in range(n2, count):
            at = block_at(blocks, first, i, 1, c.LISTED) * c.BM
            dk, dv = keys_step(
                dk, dv, cols, alibi, base + i, at, before, here, dq_d, dq_row, memory, bars, True, W, L, c
            )
            before = dq_row + at
        base += count
    if c.LATE:  # noqa: SIM102 (one is known when compiling, the other is not)
        if base > 0:
            dq = warpgroup_mma_wait(0, deps=[issue_dq(base - 1, memory, bars, W, c)])
            add_dq(dq, base - 1, before, dq_d, memory, bars, W, c)
    if c.WANT_DK:
        if c.FUSED:
            # The other warpgroup's last dQ may still read this half of K, over which dK is about to be written.
            last = gl.maximum(base - 1, 0)
            if base > 0:
                mbarrier.wait(s_free.index(last % 2), (last // 2) & 1)
        put(dk_d, DK, (dk * scale).to(ks.dtype), ks.index(W), out_row, n0, kv_head * c.D, dk_stride, Sk, W, c.D, LK)
    if c.WANT_DV:
        put(
            dv_d,
            DV_OUT,
            dv.to(vs.dtype),
            (vs if c.VALUES else ks).index(W),
            out_row,
            n0,
            kv_head * c.DV,
            dv_stride,
            Sk,
            W,
            c.DV,
            LV,
        )
    tma.store_wait(0)
    if c.FUSED:
        leave(ring)


@gluon.jit(do_not_specialize=["Hq", "Hkv", "Sq", "Sk", "w", "tiles", "lag", "slots", "rows"])
def backward_keys(
    q_d, k_d, v_d, do_d, dk_d, dv_d, dq_d, DQ, SUMS, MARKS, DK, DV_OUT, LSE, DELTA, TILES, CU_Q, CU_K, BLOCKS, COUNTS, FULL,
    lag, slots, rows, sbb, sbh, NB, q_batch, q_head, q_col, k_batch, k_head, k_col, v_batch, v_head, v_col, do_batch,
    do_head, do_col, dk_stride, dv_stride, Hq, Hkv, Sq, Sk, w, scale, cap, score_args, mask_args, tiles, c: gl.constexpr,
):  # fmt: skip
    """Compute dK, dV, or both, of 128 keys of one key head.

    FUSED: dQ too; the last programs, `lag` times a head's tiles, have no keys and see the last heads' dQ out.
    """
    total_q = Sq
    total_k = Sk
    t = gl.program_id(0)
    live = 1
    if c.FUSED:
        units = gl.num_programs(0) // tiles - lag
        unit = t // tiles
        live = (unit < units).to(gl.int32)
        t -= gl.maximum(unit - units + 1, 0) * tiles
    tile, b, g, zb, q0, k0, _, Sq, Sk = locate(t, (TILES, CU_Q, CU_K), (Hkv, Sq, Sk, tiles), False, c.PACKED)
    if c.FUSED:
        Sk *= live
    n0 = tile * 128
    off = Sk - Sq
    h0 = g * c.GROUP
    row = 0
    if c.LISTED:
        row = b * sbb + h0 * sbh + tile
        first = 0
        n1 = 0
        n2 = 0
        count = 0
    else:
        first, n1, n2, count = query_blocks(n0, 128, c.BM, Sq, off, w, c.CAUSAL, c.WINDOW, c.MASK is not None)
        if c.FUSED:  # noqa: SIM102 (one is known when compiling, the other is not)
            # dQ sums over the tile's keys: those beyond the end must weigh nothing.
            if n0 + 128 > Sk:
                count *= live
                n1 = count
                n2 = count
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    half: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, c.BM], q_d.dtype)
    qs = gl.allocate_shared_memory(q_d.dtype, [c.ST, c.BM, c.D], q_d.layout)
    dos = gl.allocate_shared_memory(do_d.dtype, [c.SO, c.BM, c.DV], do_d.layout)
    ks = gl.allocate_shared_memory(k_d.dtype, [2, 64, c.D], k_d.layout)
    lses = gl.allocate_shared_memory(gl.float32, [c.ST, c.BM], flat)
    deltas = gl.allocate_shared_memory(gl.float32, [c.SO, c.BM], flat)
    # What is not wanted has no room of its own: another's stands for it, and is not touched by that name.
    vs = ks
    dss = qs
    dqs = qs
    if c.VALUES:
        vs = gl.allocate_shared_memory(v_d.dtype, [2, 64, c.DV], v_d.layout)
    if c.FUSED:
        dss = gl.allocate_shared_memory(q_d.dtype, [4, 64, c.BM], half)
        dqs = gl.allocate_shared_memory(gl.float32, [2, 64, c.D * c.BM // 128], dq_d.layout)
    memory = (qs, dos, ks, vs, lses, deltas, dss, dqs)
    # Ready ones complete after two arrivals: the row statistics, and the bytes of the tile.
    bars = (
        barriers(1, 1), barriers(c.ST, 2), barriers(c.ST, 2), barriers(c.SO, 2), barriers(c.SO, 2), barriers(2, 2),
        barriers(2, 2),
    )  # fmt: skip
    starts = (
        zb * q_batch + h0 * q_head + q0, h0 * q_col, q_head, q_col,
        zb * k_batch + g * k_head + k0 + n0, g * k_col, zb * v_batch + g * v_head + k0 + n0, g * v_col,
        zb * do_batch + h0 * do_head + q0, h0 * do_col, do_head, do_col,
    )  # fmt: skip
    # Rows of lse and delta lie by query head: [B, Hq, Sq].
    stats = (LSE + zb * Hq * total_q + q0, DELTA + zb * Hq * total_q + q0, h0, total_q, Sq)
    descs = (q_d, k_d, v_d, do_d, dk_d, dv_d, dq_d)
    lists = (BLOCKS, COUNTS, FULL, row, sbh, NB, live)
    ring = ()
    dq_rows = 0
    if c.FUSED:
        ring = (SUMS, DQ, MARKS, unit, units, lag, slots, gl.program_id(0) % tiles, tiles, Hkv, total_q, rows, scale)
        dq_rows = unit % slots * c.GROUP * rows + q0
    task = (descs, lists, (first, n1, n2, dq_rows), memory, bars)
    problem = (b, h0, Sq, Sk, off, w, scale, cap, score_args, mask_args)
    places = (DK, DV_OUT, dk_stride, dv_stride, zb * total_k + k0, g)
    gl.warp_specialize([
        (keys_consumer, (task, problem, places, ring, n0, count, 0, c)),
        (keys_consumer, (task, problem, places, ring, n0, count, 1, c)),
        (keys_producer, (task, starts, stats, count, c)),
    ], [4, 1], [240, 24])  # fmt: skip
