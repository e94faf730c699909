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

from trainkit.kernels._attention._hopper_bits import bits_of
from trainkit.kernels._attention._hopper_gradients import put, score_gradient, slope_of, weigh
from trainkit.kernels._attention._hopper_keys_producer import keys_producer
from trainkit.kernels._attention._hopper_ring import await_place, leave, rounder
from trainkit.kernels._attention._hopper_tiles import barriers, block_at, opaque_zero, posted


@builtin
def reduce_add(desc, coord, src, _semantic=None):
    """Add a tile of shared memory to global memory by TMA; Gluon of Triton 3.6 has the instruction and no name for it."""
    builder = _semantic.builder
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    builder.create_async_tma_reduce(
        kind, desc.handle, _semantic._convert_to_ir_values(coord, require_i64=False), src.handle
    )


@gluon.jit
def issue_dq(n, start, memory, bars, W: gl.constexpr, c: gl.constexpr):
    """Start this warpgroup's half of block n's dQ, columns or rows, from both warpgroups' dS; what a block before the
    tile's first, number `start`, gives is unused.
    """
    HALF: gl.constexpr = c.D * c.BM // 128
    LQ: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16])
    ks, dss = memory[2], memory[6]
    u = (n + 2) % 2
    if n >= start:
        mbarrier.wait(bars[6].index(u), (n // 2) & 1)
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
def add_dq(dq, n, start, row, summed, dq_d, memory, bars, ring, W: gl.constexpr, c: gl.constexpr):
    """Give block n's dS back, and add its dQ to the sums; before the tile's first, count the adds to the last tile's unit.

    By then they have arrived, or nearly.
    """
    dqs = memory[7]
    tma.store_wait(0)
    gl.thread_barrier()
    dqs.index(W).store(dq)
    fence_async_shared()
    if n >= start:
        mbarrier.arrive(bars[7].index((n + 2) % 2))
        if n == start:
            leave(summed, ring)
        if c.BM == 64:
            reduce_add(dq_d, [row, c.D // 2 * W], dqs.index(W))
        else:
            reduce_add(dq_d, [row + 64 * W, 0], dqs.index(W))


@gluon.jit
def keys_step(
    dk, dv, cols, alibi, n, start, at, words, before, summed, problem, dq_d, dq_row, memory, bars, ring,
    MASKED: gl.constexpr, W: gl.constexpr, L: gl.constexpr, c: gl.constexpr,
):  # fmt: skip
    """Block n of the ring, the tile's first being `start`, queries from `at` on, with these bits; `before` is where dQ of
    block n - 1 goes.

    Nothing is in flight when it starts or ends: ptxas makes every product wait for the one before where an accumulator
    is being written across the edge of a loop. LATE: dQ of the block before is multiplied here, when both warpgroups'
    dS have long been there; otherwise this block's.
    """
    LK: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, c.D, 16])
    LV: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, c.DV, 16])
    Sq, Sk = problem[2], problem[3]
    qs, dos, ks, vs, lses, deltas, dss, _dqs, _outs, _box = memory
    _, _, q_ready, q_free, do_ready, do_free, s_ready, s_free, _, _ = bars
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
        dq = issue_dq(n - 1, start, memory, bars, W, c)
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
    p, weight = weigh(S, lse[None, :], shift, qv[None, :], cols[:, None], qv, kv, problem, words, MASKED, c)
    if c.WANT_DV:
        P = gl.convert_layout(p.to(dos.dtype), gl.DotOperandLayout(0, LV, 2))
    if c.LATE:
        dq = warpgroup_mma_wait(0, deps=[dq])
        mbarrier.wait(do_ready.index(o), o_phase)
        add_dq(dq, n - 1, start, before, summed, dq_d, memory, bars, ring, W, c)
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
            dq = issue_dq(n, start, memory, bars, W, c)
        if not c.LATE:
            dk = warpgroup_mma(dS, qs.index(s), dk, is_async=True)
        if c.WANT_DV:
            dv = warpgroup_mma_wait(3 if c.FUSED and not c.LATE else 1, deps=[dv])
            mbarrier.arrive(do_free.index(o))
        if c.FUSED and not c.LATE:
            # dK is still being multiplied while dQ leaves.
            dq = warpgroup_mma_wait(1, deps=[dq])
            add_dq(dq, n, start, dq_row + at, summed, dq_d, memory, bars, ring, W, c)
        dk = warpgroup_mma_wait(0, deps=[dk])
    else:
        dv = warpgroup_mma_wait(0, deps=[dv])
        mbarrier.arrive(do_free.index(o))
    mbarrier.arrive(q_free.index(s))
    return dk, dv


