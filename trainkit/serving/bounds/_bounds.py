"""Bounds on the rate that GPUs can serve within a latency objective, from the profile alone.

Notation: l(b) is the latency of a batch of b, N the number of GPUs, SLO the time from arrival to answer.
"""

from fractions import Fraction

from trainkit.serving.scheduler import Profile


def _nanoseconds(slo_ms: float) -> int:
    if not slo_ms > 0:
        raise ValueError(f"slo_ms is above 0, got {slo_ms}")
    return round(slo_ms * 1e6)


def _largest(profile: Profile, limit: Fraction) -> int:
    return sum(latency <= limit for latency in profile.latency_ns)


def _rate(profile: Profile, gpus: int, batch: int) -> float:
    return gpus * batch / profile.latency_ns[batch - 1] * 1e9 if batch else 0.0


def uncoordinated(profile: Profile, gpus: int, slo_ms: float) -> float:
    """Requests/s where each GPU forms its batches alone (Nexus): a request may just miss a batch, so 2 l(b) <= SLO."""
    return _rate(profile, gpus, _largest(profile, Fraction(_nanoseconds(slo_ms), 2)))


def staggered(profile: Profile, gpus: int, slo_ms: float) -> float:
    """Requests/s where the GPUs start one after another: a batch gathers for l(b) / N, so l(b) (1 + 1/N) <= SLO."""
    return _rate(profile, gpus, _largest(profile, Fraction(_nanoseconds(slo_ms) * gpus, gpus + 1)))


def fluid(profile: Profile, gpus: int, slo_ms: float, *, models: int = 1) -> float:
    """No scheduler serves more regular arrivals than this, whatever the number of equal models (requests/s).

    The oldest of a batch of b has waited at most SLO - l(b), in which 1 + rate (SLO - l(b)) requests of its model
    came; the GPUs' time for that is the bound. Arrivals that come in bursts stay below it.

    Args:
        profile: the models' common profile.
        gpus: equal GPUs.
        slo_ms: milliseconds from arrival to answer.
        models: models that share the rate equally.
    """
    slo = _nanoseconds(slo_ms) / 1e9
    seconds = [latency / 1e9 for latency in profile.latency_ns if latency / 1e9 <= slo]
    if not seconds:
        return 0.0

    def demand(rate: float) -> float:
        """GPUs that `rate` needs at least; the batch may be a fraction between two sizes of the table."""
        one = rate / models
        best = seconds[0]
        for size, latency in enumerate(seconds, 1):
            if size <= 1 + one * (slo - latency):
                best = min(best, latency / size)
                continue
            # the largest gathered batch lies between size - 1 and size on the table's line
            below = seconds[size - 2]
            slope = latency - below
            batch = min(size, (1 + one * (slo - below) + one * slope * (size - 1)) / (1 + one * slope))
            best = min(best, (below + slope * (batch - size + 1)) / batch)
            break
        return rate * best

    low, high = 0.0, gpus / min(latency / size for size, latency in enumerate(seconds, 1)) + 1
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if demand(middle) <= gpus else (low, middle)
    return low
