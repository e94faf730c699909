"""Records the library of runs that AutoLRS's prior is fitted on, and fits it.

    python benchmarks/autolrs/prior.py record [--processes 16] [--seeds 3] [--tasks a,b] [--seconds 100]
    python benchmarks/autolrs/prior.py fit

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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from library import GRID, LIBRARY, RUNS
from run import valid_loss
from tasks import Task

import trainkit.autolrs
from trainkit.autolrs._average import WeightAverage
from trainkit.autolrs._belief import Known
from trainkit.autolrs._law import AVERAGED
from trainkit.autolrs._prior import Prior, default_prior
from trainkit.autolrs._snapshot import Snapshot, unseen
from trainkit.autolrs.strategies import Bayesian, Situation, Trial

DEFAULT = Path(trainkit.autolrs.__file__).with_name("prior.json")

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


def recorded(folder: Path) -> list[dict[str, Any]]:
    """The jobs' results."""
    return [json.loads(path.read_text()) for path in sorted((folder / "library").glob("*.json"))]


# -- the fit: searches on the recorded losses, no training

# The constants that are fitted, and the values that are compared.
GROWTHS, WEIGHTS, FIRST_WEIGHTS = (0.55, 0.7, 0.95), (0.4, 0.5, 0.65, 0.8), (0.65, 1.0, 1.4, 2.0)
# Shares of a recorded trial's points that a search sees: trials of 3.75 and of 5 % of the run.
POINTS = (6, 8)
# A regret beyond this factor is one mistake, however great.
WORST = math.e


class Recorded:
    """Trials on recorded losses: `finals` are what each rate came to."""

    averaged = True

    def __init__(self, rates: list[float], curves: list[Any], finals: list[float | None], start: int) -> None:
        self.rates, self.curves, self.start = rates, curves, start
        self.finals = [f if f is not None and math.isfinite(f) else math.inf for f in finals]

    def regret(self, rate: float | None) -> float:
        """Log of the final loss over the best one's, capped."""
        best = min(self.finals)
        if rate is None:
            return math.log(WORST)
        final = self.finals[self.rates.index(rate)]
        return min(math.log(max(final, 1e-300) / max(best, 1e-300)), math.log(WORST))

    def path(self, rate: float, count: int, done: float, sums: Any) -> Trial:
        """The trial of a rate as far as `count` points."""
        curve = self.curves[self.rates.index(rate)][: count + 1]
        values = [math.nan if v is None else v for _, v in curve]
        bad = len(curve) <= count or not all(map(math.isfinite, values))
        clock = tuple(done + AVERAGED * rate * float(sums[self.start + s] - sums[self.start]) for s, _ in curve)
        steps = tuple(int(s) for s, _ in curve)
        return Trial(rate, steps[-1] if steps else 0, steps, tuple(values), clock, not bad, bad)


def searched(prior: Prior, entry: dict[str, Any], count: int, most: int = 3) -> float:
    """Regret of a search on a recorded branch, or of the best of all rates at the run's start."""
    first, steps = entry["kind"] == "whole", entry["steps"]
    sums = np.concatenate([[0.0], np.cumsum([shape(i, steps) for i in range(steps)])])
    trials: Recorded = entry["trials"]
    start, base = trials.start, entry["base"]
    done, length = base * float(sums[start]), max(round(TRIAL * steps * count / 8), 1)
    at = Situation(
        first,
        done,
        0.0,
        float(sums[-1] - sums[start]),
        steps - start,
        steps - start,
        length,
        base,
        entry["usual"],
        base,
    )
    known = [] if first else [Known(math.log10(base), math.hypot(prior.drift, 0.3))]
    low, high = trials.rates[0], trials.rates[-1]
    strategy = Bayesian(prior, at, known, [], [], low, high, True)
    if first:
        for rate in trials.rates:
            strategy.observe(trials.path(rate, count, done, sums))
    else:
        asked: list[float] = []
        while len(asked) < most and (rate := strategy.propose()) is not None:
            left = [r for r in trials.rates if r not in asked]
            asked.append(min(left, key=lambda r: abs(math.log(r / rate))))
            strategy.observe(trials.path(asked[-1], count, done, sums))
    best = strategy.choose()
    return trials.regret(None if best is None else strategy.rates[best])


