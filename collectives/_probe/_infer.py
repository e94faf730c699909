"""From rates of concurrent flows to the tree that explains them.

Every host's own rate is the best it ever had. In a network with nothing else every flow would get the fair share of its
two ends; a pair that gets less whenever others are busy has a busy link between its ends, and hosts whose flows to each
other always get their share are on one switch. Clustered by that, the groups get uplinks with the capacity that crossed
them when they were full, and the same question is asked again of the groups: what is still slower than the tree says has
a link above them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from trainkit.collectives._probe._tree import Bools, Floats, Flows, crossings, shares

Partition = list[list[int]]

_LEAST_CONTRAST = 0.08
"""Share of its rate that a pair must lose across groups for the groups to be believed."""
_LEAST_CONTRAST_ABOVE = 0.15
"""The same between groups of groups: few rounds test them, and what the tree below explains it explains roughly."""
_FULL = 1.1
"""A link is full in rounds in which, without it, this many times as much would cross."""
_NOT_LIMITING = 0.85
"""An uplink that was seen to carry this share of all that its hosts can send is not a limit."""


@dataclass(frozen=True)
class Tree:
    """Hosts, groups of hosts, groups of groups; above them one root."""

    sets: Bools
    """[V, N]: hosts below each vertex but the root; the first N are the hosts themselves."""
    up: Floats
    """[V]: bits/s towards the root."""
    down: Floats
    """[V]: bits/s from the root."""
    limiting: Bools
    """[V]: whether the link was seen to be a limit; an uplink that was not may be wider."""
    spread: Floats
    """[V]: how far the best measurements of the link lie apart, relative."""
    contrast: Floats
    """[V]: share of their rate that pairs across the group's border lost, over that of pairs inside; 0 for hosts."""
    fit: float
    """Median of |measured / explained - 1| over all flows."""
    names: dict[int, str] = field(default_factory=dict)
    """Vertex -> name that a declaration gives it."""
    warnings: tuple[str, ...] = ()
    """Where the declaration and the measurement differ."""

    @property
    def hosts(self) -> int:
        """Number of hosts."""
        return int(self.sets.shape[1])

    @property
    def groups(self) -> Partition:
        """Hosts of each group, hosts alone left out; from the lowest level up."""
        return [np.flatnonzero(row).tolist() for row in self.sets[self.hosts :]]

    def parent(self, vertex: int) -> int:
        """The next vertex above, -1 for the root."""
        above = [
            v
            for v in range(self.hosts, len(self.sets))
            if v != vertex and bool((self.sets[vertex] <= self.sets[v]).all())
        ]
        return min(above, key=lambda v: int(self.sets[v].sum()), default=-1)


@dataclass(frozen=True)
class Declared:
    """A partition of the hosts that somebody claims; a level of a declaration, or what hop counts say."""

    label: Sequence[str | None]
    """Group of each host; None where nothing is claimed."""
    what: str
    """Who claims it, for messages."""


def infer(rounds: Sequence[Flows], hosts: int, declared: Sequence[Declared] = ()) -> Tree:
    """The tree behind measured rounds.

    Args:
        rounds: flows that ran together and what each got; every pair of hosts must appear in some round.
        hosts: number of hosts N.
        declared: claims from the lowest level up; each is taken unless the measurement speaks against it.
    """
    sets = np.eye(hosts, dtype=bool)
    items: Partition = [[host] for host in range(hosts)]
    names: dict[int, str] = {}
    warnings: list[str] = []
    contrasts = [0.0] * hosts
    claims = list(declared)
    while len(items) > 2:
        ratio = _ratios(rounds, sets, items)
        found, said = _choose(ratio, items, claims)
        warnings += said
        if found is None:
            break
        groups, labels = found
        if len(items) == hosts and labels == [None] * len(groups):
            groups = _moved(rounds, ratio, groups)
            labels = [None] * len(groups)
        for members, label in zip(groups, labels, strict=True):
            if len(members) > 1:
                names |= {len(sets): label} if label and label[0] != "\0" else {}
                sets = np.vstack([sets, np.isin(np.arange(hosts), [host for item in members for host in items[item]])])
                contrasts.append(_contrast_of(ratio, members))
        items = [[host for item in members for host in items[item]] for members in groups]
    up, down, spread = _capacities(rounds, sets)
    up, down, limiting = _widened(rounds, sets, up, down)
    fit = _fit(rounds, sets, np.concatenate([up, down]))
    contrast = np.array(contrasts)
    return Tree(sets, up, down, limiting, spread, contrast, fit, names, tuple(warnings))


