"""GPUs that come and go with the load, and models spread over sub-clusters: against brute force and what is needed."""

import itertools

import numpy as np
import pytest
from scipy.optimize import linprog

from trainkit.serving import Profile, gpus_needed
from trainkit.serving.autoscaling import (
    Allocation,
    AllocationError,
    Autoscaler,
    Cluster,
    allocate,
    simulate_allocated,
    simulate_autoscaled,
)

ONE = {"resnet": Profile.linear(1.053, 5.072, 32)}


def wave(low: float, high: float, seconds: float, seed: int) -> dict[str, list[float]]:
    """A day in short: Poisson arrivals whose rate goes from low to high and back."""
    rng = np.random.default_rng(seed)
    starts = np.arange(0, seconds, 0.1)
    rates = (low + high) / 2 - (high - low) / 2 * np.cos(2 * np.pi * starts / seconds)
    counts = rng.poisson(0.1 * rates)
    return {"resnet": np.sort(np.repeat(starts, counts) + 0.1 * rng.random(counts.sum())).tolist()}


def test_gpus_follow_the_load() -> None:
    seconds = 200.0
    found = simulate_autoscaled(
        ONE, Autoscaler(1, 16, hold_s=5), slo_ms=25, start_s=5, arrivals=wave(500, 5500, seconds, 0), seconds=seconds
    )
    most = gpus_needed(ONE, {"resnet": 5500}, slo_ms=25)
    assert most is not None
    assert found.result.bad < 0.01
    assert found.gpus.max() <= most + 1
    assert found.gpus[-1] <= 3
    assert found.gpu_seconds < 0.85 * most * seconds
    assert np.count_nonzero(np.diff(found.gpus)) < 25  # hysteresis: no flutter


def test_a_steady_load_is_left_alone() -> None:
    found = simulate_autoscaled(ONE, Autoscaler(4, 16, hold_s=10), {"resnet": 2000}, slo_ms=25, start_s=2, seconds=90)
    assert np.count_nonzero(np.diff(found.gpus[30:])) == 0
    assert found.result.bad < 0.01


def test_the_rules() -> None:
    scale = Autoscaler(1, 10, hold_s=10)
    # a fifth was bad on 4 GPUs: 4 / (1 - 1/5) = 5
    assert scale.observe(1, 4, answered=100, bad=20, untouched=0) == 5
    assert scale.observe(2, 4, starting=1, answered=100, bad=20, untouched=0) == 5
    assert scale.observe(3, 5, answered=100, bad=0, untouched=3) == 5
    assert scale.observe(8, 5, answered=100, bad=0, untouched=2) == 5
    assert scale.observe(13, 5, answered=100, bad=0, untouched=4) == 3
    assert Autoscaler(1, 10, hold_s=10, spare=1)._since is None
    with pytest.raises(ValueError, match="least is from 1 to most"):
        Autoscaler(3, 2)
    with pytest.raises(ValueError, match="hold_s above 0"):
        Autoscaler(1, 2, hold_s=0)


def brute_force(demand: list[float], memory: list[float], clusters: list[Cluster]) -> float:
    """Least utilisation over all sets of copies that fit: a linear programme for each."""
    models, count, best = len(demand), len(clusters), np.inf
    for bits in itertools.product([0, 1], repeat=models * count):
        x = np.reshape(bits, (models, count))
        if (x.sum(1) == 0).any() or any(memory @ x[:, c] > clusters[c].memory for c in range(count)):
            continue
        cells = models * count
        above = np.zeros((count, cells + 1))
        for c in range(count):
            above[c, c:cells:count] = demand
            above[c, -1] = -clusters[c].gpus
        equal = np.zeros((models, cells + 1))
        for m in range(models):
            equal[m, m * count : (m + 1) * count] = 1
        bounds = [(0, int(bit)) for bit in bits] + [(0, None)]
        cost = np.eye(cells + 1)[-1]
        best = min(best, linprog(cost, above, np.zeros(count), equal, np.ones(models), bounds).fun)
    return best


@pytest.mark.parametrize("seed", range(4))
def test_allocations_are_as_balanced_as_can_be(seed: int) -> None:
    rng = np.random.default_rng(seed)
    demand, memory = rng.uniform(0.2, 3, 4), rng.uniform(1, 5, 4)
    clusters = [Cluster(int(rng.integers(1, 5)), float(rng.uniform(6, 12))) for _ in range(2)]
    names = [f"m{n}" for n in range(4)]
    try:
        found = allocate(
            dict(zip(names, demand, strict=True)), dict(zip(names, memory, strict=True)), clusters, slack=0
        )
    except AllocationError:
        assert brute_force(demand, memory, clusters) == np.inf
        return
    assert found.utilisation == pytest.approx(brute_force(demand, memory, clusters), rel=3e-3)
    shares = np.array([found.shares[name] for name in names])
    assert shares.sum(1) == pytest.approx(np.ones(4))
    for c, cluster in enumerate(clusters):
        assert memory @ (shares[:, c] > 0) <= cluster.memory * (1 + 1e-9)
        assert demand @ shares[:, c] <= found.utilisation * cluster.gpus * (1 + 1e-9)


def test_little_is_moved_where_little_has_changed() -> None:
    rng = np.random.default_rng(0)
    names = [f"m{n}" for n in range(30)]
    memory = {name: float(size) for name, size in zip(names, rng.uniform(1, 5, 30), strict=True)}
    demand = {name: float(load) for name, load in zip(names, rng.uniform(0.1, 2, 30), strict=True)}
    clusters = [Cluster(10, 40.0)] * 4
    first = allocate(demand, memory, clusters)
    changed = {name: load * rng.uniform(0.8, 1.2) for name, load in demand.items()}
    then, anew = allocate(changed, memory, clusters, before=first), allocate(changed, memory, clusters)
    assert then.utilisation <= 1.06 * anew.utilisation
    assert then.moved <= 0.1 * 10 * sum(memory.values())
    results = simulate_allocated(
        dict.fromkeys(names, Profile.linear(1.0, 4.0, 32)),
        then,
        clusters,
        dict.fromkeys(names, 50.0),
        slo_ms=40,
        seconds=2,
    )
    assert all(result.bad < 0.01 for result in results)


@pytest.mark.parametrize(
    ("demand", "memory", "clusters", "match"),
    [
        ({"a": 1.0}, {"a": 9.0}, [Cluster(1, 8.0)], "do not fit"),
        ({"a": 1.0}, {}, [Cluster(1, 8.0)], "of the same models"),
        ({"a": -1.0}, {"a": 1.0}, [Cluster(1, 8.0)], "from 0 on"),
        ({}, {}, [Cluster(1, 8.0)], "needs clusters"),
    ],
)
def test_refusals(demand: dict[str, float], memory: dict[str, float], clusters: list[Cluster], match: str) -> None:
    with pytest.raises(AllocationError, match=match):
        allocate(demand, memory, clusters)


def test_an_allocation_of_other_clusters_is_no_start() -> None:
    before = Allocation({"a": (1.0,)}, 1.0, 0.0)
    assert allocate({"a": 1.0}, {"a": 1.0}, [Cluster(1, 8.0)] * 2, before=before).moved == pytest.approx(2.0)
