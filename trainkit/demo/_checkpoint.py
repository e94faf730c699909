"""Checkpoints that survive a kill at any moment: written beside, synced, renamed; two kept; the newest whole one read."""

import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from trainkit._files import publish

_KEPT = 2


class DurableCheckpointIO(TorchCheckpointIO):
    """torch.save into a temporary file, fsync, rename: a checkpoint that has its name is whole."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write `checkpoint` to `path`, all of it or nothing."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)


class RollingCheckpoint(Checkpoint):
    """Saves every `every` steps into `folder` and keeps the last two.

    Args:
        folder: where to.
        every: optimiser steps between two checkpoints.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self._folder, self._every = folder, every
        self._last = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Save where the next multiple of `every` was reached."""
        step = trainer.global_step
        if step // self._every == self._last // self._every:
            return
        self._last = step
        trainer.save_checkpoint(self._folder / f"step-{step:08d}.ckpt")
        if trainer.is_global_zero:
            for old in _by_age(self._folder)[:-_KEPT]:
                old.unlink()

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Count from where a resumed run stands."""
        self._last = trainer.global_step


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` whose every record has the checksum it was written with; None if there is none.

    Raises:
        ValueError: there are checkpoints and none of them is whole.
    """
    candidates = _by_age(folder)
    for path in reversed(candidates):
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is None:
                    return path
        except (zipfile.BadZipFile, OSError):
            continue
    if candidates:
        names = ", ".join(path.name for path in candidates)
        raise ValueError(f"a resumed run needs a checkpoint that is whole, none in {folder} is ({names}): start anew")
    return None


def _by_age(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.ckpt"))


def parameters_digest(module: torch.nn.Module) -> str:
    """SHA-256 of all parameters, in order: equal on two ranks iff they hold the same bits."""
    digest = hashlib.sha256()
    for parameter in module.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
