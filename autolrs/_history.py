"""What a run did: stages, searches, trials, steps committed and thrown away."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["committed", "stopped", "diverged", "finished"]


@dataclass(frozen=True)
class TrialRecord:
    """One trial of one rate.

    Attributes:
        stage: index of the search that ran it.
        rate: rate tried, before warmup and group ratios.
        start: committed step at which the trial started.
        steps: optimizer steps it ran.
        losses: search losses, at `loss_steps`.
        loss_steps: committed-step numbers of the losses (number of steps taken before the loss was measured).
        horizon: committed step forecast.
        mean: forecast search loss there, under the schedule that follows.
        std: its standard deviation.
        status: "committed" (its steps are the run's), "finished" (ran to its end, not chosen), "stopped" (could not
            win) or "diverged".
    """

    stage: int
    rate: float
    start: int
    steps: int
    losses: tuple[float, ...]
    loss_steps: tuple[int, ...]
    horizon: int
    mean: float
    std: float
    status: Status


@dataclass(frozen=True)
class SearchRecord:
    """One search, held or found not worth its steps.

    Attributes:
        stage: its index.
        start: committed step at which it was.
        rate: rate that the run went on with.
        mean: forecast search loss at the horizon with that rate; inf if none was made.
        std: its standard deviation.
        trials: number of trials; 0: it was not worth its steps, or could not be held.
        discarded: steps that it threw away.
        asked: how many of the rates came from a model (the Gaussian process), the decision to stop included.
        critical: log10 of the believed critical rate, and its std; None before there is a belief.
        seen: of each trial log10 of its rate, whether it worked and whether it diverged.
        reason: why it ended.
    """

    stage: int
    start: int
    rate: float
    mean: float
    std: float
    trials: int
    discarded: int
    asked: int
    critical: tuple[float, float] | None
    seen: tuple[tuple[float, bool, bool], ...]
    reason: str


@dataclass(frozen=True)
class StageRecord:
    """One stage of the run.

    Attributes:
        start: first committed step.
        steps: number of committed steps.
        rate: chosen rate (before warmup and group ratios).
        anneal: whether the rate falls to the end of the run from here.
    """

    start: int
    steps: int
    rate: float
    anneal: bool


@dataclass(frozen=True)
class History:
    """The whole run so far.

    Attributes:
        stages: in order.
        searches: in order.
        trials: in order of running.
        kept_steps: optimizer steps that are part of the run: the committed ones.
        discarded_steps: optimizer steps of trials that were not committed.
        extra_forwards: forward passes made only to measure search losses (per process).
        search_seconds: wall-clock seconds in searches, committed trial steps included.
        decision_seconds: those of them in which no trial ran.
    """

    stages: tuple[StageRecord, ...] = ()
    searches: tuple[SearchRecord, ...] = ()
    trials: tuple[TrialRecord, ...] = ()
    kept_steps: int = 0
    discarded_steps: int = 0
    extra_forwards: int = 0
    search_seconds: float = 0.0
    decision_seconds: float = 0.0

    @property
    def asked(self) -> int:
        """How often a model (by default the Gaussian process) was asked for a rate."""
        return sum(search.asked for search in self.searches)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form; non-finite numbers become None."""
        result = _plain(asdict(self))
        assert isinstance(result, dict)
        return {**result, "asked": self.asked}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "History":
        """The inverse of `as_dict` (None becomes inf in a forecast, nan in a loss)."""
        held = {key: value for key, value in data.items() if key != "asked"}
        trials = []
        for record in held["trials"]:
            losses = tuple(math.nan if v is None else v for v in record["losses"])
            steps = tuple(record["loss_steps"])
            trials.append(TrialRecord(**{**_known(record), "losses": losses, "loss_steps": steps}))
        searches = []
        for record in held["searches"]:
            critical = record["critical"] and tuple(record["critical"])
            searches.append(
                SearchRecord(**{**_known(record), "critical": critical, "seen": tuple(map(tuple, record["seen"]))})
            )
        stages = tuple(StageRecord(**record) for record in held["stages"])
        return cls(**{**held, "stages": stages, "searches": tuple(searches), "trials": tuple(trials)})


def _known(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, **{k: math.inf if record[k] is None else record[k] for k in ("mean", "std")}}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
