"""What one run left: `run.json` with its facts and `metrics.csv` with one row an optimiser step."""

import csv
import io
import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trainkit._files import write_text_atomically

VERSION = 1
PHASES = ("forward_s", "backward_s", "network_s", "optimizer_s")
"""Columns that split a step's seconds; `network_s` is what the backward pass waited for the network at its end."""
_PACKAGES = ("trainkit-systems", "torch", "pytorch-lightning", "lightning", "triton", "numpy", "scipy")


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: what the run is called.
        started: date and time with zone, ISO 8601.
        seconds: how long it took.
        command: how the process was started.
        environment: what it ran on.
        settings: what was asked for.
        results: figures of the run as a whole, such as the last held-out loss.
        loss_unit: of `loss` and `val_loss`.
        search: `History.as_dict()` of AutoLRS, None without.
        counters: of the network at the end, None without.
        links: bytes that each directed link carried, "u->v", None where they are not known.
        kernels: paths that kernels took: what, path, why.
        columns: name to one value an optimiser step, nan where there is none. `step`, `rate`, `loss`, `val_loss`, the
            `PHASES`, `step_s`, and the network's counters since the start.
    """

    name: str
    started: str = ""
    seconds: float = 0.0
    command: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, float] = field(default_factory=dict)
    loss_unit: str = ""
    search: Mapping[str, Any] | None = None
    counters: Mapping[str, float] | None = None
    links: Mapping[str, float] | None = None
    kernels: Sequence[Sequence[str]] = ()
    columns: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write both files, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        facts = {key: value for key, value in asdict(self).items() if key != "columns"}
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(self.columns)
        for row in zip(*self.columns.values(), strict=True):
            writer.writerow(["" if math.isnan(value) else f"{value:.9g}" for value in row])
        write_text_atomically(folder / "metrics.csv", text.getvalue())
        write_text_atomically(folder / "run.json", json.dumps({"version": VERSION, **_plain(facts)}, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Run":
        """Read a run.

        Raises:
            ValueError: the folder holds no run, or one of another version, or its files are not what `save` writes.
        """
        path = folder / "run.json"
        if not path.exists():
            raise ValueError(f"a run's folder holds run.json, {folder} does not: give the folder that a run reported")
        try:
            facts = json.loads(path.read_text())
            found = facts.pop("version")
            if found != VERSION:
                raise ValueError(f"version {VERSION} of a run is read here, got {found}")
            with (folder / "metrics.csv").open() as file:
                header, *rows = csv.reader(file)
            columns = {name: [float(row[at] or "nan") for row in rows] for at, name in enumerate(header)}
            return cls(**facts, columns=columns)
        except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{folder} must hold a run's run.json and metrics.csv, but {error}: run it again"
            ) from error

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """(steps, values) where there is a value."""
        values = self.columns.get(name, ())
        steps = self.columns.get("step", range(len(values)))[: len(values)]
        pairs = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
        return [step for step, _ in pairs], [value for _, value in pairs]


def environment() -> dict[str, str]:
    """What this process runs on: interpreter, system, processor, GPUs, and the versions of what matters."""
    facts = {"Python": platform.python_version(), "system": platform.platform(), "cores": str(os.cpu_count())}
    if torch := sys.modules.get("torch"):
        names = (
            [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
            if torch.cuda.is_available()
            else []
        )
        facts["GPUs"] = ", ".join(names) or "none"
    for package in _PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return facts


def _plain(value: Any) -> Any:
    """JSON has no nan: such numbers are null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    return str(value)
