"""The native all-reduce: every link split between the reduction and the broadcast, both running at once.

Reducing and gathering one after the other leaves links idle wherever the two directions of a network differ: a slow
link is a bottleneck of both phases in turn. Here both run together and the split of each link is a variable, as are the
shares of the roots. The optimum is that of all schedules that reduce along trees and then broadcast along trees.
"""

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from math import gcd, lcm
from typing import TYPE_CHECKING

import numpy as np

from trainkit.collectives._topology import Ints, Topology, capacities
from trainkit.collectives.schedule import Schedule
from trainkit.collectives.schedule._units import bytes_per_second
from trainkit.collectives.trees._capacity import Share, best_share
from trainkit.collectives.trees._certificate import CertificateError, Lengths, proved_time
from trainkit.collectives.trees._cut_program import CutProgram, Solution
from trainkit.collectives.trees._flat import ForestError
from trainkit.collectives.trees._forest import Forest, build, check_counts
from trainkit.collectives.trees._grow import grow
from trainkit.collectives.trees._multicast import choose_multicast
from trainkit.collectives.trees._pack import effort
from trainkit.collectives.trees._problem import Problem, Progress, problem

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class AllreduceForest:
    """Reduction trees and broadcast trees that share the links."""

    topology: Topology
    """The network."""
    time_per_byte: Fraction
    """A message M takes M * time_per_byte, in the network's own unit of capacity: what the trees prove."""
    bound: Fraction
    """No reduction and broadcast along trees is faster: what the certificate proves; 0 where none was looked for."""
    reduce: Forest
    """Trees towards the roots."""
    broadcast: Forest
    """Trees away from the roots, with the same shares."""
    certificate: Lengths | None = None
    """The proof of `bound`, checked when the trees were made."""

    @property
    def exact(self) -> bool:
        """Whether no reduction and broadcast along trees is faster, proved."""
        return self.time_per_byte == self.bound

    @property
    def height(self) -> int:
        """The most hops between compute nodes up a tree and down another."""
        return self.reduce.height + self.broadcast.height

    def verify(self) -> None:
        """Check both forests on the physical links, and that together no link carries more than its capacity.

        Raises:
            ForestError: naming what breaks.
        """
        up, down = self.reduce.loads(), self.broadcast.loads()
        for u, v, capacity in self.topology.links:
            if up[u, v] + down[u, v] > self.reduce.unit * capacity:
                raise ForestError(
                    f"link {u} -> {v} carries {up[u, v]} reducing and {down[u, v]} broadcasting trees, "
                    f"its capacity is {self.reduce.unit * capacity}"
                )

    def seconds(self, nbytes: int) -> Fraction:
        """Time for a message of `nbytes` without latency and with fine chunks.

        Raises:
            ValueError: the network has no unit.
        """
        return nbytes * self.time_per_byte / bytes_per_second(self.topology.unit)

    def draw(self, bottleneck: Collection[tuple[str, str]] = ()) -> "Figure":
        """Trees of the reduction, then of the broadcast, at most six each; the links of a bottleneck are marked."""
        from trainkit.collectives.trees._draw import draw_allreduce

        return draw_allreduce(self, bottleneck)

    def schedule(self, chunks: int = 1) -> Schedule:
        """Both phases as one schedule; pieces of the second start as soon as the first has finished them."""
        from trainkit.collectives.trees._emit import emit_allreduce

        return emit_allreduce(self, chunks)