def _capacities(rounds: Sequence[Flows], sets: Bools) -> tuple[Floats, Floats, Floats]:
    """What each link carries, up and down, and how far the measurements behind it lie apart.

    A host's is the mean of the three best rounds. An uplink's is the median of the rounds in which, without it, more
    would have crossed: the hosts of a group do not all start at the same instant, and where one is late the best rounds
    count flows together that were not.
    """
    crossing = [crossings(sets, flows) for flows in rounds]
    loads, capacity, spread = _peaks(rounds, crossing)
    hosts, count = sets.shape[1], len(sets)
    for link in (*range(hosts, count), *range(count + hosts, 2 * count)):
        without = capacity.copy()
        without[link] = np.inf
        wanted = np.array([passed[link] @ shares(passed, without) for passed in crossing])
        full = np.sort(loads[wanted >= _FULL * capacity[link], link])
        if len(full) >= 3:
            capacity[link] = max(np.median(full), 1.0)
            low, high = np.quantile(full, [0.25, 0.75])
            spread[link] = (high - low) / capacity[link]
    up, down = np.split(capacity, 2)
    return up, down, np.maximum(*np.split(spread, 2))


def _peaks(rounds: Sequence[Flows], crossing: Sequence[Bools]) -> tuple[Floats, Floats, Floats]:
    """[rounds, links] loads; per link the mean of the three greatest, and how far they lie apart."""
    loads = np.array([passed @ flows.rate for passed, flows in zip(crossing, rounds, strict=True)])
    best = -np.sort(-loads, axis=0)[:3]
    mean = np.maximum(best.mean(axis=0), 1.0)
    return loads, mean, (best[0] - best[-1]) / mean


def _widened(rounds: Sequence[Flows], sets: Bools, up: Floats, down: Floats) -> tuple[Floats, Floats, Bools]:
    """Uplinks that held nothing back become as wide as all below them together."""
    hosts = sets.shape[1]
    limiting = np.ones(len(sets), dtype=bool)
    up, down = up.copy(), down.copy()
    for vertex in range(hosts, len(sets)):
        children = _children(sets, vertex)
        for capacity in (up, down):
            whole = capacity[children].sum()
            if capacity[vertex] >= _NOT_LIMITING * whole:
                capacity[vertex] = whole
                limiting[vertex] = False
    return up, down, limiting


def _children(sets: Bools, vertex: int) -> list[int]:
    inside = [v for v in range(vertex) if bool((sets[v] <= sets[vertex]).all())]
    return [v for v in inside if not any(v != w and bool((sets[v] <= sets[w]).all()) for w in inside)]


def _fit(rounds: Sequence[Flows], sets: Bools, capacity: Floats) -> float:
    misses = [np.abs(flows.rate / shares(crossings(sets, flows), capacity) - 1) for flows in rounds]
    return float(np.median(np.concatenate(misses)))


def _ratios(rounds: Sequence[Flows], sets: Bools, items: Partition) -> Floats:
    """[k, k]: trimmed mean of measured over explained rate between items, 1 where nothing was measured; symmetric."""
    up, down, _ = _capacities(rounds, sets)
    capacity = np.concatenate([up, down])
    home = np.zeros(sets.shape[1], dtype=np.int64)
    for number, members in enumerate(items):
        home[members] = number
    every = [np.clip(flows.rate / shares(crossings(sets, flows), capacity), 0, 1.2) for flows in rounds]
    ratio = np.concatenate(every)
    ends = np.sort([np.concatenate([home[getattr(flows, end)] for flows in rounds]) for end in ("source", "target")], 0)
    between = ends[0] * len(items) + ends[1]
    order = np.lexsort((ratio, between))
    ratio, between = ratio[order], between[order]
    first = np.searchsorted(between, between)
    size = np.searchsorted(between, between, side="right") - first
    # The worst sixth of each pair is left out: a process that was not woken is no busy link.
    kept = np.arange(len(ratio)) - first >= size // 6
    total, count = (np.bincount(between[kept], weights, len(items) ** 2) for weights in (ratio[kept], None))
    mean = np.divide(total, count, out=np.ones(len(items) ** 2), where=count > 0).reshape(len(items), -1)
    symmetric: Floats = np.triu(mean) + np.triu(mean, 1).T
    return symmetric


