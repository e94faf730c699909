"""The autoscaler and the allocation in simulation: the same core, GPUs that come and go."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainkit.serving.autoscaling._allocation import Allocation, Cluster
from trainkit.serving.autoscaling._autoscaler import Autoscaler
from trainkit.serving.scheduler import Profile
from trainkit.serving.simulation import Result, simulate
from trainkit.serving.simulation._load import Trace, generate
from trainkit.serving.simulation._simulate import FOREVER, collect, prepare

_BAD = (2, 3)


@dataclass(frozen=True)
class Scaled:
    """A run whose GPUs came and went.

    Attributes:
        result: of the requests.
        gpus: GPUs at the end of each window, those on their way included, [windows].
        window_s: seconds of a window.
    """

    result: Result
    gpus: NDArray[np.int64]
    window_s: float

    @property
    def gpu_seconds(self) -> float:
        """What is paid for: GPUs over time, from their order to their release."""
        return float(self.gpus.sum() * self.window_s)


def simulate_autoscaled(
    profiles: Mapping[str, Profile],
    autoscaler: Autoscaler,
    rates: Mapping[str, float] | None = None,
    *,
    slo_ms: float | Mapping[str, float],
    start_s: float = 0.0,
    window_s: float = 1.0,
    arrivals: str | Trace = "poisson",
    seconds: float = 60.0,
    seed: int = 0,
    **options: Any,
) -> Scaled:
    """Serve a load with as many GPUs as the autoscaler asks for.

    Args:
        profiles: by model.
        autoscaler: begins with its `least` GPUs.
        rates: as in `simulate`.
        slo_ms: as in `simulate`.
        start_s: seconds from the order of a GPU until it serves.
        window_s: seconds between two decisions.
        arrivals: as in `simulate`.
        seconds: length of the arrivals.
        seed: as in `simulate`.
        **options: of `simulate`.

    Raises:
        SchedulerError: as `simulate`.
        LoadError: as `simulate`.
    """
    load = generate(list(profiles), rates, arrivals, seconds, seed)
    there = set(range(autoscaler.least))
    run = prepare(profiles, len(there), load, slo_ms=slo_ms, policy="symphony", seed=seed, **options)
    coming: list[tuple[float, int]] = []  # when, which
    counts: list[int] = []
    ended = bad = 0
    busy = np.zeros(0)
    for window in range(1, int(np.ceil(seconds / window_s)) + 1):
        now = window * window_s
        for at, gpu in [one for one in coming if one[0] <= now]:
            run.until(round(at * 1e9))
            run.add_gpu(gpu)
            there.add(gpu)
        coming = [one for one in coming if one[0] > now]
        run.until(round(now * 1e9))
        fate = np.bincount(run.fate, minlength=5)
        ended_now, bad_now = int(fate[1:4].sum()), int(sum(fate[f] for f in _BAD))
        busy_now = run.busy
        touched = busy_now > np.pad(busy, (0, len(busy_now) - len(busy)))
        untouched = [gpu for gpu in there if not touched[gpu]]
        wanted = autoscaler.observe(
            now,
            len(there),
            starting=len(coming),
            answered=ended_now - ended,
            bad=bad_now - bad,
            untouched=len(untouched),
        )
        ended, bad, busy = ended_now, bad_now, busy_now
        taken = there | {gpu for _, gpu in coming}
        for _ in range(wanted - len(taken)):
            gpu = next(g for g in range(len(taken) + 1) if g not in taken)
            taken.add(gpu)
            coming.append((now + start_s, gpu))
        surplus = max(0, len(taken) - wanted)
        recalled = min(surplus, len(coming))
        coming = coming[: len(coming) - recalled]
        for gpu in sorted(untouched)[::-1][: surplus - recalled]:
            run.remove_gpu(gpu)
            there.discard(gpu)
        counts.append(wanted)
    run.until(FOREVER)
    return Scaled(collect(run, list(profiles), load), np.array(counts, dtype=np.int64), window_s)


def simulate_allocated(
    profiles: Mapping[str, Profile],
    allocation: Allocation,
    clusters: Sequence[Cluster],
    rates: Mapping[str, float],
    *,
    slo_ms: float | Mapping[str, float],
    **options: Any,
) -> list[Result]:
    """Each sub-cluster's result where its scheduler gets its share of the requests.

    Args:
        profiles: by model.
        allocation: the shares.
        clusters: as they were allocated.
        rates: requests/s by model, in all.
        slo_ms: as in `simulate`.
        **options: of `simulate`.
    """
    found = []
    for number, cluster in enumerate(clusters):
        here = {name: rates[name] * shares[number] for name, shares in allocation.shares.items() if shares[number] > 0}
        known = {name: profiles[name] for name in here} or dict(profiles)
        found.append(simulate(known, cluster.gpus, here, slo_ms=slo_ms, **options))
    return found
