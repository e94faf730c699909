"""A schedule compiled for one rank: arrays of operations, and which wait for which.

The order in which everything is described is one that a single thread could run: by id, and in mode "steps" step by
step with what a step reads before what it writes. A rank keeps to it wherever two of its operations touch the same
bytes and one of them writes. Hence sums are always formed in the same order, and no run can deadlock: of all
operations that are not complete, the first waits for nothing, provided that every rank takes whatever arrives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import lcm
from typing import Any

import numpy as np
import numpy.typing as npt

from trainkit.collectives.schedule import Op, Schedule

OUT, STORE, REDUCE, COPY = range(4)
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Program:
    """What one rank does, for messages of any size."""

    schedule: Schedule
    """What it was compiled from."""
    rank: int
    """Whose it is."""
    kind: npt.NDArray[np.uint8]
    """[ops] OUT, STORE, REDUCE or COPY."""
    peer: Ints
    """[ops] rank at the other end."""
    op: Ints
    """[ops] the schedule's number of the operation."""
    wave: Ints
    """[ops] the schedule's wave (or step)."""
    first: Ints
    """[ops] place in `borders` of the first byte."""
    last: Ints
    """[ops] place in `borders` of the end."""
    source: Ints
    """[ops] place in `borders` of a copy's first source byte; equal to `first` for the others."""
    next_start: Ints
    """[ops + 1] where an operation's followers begin in `next`."""
    next: Ints
    """Operations that wait for this one to be complete."""
    borders: tuple[int, ...]
    """Borders of slices, as multiples of 1 / `parts` of the message."""
    parts: int
    """The borders' common denominator."""

    @property
    def peers(self) -> frozenset[int]:
        """The ranks that this one exchanges something with."""
        return frozenset(self.peer[self.kind != COPY].tolist())

    @cached_property
    def waits(self) -> list[list[int]]:
        """[ops] the earlier operations that each waits for."""
        earlier: list[list[int]] = [[] for _ in self.kind]
        for at in range(len(self.kind)):
            for later in self.next[self.next_start[at] : self.next_start[at + 1]].tolist():
                earlier[later].append(at)
        return earlier

    def slices(self, elements: int, align: int = 1) -> tuple[npt.NDArray[np.int64], ...]:
        """[ops] first element, end and first source element in a buffer of `elements`.

        Borders fall on multiples of `align` elements, but for those of the ranks' shards.

        Raises:
            ValueError: a copy's slice is not whole elements.
        """
        shards = {border for shard in self.schedule.shards for border in shard} | {Fraction(0), Fraction(1)}
        fixed = {int(border * self.parts) for border in shards if self.parts % border.denominator == 0}
        places, below = [], 0
        for border in self.borders:
            place = cut(border, self.parts, elements)
            if border in fixed:
                below = place
            places.append(place if border in fixed else max(below, place - place % align))
        at = np.array(places, dtype=np.int64)
        copies = np.flatnonzero(self.kind == COPY)
        if any(self.borders[b] * elements % self.parts for b in (*self.first[copies], *self.source[copies])):
            raise ValueError(f"copies within a rank need slices of whole elements, and {elements} do not divide so")
        return at[self.first], at[self.last], at[self.source]


def cut(border: int, parts: int, elements: int) -> int:
    """The element at which a border falls; every rank rounds alike."""
    return border * elements // parts


def sequence(schedule: Schedule, rank: int) -> list[tuple[Op, bool]]:
    """(op, whether this rank is the sender) in the order that the rank's memory must seem to follow."""
    mine = [(op, op.src == rank) for op in schedule.ops if rank in (op.src, op.dst)]
    if schedule.mode == "steps":
        mine.sort(key=lambda item: (item[0].step, not item[1], item[0].id))
    return mine


