# mypy: ignore-errors
# (Gluon's language, which Python's types do not describe.)
"""The fp32 accumulators of dQ where dQ is made in the same pass as dK and dV: a pool for a few heads, not for all of them.

A group is one key head of one batch entry, with its query heads. Tiles are taken in the order of their groups, so that few
groups are summed at any time: group g takes slot g % slots of the pool. At each tile of group g a share of group g - delay
is converted to the result and cleared, by warps of their own beside those that multiply; when all of it is, that slot is
free for group g - delay + slots. A tile waits only for tiles that were taken before it.
"""

from typing import NamedTuple

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from trainkit.kernels._attention._hopper_tiles import posted


class Pool(NamedTuple):
    """The accumulators, whose rows are queries: GROUP heads of `rows` rows a slot."""

    SUMS: gl.tensor
    DQ: gl.tensor
    MARKS: gl.tensor
    """Of each group how many warpgroups have added to it, and how many shares of it have been cleared."""
    groups: gl.tensor
    delay: gl.tensor
    slots: gl.tensor
    tiles: gl.tensor
    """A group's."""
    Hkv: gl.tensor
    Sq: gl.tensor
    rows: gl.tensor
    scale: gl.tensor


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
def occupied(group, pool):
    """Whether the group's slot still holds what an earlier group left there."""
    earlier = gl.minimum(gl.maximum(group - pool.slots, 0), pool.groups - 1)
    cleared = gl.load(pool.MARKS + pool.groups + earlier, volatile=True)
    return (group >= pool.slots) & (group < pool.groups) & (cleared < pool.tiles)


@gluon.jit
def leave(summed, pool):
    """A warpgroup's adds to group `summed`, if any, are complete: they are counted."""
    settle(4)
    if summed >= 0:
        count(pool.MARKS + summed)


@gluon.jit
def await_slot(group, pool):
    """Wait until the group's slot is free, which mostly it long is."""
    while occupied(group, pool):
        pass
    settle(4)


@gluon.jit
def convert_dq(
    sums_d, sums, arrived, mailbox, mail_ready, mail_free, total, pool, warps: gl.constexpr, c: gl.constexpr
):
    """At each tile, convert and clear its share of the group `delay` before, once all of that has been summed.

    The sums come by TMA, so that few registers do.
    """
    DQ, MARKS, slots, tiles, Hkv, Sq, rows = pool.DQ, pool.MARKS, pool.slots, pool.tiles, pool.Hkv, pool.Sq, pool.rows
    B: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [warps, 1], [1, 0])
    cols = gl.arange(0, 64, gl.SliceLayout(0, B))[None, :]
    lines = gl.arange(0, 8, gl.SliceLayout(1, B))[:, None]
    pitch = Hkv * c.GROUP * c.D
    share = gl.cdiv(Sq, tiles)
    visits = 0
    loads = 0
    mbarrier.wait(mail_ready.index(0), 0)
    while posted(mailbox, visits & 1, 0, warps) < total:
        done = posted(mailbox, visits & 1, 12, warps) - pool.delay
        first = posted(mailbox, visits & 1, 14, warps) * share
        mbarrier.arrive(mail_free.index(visits & 1))
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
                        mbarrier.wait(arrived.index(0), loads & 1)
                        loads += 1
                        summed = pool.SUMS + (slot_row + r + lines).to(gl.int64) * c.D + (j + cols)
                        to = dq + (r + lines).to(gl.int64) * pitch + (j + cols)
                        for i in gl.static_range(8):
                            inside = (lines < last - r - 8 * i) & (cols >= 0)
                            x = sums.index(0).slice(8 * i, 8, 0).load(B) * pool.scale
                            gl.store(summed + 8 * i * c.D, gl.zeros([8, 64], gl.float32, B), mask=inside)
                            gl.store(to, x.to(DQ.dtype.element_ty), mask=inside)
                            to += 8 * pitch
            settle(warps)
            count(MARKS + pool.groups + done)
        visits += 1
        mbarrier.wait(mail_ready.index(visits & 1), (visits >> 1) & 1)
