# mypy: ignore-errors
# (Gluon's language, which Python's types do not describe.)
"""The sums of dQ in fp32 where dQ is made in the same pass as dK and dV: room for a few heads, not for all of them.

A unit is one key head of one batch entry, with its query heads. Programs start in the order of their units, so that few
units are summed at any time: unit u takes slot u % slots of a ring. Programs of unit u first round the sums of unit
u - lag, a share each, to the result, and clear them; that slot is then free for unit u - lag + slots. While they do so
their first tiles arrive. A program waits only for programs that started before it.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon


@gluon.jit
def settle():
    """Wait for this thread's adds by TMA, and order them with its other accesses, for every program to see."""
    lanes = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; fence.proxy.async; fence.acq_rel.gpu; mov.b32 $0, $1;", "=r,r", [lanes],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def count_up(mark):
    """Count a warpgroup that is done; what it wrote is seen by those who see the count."""
    settle()
    gl.thread_barrier()
    gl.atomic_add(mark, 1, sem="relaxed")


@gluon.jit
def enter(ring, W: gl.constexpr, c: gl.constexpr):
    """Before a warpgroup's first add: its own slot is free, and its share of an earlier unit is rounded and cleared."""
    SUMS, DQ, MARKS, unit, units, lag, slots, tile, tiles, Hkv, Sq, rows, scale = ring
    done = unit - lag
    summed = MARKS + gl.maximum(done, 0)
    cleared = MARKS + units + gl.maximum(unit - slots, 0)
    # Both are asked for at once: mostly both are long since complete.
    missing = (done >= 0) & (gl.load(summed, volatile=True) < 2 * tiles)
    taken = (unit >= slots) & (unit < units) & (gl.load(cleared, volatile=True) < 2 * tiles)
    while missing | taken:
        missing = (done >= 0) & (gl.load(summed, volatile=True) < 2 * tiles)
        taken = (unit >= slots) & (unit < units) & (gl.load(cleared, volatile=True) < 2 * tiles)
    settle()
    if done >= 0:
        lanes: gl.constexpr = min(c.D // 4, 32)
        B: gl.constexpr = gl.BlockedLayout([1, 4], [32 // lanes, lanes], [4, 1], [1, 0])
        cols = gl.arange(0, c.D, gl.SliceLayout(0, B))[None, :]
        share = gl.cdiv(Sq, 2 * tiles)
        first = (2 * tile + W) * share
        last = gl.minimum(first + share, Sq)
        for g in range(c.GROUP):
            h = done % Hkv * c.GROUP + g
            sums = SUMS + ((done % slots) * c.GROUP + g).to(gl.int64) * rows * c.D
            dq = DQ + ((done // Hkv).to(gl.int64) * Sq * Hkv * c.GROUP + h) * c.D
            for r in range(first, last, 64):
                at = r + gl.arange(0, 64, gl.SliceLayout(1, B))[:, None]
                inside = (at < last) & (cols >= 0)
                x = gl.load(sums + at * c.D + cols, mask=inside, other=0.0, cache_modifier=".cg")
                gl.store(sums + at * c.D + cols, gl.zeros([64, c.D], gl.float32, B), mask=inside)
                row = at.to(gl.int64) * (Hkv * c.GROUP * c.D)
                gl.store(dq + row + cols, (x * scale).to(DQ.dtype.element_ty), mask=inside)


@gluon.jit
def announce(ring):
    """Some time after `enter`, when its writes have arrived: the slot that it cleared is free."""
    MARKS, unit, units, lag = ring[2], ring[3], ring[4], ring[5]
    if unit >= lag:
        count_up(MARKS + units + unit - lag)


@gluon.jit
def leave(ring):
    """After a warpgroup's last add."""
    MARKS, unit, units = ring[2], ring[3], ring[4]
    if unit < units:
        count_up(MARKS + unit)
