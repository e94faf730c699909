"""The native all-reduce: every link split between the reduction and the broadcast, both running at once.

Reducing and gathering one after the other leaves links idle wherever the two directions of a network differ: a slow
link is a bottleneck of both phases in turn. Here both run together and the split of each link is a variable, as are the
shares of the roots. The optimum is that of all schedules that reduce along trees and then broadcast along trees.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from math import gcd, isfinite, lcm
from typing import TYPE_CHECKING

import numpy as np

from trainkit.collectives._topology import Ints, Topology, capacities
from trainkit.collectives.schedule import Schedule
from trainkit.collectives.schedule._units import bytes_per_second
from trainkit.collectives.trees._capacity import Share, best_share
from trainkit.collectives.trees._certificate import CertificateError, Lengths, proved_time
from trainkit.collectives.trees._clock import Clock, OutOfTime
from trainkit.collectives.trees._cut_program import CutProgram, Solution
from trainkit.collectives.trees._flat import Flat, ForestError
from trainkit.collectives.trees._forest import Forest, build, check_counts, forest
from trainkit.collectives.trees._grow import grow, grow_freely
from trainkit.collectives.trees._multicast import choose_multicast
from trainkit.collectives.trees._pack import effort
from trainkit.collectives.trees._problem import Problem, Progress, problem
from trainkit.collectives.trees._repair import Repair

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_COARSE = 2**20


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
        time_limit_s: seconds after which the linear program (at half of them) and the packing (at four fifths) are broken
            off; packing that is expected to take longer is not begun. Trees are then grown as if the network were
            regular and fitted to its links: `bound` says how far from the optimum they are.
        progress: called with (phase, done, total) now and then.

    Raises:
        ValueError: as `forest`.
    """
    check_counts(trees_per_root=trees_per_root, max_height=max_height)
    if not isinstance(time_limit_s, int | float) or not isfinite(time_limit_s) or time_limit_s <= 0:
        raise ValueError(f"time_limit_s must be a number of seconds > 0, got {time_limit_s!r}")
    if trees_per_root is not None:
        return _mirrored(topology, trees_per_root, group, max_height, progress)
    clock = Clock(time_limit_s, progress)
    members = tuple(topology.compute_nodes if group is None else group)
    halves, chosen, bound, certificate = _optimum(topology, members, group, clock)
    if chosen is not None:
        scale = _whole(chosen)
        weight = np.array([int(x * scale) for x in chosen.roots], dtype=np.int64)
        unit = scale * topology.scale
        parts = [_part(half, side, scale, weight, clock) for half, side in zip(halves, chosen.sides, strict=True)]
        if max_height is not None or sum(effort(part, part.weight).seconds for part in parts) <= time_limit_s:
            with suppress(OutOfTime):
                flats = [build(Share(part, 1, Fraction(scale), ()), max_height) for part in parts]
                time = Fraction(unit, int(weight.sum()))
                return _made(topology, members, weight, Fraction(unit), 1, time, flats, bound, certificate)
    if max_height is not None:
        raise ValueError(f"max_height={max_height} was not reached in {time_limit_s:g} s: give more time_limit_s")
    best = bound if chosen is None else Fraction(topology.scale) / chosen.value
    return _grown(topology, members, group, best, bound, certificate, clock)


def _optimum(
    topology: Topology, members: Sequence[str], group: Sequence[str] | None, clock: Clock
) -> tuple[list[Problem], Solution | None, Fraction, Lengths | None]:
    """(problems of broadcast and reduction, the linear program's solution if time sufficed, what is proved, the proof)."""
    halves: list[Problem] = []
    chosen: Solution | None = None
    program: CutProgram | None = None
    bound, certificate = Fraction(0), None
    try:
        for collective in ("allgather", "reduce_scatter"):
            asked = problem(topology, collective, group=group, progress=clock.until(0.5))  # type: ignore[arg-type]
            halves.append(choose_multicast(asked))
        # Equal shares mostly do as well, and need far fewer trees.
        program = even = CutProgram(halves, free_roots=False)
        chosen = even.solve()
        bound, certificate = _proof(topology, members, chosen.lengths, chosen.value, refine=False)
        if bound * chosen.value < topology.scale:
            program = CutProgram(halves, free_roots=True, pool=even.pool)
            free = program.solve()
            proof = _proof(topology, members, free.lengths, free.value)
            bound, certificate = max((bound, certificate), proof, key=lambda proof: proof[0])
            chosen = max(chosen, free, key=lambda solution: solution.value)
    except OutOfTime:
        # The multipliers of the last round prove something, too; coarse ones are quick to check.
        if program is not None and program.lengths is not None:
            coarse = [Fraction(round(length * _COARSE), _COARSE) for length in program.lengths(False)]
            proof = _proof(topology, members, lambda _: tuple(coarse), None, refine=False)
            bound, certificate = max((bound, certificate), proof, key=lambda proof: proof[0])
    return halves, chosen, bound, certificate


