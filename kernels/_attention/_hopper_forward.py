# mypy: ignore-errors
# (Gluon's language, which Python's types do not describe.)
"""Forward on Hopper: one warp brings tiles by TMA, two or three warpgroups of 64 queries each multiply by wgmma.

The next block's QK^T is issued before this block's softmax, so that the tensor cores work while exponentials are taken
(Shah et al., FlashAttention-3, section 3.2); at head_dim 64 the warpgroups also take turns (section 3.1). Programs stay
and take their next tile from a counter; its first scores are computed beside the last tile's last product, and what
describes it comes from the bringing warp through shared memory.
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

from trainkit.kernels._attention._elementwise_gluon import exp2_polynomial, tanh
from trainkit.kernels._attention._hopper_bits import bits_list, bits_of, sifted, visited
from trainkit.kernels._attention._hopper_rope import turn
from trainkit.kernels._attention._hopper_tiles import LN2, LOG2E, barriers, key_list, locate, masked, post, posted


@gluon.jit
def producer(task, planes, COUNTER, c: gl.constexpr):
    """Bring each tile's queries, then its key and value blocks through a ring of ST buffers each; fetch the next tile."""
    descs, tables, lists, bits, sizes, scalars, memory, bars, total = task
    q_d, k_d, v_d, _ = descs
    q_batch, q_head, q_col, k_batch, k_head, k_col, v_batch, v_head, v_col = planes
    qs, ks, vs, _, box = memory
    q_ready, q_free, k_ready, k_free, v_ready, v_free, t_ready, t_free = bars
    groups: gl.constexpr = c.BM // 64
    t = gl.program_id(0)
    done = 0
    ring = 0
    while t < total:
        tile, b, h, zb, q0, k0, stats, Sq, Sk = locate(t, tables, sizes, c.CAUSAL, c.PACKED)
        BLOCKS, last, n1, n2, count = key_list(tile, b, h, Sq, Sk, scalars[0], lists, c)
        # A tile that sees nothing takes one block, all of it masked.
        count = gl.maximum(count, 1)
        last = gl.maximum(last, 0)
        top, before, n2 = bits_list(bits[0], b * lists[3] + h * lists[4] + tile, n2, count, c)
        page = done & 1
        mbarrier.wait(t_free.index(page), ((done >> 1) & 1) ^ 1)
        post(box, page, (t, tile, b, h, zb * sizes[1] + q0, stats, Sq, Sk, last, n1, n2, count, top, before))
        mbarrier.arrive(t_ready.index(page))
        g = h // c.GROUP
        row = zb * q_batch + h * q_head + q0 + tile * c.BM
        slot = (done % c.QS) * groups
        for i in gl.static_range(groups):
            mbarrier.wait(q_free.index(slot + i), ((done // c.QS) & 1) ^ 1)
            mbarrier.expect(q_ready.index(slot + i), q_d.block_type.nbytes)
            tma.async_copy_global_to_shared(q_d, [row + 64 * i, h * q_col], q_ready.index(slot + i), qs.index(slot + i))
        kr = zb * k_batch + g * k_head + k0
        vr = zb * v_batch + g * v_head + k0
        # The next tile is fetched two blocks before this one's last: soon enough to hide the wait, and no sooner, since
        # what is promised early balances the load worse at the end.
        fetch = gl.maximum(count - 2, 0)
        mine = 0
        for n in range(0, count):
            if n == fetch:
                mine = gl.atomic_add(COUNTER, 1)
            at = visited(BLOCKS, last, n, count, c) * c.BN
            s = (ring + n) % c.ST
            phase = ((ring + n) // c.ST) & 1
            mbarrier.wait(k_free.index(s), phase ^ 1)
            mbarrier.expect(k_ready.index(s), k_d.block_type.nbytes)
            tma.async_copy_global_to_shared(k_d, [kr + at, g * k_col], k_ready.index(s), ks.index(s))
            mbarrier.wait(v_free.index(s), phase ^ 1)
            mbarrier.expect(v_ready.index(s), v_d.block_type.nbytes)
            tma.async_copy_global_to_shared(v_d, [vr + at, g * v_col], v_ready.index(s), vs.index(s))
        ring += count
        if mine == total - 1:
            # The last of all fetches: the counter is ready for the next launch.
            gl.store(COUNTER, 0)
        t = mine + gl.num_programs(0)
        done += 1
    page = done & 1
    mbarrier.wait(t_free.index(page), ((done >> 1) & 1) ^ 1)
    post(box, page, (t,))
    mbarrier.arrive(t_ready.index(page))


@gluon.jit
def halves(x, BN: gl.constexpr):
    """Even and odd columns: two neighbours share a register once they have 16 bits."""
    return x.reshape([64, BN // 2, 2]).split()


@gluon.jit
def pack(even, odd, BF16: gl.constexpr):
    """Two columns as 16-bit numbers in one word: what a loop carries as words stays in whole registers."""
    if BF16:
        return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [even, odd], dtype=gl.int32,
                                         is_pure=True, pack=1)  # fmt: skip
    else:
        return gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [even, odd], dtype=gl.int32,
                                         is_pure=True, pack=1)  # fmt: skip


@gluon.jit
def unpack(words, BF16: gl.constexpr, BN: gl.constexpr, LO: gl.constexpr):
    """The packed weights as wgmma's first operand."""
    if BF16:
        even, odd = gl.inline_asm_elementwise("mov.b32 {$0, $1}, $2;", "=h,=h,r", [words],
                                              dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=1)  # fmt: skip
    else:
        even, odd = gl.inline_asm_elementwise("mov.b32 {$0, $1}, $2;", "=h,=h,r", [words],
                                              dtype=(gl.float16, gl.float16), is_pure=True, pack=1)  # fmt: skip
    return gl.convert_layout(gl.join(even, odd).reshape([64, BN]), gl.DotOperandLayout(0, LO, 2))


@gluon.jit
def await_turn(W: gl.constexpr, c: gl.constexpr):
    """Wait until the warpgroup before this one has issued its products: one's exponentials then meet another's products."""
    if c.TURNS:
        at_barrier("bar.sync", W)


@gluon.jit
def pass_turn(W: gl.constexpr, c: gl.constexpr):
    if c.TURNS:
        at_barrier("bar.arrive", (W + 1) % (c.BM // 64))


@gluon.jit
def at_barrier(verb: gl.constexpr, W: gl.constexpr):
    """A hardware barrier (10, 11 or 12; Triton takes them from 0 on) of this warpgroup and one other, 256 threads."""
    x = gl.full([128], 0, gl.int32, gl.BlockedLayout([1], [32], [4], [0]))
    which: gl.constexpr = " 10" if W == 0 else " 11" if W == 1 else " 12"
    code: gl.constexpr = verb + which + ", 256; mov.b32 $0, $1;"
    gl.inline_asm_elementwise(code, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def faded(acc, fade, LO: gl.constexpr, c: gl.constexpr):
    """The sums so far, under the new maximum."""
    if c.BOUNDED:
        return acc
    else:
        return acc * gl.convert_layout(fade, gl.SliceLayout(1, LO))[:, None]


@gluon.jit
def times_values(acc, P, fade, values, LO: gl.constexpr, c: gl.constexpr):
    """Start the product of a block's weights with its values, on top of the sums so far; LATE: which fade only now,
    while the next block's scores are multiplied.
    """
    if c.LATE:
        acc = faded(acc, fade, LO, c)
    return warpgroup_mma(unpack(P, c.BF16, c.BN, LO), values, acc, is_async=True)


@gluon.jit
def clipped(S, rows, n0, Sk, off, w, L: gl.constexpr, c: gl.constexpr):
    """Scores of keys from n0 on, -inf outside each query's range.

    Columns are told apart as (eights, lanes, neighbours), so that all of a column's number but the lane's part is known
    when the kernel is compiled: one comparison a side and element.
    """
    x = S.reshape([64, c.BN // 8, 4, 2])
    X: gl.constexpr = x.type.layout
    eights = gl.arange(0, c.BN // 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, X))))
    lanes = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, X))))
    pair = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, X))))
    k = 8 * eights[None, :, None, None] + pair[None, None, None, :]
    at = gl.convert_layout(rows, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, X)))) + (off - n0)
    if c.CAUSAL:
        end = (at + 1)[:, None, None, None]
    elif c.WINDOW:
        end = gl.minimum(at + w, Sk - n0)[:, None, None, None]
    else:
        end = Sk - n0
    seen = k < end - 2 * lanes[None, None, :, None]
    if c.WINDOW:
        seen = seen & (k > (at - w)[:, None, None, None] - 2 * lanes[None, None, :, None])
    return gl.convert_layout(gl.where(seen, x, -float("inf")).reshape([64, c.BN]), L)


