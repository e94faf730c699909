"""What the callback and the tuner share: plan, searches, rates of the kept steps, the record, resume."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from trainkit.autolrs._forecast import Forecast, forecast
from trainkit.autolrs._history import History, StageRecord
from trainkit.autolrs._paper import paper_forecast
from trainkit.autolrs._plan import Plan, Search, Settings, plan
from trainkit.autolrs._race import Outcome, Rules, Trials, race
from trainkit.autolrs._schedule import LRSchedule, Piece, group_ratios, known_rate
from trainkit.autolrs._search import Backend, LRSearch
from trainkit.autolrs._skopt import SkoptSearch

_VERSION = 1
# Trials judged by where they end flatter a small rate: it loses the noise at once and the progress only in the long run.
_TILT = 0.5
# What a faster trial is forgiven a decade on a plateau: this share of what the run has fallen, at most that one of what is
# left of its loss.
_LEAN, _LEAN_LEFT = 0.04, 0.1


class Controller:
    """Decides; it runs no step itself.

    Args:
        settings: arguments of AutoLRS or Tuner.

    Raises:
        ValueError: an argument breaks its rule.
    """

    def __init__(self, settings: Settings) -> None:
        settings.check()
        self.settings = settings
        self.plan: Plan | None = None
        self.ratios: tuple[float, ...] = (1.0,)
        self.kept = 0
        self._record = History()
        self._schedule: LRSchedule | None = None
        self._default = math.sqrt(settings.low * settings.high)
        self._next = 0
        self._known: float | None = None
        self._backend = self._make_backend()

    def _make_backend(self) -> Backend:
        s = self.settings
        if s.backend == "skopt" or s.preset == "paper":
            return SkoptSearch(s.low, s.high, s.seed)
        return LRSearch(s.low, s.high, s.seed)

    @property
    def keeps_winner(self) -> bool:
        """Whether a search's winning steps are kept; the published algorithm runs them again."""
        return self.settings.preset != "paper"

    def begin(self, total: int, optimizer: torch.optim.Optimizer) -> bool:
        """Plans the run unless a checkpoint brought its plan.

        Args:
            total: steps of the run, in the sense of `count`.
            optimizer: its default rates set the groups' ratios and the rate of a run too short to search, its kind the
                rate that the search begins with.

        Returns:
            Whether the run is long enough to search.

        Raises:
            ValueError: the checkpoint's run had another length.
        """
        if self.plan is None:
            self.ratios = tuple(group_ratios(optimizer))
            self._default = max(float(g.get("initial_lr", g["lr"])) for g in optimizer.param_groups)
            self._known = known_rate(optimizer)
            self.plan = plan(self.settings, total, self._known is not None)
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
        """Kept steps of the whole run, as far as is known: with count="all" each discarded step shortens it."""
        assert self.plan is not None
        return self.plan.total - (self._record.discarded_steps if self.settings.count == "all" else 0)

    @property
    def next_start(self) -> int | None:
        """Kept step of the next search, None when all are done."""
        if self.plan is None or self._next >= len(self.plan.searches):
            return None
        return self.plan.searches[self._next].start

    def due(self, step: int) -> Search | None:
        """The search to run before kept step `step`, if any.

        With count="all" the plan was made for the most that searches may discard; what they saved lengthens stages.
        """
        start = self.next_start
        if start is None or step < start:
            return None
        assert self.plan is not None
        search = self.plan.searches[self._next]
        horizon = max(min(search.horizon, self.kept_total), step + search.trial_steps)
        if step + search.trial_steps > self.kept_total:
            self._next += 1
            return None
        return replace(search, start=step, horizon=horizon)

    def search(self, search: Search, trials: Trials, report: Callable[[str], None] = lambda text: None) -> Outcome:
        """Runs a due search; afterwards `rate` knows its choice.

        Args:
            search: from `due`.
            trials: runs the steps.
            report: told what is going on, in a few words.
        """
        stage, began = self._next, time.monotonic()

        def told(trial: int, of: int, rate: float) -> None:
            report(f"stage {stage + 1} trial {trial}/{of} lr {rate:.1e}")

        guided = isinstance(self._backend, LRSearch)
        look = guided and stage == 0 and self._known is not None
        rules = Rules(
            stage=stage,
            rate_at=lambda rate, step: rate * self.schedule.warmup(step),
            forecaster=self._forecast,
            fallback=self._fallback,
            fallen=self._fallen(),
            left=self._left,
            # The run's first steps reward rates that damage it later: there the well-known rate need only work.
            begin=(self._known if look else self._present if search.decay else None) if guided else None,
            look=look,
            low=self.settings.low,
            high=self.settings.high,
            tilt=_TILT if self.settings.stage_steps is None else 0.0,
            lean=lambda loss: self._lean(search, loss),
            halving=self.keeps_winner,
            keep=self.keeps_winner,
            report=told,
        )
        outcome = race(trials, self._backend, search, rules)
        self._backend.next_stage(outcome.rate)
        self._next += 1
        before = self._record
        stages = [*before.stages] or [StageRecord(0, search.start, self._safe, False)][: search.start]
        if stages:
            stages[-1] = replace(stages[-1], steps=search.start - stages[-1].start)
        start, end = search.start, self.next_start or self.kept_total
        if search.decay and outcome.kept:  # the kept trial has fallen and the rate goes up again
            flat = outcome.kept - search.decay
            stages.append(StageRecord(start, flat, outcome.rate, False))
            stages.append(StageRecord(start + flat, search.decay, outcome.rate, True))
            start += outcome.kept
        stages.append(StageRecord(start, max(end - start, 1), outcome.rate, False))
        self._record = replace(
            before,
            stages=tuple(stages),
            trials=(*before.trials, *outcome.trials),
            discarded_steps=before.discarded_steps + outcome.discarded,
            search_seconds=before.search_seconds + time.monotonic() - began,
        )
        self._settle()
        return outcome

    def note_forwards(self, forwards: int) -> None:
        """Counts forward passes that only measured search losses."""
        self._record = replace(self._record, extra_forwards=self._record.extra_forwards + forwards)

    @property
    def history(self) -> History:
        """Record of the run so far."""
        return replace(self._record, kept_steps=self.kept)

    def rate(self, step: int) -> float:
        """The rate of kept step `step`, warmup included, before the groups' ratios."""
        return self.schedule.rate(step)

    @property
    def schedule(self) -> LRSchedule:
        """Rates of the kept steps, as far as they are decided."""
        if self._schedule is None:
            self._schedule = self._make_schedule()
        return self._schedule

    @property
    def _safe(self) -> float:
        """The rate of steps that no search decided."""
        return min(max(self._default, self.settings.low), self.settings.high)

    @property
    def _present(self) -> float:
        """The rate of the steps before a search."""
        return self._record.stages[-1].rate if self._record.stages else self._safe

    def _make_schedule(self) -> LRSchedule:
        if self.plan is None:
            return LRSchedule(())
        stages = self._record.stages or (StageRecord(0, self.kept_total, self._safe, False),)
        if self._next >= len(self.plan.searches) and not stages[-1].anneal:
            stages = self._with_anneal(stages)
        pieces = [Piece(s.start, s.steps, s.rate, 0.0 if s.anneal else s.rate) for s in stages]
        return LRSchedule(pieces, self.plan.warmup_steps, self.ratios)

    def _with_anneal(self, stages: tuple[StageRecord, ...]) -> tuple[StageRecord, ...]:
        assert self.plan is not None
        last, end = stages[-1], self.kept_total
        start = max(self.plan.anneal_start(end), last.start)
        flat = replace(last, steps=start - last.start)
        tail = (StageRecord(start, end - start, last.rate, True),) if start < end else ()
        return (*stages[:-1], flat, *tail)

    def _settle(self) -> None:
        """After the last search the end is known: the annealed part becomes a stage of its own."""
        assert self.plan is not None
        if self._next >= len(self.plan.searches):
            self._record = replace(self._record, stages=self._with_anneal(self._record.stages))
        self._schedule = None

    def _forecast(self, steps: Sequence[float], losses: Sequence[float], horizon: float) -> Forecast:
        if self.settings.preset == "paper":
            return paper_forecast(losses, horizon, steps=steps)
        floor = 0.0 if self._positive and all(v >= 0.0 for v in losses) else None
        return forecast(losses, horizon, steps=steps, floor=floor)

    @property
    def _positive(self) -> bool:
        """Cross entropies and squared errors end at 0; a loss that was ever negative has no such floor."""
        return not any(v < 0.0 for record in self._record.trials for v in record.losses)

    def _left(self, loss: float) -> float:
        """How far a loss can fall at most."""
        return loss if self._positive and loss >= 0.0 else math.inf

    def _fallen(self) -> float:
        """How far the search loss has fallen in the trials that were kept, from the run's start."""
        kept = [record.losses for record in self._record.trials if record.status == "kept" and record.losses]
        return max(kept[0][0] - min(losses[-1] for losses in kept), 0.0) if kept else 0.0

    def _lean(self, search: Search, loss: float) -> float:
        """What a faster trial is forgiven a decade: a share of what the run has fallen, on a plateau.

        What leaves a plateau does not show in short trials. A run that would fall as far again at its present pace is on
        none, nor is one that would come to its floor, were it to go on falling with the logarithm of its steps: their trials
        are believed. So are those that are forecast to a stage's end.
        """
        kept = [record for record in self._record.trials if record.status == "kept" and record.losses]
        if not kept or self.settings.stage_steps is not None:
            return 0.0
        since, start, end = max(kept[-1].loss_steps[-1], 1), search.start, self.kept_total
        drop = max(kept[-1].losses[-1] - loss, 0.0)
        fallen = kept[0].losses[0] - loss - drop * (end - start) / max(start - since, 1)
        left = self._left(loss) - drop * math.log(end / start) / math.log(max(start, since + 1) / since)
        return max(min(_LEAN * fallen, _LEAN_LEFT * left), 0.0)

    def _fallback(self, lowest: float) -> float:
        known = self._record.stages[-1].rate if self._record.stages else self._default
        return min(lowest / 10.0, known if known > 0.0 else math.inf)

    def state_dict(self) -> dict[str, Any]:
        """Plain values only: loads with `weights_only`."""
        return {
            "version": _VERSION,
            "settings": asdict(self.settings),
            "total": self.plan.total if self.plan else None,
            "ratios": list(self.ratios),
            "default": self._default,
            "known": self._known,
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
            raise ValueError(f"AutoLRS reads state version {_VERSION}, but the checkpoint has {state.get('version')!r}")
        mine = asdict(self.settings)
        changed = [
            f"{k}={state['settings'].get(k)!r} is now {v!r}" for k, v in mine.items() if state["settings"].get(k) != v
        ]
        if changed:
            raise ValueError(
                f"a resumed search needs the arguments it began with, but {', '.join(changed)}: restore them"
            )
        self.ratios, self._default, self._known = tuple(state["ratios"]), state["default"], state["known"]
        total = state["total"]
        self.plan = None if total is None else plan(self.settings, total, self._known is not None)
        self._next = int(state["next"])
        self._record = History.from_dict(state["history"])
        self.kept, self._schedule = self._record.kept_steps, None
        self._backend = self._make_backend()
        self._backend.load_state_dict(state["backend"])
