"""Discrete-event simulation of a pool of GPUs under a scheduling policy."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from trainkit.serving.scheduler import Profile, SchedulerError
from trainkit.serving.simulation._load import Load, Trace, generate
from trainkit.serving.simulation._policies import Setting, start
from trainkit.serving.simulation._result import Result

FOREVER = 2**63 - 1


def objectives(profiles: Mapping[str, Profile], slo_ms: float | Mapping[str, float]) -> dict[str, int]:
    """Each model's objective in nanoseconds.

    Raises:
        SchedulerError: a model has none, or one that is not positive.
    """
    found = {}
    for name in profiles:
        value = slo_ms.get(name) if isinstance(slo_ms, Mapping) else slo_ms
        if value is None or not 0 < value < 1e9:
            raise SchedulerError(f"slo_ms is above 0 for every model, got {value} for {name!r}")
        found[name] = round(value * 1e6)
    return found


def simulate(
    profiles: Mapping[str, Profile],
    gpus: int,
    rates: Mapping[str, float] | None = None,
    *,
    slo_ms: float | Mapping[str, float],
    policy: str = "symphony",
    arrivals: str | Trace = "poisson",
    seconds: float = 10.0,
    seed: int = 0,
    network_ms: float = 0.0,
    network_jitter_ms: float = 0.0,
    margin_ms: float = 0.0,
    abandon: float = 0.0,
    abandon_after_ms: float = 0.0,
) -> Result:
    """Serve a load on paper: the same core as the server's, driven by simulated time.

    Args:
        profiles: by model.
        gpus: equal GPUs.
        rates: requests/s by model; not needed with a trace.
        slo_ms: milliseconds from arrival to answer, one for all or by model.
        policy: "symphony", its variants ("symphony-timeout", "symphony-auto-drop", "deferred", "demand"), "eager"
            (central, timeout drop), "eager-window", "per_replica:BATCH:WAIT_MS" (Ray Serve, LitServe), "bentoml",
            "clockwork", "nexus", "shepherd" (the last four as published).
        arrivals: "poisson", "constant", "gamma:SHAPE" or seconds by model.
        seconds: length of the arrivals; the run ends when all are answered.
        seed: of arrivals, jitter and abandonment.
        network_ms: what the way to a GPU and back adds to each batch, which the scheduler knows.
        network_jitter_ms: at most this much more, uniform, which it does not know.
        margin_ms: the scheduler aims this much before each deadline.
        abandon: share of the requests whose clients hang up ...
        abandon_after_ms: ... after this long.

    Returns:
        Every request done, late, dropped or abandoned.

    Raises:
        SchedulerError: the policy, an objective or a share is refused.
        LoadError: the load is refused.
    """
    load = generate(list(profiles), rates, arrivals, seconds, seed)
    run = prepare(
        profiles,
        gpus,
        load,
        slo_ms=slo_ms,
        policy=policy,
        seed=seed,
        network_ms=network_ms,
        network_jitter_ms=network_jitter_ms,
        margin_ms=margin_ms,
        abandon=abandon,
        abandon_after_ms=abandon_after_ms,
    )
    run.until(FOREVER)
    return collect(run, list(profiles), load)


def prepare(
    profiles: Mapping[str, Profile],
    gpus: int,
    load: Load,
    *,
    slo_ms: float | Mapping[str, float],
    policy: str,
    seed: int,
    network_ms: float = 0.0,
    network_jitter_ms: float = 0.0,
    margin_ms: float = 0.0,
    abandon: float = 0.0,
    abandon_after_ms: float = 0.0,
) -> Any:
    """A native run with its load, before its first event."""
    if gpus < 1:
        raise SchedulerError(f"gpus is at least 1, got {gpus}")
    delays = {"network_ms": network_ms, "network_jitter_ms": network_jitter_ms, "margin_ms": margin_ms}
    delays |= {"abandon_after_ms": abandon_after_ms}
    for name, value in delays.items():
        if not 0 <= value < 1e6:
            raise SchedulerError(f"{name} is from 0 to 10^6 ms, got {value}")
    if not 0 <= abandon <= 1:
        raise SchedulerError(f"abandon is a share from 0 to 1, got {abandon}")
    slo_ns = objectives(profiles, slo_ms)
    network = round(network_ms * 1e6)
    counts = np.bincount(load.model, minlength=len(profiles)) / load.seconds
    setting = Setting(
        profiles,
        gpus,
        dict(zip(profiles, counts.tolist(), strict=True)),
        slo_ns,
        [[latency + network for latency in profile.latency_ns] for profile in profiles.values()],
        jitter_ns=0,
    )
    run = start(policy, setting)
    due = load.arrival_ns + np.array(list(slo_ns.values()), dtype=np.int64)[load.model]
    impatient = np.flatnonzero(np.random.default_rng([seed, 10**6]).random(len(due)) < abandon).astype(np.int64)
    run.load(
        load.arrival_ns,
        due - round(margin_ms * 1e6),
        due,
        load.model,
        load.arrival_ns[impatient] + round(abandon_after_ms * 1e6),
        impatient,
        network,
        round(network_jitter_ms * 1e6),
        seed,
    )
    return run


def collect(run: Any, models: list[str], load: Load) -> Result:
    """The result of a native run."""
    return Result(
        models,
        load.seconds,
        load.model,
        load.arrival_ns,
        run.answered,
        run.fate,
        run.busy / 1e9,
        run.batches_by_size,
        run.preempted,
    )
