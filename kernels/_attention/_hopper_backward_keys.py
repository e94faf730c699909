# mypy: ignore-errors
# (Gluon's language, which Python's types do not describe.)
"""dK and dV on Hopper, and dQ in the same pass where the order of its sums may vary.

Computed transposed (S^T = K Q^T), weights and their gradients are wgmma's register operand of the next product. For dQ
they go through shared memory, each warpgroup multiplies half of the columns, and TMA adds the tile to global memory while
dK is still being multiplied (as in FlashAttention-3, section 3.2, with the copy engine for its writer warp).
"""

from typing import NamedTuple

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

from trainkit.kernels._attention._hopper_backward_keys_producer import (
    KeyBarriers,
    KeyMemory,
    KeyTask,
    KeyVisit,
    keys_producer,
)
from trainkit.kernels._attention._hopper_bits import bits_of
from trainkit.kernels._attention._hopper_dq_pool import Pool, await_slot, convert_dq, leave
from trainkit.kernels._attention._hopper_gradients import score_gradient, slope_of, weigh
from trainkit.kernels._attention._hopper_tiles import (
    Bits,
    Items,
    Lists,
    Paging,
    Problem,
    Rows,
    Sizes,
    barriers,
    block_at,
    opaque_zero,
    posted,
    row_of,
    store_rows,
)


class Results(NamedTuple):
    """dK and dV, and the strides of their rows."""

    DK: gl.tensor
    DV_OUT: gl.tensor
    dk_stride: gl.tensor
    dv_stride: gl.tensor


class Alibi(NamedTuple):
    """ALiBi's slope, what each key adds to its scores, and the key that positions count from."""

    slope: gl.tensor
    shift: gl.tensor
    first_key: gl.tensor


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
    u = (n + 2) % 2
    if n >= start:
        mbarrier.wait(bars.ds_ready.index(u), (n // 2) & 1)
    zero = opaque_zero(n + 1)
    near = memory.k.index(zero)
    far = memory.k.index(1 + zero)
    near_dS = memory.ds.index(u * 2)
    far_dS = memory.ds.index(u * 2 + 1)
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
def add_dq(dq, n, start, row, summed, dq_d, memory, bars, pool, W: gl.constexpr, c: gl.constexpr):
    """Give block n's dS back, and add its dQ to the sums; before the tile's first, count the adds to the last tile's group.

    By then they have arrived, or nearly.
    """
    tma.store_wait(0)
    gl.thread_barrier()
    memory.dq.index(W).store(dq)
    fence_async_shared()
    if n >= start:
        mbarrier.arrive(bars.ds_free.index((n + 2) % 2))
        if n == start:
            leave(summed, pool)
        if c.BM == 64:
            reduce_add(dq_d, [row, c.D // 2 * W], memory.dq.index(W))
        else:
            reduce_add(dq_d, [row + 64 * W, 0], memory.dq.index(W))


@gluon.jit
def keys_step(
    dk, dv, cols, alibi, n, start, at, words, before, summed, problem, dq_d, dq_row, memory, bars, pool,
    MASKED: gl.constexpr, W: gl.constexpr, L: gl.constexpr, c: gl.constexpr,
):  # fmt: skip
    """Block n of all, the tile's first being `start`, queries from `at` on, with these bits; `before` is where dQ of
    block n - 1 goes.

    Nothing is in flight when it starts or ends: ptxas makes every product wait for the one before where an accumulator
    is being written across the edge of a loop. LATE: dQ of the block before is multiplied here, when both warpgroups'
    dS have long been there; otherwise this block's.
    """
    LK: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, c.D, 16])
    LV: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, c.DV, 16])
    s = n % c.ST
    mine = W + opaque_zero(n)
    o = n % c.SO + opaque_zero(n)
    u = n % 2
    o_phase = (n // c.SO) & 1
    rows = at + gl.arange(0, c.BM, gl.SliceLayout(0, L))
    # Full blocks have no query over the end.
    qv = gl.minimum(rows, problem.Sq - 1) if MASKED else rows
    kv = gl.minimum(cols, problem.Sk - 1)
    zero = gl.zeros([64, c.BM], gl.float32, L)
    mbarrier.wait(bars.q_ready.index(s), (n // c.ST) & 1)
    S = warpgroup_mma(memory.k.index(mine), memory.q.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
    if c.LATE:
        dq = issue_dq(n - 1, start, memory, bars, W, c)
        S = warpgroup_mma_wait(2, deps=[S])
    else:
        mbarrier.wait(bars.do_ready.index(o), o_phase)
        if c.WANT_DK:
            dP = warpgroup_mma(
                memory.v.index(mine), memory.do.index(o).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            S = warpgroup_mma_wait(1, deps=[S])
        else:
            S = warpgroup_mma_wait(0, deps=[S])
    lse = memory.lse.index(s).load(gl.SliceLayout(0, L))
    if c.ALIBI:
        lse += alibi.slope * (rows + (problem.Sk - problem.Sq - alibi.first_key)).to(gl.float32)
    p, weight = weigh(S, lse[None, :], alibi.shift, qv[None, :], cols[:, None], qv, kv, problem, words, MASKED, c)
    if c.WANT_DV:
        P = gl.convert_layout(p.to(memory.do.dtype), gl.DotOperandLayout(0, LV, 2))
    if c.LATE:
        dq = warpgroup_mma_wait(0, deps=[dq])
        mbarrier.wait(bars.do_ready.index(o), o_phase)
        add_dq(dq, n - 1, start, before, summed, dq_d, memory, bars, pool, W, c)
        dP = warpgroup_mma(memory.v.index(mine), memory.do.index(o).permute((1, 0)), zero, use_acc=False, is_async=True)
        dv = warpgroup_mma(P, memory.do.index(o), dv, is_async=True)
        dP = warpgroup_mma_wait(1, deps=[dP])
    else:
        if c.WANT_DK:
            dP = warpgroup_mma_wait(0, deps=[dP])
        if c.WANT_DV:
            dv = warpgroup_mma(P, memory.do.index(o), dv, is_async=True)
    if c.WANT_DK:
        delta = memory.delta.index(o).load(gl.SliceLayout(0, L))
        if not c.WANT_DV:
            mbarrier.arrive(bars.do_free.index(o))
        ds = score_gradient(weight, dP - delta[None, :], S, qv, kv, problem, c)
        dS = gl.convert_layout(ds.to(memory.q.dtype), gl.DotOperandLayout(0, LK, 2))
        if c.LATE:
            dk = warpgroup_mma(dS, memory.q.index(s), dk, is_async=True)
        if c.FUSED:
            mbarrier.wait(bars.ds_free.index(u), ((n // 2) & 1) ^ 1)
            memory.ds.index(u * 2 + W).store(ds.to(memory.q.dtype))
            fence_async_shared()
            mbarrier.arrive(bars.ds_ready.index(u))
        if c.FUSED and not c.LATE:
            dq = issue_dq(n, start, memory, bars, W, c)
        if not c.LATE:
            dk = warpgroup_mma(dS, memory.q.index(s), dk, is_async=True)
        if c.WANT_DV:
            dv = warpgroup_mma_wait(3 if c.FUSED and not c.LATE else 1, deps=[dv])
            mbarrier.arrive(bars.do_free.index(o))
        if c.FUSED and not c.LATE:
            # dK is still being multiplied while dQ leaves.
            dq = warpgroup_mma_wait(1, deps=[dq])
            add_dq(dq, n, start, dq_row + at, summed, dq_d, memory, bars, pool, W, c)
        dk = warpgroup_mma_wait(0, deps=[dk])
    else:
        dv = warpgroup_mma_wait(0, deps=[dv])
        mbarrier.arrive(bars.do_free.index(o))
    mbarrier.arrive(bars.q_free.index(s))
    return dk, dv


@gluon.jit
def visit_of(mailbox, stage):
    return KeyVisit(
        posted(mailbox, stage, 0), posted(mailbox, stage, 1), posted(mailbox, stage, 2), posted(mailbox, stage, 3),
        posted(mailbox, stage, 4), posted(mailbox, stage, 5), posted(mailbox, stage, 6), posted(mailbox, stage, 7),
        posted(mailbox, stage, 8), posted(mailbox, stage, 9), posted(mailbox, stage, 10), posted(mailbox, stage, 11),
        posted(mailbox, stage, 12), posted(mailbox, stage, 13), posted(mailbox, stage, 14), posted(mailbox, stage, 15),
    )  # fmt: skip


@gluon.jit
def result_rows(desc, out_row, kv_head, b, paging, width: gl.constexpr, c: gl.constexpr):
    """Where the tile's keys have their gradients, laid out as `[tokens, heads, width]`, in pages as those are."""
    if c.PAGE:
        return Rows(desc, 0, kv_head * width, paging.pages + gl.load(paging.indptr + b), c.PAGE)
    else:
        return Rows(desc, out_row, kv_head * width, 0, 0)


@gluon.jit
def keys_consumer(task, results, W: gl.constexpr, c: gl.constexpr):
    """Keys [64 W, 64 W + 64) of each tile: what every query of the group's heads brings them."""
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, c.BM, 16])
    LK: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, c.D, 16])
    LV: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, c.DV, 16])
    memory = task.memory
    bars = task.bars
    pool = task.pool
    lists = task.lists
    dq_d = task.dq_d
    done = 0
    kept = 0
    base = 0
    mbarrier.wait(bars.mail_ready.index(0), 0)
    while posted(memory.mailbox, done & 1, 0) < task.total:
        stage = done & 1
        visit = visit_of(memory.mailbox, stage)
        n0 = visit.n0
        n2 = visit.masked_or_full
        count = visit.count
        summed = visit.summed
        live = (visit.group < pool.groups).to(gl.int32)
        cols = n0 + 64 * W + gl.arange(0, 64, gl.SliceLayout(1, L))
        dk = gl.zeros([64, c.D if c.WANT_DK else 16], gl.float32, LK)
        dv = gl.zeros([64, c.DV if c.WANT_DV else 16], gl.float32, LV)
        mbarrier.wait(bars.kv_ready.index(0), kept & 1, pred=live > 0)
        if c.FUSED:  # noqa: SIM102 (one is known when compiling, the other is not)
            if posted(memory.mailbox, stage, 15) > 0:
                # Counted before the wait: what this one waits for may wait for it.
                leave(summed, pool)
                summed = -1
                await_slot(visit.group, pool)
        start = base
        before = visit.dq_row
        for g in range(c.GROUP):
            h = visit.kv_head * c.GROUP + g
            problem = Problem(
                visit.b, h, visit.Sq, visit.Sk, visit.Sk - visit.Sq, task.w, task.scale, task.cap, task.score_args,
                task.mask_args,
            )  # fmt: skip
            blocks = lists.blocks
            if c.BLOCK_SPARSE:
                row = row_of(lists, visit.b, h, n0 // 128)
                blocks = lists.blocks + row.to(gl.int64) * lists.width
                n2 = gl.load(lists.full + row) * live
                count = gl.load(lists.counts + row) * live
            bits = 0
            if c.BITS:
                bits = gl.load(task.bits.first + row) - n2
            alibi = Alibi(0.0, 0.0, n0)
            if c.ALIBI:
                slope = slope_of(problem, c)
                alibi = Alibi(slope, slope * (cols - n0).to(gl.float32)[:, None], n0)
            dq_row = visit.dq_row
            if c.FUSED:
                dq_row += g * pool.rows
            if not c.BLOCK_SPARSE:
                for i in range(0, visit.masked):
                    at = (visit.first + i) * c.BM
                    dk, dv = keys_step(
                        dk, dv, cols, alibi, base + i, start, at, 0, before, summed, problem, dq_d, dq_row, memory, bars, pool,
                        True, W, L, c,
                    )  # fmt: skip
                    before = dq_row + at
            for i in range(visit.masked, n2):
                at = block_at(blocks, visit.first, i, 1, c.BLOCK_SPARSE) * c.BM
                dk, dv = keys_step(
                    dk, dv, cols, alibi, base + i, start, at, 0, before, summed, problem, dq_d, dq_row, memory, bars, pool,
                    False, W, L, c,
                )  # fmt: skip
                before = dq_row + at
            # Blocks after the full ones: a window's far edge, listed ones, the ragged end of the queries.
            for i in range(n2, count):
                at = block_at(blocks, visit.first, i, 1, c.BLOCK_SPARSE) * c.BM
                words = bits_of(task.bits.words, bits + i, W, 128, c.BM, L, c)
                dk, dv = keys_step(
                    dk, dv, cols, alibi, base + i, start, at, words, before, summed, problem, dq_d, dq_row, memory, bars, pool,
                    True, W, L, c,
                )  # fmt: skip
                before = dq_row + at
            base += count
        if c.LATE:  # noqa: SIM102 (one is known when compiling, the other is not)
            if base > start:
                dq = warpgroup_mma_wait(0, deps=[issue_dq(base - 1, start, memory, bars, W, c)])
                add_dq(dq, base - 1, start, before, summed, dq_d, memory, bars, pool, W, c)
        if c.STAGED:
            mbarrier.arrive(bars.kv_free.index(0), pred=live > 0)
        if c.FUSED:
            if base == start:
                leave(summed, pool)
            # The last sums of dQ leave from there before.
            buffers = memory.dq.index(W)._reinterpret(memory.k.dtype, [128 // c.D, 64, c.D], task.dk_d.layout)
            dk_buffer = buffers.index(0)
            dv_buffer = buffers.index(128 // c.D - 1)
        else:
            dk_buffer = (memory.out if c.STAGED else memory.k).index(W)
            dv_buffer = (memory.out if c.STAGED else memory.v if c.VALUES else memory.k).index(W)
        # Read anew: not kept in a register through the loops.
        kv_head = posted(memory.mailbox, stage, 3)
        out_row = posted(memory.mailbox, stage, 4)
        first = n0 + 64 * W
        if c.WANT_DV:
            rows = result_rows(task.dv_d, out_row, kv_head, visit.b, task.paging, c.DV, c)
            store_rows(
                rows,
                results.DV_OUT,
                results.dv_stride,
                dv.to(memory.v.dtype),
                dv_buffer,
                first,
                visit.Sk,
                c.DV,
                LV,
                c.PAGE,
            )
        if c.WANT_DK:
            rows = result_rows(task.dk_d, out_row, kv_head, visit.b, task.paging, c.D, c)
            dk = (dk * task.scale).to(memory.k.dtype)
            store_rows(rows, results.DK, results.dk_stride, dk, dk_buffer, first, visit.Sk, c.D, LK, c.PAGE)
        if not c.STAGED:
            tma.store_wait(0)
            gl.thread_barrier()
            mbarrier.arrive(bars.kv_free.index(0), pred=live > 0)
        mbarrier.arrive(bars.mail_free.index(stage))
        kept += live
        done += 1
        mbarrier.wait(bars.mail_ready.index(done & 1), (done >> 1) & 1)
    tma.store_wait(0)
    if c.FUSED:
        leave(posted(memory.mailbox, done & 1, 13), pool)


@gluon.jit(do_not_specialize=["Hq", "Hkv", "Sq", "Sk", "w", "tiles", "total", "delay", "slots", "rows"])
def backward_keys(
    q_d, k_d, v_d, do_d, dk_d, dv_d, dq_d, DQ, SUMS, MARKS, DK, DV_OUT, LSE, DELTA, COUNTER, ITEMS, CU_Q, CU_K, BLOCKS, COUNTS,
    FULL, FIRST, WORDS, INDPTR, PAGES, delay, slots, rows, list_strides, views, dk_stride, dv_stride, Hq, Hkv, Sq, Sk, w, scale,
    cap, score_args, mask_args, tiles, total, c: gl.constexpr,
):  # fmt: skip
    """Compute dK, dV, or both, in tiles of 128 keys of one key head.

    FUSED: dQ too. STAGED: results leave from memory other than their keys', so that the next tile's keys may come.
    """
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    half: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, c.BM], q_d.dtype)
    q = gl.allocate_shared_memory(q_d.dtype, [c.ST, c.BM, c.D], q_d.layout)
    do = gl.allocate_shared_memory(do_d.dtype, [c.SO, c.BM, c.DV], do_d.layout)
    k = gl.allocate_shared_memory(k_d.dtype, [2, 64, c.D], k_d.layout)
    lse = gl.allocate_shared_memory(gl.float32, [c.ST, c.BM], flat)
    delta = gl.allocate_shared_memory(gl.float32, [c.SO, c.BM], flat)
    mailbox = gl.allocate_shared_memory(gl.int32, [32, 1], flat)
    # What is not wanted has no memory of its own: another's stands for it, and is not touched by that name.
    v = k
    ds = q
    dq = q
    out = k
    if c.VALUES:
        v = gl.allocate_shared_memory(v_d.dtype, [2, 64, c.DV], v_d.layout)
    if c.FUSED:
        ds = gl.allocate_shared_memory(q_d.dtype, [4, 64, c.BM], half)
        dq = gl.allocate_shared_memory(gl.float32, [2, 64, c.D * c.BM // 128], dq_d.layout)
        sums = gl.allocate_shared_memory(gl.float32, [1, 64, c.D * c.BM // 128], dq_d.layout)
    elif c.STAGED:
        out = gl.allocate_shared_memory(k_d.dtype, [2, 64, c.D], k_d.layout)
    memory = KeyMemory(q, do, k, v, lse, delta, ds, dq, out, mailbox)
    # Ready ones complete after two arrivals: the row statistics, and the bytes of the tile.
    readers: gl.constexpr = 3 if c.FUSED else 2
    bars = KeyBarriers(
        barriers(1, 1), barriers(1, 2), barriers(c.ST, 2), barriers(c.ST, 2), barriers(c.SO, 2), barriers(c.SO, 2),
        barriers(2, 2), barriers(2, 2), barriers(2, 1), barriers(2, readers),
    )  # fmt: skip
    groups = total // tiles
    if c.FUSED:
        groups -= delay
    pool = Pool(SUMS, DQ, MARKS, groups, delay, slots, tiles, Hkv, Sq, rows, scale)
    stride_b, stride_h, width = list_strides
    task = KeyTask(
        q_d, k_d, v_d, do_d, dk_d, dv_d, dq_d, Items(ITEMS, CU_Q, CU_K), Paging(INDPTR, PAGES),
        Lists(BLOCKS, COUNTS, FULL, stride_b, stride_h, width), Bits(FIRST, WORDS), Sizes(Hkv, Sq, Sk, tiles), Hq, w, scale, cap,
        score_args, mask_args, memory, bars, pool, total,
    )  # fmt: skip
    results = Results(DK, DV_OUT, dk_stride, dv_stride)
    stats = (LSE, DELTA)
    if c.FUSED:
        gl.warp_specialize([
            (keys_consumer, (task, results, 0, c)),
            (keys_consumer, (task, results, 1, c)),
            (keys_producer, (task, views, stats, COUNTER, c)),
            (convert_dq, (dq_d, sums, barriers(1, 1), mailbox, bars.mail_ready, bars.mail_free, total, pool, 2, c)),
        ], [4, 1, 2], [240, 24, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (keys_consumer, (task, results, 0, c)),
            (keys_consumer, (task, results, 1, c)),
            (keys_producer, (task, views, stats, COUNTER, c)),
        ], [4, 1], [240, 24])  # fmt: skip
