"""Requests of a simulation: when they come, of which model, and who gives up waiting."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
# From a model's name to the seconds at which its requests come.
Trace = Mapping[str, Sequence[float]]


class LoadError(ValueError):
    """A load that cannot be generated."""


@dataclass(frozen=True)
class Load:
    """Arrivals in order: nanoseconds and the model's number."""

    arrival_ns: Numbers
    model: Numbers
    seconds: float


def zipf(models: Sequence[str], rate: float, exponent: float = 0.9) -> dict[str, float]:
    """A total rate shared by Zipf's law: the k-th model gets a share proportional to k ** -exponent."""
    weights = np.arange(1, len(models) + 1, dtype=float) ** -exponent
    return {name: float(share) for name, share in zip(models, rate * weights / weights.sum(), strict=True)}


def _shape(arrivals: str) -> float | None:
    """Shape of the gamma distribution of the gaps; None where they are all equal."""
    kind, _, argument = arrivals.partition(":")
    if arrivals == "constant":
        return None
    if arrivals == "poisson":
        return 1.0
    try:
        if kind == "gamma" and 0 < float(argument) < 1e6:
            return float(argument)
    except ValueError:
        pass
    raise LoadError(f"arrivals is poisson, constant, gamma:SHAPE with a shape above 0, or a trace, got {arrivals!r}")


def _gaps(rng: np.random.Generator, shape: float | None, seconds: float, rate: float) -> NDArray[np.float64]:
    """Arrival times at `rate` within `seconds`; a larger rate compresses the same gaps."""
    if shape is None:
        return np.asarray((np.arange(int(rate * seconds)) + rng.random()) / rate, dtype=np.float64)
    times = np.empty(0)
    last = 0.0
    while last < seconds * rate:
        more = last + np.cumsum(rng.gamma(shape, 1 / shape, 4096))
        times, last = np.concatenate([times, more]), float(more[-1])
    return np.asarray(times[times < seconds * rate] / rate, dtype=np.float64)


def generate(
    models: Sequence[str], rates: Mapping[str, float] | None, arrivals: str | Trace, seconds: float, seed: int
) -> Load:
    """Arrivals of all models, merged.

    Args:
        models: names; a model's number is its place.
        rates: requests/s by name; None with a trace.
        arrivals: "poisson", "constant", "gamma:SHAPE" (shape below 1: bursts), or a trace.
        seconds: length; of a trace, what comes later is left out.
        seed: the same seed gives the same gaps at any rate.

    Raises:
        LoadError: an unknown model, a rate that is not positive, a kind of arrivals that does not exist.
    """
    if not 0 < seconds < 1e6:
        raise LoadError(f"seconds is above 0 and below 10^6, got {seconds}")
    given = arrivals if not isinstance(arrivals, str) else (rates or {})
    unknown = set(given) - set(models)
    if unknown:
        raise LoadError(f"a load is for known models ({', '.join(models)}), got {min(unknown)!r}")
    times: list[NDArray[np.float64]] = []
    for number, name in enumerate(models):
        if not isinstance(arrivals, str):
            seen = np.sort(np.asarray(arrivals.get(name, ()), dtype=float))
            if not np.isfinite(seen).all() or (len(seen) and seen[0] < 0):
                raise LoadError(f"a trace holds seconds from 0 on, got {seen[0]} for {name!r}")
            times.append(seen[seen < seconds])
            continue
        rate = (rates or {}).get(name, 0.0)
        if not 0 <= rate < 1e9:
            raise LoadError(f"a rate is from 0 to 10^9 requests/s, got {rate} for {name!r}")
        shape = _shape(arrivals)
        rng = np.random.default_rng([seed, number])
        times.append(_gaps(rng, shape, seconds, rate) if rate else np.empty(0))
    model = np.concatenate([np.full(len(t), n, dtype=np.int64) for n, t in enumerate(times)])
    arrival = np.rint(np.concatenate(times) * 1e9).astype(np.int64)
    order = np.argsort(arrival, kind="stable")
    return Load(arrival[order], model[order], seconds)
