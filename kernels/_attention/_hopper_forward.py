# mypy: ignore-errors
# (Gluon's language, which Python's types do not describe.)
"""Forward on Hopper: one producer warp brings tiles by TMA, two or three warpgroups of 64 queries each multiply by wgmma.

The next block's QK^T is issued before this block's softmax, so that the tensor cores work while exponentials are taken
(Shah et al., FlashAttention-3, section 3.2); at head_dim 64 the warpgroups also take turns (section 3.1). Programs stay
and take their next tile from a counter; its first scores are computed beside the last tile's last product, and what
describes it comes from the producer warp through shared memory.
"""

from typing import NamedTuple

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from trainkit.kernels._attention._hopper_bits import bits_list, bits_of, visited
from trainkit.kernels._attention._hopper_rotary import apply_rotary
from trainkit.kernels._attention._hopper_softmax import fold, halves, pack, rescaled, unpack
from trainkit.kernels._attention._hopper_tiles import (
    LN2,
    LOG2E,
    Bits,
    Items,
    Lists,
    Paging,
    Problem,
    Sizes,
    barriers,
    clear_rows,
    expect_rows,
    key_list,
    key_rows,
    load_rows,
    post,
    posted,
    row_of,
    rows_of,
    take,
)


class Memory(NamedTuple):
    """Shared memory: stages of queries, keys and values, a warpgroup's output, and the mailbox."""

    q: gl.tensor
    k: gl.tensor
    v: gl.tensor
    out: gl.tensor
    mailbox: gl.tensor


class Barriers(NamedTuple):
    """Of each stage: that it is full, that it is free again."""

    q_ready: gl.tensor
    q_free: gl.tensor
    k_ready: gl.tensor
    k_free: gl.tensor
    v_ready: gl.tensor
    v_free: gl.tensor
    mail_ready: gl.tensor
    mail_free: gl.tensor


class Task(NamedTuple):
    """What all partitions of a program know."""

    q_d: gl.tensor
    k_d: gl.tensor
    v_d: gl.tensor
    o_d: gl.tensor
    items: Items
    lists: Lists
    bits: Bits
    sizes: Sizes
    w: gl.tensor
    scale: gl.tensor
    cap: gl.tensor
    score_args: gl.tuple
    mask_args: gl.tuple
    parts: gl.tuple
    """How far a part of the result lies from the one before: rows of the output, numbers of lse."""
    memory: Memory
    bars: Barriers
    total: gl.tensor


class Results(NamedTuple):
    """Where results go, and what the epilogue reads."""

    OUT: gl.tensor
    LSE: gl.tensor
    SINKS: gl.tensor
    stride: gl.tensor


class Visit(NamedTuple):
    """What the producer warp says of a tile, by way of the mailbox."""

    number: gl.tensor
    """Of the work; from the total on there is none."""
    tile: gl.tensor
    b: gl.tensor
    h: gl.tensor
    out_row: gl.tensor
    """Where the sequence begins in the output, and in lse."""
    stats: gl.tensor
    Sq: gl.tensor
    Sk: gl.tensor
    last: gl.tensor
    """Blocks: the last one, how many are masked at first, masked or full, and in all."""
    masked: gl.tensor
    masked_or_full: gl.tensor
    count: gl.tensor
    first_words: gl.tensor
    """Blocks of bits: of the first block visited, and before the others'."""
    words: gl.tensor
    part: gl.tensor


class Place(NamedTuple):
    """Where 64 rows of a result belong."""

    row0: gl.tensor
    out_row: gl.tensor
    h: gl.tensor
    stats: gl.tensor
    Sq: gl.tensor
    part: gl.tensor


class Softmax(NamedTuple):
    """The online softmax of 64 queries."""

    acc: gl.tensor
    """Weighted values, but for the last block's."""
    P: gl.tensor
    """The last block's weights, packed."""
    alpha: gl.tensor
    """What rescales acc under the new maximum."""
    m: gl.tensor
    row_sum: gl.tensor


@gluon.jit
def visit_of(mailbox, stage):
    return Visit(
        posted(mailbox, stage, 0), posted(mailbox, stage, 1), posted(mailbox, stage, 2), posted(mailbox, stage, 3),
        posted(mailbox, stage, 4), posted(mailbox, stage, 5), posted(mailbox, stage, 6), posted(mailbox, stage, 7),
        posted(mailbox, stage, 8), posted(mailbox, stage, 9), posted(mailbox, stage, 10), posted(mailbox, stage, 11),
        posted(mailbox, stage, 12), posted(mailbox, stage, 13), posted(mailbox, stage, 14),
    )  # fmt: skip


