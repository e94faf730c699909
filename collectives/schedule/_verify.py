"""Replay of a schedule: every slice of every rank as the set of contributions that it holds."""

from bisect import bisect_left
from collections import defaultdict
from fractions import Fraction
from typing import TYPE_CHECKING

from trainkit.collectives.schedule._op import Op, ScheduleError

if TYPE_CHECKING:
    from trainkit.collectives.schedule._form import Schedule


def verify(schedule: "Schedule") -> None:
    """See `Schedule.verify`."""
    _check_paths(schedule)
    order = _issue_order(schedule)
    replay = _Replay(schedule)
    if schedule.mode == "steps":
        steps: dict[int, list[int]] = defaultdict(list)
        for op_id in order:
            steps[schedule.ops[op_id].step].append(op_id)
        for step in sorted(steps):
            replay.run_step([schedule.ops[op_id] for op_id in steps[step]])
    else:
        for op_id in order:
            replay.run(schedule.ops[op_id])
    replay.check_result()


def _check_paths(schedule: "Schedule") -> None:
    for op in schedule.ops:
        if op.kind == "copy":
            continue
        if len(op.path) < 2 or (op.path[0], op.path[-1]) != (schedule.ranks[op.src], schedule.ranks[op.dst]):
            raise ScheduleError(
                f"op {op.id} goes from {schedule.ranks[op.src]} to {schedule.ranks[op.dst]}, its path is {op.path}"
            )
        for link in zip(op.path, op.path[1:], strict=False):
            if schedule.links and link not in schedule.links:
                raise ScheduleError(f"op {op.id} uses {link[0]} -> {link[1]}, which is not a link")


def _issue_order(schedule: "Schedule") -> list[int]:
    """The order in which ops complete where each rank issues one op at a time and both ends must meet.

    The strictest executor: what finishes here finishes under any window, so no run can deadlock.
    """
    programs = [list(program) for program in schedule.order]
    expected: list[list[int]] = [[] for _ in schedule.ranks]
    for op in schedule.ops:
        for rank in {op.src, op.dst}:
            expected[rank].append(op.id)
    for rank, program in enumerate(programs):
        if sorted(program) != expected[rank]:
            raise ScheduleError(
                f"rank {rank}'s order must name each of its {len(expected[rank])} ops once, it has {len(program)}"
            )
    place = [0] * len(programs)
    done = [False] * len(schedule.ops)
    waiting_on: dict[int, list[int]] = defaultdict(list)
    order: list[int] = []
    ready = list(range(len(programs)))
    while ready:
        rank = ready.pop()
        while place[rank] < len(programs[rank]):
            op = schedule.ops[programs[rank][place[rank]]]
            missing = next((other for other in op.depends if not done[other]), None)
            if missing is not None:
                waiting_on[missing].append(rank)
                break
            peer = op.dst if rank == op.src else op.src
            if peer != rank:
                if place[peer] >= len(programs[peer]) or programs[peer][place[peer]] != op.id:
                    break
                place[peer] += 1
            place[rank] += 1
            done[op.id] = True
            order.append(op.id)
            ready.extend(waiting_on.pop(op.id, ()))
            if peer != rank:
                ready.append(peer)
    if len(order) < len(schedule.ops):
        stuck = [(rank, programs[rank][at]) for rank, at in enumerate(place) if at < len(programs[rank])]
        told = ", ".join(f"rank {rank} at op {op_id}" for rank, op_id in stuck[:4])
        raise ScheduleError(f"the ranks' orders wait for each other ({told}): one order common to all ranks cannot")
    return order


