"""What a run did: stages, trials, steps kept and thrown away."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["kept", "stopped", "diverged", "finished"]


@dataclass(frozen=True)
class TrialRecord:
    """One trial of one rate.

    Attributes:
        stage: index of the stage whose search ran it.
        rate: rate tried, before warmup and group ratios.
        start: kept step at which the trial started.
        steps: optimizer steps it ran.
        losses: search losses, at `loss_steps`.
        loss_steps: kept-step numbers of the losses (number of steps taken before the loss was measured).
        horizon: kept step forecast.
        mean: forecast loss there.
        std: its standard deviation.
        status: "kept" (its steps are the run's), "finished" (ran to its end, not chosen), "stopped" (dominated) or
            "diverged".
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
class StageRecord:
    """One stage of the run.

    Attributes:
        start: first kept step.
        steps: number of kept steps.
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
        trials: in order of running.
        kept_steps: optimizer steps that are part of the run.
        discarded_steps: optimizer steps of trials that were not kept.
        extra_forwards: forward passes made only to measure search losses (per process).
        search_seconds: wall-clock seconds in searches, kept trial steps included.
    """

    stages: tuple[StageRecord, ...] = ()
    trials: tuple[TrialRecord, ...] = ()
    kept_steps: int = 0
    discarded_steps: int = 0
    extra_forwards: int = 0
    search_seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form; non-finite numbers become None."""
        result = _plain(asdict(self))
        assert isinstance(result, dict)
        return result

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "History":
        """The inverse of `as_dict` (None becomes inf in a forecast, nan in a loss)."""
        trials = []
        for record in data["trials"]:
            fixed = {k: math.inf if record[k] is None else record[k] for k in ("mean", "std")}
            losses = tuple(math.nan if v is None else v for v in record["losses"])
            trials.append(
                TrialRecord(**{**record, **fixed, "losses": losses, "loss_steps": tuple(record["loss_steps"])})
            )
        stages = tuple(StageRecord(**record) for record in data["stages"])
        return cls(**{**data, "stages": stages, "trials": tuple(trials)})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
