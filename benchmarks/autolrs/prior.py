"""Records the library of runs that AutoLRS's prior is fitted on, and fits it.

    python benchmarks/autolrs/prior.py record [--processes 16] [--seeds 3] [--tasks a,b] [--seconds 100]
    python benchmarks/autolrs/prior.py fit [--without TASK]

A run has a linear warmup of 2 %, a flat half, and falls linearly to zero in its second half. For each task and seed there are
the nine whole runs at nine rates, and from the state after a tenth of two of them, short trials and whole continuations at
seven rates around the present one. Losses of the first tenth and of trials are measured as a search measures them: on a few
held-out batches, at a running average of the weights. One JSON file a job; interrupt at any time and call again.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from library import GRID, LIBRARY, RUNS
from run import valid_loss
from tasks import Task

from trainkit.autolrs._average import WeightAverage
from trainkit.autolrs._snapshot import Snapshot, unseen

START, TRIAL, DECAY = 0.1, 0.05, 1 / 3
# Indices of the rates (of GRID) after whose first tenth there is a search, and the steps around them, in half decades.
BASES, AROUND = (3, 5), range(-3, 4)


def shape(step: int, steps: int) -> float:
    """The schedule's factor on the peak rate."""
    warm = max(round(0.02 * steps), 1)
    return min((step + 1) / warm, 1.0, (steps - step) / (steps / 2))


class Run:
    """A task in training, one optimizer step at a time."""

    def __init__(self, task: Task, rate: float) -> None:
        self.task, self.optimizer, self.stream = task, task.optimizer(task.model, rate), iter(task.loader)
        held = torch.Generator().manual_seed(555)
        self.held_out = [task.loader._draw(held) for _ in range(6)]
        self.ahead: list[Any] = []
        self.at = 0

    def batch(self, index: int) -> Any:
        """The batch of step `index`, not before the last one forgotten."""
        while len(self.ahead) <= index:
            self.ahead.append(next(self.stream))
        return self.ahead[index]

    def step(self, index: int, rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss = self.task.loss(self.task.model, self.batch(index))
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def measured(self, average: WeightAverage | None = None) -> float:
        model = self.task.model
        with unseen(model):
            if average is None:
                return float(torch.stack([self.task.loss(model, b) for b in self.held_out]).mean())
            with average.applied():
                return float(torch.stack([self.task.loss(model, b) for b in self.held_out]).mean())


def whole(task: Task, rate: float) -> dict[str, Any]:
    """A run from scratch: the first tenth at averaged weights, the last loss."""
    run, average, steps = Run(task, rate), WeightAverage(task.model), task.steps
    every = max(round(TRIAL * steps / 8), 1)
    curve, trained = [(0, run.measured())], []
    for step in range(steps):
        trained.append(run.step(step, rate * shape(step, steps)))
        if not math.isfinite(trained[-1]):
            break
        if step < 2 * TRIAL * steps:
            average.update()
            if (step + 1) % every == 0:
                curve.append((step + 1, run.measured(average)))
        elif (step + 1) % (8 * every) == 0:
            curve.append((step + 1, run.measured()))
    return {"curve": curve, "trained": trained, "final": valid_loss(task)}


def branches(task: Task, base: float, rates: list[float]) -> dict[str, Any]:
    """From the state after a tenth at `base`: trials, flat and falling, and whole continuations, at each of `rates`."""
    run, steps = Run(task, base), task.steps
    start = round(START * steps)
    for step in range(start):
        if not math.isfinite(run.step(step, base * shape(step, steps))):
            return {"start": start, "diverged": True}
    before = Snapshot([task.model], [run.optimizer])
    before.save()
    first = run.measured()
    length = max(round(TRIAL * steps), 8)
    decay, every = round(DECAY * length), max(length // 8, 1)
    found: list[dict[str, Any]] = []
    for rate in rates:
        entry: dict[str, Any] = {"rate": rate}
        for kind in ("flat", "decay"):
            before.restore()
            average, points, trained = WeightAverage(task.model), [(0, first)], []
            for i in range(length):
                share = min((length - i) / (decay + 1), 1.0) if kind == "decay" else 1.0
                trained.append(run.step(start + i, rate * share))
                if not math.isfinite(trained[-1]):
                    break
                average.update()
                if (i + 1) % every == 0 or i + 1 == length:
                    points.append((i + 1, run.measured(average)))
            entry[kind], entry[f"{kind}_trained"] = points, trained
        before.restore()
        for step in range(start, steps):
            if not math.isfinite(run.step(step, rate * shape(step, steps))):
                break
        entry["final"] = valid_loss(task)
        found.append(entry)
    return {"start": start, "trial": length, "decay": decay, "branches": found}


def job(name: str, seed: int, kind: str, index: int) -> None:
    """Does one job unless its file is there."""
    target = RUNS / "library" / f"{name}.{seed}.{kind}{index}.json"
    if target.exists() or time.time() > float(os.environ.get("AUTOLRS_UNTIL", "inf")):
        return
    torch.set_num_threads(1)
    began, made = time.perf_counter(), LIBRARY[name](seed)
    rates = [made.default * g for g in GRID]
    torch.manual_seed(seed)
    if kind == "whole":
        result = {"rate": rates[index], **whole(made, rates[index])}
    else:
        result = {"rate": rates[index]} | branches(made, rates[index], [rates[index] * 10 ** (0.5 * i) for i in AROUND])
    kept = made.optimizer(made.model, made.default)
    result |= {
        "task": name,
        "seed": seed,
        "kind": kind,
        "index": index,
        "steps": made.steps,
        "centre": made.default,
        "optimizer": type(kept).__name__,
        "seconds": time.perf_counter() - began,
    }
    part = target.with_suffix(f".{os.getpid()}.tmp")
    part.write_text(json.dumps(result, allow_nan=True))
    os.replace(part, target)
    print(f"{target.name}: {result['seconds']:.1f} s", flush=True)


def record(args: argparse.Namespace) -> None:
    """Every job that has no file yet, the long ones first, on all cores."""
    (RUNS / "library").mkdir(parents=True, exist_ok=True)
    names = args.tasks.split(",") if args.tasks else [*LIBRARY]
    jobs = [(n, s, "branch", i) for s in range(args.seeds) for n in names for i in BASES]
    jobs += [(n, s, "whole", i) for s in range(args.seeds) for n in names for i in range(len(GRID))]
    os.environ["AUTOLRS_UNTIL"] = str(time.time() + args.seconds)
    os.environ["OMP_NUM_THREADS"] = "1"
    tuned = [n for n in names if n.startswith("finetune")]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        pool.starmap(_pretrain, [(n, s) for s in range(args.seeds) for n in tuned], chunksize=1)
        pool.starmap(job, jobs, chunksize=1)


def _pretrain(name: str, seed: int) -> None:
    torch.set_num_threads(1)
    LIBRARY[name](seed)


def recorded(folder: Path) -> Iterator[dict[str, Any]]:
    """The jobs' results."""
    for path in sorted((folder / "library").glob("*.json")):
        yield json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record"])
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", default=None)
    parser.add_argument("--seconds", type=float, default=math.inf, help="no job begins later")
    args = parser.parse_args()
    record(args)


if __name__ == "__main__":
    sys.exit(main())
