"""One stage's search: trials raced against the best so far, the winner's end state kept."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np

from trainkit.autolrs._forecast import Forecast
from trainkit.autolrs._history import TrialRecord
from trainkit.autolrs._plan import Search
from trainkit.autolrs._search import Backend

T = TypeVar("T")

# The ranks agree once in so many steps of a trial.
AGREE_EVERY = 16
# A trial is given up when its forecast is worse than the best one by this many standard deviations, and its loss too.
_DOMINATED = 1.0
# ... but not before this share of its steps: the first losses of a slow rate say little about its end.
_LEAST_SEEN = 0.25
# ... or when its loss has risen above the start by this many times the best trial's gain.
_EXPLODED = 2.0


@dataclass(frozen=True)
class Losses:
    """Search losses of a part of a trial: `values[i]` was measured after `steps[i]` steps of the trial."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


class Trials(Protocol):
    """What runs trials: a Trainer, a plain loop, a benchmark's closed form."""

    def restart(self) -> Losses:
        """Puts everything back to the state before the search; returns the losses at step 0, possibly none."""

    def advance(self, rates: Sequence[float]) -> Losses:
        """Takes one optimizer step per rate; the losses are those that all ranks agree on, nan if any rank's is."""

    def keep(self) -> None:
        """Remembers the state at the current trial's end as the best so far."""

    def agree(self, value: T) -> T:
        """Rank 0's value on every rank."""


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    Attributes:
        rate: chosen rate.
        kept: steps of the winner that are kept (0: the stage starts from the state before the search).
        trials: records, the winner's status "kept".
        discarded: steps thrown away.
    """

    rate: float
    kept: int
    trials: tuple[TrialRecord, ...]
    discarded: int


Forecaster = Callable[[Sequence[int], Sequence[float], int], Forecast]


def race(
    trials: Trials,
    backend: Backend,
    search: Search,
    *,
    stage: int,
    rate_at: Callable[[float, int], float],
    forecaster: Forecaster,
    fallback: Callable[[float], float],
    halving: bool = True,
    keep: bool = True,
    report: Callable[[int, int, float], None] = lambda trial, of, rate: None,
) -> Outcome:
    """Runs one search.

    Args:
        trials: runs the steps.
        backend: proposes the rates.
        search: its plan.
        stage: index for the records.
        rate_at: (rate, kept step) -> the rate after warmup.
        forecaster: (steps, losses, horizon) -> forecast.
        fallback: least rate tried -> the rate to go on with when every trial diverged.
        halving: whether dominated trials stop early.
        keep: whether the winner's steps are kept; else it starts again from the state before the search.
        report: called before each trial with its number, the most there will be, and its rate.

    Returns:
        The outcome; the state is the winner's end (or the one before the search).
    """
    records: list[TrialRecord] = []
    best: int | None = None
    while len(records) < search.candidates:
        spent = sum(r.steps for r in records) - (records[best].steps if best is not None and keep else 0)
        # Whichever loses, this trial or the best, its steps are thrown away.
        longest = max(search.trial_steps, records[best].steps if best is not None and keep else 0)
        if records and spent + longest > search.discards:
            break
        rate = trials.agree(backend.ask())
        report(len(records) + 1, search.candidates, rate)
        record = _trial(
            trials, search, stage, rate, rate_at, forecaster, records[best] if best is not None and halving else None
        )
        backend.tell(rate, record.mean, record.std)
        records.append(record)
        if record.status == "finished" and trials.agree(
            _beats(record, records[best] if best is not None else None, backend)
        ):
            best = len(records) - 1
            if keep:
                trials.keep()
    if best is None:
        lowest = min((r.rate for r in records), default=math.inf)
        return Outcome(fallback(lowest), 0, tuple(records), sum(r.steps for r in records))
    if not keep:
        return Outcome(trials.agree(backend.best()), 0, tuple(records), sum(r.steps for r in records))
    records[best] = replace(records[best], status="kept")
    discarded = sum(r.steps for r in records if r.status != "kept")
    return Outcome(records[best].rate, records[best].steps, tuple(records), discarded)


def _beats(new: TrialRecord, best: TrialRecord | None, backend: Backend) -> bool:
    """Whether the new trial's posterior mean lies below the best one's."""
    if best is None:
        return True
    expected = getattr(backend, "expected", None)
    if expected is None:
        return new.mean < best.mean
    return bool(expected(new.rate)[0] < expected(best.rate)[0])


def _trial(
    trials: Trials,
    search: Search,
    stage: int,
    rate: float,
    rate_at: Callable[[float, int], float],
    forecaster: Forecaster,
    best: TrialRecord | None,
) -> TrialRecord:
    first = trials.restart()
    steps, losses = list(first.steps), list(first.values)
    part = min(AGREE_EVERY, max(math.ceil(search.trial_steps / 4), 2))
    done, status = 0, "finished"
    prediction = Forecast(math.inf, math.inf)
    while done < search.trial_steps:
        count = min(part, search.trial_steps - done)
        new = trials.advance([rate_at(rate, search.start + done + i) for i in range(count)])
        done += count
        steps.extend(new.steps)
        losses.extend(new.values)
        if trials.agree(_diverged(losses, best)):
            status, prediction = "diverged", Forecast(math.inf, math.inf)
            break
        prediction = trials.agree(forecaster(steps, losses, search.horizon - search.start))
        if (
            best is not None
            and _LEAST_SEEN * search.trial_steps <= done < search.trial_steps
            and trials.agree(_dominated(steps, losses, prediction, best))
        ):
            status = "stopped"
            break
    return TrialRecord(
        stage=stage,
        rate=rate,
        start=search.start,
        steps=done,
        losses=tuple(losses),
        loss_steps=tuple(search.start + s for s in steps),
        horizon=search.horizon,
        mean=prediction.mean,
        std=prediction.std,
        status=status,  # type: ignore[arg-type]
    )


def _diverged(losses: Sequence[float], best: TrialRecord | None) -> bool:
    """Non-finite, or far above the start with no sign of coming back."""
    if not all(math.isfinite(v) for v in losses):
        return True
    if len(losses) < 3:
        return False
    gain = max(max(losses[0] - min(losses), 0.0), max(best.losses[0] - min(best.losses), 0.0) if best else 0.0)
    recent = losses[-max(len(losses) // 4, 1) :]
    scale = gain if gain > 0 else abs(losses[0])
    return min(recent) > losses[0] + _EXPLODED * scale and losses[-1] >= losses[-2]


def _dominated(steps: Sequence[int], losses: Sequence[float], forecast: Forecast, best: TrialRecord) -> bool:
    """Worse than the best trial, now and at the horizon."""
    if len(losses) < 3:
        return False
    recent = max(len(losses) // 3, 1)
    now = float(np.mean(losses[-recent:]))
    then = float(np.mean(np.interp(steps[-recent:], [s - best.start for s in best.loss_steps], best.losses)))
    gap = forecast.mean - best.mean
    return now > then and gap > _DOMINATED * math.hypot(forecast.std, best.std)
