"""Which sub-cluster serves which models: balanced load within the GPUs' memory, and few models moved.

The paper's abstract names such a step and does not give it; this formulation is ours. Every GPU of a sub-cluster holds
all of its models. Of model m, sub-cluster c serves the share f[m, c], for which it must be loaded, x[m, c] = 1:

    first   minimise t  with  sum_m demand_m f[m, c] <= t gpus_c,  sum_c f[m, c] = 1,  f <= x,  sum_m memory_m x[m, c] <= memory_c
    then    minimise the bytes loaded anew, with t at most `slack` above the least
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Shares = NDArray[np.float64]
# A copy that is there already is not free: without this price, useless copies would stay for ever.
_KEPT = 1e-3


class AllocationError(ValueError):
    """No allocation satisfies the limits."""


@dataclass(frozen=True)
class Cluster:
    """Equal GPUs behind one scheduler.

    Attributes:
        gpus: how many.
        memory: of each, in the unit of the models' memory.
    """

    gpus: int
    memory: float


@dataclass(frozen=True)
class Allocation:
    """Where each model is served.

    Attributes:
        shares: model -> share of its requests by cluster, [clusters], which sum to 1.
        utilisation: greatest demand over GPUs of a cluster.
        moved: memory loaded anew, over GPUs, against the allocation before.
    """

    shares: Mapping[str, tuple[float, ...]]
    utilisation: float
    moved: float


def allocate(
    demand: Mapping[str, float],
    memory: Mapping[str, float],
    clusters: Sequence[Cluster],
    *,
    before: Allocation | None = None,
    slack: float = 0.05,
    seconds: float = 1.0,
) -> Allocation:
    """Spread models over sub-clusters.

    Args:
        demand: GPUs that each model's load keeps busy (rate times l(b) / b).
        memory: of each model on a GPU.
        clusters: the sub-clusters.
        before: the present allocation, whose copies are kept where that costs little.
        slack: how much above the least utilisation is accepted for fewer moves.
        seconds: for each of the two programmes; a greedy allocation stands where they find none better.

    Raises:
        AllocationError: a number is out of its range, or the models do not fit into the memory.
    """
    names = list(demand)
    if not clusters or not names or set(memory) != set(demand):
        raise AllocationError("an allocation needs clusters, and the demand and memory of the same models")
    if min(demand.values()) < 0 or min(memory.values()) < 0 or min(c.gpus for c in clusters) < 1:
        raise AllocationError("demand and memory are from 0 on, and a cluster has at least one GPU")
    if not slack >= 0 or not seconds > 0:
        raise AllocationError(f"slack is from 0 on and seconds above 0, got {slack} and {seconds}")
    needs, sizes = np.array([demand[n] for n in names]), np.array([memory[n] for n in names])
    gpus, limits = np.array([c.gpus for c in clusters]), np.array([c.memory for c in clusters])
    loaded = np.zeros((len(names), len(clusters)), dtype=bool)
    if before is not None:
        for row, name in enumerate(names):
            if len(before.shares.get(name, ())) == len(clusters):
                loaded[row] = np.array(before.shares[name]) > 0
    programme = _Programme(needs, sizes, gpus, limits)
    start = _greedy(needs, sizes, gpus, limits, loaded)
    balanced = programme.solve(np.zeros_like(loaded, dtype=float), 1.0, None, seconds)
    best = min(
        (s for s in (start, balanced) if s is not None), key=lambda s: _utilisation(s, needs, gpus), default=None
    )
    if best is None:
        raise AllocationError(
            f"{sizes.sum():.4g} of models do not fit into the clusters' {limits.sum():.4g} of memory a GPU; "
            "the largest model must fit into one"
        )
    price = np.where(loaded, _KEPT, 1.0) * sizes[:, None] * gpus
    most = _utilisation(best, needs, gpus) * (1 + slack)
    fewer = programme.solve(price, 0.0, most, seconds)
    found = min((s for s in (best, fewer) if s is not None), key=lambda s: float((price * (s > 0)).sum()))
    moved = float((sizes[:, None] * gpus * ((found > 0) & ~loaded)).sum()) if before is not None else 0.0
    shares = {name: tuple(float(f) for f in row) for name, row in zip(names, found, strict=True)}
    return Allocation(shares, _utilisation(found, needs, gpus), moved)


def _utilisation(shares: Shares, needs: Shares, gpus: NDArray[np.int64]) -> float:
    return float((needs @ shares / gpus).max())


class _Programme:
    """The mixed-integer programme over (f, x, t), solved by SciPy's HiGHS."""

    def __init__(self, needs: Shares, sizes: Shares, gpus: NDArray[np.int64], limits: Shares) -> None:
        from scipy import sparse

        self.shape = models, clusters = len(needs), len(gpus)
        cells = models * clusters
        by_model = sparse.kron(sparse.eye(models), np.ones((1, clusters)))
        by_cluster = sparse.kron(needs[None, :], sparse.eye(clusters))
        room = sparse.kron(sizes[None, :], sparse.eye(clusters))
        eye = sparse.eye(cells)

        def rows(f: object, x: object, t: object) -> object:
            height = next(part.shape[0] for part in (f, x) if part is not None)  # type: ignore[attr-defined]
            empty = sparse.csr_matrix((height, cells))
            last = sparse.csr_matrix((height, 1)) if t is None else t
            return sparse.hstack([empty if f is None else f, empty if x is None else x, last])

        self.matrix = sparse.vstack(
            [
                rows(by_model, None, None),
                rows(by_cluster, None, -gpus[:, None]),
                rows(eye, -eye, None),
                rows(None, room, None),
            ]
        ).tocsr()
        self.low = np.concatenate([np.ones(models), np.full(clusters + cells + clusters, -np.inf)])
        self.high = np.concatenate([np.ones(models), np.zeros(clusters + cells), limits])

    def solve(self, price: Shares, balance: float, most: float | None, seconds: float) -> Shares | None:
        """Shares with the least balance * t + sum(price x), t at most `most`; None where none was found in time."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        cells = price.size
        upper = np.concatenate([np.ones(2 * cells), [np.inf if most is None else most * (1 + 1e-9)]])
        found = milp(
            np.concatenate([np.zeros(cells), price.ravel(), [balance]]),
            constraints=LinearConstraint(self.matrix, self.low, self.high),
            bounds=Bounds(np.zeros(2 * cells + 1), upper),
            integrality=np.concatenate([np.zeros(cells), np.ones(cells), [0]]),
            options={"time_limit": seconds, "mip_rel_gap": 1e-3},
        )
        if found.x is None:
            return None
        shares = found.x[:cells].reshape(self.shape)
        shares = np.where((found.x[cells : 2 * cells].reshape(self.shape) > 0.5) & (shares > 1e-6), shares, 0.0)
        return np.asarray(shares / shares.sum(1, keepdims=True))


def _greedy(
    needs: Shares, sizes: Shares, gpus: NDArray[np.int64], limits: Shares, loaded: NDArray[np.bool_]
) -> Shares | None:
    """Whole models, the most demanding first, each where it leaves the least utilisation; its old place wins ties."""
    shares = np.zeros(loaded.shape)
    load, room = np.zeros(len(gpus)), limits.astype(float).copy()
    for row in np.lexsort((-sizes, -needs)):
        fits = room >= sizes[row]
        if not fits.any():
            return None
        after = np.where(fits, (load + needs[row]) / gpus, np.inf)
        at = int(np.lexsort((~loaded[row], after))[0])
        shares[row, at] = 1.0
        load[at] += needs[row]
        room[at] -= sizes[row]
    return shares