def allreduce_forest(
    topology: Topology,
    *,
    trees_per_root: int | None = None,
    group: Sequence[str] | None = None,
    max_height: int | None = None,
    time_limit_s: float = 240.0,
    progress: Progress = None,
) -> AllreduceForest:
    """The best all-reduce along trees, verified on the physical links.

    Args:
        topology: the network; its "aggregate" switches may add and its "multicast" switches may copy.
        trees_per_root: None solves the linear program and takes as many trees as its optimum needs. A number takes that
            many broadcast trees per root and their mirror images as reduction trees where links have equal capacities
            both ways, each using half of every link: simpler, for runtimes with few channels.
        group: the compute nodes that take part; the others pass data on.
        max_height: as for `forest`, for each of the two phases.
        time_limit_s: where packing the optimum's trees is expected to take longer, trees are grown on the part of the
            network that is equally fast both ways, if they can be: `bound` then says how far from the optimum they are.
        progress: called with (phase, done, total) now and then.

    Raises:
        ValueError: as `forest`.
    """
    check_counts(trees_per_root=trees_per_root, max_height=max_height)
    down = choose_multicast(problem(topology, group=group, progress=progress))
    up = choose_multicast(problem(topology, "reduce_scatter", group=group, progress=progress))
    if trees_per_root is not None:
        return _mirrored(topology, trees_per_root, group, max_height, progress)
    members = tuple(topology.compute_nodes if group is None else group)
    # Equal shares mostly do as well, and need far fewer trees.
    even = CutProgram([down, up], free_roots=False)
    chosen = even.solve()
    bound, certificate = _proof(topology, members, chosen, refine=False)
    if bound * chosen.value < topology.scale:
        free = CutProgram([down, up], free_roots=True, pool=even.pool).solve()
        bound, certificate = max((bound, certificate), _proof(topology, members, free), key=lambda proof: proof[0])
        chosen = max(chosen, free, key=lambda solution: solution.value)
    scale = _whole(chosen)
    weight = np.array([int(x * scale) for x in chosen.roots], dtype=np.int64)
    unit = scale * topology.scale
    parts = [_part(half, side, scale, weight) for half, side in zip((down, up), chosen.sides, strict=True)]
    if max_height is None and sum(effort(part, part.weight).seconds for part in parts) > time_limit_s:
        grown = _grown(topology, members, group, bound, certificate, progress)
        if grown is not None:
            return grown
    halves = []
    for half, part in ((down, parts[0]), (up, parts[1])):
        flat = build(Share(part, 1, Fraction(scale), ()), max_height)
        kind = "allgather" if half is down else "reduce_scatter"
        halves.append(Forest(topology, kind, 1, Fraction(unit), False, members, weight, flat))  # type: ignore[arg-type]
    result = AllreduceForest(
        topology, Fraction(unit, int(weight.sum())), bound, halves[1], halves[0], certificate=certificate
    )
    result.verify()
    return result


def _proof(
    topology: Topology, members: Sequence[str], solution: Solution, *, refine: bool = True
) -> tuple[Fraction, Lengths | None]:
    """What the solver's lengths prove, and the lengths; `refine` takes more pains where that is not all."""
    best: tuple[Fraction, Lengths | None] = Fraction(0), None
    for by_elimination in (False, True) if refine else (False,):
        certificate = Lengths(solution.lengths(by_elimination))
        with suppress(CertificateError):
            best = max(best, (proved_time(topology, members, certificate), certificate), key=lambda proof: proof[0])
        if best[0] * solution.value == topology.scale:
            break
    return best


def _grown(
    topology: Topology,
    members: tuple[str, ...],
    group: Sequence[str] | None,
    bound: Fraction,
    certificate: Lengths | None,
    progress: Progress,
) -> AllreduceForest | None:
    """Trees by growth alone, on links that are taken to be as fast as their slower direction; None where it fails."""
    capacity = capacities(topology)
    slower = {(u, v): capacity[v, u] for u, v, c in topology.links if (v, u) in capacity and capacity[v, u] < c}
    lower = topology.with_links(slower)
    halves = []
    for collective in ("allgather", "reduce_scatter"):
        share = best_share(problem(lower, collective, group=group, progress=progress))  # type: ignore[arg-type]
        flat = grow(share.problem, share.problem.weight * share.k)
        if flat is None:
            return None
        halves.append((collective, share, flat))
    (_, down, _), (_, up, _) = halves
    if down.k != up.k:
        return None
    unit = (down.unit + up.unit) * lower.scale
    made = [
        Forest(topology, collective, share.k, unit, False, members, share.problem.weight, flat)  # type: ignore[arg-type]
        for collective, share, flat in halves
    ]
    result = AllreduceForest(topology, unit / down.k / len(members), bound, made[1], made[0], certificate=certificate)
    result.verify()
    return result


def _whole(solution: Solution) -> Fraction:
    """The least multiple of the solution that is whole everywhere."""
    values = [value for side in (solution.roots, *solution.sides) for value in side if value]
    return Fraction(lcm(*(v.denominator for v in values)), reduce(gcd, (v.numerator for v in values)))


def _part(half: Problem, capacity: list[Fraction], scale: Fraction, weight: Ints) -> Problem:
    cap = np.array([int(c * scale) for c in capacity], dtype=np.int64)
    return Problem(half.topology, half.members, weight, half.spanned, cap, half.progress)


def _mirrored(
    topology: Topology, k: int, group: Sequence[str] | None, max_height: int | None, progress: Progress
) -> AllreduceForest:
    from trainkit.collectives.trees._forest import forest

    down = forest(topology, trees_per_root=k, group=group, max_height=max_height, progress=progress)
    up = forest(topology, "reduce_scatter", trees_per_root=k, group=group, max_height=max_height, progress=progress)
    # One unit of time for both: each link has room for the two phases at the slower one's pace.
    unit = down.unit + up.unit
    halves = [
        Forest(topology, half.collective, k, unit, False, half.members, half.weight, half.flat) for half in (down, up)
    ]
    result = AllreduceForest(topology, unit / k / len(down.members), Fraction(0), halves[1], halves[0])
    result.verify()
    return result
