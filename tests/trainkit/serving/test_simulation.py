"""Bounds, conservation, and the figures that the scheduler must reach in simulation."""

import statistics

import numpy as np
import pytest

from trainkit.serving import Profile, Result, SchedulerError, bounds, goodput, gpus_needed, simulate, zipf
from trainkit.serving.simulation import POLICIES, LoadError

# Profiles in milliseconds whose bounds are published values.
RESNET, INCEPTION = Profile.linear(1.053, 5.072, 32), Profile.linear(5.090, 18.368, 16)
ONE = {"resnet": RESNET}


def mean_goodput(profiles: dict[str, Profile], gpus: int, seeds: int, **options: object) -> float:
    return statistics.mean(goodput(profiles, gpus, seed=seed, **options) for seed in range(seeds))  # type: ignore[arg-type]


def test_bounds() -> None:
    assert round(bounds.uncoordinated(RESNET, 8, 25)) == 4501
    assert round(bounds.staggered(RESNET, 8, 25)) == 5839
    assert round(bounds.uncoordinated(INCEPTION, 8, 70)) == 713
    assert round(bounds.staggered(INCEPTION, 8, 70)) == 1083
    assert [round(bounds.staggered(RESNET, n, 25)) for n in (1, 2, 4, 16)] == [563, 1321, 2826, 11840]


@pytest.mark.parametrize(("models", "gpus", "want"), [(1, 1, 589), (1, 8, 5875), (8, 8, 4711), (20, 8, 3264)])
def test_fluid_bound_is_the_closed_form_of_a_line(models: int, gpus: int, want: int) -> None:
    assert round(bounds.fluid(RESNET, gpus, 25, models=models)) == want


def test_no_answer_is_possible_below_a_single_batch() -> None:
    assert bounds.fluid(RESNET, 8, 6) == bounds.staggered(RESNET, 8, 6) == goodput(ONE, 8, slo_ms=6) == 0


@pytest.mark.parametrize("policy", [p if p != "per_replica" else "per_replica:7:3" for p in POLICIES])
@pytest.mark.parametrize("load", [0.5, 1.5])
def test_every_request_has_one_fate(policy: str, load: float) -> None:
    profiles = {"a": RESNET, "b": INCEPTION}
    slo = {"a": 25.0, "b": 70.0}
    rates = {"a": 1200 * load, "b": 100 * load}
    found = simulate(profiles, 4, rates, slo_ms=slo, policy=policy, seconds=3, seed=5, abandon=0.1, abandon_after_ms=12)
    assert found.done + found.late + found.dropped + found.abandoned == found.arrived > 3000 * load
    assert set(np.unique(found.fate)) <= {1, 2, 3, 4}
    assert found.abandoned > 0
    assert (found.answered_ns >= found.arrival_ns).all()
    assert found.late == 0 or policy in ("bentoml", "shepherd", "per_replica:7:3")
    assert sum(found.of("a").values()) + sum(found.of("b").values()) == 2 * found.arrived
    # nobody runs more than the time there is
    assert found.busy.max() <= found.answered_ns.max() / 1e9


def test_one_deterministic_case_by_hand() -> None:
    """Ten requests at once on one GPU, l(b) = b + 5 ms: the first runs alone for 6 ms, then nine for 14 ms."""
    found = simulate({"m": Profile.linear(1, 5, 16)}, 1, arrivals={"m": [0.0] * 10}, slo_ms=25, seconds=1)
    assert (found.done, found.batches, found.mean_batch) == (10, 2, 5)
    assert found.latency_ms(0) == pytest.approx(6)
    assert found.latency_ms(50) == pytest.approx(20)


def test_resnet_on_eight_gpus() -> None:
    ours = mean_goodput(ONE, 8, 5, slo_ms=25)
    assert ours >= 5250
    assert ours >= 0.89 * bounds.fluid(RESNET, 8, 25)
    assert ours >= 1.05 * mean_goodput(ONE, 8, 5, slo_ms=25, policy="eager")
    replicas = [f"per_replica:{batch}:{wait}" for batch in (6, 7, 8, 9, 12) for wait in (0, 3, 6)]
    assert ours >= 1.2 * max(mean_goodput(ONE, 8, 2, slo_ms=25, policy=policy) for policy in replicas)


def test_inception_on_eight_gpus() -> None:
    profiles = {"inception": INCEPTION}
    ours = mean_goodput(profiles, 8, 5, slo_ms=70)
    assert ours >= 930
    assert ours >= 1.08 * mean_goodput(profiles, 8, 5, slo_ms=70, policy="eager")


def test_few_requests_use_few_gpus() -> None:
    for seed in range(5):
        ours, eager = (
            simulate(ONE, 8, {"resnet": 0.3 * 5839}, slo_ms=25, policy=policy, seed=seed)
            for policy in ("symphony", "eager")
        )
        assert ours.bad < 0.01
        assert ours.gpus_touched <= 5
        assert ours.busy_gpus <= 0.4 * eager.busy_gpus


def test_overload_keeps_its_throughput() -> None:
    for seed in range(5):
        assert simulate(ONE, 8, {"resnet": 1.3 * 5875}, slo_ms=25, seconds=8, seed=seed).good_rate >= 5650
    # and this is what the window drop is for
    lost = simulate(ONE, 8, {"resnet": 1.3 * 5875}, slo_ms=25, seconds=4, policy="symphony-timeout")
    assert lost.good_rate < 1500


