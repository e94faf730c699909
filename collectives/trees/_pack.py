"""Which trees: grown ones where they are short, else the best of several exact packings."""

import logging
import os
from dataclasses import dataclass

import numpy as np

import trainkit.collectives._native as _native
from trainkit.collectives._topology import Ints, Topology
from trainkit.collectives.trees._capacity import best_share
from trainkit.collectives.trees._flat import Flat
from trainkit.collectives.trees._grow import grow
from trainkit.collectives.trees._problem import Collective, Problem
from trainkit.collectives.trees._problem import problem as pose

_log = logging.getLogger(__name__)
_PLAIN, _PROPORTIONAL, _ROUND_ROBIN = 0, 1, 2
# Above these a second and third packing cost more than what they save in height.
_FEW_ROOTS, _FEW_TREES = 64, 16


@dataclass(frozen=True)
class Effort:
    """What an exact packing is expected to take, from the network's size alone."""

    seconds: float
    """CPU time of one core, to within a small factor."""
    memory: int
    """Bytes."""

    def __str__(self) -> str:
        """For people."""
        unit, name = next((u, n) for u, n in ((3600, "h"), (60, "min"), (1, "s")) if self.seconds >= u or u == 1)
        span = f"{self.seconds / unit:.1f} {name}"
        return f"about {span} of one core and {self.memory / 2**30:.1f} GiB"


def effort(problem: Problem, quota: Ints) -> Effort:
    """What splitting and packing this problem will take."""
    size, tail, head, cap = problem.graph
    relays = problem.relays.astype(bool)
    used = cap > 0
    into = np.bincount(head[used], minlength=size)
    out = np.bincount(tail[used], minlength=size)
    pairs = int((into * out)[relays].sum())
    spanned = len(problem.spanned)
    roots = int((quota > 0).sum())
    arcs = min(spanned * spanned, pairs + int((used & ~relays[tail] & ~relays[head]).sum())) + int(used.sum())
    trees = roots * min(8, max(1, int(quota.max())))
    split = 3e-8 * pairs * spanned if relays.any() else 0.0
    return Effort(split + 6e-9 * trees * spanned * arcs, 8 * spanned * arcs * (2 if pairs else 1))


def packing_effort(topology: Topology, collective: Collective = "allgather", *, root: str | None = None) -> Effort:
    """What an exact packing of the optimum would take; a regular network's trees are grown in a fraction of it."""
    share = best_share(pose(topology, collective, root=root))
    return effort(share.problem, share.problem.weight * share.k)


def pack(problem: Problem, quota: Ints, max_height: int | None) -> Flat:
    """Trees that fill `problem.cap`, `quota[v]` at each root, as short as is cheap to find.

    Args:
        problem: balanced at every relay, with room for the quota.
        quota: [vertices] trees per root.
        max_height: height to reach; all ways are tried until one does.

    Raises:
        MemoryError: the packing would not fit this machine.
        ValueError: no way reaches `max_height`; the message says the least height reached.
    """
    least = _least_height(problem, quota) if max_height is None else max_height
    best = grow(problem, quota)
    small = len(problem.members) <= _FEW_ROOTS
    short = max(least, 2) if max_height is None else max_height
    if best is not None and (best.height <= short or (max_height is None and not small)):
        return best
    expected = effort(problem, quota)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if expected.memory > 0.8 * machine:
        if best is not None and max_height is None:
            return best
        raise MemoryError(
            f"packing {int(quota.sum())} trees over {len(problem.members)} nodes will take {expected}, this machine has "
            f"{machine / 2**30:.0f} GiB: give trees_per_root=1, or a regular network, whose symmetry makes it short"
        )
    if expected.seconds > 60:
        _log.warning("packing %d trees over %d nodes will take %s", quota.sum(), len(problem.members), expected)
    several = max_height is not None or (small and int(quota.max()) <= _FEW_TREES)
    for deal in (_PLAIN, _PROPORTIONAL, _ROUND_ROBIN) if several else (_PLAIN,):
        if deal != _PLAIN and not problem.relays.any():
            break  # no switches, nothing to deal
        packed = Flat(*_native.pack_trees(*problem.graph, quota, problem.spanned, deal, problem.progress))
        if best is None or (packed.height, len(packed)) < (best.height, len(best)):
            best = packed
        if best.height <= least:
            break
    if best is None:
        raise RuntimeError("no packing was tried")
    if max_height is not None and best.height > max_height:
        raise ValueError(
            f"max_height={max_height} was not reached: the least height of all splittings tried is {best.height}"
        )
    return best


def _least_height(problem: Problem, quota: Ints) -> int:
    """Hops between spanned vertices that no tree can do without."""
    size, tail, head, cap = problem.graph
    relays = problem.relays.astype(bool)
    near: list[list[int]] = [[] for _ in range(size)]
    for u, v, c in zip(tail.tolist(), head.tolist(), cap.tolist(), strict=True):
        if c:
            near[u].append(v)
    root = int(np.flatnonzero(quota)[0])
    seen, layer, hops = {root}, [root], 0
    while True:
        reached: list[int] = []
        stack = list(layer)
        while stack:
            for v in near[stack.pop()]:
                if v not in seen:
                    seen.add(v)
                    (stack if relays[v] else reached).append(v)
        if not reached:
            return hops
        layer, hops = reached, hops + 1
