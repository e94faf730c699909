"""The plan made from a run's length: where searches are offered, how long trials, what they may discard."""

import math
from dataclasses import dataclass

from trainkit.autolrs._options import Options

# A trial shorter than this says nothing about a rate.
LEAST_TRIAL = 8
_LEAST_CANDIDATES = 3
# The run's last part anneals: at most this share of it, and only after the last search.
ANNEAL = 0.5
# With `stage_steps` given, stages begin only in this first share of the run.
_STAGED = 0.7
_DEFAULT_WARMUP = 0.02
# Where searches are offered: at the run's start, from a tenth of it on so many times, each a trial's length later, and at half
# of it, where a rate may have begun to do harm. A trial is this share of the run: at half of it the shock of a new rate has
# not passed yet.
_SECOND, _OFFERED, _LATER, _TRIALS = 0.1, 4, 0.5, 8
_TRIAL = 0.04
# Trials that a search may discard while none of its rates works.
_FRUITLESS = 4
# With `stage_steps` the first search covers the whole range.
_BLIND_TRIALS, _STAGED_TRIALS = 9, 5
_PAPER_TRIAL_SHARE, _PAPER_FIRST, _PAPER_LONGEST, _PAPER_CANDIDATES = 0.1, 1000, 8000, 10


@dataclass(frozen=True)
class Search:
    """One planned search.

    Attributes:
        start: committed step at which it happens.
        horizon: committed step at which the choice is to be best.
        trial_steps: longest trial.
        candidates: most trials of rates that work.
        discards: most steps that it may throw away, if the searches before it left so many of the budget.
    """

    start: int
    horizon: int
    trial_steps: int
    candidates: int
    discards: int


@dataclass(frozen=True)
class Plan:
    """The run's plan.

    Attributes:
        searches: in order; empty for a run too short to search.
        warmup_steps: linear warmup.
        total: the bound on committed steps ("kept") or on committed and discarded ones ("all").
        anneal: whether the run's second half anneals.
        discards: most steps that all searches together may throw away.
    """

    searches: tuple[Search, ...]
    warmup_steps: int
    total: int
    anneal: bool
    discards: int = 0

    def anneal_start(self, kept_total: int, settled: int) -> int:
        """First committed step of the annealed part of a run of `kept_total`, settled by the last search at a step."""
        if not self.anneal:
            return kept_total
        return min(max(round(kept_total * (1.0 - ANNEAL)), settled), kept_total)


def plan(options: Options, total: int) -> Plan:
    """Plans a run of `total` steps.

    Args:
        options: checked options.
        total: committed steps (`count="kept"`) or committed and discarded ones ("all").

    Returns:
        The plan; a run too short for three trials of eight steps gets no search.
    """
    if options.preset == "paper":
        return _paper_plan(options, total)
    counted = options.count == "all"
    discards = math.floor(options.budget * total if counted else options.budget / (1.0 - options.budget) * total)
    kept = total - discards if counted else total
    warmup = round(_DEFAULT_WARMUP * total) if options.warmup_steps is None else options.warmup_steps
    starts = _starts(options, kept, total)
    searches: list[Search] = []
    left = discards
    for i, start in enumerate(starts):
        end = starts[i + 1] if i + 1 < len(starts) else kept
        staged = options.stage_steps is not None
        trials = options.candidates or ((_BLIND_TRIALS if i == 0 else _STAGED_TRIALS) if staged else _TRIALS)
        share = _TRIAL / max(len(starts) / 2, 1.0) if staged else _TRIAL
        steps = options.trial_steps or max(LEAST_TRIAL, round(share * total))
        fair = left // (len(starts) - i)
        if options.trial_steps is None:
            most = max((end - start) // 2, 1) if staged else end - start
            steps = min(steps, most, max((fair if staged else left) // (_LEAST_CANDIDATES - 1), LEAST_TRIAL))
        steps = min(steps, end - start)
        most = min(
            (trials - 1 if staged or options.candidates else _FRUITLESS) * steps, left if i == 0 or not staged else fair
        )
        if steps < min(LEAST_TRIAL, options.trial_steps or LEAST_TRIAL) or (_LEAST_CANDIDATES - 1) * steps > most:
            continue
        searches.append(Search(start, min(end, kept) if staged else kept, steps, trials, most))
        # what a planned search leaves over, later ones may use: the run keeps the account
        left -= most if staged else 0
    return Plan(tuple(searches), warmup, total, anneal=True, discards=discards)


def _starts(options: Options, kept: int, total: int) -> list[int]:
    """Where the searches are: every `stage_steps`, else at the start and from a tenth on."""
    if options.stage_steps is not None:
        return list(range(0, max(round(kept * _STAGED), 1), options.stage_steps))
    trial = options.trial_steps or max(LEAST_TRIAL, round(_TRIAL * total))
    second = max(round(total * _SECOND), 2 * LEAST_TRIAL)
    starts = [0, *(second + i * trial for i in range(_OFFERED))]
    starts += [start for start in (int(_LATER * kept),) if start >= starts[-1] + trial]
    return [start for start in starts if start <= kept / 2]


def _paper_plan(options: Options, total: int) -> Plan:
    """Tau 1000 doubling to 8000, tau' = tau / 10, ten candidates; scaled by `stage_steps` and `trial_steps`.

    The paper's search discards about as many steps as it commits, so it ignores `budget`; a search that the run could
    not finish is left out.
    """
    first = options.stage_steps or _PAPER_FIRST
    share = options.trial_steps / first if options.trial_steps else _PAPER_TRIAL_SHARE
    candidates = options.candidates or _PAPER_CANDIDATES
    searches: list[Search] = []
    start, spent, stage = 0, 0, first
    while True:
        trial = max(round(stage * share), 1)
        cost = trial * candidates
        used = start + (spent + cost if options.count == "all" else 0)
        if used + trial > total:
            break
        searches.append(Search(start, start + stage, trial, candidates, cost))
        start, spent = start + stage, spent + cost
        stage = min(stage * 2, _PAPER_LONGEST * first // _PAPER_FIRST)
        if start >= total:
            break
    return Plan(tuple(searches), options.warmup_steps or 0, total, anneal=False, discards=spent)
