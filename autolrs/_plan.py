"""Settings of a run and the plan made from its length: where searches are, how long trials, what they may discard."""

import math
from dataclasses import dataclass
from typing import Literal

from trainkit.autolrs._search import check_range

# A trial shorter than this says nothing about a rate.
_LEAST_TRIAL = 8
_LEAST_CANDIDATES = 3
# The run's last part anneals: at most this share of it, and only after the last search.
_ANNEAL = 0.5
# With `stage_steps` given, stages begin only in this first share of the run.
_STAGED = 0.7
_DEFAULT_WARMUP = 0.02
# Planned searches as shares of the run: a first look whether the well-known rate works, then, once the chaos of the first
# steps is over, the search that decides; their trials as shares of all steps, and the most trials.
_STARTS = (0.0, 0.1)
_TRIALS = ((0.04, 5), (0.04, 5))
_DECAY = 1 / 3  # of a deciding trial
# Without a well-known rate to begin from, the first search covers the whole range.
_BLIND_TRIALS = 9
_PAPER_TRIAL_SHARE, _PAPER_FIRST, _PAPER_LONGEST, _PAPER_CANDIDATES = 0.1, 1000, 8000, 10


@dataclass(frozen=True)
class Settings:
    """The arguments of AutoLRS and Tuner, as documented there."""

    low: float = 1e-5
    high: float = 1.0
    stage_steps: int | None = None
    trial_steps: int | None = None
    candidates: int | None = None
    budget: float = 0.35
    count: Literal["kept", "all"] = "kept"
    warmup_steps: int | None = None
    backend: Literal["gp", "skopt"] = "gp"
    preset: Literal["default", "paper"] = "default"
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError with the rule, the value and the mend for the first argument that breaks one."""
        check_range(self.low, self.high)
        for name in ("stage_steps", "trial_steps", "candidates"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive int or None (planned), but got {value!r}: leave it None")
        if self.stage_steps is not None and self.trial_steps is not None and self.trial_steps > self.stage_steps:
            raise ValueError(
                f"a trial must not be longer than its stage, but got trial_steps={self.trial_steps} and "
                f"stage_steps={self.stage_steps}: shorten trials or lengthen stages"
            )
        if not 0.0 < self.budget < 1.0:
            raise ValueError(f"budget is a share of all steps, 0 < budget < 1, but got {self.budget!r}: try 0.35")
        for name, allowed in (
            ("count", ("kept", "all")),
            ("backend", ("gp", "skopt")),
            ("preset", ("default", "paper")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, but got {value!r}")
        if self.warmup_steps is not None and (not isinstance(self.warmup_steps, int) or self.warmup_steps < 0):
            raise ValueError(
                f"warmup_steps must be an int of 0 or more, or None (2 % of the run), but got {self.warmup_steps!r}: "
                "0 turns warmup off"
            )
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be an int of 0 or more, but got {self.seed!r}: leave it 0")


@dataclass(frozen=True)
class Search:
    """One planned search.

    Attributes:
        start: kept step at which it happens.
        horizon: kept step at which the choice is to be best.
        trial_steps: longest trial.
        candidates: most trials.
        discards: most steps that it may throw away.
        decay: last steps of a trial in which its rate falls linearly to zero, so that it is judged as annealed.
    """

    start: int
    horizon: int
    trial_steps: int
    candidates: int
    discards: int
    decay: int = 0

    def share(self, step: int) -> float:
        """The decay's factor at a trial's step."""
        return min((self.trial_steps - step) / (self.decay + 1), 1.0)


@dataclass(frozen=True)
class Plan:
    """The run's plan.

    Attributes:
        searches: in order; empty for a run too short to search.
        anneal_start: first kept step of the annealed part, as far as it can be known before the searches.
        warmup_steps: linear warmup.
        total: the bound on kept steps ("kept") or on kept and discarded ones ("all").
    """

    searches: tuple[Search, ...]
    warmup_steps: int
    total: int
    anneal: bool

    def anneal_start(self, kept_total: int) -> int:
        """First kept step of the annealed part of a run of `kept_total` kept steps."""
        if not self.anneal:
            return kept_total
        last = self.searches[-1] if self.searches else None
        settled = last.start + last.trial_steps if last else 0
        return max(min(round(kept_total * (1.0 - _ANNEAL)), kept_total), min(settled, kept_total))


def plan(settings: Settings, total: int, known: bool = True) -> Plan:
    """Plans a run of `total` steps.

    Args:
        settings: checked settings.
        total: kept steps (`count="kept"`) or kept and discarded ones ("all").
        known: whether there is a well-known rate to begin from.

    Returns:
        The plan; a run too short for three trials of eight steps gets no search.
    """
    if settings.preset == "paper":
        return _paper_plan(settings, total)
    counted = settings.count == "all"
    discards = math.floor(settings.budget * total if counted else settings.budget / (1.0 - settings.budget) * total)
    kept = total - discards if counted else total
    warmup = round(_DEFAULT_WARMUP * total) if settings.warmup_steps is None else settings.warmup_steps
    starts = _starts(settings, kept, total)
    searches: list[Search] = []
    left = discards
    for i, start in enumerate(starts):
        end = starts[i + 1] if i + 1 < len(starts) else kept
        length, trials = _TRIALS[min(i, 1)]
        trials = settings.candidates or (_BLIND_TRIALS if i == 0 and not known else trials)
        steps = settings.trial_steps or max(_LEAST_TRIAL, round(length * total / max(len(starts) / 2, 1.0)))
        fair = left // (len(starts) - i)
        look = i == 0 and known and settings.stage_steps is None
        if settings.trial_steps is None:
            # A first look is kept as a rule; long enough to tell an unstable rate, up to the next search.
            steps = max(steps, 2 * _LEAST_TRIAL) if look else min(steps, max((end - start) // 2, 1))
            steps = min(steps, max(fair // (_LEAST_CANDIDATES - 1), _LEAST_TRIAL))
        steps = min(steps, end - start)
        share = min((trials - 1) * steps, fair if look or i > 0 else left)
        if steps < min(_LEAST_TRIAL, settings.trial_steps or _LEAST_TRIAL) or (_LEAST_CANDIDATES - 1) * steps > share:
            continue
        # Annealing will change what a rate is worth in the end; a stage at one constant rate can be forecast.
        horizon = start + steps if settings.stage_steps is None else min(end, kept)
        decay = round(_DECAY * steps) if i > 0 and settings.stage_steps is None else 0
        searches.append(Search(start, horizon, steps, trials, share, decay))
        left -= share
    return Plan(tuple(searches), warmup, total, anneal=True)


def _starts(settings: Settings, kept: int, total: int) -> list[int]:
    """Where the searches are: every `stage_steps`, else where `_STARTS` says."""
    if settings.stage_steps is not None:
        return list(range(0, max(round(kept * _STAGED), 1), settings.stage_steps))
    starts = [max(round(total * share), 2 * _LEAST_TRIAL * i) for i, share in enumerate(_STARTS)]
    return [start for start in starts if start < kept / 2]


def _paper_plan(settings: Settings, total: int) -> Plan:
    """Tau 1000 doubling to 8000, tau' = tau / 10, ten candidates; scaled by `stage_steps` and `trial_steps`.

    The paper's search discards about as many steps as it keeps, so it ignores `budget`; a search that the run could
    not finish is left out.
    """
    first = settings.stage_steps or _PAPER_FIRST
    share = settings.trial_steps / first if settings.trial_steps else _PAPER_TRIAL_SHARE
    candidates = settings.candidates or _PAPER_CANDIDATES
    searches: list[Search] = []
    start, spent, stage = 0, 0, first
    while True:
        trial = max(round(stage * share), 1)
        cost = trial * candidates
        used = start + (spent + cost if settings.count == "all" else 0)
        if used + trial > total:
            break
        searches.append(Search(start, start + stage, trial, candidates, cost))
        start, spent = start + stage, spent + cost
        stage = min(stage * 2, _PAPER_LONGEST * first // _PAPER_FIRST)
        if start >= total:
            break
    return Plan(tuple(searches), settings.warmup_steps or 0, total, anneal=False)
