"""Trials inside a Trainer: its own optimisation step on cached batches, everything put back afterwards."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from trainkit.autolrs._average import WeightAverage
from trainkit.autolrs._plan import Search
from trainkit.autolrs._race import Losses
from trainkit.autolrs._ranks import from_rank_zero
from trainkit.autolrs._schedule import set_rate
from trainkit.autolrs._snapshot import Snapshot, Where, rng_state, set_rng_state, unseen
from trainkit.integrations.lightning._lookahead import Item, Lookahead, all_batches

T = TypeVar("T")
SearchLoss = Literal["auto", "train"] | Callable[..., Any]

# Search losses per trial, and how many held-out batches each is the mean of: about one forward pass per step.
_POINTS = 8
_MOST_HELD_OUT = 8


@dataclass
class Recorded:
    """What a kept trial step showed to the loop: replayed when the Trainer reaches its batch."""

    outputs: dict[str, Any]
    logs: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


def averagers(trainer: Any) -> list[Any]:
    """Callbacks that hold a model of their own (weight averages): they must live through the kept trial's steps."""
    return [
        c for c in trainer.callbacks if any(isinstance(v, torch.nn.Module) for v in vars(c).values()) or _averages(c)
    ]


def _averages(callback: Any) -> bool:
    return any(base.__name__ == "WeightAveraging" for base in type(callback).__mro__)