class _Replay:
    """Contributions of each rank to each atomic slice, as bit sets."""

    def __init__(self, schedule: "Schedule") -> None:
        self.schedule = schedule
        borders = {Fraction(0), Fraction(1)}
        for op in schedule.ops:
            borders |= {op.start, op.stop}
            if op.source is not None:
                borders |= {op.source, op.source + op.stop - op.start}
        for start, stop in schedule.shards:
            borders |= {start, stop}
        for op in schedule.ops:
            if op.source is not None:
                shift = op.start - op.source
                borders |= {b + shift for b in borders if op.source < b < op.source + op.stop - op.start}
                borders |= {b - shift for b in borders if op.start < b < op.stop}
        self.borders = sorted(borders)
        self.place = {border: at for at, border in enumerate(self.borders)}
        atoms, size = len(self.borders) - 1, len(schedule.ranks)
        self.all = (1 << size) - 1
        self.owner: list[int | None] = [schedule.root] * atoms
        for rank, (start, stop) in enumerate(schedule.shards):
            for atom in range(self.place[start], self.place[stop]):
                self.owner[atom] = rank
        gathers = schedule.collective in ("allgather", "broadcast")
        self.held = [
            [(1 << rank) if not gathers or owner == rank else 0 for owner in self.owner] for rank in range(size)
        ]
        # the ops that wrote what a rank holds of an atom: a pipelined reader must wait for each of them
        self.writers: list[list[tuple[int, ...]]] = [[()] * atoms for _ in range(size)]

    def _atoms(self, op: Op) -> list[tuple[int, int]]:
        target = range(self.place[op.start], self.place[op.stop])
        if op.source is None:
            return [(atom, atom) for atom in target]
        first = bisect_left(self.borders, op.source)
        return [(first + atom - target.start, atom) for atom in target]

    def run_step(self, ops: list[Op]) -> None:
        """All ops of one step: each reads what its sender held when the step began."""
        read = [(op, source, atom, self.held[op.src][source]) for op in ops for source, atom in self._atoms(op)]
        for op, source, atom, value in read:
            self._apply(op, source, atom, value)

    def run(self, op: Op) -> None:
        """One op of a pipelined schedule."""
        for source, atom in self._atoms(op):
            for writer in self.writers[op.src][source]:
                if writer not in op.depends:
                    self._fail(op, atom, f"does not wait for op {writer}, which writes what it sends")
            if op.kind == "send":
                self.writers[op.dst][atom] = (op.id,)
            else:
                self.writers[op.dst][atom] += (op.id,)
            self._apply(op, source, atom, self.held[op.src][source])

    def _apply(self, op: Op, source: int, atom: int, value: int) -> None:
        have = self.held[op.dst][atom]
        if value == 0:
            self._fail(op, source, f"sends what rank {op.src} does not hold")
        if op.kind == "reduce":
            if value & have:
                self._fail(op, atom, f"adds rank {(value & have).bit_length() - 1}'s contribution a second time")
            self.held[op.dst][atom] = have | value
        else:
            if have & ~value:
                self._fail(op, atom, f"overwrites rank {(have & ~value).bit_length() - 1}'s contribution")
            self.held[op.dst][atom] = value

    def _fail(self, op: Op, atom: int, what: str) -> None:
        piece = f"[{self.borders[atom]}, {self.borders[atom + 1]})"
        raise ScheduleError(f"op {op.id} ({op.kind} {op.src} -> {op.dst}, slice {piece}) {what}")

    def check_result(self) -> None:
        """What each rank must hold in the end."""
        kind = self.schedule.collective
        for rank, held in enumerate(self.held):
            for atom, value in enumerate(held):
                owner = self.owner[atom]
                if kind in ("allgather", "broadcast"):
                    want = 1 << owner if owner is not None else 0
                elif kind == "allreduce" or owner == rank:
                    want = self.all
                else:
                    continue
                if value != want:
                    missing = want & ~value
                    raise ScheduleError(
                        f"rank {rank} ends with a wrong slice [{self.borders[atom]}, {self.borders[atom + 1]}): "
                        + (
                            f"rank {missing.bit_length() - 1}'s contribution is missing"
                            if missing
                            else "it holds too much"
                        )
                    )