@gluon.jit
def producer(task, views, paging, COUNTER, c: gl.constexpr):
    """Bring each tile's queries, then its key and value blocks through ST stages each; fetch the next tile."""
    q_view, k_view, v_view = views
    memory = task.memory
    bars = task.bars
    groups: gl.constexpr = c.BM // 64
    t = gl.program_id(0)
    done = 0
    base = 0
    while t < task.total:
        work = take(t, task.items, task.sizes, c.CAUSAL, c)
        h = work.head
        blocks, last, n1, n2, count = key_list(work, task.w, task.lists, c)
        # A tile that sees nothing takes one block, all of it masked: of a part of the keys, one beyond them.
        last = gl.maximum(last, 0)
        if c.LISTED_WORK:
            last = gl.where((count == 0) & (work.start > 0), gl.cdiv(work.Sk, c.BN), last)
        count = gl.maximum(count, 1)
        top, before, n2 = bits_list(task.bits.first, row_of(task.lists, work.request, h, work.tile), n2, count, c)
        stage = done & 1
        mbarrier.wait(bars.mail_free.index(stage), ((done >> 1) & 1) ^ 1)
        out_row = work.entry * task.sizes.Sq + work.q0
        stats = work.stats
        if c.LISTED_WORK:
            out_row += work.part * task.parts[0]
            stats += work.part * task.parts[1]
        visit = Visit(
            t, work.tile, work.request, h, out_row, stats, work.Sq, work.Sk, last, n1, n2, count, top, before, work.part
        )  # fmt: skip
        post(memory.mailbox, stage, visit)
        mbarrier.arrive(bars.mail_ready.index(stage))
        queries = rows_of(task.q_d, q_view, work.entry, work.q0 + work.tile * c.BM, h)
        slot = (done % c.QS) * groups
        for i in gl.static_range(groups):
            mbarrier.wait(bars.q_free.index(slot + i), ((done // c.QS) & 1) ^ 1)
            expect_rows(bars.q_ready.index(slot + i), queries, 64, queries, 0)
            load_rows(queries, 64 * i, 0, bars.q_ready.index(slot + i), memory.q.index(slot + i), 64, 0)
        keys = key_rows(task.k_d, k_view, paging, work, h // c.GROUP, c)
        values = key_rows(task.v_d, v_view, paging, work, h // c.GROUP, c)
        # The next tile is fetched two blocks before this one's last: soon enough to hide the wait, and no sooner, since
        # what is promised early balances the load worse at the end.
        fetch = gl.maximum(count - 2, 0)
        mine = 0
        for n in range(0, count):
            if n == fetch:
                mine = gl.atomic_add(COUNTER, 1)
            at = visited(blocks, last, n, count, c) * c.BN
            s = (base + n) % c.ST
            phase = ((base + n) // c.ST) & 1
            mbarrier.wait(bars.k_free.index(s), phase ^ 1)
            expect_rows(bars.k_ready.index(s), keys, c.BN, keys, 0)
            load_rows(keys, at, work.Sk, bars.k_ready.index(s), memory.k.index(s), c.BN, c.PAGE)
            mbarrier.wait(bars.v_free.index(s), phase ^ 1)
            expect_rows(bars.v_ready.index(s), values, c.BN, values, 0)
            load_rows(values, at, work.Sk, bars.v_ready.index(s), memory.v.index(s), c.BN, c.PAGE)
        base += count
        if mine == task.total - 1:
            # The last of all fetches: the counter is ready for the next launch.
            gl.store(COUNTER, 0)
        t = mine + gl.num_programs(0)
        done += 1
    stage = done & 1
    mbarrier.wait(bars.mail_free.index(stage), ((done >> 1) & 1) ^ 1)
    post(memory.mailbox, stage, (t,))
    mbarrier.arrive(bars.mail_ready.index(stage))


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
def times_values(state, values, LO: gl.constexpr, c: gl.constexpr):
    """Start the product of a block's weights with its values, on top of the sums so far; LATE: which are rescaled only now,
    while the next block's scores are multiplied.
    """
    acc = state.acc
    if c.LATE:
        acc = rescaled(acc, state.alpha, LO, c)
    return warpgroup_mma(unpack(state.P, c.BF16, c.BN, LO), values, acc, is_async=True)


@gluon.jit
def step(
    state, qt, memory, bars, blocks, WORDS, last, n, count, base, rows, problem, MASKED: gl.constexpr, W: gl.constexpr,
    L: gl.constexpr, LO: gl.constexpr, c: gl.constexpr,
):  # fmt: skip
    """Block n's scores and softmax, while block n - 1's weights meet their values."""
    s = (base + n) % c.ST
    t = (base + n - 1) % c.ST
    words = 0
    if MASKED:
        words = bits_of(WORDS, n, W, c.BM, c.BN, L, c)
    mbarrier.wait(bars.k_ready.index(s), ((base + n) // c.ST) & 1)
    zero = gl.zeros([64, c.BN], gl.float32, L)
    await_turn(W, c)
    S = warpgroup_mma(qt, memory.k.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(bars.v_ready.index(t), ((base + n - 1) // c.ST) & 1)
    acc = times_values(state, memory.v.index(t), LO, c)
    pass_turn(W, c)
    S = warpgroup_mma_wait(1, deps=[S])
    mbarrier.arrive(bars.k_free.index(s))
    if c.QS == 1:
        mbarrier.arrive(bars.q_free.index(W), pred=n == count - 1)
    n0 = visited(blocks, last, n, count, c) * c.BN
    # A traced mask needs the registers of weights that are still being multiplied: they are waited for first.
    alone: gl.constexpr = MASKED and c.MASK is not None
    if alone:
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(bars.v_free.index(t))
    even, odd, m, row_sum, alpha = fold(S, state.m, state.row_sum, n0, rows, words, problem, MASKED, L, c)
    if not alone:
        # Packed after the product that still reads the last weights: then all weights can have the same registers.
        acc, even, odd = warpgroup_mma_wait(0, deps=[acc, even, odd])
        mbarrier.arrive(bars.v_free.index(t))
    P = pack(even, odd, c.BF16)
    if not c.LATE:
        acc = rescaled(acc, alpha, LO, c)
    return Softmax(acc, P, alpha, m, row_sum)


@gluon.jit
def send(o_d, out, row, column, stage, L: gl.constexpr):
    """Write a tile of the output by TMA, from shared memory that an earlier one may still be leaving."""
    tma.store_wait(0)
    gl.thread_barrier()
    stage.store(gl.convert_layout(out, L))
    fence_async_shared()
    tma.async_copy_shared_to_global(o_d, [row, column], stage)


@gluon.jit
def finish(acc, m, row_sum, place, results, o_d, stage, LO: gl.constexpr, c: gl.constexpr):
    """The epilogue: divide by the row sums and write 64 rows of the output and of lse, of all keys or of a part of them.

    A part is an output of its own, with the lse that merges it; the sink counts in the first.
    """
    OUT = results.OUT
    RO: gl.constexpr = gl.SliceLayout(1, LO)
    LH: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    # Not by the maximum, which passes over NaN: a NaN in the scores must come out.
    empty = row_sum == 0.0
    top = gl.where(empty, 0.0, m)
    total = gl.where(empty, 1.0, row_sum)
    alpha = gl.where(empty, 0.0, 1.0)
    if c.SINK:
        sink = gl.load(results.SINKS + place.h).to(gl.float32) * LOG2E
        if c.LISTED_WORK:
            sink = gl.where(place.part == 0, sink, -float("inf"))
        raised = gl.maximum(top, sink)
        alpha = alpha * gl.exp2(top - raised)
        total = gl.where(empty, 1.0, total * gl.exp2(top - raised) + gl.exp2(sink - raised))
        top = raised
    out = (acc * gl.convert_layout(alpha / total, RO)[:, None]).to(OUT.dtype.element_ty)
    lse = gl.where(empty, -float("inf"), (top + gl.log2(total)) * LN2)
    offsets = place.row0 + gl.arange(0, 64, RO)
    gl.store(results.LSE + place.stats + offsets, gl.convert_layout(lse, RO), mask=offsets < place.Sq)
    if place.row0 + 64 <= place.Sq:
        if c.DV == 256:
            left, right = out.reshape([64, 2, 128]).permute((0, 2, 1)).split()
            send(o_d, left, place.out_row + place.row0, place.h * c.DV, stage, LH)
            send(o_d, right, place.out_row + place.row0, place.h * c.DV + 128, stage, LH)
        else:
            send(o_d, out, place.out_row + place.row0, place.h * c.DV, stage, LO)
    else:
        cols = gl.arange(0, c.DV, gl.SliceLayout(0, LO))
        to = OUT + (place.out_row + offsets[:, None]).to(gl.int64) * results.stride + (place.h * c.DV + cols[None, :])
        gl.store(to, out, mask=(offsets < place.Sq)[:, None] & (cols >= 0)[None, :])


@gluon.jit
def close(acc, state, done, place, results, o_d, stage, free, LO: gl.constexpr, c: gl.constexpr):
    """After the last product of a tile, if there was one before: give its values back, and write its output."""
    mbarrier.arrive(free, pred=done > 0)
    if done > 0:
        finish(acc, state.m, state.row_sum, place, results, o_d, stage, LO, c)


@gluon.jit
def consumer(task, results, rotary, W: gl.constexpr, c: gl.constexpr):
    """Queries [64 W, 64 W + 64) of each tile; a tile's first scores are computed with the last one's last product."""
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, c.BN, 16])
    LO: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, c.DV, 16])
    groups: gl.constexpr = c.BM // 64
    COS, SIN = rotary
    memory = task.memory
    bars = task.bars
    zero = gl.zeros([64, c.BN], gl.float32, L)
    even, odd = halves(zero, c.BN)
    R: gl.constexpr = gl.SliceLayout(1, even.type.layout)
    if W == c.BM // 64 - 1:
        pass_turn(W, c)
    done = 0
    base = 0
    # Before the first tile: a product of zeros, whose result is dropped.
    m = gl.full([64], 0.0, gl.float32, R)
    state = Softmax(gl.zeros([64, c.DV], gl.float32, LO), pack(even, odd, c.BF16), m, m, m)
    place = Place(0, 0, 0, 0, 0, 0)
    mbarrier.wait(bars.mail_ready.index(0), 0)
    while posted(memory.mailbox, done & 1, 0) < task.total:
        stage = done & 1
        visit = visit_of(memory.mailbox, stage)
        last = visit.last
        count = visit.count
        words = bits_of(task.bits.words, visit.first_words, W, c.BM, c.BN, L, c)
        WORDS = task.bits.words
        if c.BITS:
            WORDS += visit.words * (4 * c.BM)
        mbarrier.arrive(bars.mail_free.index(stage))
        blocks = task.lists.blocks
        if c.BLOCK_SPARSE:
            blocks += row_of(task.lists, visit.b, visit.h, visit.tile).to(gl.int64) * task.lists.width
        problem = Problem(
            visit.b, visit.h, visit.Sq, visit.Sk, visit.Sk - visit.Sq, task.w, task.scale, task.cap, task.score_args,
            task.mask_args,
        )  # fmt: skip
        row0 = visit.tile * c.BM + 64 * W
        rows = gl.minimum(row0 + gl.arange(0, 64, gl.SliceLayout(1, L)), visit.Sq - 1)
        slot = (done % c.QS) * groups + W
        qt = memory.q.index(slot)
        u = (base + c.ST - 1) % c.ST
        s = base % c.ST
        mbarrier.wait(bars.q_ready.index(slot), (done // c.QS) & 1)
        if c.ROPE:
            apply_rotary(qt, row0, visit.Sq, problem.off, COS, SIN, c)
        mbarrier.wait(bars.k_ready.index(s), (base // c.ST) & 1)
        await_turn(W, c)
        S = warpgroup_mma(qt, memory.k.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(bars.v_ready.index(u), ((base - 1) // c.ST) & 1, pred=done > 0)
        acc = times_values(state, memory.v.index(u), LO, c)
        pass_turn(W, c)
        S = warpgroup_mma_wait(1, deps=[S])
        if c.QS == 1:
            mbarrier.arrive(bars.q_free.index(W), pred=count == 1)
        mbarrier.arrive(bars.k_free.index(s))
        n0 = visited(blocks, last, 0, count, c) * c.BN
        if c.MASK is not None:
            acc = warpgroup_mma_wait(0, deps=[acc])
            close(acc, state, done, place, results, task.o_d, memory.out.index(W), bars.v_free.index(u), LO, c)
        m = gl.full([64], 0.0 if c.BOUNDED else -float("inf"), gl.float32, R)
        even, odd, m, row_sum, _alpha = fold(
            S, m, gl.zeros([64], gl.float32, R), n0, rows, words, problem, True, L, c
        )  # fmt: skip
        if c.PAGE:
            # The first block visited holds the last key.
            mbarrier.wait(bars.v_ready.index(s), (base // c.ST) & 1)
            clear_rows(memory.v.index(s), visit.Sk - n0, c.BN, c.DV)
        if c.MASK is None:
            acc, even, odd = warpgroup_mma_wait(0, deps=[acc, even, odd])
            close(acc, state, done, place, results, task.o_d, memory.out.index(W), bars.v_free.index(u), LO, c)
        state = Softmax(gl.zeros([64, c.DV], gl.float32, LO), pack(even, odd, c.BF16), row_sum, m, row_sum)
        place = Place(row0, visit.out_row, visit.h, visit.stats, visit.Sq, visit.part if c.LISTED_WORK else 0)
        if not c.BLOCK_SPARSE:
            for n in range(1, visit.masked):
                state = step(
                    state, qt, memory, bars, blocks, WORDS, last, n, count, base, rows, problem, True, W, L, LO, c
                )
        for n in range(gl.maximum(visit.masked, 1), visit.masked_or_full):
            state = step(
                state, qt, memory, bars, blocks, WORDS, last, n, count, base, rows, problem, False, W, L, LO, c
            )
        if c.WINDOW or c.BLOCK_SPARSE:
            for n in range(gl.maximum(visit.masked_or_full, 1), count):
                state = step(
                    state, qt, memory, bars, blocks, WORDS, last, n, count, base, rows, problem, True, W, L, LO, c
                )
        base += count
        if c.QS == 2:
            mbarrier.arrive(bars.q_free.index(slot))
        done += 1
        mbarrier.wait(bars.mail_ready.index(done & 1), (done >> 1) & 1)
    u = (base + c.ST - 1) % c.ST
    mbarrier.wait(bars.v_ready.index(u), ((base - 1) // c.ST) & 1)
    acc = warpgroup_mma_wait(0, deps=[times_values(state, memory.v.index(u), LO, c)])
    finish(acc, state.m, state.row_sum, place, results, task.o_d, memory.out.index(W), LO, c)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["Hq", "Sq", "Sk", "w", "tiles", "total", "out_part", "lse_part"])
def forward(
    q_d, k_d, v_d, o_d, OUT, LSE, SINKS, COS, SIN, COUNTER, ITEMS, CU_Q, CU_K, BLOCKS, COUNTS, FULL, FIRST, WORDS, INDPTR, PAGES,
    list_strides, views, o_stride, out_part, lse_part, Hq, Sq, Sk, w, scale, cap, score_args, mask_args, tiles, total,
    c: gl.constexpr,
):  # fmt: skip
    """Tiles of BM queries of one head each: this program's first, and then whichever the counter names.

    Tensors are matrices of rows, `views` says where those of a head lie: see `_hopper_tiles.rows_of`. Part i of a result
    lies `i * out_part` rows and `i * lse_part` numbers further.
    """
    groups: gl.constexpr = c.BM // 64
    memory = Memory(
        gl.allocate_shared_memory(q_d.dtype, [c.QS * groups, 64, c.D], q_d.layout),
        gl.allocate_shared_memory(k_d.dtype, [c.ST, c.BN, c.D], k_d.layout),
        gl.allocate_shared_memory(v_d.dtype, [c.ST, c.BN, c.DV], v_d.layout),
        gl.allocate_shared_memory(q_d.dtype, [groups, 64, 128 if c.DV == 256 else c.DV], o_d.layout),
        gl.allocate_shared_memory(gl.int32, [32, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
    )
    bars = Barriers(
        barriers(c.QS * groups, 1), barriers(c.QS * groups, 1), barriers(c.ST, 1), barriers(c.ST, groups), barriers(c.ST, 1),
        barriers(c.ST, groups), barriers(2, 1), barriers(2, groups),
    )  # fmt: skip
    stride_b, stride_h, width = list_strides
    task = Task(
        q_d, k_d, v_d, o_d, Items(ITEMS, CU_Q, CU_K), Lists(BLOCKS, COUNTS, FULL, stride_b, stride_h, width),
        Bits(FIRST, WORDS), Sizes(Hq, Sq, Sk, tiles), w, scale, cap, score_args, mask_args, (out_part, lse_part), memory, bars,
        total,
    )  # fmt: skip
    results = Results(OUT, LSE, SINKS, o_stride)
    rotary = (COS, SIN)
    paging = Paging(INDPTR, PAGES)
    if groups == 2:
        gl.warp_specialize([
            (consumer, (task, results, rotary, 0, c)), (consumer, (task, results, rotary, 1, c)),
            (producer, (task, views, paging, COUNTER, c)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consumer, (task, results, rotary, 0, c)), (consumer, (task, results, rotary, 1, c)),
            (consumer, (task, results, rotary, 2, c)), (producer, (task, views, paging, COUNTER, c)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip
