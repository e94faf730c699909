# mypy: ignore-errors
# (Gluon's language, which Python's types do not describe.)
"""Forward on Hopper: one warp brings tiles by TMA, two or three warpgroups of 64 queries each multiply by wgmma.

The next block's QK^T is issued before this block's softmax, so that the tensor cores work while exponentials are taken
(Shah et al., FlashAttention-3, section 3.2; making the warpgroups take turns, section 3.1, gained nothing here). Programs
stay and fetch their next tile from a counter: its first keys arrive while the last tile's output leaves.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from trainkit.kernels._attention._elementwise_gluon import tanh
from trainkit.kernels._attention._hopper_tiles import LN2, LOG2E, barriers, block_at, key_list, locate, masked


@gluon.jit
def producer(task, planes, COUNTER, c: gl.constexpr):
    """Bring each tile's queries, then its key and value blocks through a ring of ST buffers each; fetch the next tile."""
    descs, tables, lists, sizes, scalars, memory, bars, total = task
    q_d, k_d, v_d, _ = descs
    q_batch, q_head, q_col, k_batch, k_head, k_col, v_batch, v_head, v_col = planes
    qs, ks, vs, _, box = memory
    q_ready, q_free, k_ready, k_free, v_ready, v_free, t_ready, t_free = bars
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    t = gl.program_id(0)
    done = 0
    ring = 0
    while t < total:
        tile, b, h, zb, q0, k0, _stats, Sq, Sk = locate(t, tables, sizes, c.CAUSAL, c.PACKED)
        BLOCKS, last, _n1, _n2, count = key_list(tile, b, h, Sq, Sk, scalars[0], lists, c)
        g = h // c.GROUP
        row = zb * q_batch + h * q_head + q0 + tile * c.BM
        for i in gl.static_range(c.BM // 64):
            mbarrier.wait(q_free.index(i), (done & 1) ^ 1)
            mbarrier.expect(q_ready.index(i), q_d.block_type.nbytes)
            tma.async_copy_global_to_shared(q_d, [row + 64 * i, h * q_col], q_ready.index(i), qs.index(i))
        kr = zb * k_batch + g * k_head + k0
        vr = zb * v_batch + g * v_head + k0
        for n in range(0, count):
            at = block_at(BLOCKS, last, n, -1, c.LISTED) * c.BN
            s = (ring + n) % c.ST
            phase = ((ring + n) // c.ST) & 1
            mbarrier.wait(k_free.index(s), phase ^ 1)
            mbarrier.expect(k_ready.index(s), k_d.block_type.nbytes)
            tma.async_copy_global_to_shared(k_d, [kr + at, g * k_col], k_ready.index(s), ks.index(s))
            mbarrier.wait(v_free.index(s), phase ^ 1)
            mbarrier.expect(v_ready.index(s), v_d.block_type.nbytes)
            tma.async_copy_global_to_shared(v_d, [vr + at, g * v_col], v_ready.index(s), vs.index(s))
        ring += count
        # Fetched no earlier than needed: the sooner it is promised, the worse the load is balanced at the end.
        t = gl.atomic_add(COUNTER, 1) + gl.num_programs(0)
        mbarrier.wait(t_free.index(0), (done & 1) ^ 1)
        box.index(0).store(gl.full([1], t, gl.int32, lanes))
        mbarrier.arrive(t_ready.index(0))
        done += 1


@gluon.jit
def fold(S, m, den, n0, rows, problem, MASKED: gl.constexpr, L: gl.constexpr, c: gl.constexpr):
    """One online-softmax step on a tile of raw scores: (weights, new maximum, new denominator, factor of the old)."""
    b, h, _, Sk, off, _, scale, cap, score_args, _ = problem
    factor = scale * LOG2E
    cols = n0 + gl.arange(0, c.BN, gl.SliceLayout(0, L))
    inside = gl.minimum(cols, Sk - 1)
    if c.CAP:
        S = tanh(S * (scale / cap))
        factor = cap * LOG2E
    if c.SCORE is not None:
        S = c.SCORE(S * scale, b, h, rows, inside, off, score_args)
        factor = LOG2E
    if MASKED:
        S = masked(S, rows[:, None], cols[None, :], rows, inside, problem, c)
    if c.BOUNDED:
        # Capped scores are small enough for exponentials as they are.
        p = gl.exp2(S * factor)
        den = den + gl.sum(p, 1)
        fade = den
    else:
        # `factor` is positive (the host sees to it), so it may follow the maximum.
        m_new = gl.maximum(m, gl.max(S, 1) * factor)
        top = m_new
        if MASKED or c.SCORE is not None:
            top = gl.where(m_new == -float("inf"), 0.0, m_new)
        p = gl.exp2(S * factor - top[:, None])
        fade = gl.exp2(m - top)
        den = den * fade + gl.sum(p, 1)
        m = m_new
    return p, m, den, fade


@gluon.jit
def step(
    acc, P, m, den, qt, memory, bars, BLOCKS, last, n, count, ring, rows, problem, MASKED: gl.constexpr,
    W: gl.constexpr, L: gl.constexpr, LO: gl.constexpr, c: gl.constexpr,
):  # fmt: skip
    """Block n's scores and softmax, while block n - 1's weights meet their values."""
    _, ks, vs, _, _ = memory
    _, q_free, k_ready, k_free, v_ready, v_free, _, _ = bars
    s = (ring + n) % c.ST
    t = (ring + n - 1) % c.ST
    mbarrier.wait(k_ready.index(s), ((ring + n) // c.ST) & 1)
    zero = gl.zeros([64, c.BN], gl.float32, L)
    S = warpgroup_mma(qt, ks.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(t), ((ring + n - 1) // c.ST) & 1)
    acc = warpgroup_mma(P, vs.index(t), acc, is_async=True)
    S = warpgroup_mma_wait(1, deps=[S])
    mbarrier.arrive(k_free.index(s))
    if c.STAGED:
        mbarrier.arrive(q_free.index(W), pred=n == count - 1)
    n0 = block_at(BLOCKS, last, n, -1, c.LISTED) * c.BN
    p, m, den, fade = fold(S, m, den, n0, rows, problem, MASKED, L, c)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_free.index(t))
    if not c.BOUNDED:
        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, LO))[:, None]
    P = gl.convert_layout(p.to(vs.dtype), gl.DotOperandLayout(0, LO, 2))
    return acc, P, m, den


@gluon.jit
def consumer(task, results, W: gl.constexpr, c: gl.constexpr):
    """Queries [64 W, 64 W + 64) of each tile: all of their blocks, then the output."""
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, c.BN, 16])
    LO: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, c.DV, 16])
    R: gl.constexpr = gl.SliceLayout(1, L)
    RO: gl.constexpr = gl.SliceLayout(1, LO)
    descs, tables, lists, sizes, scalars, memory, bars, total = task
    OUT, LSE, SINKS, o_stride = results
    o_d = descs[3]
    qs, ks, vs, outs, box = memory
    q_ready, q_free, k_ready, k_free, v_ready, v_free, t_ready, t_free = bars
    w, scale, cap, score_args, mask_args = scalars
    qt = qs.index(W)
    if c.STAGED:
        stage = outs.index(W)
    else:
        stage = qt
    t = gl.program_id(0)
    done = 0
    ring = 0
    while t < total:
        tile, b, h, zb, q0, _k0, stats, Sq, Sk = locate(t, tables, sizes, c.CAUSAL, c.PACKED)
        BLOCKS, last, n1, n2, count = key_list(tile, b, h, Sq, Sk, w, lists, c)
        problem = (b, h, Sq, Sk, Sk - Sq, w, scale, cap, score_args, mask_args)
        row0 = tile * c.BM + 64 * W
        offsets = row0 + gl.arange(0, 64, R)
        rows = gl.minimum(offsets, Sq - 1)
        m = gl.full([64], 0.0 if c.BOUNDED else -float("inf"), gl.float32, R)
        den = gl.full([64], 0.0, gl.float32, R)
        acc = gl.zeros([64, c.DV], gl.float32, LO)
        mbarrier.wait(q_ready.index(W), done & 1)
        if count > 0:
            s = ring % c.ST
            mbarrier.wait(k_ready.index(s), (ring // c.ST) & 1)
            zero = gl.zeros([64, c.BN], gl.float32, L)
            S = warpgroup_mma(qt, ks.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
            S = warpgroup_mma_wait(0, deps=[S])
            mbarrier.arrive(k_free.index(s))
            if c.STAGED:
                mbarrier.arrive(q_free.index(W), pred=count == 1)
            n0 = block_at(BLOCKS, last, 0, -1, c.LISTED) * c.BN
            # The first block is whole only if no partly seen one comes before, and whole ones exist.
            if (n1 > 0) | (n2 == 0):
                p, m, den, fade = fold(S, m, den, n0, rows, problem, True, L, c)
            else:
                p, m, den, fade = fold(S, m, den, n0, rows, problem, False, L, c)
            P = gl.convert_layout(p.to(vs.dtype), gl.DotOperandLayout(0, LO, 2))
            for n in range(1, n1):
                acc, P, m, den = step(acc, P, m, den, qt, memory, bars, BLOCKS, last, n, count, ring, rows, problem, True,
                                      W, L, LO, c)  # fmt: skip
            for n in range(gl.maximum(n1, 1), n2):
                acc, P, m, den = step(acc, P, m, den, qt, memory, bars, BLOCKS, last, n, count, ring, rows, problem,
                                      False, W, L, LO, c)  # fmt: skip
            if c.WINDOW or c.LISTED:
                for n in range(gl.maximum(n2, 1), count):
                    acc, P, m, den = step(acc, P, m, den, qt, memory, bars, BLOCKS, last, n, count, ring, rows, problem,
                                          True, W, L, LO, c)  # fmt: skip
            ring += count
            s = (ring - 1) % c.ST
            mbarrier.wait(v_ready.index(s), ((ring - 1) // c.ST) & 1)
            acc = warpgroup_mma(P, vs.index(s), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_free.index(s))
        elif c.STAGED:
            mbarrier.arrive(q_free.index(W))
        mbarrier.wait(t_ready.index(0), done & 1)
        t = gl.max(box.index(0).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
        mbarrier.arrive(t_free.index(0))
        # Not by the maximum, which passes over NaN: a NaN in the scores must come out.
        empty = den == 0.0
        top = gl.where(empty, 0.0, m)
        whole = gl.where(empty, 1.0, den)
        fade = gl.where(empty, 0.0, 1.0)
        if c.SINK:
            sink = gl.load(SINKS + h).to(gl.float32) * LOG2E
            raised = gl.maximum(top, sink)
            fade = fade * gl.exp2(top - raised)
            whole = gl.where(empty, 1.0, whole * gl.exp2(top - raised) + gl.exp2(sink - raised))
            top = raised
        out = (acc * gl.convert_layout(fade / whole, RO)[:, None]).to(vs.dtype)
        lse = gl.where(empty, -float("inf"), (top + gl.log2(whole)) * LN2)
        gl.store(LSE + stats + offsets, lse, mask=offsets < Sq)
        orow = zb * sizes[1] + q0
        if c.D == c.DV and row0 + 64 <= Sq:
            # The last tile's output may still be leaving.
            tma.store_wait(0)
            gl.thread_barrier()
            stage.store(out)
            fence_async_shared()
            tma.async_copy_shared_to_global(o_d, [orow + row0, h * c.DV], stage)
            if not c.STAGED:
                tma.store_wait(0)
                gl.thread_barrier()
        else:
            at = row0 + gl.arange(0, 64, RO)
            cols = gl.arange(0, c.DV, gl.SliceLayout(0, LO))
            to = OUT + (orow + at[:, None]).to(gl.int64) * o_stride + (h * c.DV + cols[None, :])
            gl.store(to, out, mask=(at < Sq)[:, None] & (cols >= 0)[None, :])
        if not c.STAGED:
            mbarrier.arrive(q_free.index(W))
        done += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["Hq", "Sq", "Sk", "w", "tiles", "total"])
def forward(
    q_d, k_d, v_d, o_d, OUT, LSE, SINKS, COUNTER, TILES, CU_Q, CU_K, BLOCKS, COUNTS, FULL, sbb, sbh, NB, q_batch, q_head,
    q_col, k_batch, k_head, k_col, v_batch, v_head, v_col, o_stride, Hq, Sq, Sk, w, scale, cap, score_args, mask_args,
    tiles, total, c: gl.constexpr,
):  # fmt: skip
    """Tiles of BM queries of one head each: this program's first, and then whichever the counter names.

    Tensors are planes of rows: token i of head h and batch entry b is row `b * batch + h * head + i` from column
    `h * col` on.
    """
    groups: gl.constexpr = c.BM // 64
    qs = gl.allocate_shared_memory(q_d.dtype, [groups, 64, c.D], q_d.layout)
    ks = gl.allocate_shared_memory(k_d.dtype, [c.ST, c.BN, c.D], k_d.layout)
    vs = gl.allocate_shared_memory(v_d.dtype, [c.ST, c.BN, c.DV], v_d.layout)
    outs = gl.allocate_shared_memory(q_d.dtype, [groups if c.STAGED else 1, 64 if c.STAGED else 8, c.DV], o_d.layout)
    box = gl.allocate_shared_memory(gl.int32, [1, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = (
        barriers(groups, 1), barriers(groups, 1), barriers(c.ST, 1), barriers(c.ST, groups), barriers(c.ST, 1),
        barriers(c.ST, groups), barriers(1, 1), barriers(1, groups),
    )  # fmt: skip
    memory = (qs, ks, vs, outs, box)
    descs = (q_d, k_d, v_d, o_d)
    planes = (q_batch, q_head, q_col, k_batch, k_head, k_col, v_batch, v_head, v_col)
    tables = (TILES, CU_Q, CU_K)
    lists = (BLOCKS, COUNTS, FULL, sbb, sbh, NB)
    sizes = (Hq, Sq, Sk, tiles)
    scalars = (w, scale, cap, score_args, mask_args)
    task = (descs, tables, lists, sizes, scalars, memory, bars, total)
    results = (OUT, LSE, SINKS, o_stride)
    if groups == 2:
        gl.warp_specialize([
            (consumer, (task, results, 0, c)), (consumer, (task, results, 1, c)), (producer, (task, planes, COUNTER, c)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consumer, (task, results, 0, c)), (consumer, (task, results, 1, c)), (consumer, (task, results, 2, c)),
            (producer, (task, planes, COUNTER, c)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip
