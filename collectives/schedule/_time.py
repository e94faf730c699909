"""Seconds of a schedule under a latency-bandwidth model.

Mode "steps": a step lasts alpha plus the time of its busiest link. Mode "pipelined": links serve slices one at a time
in the schedule's own order; an op starts when its dependencies are complete, crosses its path cut-through, and
arrives alpha after its last byte left the slowest link.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import lcm
from typing import TYPE_CHECKING

from trainkit.collectives.schedule._units import bytes_per_second

if TYPE_CHECKING:
    from trainkit.collectives.schedule._form import Op, Schedule

Link = tuple[str, str]


def seconds(schedule: "Schedule", nbytes: Fraction, alpha: float | Fraction | None) -> Fraction:
    """See `Schedule.time`."""
    rate = bytes_per_second(schedule.unit)
    for op in schedule.ops:
        for link in _links(op):
            if link not in schedule.links:
                raise ValueError(f"op {op.id} uses {link[0]} -> {link[1]}, which has no capacity in this schedule")
    model = _stepped if schedule.mode == "steps" else _pipelined
    return model(schedule, nbytes / rate, alpha)


def link_loads(schedule: "Schedule", ops: "Sequence[Op] | None" = None) -> dict[Link, Fraction]:
    """What crosses each link, in fractions of M; a combining switch's copies and sums count once a link."""
    loads: dict[Link, Fraction] = defaultdict(Fraction)
    for op, link in _crossings(schedule, schedule.ops if ops is None else ops):
        loads[link] += op.stop - op.start
    return loads


def _links(op: "Op") -> Iterator[Link]:
    return zip(op.path, op.path[1:], strict=False)


def _crossings(schedule: "Schedule", ops: "Sequence[Op]") -> "Iterator[tuple[Op, Link]]":
    shared: set[tuple[Link, Fraction, Fraction, str]] = set()
    for op in ops:
        combined = not schedule.combining.isdisjoint(op.path)
        for link in _links(op):
            if combined:
                key = (link, op.start, op.stop, op.kind)
                if key in shared:
                    continue
                shared.add(key)
            yield op, link


def _delay(schedule: "Schedule", op: "Op", alpha: float | Fraction | None) -> Fraction:
    if op.kind == "copy":
        return Fraction(0)
    if alpha is not None:
        return Fraction(alpha)
    return sum((Fraction(schedule.latency.get(link, 0)) for link in _links(op)), Fraction(0))


def _stepped(schedule: "Schedule", message: Fraction, alpha: float | Fraction | None) -> Fraction:
    steps: dict[int, list[Op]] = defaultdict(list)
    for op in schedule.ops:
        steps[op.step].append(op)
    total = Fraction(0)
    for ops in steps.values():
        loads = link_loads(schedule, ops)
        busiest = max((load / Fraction(schedule.links[link]) for link, load in loads.items()), default=Fraction(0))
        total += max(_delay(schedule, op, alpha) for op in ops) + message * busiest
    return total


def _pipelined(schedule: "Schedule", message: Fraction, alpha: float | Fraction | None) -> Fraction:
    # Everything in whole ticks of one common denominator: integer sums, exact and quick.
    sizes = {op.stop - op.start for op in schedule.ops}
    delays = [_delay(schedule, op, alpha) for op in schedule.ops]
    piece = lcm(1, *(size.denominator for size in sizes))
    cost = {link: message / Fraction(capacity) / piece for link, capacity in schedule.links.items()}
    ticks = lcm(1, *(c.denominator for c in cost.values()), *(d.denominator for d in set(delays)))
    per_piece = {link: int(c * ticks) for link, c in cost.items()}
    pieces = {size: int(size * piece) for size in sizes}

    free: dict[Link, int] = defaultdict(int)
    ready = [0] * len(schedule.ops)
    crossing: dict[int, list[Link]] = defaultdict(list)
    for op, link in _crossings(schedule, schedule.ops):
        crossing[op.id].append(link)
    for op, delay in zip(schedule.ops, delays, strict=True):
        start = end = max((ready[other] for other in op.depends), default=0)
        length = pieces[op.stop - op.start]
        for link in crossing[op.id]:
            start = max(start, free[link])
            free[link] = start + length * per_piece[link]
            end = max(end, free[link])
        ready[op.id] = end + int(delay * ticks)
    return Fraction(max(ready, default=0), ticks)
