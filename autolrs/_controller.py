"""What the callback and the tuner share: plan, searches, rates of the committed steps, the record, resume."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from trainkit.autolrs._belief import Observed
from trainkit.autolrs._forecast import forecast
from trainkit.autolrs._history import History, SearchRecord, StageRecord, TrialRecord
from trainkit.autolrs._law import AVERAGED
from trainkit.autolrs._options import Options
from trainkit.autolrs._plan import Plan, Search, plan
from trainkit.autolrs._prior import Prior, default_prior
from trainkit.autolrs._race import Ground, Outcome, Trials, race
from trainkit.autolrs._schedule import LRSchedule, Piece, group_ratios, known_rate
from trainkit.autolrs._search import Backend, LRSearch
from trainkit.autolrs._skopt import SkoptSearch
from trainkit.autolrs.strategies import Bayesian, Forecasting, Paper, Situation, Strategy

_VERSION = 2


class Controller:
    """Keeps plan, record and resume; it runs no step itself.

    Args:
        options: those of AutoLRS or Tuner.
        prior: constants of the Bayesian strategy; None: those fitted on the whole library.

    Raises:
        ValueError: an option breaks its rule.
    """

    def __init__(self, options: Options, prior: Prior | None = None) -> None:
        options.check()
        self.options = options
        self._prior = prior or default_prior()
        self.plan: Plan | None = None
        self.ratios: tuple[float, ...] = (1.0,)
        self.kept = 0
        self._record = History()
        self._schedule: LRSchedule | None = None
        self._default = math.sqrt(options.low * options.high)
        self._next = 0
        self._usual: float | None = None
        self._backend = self._make_backend()

    def _make_backend(self) -> Backend:
        """What asks for rates where trials are forecast one by one: stages of a given length, scikit-optimize, the paper."""
        o = self.options
        if o.backend == "skopt" or o.preset == "paper":
            return SkoptSearch(o.low, o.high, o.seed)
        return LRSearch(o.low, o.high, o.seed)

    @property
    def bayesian(self) -> bool:
        """Whether searches are the default's: by forecasts of the run's end."""
        return self.options.preset == "default" and self.options.backend == "gp" and self.options.stage_steps is None

    def begin(self, total: int, optimizer: torch.optim.Optimizer) -> bool:
        """Plans the run unless a checkpoint brought its plan.

        Args:
            total: steps of the run, in the sense of `count`.
            optimizer: its default rates set the groups' ratios; the greatest of them is the user's own rate, and the
                class's usual one is tried, too.

        Returns:
            Whether the run is long enough to search.

        Raises:
            ValueError: the checkpoint's run had another length.
        """
        if self.plan is None:
            if not all(isinstance(g["lr"], int | float | torch.Tensor) for g in optimizer.param_groups):
                raise ValueError(
                    f"AutoLRS sets every group's rate, but {type(optimizer).__name__} has lr=None and makes its own: give it "
                    "a number (and relative_step=False)"
                )
            self.ratios = tuple(group_ratios(optimizer))
            self._default = max(float(g.get("initial_lr", g["lr"])) for g in optimizer.param_groups)
            self._usual = known_rate(optimizer)
            self.plan = plan(self.options, total)
            self._backend = self._make_backend()
            self._schedule = None
        elif self.plan.total != total:
            raise ValueError(
                f"a resumed run must have the length it was planned for, but got {total} steps instead of "
                f"{self.plan.total}: the annealed end depends on it; give the old max_steps or start anew"
            )
        return bool(self.plan.searches)

    @property
    def kept_total(self) -> int:
        """Committed steps of the whole run, as far as is known: with count="all" each discarded step shortens it."""
        assert self.plan is not None
        return self.plan.total - (self._record.discarded_steps if self.options.count == "all" else 0)

    @property
    def next_start(self) -> int | None:
        """Committed step of the next search, None when all are done."""
        if self.plan is None or self._next >= len(self.plan.searches):
            return None
        return self.plan.searches[self._next].start

    def due(self, step: int) -> Search | None:
        """The search to run before committed step `step`, if any.

        With count="all" the plan was made for the most that searches may discard; what they saved lengthens stages.
        """
        while (start := self.next_start) is not None and start <= step:
            assert self.plan is not None
            search = self.plan.searches[self._next]
            horizon = max(min(search.horizon, self.kept_total), step + search.trial_steps)
            if self.options.stage_steps is None and self.options.preset == "default":
                horizon = self.kept_total
            left = self.plan.discards - self._record.discarded_steps
            found = replace(search, start=step, horizon=horizon, discards=min(search.discards, left))
            if step + search.trial_steps > self.kept_total:
                self._pass(found, "the run ends too soon")
            else:
                return found
        return None

    def search(self, search: Search, trials: Trials, report: Callable[[str], None] = lambda text: None) -> Outcome:
        """Runs a due search; afterwards `rate` knows its choice.

        Args:
            search: from `due`.
            trials: runs the steps.
            report: told what is going on, in a few words.
        """
        stage, began, ran = self._next, time.monotonic(), [0.0]

        def told(trial: int, of: int, rate: float) -> None:
            report(f"stage {stage + 1} trial {trial}/{of} lr {rate:.1e}")

        ground = Ground(
            stage, lambda rate, step: rate * self.schedule.warmup(step), self._done(search.start), self._fallen(), told
        )
        strategy = self._strategy(search)
        outcome = race(_Timed(trials, ran), strategy, search, ground)
        rate = self._harmless(outcome) if outcome.rate is None else outcome.rate
        if not self.bayesian:
            self._backend.next_stage(outcome.rate)
        self._next += 1
        before = self._record
        stages = [*before.stages] or [StageRecord(0, search.start, self._safe, False)][: search.start]
        if stages:
            stages[-1] = replace(stages[-1], steps=search.start - stages[-1].start)
        end = self.next_start or self.kept_total
        stages.append(StageRecord(search.start, max(end - search.start, 1), rate, False))
        chosen = next((t for t in outcome.trials if t.rate == outcome.rate and t.status == "committed"), None)
        critical = strategy.critical if isinstance(strategy, Bayesian) else None
        record = SearchRecord(
            stage=stage,
            start=search.start,
            rate=rate,
            mean=chosen.mean if chosen else math.inf,
            std=chosen.std if chosen else math.inf,
            trials=len(outcome.trials),
            discarded=outcome.discarded,
            asked=outcome.asked,
            critical=(critical.log_rate, critical.std) if critical else None,
            seen=tuple((o.log_rate, o.worked, o.diverged) for o in strategy.observed)
            if isinstance(strategy, Bayesian)
            else (),
            reason=outcome.reason if outcome.rate is not None else "no rate worked: a safe one goes on",
        )
        seconds = time.monotonic() - began
        self._record = replace(
            before,
            stages=tuple(stages),
            searches=(*before.searches, record),
            trials=(*before.trials, *outcome.trials),
            discarded_steps=before.discarded_steps + outcome.discarded,
            search_seconds=before.search_seconds + seconds,
            decision_seconds=before.decision_seconds + seconds - ran[0],
        )
        self._settle()
        return outcome

    def summary(self) -> str:
        """What the last search found, in one line."""
        s = self._record.searches[-1]
        band = f", forecast loss {s.mean:.4g} +- {s.std:.2g}" if math.isfinite(s.mean) else ""
        return (
            f"AutoLRS: rate {s.rate:.2e} from step {s.start}{band}, {s.trials} trials, {s.discarded} steps discarded; "
            f"it ended because {s.reason}"
        )

    def note_forwards(self, forwards: int) -> None:
        """Counts forward passes that only measured search losses."""
        self._record = replace(self._record, extra_forwards=self._record.extra_forwards + forwards)

    @property
    def history(self) -> History:
        """Record of the run so far."""
        return replace(self._record, kept_steps=self.kept)

    def rate(self, step: int) -> float:
        """The rate of committed step `step`, warmup included, before the groups' ratios."""
        return self.schedule.rate(step)

    @property
    def schedule(self) -> LRSchedule:
        """Rates of the committed steps, as far as they are decided."""
        if self._schedule is None:
            self._schedule = self._make_schedule()
        return self._schedule

    def follow_groups(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Takes in parameter groups that were added since the start: their rate over the one in force is their ratio."""
        rate = self.rate(step)
        added = [float(g["lr"]) for g in optimizer.param_groups[len(self.ratios) :]]
        self.ratios = (*self.ratios, *(lr / rate if rate > 0.0 else 1.0 for lr in added))[: len(optimizer.param_groups)]
        self._schedule = None

    # -- searches

    def _strategy(self, search: Search) -> Strategy:
        if self.bayesian:
            return self._bayesian(search)
        steps, horizon = search.trial_steps, search.horizon - search.start
        if self.options.preset == "paper":
            return Paper(self._backend, horizon)
        floor = 0.0 if self._positive else None
        return Forecasting(
            self._backend,
            lambda at, losses, to: forecast(
                losses, to, steps=at, floor=None if any(v < 0.0 for v in losses) else floor
            ),
            steps,
            horizon,
        )

    def _bayesian(self, search: Search) -> Bayesian:
        o, end = self.options, self.kept_total
        assert self.plan is not None
        annealed = max(self.plan.anneal_start(end, search.start), search.start)
        situation = Situation(
            first=search.start == 0,
            done=self._done(search.start),
            began=self._began(),
            best=self._best(),
            ahead=annealed - search.start + (end - annealed) / 2.0,
            left=end - search.start,
            until=(self.plan.searches[1].start if search.start == 0 and len(self.plan.searches) > 1 else end)
            - search.start,
            trial_steps=search.trial_steps,
            present=self._present,
            usual=None if self._usual is None else min(max(self._usual, o.low), o.high),
            user=self._safe,
        )
        seen = []
        for past in self._record.searches:
            longer = math.log((search.start + search.trial_steps) / (past.start + search.trial_steps))
            blur = self._prior.drift * math.sqrt(max(longer, 0.0))
            seen += [
                Observed(x, bool(worked), bool(diverged), blur, past.start == 0) for x, worked, diverged in past.seen
            ]
        return Bayesian(self._prior, situation, seen, self._measured(), o.low, o.high, self._positive)

    def _harmless(self, outcome: Outcome) -> float:
        """The rate to go on with when none worked: the user's own, or half a decade below every one that failed."""
        failed = min((t.rate for t in outcome.trials), default=math.inf)
        own = self._default
        return min(own, max(failed / math.sqrt(10.0), self.options.low)) if failed <= own else own

    def _pass(self, search: Search, reason: str) -> None:
        """Notes a search that is not held."""
        seen = [s for s in self._record.searches if s.critical is not None]
        record = SearchRecord(
            stage=self._next,
            start=search.start,
            rate=self._present,
            mean=math.inf,
            std=math.inf,
            trials=0,
            discarded=0,
            asked=int(self.bayesian),
            critical=seen[-1].critical if seen else None,
            seen=(),
            reason=reason,
        )
        self._record = replace(self._record, searches=(*self._record.searches, record))
        self._next += 1
        self._settle()

    @property
    def _safe(self) -> float:
        """The user's own rate, drawn into the range."""
        return min(max(self._default, self.options.low), self.options.high)

    @property
    def _present(self) -> float:
        """The rate of the steps before a search."""
        return self._record.stages[-1].rate if self._record.stages else self._safe

    def _sums(self, until: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """[until + 1] S1 before each committed step."""
        rates = [self.schedule.rate(step) for step in range(until)] if until else []
        return np.concatenate([[0.0], np.cumsum(rates)])

    def _done(self, step: int) -> float:
        return float(self._sums(step)[-1])

    def _measured(self) -> list[tuple[float, float]]:
        """(S1, loss) along the committed trials, where losses were measured at averaged weights."""
        found = []
        for record in self._record.trials:
            ended = record.start + record.steps
            if record.status == "committed" and record.loss_steps and record.loss_steps[-1] == ended:
                sums = self._sums(ended)
                for at, loss in zip(record.loss_steps, record.losses, strict=True):
                    found.append((float(sums[record.start] + AVERAGED * (sums[at] - sums[record.start])), loss))
        return found

    @property
    def _positive(self) -> bool:
        """Cross entropies and squared errors end at 0; a loss that was ever negative has no such floor."""
        return not any(v < 0.0 for record in self._record.trials for v in record.losses)

    def _fallen(self) -> float:
        """How far the search loss has fallen in the committed trials, from the run's start."""
        kept = [record.losses for record in self._record.trials if record.status == "committed" and record.losses]
        return max(kept[0][0] - min(losses[-1] for losses in kept), 0.0) if kept else 0.0

    def _began(self) -> float:
        """Search loss at the run's start; inf before it was measured."""
        return next((_ends(t)[0] for t in self._record.trials if t.start == 0 and t.losses), math.inf)

    def _best(self) -> float:
        """Search loss at the end of the last committed trial."""
        return next((_ends(t)[1] for t in reversed(self._record.trials) if t.status == "committed"), math.inf)

    # -- schedule

    def _make_schedule(self) -> LRSchedule:
        if self.plan is None:
            return LRSchedule(())
        own = self._safe if self.plan.searches else self._default
        stages = self._record.stages or (StageRecord(0, self.kept_total, own, False),)
        if self._next >= len(self.plan.searches) and not stages[-1].anneal:
            stages = self._with_anneal(stages)
        pieces = [Piece(s.start, s.steps, s.rate, 0.0 if s.anneal else s.rate) for s in stages]
        return LRSchedule(pieces, self.plan.warmup_steps, self.ratios)

    def _with_anneal(self, stages: tuple[StageRecord, ...]) -> tuple[StageRecord, ...]:
        assert self.plan is not None
        last, end = stages[-1], self.kept_total
        committed = [t.start + t.steps for t in self._record.trials if t.status == "committed"]
        start = max(self.plan.anneal_start(end, max(committed, default=0)), last.start)
        flat = replace(last, steps=start - last.start)
        tail = (StageRecord(start, end - start, last.rate, True),) if start < end else ()
        return (*stages[:-1], flat, *tail)

    def _settle(self) -> None:
        """After the last search the end is known: the annealed part becomes a stage of its own."""
        assert self.plan is not None
        stages = self._record.stages
        if self._next >= len(self.plan.searches) and stages:
            self._record = replace(self._record, stages=self._with_anneal(stages))
        elif stages:
            end = self.next_start or self.kept_total
            stages = (*stages[:-1], replace(stages[-1], steps=max(end - stages[-1].start, 1)))
            self._record = replace(self._record, stages=stages)
        self._schedule = None

    # -- resume

    def state_dict(self) -> dict[str, Any]:
        """Plain values only: loads with `weights_only`."""
        return {
            "version": _VERSION,
            "options": asdict(self.options),
            "total": self.plan.total if self.plan else None,
            "ratios": list(self.ratios),
            "default": self._default,
            "usual": self._usual,
            "next": self._next,
            "history": self.history.as_dict(),
            "backend": self._backend.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back `state_dict`'s result.

        Raises:
            ValueError: it is another version's, or was made with other arguments.
        """
        if state.get("version") != _VERSION:
            raise ValueError(
                f"AutoLRS reads state version {_VERSION}, but the checkpoint has {state.get('version')!r}: resume it "
                "with the release that wrote it, or start anew"
            )
        mine, theirs = asdict(self.options), state["options"]
        changed = [f"{k}={theirs.get(k)!r} is now {v!r}" for k, v in mine.items() if theirs.get(k) != v]
        if changed:
            raise ValueError(
                f"a resumed search needs the arguments it began with, but {', '.join(changed)}: restore them"
            )
        self.ratios, self._default, self._usual = tuple(state["ratios"]), state["default"], state["usual"]
        total = state["total"]
        self.plan = None if total is None else plan(self.options, total)
        self._next = int(state["next"])
        self._record = History.from_dict(state["history"])
        self.kept, self._schedule = self._record.kept_steps, None
        self._backend = self._make_backend()
        self._backend.load_state_dict(state["backend"])


def _ends(trial: TrialRecord) -> tuple[float, float]:
    """A trial's first and last loss; of single training losses, means of an eighth of them."""
    measured = trial.loss_steps[-1] == trial.start + trial.steps
    part = 1 if measured else max(len(trial.losses) // 8, 1)
    return float(np.mean(trial.losses[:part])), float(np.mean(trial.losses[-part:]))


class _Timed:
    """Trials with a clock: how long they themselves took."""

    def __init__(self, trials: Trials, seconds: list[float]) -> None:
        self._trials, self._seconds = trials, seconds
        self.averaged, self.agree = trials.averaged, trials.agree

    def restart(self) -> Any:
        return self._clocked(self._trials.restart)

    def advance(self, rates: Any) -> Any:
        return self._clocked(self._trials.advance, rates)

    def keep(self) -> None:
        self._clocked(self._trials.keep)

    def _clocked(self, do: Callable[..., Any], *args: Any) -> Any:
        began = time.monotonic()
        try:
            return do(*args)
        finally:
            self._seconds[0] += time.monotonic() - began
