# mypy: ignore-errors
# (Gluon's language, which Python's types do not describe.)
"""The sums of dQ in fp32 where dQ is made in the same pass as dK and dV: room for a few heads, not for all of them.

A unit is one key head of one batch entry, with its query heads. Tiles are taken in the order of their units, so that few
units are summed at any time: unit u takes slot u % slots of a ring. At each tile of unit u a share of unit u - lag is
rounded to the result and cleared, by warps of their own beside those that multiply; when all of it is, that slot is free
for unit u - lag + slots. A tile waits only for tiles that were taken before it.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from trainkit.kernels._attention._hopper_tiles import posted


@gluon.jit
def settle(warps: gl.constexpr):
    """Wait for this thread's adds by TMA, and order them with its other accesses, for every program to see."""
    lanes = gl.arange(0, 32 * warps, gl.BlockedLayout([1], [32], [warps], [0]))
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; fence.proxy.async; fence.acq_rel.gpu; mov.b32 $0, $1;", "=r,r", [lanes],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def acquire():
    """What others wrote before the marks that this warp has read is there for what comes after."""
    lanes = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    gl.inline_asm_elementwise(
        "fence.acq_rel.gpu; mov.b32 $0, $1;", "=r,r", [lanes], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def count(mark):
    """Count a partition that has settled; what it wrote is seen by those who see the count."""
    gl.thread_barrier()
    gl.atomic_add(mark, 1, sem="relaxed")


@gluon.jit
def occupied(unit, ring):
    """Whether the unit's slot still holds what an earlier unit left there."""
    MARKS, units, slots, tiles = ring[2], ring[3], ring[5], ring[6]
    earlier = gl.minimum(gl.maximum(unit - slots, 0), units - 1)
    cleared = gl.load(MARKS + units + earlier, volatile=True)
    return (unit >= slots) & (unit < units) & (cleared < tiles)


@gluon.jit
def leave(summed, ring):
    """A warpgroup's adds to unit `summed`, if any, are complete: they are counted."""
    settle(4)
    if summed >= 0:
        count(ring[2] + summed)


@gluon.jit
def await_place(unit, ring):
    """Wait until the unit's slot is free, which mostly it long is."""
    while occupied(unit, ring):
        pass
    settle(4)


@gluon.jit
def rounder(sums_d, sums, arrived, box, t_ready, t_free, total, ring, warps: gl.constexpr, c: gl.constexpr):
    """At each tile, round and clear its share of the unit `lag` before, once all of that has been summed.

    The sums come by TMA, so that few registers do.
    """
    SUMS, DQ, MARKS, units, lag, slots, tiles, Hkv, Sq, rows, scale = ring
    B: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [warps, 1], [1, 0])
    cols = gl.arange(0, 64, gl.SliceLayout(0, B))[None, :]
    lines = gl.arange(0, 8, gl.SliceLayout(1, B))[:, None]
    pitch = Hkv * c.GROUP * c.D
    share = gl.cdiv(Sq, tiles)
    turn = 0
    boxes = 0
    mbarrier.wait(t_ready.index(0), 0)
    while posted(box, turn & 1, 0, warps) < total:
        done = posted(box, turn & 1, 12, warps) - lag
        first = posted(box, turn & 1, 14, warps) * share
        mbarrier.arrive(t_free.index(turn & 1))
        if done >= 0:
            while gl.load(MARKS + done, volatile=True) < 2 * tiles:
                pass
            settle(warps)
            last = gl.minimum(first + share, Sq)
            for g in range(c.GROUP):
                slot_row = (done % slots * c.GROUP + g) * rows
                dq = DQ + ((done // Hkv).to(gl.int64) * Sq * Hkv * c.GROUP + done % Hkv * c.GROUP + g) * c.D
                for r in range(first, last, 64):
                    for j in range(0, c.D, 64):
                        gl.thread_barrier()
                        mbarrier.expect(arrived.index(0), sums_d.block_type.nbytes)
                        tma.async_copy_global_to_shared(sums_d, [slot_row + r, j], arrived.index(0), sums.index(0))
                        mbarrier.wait(arrived.index(0), boxes & 1)
                        boxes += 1
                        summed = SUMS + (slot_row + r + lines).to(gl.int64) * c.D + (j + cols)
                        to = dq + (r + lines).to(gl.int64) * pitch + (j + cols)
                        for i in gl.static_range(8):
                            inside = (lines < last - r - 8 * i) & (cols >= 0)
                            x = sums.index(0).slice(8 * i, 8, 0).load(B) * scale
                            gl.store(summed + 8 * i * c.D, gl.zeros([8, 64], gl.float32, B), mask=inside)
                            gl.store(to, x.to(DQ.dtype.element_ty), mask=inside)
                            to += 8 * pitch
            settle(warps)
            count(MARKS + units + done)
        turn += 1
        mbarrier.wait(t_ready.index(turn & 1), (turn >> 1) & 1)
