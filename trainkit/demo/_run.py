"""The demo's parent: one switch, the arms one after the other, a table and a report."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trainkit._files import write_text_atomically
from trainkit._processes import Workers
from trainkit.demo._config import ARMS, Config


def prepare(config: Config, folder: Path, *, overwrite: bool) -> None:
    """Make a run's folder with its `config.json`.

    Raises:
        ValueError: the folder holds a run already.
    """
    if (folder / "config.json").exists():
        if not overwrite:
            raise ValueError(f"--out must not hold a run, {folder} does: --resume it, --overwrite it or name another")
        # the config goes first: a folder without it is no run, whatever else a kill leaves in it
        (folder / "config.json").unlink()
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save(folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the run's folder; two parents in one folder would write over each other."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder} must be used by one demo at a time, another one runs in it: wait for it"
            ) from None
        yield


def run(config: Config, folder: Path, *, switch: str | None = None, port: int = 0) -> list[dict[str, Any]]:
    """Train all arms that are not finished yet, then write the table and the report.

    Args:
        config: the run.
        folder: prepared by `prepare`.
        switch: "host:port" of a running switch; None starts one on loopback, which stops at the end.
        port: of that one, 0 for any free one.

    Returns:
        One result an arm, in ARMS's order.

    Raises:
        WorkerFailed: a worker ended early.
        OSError: the port is in use.
    """
    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_locked(folder))
        # from here on PyTorch is needed; a worker, which imports this package, binds itself to its parent before it
        from trainkit.demo._corpus import write_corpus
        from trainkit.switchml import SoftwareSwitch

        if not (folder / "validation.bin").exists():  # written last
            write_corpus(folder)
        if switch is None:
            # a channel takes a thread here and one of each worker
            channels = min(8, max(1, (os.cpu_count() or 1) // (2 * config.workers)))
            switch = stack.enter_context(SoftwareSwitch(f"127.0.0.1:{port}", threads=channels)).address
        results = []
        for number, (arm, label) in enumerate(ARMS.items(), 1):
            path = folder / arm / "result.json"
            if not path.exists():
                console.print(
                    f"[bold]{number}/{len(ARMS)}[/bold] {label}: {config.steps} steps, {config.workers} workers"
                )
                job = {"folder": str(folder), "arm": arm, "switch": switch}
                logs = folder / "logs"
                (folder / arm).mkdir(exist_ok=True)
                with Workers(
                    "trainkit.demo._worker", job, count=config.workers, logs=logs, grace_s=config.deadline_s
                ) as workers:
                    workers.wait()
            results.append(json.loads(path.read_text()))
    _finish(config, folder, results)
    console.print(_table(results))
    console.print(f"report: {os.path.relpath(folder / 'report.html')}")
    return results


def _finish(config: Config, folder: Path, results: list[dict[str, Any]]) -> None:
    from trainkit.report import Run, report

    shutil.copyfile(folder / "autolrs" / "metrics.csv", folder / "metrics.csv")
    title = f"Trainkit demo: a byte-level GPT of {results[0]['parameters']:,} parameters"
    write_text_atomically(folder / "report.html", report([Run.load(folder / arm) for arm in ARMS], title))


def _table(results: list[dict[str, Any]]) -> Table:
    table = Table(title="bits a byte on held-out files, at equal optimiser steps (discarded ones counted)")
    for name in ("arm", "bits a byte", "kept", "discarded", "seconds"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    best = min(result["val_bits"] for result in results)
    for result in results:
        discarded = result["history"]["discarded_steps"] if result["history"] else 0
        style = "bold" if result["val_bits"] == best else None
        table.add_row(
            ARMS[result["arm"]],
            f"{result['val_bits']:.3f}",
            str(result["kept_steps"]),
            str(discarded),
            f"{result['seconds']:.0f}",
            style=style,
        )
    return table
