"""AutoLRS for a plain PyTorch loop."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from trainkit.autolrs._average import WeightAverage
from trainkit.autolrs._controller import Controller
from trainkit.autolrs._history import History
from trainkit.autolrs._options import Options
from trainkit.autolrs._plan import Search
from trainkit.autolrs._plot import plot
from trainkit.autolrs._race import Losses
from trainkit.autolrs._ranks import from_rank_zero
from trainkit.autolrs._schedule import LRSchedule, set_rate
from trainkit.autolrs._snapshot import Snapshot, Stateful, Where, check_where, rng_state, set_rng_state, unseen
from trainkit.autolrs._stream import Stream

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")

_POINTS = 8
_MOST_HELD_OUT = 8


@dataclass(frozen=True)
class Kept:
    """A kept step.

    Attributes:
        step: its number, from 0.
        rate: learning rate it ran at (of the group with the greatest default).
        loss: what `train_step` returned, detached; nothing of it was read.
    """

    step: int
    rate: float
    loss: Tensor


class Tuner:
    """Finds the learning rates of a plain PyTorch loop.

    ```python
    def train_step(batch):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        return loss

    tuner = Tuner(model, optimizer, train_step, total_steps=2000, loss=loss_of)
    for kept in tuner.run(loader):
        ...
    ```

    Under `torch.distributed` every rank builds a Tuner and runs the same loop; rank 0 decides.

    Args:
        model: what is trained (unwrapped or in DistributedDataParallel).
        optimizer: its optimizer; the groups' default rates set their ratios.
        train_step: batch -> loss; does forward, backward and exactly one optimizer step.
        total_steps: length of the run, in the sense of `count`.
        loss: (model, batch) -> loss, measured without gradients on held-out batches to compare trials; None: the
            training losses of the trials are compared.
        held_out: batches for `loss`; None: later batches of the training stream, trained on later.
        companions: whatever else changes with a step and has `state_dict`: a grad scaler, a scheduler, an average.
        modules: further modules that a step changes (a weight average).
        snapshot: where snapshots lie: "device", "cpu" or "disk".
        low: least rate to try.
        high: greatest rate to try.
        stage_steps: kept steps between searches, None: planned.
        trial_steps: steps of a trial at most, None: planned.
        candidates: rates per search at most, None: planned.
        budget: greatest share of all steps that may be discarded.
        count: "kept" or "all": what `total_steps` counts.
        warmup_steps: linear warmup, None: 2 % of the run.
        backend: "gp" or "skopt".
        preset: "default" or "paper".
        seed: of the search.

    Raises:
        ValueError: an argument breaks its rule.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        train_step: Callable[[Any], Tensor],
        total_steps: int,
        *,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        held_out: Iterable[Any] | None = None,
        companions: Iterable[Stateful] = (),
        modules: Iterable[nn.Module] = (),
        snapshot: Where = "device",
        low: float = 1e-5,
        high: float = 1.0,
        stage_steps: int | None = None,
        trial_steps: int | None = None,
        candidates: int | None = None,
        budget: float = 0.35,
        count: Literal["kept", "all"] = "kept",
        warmup_steps: int | None = None,
        backend: Literal["gp", "skopt"] = "gp",
        preset: Literal["default", "paper"] = "default",
        seed: int = 0,
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, but got {total_steps}")
        self.model, self.optimizer, self.train_step = model, optimizer, train_step
        self.loss = None if preset == "paper" else loss
        self.held_out = None if held_out is None else list(held_out)
        if self.held_out is not None and not self.held_out:
            raise ValueError("held_out must have at least one batch, but is empty: give batches, or leave it None")
        check_where(snapshot)
        self._companions, self._modules, self._where = list(companions), list(modules), snapshot
        self._controller = Controller(
            Options(low, high, stage_steps, trial_steps, candidates, budget, count, warmup_steps, backend, preset, seed)
        )
        self._total = total_steps
        self._step = 0
        self._shown: deque[float | Tensor] = deque()
        self._stream: Stream | None = None
        self._loaded: dict[str, Any] | None = None

    @property
    def history(self) -> History:
        """Record of the run so far."""
        return self._controller.history

    @property
    def replaying(self) -> bool:
        """Whether kept trial steps are still to be yielded: the weights are already those after the last of them."""
        return bool(self._shown)

    @property
    def schedule(self) -> LRSchedule:
        """Rates of the kept steps, as far as they are decided."""
        return self._controller.schedule

    def plot(self) -> "Figure":
        """The learning-rate staircase with every trial and its forecast band."""
        return plot(self.history, self.schedule)

    def run(self, loader: Iterable[Any]) -> Iterator[Kept]:
        """Trains; yields after every kept step (those of a kept trial one by one, after the search).

        Args:
            loader: iterated again for every epoch.

        Yields:
            The kept steps in order.
        """
        controller = self._controller
        controller.begin(self._total, self.optimizer)
        self._stream = stream = Stream(loader)
        if self._loaded is not None:
            stream.load_state_dict(self._loaded["stream"])
            set_rng_state(self._loaded["rng"])
            self._loaded = None
        while self._step < controller.kept_total:
            search = controller.due(self._step) if not self._shown else None
            if search is not None:
                self._search(search, stream)
            rate = controller.rate(self._step)
            set_rate(self.optimizer, rate, controller.ratios)
            batch = next(stream)
            loss = (
                torch.as_tensor(self._shown.popleft())
                if self._shown
                else torch.as_tensor(self.train_step(batch)).detach()
            )
            kept = Kept(self._step, rate, loss)
            self._step += 1
            controller.kept = self._step
            yield kept

    def state_dict(self) -> dict[str, Any]:
        """Position, plan, search and random numbers of this process; save model and optimizer beside it."""
        return {
            "controller": self._controller.state_dict(),
            "step": self._step,
            "shown": [float(v) for v in self._shown],
            "stream": self._stream.state_dict() if self._stream else {"epoch": 0, "loader": None},
            "rng": rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up `state_dict`'s run at the next `run`."""
        self._controller.load_state_dict(state["controller"])
        self._step, self._shown = int(state["step"]), deque(state["shown"])
        self._loaded = state

    def _search(self, search: Search, stream: Stream) -> None:
        trials = _LoopTrials(self, search, stream)
        try:
            outcome = self._controller.search(search, trials)
            self._shown = deque(trials.settle(outcome.committed > 0))
        except BaseException:
            trials.rewind()
            raise
        self._controller.note_forwards(trials.forwards)

    def snapshot(self) -> Snapshot:
        """An empty snapshot of everything that a step changes."""
        return Snapshot(
            [self.model, *self._modules], [self.optimizer], companions=self._companions, where=self._where, grads=False
        )


class _LoopTrials:
    """Trials of a plain loop; see `Trials`."""

    def __init__(self, tuner: Tuner, search: Search, stream: Stream) -> None:
        self._tuner, self._measure = tuner, tuner.loss
        self.averaged = tuner.loss is not None
        self._batches = stream.peek(search.trial_steps)
        self._every = max(search.trial_steps // _POINTS, 1)
        count = min(max(search.trial_steps // _POINTS, 1), _MOST_HELD_OUT)
        if tuner.held_out is not None:
            self._held_out = tuner.held_out[:count]
        else:
            self._held_out = stream.peek(search.trial_steps + count)[search.trial_steps :] if self._measure else []
        self._average = WeightAverage(tuner.model) if self._measure else None
        self._before, self._best = tuner.snapshot(), tuner.snapshot()
        self._before.save()
        self._first: Losses | None = None
        self._taken: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._kept_is_live = False
        self.forwards = 0

    def restart(self) -> Losses:
        if self._taken:
            self.rewind()
        if self._first is None:
            values = _agreed([] if self._measure is None else [self._evaluate()])
            self._first = Losses((0,) * len(values), tuple(values))
        return self._first

    def advance(self, rates: Sequence[float]) -> Losses:
        self._kept_is_live = False
        tuner, start = self._tuner, len(self._taken)
        steps: list[int] = []
        measured: list[Tensor] = []
        for rate in rates:
            set_rate(tuner.optimizer, rate, tuner._controller.ratios)
            self._taken.append(torch.as_tensor(tuner.train_step(self._batches[len(self._taken)])).detach().float())
            if self._average is not None:
                self._average.update()
                if len(self._taken) % self._every == 0 or len(self._taken) == len(self._batches):
                    steps.append(len(self._taken))
                    measured.append(self._evaluate())
        agreed = _agreed([*self._taken[start:], *measured])
        if self._measure is None:
            return Losses(tuple(range(start, start + len(rates))), tuple(agreed))
        if not all(math.isfinite(v) for v in agreed):
            return Losses((len(self._taken),), (math.nan,))
        return Losses(tuple(steps), tuple(agreed[len(rates) :]))

    def keep(self) -> None:
        self._best.save()
        self._kept, self._kept_is_live = self._taken, True

    def agree(self, value: T) -> T:
        return from_rank_zero(value)

    def settle(self, kept: bool) -> list[Tensor]:
        if not kept:
            self.rewind()
            return []
        if not self._kept_is_live:
            self._best.restore()
        return self._kept

    def rewind(self) -> None:
        self._before.restore()
        self._taken = []
        if self._average is not None:
            self._average.reset()

    def _evaluate(self) -> Tensor:
        model, measure, average = self._tuner.model, self._measure, self._average
        assert measure is not None and average is not None
        with unseen(model), average.applied():
            losses = [torch.as_tensor(measure(model, batch)).detach().float() for batch in self._held_out]
        self.forwards += len(self._held_out)
        return torch.stack(losses).mean()


def _agreed(losses: list[Tensor]) -> list[float]:
    """The ranks' mean losses by one reduction."""
    if not losses:
        return []
    stacked = torch.stack(losses)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(stacked)
        stacked /= torch.distributed.get_world_size()
    return [float(v) for v in stacked.tolist()]
