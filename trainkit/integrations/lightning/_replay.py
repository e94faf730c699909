"""The committed trial's steps, shown to the Trainer once more without being computed again."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trainkit.integrations.lightning._trials import Recorded, averagers


class Replay:
    """Lets the loop walk over batches that a committed trial has already trained on.

    While it is attached, an optimisation step returns what the trial's step returned and counts as a step; the
    module's own batch hooks and the weight-averaging callbacks, which lived through the trial, are not called again.
    Loggers, checkpoints, schedulers and every other callback see ordinary steps. The weights are those at the trial's
    end, up to `trial_steps` ahead of `global_step`.
    """

    def __init__(self) -> None:
        self._queue: deque[Recorded] = deque()
        self._undo: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._queue)

    def start(self, trainer: Any, recorded: Sequence[Recorded]) -> None:
        """Attaches to the loop for the next `len(recorded)` batches."""
        self._queue = deque(recorded)
        if not self._queue:
            return
        loop = trainer.fit_loop.epoch_loop
        module = trainer.lightning_module

        def run(optimizer: Any, batch_idx: int, kwargs: Any) -> dict[str, Any]:
            return self._step(loop, module)

        self._shadow(loop.automatic_optimization, "run", run)
        for name in ("on_train_batch_start", "on_train_batch_end"):
            self._shadow(module, name, _nothing)
        for callback in averagers(trainer):
            self._shadow(callback, "on_train_batch_end", _nothing)

    def batch_ended(self) -> None:
        """Called after each batch: detaches after the last one."""
        if self._undo and not self._queue:
            self.stop()

    def stop(self) -> None:
        """Detaches."""
        while self._undo:
            self._undo.pop()()
        self._queue.clear()

    def state(self) -> list[dict[str, Any]]:
        """What is left, for a checkpoint: losses and logged numbers (metric objects and other outputs are not kept)."""
        return [
            {
                "loss": _number(recorded.outputs.get("loss")),
                "logs": [
                    [fx, [_number(a) for a in args], kwargs]
                    for fx, args, kwargs in recorded.logs
                    if _plain(args, kwargs)
                ],
            }
            for recorded in self._queue
        ]

    @staticmethod
    def from_state(state: Sequence[dict[str, Any]]) -> list[Recorded]:
        """The inverse of `state`."""
        return [
            Recorded(
                {} if entry["loss"] is None else {"loss": torch.tensor(entry["loss"])},
                [(fx, tuple(args), dict(kwargs)) for fx, args, kwargs in entry["logs"]],
            )
            for entry in state
        ]

    def _step(self, loop: Any, module: Any) -> dict[str, Any]:
        recorded = self._queue.popleft()
        progress = loop.automatic_optimization.optim_progress.optimizer
        if not loop._should_accumulate():
            progress.step.increment_ready()
            progress.step.increment_completed()
        before = module._current_fx_name
        for fx, args, kwargs in recorded.logs:
            module._current_fx_name = fx
            module.log(*args, **kwargs)
        module._current_fx_name = before
        return recorded.outputs

    def _shadow(self, holder: Any, name: str, replacement: Callable[..., Any]) -> None:
        held = vars(holder)
        had, before = name in held, held.get(name)
        held[name] = replacement
        self._undo.append(lambda: held.update({name: before}) if had else held.pop(name, None))  # type: ignore[func-returns-value]


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _plain(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    values = [*args, *kwargs.values()]
    return all(v is None or isinstance(v, str | bool | int | float | torch.Tensor) for v in values)
