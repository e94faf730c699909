"""All-reduce as reduce-scatter followed by all-gather, slice by slice."""

from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from math import lcm

from trainkit.collectives.schedule._form import Schedule
from trainkit.collectives.schedule._op import Op


def compose(reduce_scatter: Schedule, allgather: Schedule, name: str | None = None) -> Schedule:
    """One all-reduce out of its two halves.

    Pipelined halves overlap: an all-gather op waits only for what writes its own slice. Steps run one half after the
    other.

    Args:
        reduce_scatter: leaves every rank its shard, summed.
        allgather: takes the same shards from the same ranks to everybody.
        name: of the result.

    Raises:
        ValueError: the halves differ in ranks, shards or mode.
    """
    for what in ("ranks", "mode"):
        if getattr(reduce_scatter, what) != getattr(allgather, what):
            raise ValueError(
                f"both halves need the same {what}: {getattr(reduce_scatter, what)} and {getattr(allgather, what)}"
            )
    if list(reduce_scatter.shards) != list(allgather.shards):
        raise ValueError("both halves need the same shards")
    shift, steps = len(reduce_scatter.ops), reduce_scatter.steps
    ops = list(reduce_scatter.ops)
    writers = _Writers(ops, allgather.ops)
    for op in allgather.ops:
        depends = tuple(other + shift for other in op.depends)
        if allgather.mode == "pipelined" and not depends:
            depends = writers.of(op.src, op.start, op.stop)
        ops.append(op._replace(id=op.id + shift, depends=depends, step=op.step + steps))
    return Schedule(
        name=name or f"{reduce_scatter.name} + {allgather.name}",
        collective="allreduce",
        ranks=allgather.ranks,
        ops=ops,
        mode=allgather.mode,
        links={**reduce_scatter.links, **allgather.links},
        unit=allgather.unit,
        latency={**reduce_scatter.latency, **allgather.latency},
        combining=reduce_scatter.combining | allgather.combining,
    )


class _Writers:
    """Which of `ops` write a slice on a rank, for the slices of `readers`; borders are whole ticks, which compare quickly."""

    def __init__(self, ops: Sequence[Op], readers: Sequence[Op]) -> None:
        borders = {border for op in (*ops, *readers) for border in (op.start, op.stop)}
        ticks = lcm(1, *(border.denominator for border in borders))
        self._tick = {border: int(border * ticks) for border in borders}
        self._by_rank: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for op in ops:
            self._by_rank[op.dst].append((self._tick[op.start], self._tick[op.stop], op.id))

    def of(self, rank: int, start: Fraction, stop: Fraction) -> tuple[int, ...]:
        first, last = self._tick[start], self._tick[stop]
        return tuple(number for begin, end, number in self._by_rank[rank] if begin < last and first < end)
