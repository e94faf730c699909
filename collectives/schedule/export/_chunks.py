"""What both exporters share: a schedule on a grid of equal chunks, its limits, and the contributions a chunk holds."""

from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

from trainkit.collectives.schedule._form import Schedule
from trainkit.collectives.schedule._op import Op

# Every message must be a multiple of this many elements; more would be of no use to anybody.
MOST_CHUNKS = 2**14


class ExportError(ValueError):
    """A schedule that a runtime cannot take; the message names the limit."""


@dataclass(frozen=True)
class Grid:
    """A schedule's slices in whole chunks of M / count."""

    schedule: Schedule
    count: int
    """Chunks of the whole message."""

    def place(self, op: Op) -> tuple[int, int]:
        """(first chunk, number of chunks) of an op."""
        return int(op.start * self.count), int((op.stop - op.start) * self.count)

    @property
    def per_rank(self) -> int:
        """Chunks of one shard."""
        return self.count // len(self.schedule.ranks)


def grid(schedule: Schedule, runtime: str) -> Grid:
    """The coarsest grid that every slice lies on.

    Raises:
        ExportError: the runtime has no such collective, or wants equal shards.
    """
    size = len(schedule.ranks)
    if schedule.collective not in ("allgather", "reduce_scatter", "allreduce"):
        raise ExportError(f"{runtime} runs allgather, reduce_scatter and allreduce, not {schedule.collective}")
    if any(op.kind == "copy" for op in schedule.ops):
        raise ExportError(f"{runtime} export takes schedules of sends and reductions; this one has local copies")
    if schedule.shards and list(schedule.shards) != [(Fraction(r, size), Fraction(r + 1, size)) for r in range(size)]:
        raise ExportError(f"{runtime} needs equal shards in rank order")
    borders = {size if schedule.shards else 1}
    borders |= {border.denominator for op in schedule.ops for border in (op.start, op.stop)}
    count = lcm(*borders)
    if count > MOST_CHUNKS:
        raise ExportError(
            f"{runtime} export cuts a message into at most {MOST_CHUNKS} equal chunks, these slices need {count}"
        )
    return Grid(schedule, count)


def waits(schedule: Schedule) -> list[tuple[int, ...]]:
    """[ops] earlier ops that must be complete; for the barrier model, those that wrote or read the slice before."""
    if schedule.mode == "pipelined":
        return [op.depends for op in schedule.ops]
    touched: dict[int, list[Op]] = defaultdict(list)  # rank -> ops that wrote there
    read: dict[int, list[Op]] = defaultdict(list)
    result = []
    for op in schedule.ops:
        before = [other for other in touched[op.src] if other.step < op.step and _overlap(op, other)]
        before += [other for other in read[op.dst] if other.step < op.step and _overlap(op, other)]
        result.append(tuple(sorted({*op.depends, *(other.id for other in before)})))
        touched[op.dst].append(op)
        read[op.src].append(op)
    return result


def _overlap(one: Op, other: Op) -> bool:
    return one.start < other.stop and other.start < one.stop


class Buffers:
    """Replay of chunks as bit sets of contributions; every write is checked."""

    def __init__(self, collective: str, ranks: int, count: int) -> None:
        self.collective, self.ranks, self.count = collective, ranks, count
        per_rank = count // ranks if collective != "allreduce" else count
        self.owner = [chunk // per_rank for chunk in range(count)]
        gathers = collective == "allgather"
        self.held = [
            [(1 << rank) if not gathers or self.owner[chunk] == rank else 0 for chunk in range(count)]
            for rank in range(ranks)
        ]

    def store(self, rank: int, chunk: int, value: int) -> None:
        """Overwrite; nothing may be lost."""
        if value == 0 or self.held[rank][chunk] & ~value:
            raise ExportError(
                f"rank {rank}, chunk {chunk}: a write of {value:b} over {self.held[rank][chunk]:b} is wrong"
            )
        self.held[rank][chunk] = value

    def add(self, rank: int, chunk: int, value: int) -> None:
        """Add; nothing may be counted twice."""
        if value == 0 or self.held[rank][chunk] & value:
            raise ExportError(f"rank {rank}, chunk {chunk}: adding {value:b} to {self.held[rank][chunk]:b} is wrong")
        self.held[rank][chunk] |= value

    def check(self) -> None:
        """What the collective promises."""
        everybody = (1 << self.ranks) - 1
        for rank, chunks in enumerate(self.held):
            for chunk, value in enumerate(chunks):
                owner = self.owner[chunk]
                if self.collective == "reduce_scatter" and owner != rank:
                    continue
                want = 1 << owner if self.collective == "allgather" else everybody
                if value != want:
                    raise ExportError(f"rank {rank} ends with {value:b} in chunk {chunk}, not {want:b}")


class Races:
    """What happens before what: a read must come after the writes it sees, a write after all that touched the place."""

    def __init__(self) -> None:
        self.before: list[int] = []  # event -> bit set of the events before it
        self.writers: dict[object, int] = {}
        self.readers: dict[object, int] = {}

    def event(self, *after: int | None) -> int:
        """A new event after the given ones; its number."""
        past = 0
        for other in after:
            if other is not None:
                past |= self.before[other] | 1 << other
        self.before.append(past)
        return len(self.before) - 1

    def read(self, event: int, place: object) -> None:
        """Event `event` reads `place`."""
        if self.writers.get(place, 0) & ~(self.before[event] | 1 << event):
            raise ExportError(f"race: {place} (rank, buffer, chunk) may be read before it is written")
        self.readers[place] = self.readers.get(place, 0) | 1 << event

    def write(self, event: int, place: object) -> None:
        """Event `event` writes `place`."""
        touched = self.writers.get(place, 0) | self.readers.get(place, 0)
        if touched & ~(self.before[event] | 1 << event):
            raise ExportError(f"race: {place} (rank, buffer, chunk) may be written before it was read")
        self.writers[place], self.readers[place] = 1 << event, 0
