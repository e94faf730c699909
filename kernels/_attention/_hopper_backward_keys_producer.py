# mypy: ignore-errors
# (Gluon's language, which Python's types do not describe.)
"""The producer warp of the backward pass by keys: it takes tiles, says where they lie, and fetches what they read."""

from typing import NamedTuple

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from trainkit.kernels._attention._hopper_dq_pool import Pool, acquire, occupied
from trainkit.kernels._attention._hopper_gradients import row_stats
from trainkit.kernels._attention._hopper_tiles import (
    Bits,
    Items,
    Lists,
    Paging,
    Sizes,
    block_at,
    expect_rows,
    key_rows,
    load_rows,
    post,
    query_blocks,
    row_of,
    rows_of,
    take,
)


class KeyMemory(NamedTuple):
    """Shared memory of the backward pass by keys; what is not wanted has another's in its place."""

    q: gl.tensor
    do: gl.tensor
    k: gl.tensor
    v: gl.tensor
    lse: gl.tensor
    delta: gl.tensor
    ds: gl.tensor
    dq: gl.tensor
    out: gl.tensor
    mailbox: gl.tensor


class KeyBarriers(NamedTuple):
    """Of each stage: that it is full, that it is free again."""

    kv_ready: gl.tensor
    kv_free: gl.tensor
    q_ready: gl.tensor
    q_free: gl.tensor
    do_ready: gl.tensor
    do_free: gl.tensor
    ds_ready: gl.tensor
    ds_free: gl.tensor
    mail_ready: gl.tensor
    mail_free: gl.tensor


class KeyTask(NamedTuple):
    """What all partitions of a program know."""

    q_d: gl.tensor
    k_d: gl.tensor
    v_d: gl.tensor
    do_d: gl.tensor
    dk_d: gl.tensor
    dv_d: gl.tensor
    dq_d: gl.tensor
    items: Items
    paging: Paging
    lists: Lists
    bits: Bits
    sizes: Sizes
    Hq: gl.tensor
    w: gl.tensor
    scale: gl.tensor
    cap: gl.tensor
    score_args: gl.tuple
    mask_args: gl.tuple
    memory: KeyMemory
    bars: KeyBarriers
    pool: Pool
    total: gl.tensor


class KeyVisit(NamedTuple):
    """What the producer warp says of a tile, by way of the mailbox."""

    number: gl.tensor
    """Of the work; from the total on there is none."""
    n0: gl.tensor
    b: gl.tensor
    kv_head: gl.tensor
    out_row: gl.tensor
    """Where the sequence begins in dK and dV."""
    dq_row: gl.tensor
    """Where it begins in the accumulators."""
    Sq: gl.tensor
    Sk: gl.tensor
    first: gl.tensor
    """Blocks: the first one, how many are masked at first, masked or full, and in all."""
    masked: gl.tensor
    masked_or_full: gl.tensor
    count: gl.tensor
    group: gl.tensor
    summed: gl.tensor
    """The group of the tile before, -1 for none."""
    place: gl.tensor
    """The tile's number in its group."""
    waits: gl.tensor
    """Whether the group's slot was still occupied."""


class Taken(NamedTuple):
    """A tile from the counter: its number, group, number in the group, and whether the group's slot is still occupied."""

    number: gl.tensor
    group: gl.tensor
    place: gl.tensor
    waits: gl.tensor


@gluon.jit
def next_tile(COUNTER, total, pool, c: gl.constexpr):
    """The next tile.

    Each program asks until there is none: the last of all answers leaves the counter ready for the next launch.
    """
    t = gl.atomic_add(COUNTER, 1, sem="relaxed")
    if t == total + gl.num_programs(0) - 1:
        gl.store(COUNTER, 0)
    group, place = place_of(t, pool.groups, pool.delay, pool.tiles)
    waits = 0
    if c.FUSED:
        waits = occupied(group, pool).to(gl.int32)
    return Taken(t, group, place, waits)


