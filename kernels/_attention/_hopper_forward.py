# mypy: ignore-errors
# (Gluon's language, which Python's types do not describe.)
"""Forward on Hopper: one warp brings tiles by TMA, two warpgroups of 64 queries each multiply by wgmma.

The next block's QK^T is issued before this block's softmax, so that the tensor cores work while exponentials are taken
(Shah et al., FlashAttention-3, section 3.2).
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

from trainkit.kernels._attention._hopper_tiles import LN2, LOG2E, barriers, block_at, key_blocks, locate, masked


@gluon.jit
def producer(
    q_d, k_d, v_d, qs, ks, vs, q_ready, k_ready, k_free, v_ready, v_free, BLOCKS, qr, qc, kr, kc, vr, vc, last, count,
    BN: gl.constexpr, ST: gl.constexpr, LISTED: gl.constexpr,
):  # fmt: skip
    """Bring the tile's queries once, then its key and value blocks through a ring of ST buffers each."""
    mbarrier.expect(q_ready.index(0), 2 * q_d.block_type.nbytes)
    tma.async_copy_global_to_shared(q_d, [qr, qc], q_ready.index(0), qs.index(0))
    tma.async_copy_global_to_shared(q_d, [qr + 64, qc], q_ready.index(0), qs.index(1))
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
def fold(
    S, m, den, n0, rows, b, h, Sk, off, w, scale, score_args, mask_args, BN: gl.constexpr, L: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, MASKED: gl.constexpr, SCORE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """One online-softmax step on a tile of raw scores: (weights, new maximum, new denominator, factor of the old)."""
    factor = scale * LOG2E
    cols = n0 + gl.arange(0, BN, gl.SliceLayout(0, L))
    inside = gl.minimum(cols, Sk - 1)
    if SCORE is not None:
        S = SCORE(S * scale, b, h, rows, inside, off, score_args)
        factor = LOG2E
    if MASKED:
        S = masked(S, rows[:, None], cols[None, :], rows, inside, b, h, Sk, off, w, mask_args, CAUSAL, WINDOW, MASK)
    # `factor` is positive (the host sees to it), so it may follow the maximum.
    m_new = gl.maximum(m, gl.max(S, 1) * factor)
    top = m_new
    if MASKED or SCORE is not None:
        top = gl.where(m_new == -float("inf"), 0.0, m_new)
    p = gl.exp2(S * factor - top[:, None])
    fade = gl.exp2(m - top)
    return p, m_new, den * fade + gl.sum(p, 1), fade


@gluon.jit
def step(
    acc, P, m, den, qt, ks, vs, k_ready, k_free, v_ready, v_free, BLOCKS, last, n, rows, b, h, Sk, off, w, scale,
    score_args, mask_args, BN: gl.constexpr, ST: gl.constexpr, L: gl.constexpr, LO: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr, MASKED: gl.constexpr, LISTED: gl.constexpr, SCORE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Block n's scores and softmax, while block n - 1's weights meet their values."""
    A: gl.constexpr = gl.DotOperandLayout(0, LO, 2)
    s = n % ST
    t = (n - 1) % ST
    mbarrier.wait(k_ready.index(s), (n // ST) & 1)
    zero = gl.zeros([64, BN], gl.float32, L)
    S = warpgroup_mma(qt, ks.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(t), ((n - 1) // ST) & 1)
    acc = warpgroup_mma(P, vs.index(t), acc, is_async=True)
    S = warpgroup_mma_wait(1, deps=[S])
    mbarrier.arrive(k_free.index(s))
    n0 = block_at(BLOCKS, last, n, -1, LISTED) * BN
    p, m, den, fade = fold(S, m, den, n0, rows, b, h, Sk, off, w, scale, score_args, mask_args, BN, L, CAUSAL, WINDOW,
                           MASKED, SCORE, MASK)  # fmt: skip
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_free.index(t))
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, LO))[:, None]
    P = gl.convert_layout(p.to(vs.dtype), A)
    return acc, P, m, den


@gluon.jit
def consumer(
    o_d, OUT, LSE, SINKS, qs, ks, vs, q_ready, k_ready, k_free, v_ready, v_free, BLOCKS, orow, ocol, o_stride, m0, b, h,
    Sq, Sk, off, w, scale, last, n1, n2, count, score_args, mask_args, W: gl.constexpr, DV: gl.constexpr,
    BN: gl.constexpr, ST: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SINK: gl.constexpr,
    LISTED: gl.constexpr, TMA_OUT: gl.constexpr, SCORE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Queries [m0 + 64 W, m0 + 64 W + 64): all of their blocks, then the output."""
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    LO: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, LO, 2)
    R: gl.constexpr = gl.SliceLayout(1, L)
    RO: gl.constexpr = gl.SliceLayout(1, LO)
    qt = qs.index(W)
    row0 = m0 + 64 * W
    offsets = row0 + gl.arange(0, 64, R)
    rows = gl.minimum(offsets, Sq - 1)
    m = gl.full([64], -float("inf"), gl.float32, R)
    den = gl.full([64], 0.0, gl.float32, R)
    acc = gl.zeros([64, DV], gl.float32, LO)
    mbarrier.wait(q_ready.index(0), 0)
    if count > 0:
        mbarrier.wait(k_ready.index(0), 0)
        zero = gl.zeros([64, BN], gl.float32, L)
        S = warpgroup_mma(qt, ks.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
        S = warpgroup_mma_wait(0, deps=[S])
        mbarrier.arrive(k_free.index(0))
        n0 = block_at(BLOCKS, last, 0, -1, LISTED) * BN
        # The first block is whole only if no partly seen one comes before, and whole ones exist.
        if (n1 > 0) | (n2 == 0):
            p, m, den, fade = fold(S, m, den, n0, rows, b, h, Sk, off, w, scale, score_args, mask_args, BN, L, CAUSAL,
                                   WINDOW, True, SCORE, MASK)  # fmt: skip
        else:
            p, m, den, fade = fold(S, m, den, n0, rows, b, h, Sk, off, w, scale, score_args, mask_args, BN, L, CAUSAL,
                                   WINDOW, False, SCORE, MASK)  # fmt: skip
        P = gl.convert_layout(p.to(vs.dtype), A)
        for n in range(1, n1):
            acc, P, m, den = step(acc, P, m, den, qt, ks, vs, k_ready, k_free, v_ready, v_free, BLOCKS, last, n,
            rows, b, h,
                                  Sk, off, w, scale, score_args, mask_args, BN, ST, L, LO, CAUSAL, WINDOW, True, LISTED,
                                  SCORE, MASK)  # fmt: skip
        for n in range(gl.maximum(n1, 1), n2):
            acc, P, m, den = step(acc, P, m, den, qt, ks, vs, k_ready, k_free, v_ready, v_free, BLOCKS, last, n,
            rows, b, h,
                                  Sk, off, w, scale, score_args, mask_args, BN, ST, L, LO, CAUSAL, WINDOW, False,
                                  LISTED,
                                  SCORE, MASK)  # fmt: skip
        if WINDOW or LISTED:
            for n in range(gl.maximum(n2, 1), count):
                acc, P, m, den = step(acc, P, m, den, qt, ks, vs, k_ready, k_free, v_ready, v_free, BLOCKS, last, n,
                rows,
                                      b, h, Sk, off, w, scale, score_args, mask_args, BN, ST, L, LO, CAUSAL, WINDOW,
                                      True,
                                      LISTED, SCORE, MASK)  # fmt: skip
        t = (count - 1) % ST
        mbarrier.wait(v_ready.index(t), ((count - 1) // ST) & 1)
        acc = warpgroup_mma(P, vs.index(t), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
    # Not by the maximum, which passes over NaN: a NaN in the scores must come out.
    empty = den == 0.0
    top = gl.where(empty, 0.0, m)
    total = gl.where(empty, 1.0, den)
    fade = gl.where(empty, 0.0, 1.0)
    if SINK:
        sink = gl.load(SINKS + h).to(gl.float32) * LOG2E
        raised = gl.maximum(top, sink)
        fade = fade * gl.exp2(top - raised)
        total = gl.where(empty, 1.0, total * gl.exp2(top - raised) + gl.exp2(sink - raised))
        top = raised
    out = (acc * gl.convert_layout(fade / total, RO)[:, None]).to(vs.dtype)
    lse = gl.where(empty, -float("inf"), (top + gl.log2(total)) * LN2)
    gl.store(LSE + offsets, lse, mask=offsets < Sq)
    if TMA_OUT and row0 + 64 <= Sq:
        qt.store(out)
        fence_async_shared()
        tma.async_copy_shared_to_global(o_d, [orow + row0, ocol], qt)
        tma.store_wait(0)
    else:
        at = row0 + gl.arange(0, 64, RO)
        cols = gl.arange(0, DV, gl.SliceLayout(0, LO))
        to = OUT + (orow + at[:, None]).to(gl.int64) * o_stride + (ocol + cols[None, :])
        gl.store(to, out, mask=(at < Sq)[:, None] & (cols >= 0)[None, :])


@gluon.jit(do_not_specialize=["Sq", "Sk", "w"])
def forward(
    q_d, k_d, v_d, o_d, OUT, LSE, SINKS, TILES, CU_Q, CU_K, BLOCKS, COUNTS, FULL, sbb, sbh, NB,
    q_batch, q_head, q_col, k_batch, k_head, k_col, v_batch, v_head, v_col, o_stride, Hq, Sq, Sk, w, scale,
    score_args, mask_args, GROUP: gl.constexpr, DV: gl.constexpr, BN: gl.constexpr, ST: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SINK: gl.constexpr, PACKED: gl.constexpr, LISTED: gl.constexpr,
    TMA_OUT: gl.constexpr, SCORE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """One tile of 128 queries of one head.

    Tensors are planes of rows: token i of head h and batch entry b is row `b * batch + h * head + i` from column
    `h * col` on.
    """
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
    qs = gl.allocate_shared_memory(q_d.dtype, [2, 64, q_d.block_shape[1]], q_d.layout)
    ks = gl.allocate_shared_memory(k_d.dtype, [ST, BN, k_d.block_shape[1]], k_d.layout)
    vs = gl.allocate_shared_memory(v_d.dtype, [ST, BN, DV], v_d.layout)
    q_ready = barriers(1, 1)
    k_ready = barriers(ST, 1)
    v_ready = barriers(ST, 1)
    k_free = barriers(ST, 2)
    v_free = barriers(ST, 2)
    qr = zb * q_batch + h * q_head + q0 + m0
    kr = zb * k_batch + g * k_head + k0
    vr = zb * v_batch + g * v_head + k0
    orow = zb * total_q + q0
    LSE += stats
    gl.warp_specialize([
        (consumer, (o_d, OUT, LSE, SINKS, qs, ks, vs, q_ready, k_ready, k_free, v_ready, v_free, BLOCKS, orow, h * DV,
                    o_stride, m0, b, h, Sq, Sk, off, w, scale, last, n1, n2, count, score_args, mask_args, 0, DV, BN,
                    ST,
                    CAUSAL, WINDOW, SINK, LISTED, TMA_OUT, SCORE, MASK)),
        (consumer, (o_d, OUT, LSE, SINKS, qs, ks, vs, q_ready, k_ready, k_free, v_ready, v_free, BLOCKS, orow, h * DV,
                    o_stride, m0, b, h, Sq, Sk, off, w, scale, last, n1, n2, count, score_args, mask_args, 1, DV, BN,
                    ST,
                    CAUSAL, WINDOW, SINK, LISTED, TMA_OUT, SCORE, MASK)),
        (producer, (q_d, k_d, v_d, qs, ks, vs, q_ready, k_ready, k_free, v_ready, v_free, BLOCKS, qr, h * q_col, kr,
                    g * k_col, vr, g * v_col, last, count, BN, ST, LISTED)),
    ], [4, 1], [240, 24])  # fmt: skip
