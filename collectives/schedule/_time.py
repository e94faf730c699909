"""Seconds of a schedule under a latency-bandwidth model.

Mode "steps": a step lasts alpha plus the time of its busiest link. Mode "pipelined" is played through as the executor
runs it: slices from one rank to another keep the schedule's order, the next one setting out when the one before has
reached its last link; apart from that an op starts when its dependencies are complete. It crosses its path cut-through
and arrives alpha after its last byte left the slowest link. Links serve slices one at a time as they come. A pair thus
has at most one slice waiting at a link, so that pairs which share it take turns, as TCP streams share it. Where a
connection holds more than a slice, the next ones set out as well, and what has to go on at once waits behind what does
not: small slices on slow links take longer for it.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from fractions import Fraction
from heapq import heappop, heappush
from math import lcm
from typing import TYPE_CHECKING, NamedTuple

from trainkit.collectives.schedule._units import bytes_per_second

if TYPE_CHECKING:
    from trainkit.collectives.schedule._form import Schedule
    from trainkit.collectives.schedule._op import Op

Link = tuple[str, str]
_LEFT, _COMPLETE = -1, -2  # events of an op beside the links of its way: it is on the last one, it has arrived


def seconds(schedule: "Schedule", nbytes: Fraction, alpha: float | Fraction | None, held: int) -> Fraction:
    """See `Schedule.time`."""
    rate = bytes_per_second(schedule.unit)
    for op in schedule.ops:
        for link in _links(op):
            if link not in schedule.links:
                raise ValueError(f"op {op.id} uses {link[0]} -> {link[1]}, which has no capacity in this schedule")
    if schedule.mode == "steps":
        return _stepped(schedule, nbytes / rate, alpha)
    slice_ = max((op.stop - op.start for op in schedule.ops), default=Fraction(1)) * nbytes
    return _pipelined(schedule, nbytes / rate, alpha, 1 + int(held / slice_) if held else 1)


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


def _pipelined(schedule: "Schedule", message: Fraction, alpha: float | Fraction | None, window: int) -> Fraction:
    # Everything in whole ticks of one common denominator: integer sums, exact and quick.
    sizes = {op.stop - op.start for op in schedule.ops}
    delays = [_delay(schedule, op, alpha) for op in schedule.ops]
    piece = lcm(1, *(size.denominator for size in sizes))
    cost = {link: message / Fraction(capacity) / piece for link, capacity in schedule.links.items()}
    ticks = lcm(1, *(c.denominator for c in cost.values()), *(d.denominator for d in set(delays)))
    per_piece = {link: int(c * ticks) for link, c in cost.items()}
    pieces = {size: int(size * piece) for size in sizes}

    crossing: dict[int, list[Link]] = defaultdict(list)
    for op, link in _crossings(schedule, schedule.ops):
        crossing[op.id].append(link)
    waits, after = _waits(schedule, window)
    free: dict[Link, int] = defaultdict(int)
    end = [0] * len(schedule.ops)
    last = 0
    events = [(0, op, 0) for op, count in enumerate(waits) if count == 0]  # (tick, op, link of its way that it is at)
    while events:
        now, at, place = heappop(events)
        ready: Sequence[int] = after[at].at_once if place == 0 else ()
        if place == _LEFT:
            ready = after[at].on_its_way
        elif place == _COMPLETE:
            ready = after[at].complete
        elif place < len(way := crossing[at]):
            length = pieces[schedule.ops[at].stop - schedule.ops[at].start] * per_piece[way[place]]
            start = max(now, free[way[place]])
            free[way[place]] = start + length
            end[at] = max(end[at], start + length)
            heappush(events, (start, at, place + 1))
        else:
            last = max(last, complete := max(end[at], now) + int(delays[at] * ticks))
            heappush(events, (complete, at, _COMPLETE))
            heappush(events, (now, at, _LEFT))
        for other in ready:
            waits[other] -= 1
            if waits[other] == 0:
                heappush(events, (now, other, 0))
    return Fraction(last, ticks)


class _Followers(NamedTuple):
    """Who waits for an op to set out, to have reached its last link, to be complete."""

    at_once: list[int]
    on_its_way: list[int]
    complete: list[int]


def _waits(schedule: "Schedule", window: int) -> tuple[list[int], list[_Followers]]:
    """[ops] how many events each op waits for, and who waits for its own; a pair has `window` slices on their way."""
    waits = [len(set(op.depends)) for op in schedule.ops]
    after = [_Followers([], [], []) for _ in schedule.ops]
    pairs: dict[tuple[int, int], list[int]] = defaultdict(list)
    for op in schedule.ops:
        for other in set(op.depends):
            after[other].complete.append(op.id)
        before = pairs[op.src, op.dst]
        if window > 1 and before:
            after[before[-1]].at_once.append(op.id)
            waits[op.id] += 1
        if len(before) >= window:
            after[before[-window]].on_its_way.append(op.id)
            waits[op.id] += 1
        before.append(op.id)
    return waits, after
