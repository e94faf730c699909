"""The learning-rate schedule that a run found: saved, loaded, replayed."""

import inspect
import json
import math
import os
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trainkit._files import write_text_atomically

_FORMAT = "trainkit.lr_schedule"


@dataclass(frozen=True)
class Piece:
    """A stretch of kept steps: the rate goes linearly from `rate` towards `end` (constant if they are equal)."""

    start: int
    steps: int
    rate: float
    end: float

    def at(self, step: int) -> float:
        """The rate at kept step `step`, start <= step."""
        if self.rate == self.end or self.steps < 1:
            return self.rate
        done = min((step - self.start + 1) / (self.steps + 1), 1.0)
        return self.end + (self.rate - self.end) * (1.0 - done)


class LRSchedule:
    """Rates of the kept steps, warmup included.

    Args:
        pieces: stretches in order, the first at step 0.
        warmup_steps: linear warmup that multiplies every rate.
        ratios: each parameter group's rate over the greatest group's.
    """

    def __init__(self, pieces: Iterable[Piece], warmup_steps: int = 0, ratios: Iterable[float] = (1.0,)) -> None:
        self.pieces = tuple(pieces)
        self._starts = [piece.start for piece in self.pieces]
        self.warmup_steps = warmup_steps
        self.ratios = tuple(ratios)

    def __len__(self) -> int:
        return sum(piece.steps for piece in self.pieces)

    def rate(self, step: int) -> float:
        """The rate at kept step `step`; beyond the end, the last piece's end.

        Raises:
            ValueError: the schedule is empty or the step negative.
        """
        if not self.pieces or step < 0:
            raise ValueError(
                f"a rate needs a step from 0 to {len(self) - 1}, but got {step}: train first, or load a file"
            )
        rate = self.pieces[max(bisect_right(self._starts, step) - 1, 0)].at(step)
        return rate if step >= self.warmup_steps else rate * self.warmup(step)

    def warmup(self, step: int) -> float:
        """The warmup's factor at kept step `step`."""
        return min((step + 1) / self.warmup_steps, 1.0) if self.warmup_steps > 0 else 1.0

    @property
    def rates(self) -> list[float]:
        """The rate of each kept step."""
        return [self.rate(step) for step in range(len(self))]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        pieces = [asdict(p) for p in self.pieces]
        return {
            "format": _FORMAT,
            "version": 1,
            "warmup_steps": self.warmup_steps,
            "ratios": list(self.ratios),
            "pieces": pieces,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "LRSchedule":
        """The inverse of `as_dict`.

        Raises:
            ValueError: not such a dict.
        """
        held = data if isinstance(data, dict) else {}
        if held.get("format") != _FORMAT or held.get("version") != 1:
            raise ValueError(
                f"a learning-rate schedule says format {_FORMAT!r}, version 1, but got "
                f"{held.get('format')!r}, {held.get('version')!r}: give a file written by LRSchedule.save"
            )
        try:
            pieces = [
                Piece(int(p["start"]), int(p["steps"]), float(p["rate"]), float(p["end"])) for p in held["pieces"]
            ]
            return cls(pieces, int(held["warmup_steps"]), [float(r) for r in held["ratios"]])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"a learning-rate schedule has pieces (start, steps, rate, end), warmup_steps and ratios, but {error!r}: "
                "give a file written by LRSchedule.save, unchanged"
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, whole or not at all."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(target, json.dumps(self.as_dict(), indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LRSchedule":
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is not a schedule.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} must be JSON written by LRSchedule.save, but {error}: save it again") from error
        return cls.from_dict(data)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> "ReplayLR":
        """A torch scheduler that replays these rates; step it after each optimizer step."""
        return ReplayLR(optimizer, self)


class ReplayLR(torch.optim.lr_scheduler.LRScheduler):
    """Replays a found schedule: each group runs at the schedule's rate times the group's own ratio.

    Args:
        optimizer: optimizer to drive; its groups' default rates set their ratios.
        schedule: schedule found by AutoLRS or Tuner.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: LRSchedule) -> None:
        self.schedule = schedule
        self._shares = group_ratios(optimizer)
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """The groups' rates at the current step."""
        return [self.schedule.rate(self.last_epoch) * share for share in self._shares]

    def state_dict(self) -> dict[str, Any]:
        """The position; the schedule itself is not part of it."""
        return {"last_epoch": self.last_epoch, "_last_lr": self._last_lr, "_shares": self._shares}


def group_ratios(optimizer: torch.optim.Optimizer) -> list[float]:
    """Each parameter group's default rate over the greatest one; all 1 if no group has a positive rate."""
    rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    top = max(rates)
    return [rate / top for rate in rates] if top > 0 and math.isfinite(top) else [1.0] * len(rates)


def set_rate(optimizer: torch.optim.Optimizer, rate: float, ratios: Iterable[float]) -> None:
    """Gives every group `rate` times its ratio; a tensor rate (capturable optimizers, CUDA graphs) is filled in place."""
    for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
        held = group["lr"]
        if isinstance(held, torch.Tensor):
            held.fill_(rate * ratio)
        else:
            group["lr"] = rate * ratio


def known_rate(optimizer: torch.optim.Optimizer) -> float | None:
    """The rate that an optimizer's kind usually does well with, whatever rate this one was given.

    It is the class's own default (1e-3 for Adam and AdamW); 0.1 for SGD, whose default was not chosen for anything.
    None for a class without a default.
    """
    if isinstance(optimizer, torch.optim.SGD):
        return 0.1
    for kind in type(optimizer).__mro__:
        argument = inspect.signature(kind).parameters.get("lr") if kind is not object else None
        if argument is not None and isinstance(argument.default, int | float):
            return float(argument.default)
    return None
