"""Trees by growth under symmetry: one tree for each kind of root, carried round the network.

Where a group moves the compute nodes freely, the images of one root's trees load all links of an orbit alike, so it is
enough that these trees keep within a budget per orbit. Growth may fail; what it returns fits by construction and is
checked on the physical network like everything else.
"""

import numpy as np

import trainkit.collectives._native as _native
from trainkit.collectives._topology import Ints
from trainkit.collectives.trees._flat import Flat
from trainkit.collectives.trees._levels import levelled, rotations
from trainkit.collectives.trees._problem import Problem


def grow(problem: Problem, quota: Ints) -> Flat | None:
    """Trees that fill `problem.cap`, `quota[v]` at each root, or None where growth does not find them."""
    group = rotations(problem, levelled(problem))
    klass, budget = _classes(problem, group)
    roots = np.flatnonzero(quota)
    # group[:, v] is the orbit of v: its smallest vertex stands for it
    kept = np.zeros_like(quota)
    leaders = roots[group[:, roots].min(axis=0) == roots]
    kept[leaders] = quota[leaders]
    best: Flat | None = None
    for depth_first in (False, True):
        grown = Flat(
            *_native.grow_trees(*problem.graph, kept, problem.spanned, klass, budget, depth_first, problem.progress)
        )
        if len(grown) and (best is None or grown.height < best.height):
            best = grown
    return None if best is None else _carry(best, group)


def grow_freely(problem: Problem) -> Flat:
    """One tree for each root by the fastest links, whatever they carry together."""
    quota = (problem.weight > 0).astype(np.int64)
    plenty = np.full(len(problem.cap), int(quota.sum()) * problem.size, dtype=np.int64)
    each = np.arange(len(problem.cap))
    return Flat(*_native.grow_trees(*problem.graph, quota, problem.spanned, each, plenty, True, problem.progress))


def _classes(problem: Problem, group: Ints) -> tuple[Ints, Ints]:
    """([links] number of the link's orbit, [orbits] how often one root's trees together may use it)."""
    size, tail, head, cap = problem.graph
    if len(group) == 1:
        return np.arange(len(tail)), cap
    keys = tail * size + head
    order = np.argsort(keys)
    images = order[np.searchsorted(keys[order], group[:, tail] * size + group[:, head])]
    leader, klass, count = np.unique(images.min(axis=0), return_inverse=True, return_counts=True)
    budget = [int(cap[first]) * int(times) // len(group) for first, times in zip(leader, count, strict=True)]
    return klass.astype(np.int64), np.array(budget, dtype=np.int64)


def _carry(flat: Flat, group: Ints) -> Flat:
    """All images of the trees."""
    times = len(group)

    def tiled(starts: Ints) -> Ints:
        lengths = np.tile(np.diff(starts), times)
        return np.concatenate([[0], np.cumsum(lengths)])

    return Flat(
        group[:, flat.root].ravel(),
        np.tile(flat.multiplicity, times),
        tiled(flat.edge_start),
        group[:, flat.edge_tail].ravel(),
        group[:, flat.edge_head].ravel(),
        tiled(flat.path_start),
        group[:, flat.path].ravel(),
    )