def entries(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The recorded jobs as searches."""
    usual = {"SGD": 0.1, "Adafactor": 1e-2}
    made, wholes = [], {}
    for job in found:
        common = {"task": job["task"], "steps": job["steps"], "usual": usual.get(job["optimizer"], 1e-3)}
        if job["kind"] == "branch" and "branches" in job:
            parts = job["branches"]
            trials = Recorded(
                [p["rate"] for p in parts], [p["flat"] for p in parts], [p["final"] for p in parts], job["start"]
            )
            made.append({**common, "kind": "branch", "base": job["rate"], "trials": trials})
        elif job["kind"] == "whole":
            wholes.setdefault((job["task"], job["seed"]), (common, job["centre"], []))[2].append(job)
    for common, centre, jobs in wholes.values():
        if len(jobs) == len(GRID):
            jobs.sort(key=lambda j: j["rate"])
            trials = Recorded([j["rate"] for j in jobs], [j["curve"] for j in jobs], [j["final"] for j in jobs], 0)
            made.append({**common, "kind": "whole", "base": centre, "trials": trials})
    return made


def fit(args: argparse.Namespace) -> None:
    """Compares the constants on every recorded search; writes the prior of all tasks, and of all but one for each."""
    all_entries = entries(recorded(RUNS))
    names = sorted({e["task"] for e in all_entries})
    base = default_prior()
    table: dict[tuple[str, tuple[float, ...]], dict[str, list[float]]] = {}
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for kind, options in (
            ("branch", [(g, w) for g in GROWTHS for w in WEIGHTS]),
            ("whole", [(g, w) for g in GROWTHS for w in FIRST_WEIGHTS]),
        ):
            mine = [e for e in all_entries if e["kind"] == kind]
            for growth, weight in options:
                prior = replace(base, growth=growth, **{"later_weight" if kind == "branch" else "first_weight": weight})
                todo = [(prior, e, count) for e in mine for count in POINTS]
                regrets: dict[str, list[float]] = {}
                for (_, e, _), value in zip(todo, pool.starmap(searched, todo, chunksize=8), strict=True):
                    regrets.setdefault(e["task"], []).append(value)
                table[kind, (growth, weight)] = regrets
                print(kind, growth, weight, f"{np.mean([np.mean(v) for v in regrets.values()]):.4f}", flush=True)

    def fitted(tasks: list[str]) -> dict[str, float]:
        def mean(kind: str, option: tuple[float, ...]) -> float:
            return float(np.mean([np.mean(table[kind, option][t]) for t in tasks if t in table[kind, option]]))

        growth, later = min((o for k, o in table if k == "branch"), key=lambda o: mean("branch", o))
        first = min((o for k, o in table if k == "whole" and o[0] == growth), key=lambda o: mean("whole", o))[1]
        offsets = [
            math.log10(e["trials"].rates[int(np.argmin(e["trials"].finals))] / e["usual"])
            for e in all_entries
            if e["kind"] == "whole" and e["task"] in tasks
        ]
        middle = float(np.median(offsets))
        return {
            **asdict(base),
            "growth": growth,
            "later_weight": later,
            "first_weight": first,
            "usual_offset": round(middle, 2),
            "usual_std": round(1.4826 * float(np.median(np.abs(np.array(offsets) - middle))) + 0.1, 2),
        }

    found = {"all": fitted(names), **{t: fitted([n for n in names if n != t]) for t in names}}
    (args.out / "prior-without.json").write_text(json.dumps(found, indent=1) + "\n")
    DEFAULT.write_text(json.dumps(found["all"], indent=1) + "\n")
    print(json.dumps(found["all"], indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "fit"])
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", default=None)
    parser.add_argument("--seconds", type=float, default=math.inf, help="no job begins later")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    record(args) if args.what == "record" else fit(args)


if __name__ == "__main__":
    sys.exit(main())