@gluon.jit
def place_of(t, groups, delay, tiles):
    """The group of tile t, and its number there.

    Of the last `delay` groups all first tiles come first, under a causal mask the longest: programs then end together. The
    rest of the order is that of the groups.
    """
    group = t // tiles
    number = t % tiles
    late = t - (groups - delay) * tiles
    if late >= 0:
        rest = late % (delay * tiles)
        group = groups + (late // (delay * tiles) - 1) * delay + rest % delay
        number = rest // delay
    return group, number


@gluon.jit
def keys_producer(task, views, stats, COUNTER, c: gl.constexpr):
    """Bring each tile's keys and values once, and each query head's blocks of queries and output gradients.

    Tiles are taken from a counter, the first one too: what is waited for in the pool was taken by a program that runs.
    """
    q_view, k_view, v_view, do_view = views
    LSE, DELTA = stats
    memory = task.memory
    bars = task.bars
    pool = task.pool
    lists = task.lists
    groups = pool.groups
    lanes = gl.arange(0, c.BM, gl.BlockedLayout([1], [32], [1], [0]))
    done = 0
    kept = 0
    base = 0
    summed = -1
    taken = next_tile(COUNTER, task.total, pool, c)
    t = taken.number
    while t < task.total:
        # Where dQ is summed, `delay` groups more have no keys: at their tiles the last heads' dQ is converted.
        group = taken.group
        live = (group < groups).to(gl.int32)
        work = take(gl.minimum(group, groups - 1) * pool.tiles + taken.place, task.items, task.sizes, False, c)
        Sk = work.Sk * live
        n0 = work.tile * 128
        h0 = work.head * c.GROUP
        first, n1, n2, count = 0, 0, 0, 0
        if not c.BLOCK_SPARSE:
            first, n1, n2, count = query_blocks(n0, 128, work.Sq, Sk - work.Sq, task.w, c)
            count *= live
            n1 = gl.minimum(n1, count)
            n2 = gl.minimum(n2, count)
            if c.FUSED:  # noqa: SIM102 (one is known when compiling, the other is not)
                # dQ sums over the tile's keys: those beyond the end must weigh nothing.
                if n0 + 128 > Sk:
                    n1 = count
                    n2 = count
        stage = done & 1
        mbarrier.wait(bars.mail_free.index(stage), ((done >> 1) & 1) ^ 1)
        dq_row = group % pool.slots * c.GROUP * pool.rows + work.q0
        if c.FUSED:
            acquire()
        visit = KeyVisit(
            t, n0, work.request, work.head, work.entry * task.sizes.Sk + work.k0, dq_row, work.Sq, Sk, first, n1, n2,
            count, group, summed, taken.place, taken.waits,
        )  # fmt: skip
        post(memory.mailbox, stage, visit)
        mbarrier.arrive(bars.mail_ready.index(stage))
        summed = gl.where(live > 0, group, -1)
        keys = key_rows(task.k_d, k_view, task.paging, work, work.head, c)
        values = key_rows(task.v_d, v_view, task.paging, work, work.head, c)
        mine = -1
        missing = live
        for j in range(c.GROUP):
            h = h0 + j
            blocks = lists.blocks
            if c.BLOCK_SPARSE:
                row = row_of(lists, work.request, h, work.tile)
                blocks = lists.blocks + row.to(gl.int64) * lists.width
                count = gl.load(lists.counts + row) * live
            here = (work.entry * task.Hq + h) * task.sizes.Sq + work.q0
            for i in range(0, count):
                at = block_at(blocks, first, i, 1, c.BLOCK_SPARSE) * c.BM
                lse, delta = row_stats(LSE + here, DELTA + here, at + lanes, work.Sq)
                n = base + i
                s = n % c.ST
                o = n % c.SO
                # Row statistics travel with their tiles: lse with q, delta with the output's gradient.
                mbarrier.wait(bars.q_free.index(s), ((n // c.ST) & 1) ^ 1)
                memory.lse.index(s).store(lse)
                mbarrier.arrive(bars.q_ready.index(s))
                queries = rows_of(task.q_d, q_view, work.entry, work.q0, h)
                expect_rows(bars.q_ready.index(s), queries, c.BM, queries, 0)
                load_rows(queries, at, 0, bars.q_ready.index(s), memory.q.index(s), c.BM, 0)
                # After the first block's queries, whose stage is free sooner.
                if missing > 0:
                    load_keys(keys, values, n0, Sk, memory, bars, kept, c)
                    missing = 0
                mbarrier.wait(bars.do_free.index(o), ((n // c.SO) & 1) ^ 1)
                memory.delta.index(o).store(delta)
                mbarrier.arrive(bars.do_ready.index(o))
                grads = rows_of(task.do_d, do_view, work.entry, work.q0, h)
                expect_rows(bars.do_ready.index(o), grads, c.BM, grads, 0)
                load_rows(grads, at, 0, bars.do_ready.index(o), memory.do.index(o), c.BM, 0)
                # Late, since what is promised early balances the load worse at the end.
                if (j == c.GROUP - 1) & (i == count - 2):
                    taken = next_tile(COUNTER, task.total, pool, c)
                    mine = taken.number
            base += count
        if missing > 0:
            load_keys(keys, values, n0, Sk, memory, bars, kept, c)
        if mine < 0:
            taken = next_tile(COUNTER, task.total, pool, c)
            mine = taken.number
        t = mine
        kept += live
        done += 1
    stage = done & 1
    mbarrier.wait(bars.mail_free.index(stage), ((done >> 1) & 1) ^ 1)
    post(memory.mailbox, stage, (t, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, summed))
    mbarrier.arrive(bars.mail_ready.index(stage))


@gluon.jit
def load_keys(keys, values, n0, Sk, memory, bars, kept, c: gl.constexpr):
    """Bring keys and values of the tile, of which there were `kept` before, once its last readers are done."""
    # The weights alone need no values: dV by itself leaves their memory to longer blocks.
    halves: gl.constexpr = 2 if c.VALUES else 0
    ready = bars.kv_ready.index(0)
    mbarrier.wait(bars.kv_free.index(0), (kept & 1) ^ 1)
    expect_rows(ready, keys, 128, values, 64 * halves)
    for j in gl.static_range(2):
        load_rows(keys, n0 + 64 * j, Sk, ready, memory.k.index(j), 64, c.PAGE)
    for j in gl.static_range(halves):
        load_rows(values, n0 + 64 * j, Sk, ready, memory.v.index(j), 64, c.PAGE)