def _choose(
    ratio: Floats, items: Partition, claims: list[Declared]
) -> tuple[tuple[Partition, list[str | None]] | None, list[str]]:
    """The partition of the items that the measurement shows, or the claim that it does not speak against."""
    contrast = _LEAST_CONTRAST if all(len(members) == 1 for members in items) else _LEAST_CONTRAST_ABOVE
    measured = _clusters(ratio, contrast)
    said: list[str] = []
    while claims:
        claim = claims.pop(0)
        groups, labels = _claimed(claim, items)
        if len(groups) in (1, len(items)):
            continue
        if (
            _inside(ratio, groups)
            >= (_inside(ratio, measured) if measured else float(np.median(ratio))) - _LEAST_CONTRAST
        ):
            if measured is None or _inside(ratio, measured) - _across(ratio, groups) >= _LEAST_CONTRAST:
                return (groups, labels), said
            said.append(f"{claim.what} was set aside: it does not separate what the measurement does")
        else:
            said.append(f"{claim.what} was set aside: hosts that it puts together slow each other down when all send")
    return ((measured, [None] * len(measured)) if measured else None), said


def _claimed(claim: Declared, items: Partition) -> tuple[Partition, list[str | None]]:
    by_label: dict[str, list[int]] = {}
    for number, members in enumerate(items):
        labels = {claim.label[host] for host in members}
        label = labels.pop() if len(labels) == 1 else None
        by_label.setdefault(f"={label}" if label is not None else f"item {number}", []).append(number)
    return list(by_label.values()), [key[1:] if key[0] == "=" else None for key in by_label]


def _clusters(ratio: Floats, contrast: float) -> Partition | None:
    """The finest partition whose groups lose clearly more across than within; None where there is none."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if len(ratio) < 3:
        return None
    distance = np.maximum(1 - ratio, 0)
    np.fill_diagonal(distance, 0)
    merges = linkage(squareform(distance, checks=False), "average")
    heights = merges[:, 2]
    for number in range(1, len(heights)):
        noise = float(heights[:number].max() - heights[:number].min())
        if heights[number] - heights[number - 1] < max(contrast, 0.5 * noise):
            continue
        label = fcluster(merges, (heights[number] + heights[number - 1]) / 2, "distance")
        groups = [np.flatnonzero(label == one).tolist() for one in dict.fromkeys(label.tolist())]
        if _inside(ratio, groups) - _across(ratio, groups) >= contrast:
            return groups
    return None


def _moved(rounds: Sequence[Flows], ratio: Floats, groups: Partition) -> Partition:
    """Hosts that pairs alone cannot place, each put where all the flows of all rounds are explained best.

    A slow host always gets its own little rate and looks at home everywhere; but it takes its part of an uplink away
    from the others.
    """
    for host in range(len(ratio)):
        near = [float(ratio[host, [m for m in members if m != host]].mean()) for members in groups if members != [host]]
        if len(near) < 2 or sorted(near)[-1] - sorted(near)[-2] > 2 * _LEAST_CONTRAST:
            continue
        rest = [[m for m in members if m != host] for members in groups]
        rest = [members for members in rest if members]
        tries = [[*rest[:i], sorted([*rest[i], host]), *rest[i + 1 :]] for i in range(len(rest))]
        groups = min(tries, key=lambda one: _miss(rounds, one, len(ratio)))
    return groups


def _miss(rounds: Sequence[Flows], groups: Partition, hosts: int) -> float:
    """Mean error of the tree of these groups, outliers counted as a half."""
    rows = [np.isin(np.arange(hosts), members) for members in groups if len(members) > 1]
    sets = np.vstack([np.eye(hosts, dtype=bool), *rows])
    crossing = [crossings(sets, flows) for flows in rounds]
    _, capacity, _ = _peaks(rounds, crossing)
    misses = [np.abs(f.rate / shares(passed, capacity) - 1) for passed, f in zip(crossing, rounds, strict=True)]
    return float(np.minimum(np.concatenate(misses), 0.5).mean())


def _same(groups: Partition, size: int) -> Bools:
    same = np.zeros((size, size), dtype=bool)
    for members in groups:
        same[np.ix_(members, members)] = True
    np.fill_diagonal(same, False)
    return same


def _inside(ratio: Floats, groups: Partition) -> float:
    same = _same(groups, len(ratio))
    return float(ratio[same].mean()) if same.any() else 1.0


def _across(ratio: Floats, groups: Partition) -> float:
    apart = ~_same(groups, len(ratio))
    np.fill_diagonal(apart, False)
    return float(ratio[apart].mean())


def _contrast_of(ratio: Floats, members: list[int]) -> float:
    inside = np.isin(np.arange(len(ratio)), members)
    within = ratio[np.ix_(inside, inside)][~np.eye(int(inside.sum()), dtype=bool)]
    return float(within.mean() - ratio[np.ix_(inside, ~inside)].mean())
