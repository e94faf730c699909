"""What short trials say of whole runs: the recordings behind the constants in `autolrs/prior.json`.

    python benchmarks/autolrs/prior.py [--seeds 2] [--tasks a,b]

From the state after a tenth of a run at a usual rate, the run goes on at each of eight rates half a decade apart, along the
schedule that a search leaves: flat to half of the run, then linearly to zero. Printed for each rate: the loss at averaged
weights after 4 % of the run over the one at its start, whether a search would call that harm, and the final loss over the best
one's. Then the best rates over the class's usual ones: `usual_offset` and `usual_std` are near their median and spread. One JSON
line a task and seed; interrupt at any time and call again. Only the tasks for development: no choice is made on the others.
"""

import argparse
import json
import math
from pathlib import Path
from statistics import median
from typing import Any

import torch
from library import DEVELOPMENT, LIBRARY, RUNS
from run import valid_loss
from tasks import TASKS, Task

from trainkit.autolrs._average import WeightAverage
from trainkit.autolrs._prior import default_prior
from trainkit.autolrs._schedule import known_rate
from trainkit.autolrs._snapshot import Snapshot, unseen

START, TRIAL, WARMUP, RATES = 0.1, 0.04, 0.02, range(-2, 6)


class Run:
    """A task in training, one optimizer step at a time; all continuations see the same batches."""

    def __init__(self, task: Task, rate: float) -> None:
        self.task, self.optimizer, self.stream = task, task.optimizer(task.model, rate), iter(task.loader)
        held = torch.Generator().manual_seed(555)
        self.held_out = [task.loader._draw(held) for _ in range(6)]
        self.batches: list[Any] = []

    def step(self, index: int, rate: float) -> float:
        while len(self.batches) <= index:
            self.batches.append(next(self.stream))
        warm = max(round(WARMUP * self.task.steps), 1)
        factor = min((index + 1) / warm, 1.0, 2.0 * (self.task.steps - index) / self.task.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * factor
        self.optimizer.zero_grad()
        loss = self.task.loss(self.task.model, self.batches[index])
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def measured(self, average: WeightAverage | None = None) -> float:
        with unseen(self.task.model):
            if average is None:
                return float(torch.stack([self.task.loss(self.task.model, b) for b in self.held_out]).mean())
            with average.applied():
                return self.measured()


def recorded(name: str, seed: int) -> dict[str, Any]:
    """The continuations of a task."""
    task = (TASKS | LIBRARY)[name](seed, "cpu")
    torch.manual_seed(seed)
    usual = known_rate(task.optimizer(task.model, task.default)) or task.default
    base = usual if task.default > usual / 100 else task.default  # regression_raw diverges at 0.1
    run, steps = Run(task, base), task.steps
    start, length = round(START * steps), max(round(TRIAL * steps), 8)
    began = run.measured()
    for step in range(start):
        run.step(step, base)
    before, first, found = Snapshot([task.model], [run.optimizer]), run.measured(), []
    before.save()
    for k in RATES:
        before.restore()
        rate, average, ended = base * 10 ** (k / 2), WeightAverage(task.model), math.nan
        for step in range(start, steps):
            if not math.isfinite(run.step(step, rate)):
                break
            if step < start + length:
                average.update()
                if step == start + length - 1:
                    ended = run.measured(average)
        found.append({"rate": rate, "ended": ended, "final": valid_loss(task)})
    return {"task": name, "seed": seed, "usual": usual, "began": began, "start": first, "branches": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(DEVELOPMENT))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RUNS / "branches.jsonl")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    results = [json.loads(line) for line in lines]
    for seed in range(args.seeds):
        for name in args.tasks.split(","):
            if (name, seed) not in {(r["task"], r["seed"]) for r in results}:
                results.append(recorded(name, seed))
                with args.out.open("a") as file:
                    file.write(json.dumps(results[-1]) + "\n")
    offsets: dict[str, list[float]] = {}
    for r in results:
        best = min((b for b in r["branches"] if math.isfinite(b["final"])), key=lambda b: b["final"])
        most = r["start"] + default_prior().slack * max(r["began"] - r["start"], 0.0)
        print(f"{r['task']} {r['seed']}: usual {r['usual']:g}, loss {r['began']:.4g}, then {r['start']:.4g}")
        for b in r["branches"]:
            verdict = "works" if b["ended"] <= most else "harm"
            print(
                f"    {b['rate']:8.2g} {b['ended'] / r['start']:10.3f} {verdict:6} {b['final'] / best['final']:10.3f}"
            )
        offsets.setdefault(r["task"], []).append(math.log10(best["rate"] / r["usual"]))
    means = [sum(v) / len(v) for v in offsets.values()]
    middle = median(means)
    print(
        f"best over usual rate: median {middle:.2f}, spread {1.4826 * median(abs(m - middle) for m in means):.2f} decades"
    )


if __name__ == "__main__":
    main()