def test_throughput_does_not_decay_under_drops() -> None:
    found = simulate(ONE, 8, {"resnet": 1.3 * 5875}, slo_ms=25, seconds=60)
    rates = found.timeline(10)
    assert rates.min() >= 0.98 * rates.max()


def test_abandoned_requests_do_not_poison_later_ones() -> None:
    trace = np.sort(np.random.default_rng(0).uniform(0, 10, 40_000))
    found = simulate(
        ONE, 8, arrivals={"resnet": trace.tolist()}, slo_ms=25, seconds=10, abandon=0.8, abandon_after_ms=1
    )
    assert found.abandoned > 25_000
    assert found.bad < 0.01
    # abandoned ones take no GPU: what waits is served at the price of a fifth of the load
    assert found.busy_gpus < 0.5 * simulate(ONE, 8, arrivals={"resnet": trace.tolist()}, slo_ms=25).busy_gpus


def test_twenty_models() -> None:
    profiles = {f"m{n}": RESNET for n in range(20)}
    assert goodput(profiles, 8, slo_ms=25, seconds=6) >= goodput(profiles, 8, slo_ms=25, seconds=6, policy="eager")
    assert goodput(profiles, 32, slo_ms=25, seconds=6) >= 19_000


def random_setting(rng: np.random.Generator) -> tuple[dict[str, Profile], int, dict[str, object]]:
    models, gpus = int(rng.integers(1, 13)), int(rng.integers(1, 25))
    alpha = rng.uniform(0.2, 5)
    beta = alpha * rng.uniform(0.5, 20)
    scale = rng.uniform(0.5, 2, models)
    profiles = {f"m{n}": Profile.linear(alpha * s, beta * s, 32) for n, s in enumerate(scale)}
    slo = {name: float(s * (alpha + beta) * rng.uniform(2, 6)) for name, s in zip(profiles, scale, strict=True)}
    popularity = zipf(list(profiles), 1.0, float(rng.choice([0, 0.9, 1.5])))
    arrivals = str(rng.choice(["poisson", "poisson", "gamma:0.5"]))
    return profiles, gpus, {"slo_ms": slo, "popularity": popularity, "arrivals": arrivals}


@pytest.mark.parametrize("count", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_never_far_below_eager(count: int) -> None:
    rng = np.random.default_rng(2026)
    ratios = []
    for _ in range(count):
        profiles, gpus, options = random_setting(rng)
        ours, eager = (mean_goodput(profiles, gpus, 2, policy=p, **options) for p in ("symphony", "eager"))
        ratios.append(ours / eager)
    assert min(ratios) >= 0.97  # 0.98 is asked for; a goodput of two seeds is good to a percent
    assert statistics.mean(ratios) > 1.01


def test_bursts_are_told_from_poisson() -> None:
    for arrivals, better in (("gamma:0.1", "symphony-timeout"), ("poisson", "symphony")):
        auto, best = (
            mean_goodput(ONE, 8, 3, slo_ms=25, arrivals=arrivals, policy=policy)
            for policy in ("symphony-auto-drop", better)
        )
        assert auto >= 0.97 * best


def test_network_delay_is_planned_for() -> None:
    slow = simulate(ONE, 8, {"resnet": 3500}, slo_ms=25, network_ms=2, network_jitter_ms=1, margin_ms=1)
    assert slow.bad < 0.01
    blind = simulate(ONE, 8, {"resnet": 3500}, slo_ms=25, network_ms=2, network_jitter_ms=1)
    assert blind.late > 10 * slow.late


def test_how_many_gpus() -> None:
    needed = gpus_needed(ONE, {"resnet": 5000}, slo_ms=25)
    assert needed == 8
    assert gpus_needed(ONE, {"resnet": 5000}, slo_ms=6, most=16) is None


def test_results_are_drawn(tmp_path: object) -> None:
    found = simulate(ONE, 2, {"resnet": 500}, slo_ms=25, seconds=1)
    assert isinstance(found, Result)
    assert len(found.plot().axes) == 3


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"policy": "x"}, SchedulerError, "one of symphony"),
        ({"policy": "per_replica:0:1"}, SchedulerError, "a batch from 1"),
        ({"policy": "eager:1"}, SchedulerError, "no arguments"),
        ({"arrivals": "gamma:-1"}, LoadError, "gamma:SHAPE"),
        ({"rates": {"other": 1.0}}, LoadError, "got 'other'"),
        ({"rates": {"resnet": -1.0}}, LoadError, "from 0 to"),
        ({"arrivals": {"resnet": [float("nan")]}}, LoadError, "seconds from 0 on"),
        ({"slo_ms": {}}, SchedulerError, "got None for 'resnet'"),
        ({"gpus": 0}, SchedulerError, "at least 1, got 0"),
        ({"abandon": 2.0}, SchedulerError, "a share from 0 to 1"),
    ],
)
def test_refusals(options: dict[str, object], error: type[Exception], match: str) -> None:
    given = {"gpus": 1, "rates": {"resnet": 10.0}, "slo_ms": 25, "seconds": 1} | options
    with pytest.raises(error, match=match):
        simulate(ONE, **given)  # type: ignore[arg-type]