class _CallbackState:
    """A weight-averaging callback's own numbers as a companion of the snapshot."""

    def __init__(self, callback: Any) -> None:
        self._callback = callback

    def state_dict(self) -> dict[str, Any]:
        return dict(self._callback.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._callback.load_state_dict(state)


class TrainerTrials:
    """Runs one search's trials; implements `trainkit.autolrs.Trials`.

    Args:
        trainer: the Trainer, inside `on_train_batch_start`.
        fetcher: its data fetcher.
        batch: the batch in hand, already on the device.
        search: what will be searched.
        ratios: the groups' shares of a rate.
        search_loss: "auto", "train" or a callable(module, batch) -> loss.
        where: where snapshots lie.
    """

    def __init__(
        self,
        trainer: Any,
        fetcher: Lookahead,
        batch: Any,
        search: Search,
        ratios: Sequence[float],
        search_loss: SearchLoss,
        where: Where,
    ) -> None:
        self._trainer, self._module = trainer, trainer.lightning_module
        self._loop = trainer.fit_loop.epoch_loop
        self._ratios, self._loss = ratios, search_loss
        self._averagers = averagers(trainer)
        self._progress = [self._loop.batch_progress, self._loop.automatic_optimization.optim_progress]
        self._begun = [copy.deepcopy(p.state_dict()) for p in self._progress]
        self._batches = self._fetch(fetcher, batch, search.trial_steps)
        self._every = max(search.trial_steps // _POINTS, 1)
        self._held_out = self._usable(fetcher, search.trial_steps)
        self._before = self._snapshot(where)
        self._best = self._snapshot(where)
        self._before.save()
        self._average = None if self._loss == "train" else WeightAverage(self._module)
        self.averaged = self._loss != "train"
        self.forwards = 0
        self._first: Losses | None = None
        self._at, self._steps = 0, 0
        self._recorded: list[Recorded] = []
        self._kept: list[Recorded] = []
        self._kept_is_live = False

    # -- what the race asks for

    def restart(self) -> Losses:
        """See `Trials`."""
        if self._at:
            self.rewind()
        if self._first is None:
            values = self._agreed([] if self._loss == "train" else [self._evaluate()])
            self._first = Losses((0,) * len(values), tuple(values))
        return self._first

    def advance(self, rates: Sequence[float]) -> Losses:
        """See `Trials`."""
        self._kept_is_live = False
        trained, steps, held_out = [], [], []
        for rate in rates:
            trained.append(self._step(rate))
            if self._average is not None:
                self._average.update()
            self._steps += 1
            if self._loss != "train" and (self._steps % self._every == 0 or self._at == len(self._batches)):
                steps.append(self._steps)
                held_out.append(self._evaluate())
        # One reduction: any rank's nan becomes everyone's.
        agreed = self._agreed([*trained, *held_out])
        if self._loss == "train":
            return Losses(tuple(range(self._steps - len(rates), self._steps)), tuple(agreed))
        finite = all(abs(v) < float("inf") for v in agreed[: len(trained)])
        if not held_out:
            return Losses((), ()) if finite else Losses((self._steps,), (float("nan"),))
        values = agreed[len(trained) :]
        return Losses(tuple(steps), tuple(values if finite else [float("nan")] * len(values)))

    def keep(self) -> None:
        """See `Trials`."""
        self._best.save()
        self._kept, self._kept_is_live = self._recorded, True

    def agree(self, value: T) -> T:
        """See `Trials`."""
        return from_rank_zero(value)

    # -- around the race

    def settle(self, kept: bool) -> list[Recorded]:
        """Leaves the kept trial's end state (or the one before the search) and returns what its steps showed."""
        if not kept:
            self.rewind()
            return []
        if not self._kept_is_live:
            self._best.restore()
        self._rewind_progress()
        return self._kept

    def rewind(self) -> None:
        """Back to the state before the search."""
        self._before.restore()
        self._rewind_progress()
        self._at, self._steps, self._recorded = 0, 0, []
        if self._average is not None:
            self._average.reset()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """No logging from within: the module's is recorded, the callbacks' is dropped."""
        holders = [self._module, *(c for c in self._trainer.callbacks if "log" in vars(c))]
        before = [{name: vars(h)[name] for name in ("log", "log_dict") if name in vars(h)} for h in holders]
        self._module.log = self._record
        for callback in holders[1:]:
            callback.log = callback.log_dict = _silent
        try:
            yield
        finally:
            for holder, saved in zip(holders, before, strict=True):
                for name in ("log", "log_dict"):
                    vars(holder).pop(name, None)
                vars(holder).update(saved)

    # -- parts

    def _snapshot(self, where: Where) -> Snapshot:
        trainer = self._trainer
        models = [v for c in self._averagers for v in vars(c).values() if isinstance(v, torch.nn.Module)]
        companions: list[Any] = [trainer.precision_plugin, *(_CallbackState(c) for c in self._averagers)]
        hook_state = getattr(trainer.strategy, "_ddp_comm_state", None)  # error feedback of a compressing hook
        if hasattr(hook_state, "state_dict") and hasattr(hook_state, "load_state_dict"):
            companions.append(hook_state)
        # A search starts with a new accumulation window: the gradients are about to be cleared.
        return Snapshot([self._module, *models], trainer.optimizers, companions=companions, where=where, grads=False)

    def _fetch(self, fetcher: Lookahead, batch: Any, steps: int) -> list[Item]:
        """The batches of `steps` optimizer steps; the first is the one in hand."""
        window, ready = self._trainer.accumulate_grad_batches, self._loop.batch_progress.current.ready
        items = [Item(batch, self._loop.batch_progress.is_last_batch, [])]
        taken = 0
        while True:
            last = items[-1].last or ready == self._trainer.num_training_batches
            if ready % window == 0 or last:
                taken += 1
            if taken == steps:
                return items
            ready = 1 if last else ready + 1
            items.append(fetcher.peek(len(items))[-1])

    def _usable(self, fetcher: Lookahead, trial_steps: int) -> list[Any]:
        """The held-out batches whose loss is a number; without any, trials are compared by their training losses."""
        held_out = self._fetch_held_out(fetcher, trial_steps)
        if self._loss != "auto":
            return held_out
        good, why = [], ""
        recorded, self._recorded = getattr(self, "_recorded", []), []
        for number, batch in enumerate(held_out):
            try:
                with unseen(self._module), self._trainer.precision_plugin.train_step_context():
                    value = float(self._held_out_loss(batch))
            except Exception as error:  # another structure in eval mode or in validation: whatever the module raises
                why = f"{type(error).__name__}: {error}"
                break
            if value == value and abs(value) != float("inf"):
                good.append(batch)
            else:
                why = f"the loss of held-out batch {number} is {value}"
        self._recorded = recorded
        # every rank must measure, or none
        if self._trainer.strategy.reduce_boolean_decision(bool(good), all=True):
            if len(good) < len(held_out):
                rank_zero_warn(f"AutoLRS leaves out {len(held_out) - len(good)} held-out batches: {why}")
            return good
        rank_zero_warn(
            "AutoLRS compares trials by their training losses, for training_step in eval mode on held-out batches gives no "
            f"loss ({why}); give search_loss=callable(module, batch) to measure one"
        )
        self._loss = "train"
        return []

    def _fetch_held_out(self, fetcher: Lookahead, trial_steps: int) -> list[Any]:
        """Batches that no trial trains on: of the validation loader, else the next ones of the training stream."""
        if self._loss == "train":
            return []
        count = min(max(trial_steps // _POINTS, 1), _MOST_HELD_OUT)
        loaders = self._trainer.val_dataloaders
        if loaders is not None and self._trainer.enable_validation:
            while isinstance(loaders, list | tuple | dict) or hasattr(loaders, "flattened"):
                parts = loaders.flattened if hasattr(loaders, "flattened") else loaders
                loaders = next(iter(parts.values() if isinstance(parts, dict) else parts))
            loader = loaders
            before = rng_state()
            batches = list(all_batches(loader, count))
            set_rng_state(before)
            if not batches:
                raise ValueError(
                    "the search measures losses on the validation loader, but it gave no batch: "
                    'give it data, remove it, or set search_loss="train"'
                )
            return [self._transferred(b) for b in batches]
        ahead = fetcher.peek(len(self._batches) - 1 + count)[len(self._batches) - 1 :]
        return [self._transferred(item.batch) for item in ahead]

    def _transferred(self, batch: Any) -> Any:
        trainer = self._trainer
        batch = trainer.precision_plugin.convert_input(_copied(batch))
        batch = self._module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def _step(self, rate: float) -> Tensor:
        """One optimizer step, accumulation included, exactly as the loop does it; returns its training loss."""
        trainer, loop, module = self._trainer, self._loop, self._module
        losses: list[Tensor] = []
        while True:
            item = self._batches[self._at]
            batch = _copied(item.batch) if self._at == 0 else self._transferred(item.batch)
            if self._at:
                loop.batch_progress.is_last_batch = item.last
                loop.batch_progress.increment_ready()
            index = loop.batch_idx
            self._recorded.append(Recorded({}))
            self._hook("on_train_batch_start", batch, index)
            loop.batch_progress.increment_started()
            for optimizer in trainer.optimizers:
                set_rate(optimizer, rate, self._ratios)
            kwargs = loop._build_kwargs(OrderedDict(), batch, index)
            outputs = loop.automatic_optimization.run(trainer.optimizers[0], index, kwargs)
            self._recorded[-1].outputs = outputs
            if outputs:
                losses.append(outputs["loss"])
            loop.batch_progress.increment_processed()
            for callback in self._averagers:
                callback.on_train_batch_end(trainer, module, outputs, batch, index)
            self._hook("on_train_batch_end", outputs, batch, index)
            loop.batch_progress.increment_completed()
            stepped = not loop._should_accumulate()
            if loop._num_ready_batches_reached():
                for progress in self._progress:
                    progress.reset_on_run()
            self._at += 1
            if stepped:
                break
        if not losses:
            return torch.zeros((), device=trainer.strategy.root_device)
        mean: Tensor = torch.stack([loss.float() for loss in losses]).mean()
        return mean * float(trainer.accumulate_grad_batches)

    def _hook(self, name: str, *args: Any) -> None:
        before, self._module._current_fx_name = self._module._current_fx_name, name
        getattr(self._module, name)(*args)
        self._module._current_fx_name = before

    def _evaluate(self) -> Tensor:
        """Mean search loss on the held-out batches; random numbers, metrics and modes stay as they are."""
        module = self._module
        average = self._average
        assert average is not None
        recorded, self._recorded = self._recorded, []
        try:
            with unseen(module), average.applied(), self._trainer.precision_plugin.train_step_context():
                total = torch.stack([self._held_out_loss(batch) for batch in self._held_out]).mean()
        finally:
            self._recorded = recorded
        self.forwards += len(self._held_out)
        return total

    def _held_out_loss(self, batch: Any) -> Tensor:
        batch = _copied(batch)
        if callable(self._loss):
            loss = self._loss(self._module, batch)
        else:
            loss = self._module.training_step(*self._loop._build_kwargs(OrderedDict(), batch, 0).values())
            loss = loss["loss"] if isinstance(loss, dict) else loss
        if loss is None:
            raise ValueError("training_step returned None")
        return torch.as_tensor(loss, device=self._trainer.strategy.root_device).detach().float()

    def _agreed(self, losses: list[Tensor]) -> list[float]:
        """The ranks' means, by one reduction."""
        if not losses:
            return []
        stacked = torch.stack(losses).detach()
        return [float(v) for v in self._trainer.strategy.reduce(stacked, reduce_op="mean").tolist()]

    def _record(self, *args: Any, **kwargs: Any) -> None:
        if self._recorded:
            args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
            kwargs = {k: v.detach() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
            self._recorded[-1].logs.append((self._module._current_fx_name or "training_step", args, kwargs))

    def _rewind_progress(self) -> None:
        for progress, state in zip(self._progress, self._begun, strict=True):
            progress.load_state_dict(copy.deepcopy(state))


def _copied(batch: Any) -> Any:
    """The batch with its tensors cloned: a step that writes into its batch must not reach the next trial's."""
    if isinstance(batch, Tensor):
        return batch.clone()
    kind = type(batch)
    if isinstance(batch, list | tuple | dict | str | int | float) or batch is None or hasattr(batch, "items"):
        return apply_to_collection(batch, Tensor, Tensor.clone)
    return copy.deepcopy(batch) if kind.__module__ != "builtins" else batch


def _silent(*args: Any, **kwargs: Any) -> None:
    return None
