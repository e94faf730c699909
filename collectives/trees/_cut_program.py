"""Linear programs over cuts, solved by generation and made exact.

Two quantities need one: what a network reaches when its switches are unbalanced and cannot copy, and the native
all-reduce, where each link is split between the reduction and the broadcast. Both are: capacities that pass through
every switch, such that no cut holds back more root weight than the capacity leaving it. Cuts come from integer max-flows
and join the running simplex; variables are one per orbit of verified symmetries (averaging over a group keeps a solution
feasible and as good), and the float optimum is turned into the exact vertex behind it. The multipliers of the capacities
are lengths of the links, which `_certificate` measures on the physical network: nothing here is believed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import ceil, inf, lcm

import highspy
import numpy as np
import numpy.typing as npt

import trainkit.collectives._native as _native
from trainkit.collectives._topology import Ints
from trainkit.collectives.trees._exact import solve_near
from trainkit.collectives.trees._levels import levelled
from trainkit.collectives.trees._problem import Problem

Row = dict[int, int]
Floats = npt.NDArray[np.float64]
_GRAIN = 2**26  # float capacities become integers of this many steps for the max-flows
_TOLERANCE = 1e-9
_SIMPLE = 10**4  # denominators that 15 digits of a float still tell apart
_SLICE_S = 0.5  # of the solver between two calls of the progress function
_LARGEST = 2**40  # integer capacities that leave room for sums over all links
# The simplex goes on from where it was when rows are added: presolve would throw that away.
_OPTIONS: dict[str, bool | str | int | float] = {
    "output_flag": False,
    "presolve": "off",
    "solver": "simplex",
    "threads": 1,
    "primal_feasibility_tolerance": _TOLERANCE,
    "dual_feasibility_tolerance": _TOLERANCE,
}


@dataclass(frozen=True)
class Solution:
    """A feasible point, exact, and what the solver holds for its proof."""

    value: Fraction
    """Total root weight carried, in integer capacities; reached."""
    roots: list[Fraction]
    """[vertices] root weight of each."""
    sides: list[list[Fraction]]
    """Per side, [links] the capacity it uses."""
    lengths: Callable[[bool], tuple[Fraction, ...]]
    """Multipliers of the capacities, for a certificate: [links] the nearest simple fractions, or (True) by elimination."""


class CutProgram:
    """max sum(roots) such that each side's capacities carry the roots' weight past every cut.

    Args:
        sides: one problem per direction, all on the same links numbered alike; side 1 of an all-reduce is on the
            transposed network.
        free_roots: the weights of the roots are variables; else they are `weight` times one variable.
        pool: cuts that another program of the same sides found.
    """

    def __init__(self, sides: list[Problem], free_roots: bool, pool: Sequence[tuple[int, Ints]] = ()) -> None:
        self.sides, self.free_roots = sides, free_roots
        first = sides[0]
        self.arc, self.vertex = self._orbits(first)
        self.arcs, count = int(self.arc.max()) + 1, first.size
        owners = [v for v in range(count) if first.weight[v] > 0]
        self.root_of = {v: int(self.vertex[v]) for v in owners}
        orbits = sorted(set(self.root_of.values()))
        self.roots = {orbit: i if free_roots else 0 for i, orbit in enumerate(orbits)}
        self.head = len(orbits) if free_roots else 1
        self.variables = self.head + self.arcs * len(sides)
        self.limits = self._limits()
        self.unit = max(self.limits)
        self.objective = [0] * self.variables
        for v in owners:
            self.objective[self.roots[self.root_of[v]]] += 1 if free_roots else int(first.weight[v])
        self.upper: list[Row] = [
            {self.head + side * self.arcs + a: 1 for side in range(len(sides))} for a in range(self.arcs)
        ]
        self.right: list[int] = list(self.limits)
        self.equal = [row for side in range(len(sides)) for row in self._balance(side)]
        self.lengths: Callable[[bool], tuple[Fraction, ...]] | None = None
        self.seen: set[tuple[tuple[int, int], ...]] = set()
        self.pool: list[tuple[int, Ints]] = []
        self.sinks = [self._representatives(problem) for problem in sides]
        for side, problem in enumerate(sides):
            for v in self.sinks[side]:
                cut = np.ones(problem.size, dtype=np.int64)
                cut[v] = 0
                self._add_cut(side, cut)
        for side, cut in pool:
            self._add_cut(side, cut)

    def _limits(self) -> list[int]:
        """[orbits] a capacity that some best solution leaves unused in part, or the physical one if that is less.

        The solver's tolerances are relative to the largest capacity, so one that is of no use must not set it. Narrowing
        is sound as every limit here exceeds what a best solution needs, by at least 1: that solution meets the physical
        limits alone with equality, so in every best dual the multiplier of a narrowed limit is 0 (complementary
        slackness), and the certificate never rests on one. Two bounds hold for the capacity that a link is used with.

        What passes through: a relay gives out as much as it takes in, on both sides together, so a link at it
        carries no more than all its links the other way round may.

        What trees need: capacities that carry a total weight T past every cut can be packed with T trees (edge
        splitting at the relays, then Edmonds), each of one path per spanned vertex other than its root. What
        these paths use, without their circles, is itself a solution that passes through, is as good, and uses a link at
        most T times the number of paths.
        """
        most = min(self._most(problem) for problem in self.sides)
        needed = most * sum(len(problem.spanned) - 1 for problem in self.sides) + 1
        _, tail, head, physical = self.sides[0].graph
        relays = np.logical_and.reduce([problem.relays.astype(bool) for problem in self.sides])
        carried = physical
        while True:
            taken, given = np.zeros(len(relays), dtype=np.int64), np.zeros(len(relays), dtype=np.int64)
            np.add.at(taken, head, carried)
            np.add.at(given, tail, carried)
            smaller = np.where(relays[tail], np.minimum(carried, taken[tail]), carried)
            smaller = np.where(relays[head], np.minimum(smaller, given[head]), smaller)
            if (smaller == carried).all():
                break
            carried = smaller
        limits = [0] * self.arcs
        for e, orbit in enumerate(self.arc):
            limits[orbit] = min(int(physical[e]), int(carried[e]) + 1, needed)
        return limits

    def _most(self, problem: Problem) -> int:
        """At least the total weight of all roots.

        With given roots that is the cut bound. With free ones, what two members take in: the one hears of all roots but
        itself, the other of that one.
        """
        if not self.free_roots:
            return ceil(int(problem.weight.sum()) / problem.search()[0])
        _, _, head, cap = problem.graph
        taken = np.zeros(problem.size, dtype=np.int64)
        np.add.at(taken, head, cap)
        return int(np.sort(taken[problem.members])[:2].sum())

    def _orbits(self, first: Problem) -> tuple[Ints, Ints]:
        colour = first.colour
        for side in self.sides[1:]:
            colour = colour * 16 + side.colour
        arc, vertex = _native.orbits(*first.graph, colour, levelled(first), first.progress)
        return arc, vertex

    def _representatives(self, problem: Problem) -> Ints:
        _, first = np.unique(self.vertex[problem.spanned], return_index=True)
        return problem.spanned[np.sort(first)]

    def _balance(self, side: int) -> list[Row]:
        problem = self.sides[side]
        _, tail, head, _ = problem.graph
        rows, relays = [], np.flatnonzero(problem.relays)
        _, first = np.unique(self.vertex[relays], return_index=True)
        for w in relays[first]:
            row: Row = {}
            for ends, sign in ((head, 1), (tail, -1)):
                for e in np.flatnonzero(ends == w):
                    at = self.head + side * self.arcs + int(self.arc[e])
                    row[at] = row.get(at, 0) + sign
            rows.append({at: value for at, value in row.items() if value})
        return [row for row in rows if row]

    def _add_cut(self, side: int, cut: Ints) -> bool:
        problem = self.sides[side]
        _, tail, head, _ = problem.graph
        row: Row = {}
        for v, orbit in self.root_of.items():
            if cut[v]:
                at = self.roots[orbit]
                row[at] = row.get(at, 0) + (1 if self.free_roots else int(problem.weight[v]))
        leaving = (cut[tail] == 1) & (cut[head] == 0)
        for orbit, times in zip(*np.unique(self.arc[leaving], return_counts=True), strict=True):
            row[self.head + side * self.arcs + int(orbit)] = -int(times)
        key = tuple(sorted(row.items()))
        if key in self.seen:
            return False
        self.seen.add(key)
        self.pool.append((side, cut))
        self.upper.append(row)
        self.right.append(0)
        return True

    def solve(self) -> Solution:
        """Generate cuts until none is violated, then make the vertex exact.

        What the progress function raises passes through; `lengths` are then those of the last round, if it had one.

        Raises:
            RuntimeError: the linear solver gave up.
        """
        solver = self._solver()
        given = 0
        while True:
            self._extend(solver, self.upper[given:], self.right[given:])
            given = len(self.upper)
            self._run(solver)
            found = solver.getSolution()
            point = np.array(found.col_value) * self.unit
            dual = -np.array(found.row_dual)
            upper_dual, equal_dual = dual[len(self.equal) :], dual[: len(self.equal)]
            self.lengths = partial(self._lengths, upper_dual, equal_dual)
            new = False
            for side in range(len(self.sides)):
                for cut in self._violated(side, point):
                    new = self._add_cut(side, cut) or new
            if not new:
                return self._exact(point)

    def _run(self, solver: highspy.Highs) -> None:
        """One solution, in slices of time: between them interrupts pass, and the progress function may end the work."""
        while True:
            if (progress := self.sides[0].progress) is not None:
                progress("linear program", solver.getNumRow(), len(self.upper) + len(self.equal))
            # The limit is on all that this solver has run for; the simplex goes on from its last basis.
            solver.setOptionValue("time_limit", solver.getRunTime() + _SLICE_S)
            solver.run()
            status = solver.getModelStatus()
            if status == highspy.HighsModelStatus.kOptimal:
                return
            if status != highspy.HighsModelStatus.kTimeLimit:
                raise RuntimeError(f"the linear program was not solved: {solver.modelStatusToString(status)}")

    def _solver(self) -> highspy.Highs:
        """The program without its upper rows; capacities are relative to the largest, as tolerances are absolute."""
        solver = highspy.Highs()  # type: ignore[no-untyped-call]
        for option, value in _OPTIONS.items():
            solver.setOptionValue(option, value)
        solver.addVars(self.variables, np.zeros(self.variables), np.full(self.variables, inf))
        every = np.arange(self.variables, dtype=np.int32)
        solver.changeColsCost(self.variables, every, -np.array(self.objective, dtype=float))
        self._extend(solver, self.equal, [0] * len(self.equal), low=0.0)
        return solver

    def _extend(self, solver: highspy.Highs, rows: list[Row], right: list[int], low: float = -inf) -> None:
        starts = np.cumsum([0, *map(len, rows)])[:-1].astype(np.int32)
        at = np.array([at for row in rows for at in row], dtype=np.int32)
        values = np.array([value for row in rows for value in row.values()], dtype=float)
        highest = np.array(right, dtype=float) / self.unit
        solver.addRows(len(rows), np.full(len(rows), low), highest, len(at), starts, at, values)

    def _violated(self, side: int, point: Floats) -> list[Ints]:
        problem = self.sides[side]
        size, tail, head, _ = problem.graph
        largest = self.unit
        first = self.head + side * self.arcs
        cap = np.rint(point[first : first + self.arcs][self.arc] / largest * _GRAIN).astype(np.int64)
        weight = np.zeros(size, dtype=np.int64)
        for v, orbit in self.root_of.items():
            times = 1 if self.free_roots else int(problem.weight[v])
            weight[v] = round(point[self.roots[orbit]] * times / largest * _GRAIN)
        # A cut of rounded capacities may be short by its arcs: only more than that is a violation.
        need = int(weight.sum()) - len(tail)
        found: list[Ints] = _native.violated_cuts(
            size, tail, head, cap, weight, self.sinks[side], need, True, problem.progress
        )
        return found

    def _exact(self, point: Floats) -> Solution:
        value = [Fraction(v).limit_denominator(_SIMPLE) for v in point.tolist()]
        if not self._feasible(value, Fraction(float(np.dot(self.objective, point)))):
            value = self._exact_primal(point, self.unit)
        roots = [Fraction(0)] * self.sides[0].size
        for v, orbit in self.root_of.items():
            roots[v] = value[self.roots[orbit]] * (1 if self.free_roots else int(self.sides[0].weight[v]))
        sides = []
        for side in range(len(self.sides)):
            first = self.head + side * self.arcs
            sides.append([value[first + int(orbit)] for orbit in self.arc])
        assert self.lengths is not None
        return Solution(sum(roots, Fraction(0)), roots, sides, self.lengths)

    def _lengths(self, upper_dual: Floats, equal_dual: Floats, by_elimination: bool) -> tuple[Fraction, ...]:
        if by_elimination:
            dual = self._exact_dual(upper_dual, equal_dual)
        else:
            # Relative to the largest: certificates do not mind the scale, and the simplest proofs are 0s and 1s.
            most = max(float(upper_dual[: self.arcs].max()), _TOLERANCE)
            dual = [Fraction(max(y, 0.0) / most).limit_denominator(_SIMPLE) for y in upper_dual[: self.arcs].tolist()]
        share = np.bincount(self.arc, minlength=self.arcs).tolist()
        return tuple(dual[orbit] / share[orbit] for orbit in self.arc.tolist())

    def _feasible(self, value: list[Fraction], total: Fraction) -> bool:
        """Whether a point keeps every row that there could be, exactly, and is as good as the floats said."""
        if any(v < 0 for v in value) or any(sum(c * value[at] for at, c in row.items()) for row in self.equal):
            return False
        if any(
            sum(value[at] for at in row) > limit
            for row, limit in zip(self.upper[: self.arcs], self.limits, strict=True)
        ):
            return False
        reached = sum((c * v for c, v in zip(self.objective, value, strict=True)), Fraction(0))
        scale = lcm(*(v.denominator for v in value))
        if reached < total * (1 - Fraction(1, 10**6)) or scale * self.unit > _LARGEST:
            return False
        for side, problem in enumerate(self.sides):
            first = self.head + side * self.arcs
            cap = np.array([int(v * scale) for v in value[first : first + self.arcs]], dtype=np.int64)[self.arc]
            weight = np.zeros(problem.size, dtype=np.int64)
            for v, orbit in self.root_of.items():
                weight[v] = int(value[self.roots[orbit]] * scale) * (1 if self.free_roots else int(problem.weight[v]))
            size, tail, head, _ = problem.graph
            if _native.violated_cuts(size, tail, head, cap, weight, problem.spanned, int(weight.sum()), False):
                return False
        return True

    def _exact_primal(self, point: Floats, unit: int) -> list[Fraction]:
        zero = point < unit * _TOLERANCE
        rows: list[tuple[Row, int]] = [({at: 1}, 0) for at in np.flatnonzero(zero).tolist()]
        rows += [(row, 0) for row in self.equal]
        for row, limit in zip(self.upper, self.right, strict=True):
            if limit - sum(value * point[at] for at, value in row.items()) < unit * _TOLERANCE * len(row):
                rows.append((row, limit))
        value = [max(v, Fraction(0)) for v in solve_near(rows, point)]
        # What the rows leave over is scaled back into them: a valid point, if not the vertex, whatever the floats did.
        over = max(
            (
                Fraction(sum(c * value[at] for at, c in row.items())) / b
                for row, b in zip(self.upper, self.right, strict=True)
                if b
            ),
            default=Fraction(1),
        )
        if over > 1:
            value = [v / over for v in value]
        share = min(
            (self._cut_share(row, value) for row, b in zip(self.upper, self.right, strict=True) if not b),
            default=Fraction(1),
        )
        if share < 1:
            value = [v * share if at < self.head else v for at, v in enumerate(value)]
        return value

    def _cut_share(self, row: Row, value: list[Fraction]) -> Fraction:
        inside = sum((c * value[at] for at, c in row.items() if at < self.head), Fraction(0))
        leaving = -sum((c * value[at] for at, c in row.items() if at >= self.head), Fraction(0))
        return leaving / inside if inside > leaving else Fraction(1)

    def _exact_dual(self, upper_dual: Floats, equal_dual: Floats) -> list[Fraction]:
        """[orbits] the multipliers of the physical capacities."""
        # Unknown: the multipliers that are not 0; equations: the variables whose column they meet exactly.
        guess = np.concatenate([upper_dual, equal_dual])
        columns: list[Row] = [{} for _ in range(self.variables)]
        upper = self.upper[: len(upper_dual)]
        for i, row in enumerate([*upper, *self.equal]):
            for at, value in row.items():
                columns[at][i] = value
        short = [
            sum(v * guess[i] for i, v in column.items()) - c for column, c in zip(columns, self.objective, strict=True)
        ]
        rows: list[tuple[Row, int]] = [({i: 1}, 0) for i in range(len(upper)) if guess[i] < _TOLERANCE]
        rows += [(columns[at], self.objective[at]) for at in range(self.variables) if abs(short[at]) < 1e-7]
        return [max(multiplier, Fraction(0)) for multiplier in solve_near(rows, guess)[: self.arcs]]