@gluon.jit
def exp2_by_both(x, factor, c: gl.constexpr):
    """2**(x * factor), all columns or six of eight on the FMA units, since the unit for special functions is busy with the
    scores' tanh: what was measured best at 128 and at 64. Which columns is known when the kernel is compiled.
    """
    polynomials: gl.constexpr = 8 if c.DV > 64 else 6
    eights = gl.arange(0, c.BN // 2, gl.SliceLayout(0, x.type.layout)) // 4
    return gl.where((eights * polynomials % 8 < polynomials)[None, :], exp2_polynomial(x, factor), gl.exp2(x * factor))


@gluon.jit
def fold(S, m, den, n0, rows, words, problem, MASKED: gl.constexpr, L: gl.constexpr, c: gl.constexpr):
    """One online-softmax step on a tile of raw scores: (weights, new maximum, new denominator, factor of the old)."""
    b, h, _, Sk, off, w, scale, cap, score_args, _ = problem
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
        if c.BITS:
            S = sifted(S, words)
        elif c.MASK is None:
            S = clipped(S, rows, n0, Sk, off, w, L, c)
        else:
            S = masked(S, rows[:, None], cols[None, :], rows, inside, problem, c)
    even, odd = halves(S, c.BN)
    if c.BOUNDED:
        # Capped scores are small enough for exponentials as they are.
        if MASKED:
            even = gl.exp2(even * factor)
            odd = gl.exp2(odd * factor)
        else:
            even = exp2_by_both(even, factor, c)
            odd = exp2_by_both(odd, factor, c)
        den = den + gl.sum(even + odd, 1)
        fade = den
    else:
        # `factor` is positive (the host sees to it), so it may follow the maximum.
        m_new = gl.maximum(m, gl.max(gl.maximum(even, odd), 1) * factor)
        top = m_new
        if MASKED or c.SCORE is not None:
            top = gl.where(m_new == -float("inf"), 0.0, m_new)
        even = gl.exp2(even * factor - top[:, None])
        odd = gl.exp2(odd * factor - top[:, None])
        fade = gl.exp2(m - top)
        den = den * fade + gl.sum(even + odd, 1)
        m = m_new
    return even, odd, m, den, fade


@gluon.jit
def step(
    acc, P, fade, m, den, qt, memory, bars, BLOCKS, WORDS, last, n, count, ring, rows, problem, MASKED: gl.constexpr,
    W: gl.constexpr, L: gl.constexpr, LO: gl.constexpr, c: gl.constexpr,
):  # fmt: skip
    """Block n's scores and softmax, while block n - 1's weights meet their values."""
    _, ks, vs, _, _ = memory
    _, q_free, k_ready, k_free, v_ready, v_free, _, _ = bars
    s = (ring + n) % c.ST
    t = (ring + n - 1) % c.ST
    words = 0
    if MASKED:
        words = bits_of(WORDS, n, W, c.BM, c.BN, L, c)
    mbarrier.wait(k_ready.index(s), ((ring + n) // c.ST) & 1)
    zero = gl.zeros([64, c.BN], gl.float32, L)
    await_turn(W, c)
    S = warpgroup_mma(qt, ks.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(t), ((ring + n - 1) // c.ST) & 1)
    acc = times_values(acc, P, fade, vs.index(t), LO, c)
    pass_turn(W, c)
    S = warpgroup_mma_wait(1, deps=[S])
    mbarrier.arrive(k_free.index(s))
    if c.QS == 1:
        mbarrier.arrive(q_free.index(W), pred=n == count - 1)
    n0 = visited(BLOCKS, last, n, count, c) * c.BN
    # A traced mask needs the registers of weights that are still being multiplied: they are waited for first.
    alone: gl.constexpr = MASKED and c.MASK is not None
    if alone:
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_free.index(t))
    even, odd, m, den, fade = fold(S, m, den, n0, rows, words, problem, MASKED, L, c)
    if not alone:
        # Packed after the product that still reads the last weights: then all weights can have the same registers.
        acc, even, odd = warpgroup_mma_wait(0, deps=[acc, even, odd])
        mbarrier.arrive(v_free.index(t))
    P = pack(even, odd, c.BF16)
    if not c.LATE:
        acc = faded(acc, fade, LO, c)
    return acc, P, fade, m, den


@gluon.jit
def send(o_d, out, row, column, stage, L: gl.constexpr):
    """Write a tile of the output by TMA, from shared memory that an earlier one may still be leaving."""
    tma.store_wait(0)
    gl.thread_barrier()
    stage.store(gl.convert_layout(out, L))
    fence_async_shared()
    tma.async_copy_shared_to_global(o_d, [row, column], stage)


@gluon.jit
def finish(acc, m, den, place, results, o_d, stage, LO: gl.constexpr, c: gl.constexpr):
    """Divide by the denominators and write 64 rows of the output and of lse."""
    OUT, LSE, SINKS, _COS, _SIN, o_stride = results
    row0, orow, h, stats, Sq = place
    RO: gl.constexpr = gl.SliceLayout(1, LO)
    LH: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
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
    out = (acc * gl.convert_layout(fade / whole, RO)[:, None]).to(OUT.dtype.element_ty)
    lse = gl.where(empty, -float("inf"), (top + gl.log2(whole)) * LN2)
    offsets = row0 + gl.arange(0, 64, RO)
    gl.store(LSE + stats + offsets, gl.convert_layout(lse, RO), mask=offsets < Sq)
    if row0 + 64 <= Sq:
        if c.DV == 256:
            left, right = out.reshape([64, 2, 128]).permute((0, 2, 1)).split()
            send(o_d, left, orow + row0, h * c.DV, stage, LH)
            send(o_d, right, orow + row0, h * c.DV + 128, stage, LH)
        else:
            send(o_d, out, orow + row0, h * c.DV, stage, LO)
    else:
        cols = gl.arange(0, c.DV, gl.SliceLayout(0, LO))
        to = OUT + (orow + offsets[:, None]).to(gl.int64) * o_stride + (h * c.DV + cols[None, :])
        gl.store(to, out, mask=(offsets < Sq)[:, None] & (cols >= 0)[None, :])


@gluon.jit
def close(acc, m, den, done, place, results, o_d, stage, free, LO: gl.constexpr, c: gl.constexpr):
    """After the last product of a tile, if there was one before: give its values back, and write its output."""
    mbarrier.arrive(free, pred=done > 0)
    if done > 0:
        finish(acc, m, den, place, results, o_d, stage, LO, c)


@gluon.jit
def consumer(task, results, W: gl.constexpr, c: gl.constexpr):
    """Queries [64 W, 64 W + 64) of each tile; a tile's first scores are computed with the last one's last product."""
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, c.BN, 16])
    LO: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, c.DV, 16])
    groups: gl.constexpr = c.BM // 64
    descs, _tables, lists, bits, _sizes, scalars, memory, bars, total = task
    o_d = descs[3]
    _OUT, _LSE, _SINKS, COS, SIN, _stride = results
    qs, ks, vs, outs, box = memory
    q_ready, q_free, k_ready, k_free, v_ready, v_free, t_ready, t_free = bars
    w, scale, cap, score_args, mask_args = scalars
    zero = gl.zeros([64, c.BN], gl.float32, L)
    even, odd = halves(zero, c.BN)
    R: gl.constexpr = gl.SliceLayout(1, even.type.layout)
    if W == c.BM // 64 - 1:
        pass_turn(W, c)
    done = 0
    ring = 0
    # Before the first tile: a product of zeros, whose result is dropped.
    m = gl.full([64], 0.0, gl.float32, R)
    den = m
    fade = m
    P = pack(even, odd, c.BF16)
    acc = gl.zeros([64, c.DV], gl.float32, LO)
    place = (0, 0, 0, 0, 0)
    mbarrier.wait(t_ready.index(0), 0)
    while posted(box, done & 1, 0) < total:
        page = done & 1
        tile = posted(box, page, 1)
        b = posted(box, page, 2)
        h = posted(box, page, 3)
        orow = posted(box, page, 4)
        stats = posted(box, page, 5)
        Sq = posted(box, page, 6)
        Sk = posted(box, page, 7)
        last = posted(box, page, 8)
        n1 = posted(box, page, 9)
        n2 = posted(box, page, 10)
        count = posted(box, page, 11)
        words = bits_of(bits[1], posted(box, page, 12), W, c.BM, c.BN, L, c)
        WORDS = bits[1]
        if c.BITS:
            WORDS += posted(box, page, 13) * (4 * c.BM)
        mbarrier.arrive(t_free.index(page))
        BLOCKS = lists[0]
        if c.LISTED:
            BLOCKS += (b * lists[3] + h * lists[4] + tile).to(gl.int64) * lists[5]
        problem = (b, h, Sq, Sk, Sk - Sq, w, scale, cap, score_args, mask_args)
        row0 = tile * c.BM + 64 * W
        rows = gl.minimum(row0 + gl.arange(0, 64, gl.SliceLayout(1, L)), Sq - 1)
        slot = (done % c.QS) * groups + W
        qt = qs.index(slot)
        u = (ring + c.ST - 1) % c.ST
        s = ring % c.ST
        mbarrier.wait(q_ready.index(slot), (done // c.QS) & 1)
        if c.ROPE:
            turn(qt, row0, Sq, Sk - Sq, COS, SIN, c)
        mbarrier.wait(k_ready.index(s), (ring // c.ST) & 1)
        await_turn(W, c)
        S = warpgroup_mma(qt, ks.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(v_ready.index(u), ((ring - 1) // c.ST) & 1, pred=done > 0)
        acc = times_values(acc, P, fade, vs.index(u), LO, c)
        pass_turn(W, c)
        S = warpgroup_mma_wait(1, deps=[S])
        if c.QS == 1:
            mbarrier.arrive(q_free.index(W), pred=count == 1)
        mbarrier.arrive(k_free.index(s))
        n0 = visited(BLOCKS, last, 0, count, c) * c.BN
        if c.MASK is not None:
            acc = warpgroup_mma_wait(0, deps=[acc])
            close(acc, m, den, done, place, results, o_d, outs.index(W), v_free.index(u), LO, c)
        m_first = gl.full([64], 0.0 if c.BOUNDED else -float("inf"), gl.float32, R)
        even, odd, m_first, den_first, _fade = fold(
            S, m_first, gl.zeros([64], gl.float32, R), n0, rows, words, problem, True, L, c
        )
        if c.MASK is None:
            acc, even, odd = warpgroup_mma_wait(0, deps=[acc, even, odd])
            close(acc, m, den, done, place, results, o_d, outs.index(W), v_free.index(u), LO, c)
        P = pack(even, odd, c.BF16)
        m = m_first
        den = den_first
        fade = den
        acc = gl.zeros([64, c.DV], gl.float32, LO)
        place = (row0, orow, h, stats, Sq)
        if not c.LISTED:
            for n in range(1, n1):
                acc, P, fade, m, den = step(acc, P, fade, m, den, qt, memory, bars, BLOCKS, WORDS, last, n, count, ring, rows,
                                            problem, True, W, L, LO, c)  # fmt: skip
        for n in range(gl.maximum(n1, 1), n2):
            acc, P, fade, m, den = step(acc, P, fade, m, den, qt, memory, bars, BLOCKS, WORDS, last, n, count, ring, rows,
                                        problem, False, W, L, LO, c)  # fmt: skip
        if c.WINDOW or c.LISTED:
            for n in range(gl.maximum(n2, 1), count):
                acc, P, fade, m, den = step(acc, P, fade, m, den, qt, memory, bars, BLOCKS, WORDS, last, n, count, ring, rows,
                                        problem, True, W, L, LO, c)  # fmt: skip
        ring += count
        if c.QS == 2:
            mbarrier.arrive(q_free.index(slot))
        done += 1
        mbarrier.wait(t_ready.index(done & 1), (done >> 1) & 1)
    u = (ring + c.ST - 1) % c.ST
    mbarrier.wait(v_ready.index(u), ((ring - 1) // c.ST) & 1)
    acc = times_values(acc, P, fade, vs.index(u), LO, c)
    acc = warpgroup_mma_wait(0, deps=[acc])
    finish(acc, m, den, place, results, o_d, outs.index(W), LO, c)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["Hq", "Sq", "Sk", "w", "tiles", "total"])
def forward(
    q_d, k_d, v_d, o_d, OUT, LSE, SINKS, COS, SIN, COUNTER, TILES, CU_Q, CU_K, BLOCKS, COUNTS, FULL, FIRST, WORDS, sbb, sbh, NB,
    q_batch, q_head, q_col, k_batch, k_head, k_col, v_batch, v_head, v_col, o_stride, Hq, Sq, Sk, w, scale, cap,
    score_args, mask_args, tiles, total, c: gl.constexpr,
):  # fmt: skip
    """Tiles of BM queries of one head each: this program's first, and then whichever the counter names.

    Tensors are planes of rows: token i of head h and batch entry b is row `b * batch + h * head + i` from column
    `h * col` on.
    """
    groups: gl.constexpr = c.BM // 64
    qs = gl.allocate_shared_memory(q_d.dtype, [c.QS * groups, 64, c.D], q_d.layout)
    ks = gl.allocate_shared_memory(k_d.dtype, [c.ST, c.BN, c.D], k_d.layout)
    vs = gl.allocate_shared_memory(v_d.dtype, [c.ST, c.BN, c.DV], v_d.layout)
    outs = gl.allocate_shared_memory(q_d.dtype, [groups, 64, 128 if c.DV == 256 else c.DV], o_d.layout)
    box = gl.allocate_shared_memory(gl.int32, [32, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = (
        barriers(c.QS * groups, 1), barriers(c.QS * groups, 1), barriers(c.ST, 1), barriers(c.ST, groups), barriers(c.ST, 1),
        barriers(c.ST, groups), barriers(2, 1), barriers(2, groups),
    )  # fmt: skip
    memory = (qs, ks, vs, outs, box)
    descs = (q_d, k_d, v_d, o_d)
    planes = (q_batch, q_head, q_col, k_batch, k_head, k_col, v_batch, v_head, v_col)
    tables = (TILES, CU_Q, CU_K)
    lists = (BLOCKS, COUNTS, FULL, sbb, sbh, NB)
    bits = (FIRST, WORDS)
    sizes = (Hq, Sq, Sk, tiles)
    scalars = (w, scale, cap, score_args, mask_args)
    task = (descs, tables, lists, bits, sizes, scalars, memory, bars, total)
    results = (OUT, LSE, SINKS, COS, SIN, o_stride)
    if groups == 2:
        gl.warp_specialize([
            (consumer, (task, results, 0, c)), (consumer, (task, results, 1, c)), (producer, (task, planes, COUNTER, c)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consumer, (task, results, 0, c)), (consumer, (task, results, 1, c)), (consumer, (task, results, 2, c)),
            (producer, (task, planes, COUNTER, c)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip
