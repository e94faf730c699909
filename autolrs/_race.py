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
_LEAST_SEEN = 0.5
# ... or when its loss has risen above the start by this many times the best trial's gain, or this share of what the
# run has gained before.
_EXPLODED = 2.0
_RISEN = 0.5
# What is to be annealed rises first when the rate does. A faster trial is given up only when that is more than this share
# of what the run has gained before, or of what is left of the loss.
_DAMAGED = 0.1
# A climb's step, and the nearest two rates that are worth a trial each, in decades.
_RUNG, _APART = 0.5, 0.12
# Two trials are on the same path when, after the same sum of rates, they differ by at most this share of the drop.
_SAME_PATH = 0.2


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


Forecaster = Callable[[Sequence[float], Sequence[float], float], Forecast]


@dataclass(frozen=True)
class Rules:
    """How a stage is searched.

    Attributes:
        stage: index for the records.
        rate_at: (rate, kept step) -> the rate after warmup, proportional to the rate.
        forecaster: (steps, losses, horizon) -> forecast.
        fallback: least rate tried -> the rate to go on with when every trial diverged.
        fallen: how far the loss has fallen in the run so far; what a trial may rise is measured by it.
        left: loss at the search's start -> how far it can fall at most.
        begin: the present rate, where a climb begins: half a decade faster follows while that is better, slower ones only
            while none works, for short trials flatter small rates. None: the backend proposes.
        look: whether the first trial that works ends the climb, so that it only goes down.
        low: least rate of a climb.
        high: its greatest.
        tilt: standard deviations by which a faster trial may seem worse and still win: what follows is annealed, which
            takes the faster one's noise away.
        lean: loss at the search's start -> what a trial is forgiven for each decade that it is faster.
        halving: whether dominated trials stop early and trials inform each other.
        keep: whether the winner's steps are kept; else it starts again from the state before the search.
        report: called before each trial with its number, the most there will be, and its rate.
    """

    stage: int
    rate_at: Callable[[float, int], float]
    forecaster: Forecaster
    fallback: Callable[[float], float]
    fallen: float = 0.0
    left: Callable[[float], float] = lambda loss: math.inf
    begin: float | None = None
    look: bool = False
    low: float = 0.0
    high: float = math.inf
    tilt: float = 0.0
    lean: Callable[[float], float] = lambda loss: 0.0
    halving: bool = True
    keep: bool = True
    report: Callable[[int, int, float], None] = lambda trial, of, rate: None

    @property
    def climb(self) -> bool:
        """Whether faster rates than the present one are tried."""
        return self.begin is not None and not self.look

    def faster(self, rate: float) -> bool:
        """Whether `rate` is a climb's and above the present one."""
        return self.climb and self.begin is not None and rate > self.begin

    def damage(self, loss: float) -> float:
        """How far the loss may rise above the one at the search's start."""
        return _DAMAGED * min(self.fallen, self.left(loss))


def race(trials: Trials, backend: Backend, search: Search, rules: Rules) -> Outcome:
    """Runs one search.

    Args:
        trials: runs the steps.
        backend: proposes the rates.
        search: the search's plan.
        rules: how to search.

    Returns:
        The outcome; the state is the winner's end (or the one before the search).
    """
    records: list[TrialRecord] = []
    best: int | None = None
    while len(records) < search.candidates:
        best_steps = records[best].steps if best is not None and rules.keep else 0
        # Whichever loses, the next trial or the best one, its steps are thrown away.
        spent = sum(r.steps for r in records) - best_steps
        if records and spent + max(search.trial_steps, best_steps) > search.discards:
            break
        rate = trials.agree(backend.ask() if rules.begin is None else _rung(trials, rules, records, best))
        if rate is None:
            break
        rules.report(len(records) + 1, search.candidates, rate)
        records.append(_trial(trials, search, rules, rate, records, records[best] if best is not None else None))
        backend.tell(rate, records[-1].mean, records[-1].std)
        if rules.halving:
            _reconsider(trials, backend, search, rules, records)
        if records[-1].status == "finished" and trials.agree(
            best is None
            or (rules.look and _works(records[-1], rules))
            or _beats(records[-1], records[best], backend, rules)
        ):
            best = len(records) - 1
            if rules.keep:
                trials.keep()
    taken = sum(r.steps for r in records)
    if best is None:
        return Outcome(rules.fallback(min((r.rate for r in records), default=math.inf)), 0, tuple(records), taken)
    if not rules.keep:
        return Outcome(trials.agree(backend.best()), 0, tuple(records), taken)
    records[best] = replace(records[best], status="kept")
    return Outcome(records[best].rate, records[best].steps, tuple(records), taken - records[best].steps)


