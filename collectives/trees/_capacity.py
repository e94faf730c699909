"""Which integer capacities the trees are cut from: all of them, a balanced part of them, or their whole multiples."""

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import reduce
from math import gcd, lcm

import numpy as np

import trainkit.collectives._native as _native
from trainkit.collectives._topology import Ints, names
from trainkit.collectives.trees._certificate import Certificate, Cut, Lengths, proved_rate
from trainkit.collectives.trees._cut_program import CutProgram
from trainkit.collectives.trees._problem import Problem
from trainkit.collectives.trees._rounding import round_balanced


@dataclass(frozen=True)
class Share:
    """A problem whose capacities count trees."""

    problem: Problem
    """Balanced at every relay; link e carries `problem.cap[e]` trees."""
    k: int
    """Trees per unit of root weight."""
    unit: Fraction
    """Trees per unit of integer capacity: `problem.cap <= floor(unit * capacity)`."""
    certificates: tuple[Certificate, ...]
    """For `_certificate` to check: what may prove that no trees (with this k, if k was given) are faster."""


def achievable(problem: Problem) -> tuple[Fraction, Problem, Certificate]:
    """The best rate when relays cannot copy.

    Returns:
        (max over cuts of weight / capacity, in integer capacities, of the best balanced part of the capacities; that
        part as a problem of its own, its capacities scaled up to integers; what may prove it the best).
    """
    rate, cut = problem.search()
    worst = problem.cut(cut)
    if problem.balanced():
        return rate, problem, worst
    trimmed = problem.within(_native.balanced(*problem.graph, problem.relays, problem.progress))
    if _rate(trimmed) == rate:
        return rate, trimmed, worst
    solution = CutProgram([problem], free_roots=False).solve()
    scale = lcm(*(capacity.denominator for capacity in solution.sides[0]))
    part = problem.within(np.array([int(capacity * scale) for capacity in solution.sides[0]], dtype=np.int64))
    if not part.balanced():
        # Floats did not tell which constraints are tight: keep what passes on, and let the bound say what that cost.
        part = part.within(_native.balanced(*part.graph, problem.relays, problem.progress))
    own = _rate(part)
    if own is None:
        raise RuntimeError(
            "capacities differ too much for the linear program: give the large ones no more than they can use"
        )
    reached, network = own * scale, replace(problem.topology, multicast=frozenset())
    weight = {name: int(problem.weight[network.index[name]]) for name in names(network, problem.members)}
    certificate = Lengths(solution.lengths(False))
    if (
        not any(certificate.lengths)
        or proved_rate(network, list(weight), weight, certificate) < reached * network.scale
    ):
        certificate = Lengths(solution.lengths(True))
    return reached, part, certificate


def _rate(problem: Problem) -> Fraction | None:
    """The cut bound, or None where something to span is cut off."""
    p, q, _, _ = _native.search(*problem.graph, problem.weight, problem.spanned, problem.progress)
    return Fraction(p, q) if q else None


def best_share(problem: Problem) -> Share:
    """The optimum: as few trees as reach it."""
    rate, part, certificate = achievable(problem)
    own = part.search()[0]
    common = reduce(gcd, (int(c) for c in part.cap), own.denominator)
    scale = own / rate  # the part's capacities are at most this multiple's share of the problem's
    cap = part.cap // common * own.numerator
    return Share(part.within(cap), own.denominator // common, Fraction(own.numerator, common) / scale, (certificate,))


def fixed_share(problem: Problem, k: int) -> Share:
    """The best rate with k trees per unit of root weight.

    The least unit where rounding down keeps every relay balanced (equal capacities both ways, or no switches).
    """
    rate, part, certificate = achievable(problem)

    def share(cap: Ints, unit: Fraction) -> Share:
        return Share(problem.within(cap), k, unit, (certificate, *_too_small(problem, k, unit)))

    if _two_way(problem):
        unit = _smallest_unit(problem, k, rate)
        return share(_floors(problem.cap, unit), unit)
    # Rounded capacities must be balanced anew: the least unit of a ladder at which k trees still fit.
    least = k * rate
    scale = part.search()[0] / rate  # the part's capacities are scaled up by its inverse
    ladder = [least * Fraction(16 + step, 16) for step in range(48)] + [least * 2**step for step in range(2, 40)]
    for unit in ladder:
        limit, target = _floors(problem.cap, unit), [int(c) * unit * scale for c in part.cap]
        above = np.array([-(-t // 1) for t in target], dtype=np.int64)
        trimmed = _native.balanced(*problem.within(np.minimum(limit, above)).graph, problem.relays, problem.progress)
        for cap in (round_balanced(problem, target, limit), trimmed):
            rounded = problem if cap is None else problem.within(cap)
            reached = None if cap is None else _rate(rounded)
            if reached is not None and reached * k <= 1:
                used = max(Fraction(int(r), int(c)) for r, c in zip(rounded.cap, problem.cap, strict=True))
                return share(rounded.cap, used)
    raise ValueError(
        f"no balanced rounding of the capacities for {k} trees per root was found: take another trees_per_root"
    )


def _too_small(problem: Problem, k: int, unit: Fraction) -> list[Cut]:
    """A cut with too little room for k trees at every unit below this one, if there is one."""
    below = problem.within(-_floors(-problem.cap, unit) - 1)
    weight = problem.weight * k
    need = int(weight.sum())
    found = _native.violated_cuts(*below.graph, weight, problem.members, need, False, problem.progress)
    return [problem.cut(inside) for inside in found]


def _two_way(problem: Problem) -> bool:
    _, tail, head, cap = problem.graph
    back = {(int(v), int(u)): int(c) for u, v, c in zip(tail, head, cap, strict=True)}
    relays = problem.relays
    return all(
        back.get((int(u), int(v))) == int(c) for u, v, c in zip(tail, head, cap, strict=True) if relays[u] or relays[v]
    )


def _floors(cap: Ints, unit: Fraction) -> Ints:
    distinct, where = np.unique(cap, return_inverse=True)
    return np.array([int(c) * unit.numerator // unit.denominator for c in distinct], dtype=np.int64)[where]


def _next_unit(cap: Ints, unit: Fraction) -> Fraction:
    """The next unit at which some link carries one tree more."""
    return min(Fraction(int(c) * unit.numerator // unit.denominator + 1, int(c)) for c in np.unique(cap))


def _smallest_unit(problem: Problem, k: int, rate: Fraction) -> Fraction:
    """The smallest unit whose rounded-down capacities carry k trees: a whole number over some capacity."""
    distinct = [int(c) for c in np.unique(problem.cap)]
    weight = problem.weight * k
    need = int(weight.sum())
    size, tail, head, _ = problem.graph

    def snapped(unit: Fraction) -> Fraction:
        return max(Fraction(c * unit.numerator // unit.denominator, c) for c in distinct)

    def fits(unit: Fraction) -> bool:
        cap = _floors(problem.cap, unit)
        return not _native.violated_cuts(size, tail, head, cap, weight, problem.spanned, need, False, problem.progress)

    low = k * rate  # nothing below carries k trees
    if fits(low):
        return snapped(low)
    high = snapped(low + Fraction(1, min(distinct)))
    low = _next_unit(problem.cap, low)
    while low < high:
        # Units between two candidates round alike, so a test decides for the candidate below and the one above.
        middle = (low + high) / 2
        if fits(middle):
            high = max(snapped(middle), low)
        else:
            low = _next_unit(problem.cap, middle)
    return high