def compile_rank(schedule: Schedule, rank: int, ranks: Sequence[int] | None = None) -> Program:
    """The program of one rank.

    Args:
        schedule: what to run; it should have been verified.
        rank: of the schedule.
        ranks: the schedule's rank -> the process group's; None: the same.

    Raises:
        ValueError: the rank is not one of the schedule's.
    """
    size = len(schedule.ranks)
    if not 0 <= rank < size:
        raise ValueError(f"this schedule has ranks 0 to {size - 1}, got {rank}")
    mine = sequence(schedule, rank)
    bounds = [(op.start, op.stop, op.start if op.source is None else op.source) for op, _ in mine]
    ends = [(a, b, c, c + b - a) for a, b, c in bounds]
    parts = lcm(1, *{number.denominator for row in ends for number in row})
    whole = [tuple(number.numerator * (parts // number.denominator) for number in row) for row in ends]
    borders = sorted({number for row in whole for number in row})
    place = {border: at for at, border in enumerate(borders)}
    kinds, peers, followers = [], [], _Hazards(len(borders))
    for (op, sends), (start, stop, begin, end) in zip(mine, whole, strict=True):
        target, source = range(place[start], place[stop]), range(place[begin], place[end])
        if op.kind == "copy":
            kinds.append(COPY)
            followers.add(source, target)
        elif sends:
            kinds.append(OUT)
            followers.add(source, range(0))
        else:
            kinds.append(STORE if op.kind == "send" else REDUCE)
            followers.add(range(0), target)
        other = op.dst if sends else op.src
        peers.append(other if ranks is None else ranks[other])
    next_start, following = followers.rows()
    return Program(
        schedule=schedule,
        rank=rank if ranks is None else ranks[rank],
        kind=np.array(kinds, dtype=np.uint8),
        peer=_ints(peers),
        op=_ints([op.id for op, _ in mine]),
        wave=_ints([op.step for op, _ in mine]),
        first=_ints([place[row[0]] for row in whole]),
        last=_ints([place[row[1]] for row in whole]),
        source=_ints([place[row[2]] for row in whole]),
        next_start=next_start,
        next=following,
        borders=tuple(borders),
        parts=parts,
    )


def rank_order(schedule: Schedule, ranks: Mapping[str, int] | None, size: int) -> list[int]:
    """The schedule's rank -> the process group's.

    Args:
        schedule: its ranks are compute nodes.
        ranks: compute node -> rank; None takes the schedule's own order.
        size: of the process group.

    Raises:
        ValueError: the group has another size, or `ranks` does not name every compute node with a rank of its own.
    """
    nodes = schedule.ranks
    if len(nodes) != size:
        raise ValueError(f"the schedule {schedule.name!r} is for {len(nodes)} ranks, the process group has {size}")
    if ranks is None:
        return list(range(size))
    if set(ranks) != set(nodes) or sorted(ranks.values()) != list(range(size)):
        raise ValueError(f"ranks must give each of {', '.join(nodes)} one of 0 to {size - 1}, got {dict(ranks)}")
    return [ranks[node] for node in nodes]


class _Hazards:
    """Who must wait for whom, op after op, from what each reads and writes."""

    def __init__(self, atoms: int) -> None:
        self.writer = [-1] * atoms
        self.readers: list[list[int]] = [[] for _ in range(atoms)]
        self.earlier: list[set[int]] = []

    def add(self, reads: range, writes: range) -> None:
        at = len(self.earlier)
        before = {self.writer[atom] for atom in reads} | {self.writer[atom] for atom in writes}
        for atom in writes:
            before.update(self.readers[atom])
            self.writer[atom], self.readers[atom] = at, []
        for atom in reads:
            self.readers[atom].append(at)
        self.earlier.append(before - {-1, at})

    def rows(self) -> tuple[Ints, Ints]:
        pairs: list[tuple[Any, int]] = [(before, at) for at, row in enumerate(self.earlier) for before in row]
        pairs.sort()
        counts = np.bincount(_ints([before for before, _ in pairs]), minlength=len(self.earlier))
        return _ints([0, *np.cumsum(counts).tolist()]), _ints([at for _, at in pairs])


def _ints(values: Sequence[int]) -> Ints:
    return np.array(values, dtype=np.int32)
