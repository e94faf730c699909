"""One search's trials: from one state, on the same batches, the winner's end state kept."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np

from trainkit.autolrs._history import Status, TrialRecord
from trainkit.autolrs._law import AVERAGED
from trainkit.autolrs._plan import Search
from trainkit.autolrs.strategies import Strategy, Trial

T = TypeVar("T")

# The ranks agree once in so many steps of a trial.
AGREE_EVERY = 16
# A trial diverges when its loss has risen above the start by this many times the best trial's gain, or this share of what
# the run has gained before; so many times as much before it has ended, for a running average may come back.
_EXPLODED, _RISEN, _EARLY = 2.0, 0.5, 10.0
# Training losses are read as means of so many groups.
_GROUPS = 8


@dataclass(frozen=True)
class Losses:
    """Search losses of a part of a trial: `values[i]` was measured after `steps[i]` steps of the trial."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


class Trials(Protocol):
    """What runs trials: a Trainer, a plain loop, a benchmark's closed form."""

    averaged: bool
    """Whether losses are measured at a running average of the weights; else they are single training losses."""

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
        rate: chosen rate, or the one in force where none is better; None: no rate worked.
        committed: steps of the winner that are part of the run (0: the stage starts from the state before the search).
        trials: records, the winner's status "committed".
        discarded: steps thrown away.
        reason: why it ended.
        asked: rates that came from a model.
    """

    rate: float | None
    committed: int
    trials: tuple[TrialRecord, ...]
    discarded: int
    reason: str
    asked: int


@dataclass(frozen=True)
class Ground:
    """What trials of a search have in common.

    Attributes:
        stage: index for the records.
        rate_at: (rate, committed step) -> the rate after warmup.
        done: S1 of the run so far.
        fallen: how far the loss has fallen in the run so far.
        report: called before each trial with its number, the most there will be, and its rate.
    """

    stage: int
    rate_at: Callable[[float, int], float]
    done: float = 0.0
    fallen: float = 0.0
    report: Callable[[int, int, float], None] = lambda trial, of, rate: None


def race(trials: Trials, strategy: Strategy, search: Search, ground: Ground) -> Outcome:
    """Runs one search.

    Args:
        trials: runs the steps.
        strategy: proposes, stops and chooses.
        search: the search's plan.
        ground: what the trials have in common.

    Returns:
        The outcome; the state is the winner's end (or the one before the search).
    """
    run: list[tuple[Trial, TrialRecord]] = []
    saved: int | None = None
    reason = "as many rates were tried as it may try"
    start = trials.restart().values
    strategy.begin(trials.agree(start[-1] if start else None))
    while len(run) < search.candidates:
        best_steps = run[saved][0].taken if saved is not None else 0
        # Whichever loses, the next trial or the best one, its steps are thrown away.
        spent = sum(trial.taken for trial, _ in run) - best_steps
        if run and spent + max(search.trial_steps, best_steps) > search.discards:
            reason = "no more steps may be discarded"
            break
        rate = trials.agree(strategy.propose())
        if rate is None:
            reason = strategy.reason
            break
        ground.report(len(run) + 1, search.candidates, rate)
        run.append(_trial(trials, strategy, search, ground, rate, [trial for trial, _ in run]))
        strategy.observe(run[-1][0])
        if strategy.keeps and trials.agree(strategy.choose()) == len(run) - 1:
            trials.keep()
            saved = len(run) - 1
    best = trials.agree(strategy.choose())
    records = []
    for i, (trial, record) in enumerate(run):
        found = trials.agree(strategy.forecast(i))
        status: Status = "committed" if i == best == saved else record.status
        records.append(replace(record, mean=found.mean, std=found.std, status=status))
        assert trial.taken == record.steps
    committed = run[best][0].taken if best is not None and best == saved else 0
    taken = sum(trial.taken for trial, _ in run)
    rate = strategy.fallback if best is None else run[best][0].rate
    return Outcome(rate, committed, tuple(records), taken - committed, reason, strategy.asked)


def _trial(
    trials: Trials, strategy: Strategy, search: Search, ground: Ground, rate: float, before: Sequence[Trial]
) -> tuple[Trial, TrialRecord]:
    first = trials.restart()
    steps, losses = list(first.steps), list(first.values)
    used: list[float] = []
    part = min(AGREE_EVERY, max(math.ceil(search.trial_steps / 4), 2))
    while True:
        count = min(part, search.trial_steps - len(used))
        rates = [ground.rate_at(rate, search.start + len(used) + i) for i in range(count)]
        new = trials.advance(rates)
        used += rates
        steps.extend(new.steps)
        losses.extend(new.values)
        ended = len(used) == search.trial_steps
        diverged = trials.agree(_diverged(losses, before, ground.fallen, ended))
        trial = _read(rate, used, steps, losses, ground.done, trials.averaged, ended, diverged)
        if diverged or ended or trials.agree(strategy.stop(trial)):
            break
    status: Status = "diverged" if diverged else "finished" if ended else "stopped"
    record = TrialRecord(
        stage=ground.stage,
        rate=rate,
        start=search.start,
        steps=len(used),
        losses=tuple(losses),
        loss_steps=tuple(search.start + s for s in steps),
        horizon=search.horizon,
        mean=math.inf,
        std=math.inf,
        status=status,
    )
    return trial, record


def _read(
    rate: float,
    used: Sequence[float],
    steps: Sequence[int],
    losses: Sequence[float],
    done: float,
    averaged: bool,
    ended: bool,
    diverged: bool,
) -> Trial:
    """A trial as a strategy sees it: losses with the sums of rates at which they were measured."""
    times, values = list(steps), [float(v) for v in losses]
    if not averaged and len(values) > _GROUPS and not diverged:
        groups = np.array_split(np.arange(len(values)), _GROUPS)
        times = [int(np.mean([times[i] for i in g])) for g in groups]
        values = [float(np.mean([values[i] for i in g])) for g in groups]
    sums = np.concatenate([[0.0], np.cumsum(used)])
    share = AVERAGED if averaged else 1.0
    clock = tuple(done + share * float(sums[min(t, len(used))]) for t in times)
    return Trial(rate, len(used), tuple(times), tuple(values), clock, ended, diverged)


def _diverged(losses: Sequence[float], before: Sequence[Trial], fallen: float, ended: bool) -> bool:
    """Non-finite, or far above the start: at the trial's end without a sign of coming back, before it very far."""
    if not all(math.isfinite(v) for v in losses):
        return True
    if len(losses) < 3:
        return False
    gains = [t.losses[0] - min(t.losses) for t in before if not t.diverged and t.losses]
    gain = max([losses[0] - min(losses), *gains, 0.0])
    scale = max(_EXPLODED * gain, _RISEN * fallen) or abs(losses[0])
    recent = losses[-max(len(losses) // 4, 1) :]
    return min(recent) > losses[0] + scale * (1.0 if ended else _EARLY)
