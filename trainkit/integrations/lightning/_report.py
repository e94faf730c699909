"""RunReport: a Lightning callback that records a run and writes its report."""

import math
import os
import shlex
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info

from trainkit._files import write_text_atomically
from trainkit.integrations.lightning._base import Callback
from trainkit.report import Run, environment, report

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer
else:
    Trainer = LightningModule = Any

_HELD = 256
"""Rows whose losses stay on the device before they are fetched together: a step waits for no copy."""
_COUNTERS = ("sent_bytes", "received_bytes", "retransmissions")


class RunReport(Callback):
    """Records one row an optimiser step and writes `report.html`, `run.json` and `metrics.csv` at the run's end.

    A run with `AutoLRS` or one of our strategies has one already, where Lightning writes logs (`report=False` there leaves
    it out). Rank 0 writes. A run that an exception ends is reported up to there.

    ```python
    Trainer(callbacks=[RunReport("runs/first")]).fit(model, loader)      # trainkit report runs/first runs/second
    ```

    Args:
        folder: where to; None: `trainkit/` in the first logger's folder, and nothing without one.
        name: of the run, None: the module's class.
        loss: metric of the validation to show, None: the first logged one whose name holds "val" and "loss".
        loss_unit: what the losses are measured in.
        scale: what the training loss is multiplied by, to be in that unit.

    Attributes:
        written: the report's path once there is one.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        name: str | None = None,
        loss: str | None = None,
        loss_unit: str = "loss",
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.folder = None if folder is None else Path(folder)
        self.written: Path | None = None
        self._name, self._loss, self._unit, self._scale = name, loss, loss_unit, scale
        self._rows: list[dict[str, Any]] = []
        self._fetched = 0
        self._marks: dict[str, float] = {}
        self._waited = 0.0
        self._earlier: dict[str, float] = {}
        self._begun = self._spent = 0.0
        self._date = ""

    # -- recording

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The run starts, or goes on."""
        self._begun, self._date = (
            time.monotonic(),
            self._date or datetime.now().astimezone().isoformat(timespec="seconds"),
        )
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A batch starts; a search that ran before it is not part of it."""
        if "start" not in self._marks:
            self._marks = {"start": time.perf_counter(), "forward": 0.0, "backward": 0.0}
            self._waited = _counters(trainer).get("wait_s", 0.0)
        self._marks["batch"] = time.perf_counter()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        """The forward pass is over."""
        self._marks["computed"] = time.perf_counter()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The backward pass, and with it the network, is over."""
        now, marks = time.perf_counter(), self._marks
        if "batch" in marks and "computed" in marks:
            marks["forward"] += marks["computed"] - marks["batch"]
            marks["backward"] += now - marks["computed"]
            marks["reduced"] = now

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Where an optimiser step was made: its row."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        now, marks, self._marks = time.perf_counter(), self._marks, {}
        counters = _counters(trainer)
        row: dict[str, Any] = {"step": self._step, "loss": _loss_of(outputs)}
        if trainer.optimizers:
            row["rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        if "reduced" in marks:  # else the step was made in a search, and is shown to the loop now
            waited = max(0.0, min(counters.get("wait_s", 0.0) - self._waited, marks["backward"]))
            row |= {
                "forward_s": marks["forward"],
                "backward_s": marks["backward"] - waited,
                "network_s": waited,
                "optimizer_s": now - marks["reduced"],
                "step_s": now - marks["start"],
            }
        row |= {name: self._earlier.get(name, 0.0) + counters[name] for name in _COUNTERS if name in counters}
        self._rows.append(row)
        if len(self._rows) - self._fetched >= _HELD:
            self._fetch()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the validation's loss beside the step it belongs to."""
        metrics = trainer.callback_metrics
        name = self._loss or next((n for n in metrics if "val" in n.lower() and "loss" in n.lower()), None)
        if self._rows and name in metrics and not trainer.sanity_checking:
            self._rows[-1]["val_loss"] = float(metrics[name])

    def _fetch(self) -> None:
        """Turn the tensors among the newest rows' values into numbers, all in one copy."""
        found = [
            (row, key)
            for row in self._rows[self._fetched :]
            for key in ("loss", "rate")
            if isinstance(row.get(key), torch.Tensor)
        ]
        if found:
            values = torch.stack([row[key].detach().double().reshape(()) for row, key in found]).tolist()
            for (row, key), value in zip(found, values, strict=True):
                row[key] = value * (self._scale if key == "loss" else 1.0)
        self._fetched = len(self._rows)

    # -- the end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report."""
        self._write(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what there is."""
        self._write(trainer, pl_module)

    def write_rows(self) -> list[dict[str, float]]:
        """The rows so far, as numbers."""
        self._fetch()
        return self._rows

    def run(self, trainer: Trainer, results: Mapping[str, float] | None = None) -> Run:
        """The record as it stands.

        Args:
            trainer: of the run.
            results: figures of the run as a whole; None: the last losses.
        """
        rows = self.write_rows()
        names = list(dict.fromkeys(name for row in rows for name in row))
        columns = {name: [float(row.get(name, math.nan)) for row in rows] for name in names}
        module = trainer.lightning_module
        last = {name: [row[name] for row in rows if name in row] for name in ("loss", "val_loss")}
        auto: Any = next((c for c in trainer.callbacks if type(c).__name__ == "AutoLRS"), None)  # type: ignore[attr-defined]
        counters = _counters(trainer)
        return Run(
            name=self._name or type(module).__name__,
            started=self._date,
            seconds=round(self._spent + time.monotonic() - self._begun, 3),
            command=shlex.join([Path(sys.executable).name, *sys.argv]),
            environment=environment(),
            settings=_settings(trainer),
            results=dict(results) if results is not None else {f"last {n}": v[-1] for n, v in last.items() if v},
            loss_unit=self._unit,
            search=auto.history.as_dict() if auto else None,
            counters={name: counters[name] for name in sorted(counters)} or None,
            links=_links(trainer, counters),
            columns=columns,
        )

    def _write(self, trainer: Trainer, module: LightningModule) -> None:
        folder = self.folder
        if folder is None and trainer.loggers and trainer.log_dir:
            folder = Path(trainer.log_dir) / "trainkit"
        if folder is None or not self._rows or not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        run = self.run(trainer)
        run.save(folder)
        self.written = folder / "report.html"
        write_text_atomically(self.written, report([run]))
        rank_zero_info(f"report: {os.path.relpath(self.written)}")

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, of a callback that was asked for by name: what comes along by itself adds nothing to checkpoints."""
        if self.folder is None:
            return {}
        spent = self._spent + time.monotonic() - self._begun
        return {"rows": [dict(row) for row in self.write_rows()], "date": self._date, "spent": spent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after those rows; the network's counters start anew with the session and are added to theirs."""
        if state_dict:
            self._rows, self._date, self._spent = list(state_dict["rows"]), state_dict["date"], state_dict["spent"]
            self._fetched = len(self._rows)
            self._earlier = dict(self._rows[-1]) if self._rows else {}


def attach(trainer: Any, where: bool | str | Path) -> None:
    """Give a Trainer a RunReport, unless it has one or `where` is False; True means the logger's folder."""
    if where is False or any(isinstance(callback, RunReport) for callback in trainer.callbacks):
        return
    trainer.callbacks.append(RunReport(None if where is True else where))


def _counters(trainer: Any) -> Mapping[str, float]:
    return trainer.strategy.counters() if hasattr(trainer.strategy, "counters") else {}


def _loss_of(outputs: Any) -> Any:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss.detach() if isinstance(loss, torch.Tensor) and loss.numel() == 1 else math.nan


def _settings(trainer: Any) -> dict[str, Any]:
    return {
        "strategy": type(trainer.strategy).__name__,
        "ranks": trainer.world_size,
        "precision": str(trainer.precision),
        "max_steps": trainer.max_steps,
        "max_epochs": trainer.max_epochs,
        "batches a step": trainer.accumulate_grad_batches,
        "parameters": sum(p.numel() for p in trainer.lightning_module.parameters()),
        "seed": os.environ.get("PL_GLOBAL_SEED", ""),
    }


def _links(trainer: Any, counters: Mapping[str, float]) -> dict[str, float] | None:
    """Bytes that each directed link carried, from the schedule and from what this rank received."""
    schedule = getattr(getattr(trainer.strategy, "hook_state", None), "ran", None)
    if schedule is None or not counters.get("received_bytes"):
        return None
    rank = trainer.global_rank
    moved = [op for op in schedule.ops if op.kind != "copy"]
    mine = sum((op.stop - op.start for op in moved if op.dst == rank), Fraction())
    if not mine:
        return None
    loads: dict[str, Fraction] = {}
    for op in moved:
        for u, v in zip(op.path, op.path[1:], strict=False):
            loads[f"{u}→{v}"] = loads.get(f"{u}→{v}", Fraction()) + (op.stop - op.start)
    return {link: float(load / mine * int(counters["received_bytes"])) for link, load in loads.items()}
