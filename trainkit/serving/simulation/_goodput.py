"""The highest rate that is served with few enough bad answers, and the fewest GPUs for a rate."""

from collections.abc import Callable, Mapping
from typing import Any

from trainkit.serving.scheduler import Profile, SchedulerError
from trainkit.serving.simulation._simulate import objectives, simulate


def goodput(
    profiles: Mapping[str, Profile],
    gpus: int,
    *,
    slo_ms: float | Mapping[str, float],
    policy: str = "symphony",
    arrivals: str = "poisson",
    seconds: float = 10.0,
    seed: int = 0,
    bad: float = 0.01,
    popularity: Mapping[str, float] | None = None,
    tolerance: float = 0.002,
    **options: Any,
) -> float:
    """The highest total rate (requests/s) at which at most `bad` of the requests are late or dropped.

    Args:
        profiles: by model.
        gpus: equal GPUs.
        slo_ms: as in `simulate`.
        policy: as in `simulate`.
        arrivals: as in `simulate`, but no trace: its rate is what is searched for.
        seconds: simulated at each rate.
        seed: as in `simulate`.
        bad: largest share of late and dropped requests.
        popularity: each model's share of the rate; None: equal shares.
        tolerance: relative width at which the bisection ends.
        **options: of `simulate`.

    Raises:
        SchedulerError: as `simulate`; or no model is popular.
    """
    weights = {name: (1.0 if popularity is None else popularity.get(name, 0.0)) for name in profiles}
    if min(weights.values(), default=0) < 0 or not sum(weights.values()) > 0:
        raise SchedulerError(f"popularity is shares from 0 on that are not all 0, got {popularity}")
    shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    slo_ns = objectives(profiles, slo_ms)
    # seconds of GPU a request costs at best: no rate above gpus / cost can be served
    cost = 0.0
    for name, profile in profiles.items():
        sizes = [latency / size for size, latency in enumerate(profile.latency_ns, 1) if latency <= slo_ns[name]]
        if not sizes and shares[name] > bad:
            return 0.0
        cost += shares[name] * min(sizes, default=0.0) / 1e9

    def passes(rate: float) -> bool:
        rates = {name: rate * share for name, share in shares.items()}
        found = simulate(
            profiles,
            gpus,
            rates,
            slo_ms=slo_ms,
            policy=policy,
            arrivals=arrivals,
            seconds=seconds,
            seed=seed,
            **options,
        )
        return found.bad <= bad

    return _bisect(passes, 0.0, 1.05 * gpus / cost, tolerance)


def _bisect(passes: Callable[[float], bool], low: float, high: float, tolerance: float) -> float:
    """The largest value found to pass, within `tolerance`, above `low`, which passes."""
    while high - low > tolerance * high:
        middle = (low + high) / 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low


def gpus_needed(
    profiles: Mapping[str, Profile],
    rates: Mapping[str, float] | None = None,
    *,
    slo_ms: float | Mapping[str, float],
    most: int = 4096,
    bad: float = 0.01,
    **options: Any,
) -> int | None:
    """The fewest GPUs on which at most `bad` of the requests are late or dropped; None if `most` do not do.

    Args:
        profiles: by model.
        rates: requests/s by model; not needed with a trace.
        slo_ms: as in `simulate`.
        most: GPUs to consider.
        bad: largest share of late and dropped requests.
        **options: of `simulate`.
    """

    def passes(gpus: int) -> bool:
        return simulate(profiles, gpus, rates, slo_ms=slo_ms, **options).bad <= bad

    low, high = 0, 1
    while not passes(high):
        if high >= most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high
