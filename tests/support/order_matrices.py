"""Cost matrices for the tests and benchmarks of rank order."""

import numpy as np
import numpy.typing as npt

Costs = npt.NDArray[np.float64]


def datacenter(
    hosts: int, *, rack: int = 8, pod: int = 32, seed: int = 0, noise: float = 0.15, skew: float = 0.02
) -> tuple[Costs, npt.NDArray[np.int64]]:
    """Microseconds between shuffled hosts (10 in a rack, 30 in a pod, 80 across, times log-normal noise), their places."""
    random = np.random.default_rng(seed)
    place = np.arange(hosts)
    racks, pods = place // rack, place // pod
    base = np.where(racks[:, None] == racks, 10.0, np.where(pods[:, None] == pods, 30.0, 80.0))
    lower = np.tril(np.exp(random.normal(0, noise, (hosts, hosts))), -1)
    cost = base * (lower + lower.T + np.eye(hosts)) * np.exp(random.normal(0, skew, (hosts, hosts)))
    np.fill_diagonal(cost, 0)
    shuffle = random.permutation(hosts)
    return np.ascontiguousarray(cost[np.ix_(shuffle, shuffle)]), shuffle


def tree_metric(hosts: int, rack: int, pod: int, seed: int = 0) -> tuple[Costs, npt.NDArray[np.int64]]:
    """The same without noise."""
    return datacenter(hosts, rack=rack, pod=pod, seed=seed, noise=0, skew=0)