@gluon.jit
def keys_consumer(task, results, ring, units, W: gl.constexpr, c: gl.constexpr):
    """Keys [64 W, 64 W + 64) of each tile: what every query of the group's heads brings them."""
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, c.BM, 16])
    LK: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, c.D, 16])
    LV: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, c.DV, 16])
    descs, _tables, lists, _sizes, scalars, memory, bars, total = task
    dk_d, dv_d, dq_d = descs[4], descs[5], descs[6]
    BLOCKS, COUNTS, FULL, sbb, sbh, NB = lists
    w, scale, cap, score_args, mask_args = scalars
    ks, vs, dqs, outs, box = memory[2], memory[3], memory[7], memory[8], memory[9]
    kv_ready, kv_free, t_ready, t_free = bars[0], bars[1], bars[8], bars[9]
    DK, DV_OUT, dk_stride, dv_stride, FIRST, WORDS = results
    done = 0
    kept = 0
    base = 0
    mbarrier.wait(t_ready.index(0), 0)
    while posted(box, done & 1, 0) < total:
        page = done & 1
        n0 = posted(box, page, 1)
        b = posted(box, page, 2)
        kv_head = posted(box, page, 3)
        dq_rows = posted(box, page, 5)
        Sq = posted(box, page, 6)
        Sk = posted(box, page, 7)
        first = posted(box, page, 8)
        n1 = posted(box, page, 9)
        n2 = posted(box, page, 10)
        count = posted(box, page, 11)
        unit = posted(box, page, 12)
        summed = posted(box, page, 13)
        live = (unit < units).to(gl.int32)
        cols = n0 + 64 * W + gl.arange(0, 64, gl.SliceLayout(1, L))
        dk = gl.zeros([64, c.D if c.WANT_DK else 16], gl.float32, LK)
        dv = gl.zeros([64, c.DV if c.WANT_DV else 16], gl.float32, LV)
        mbarrier.wait(kv_ready.index(0), kept & 1, pred=live > 0)
        if c.FUSED:  # noqa: SIM102 (one is known when compiling, the other is not)
            if posted(box, page, 15) > 0:
                # Counted before the wait: what this one waits for may wait for it.
                leave(summed, ring)
                summed = -1
                await_place(unit, ring)
        start = base
        before = dq_rows
        for g in range(c.GROUP):
            h = kv_head * c.GROUP + g
            here = (b, h, Sq, Sk, Sk - Sq, w, scale, cap, score_args, mask_args)
            blocks = BLOCKS
            if c.LISTED:
                row = b * sbb + h * sbh + n0 // 128
                blocks = BLOCKS + row.to(gl.int64) * NB
                n2 = gl.load(FULL + row) * live
                count = gl.load(COUNTS + row) * live
            bits = 0
            if c.BITS:
                bits = gl.load(FIRST + row) - n2
            alibi = (0.0, 0.0, n0)
            if c.ALIBI:
                slope = slope_of(here, c)
                alibi = (slope, slope * (cols - n0).to(gl.float32)[:, None], n0)
            dq_row = dq_rows
            if c.FUSED:
                dq_row += g * ring[9]
            if not c.LISTED:
                for i in range(0, n1):
                    at = (first + i) * c.BM
                    dk, dv = keys_step(
                        dk, dv, cols, alibi, base + i, start, at, 0, before, summed, here, dq_d, dq_row, memory, bars, ring,
                        True, W, L, c,
                    )  # fmt: skip
                    before = dq_row + at
            for i in range(n1, n2):
                at = block_at(blocks, first, i, 1, c.LISTED) * c.BM
                dk, dv = keys_step(
                    dk, dv, cols, alibi, base + i, start, at, 0, before, summed, here, dq_d, dq_row, memory, bars, ring,
                    False, W, L, c,
                )  # fmt: skip
                before = dq_row + at
            # Blocks after the whole ones: a window's far edge, listed ones, the ragged end of the queries.
            for i in range(n2, count):
                at = block_at(blocks, first, i, 1, c.LISTED) * c.BM
                words = bits_of(WORDS, bits + i, W, 128, c.BM, L, c)
                dk, dv = keys_step(
                    dk, dv, cols, alibi, base + i, start, at, words, before, summed, here, dq_d, dq_row, memory, bars, ring,
                    True, W, L, c,
                )  # fmt: skip
                before = dq_row + at
            base += count
        if c.LATE:  # noqa: SIM102 (one is known when compiling, the other is not)
            if base > start:
                dq = warpgroup_mma_wait(0, deps=[issue_dq(base - 1, start, memory, bars, W, c)])
                add_dq(dq, base - 1, start, before, summed, dq_d, memory, bars, ring, W, c)
        if c.STAGED:
            mbarrier.arrive(kv_free.index(0), pred=live > 0)
        if c.FUSED:
            if base == start:
                leave(summed, ring)
            # The last sums of dQ leave from there before.
            room = dqs.index(W)._reinterpret(ks.dtype, [128 // c.D, 64, c.D], dk_d.layout)
            dk_room = room.index(0)
            dv_room = room.index(128 // c.D - 1)
        else:
            dk_room = (outs if c.STAGED else ks).index(W)
            dv_room = (outs if c.STAGED else vs if c.VALUES else ks).index(W)
        # Read anew: not kept in a register through the loops.
        kv_head = posted(box, page, 3)
        out_row = posted(box, page, 4)
        if c.WANT_DV:
            put(dv_d, DV_OUT, dv.to(vs.dtype), dv_room, out_row, n0, kv_head * c.DV, dv_stride, Sk, W, c.DV, LV)
        if c.WANT_DK:
            put(dk_d, DK, (dk * scale).to(ks.dtype), dk_room, out_row, n0, kv_head * c.D, dk_stride, Sk, W, c.D, LK)
        if not c.STAGED:
            tma.store_wait(0)
            gl.thread_barrier()
            mbarrier.arrive(kv_free.index(0), pred=live > 0)
        mbarrier.arrive(t_free.index(page))
        kept += live
        done += 1
        mbarrier.wait(t_ready.index(done & 1), (done >> 1) & 1)
    tma.store_wait(0)
    if c.FUSED:
        leave(posted(box, done & 1, 13), ring)


@gluon.jit(do_not_specialize=["Hq", "Hkv", "Sq", "Sk", "w", "tiles", "total", "lag", "slots", "rows"])
def backward_keys(
    q_d, k_d, v_d, do_d, dk_d, dv_d, dq_d, DQ, SUMS, MARKS, DK, DV_OUT, LSE, DELTA, COUNTER, TILES, CU_Q, CU_K, BLOCKS,
    COUNTS, FULL, FIRST, WORDS, lag, slots, rows, sbb, sbh, NB, q_batch, q_head, q_col, k_batch, k_head, k_col, v_batch,
    v_head, v_col, do_batch, do_head, do_col, dk_stride, dv_stride, Hq, Hkv, Sq, Sk, w, scale, cap, score_args, mask_args,
    tiles, total, c: gl.constexpr,
):  # fmt: skip
    """Compute dK, dV, or both, in tiles of 128 keys of one key head.

    FUSED: dQ too. STAGED: results leave from room other than their keys', so that the next tile's keys may come.
    """
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    half: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, c.BM], q_d.dtype)
    qs = gl.allocate_shared_memory(q_d.dtype, [c.ST, c.BM, c.D], q_d.layout)
    dos = gl.allocate_shared_memory(do_d.dtype, [c.SO, c.BM, c.DV], do_d.layout)
    ks = gl.allocate_shared_memory(k_d.dtype, [2, 64, c.D], k_d.layout)
    lses = gl.allocate_shared_memory(gl.float32, [c.ST, c.BM], flat)
    deltas = gl.allocate_shared_memory(gl.float32, [c.SO, c.BM], flat)
    box = gl.allocate_shared_memory(gl.int32, [32, 1], flat)
    # What is not wanted has no room of its own: another's stands for it, and is not touched by that name.
    vs = ks
    dss = qs
    dqs = qs
    outs = ks
    if c.VALUES:
        vs = gl.allocate_shared_memory(v_d.dtype, [2, 64, c.DV], v_d.layout)
    if c.FUSED:
        dss = gl.allocate_shared_memory(q_d.dtype, [4, 64, c.BM], half)
        dqs = gl.allocate_shared_memory(gl.float32, [2, 64, c.D * c.BM // 128], dq_d.layout)
        sums = gl.allocate_shared_memory(gl.float32, [1, 64, c.D * c.BM // 128], dq_d.layout)
    elif c.STAGED:
        outs = gl.allocate_shared_memory(k_d.dtype, [2, 64, c.D], k_d.layout)
    memory = (qs, dos, ks, vs, lses, deltas, dss, dqs, outs, box)
    # Ready ones complete after two arrivals: the row statistics, and the bytes of the tile.
    readers: gl.constexpr = 3 if c.FUSED else 2
    bars = (
        barriers(1, 1), barriers(1, 2), barriers(c.ST, 2), barriers(c.ST, 2), barriers(c.SO, 2), barriers(c.SO, 2),
        barriers(2, 2), barriers(2, 2), barriers(2, 1), barriers(2, readers),
    )  # fmt: skip
    descs = (q_d, k_d, v_d, do_d, dk_d, dv_d, dq_d)
    planes = (q_batch, q_head, q_col, k_batch, k_head, k_col, v_batch, v_head, v_col, do_batch, do_head, do_col)
    scalars = (w, scale, cap, score_args, mask_args)
    task = (
        descs, (TILES, CU_Q, CU_K), (BLOCKS, COUNTS, FULL, sbb, sbh, NB), (Hq, Hkv, Sq, Sk, tiles), scalars, memory, bars,
        total,
    )  # fmt: skip
    results = (DK, DV_OUT, dk_stride, dv_stride, FIRST, WORDS)
    stats = (LSE, DELTA)
    units = total // tiles
    if c.FUSED:
        units -= lag
        ring = (SUMS, DQ, MARKS, units, lag, slots, tiles, Hkv, Sq, rows, scale)
        gl.warp_specialize([
            (keys_consumer, (task, results, ring, units, 0, c)),
            (keys_consumer, (task, results, ring, units, 1, c)),
            (keys_producer, (task, planes, stats, COUNTER, ring, units, lag, slots, rows, c)),
            (rounder, (dq_d, sums, barriers(1, 1), box, bars[8], bars[9], total, ring, 2, c)),
        ], [4, 1, 2], [240, 24, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (keys_consumer, (task, results, (), units, 0, c)),
            (keys_consumer, (task, results, (), units, 1, c)),
            (keys_producer, (task, planes, stats, COUNTER, (), units, lag, slots, rows, c)),
        ], [4, 1], [240, 24])  # fmt: skip
