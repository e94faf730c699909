"""Records what the report draws: one row an optimiser step, kept in the checkpoint, written as CSV."""

import csv
import hashlib
import io
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from trainkit._files import write_text_atomically

COLUMNS = (
    "step", "rate", "train_bits", "val_bits", "forward_s", "backward_s", "network_s", "optimizer_s", "step_s",
    "sent_bytes", "received_bytes", "retransmissions",
)  # fmt: skip


class Recorder(Callback):
    """One row a kept step: losses in bits a byte, seconds by phase, the network's counters since the start of the run.

    `network_s` is the part of the backward pass that waited for the network with nothing left to compute.

    Args:
        path: the CSV file.
        counters: the session's counters on this rank.
    """

    def __init__(self, path: Path, counters: Callable[[], Mapping[str, float]]) -> None:
        self._path, self._counters = path, counters
        self._rows: list[dict[str, Any]] = []
        self._marks: dict[str, float] = {}
        self._before: Mapping[str, float] = {}
        self._earlier: dict[str, float] = {}

    def _mark(self, name: str) -> None:
        self._marks[name] = time.perf_counter()

    def on_train_batch_start(self, *_: Any) -> None:
        """A step starts; a search that ran before it is not part of it."""
        self._before = self._counters()
        self._mark("start")

    def on_before_zero_grad(self, *_: Any) -> None:
        """The forward pass is over."""
        self._mark("forward")

    def on_before_backward(self, *_: Any) -> None:
        """The backward pass starts."""
        self._mark("backward")

    def on_after_backward(self, *_: Any) -> None:
        """The backward pass, and with it the network, is over."""
        self._mark("reduced")

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        """The step is over: write its row."""
        marks, now, counters = self._marks, time.perf_counter(), self._counters()
        waited = counters["wait_s"] - self._before["wait_s"]
        self._rows.append(
            {
                "step": trainer.global_step,
                "rate": trainer.optimizers[0].param_groups[0]["lr"],
                "train_bits": outputs["loss"].detach() / math.log(2),
                "forward_s": marks["forward"] - marks["start"],
                "backward_s": marks["reduced"] - marks["backward"] - waited,
                "network_s": waited,
                "optimizer_s": now - marks["reduced"],
                "step_s": now - marks["start"],
                **{name: self._total(counters, name) for name in ("sent_bytes", "received_bytes", "retransmissions")},
            }
        )

    def _total(self, counters: Mapping[str, float], name: str) -> float:
        return self._earlier.get(name, 0) + counters[name]

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Put the validation loss beside the step it belongs to."""
        if self._rows and "val_bits" in trainer.callback_metrics:
            self._rows[-1]["val_bits"] = float(trainer.callback_metrics["val_bits"])

    def write(self) -> None:
        """Write the CSV file, whole or not at all."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(self._plain())
        write_text_atomically(self._path, text.getvalue())

    def _plain(self) -> list[dict[str, Any]]:
        # losses stay on the device until somebody reads them: a step waits for no copy
        for row in self._rows:
            row["train_bits"] = round(float(row["train_bits"]), 6)
        return self._rows

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"rows": self._plain()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after those rows; the network's counters start anew with the session and are added to theirs."""
        self._rows = list(state["rows"])
        self._earlier = dict(self._rows[-1]) if self._rows else {}


def parameters_digest(module: torch.nn.Module) -> str:
    """SHA-256 of all parameters, in order: equal on two ranks iff they hold the same bits."""
    digest = hashlib.sha256()
    for parameter in module.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