def _rung(trials: Trials, rules: Rules, records: Sequence[TrialRecord], best: int | None) -> float | None:
    """The climb's next rate; None at its end, where the best rate's neighbours are worse."""
    assert rules.begin is not None
    if not records:
        start = trials.restart().values
        # On a plateau the present rate does nothing, as the steps before the search have shown.
        rung = int(rules.climb and bool(start) and rules.lean(start[-1]) > 0.0)
    else:
        won = best == len(records) - 1
        works = best is not None and _works(records[best], rules)
        rungs = [round(math.log10(r.rate / rules.begin) / _RUNG) for r in records]
        if best is None or (won and not works):
            rung = min(rungs) - 1
        elif won and rules.climb and rungs[-1] == max(rungs):
            rung = rungs[-1] + 1
        else:
            return None
    rate = min(max(rules.begin * 10.0 ** (_RUNG * rung), rules.low), rules.high)
    return rate if all(abs(math.log10(rate / r.rate)) >= _APART for r in records) else None


def _works(record: TrialRecord, rules: Rules) -> bool:
    """Whether the loss falls and never comes back by half; once it had fallen, whether it is not damaged."""
    losses, first = record.losses, record.losses[0]
    if rules.look:
        least = min(losses)
        return least < first and max(losses[losses.index(least) :]) < (first + least) / 2
    risen = float(np.mean(losses[-max(len(losses) // 4, 1) :])) - first
    # the present rate may stay although it does a little harm
    return risen < (0.0 if rules.faster(record.rate) else rules.damage(first))


def _beats(new: TrialRecord, best: TrialRecord, backend: Backend, rules: Rules) -> bool:
    """Whether the new trial's posterior mean lies below the best one's, the faster one forgiven a little."""
    decades = math.log10(new.rate / best.rate)
    if rules.climb:  # what was measured on the same batches needs no smoothing
        (mean, std), (best_mean, best_std) = (new.mean, new.std), (best.mean, best.std)
        mean -= rules.lean(new.losses[0]) * decades
    elif hasattr(backend, "expected"):
        (mean, std), (best_mean, best_std) = backend.expected(new.rate), backend.expected(best.rate)
    else:
        return new.mean < best.mean
    # the surer of the two sets the measure: not knowing what a rate does is no merit of it
    forgiven = math.copysign(rules.tilt * min(std, best_std), decades)
    return bool(mean < best_mean + forgiven)


def _reconsider(trials: Trials, backend: Backend, search: Search, rules: Rules, records: list[TrialRecord]) -> None:
    """A fast trial shows slower ones what lies ahead of them: forecasts them again and tells the backend."""
    for index, record in enumerate(records[:-1]):
        if record.status == "diverged" or record.rate > records[-1].rate:
            continue
        steps = [s - record.start for s in record.loss_steps]
        told = trials.agree(_foreseen(search, rules, record.rate, steps, record.losses, records))
        if (told.mean, told.std) != (record.mean, record.std):
            records[index] = replace(record, mean=told.mean, std=told.std)
            if hasattr(backend, "expected"):  # the Gaussian process replaces what it was told of a rate
                backend.tell(record.rate, told.mean, told.std)


def _trial(
    trials: Trials, search: Search, rules: Rules, rate: float, records: list[TrialRecord], best: TrialRecord | None
) -> TrialRecord:
    first = trials.restart()
    steps, losses = list(first.steps), list(first.values)
    part = min(AGREE_EVERY, max(math.ceil(search.trial_steps / 4), 2))
    forgiven = rules.lean(losses[0]) * math.log10(rate / best.rate) if best is not None and losses else 0.0
    done, status = 0, "finished"
    prediction = Forecast(math.inf, math.inf)
    while done < search.trial_steps:
        count = min(part, search.trial_steps - done)
        new = trials.advance(
            [search.share(done + i) * rules.rate_at(rate, search.start + done + i) for i in range(count)]
        )
        done += count
        steps.extend(new.steps)
        losses.extend(new.values)
        if trials.agree(_diverged(losses, best, rules.fallen, ended=done == search.trial_steps)):
            status, prediction = "diverged", Forecast(math.inf, math.inf)
            break
        prediction = trials.agree(_foreseen(search, rules, rate, steps, losses, records))
        ripe = _LEAST_SEEN * search.trial_steps <= done < search.trial_steps
        if (
            rules.halving
            and ripe
            and trials.agree(
                losses[-1] - losses[0] > rules.damage(losses[0])
                if rules.faster(rate) or (search.decay > 0 and best is not None and rate > best.rate)
                else best is not None and _dominated(steps, losses, prediction, best, forgiven)
            )
        ):
            status = "stopped"
            break
    return TrialRecord(
        stage=rules.stage,
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


def _foreseen(
    search: Search,
    rules: Rules,
    rate: float,
    steps: Sequence[int],
    losses: Sequence[float],
    records: Sequence[TrialRecord],
) -> Forecast:
    """The trial's forecast from its own losses, followed by those of a faster trial on the same path.

    From one state and on the same batches a small rate walks the path of a larger one more slowly: after the same sum
    of rates both are at about the same loss, until the larger one's noise tells them apart. So the larger rate's losses,
    in the smaller one's time, show what its own few steps cannot. Used only as far as the two agree where both are known.
    """
    times, values = [float(s) for s in steps], [float(v) for v in losses]
    if search.decay:
        return replace(rules.forecaster(times, values, times[-1]), mean=values[-1])
    if rules.halving and len(values) >= 3:
        drop = values[0] - values[-1]
        faster = sorted((r for r in records if r.rate > 1.2 * rate and r.status != "diverged"), key=lambda r: r.rate)
        for record in faster:
            ahead = [(s - record.start) * record.rate / rate for s in record.loss_steps]
            there = float(np.interp(times[-1], ahead, record.losses))
            if drop > 0 and abs(there - values[-1]) <= _SAME_PATH * drop:
                # what it gives back is its own noise or instability, which a slower rate does not have
                end = len(ahead) if record.losses[-1] <= there else record.losses.index(min(record.losses)) + 1
                more = [(t, v) for t, v in zip(ahead[:end], record.losses[:end], strict=True) if t > times[-1]]
                times += [t for t, _ in more]
                values += [
                    v + (values[len(losses) - 1] - there) * math.exp(1.0 - t / times[len(losses) - 1]) for t, v in more
                ]
    return rules.forecaster(times, values, search.horizon - search.start)


def _diverged(losses: Sequence[float], best: TrialRecord | None, fallen: float, ended: bool) -> bool:
    """Non-finite, or far above the start with no sign of coming back before the trial's end."""
    if not all(math.isfinite(v) for v in losses):
        return True
    if len(losses) < 3:
        return False
    gain = max(losses[0] - min(losses), best.losses[0] - min(best.losses) if best else 0.0, 0.0)
    scale = max(_EXPLODED * gain, _RISEN * fallen) or abs(losses[0])
    recent = losses[-max(len(losses) // 4, 1) :]
    return min(recent) > losses[0] + scale and (ended or losses[-1] >= losses[-2])


def _dominated(
    steps: Sequence[int], losses: Sequence[float], forecast: Forecast, best: TrialRecord, forgiven: float
) -> bool:
    """Worse than the best trial, now and at the horizon."""
    if len(losses) < 3:
        return False
    recent = max(len(losses) // 3, 1)
    now = float(np.mean(losses[-recent:]))
    then = float(np.mean(np.interp(steps[-recent:], [s - best.start for s in best.loss_steps], best.losses)))
    gap = forecast.mean - best.mean - forgiven
    return now > then + forgiven and gap > _DOMINATED * math.hypot(forecast.std, best.std)