def _made(
    topology: Topology,
    members: tuple[str, ...],
    weight: Ints,
    unit: Fraction,
    k: int,
    time: Fraction,
    flats: Sequence[Flat],
    bound: Fraction,
    certificate: Lengths | None,
) -> AllreduceForest:
    """Trees of both sides (broadcast first), verified."""
    down, up = (
        Forest(topology, collective, k, unit, False, members, weight, flat)  # type: ignore[arg-type]
        for collective, flat in zip(("allgather", "reduce_scatter"), flats, strict=True)
    )
    result = AllreduceForest(topology, time, bound, up, down, certificate=certificate)
    result.verify()
    return result


def _proof(
    topology: Topology,
    members: Sequence[str],
    lengths: Callable[[bool], tuple[Fraction, ...]],
    value: Fraction | None,
    *,
    refine: bool = True,
) -> tuple[Fraction, Lengths | None]:
    """What the solver's lengths prove, and the lengths; `refine` takes more pains where that is less than `value`."""
    best: tuple[Fraction, Lengths | None] = Fraction(0), None
    for by_elimination in (False, True) if refine else (False,):
        certificate = Lengths(lengths(by_elimination))
        with suppress(CertificateError):
            best = max(best, (proved_time(topology, members, certificate), certificate), key=lambda proof: proof[0])
        if value is not None and best[0] * value == topology.scale:
            break
    return best


def _grown(
    topology: Topology,
    members: tuple[str, ...],
    group: Sequence[str] | None,
    best: Fraction,
    bound: Fraction,
    certificate: Lengths | None,
    clock: Clock,
) -> AllreduceForest:
    """Trees grown on a network that is more regular, then fitted to this one's links.

    Growth needs symmetry: links are taken to be as fast as most between vertices of the same kinds, or as their slower
    direction, or as the slowest of their kind. Where nothing is regular, each root grows the trees it likes best.

    Args:
        best: the time per byte at which the fitting ends.
    """
    halves = [
        problem(topology, collective, group=group, progress=clock.ticking)  # type: ignore[arg-type]
        for collective in ("allgather", "reduce_scatter")
    ]
    made = next((trees for lower in _regular(topology) if (trees := _regular_trees(lower, group, clock))), None)
    k, flats = made or (1, [grow_freely(half) for half in halves])
    target = best * k * len(members)
    repair = Repair(halves, flats, [b for _, _, b in topology.links], target, clock)
    repair.run()
    k, unit = k * repair.factor, repair.unit()
    fitted = [repair.trees(side) for side in range(2)]
    return _made(topology, members, halves[0].weight, unit, k, unit / k / len(members), fitted, bound, certificate)


def _regular(topology: Topology) -> Iterator[Topology]:
    """The network with capacities that are likelier to be symmetric."""
    capacity = capacities(topology)
    compute = set(topology.compute_nodes)
    degree = Counter(u for u, _ in capacity)
    kind = {name: (name in compute, degree[name]) for name in topology.nodes}
    rates: dict[object, Counter[Fraction]] = defaultdict(Counter)
    for (u, v), c in capacity.items():
        rates[kind[u], kind[v]][c] += 1
    yield topology.with_links({(u, v): rates[kind[u], kind[v]].most_common(1)[0][0] for u, v in capacity})
    yield topology.with_links({(u, v): min(c, capacity.get((v, u), c)) for (u, v), c in capacity.items()})
    yield topology.with_links({(u, v): min(rates[kind[u], kind[v]]) for u, v in capacity})


def _regular_trees(lower: Topology, group: Sequence[str] | None, clock: Clock) -> tuple[int, list[Flat]] | None:
    """(trees per root, trees of both sides), or None where growth does not find them."""
    flats, ks = [], set()
    for collective in ("allgather", "reduce_scatter"):
        half = problem(lower, collective, group=group, progress=clock.ticking)  # type: ignore[arg-type]
        if not half.balanced():
            return None  # its optimum would be another linear program, and no symmetry is left
        share = best_share(half)
        flat = grow(share.problem, share.problem.weight * share.k)
        if flat is None:
            return None
        flats.append(flat)
        ks.add(share.k)
    return (ks.pop(), flats) if len(ks) == 1 else None


def _whole(solution: Solution) -> Fraction:
    """The least multiple of the solution that is whole everywhere."""
    values = [value for side in (solution.roots, *solution.sides) for value in side if value]
    return Fraction(lcm(*(v.denominator for v in values)), reduce(gcd, (v.numerator for v in values)))


def _part(half: Problem, capacity: list[Fraction], scale: Fraction, weight: Ints, clock: Clock) -> Problem:
    cap = np.array([int(c * scale) for c in capacity], dtype=np.int64)
    return Problem(half.topology, half.members, weight, half.spanned, cap, clock.until(0.8))


def _mirrored(
    topology: Topology, k: int, group: Sequence[str] | None, max_height: int | None, progress: Progress
) -> AllreduceForest:
    down = forest(topology, trees_per_root=k, group=group, max_height=max_height, progress=progress)
    up = forest(topology, "reduce_scatter", trees_per_root=k, group=group, max_height=max_height, progress=progress)
    # One unit of time for both: each link has room for the two phases at the slower one's pace.
    unit = down.unit + up.unit
    flats = [half.flat for half in (down, up)]
    time = unit / k / len(down.members)
    return _made(topology, down.members, down.weight, unit, k, time, flats, Fraction(0), None)
