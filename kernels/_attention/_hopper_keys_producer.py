# mypy: ignore-errors
# (Gluon's language, which Python's types do not describe.)
"""The bringing warp of the backward pass by keys: it takes tiles, says where they lie, and fetches what they read."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from trainkit.kernels._attention._hopper_gradients import row_stats
from trainkit.kernels._attention._hopper_ring import acquire, occupied
from trainkit.kernels._attention._hopper_tiles import block_at, locate, post, query_blocks


@gluon.jit
def take(COUNTER, total, units, lag, tiles, ring, c: gl.constexpr):
    """The next tile: (number, unit, number in the unit, whether the unit's slot in the ring is still occupied).

    Each program asks until there is none: the last of all answers leaves the counter ready for the next launch.
    """
    t = gl.atomic_add(COUNTER, 1, sem="relaxed")
    if t == total + gl.num_programs(0) - 1:
        gl.store(COUNTER, 0)
    unit, number = place(t, units, lag, tiles)
    waits = 0
    if c.FUSED:
        waits = occupied(unit, ring).to(gl.int32)
    return t, unit, number, waits


@gluon.jit
def place(t, units, lag, tiles):
    """The unit of tile t, and its number there.

    Of the last `lag` units all first tiles come first, under a causal mask the longest: programs then end together. The
    rest of the order is that of the units.
    """
    unit = t // tiles
    number = t % tiles
    late = t - (units - lag) * tiles
    if late >= 0:
        rest = late % (lag * tiles)
        unit = units + (late // (lag * tiles) - 1) * lag + rest % lag
        number = rest // lag
    return unit, number


@gluon.jit
def keys_producer(task, planes, stats, COUNTER, ring, units, lag, slots, rows, c: gl.constexpr):
    """Bring each tile's keys and values once, and each query head's blocks of queries and output gradients.

    Tiles are taken from a counter, the first one too: what is waited for in the ring was taken by a program that runs.
    """
    descs, tables, lists, sizes, scalars, memory, bars, total = task
    q_d, k_d, v_d, do_d, _dk_d, _dv_d, _dq_d = descs
    BLOCKS, COUNTS, _FULL, sbb, sbh, NB = lists
    Hq, Hkv, total_q, total_k, tiles = sizes
    qs, dos, ks, vs, lses, deltas, _dss, _dqs, _outs, box = memory
    kv_ready, kv_free, q_ready, q_free, do_ready, do_free, _s_ready, _s_free, t_ready, t_free = bars
    q_batch, q_head, q_col, k_batch, k_head, k_col, v_batch, v_head, v_col, do_batch, do_head, do_col = planes
    LSE, DELTA = stats
    # The weights alone need no values: dV by itself leaves their room to longer blocks.
    values: gl.constexpr = 2 if c.VALUES else 0
    lanes = gl.arange(0, c.BM, gl.BlockedLayout([1], [32], [1], [0]))
    done = 0
    kept = 0
    base = 0
    summed = -1
    t, unit, number, waits = take(COUNTER, total, units, lag, tiles, ring, c)
    while t < total:
        # Where dQ is summed, `lag` units more have no keys: at their tiles the last heads' dQ is rounded.
        live = (unit < units).to(gl.int32)
        last = gl.minimum(unit, units - 1) * tiles + number
        tile, b, g, zb, q0, k0, _stats, Sq, Sk = locate(last, tables, (Hkv, total_q, total_k, tiles), False, c.PACKED)
        Sk *= live
        n0 = tile * 128
        h0 = g * c.GROUP
        first, n1, n2, count = 0, 0, 0, 0
        if not c.LISTED:
            first, n1, n2, count = query_blocks(
                n0, 128, c.BM, Sq, Sk - Sq, scalars[0], c.CAUSAL, c.WINDOW, c.MASK is not None
            )
            count *= live
            n1 = gl.minimum(n1, count)
            n2 = gl.minimum(n2, count)
            if c.FUSED:  # noqa: SIM102 (one is known when compiling, the other is not)
                # dQ sums over the tile's keys: those beyond the end must weigh nothing.
                if n0 + 128 > Sk:
                    n1 = count
                    n2 = count
        page = done & 1
        mbarrier.wait(t_free.index(page), ((done >> 1) & 1) ^ 1)
        dq_row = unit % slots * c.GROUP * rows + q0
        if c.FUSED:
            acquire()
        post(
            box, page,
            (t, n0, b, g, zb * total_k + k0, dq_row, Sq, Sk, first, n1, n2, count, unit, summed, number, waits),
        )  # fmt: skip
        mbarrier.arrive(t_ready.index(page))
        summed = gl.where(live > 0, unit, -1)
        key_at = (zb * k_batch + g * k_head + k0 + n0, g * k_col)
        value_at = (zb * v_batch + g * v_head + k0 + n0, g * v_col)
        mine = -1
        missing = live
        for j in range(c.GROUP):
            h = h0 + j
            blocks = BLOCKS
            if c.LISTED:
                row = b * sbb + h * sbh + tile
                blocks = BLOCKS + row.to(gl.int64) * NB
                count = gl.load(COUNTS + row) * live
            here = (zb * Hq + h) * total_q + q0
            for i in range(0, count):
                at = block_at(blocks, first, i, 1, c.LISTED) * c.BM
                lse, delta = row_stats(LSE + here, DELTA + here, at + lanes, Sq)
                n = base + i
                s = n % c.ST
                o = n % c.SO
                # Row statistics travel with their tiles: lse with q, delta with the output's gradient.
                mbarrier.wait(q_free.index(s), ((n // c.ST) & 1) ^ 1)
                lses.index(s).store(lse)
                mbarrier.arrive(q_ready.index(s))
                mbarrier.expect(q_ready.index(s), q_d.block_type.nbytes)
                q_row = zb * q_batch + h * q_head + q0 + at
                tma.async_copy_global_to_shared(q_d, [q_row, h * q_col], q_ready.index(s), qs.index(s))
                # After the first block's queries, whose room is free sooner.
                if missing > 0:
                    bring_keys(k_d, v_d, key_at, value_at, ks, vs, kv_ready, kv_free, kept, values)
                    missing = 0
                mbarrier.wait(do_free.index(o), ((n // c.SO) & 1) ^ 1)
                deltas.index(o).store(delta)
                mbarrier.arrive(do_ready.index(o))
                mbarrier.expect(do_ready.index(o), do_d.block_type.nbytes)
                do_row = zb * do_batch + h * do_head + q0 + at
                tma.async_copy_global_to_shared(do_d, [do_row, h * do_col], do_ready.index(o), dos.index(o))
                # Late, since what is promised early balances the load worse at the end.
                if (j == c.GROUP - 1) & (i == count - 2):
                    mine, unit, number, waits = take(COUNTER, total, units, lag, tiles, ring, c)
            base += count
        if missing > 0:
            bring_keys(k_d, v_d, key_at, value_at, ks, vs, kv_ready, kv_free, kept, values)
        if mine < 0:
            mine, unit, number, waits = take(COUNTER, total, units, lag, tiles, ring, c)
        kept += live
        t = mine
        done += 1
    page = done & 1
    mbarrier.wait(t_free.index(page), ((done >> 1) & 1) ^ 1)
    post(box, page, (t, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, summed))
    mbarrier.arrive(t_ready.index(page))


@gluon.jit
def bring_keys(k_d, v_d, key_at, value_at, ks, vs, ready, free, kept, values: gl.constexpr):
    """Keys and values of the tile, of which there were `kept` before, once its last readers are done."""
    mbarrier.wait(free.index(0), (kept & 1) ^ 1)
    mbarrier.expect(ready.index(0), 2 * k_d.block_type.nbytes + values * v_d.block_type.nbytes)
    for j in gl.static_range(2):
        tma.async_copy_global_to_shared(k_d, [key_at[0] + 64 * j, key_at[1]], ready.index(0), ks.index(j))
    for j in gl.static_range(values):
        tma.async_copy_global_to_shared(v_d, [value_at[0] + 64 * j, value_at[1]], ready.index(0), vs.index(j))
