"""AutoLRS as a Lightning callback."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.utils._pytree import tree_leaves

from trainkit.autolrs import History, LRSchedule, Options
from trainkit.autolrs._controller import Controller
from trainkit.autolrs._plan import LEAST_TRIAL, Search
from trainkit.autolrs._plot import plot
from trainkit.autolrs._ranks import from_every_rank
from trainkit.autolrs._schedule import set_rate
from trainkit.autolrs._snapshot import Where, check_where, rng_state, set_rng_state
from trainkit.integrations.lightning._base import Callback
from trainkit.integrations.lightning._lookahead import Lookahead
from trainkit.integrations.lightning._replay import Replay
from trainkit.integrations.lightning._report import attach
from trainkit.integrations.lightning._trials import SearchLoss, TrainerTrials

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pytorch_lightning import LightningModule, Trainer
else:
    Trainer = LightningModule = Any

_KEY = "trainkit.autolrs"


class AutoLRS(Callback):
    """Finds the learning rates while the model trains.

    At a few moments of the run several rates are tried for a few steps each, from the same state, on the same
    batches. The loss of each is forecast to the stage's end, the best trial's steps are kept, the others' are undone
    bit by bit. Between searches nothing is computed, sent or synchronised. The last part of the run anneals.

    ```python
    auto = AutoLRS()
    Trainer(max_steps=2000, callbacks=[auto]).fit(model, loader)
    auto.schedule.save("lr.json")
    auto.plot().savefig("lr.png")
    ```

    The optimizer's own rates only set the parameter groups' ratios: a group runs at the found rate times its own
    default over the greatest default. An LR scheduler of the module goes on stepping, but the rates it sets are
    overwritten. Works with automatic optimisation and one optimizer, on one device or under DDP (gradients of trials
    go through the same DDP module and communication hook), FSDP2, with accumulation, bf16 and fp16.

    Resume: a checkpoint holds the search's state and the random numbers of every rank. With a training loader that has
    `state_dict` and `load_state_dict` a resumed run continues bit for bit from any step.

    Memory: two snapshots of parameters, buffers and optimizer state during a search (see `snapshot`).

    Args:
        low: least rate to try, for the group with the greatest default.
        high: greatest rate to try.
        stage_steps: kept steps between searches, None: planned from the run's length.
        trial_steps: steps of a trial at most, None: planned.
        candidates: rates tried per search at most, None: planned.
        budget: greatest share of all optimizer steps that may be discarded, between 0 and 1.
        count: "kept": max_steps and max_epochs bound the kept steps; "all": kept and discarded steps together.
        warmup_steps: linear warmup that multiplies every rate, trials included, None: 2 % of the run.
        search_loss: "auto": `training_step` in eval mode on held-out batches of the validation loader, or of the
            training stream if there is none; "train": the trials' training losses; or callable(module, batch) -> loss.
        backend: "gp": own Gaussian process; "skopt": scikit-optimize.
        preset: "default", or "paper" for the published algorithm.
        seed: of the search; the same seed asks the same rates.
        memory_mib: MiB of batches that a search may hold; trials that need more end earlier, which is said.
        snapshot: where snapshots lie: "device", "cpu" (pinned) or "disk".
        report: whether the run gets a report in its logger's folder (see `RunReport`), or the folder of the report.

    Attributes:
        history: frozen record of stages, trials and counted steps; `history.as_dict()` is JSON-able.
        schedule: rates of the kept steps: `.rates`, `.save(path)`, `.load(path)`, `.scheduler(optimizer)` to replay.

    Raises:
        ValueError: at `setup` for arguments that break a rule, at the start of the fit for an unsupported run.
    """

    def __init__(
        self,
        low: float = 1e-5,
        high: float = 1.0,
        *,
        stage_steps: int | None = None,
        trial_steps: int | None = None,
        candidates: int | None = None,
        budget: float = 0.35,
        count: Literal["kept", "all"] = "kept",
        warmup_steps: int | None = None,
        search_loss: Literal["auto", "train"] | Callable[..., Any] = "auto",
        backend: Literal["gp", "skopt"] = "gp",
        preset: Literal["default", "paper"] = "default",
        seed: int = 0,
        memory_mib: int = 256,
        snapshot: Where = "device",
        report: bool | str | Path = True,
    ) -> None:
        super().__init__()
        self._options = Options(
            low,
            high,
            stage_steps,
            trial_steps,
            candidates,
            budget,
            count,
            warmup_steps,
            backend,
            preset,
            seed,
            memory_mib,
        )
        self._loss: SearchLoss = "train" if preset == "paper" and search_loss == "auto" else search_loss
        self._where: Where = snapshot
        self._report = report
        self._controller: Controller | None = None
        self._loaded: dict[str, Any] | None = None
        self._replay = Replay()
        self._rng: dict[str, Any] | None = None
        self._states: list[Any] | None = None
        # Kept step from which a hook has more to do than to count and to set the rate.
        self._event = 0.0
        self._fetcher: Lookahead | None = None
        self._given_steps: int | None = None
        self._state_text = ""

    # -- the record

    @property
    def history(self) -> History:
        """Record of the run so far."""
        return self._controller.history if self._controller else History()

    @property
    def schedule(self) -> LRSchedule:
        """Rates of the kept steps, as far as they are decided."""
        return self._controller.schedule if self._controller else LRSchedule(())

    def plot(self) -> "Figure":
        """The learning-rate staircase with every trial and its forecast band."""
        return plot(self.history, self.schedule)

    # -- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the arguments and the Trainer."""
        if stage != "fit":
            return
        self._options.check()
        check_where(self._where)
        if self._loss not in ("auto", "train") and not callable(self._loss):
            raise ValueError(
                f"search_loss must be 'auto', 'train' or a callable(module, batch), but got {self._loss!r}: leave it 'auto'"
            )
        if "DeepSpeed" in type(trainer.strategy).__name__:
            raise ValueError(
                f"AutoLRS must be able to put parameters and optimizer state back, but {type(trainer.strategy).__name__} "
                "owns them: use DDP or FSDP2 (ModelParallelStrategy)"
            )
        if not pl_module.automatic_optimization:
            raise ValueError(
                "AutoLRS runs the optimizer steps of trials itself, but the module has automatic_optimization=False: "
                "use automatic optimisation, or trainkit.autolrs.Tuner in your own loop"
            )
        self._controller, self._event = Controller(self._options), 0.0
        attach(trainer, self._report)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts back the random numbers of a checkpoint taken at an epoch's end, before the next epoch is shuffled."""
        if self._rng and self._rng["epoch_done"]:
            self._restore_rng(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plans the run, or takes up a resumed one."""
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"AutoLRS drives one optimizer, but the module has {len(trainer.optimizers)}: merge their groups"
            )
        _refuse(trainer, pl_module)
        controller = self._ready()
        total = trainer.estimated_stepping_batches
        if total == float("inf") or total <= 0:
            raise ValueError(f"AutoLRS must know the run's length, but max_steps={trainer.max_steps}: set max_steps")
        if not controller.begin(int(total), trainer.optimizers[0]) and not self._loaded:
            _say(f"AutoLRS: {total} steps are too few to search; training at {controller.rate(0):.1e} instead")
        if trainer.lr_scheduler_configs and not self._loaded:
            _say(
                "AutoLRS sets the learning rates: the module's LR scheduler goes on stepping, but its rates are overwritten"
            )
        callbacks: list[Any] = vars(trainer)["callbacks"]
        enders = [type(c).__name__ for c in callbacks if type(c).__name__ in ("EarlyStopping", "Timer")]
        if enders and not self._loaded and controller.plan and controller.plan.searches:
            _say(
                f"AutoLRS anneals towards step {int(total)}: a run that {' or '.join(enders)} ends before stays at the rate it "
                "then has; set max_steps to the length that you expect"
            )
        self._given_steps = trainer.fit_loop.epoch_loop.max_steps
        self._bound_steps(trainer)
        self._watch(trainer)
        self._show(trainer)
        if (
            self._loaded
            and self._rng
            and not self._rng["epoch_done"]
            and not (self._fetcher and self._fetcher.states())
        ):
            _say(
                "AutoLRS resumes in the midst of an epoch, but the training loader has no state_dict: the batches will "
                "not be those of the uninterrupted run; use a stateful loader, or checkpoints from epochs' ends"
            )
        if self._loaded:
            self._replay.start(trainer, Replay.from_state(self._loaded["replay"]))
            self._loaded = None
        if self._rng:
            self._restore_rng(trainer)
        self._remember_loader(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The loader may have been made anew for this epoch."""
        self._watch(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Searches if it is time; sets the step's rate."""
        controller, step = self._ready(), trainer.global_step
        if len(trainer.optimizers[0].param_groups) != len(controller.ratios):
            controller.follow_groups(trainer.optimizers[0], step)
        if step >= self._event and not self._replay and self._window_starts(trainer):
            search = controller.due(step)
            if search is not None:
                self._search(trainer, batch, search)
        set_rate(trainer.optimizers[0], controller.rate(step), controller.ratios)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts; around a search, shows its kept steps and remembers the loader's state."""
        controller = self._ready()
        controller.kept = trainer.global_step
        if controller.kept < self._event:
            return
        self._replay.batch_ended()
        self._states, self._event = None, 0.0
        if not self._replay:
            coming = controller.next_start
            if controller.kept == coming:
                self._remember_loader(trainer)
            else:
                self._event = math.inf if coming is None else coming

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the number of kept steps."""
        self._ready().kept = trainer.global_step

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves the Trainer as it was."""
        self._replay.stop()
        bar = trainer.progress_bar_callback
        if bar is not None:
            vars(bar).pop("get_metrics", None)
        if self._given_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps = self._given_steps
            self._given_steps = None
        self._fetcher = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Nothing to undo: an interrupted search has put the state before it back by itself."""

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Plan, record, search and the kept steps still to be shown to the loop."""
        if self._controller is None:
            return {}
        return {"controller": self._controller.state_dict(), "replay": self._replay.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up `state_dict`'s run."""
        if not state_dict:
            return
        self._ready().load_state_dict(state_dict["controller"])
        self._loaded = state_dict

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds every rank's random numbers, and the loader's state before batches were fetched ahead."""
        mine = rng_state()
        every = from_every_rank(mine) if trainer.world_size > 1 else [mine]
        done = self._fetcher is not None and self._fetcher.done
        checkpoint[_KEY] = {"rng": every, "epoch_done": done}
        states = self._states if self._states is not None else self._fetcher.states() if self._fetcher else None
        if states:
            checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps the random numbers until the Trainer is ready for them."""
        self._rng = checkpoint.get(_KEY)

    # -- parts

    def _ready(self) -> Controller:
        if self._controller is None:
            raise RuntimeError(
                "AutoLRS works inside Trainer.fit, but its setup was not called: pass it in callbacks=[...]"
            )
        return self._controller

    def _search(self, trainer: Trainer, batch: Any, search: Any) -> None:
        controller = self._ready()
        assert self._fetcher is not None
        search = self._bounded(trainer, batch, search)
        trials = TrainerTrials(trainer, self._fetcher, batch, search, controller.ratios, self._loss, self._where)
        try:
            with trials.quiet():
                outcome = controller.search(search, trials, lambda text: self._show(trainer, text))
                replayed = trials.settle(kept=outcome.committed > 0)
        except BaseException:
            trials.rewind()
            raise
        controller.note_forwards(trials.forwards)
        self._replay.start(trainer, replayed)
        self._bound_steps(trainer)
        if outcome.rate is None:
            _say(
                "AutoLRS: each rate that was tried ended with a higher loss than it began with (or nan), so the run goes on at "
                f"{controller.rate(trainer.global_step):.1e}, the optimizer's own rate or a lower one than all that failed; "
                "look at the data and at `low`"
            )
        rank_zero_info(controller.summary())
        self._show(trainer, f"stage {len(controller.history.stages)} lr {controller.history.stages[-1].rate:.1e}")
        for logger in trainer.loggers:
            last = controller.history.searches[-1]
            record = {"autolrs/rate": last.rate, "autolrs/discarded_steps": controller.history.discarded_steps}
            if math.isfinite(last.mean):
                record |= {"autolrs/forecast": last.mean, "autolrs/forecast_std": last.std}
            logger.log_metrics(record, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _bounded(self, trainer: Trainer, batch: Any, search: Search) -> Search:
        """Trials no longer than half of what lies between two validations, nor than the memory for their batches."""
        longest = search.trial_steps
        between = _steps_between_validations(trainer)
        if between is not None:
            longest = min(longest, max(between // 2, LEAST_TRIAL))
        size = sum(t.numel() * t.element_size() for t in tree_leaves(batch) if isinstance(t, torch.Tensor))
        held = self._options.memory_mib * 2**20 // max(size * trainer.accumulate_grad_batches, 1)
        if held < longest:
            _say(
                f"AutoLRS: trials of {longest} steps hold {longest * size // 2**20} MiB of batches, more than "
                f"memory_mib={self._options.memory_mib}: they end after {max(held, LEAST_TRIAL)}"
            )
            longest = max(held, LEAST_TRIAL)
        return replace(search, trial_steps=min(longest, search.trial_steps))

    def _window_starts(self, trainer: Trainer) -> bool:
        return (trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1) % trainer.accumulate_grad_batches == 0

    def _bound_steps(self, trainer: Trainer) -> None:
        """With count="all", discarded steps shorten the run."""
        if self._options.count == "all":
            trainer.fit_loop.epoch_loop.max_steps = self._ready().kept_total

    def _watch(self, trainer: Trainer) -> None:
        """Puts the look-ahead in front of the loop's data fetcher."""
        current = trainer.fit_loop._data_fetcher
        if not isinstance(current, Lookahead):
            self._fetcher = Lookahead(current, lambda: trainer.current_epoch)
            trainer.fit_loop._data_fetcher = self._fetcher  # type: ignore[assignment]

    def _remember_loader(self, trainer: Trainer) -> None:
        """A search may come before the next step: the loader's state now is the one before it."""
        self._states = self._fetcher.states() if self._fetcher else None

    def _restore_rng(self, trainer: Trainer) -> None:
        assert self._rng is not None
        states, self._rng = self._rng["rng"], None
        if trainer.global_rank < len(states):
            set_rng_state(states[trainer.global_rank])

    def _show(self, trainer: Trainer, text: str = "") -> None:
        """The search's state in the Trainer's own progress bar."""
        self._state_text = text or self._state_text
        bar: Any = trainer.progress_bar_callback
        if bar is None:
            return
        if "get_metrics" not in vars(bar):
            shown = bar.get_metrics
            bar.get_metrics = lambda *args: (
                {**shown(*args), "lr_search": self._state_text} if self._state_text else shown(*args)
            )
        line = getattr(bar, "_train_progress_bar", None)
        if line is not None:
            line.set_postfix(bar.get_metrics(trainer, trainer.lightning_module))
        elif hasattr(bar, "_update_metrics") and getattr(bar, "progress", None) is not None:
            bar._update_metrics(trainer, trainer.lightning_module)
            bar.refresh()


def _refuse(trainer: Any, module: Any) -> None:
    """Raises ValueError for what AutoLRS cannot work with, by name."""
    mine = [c for c in trainer.callbacks if isinstance(c, AutoLRS)]
    if len(mine) > 1:
        raise ValueError(f"one AutoLRS sets the rates, but the Trainer has {len(mine)}: leave one")
    for callback in trainer.callbacks:
        if type(callback).__name__ == "GradientAccumulationScheduler" and len(set(callback.scheduling.values())) > 1:
            raise ValueError(
                "AutoLRS must know the run's length in optimizer steps, but GradientAccumulationScheduler changes it to "
                f"{callback.scheduling}: use accumulate_grad_batches, which stays"
            )
    lazy = [n for n, p in module.named_parameters() if isinstance(p, torch.nn.parameter.UninitializedParameter)]
    if lazy:
        raise ValueError(
            f"AutoLRS puts parameters back, but {', '.join(lazy)} have no shape yet: run one batch through the module before fit"
        )


def _steps_between_validations(trainer: Any) -> int | None:
    """Optimizer steps between two validations; None without validation."""
    if not trainer.enable_validation or trainer.val_check_batch == float("inf"):
        return None
    batches = trainer.val_check_batch
    if trainer.check_val_every_n_epoch not in (None, 1):
        batches = batches * trainer.check_val_every_n_epoch
    return max(int(batches) // int(trainer.accumulate_grad_batches), 1)


def _say(text: str) -> None:
    from lightning_utilities.core.rank_zero import rank_zero_warn

    rank_zero_warn(text)
