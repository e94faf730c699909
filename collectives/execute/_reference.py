"""The obvious executor: every rank's buffer in one place, one operation after the other."""

from collections.abc import Sequence
from itertools import groupby

import torch

from trainkit.collectives.execute._program import cut
from trainkit.collectives.schedule import Op, Schedule


def run_reference(schedule: Schedule, buffers: Sequence[torch.Tensor]) -> None:
    """Run a schedule in place on all ranks' buffers: the definition that the executors are held to, bit for bit.

    Args:
        schedule: what to run.
        buffers: rank -> [elements] the whole message as that rank holds it, all of one size and dtype.

    Example:
        >>> from trainkit.collectives import Topology, ring_schedule
        >>> pair = Topology("pair", list("ab"), list("ab"), [("a", "b", 1), ("b", "a", 1)])
        >>> buffers = [torch.tensor([1, 2, 3]), torch.tensor([10, 20, 30])]
        >>> run_reference(ring_schedule(pair), buffers)
        >>> buffers[0].tolist(), buffers[1].tolist()
        ([11, 22, 33], [11, 22, 33])
    """

    def piece(rank: int, start: object, stop: object) -> torch.Tensor:
        flat = buffers[rank].view(-1)
        ends = [cut(f.numerator, f.denominator, flat.numel()) for f in (start, stop)]  # type: ignore[attr-defined]
        return flat[ends[0] : ends[1]]

    def apply(op: Op, value: torch.Tensor) -> None:
        target = piece(op.dst, op.start, op.stop)
        target.add_(value) if op.kind == "reduce" else target.copy_(value)

    def read(op: Op) -> torch.Tensor:
        start = op.start if op.source is None else op.source
        return piece(op.src, start, start + op.stop - op.start).clone()

    if schedule.mode == "pipelined":
        for op in schedule.ops:
            apply(op, read(op))
        return
    for _, step in groupby(sorted(schedule.ops, key=lambda op: (op.step, op.id)), key=lambda op: op.step):
        for op, value in [(op, read(op)) for op in step]:
            apply(op, value)
