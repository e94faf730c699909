"""Runs the arms that have no result yet, one JSON line each: `python benchmarks/autolrs/run.py --tasks digits`.

Every optimizer step counts: an arm's budget is the task's number of steps in all, discarded ones included. A grid-tuned
arm costs its grid. Interrupt at any time and call again; report.py reads the lines.
"""

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from library import DEVELOPMENT, HELD_OUT, LIBRARY, RUNS
from tasks import TASKS, Task
from torch.utils._pytree import tree_leaves, tree_map

from trainkit.autolrs import Tuner
from trainkit.autolrs._schedule import set_rate


def valid_loss(task: Task) -> float:
    modes = [(m, m.training) for m in task.model.modules()]
    task.model.eval()
    with torch.no_grad():
        value = torch.stack([task.loss(task.model, b) for b in task.valid]).mean().item()
    for module, mode in modes:
        module.training = mode
    return value


def stepper(task: Task, optimizer: Any) -> Callable[[Any], torch.Tensor]:
    """Batch -> loss, one optimizer step; on a GPU a CUDA graph, of all of it where the optimizer can be captured."""

    def gradients(batch: Any) -> torch.Tensor:
        optimizer.zero_grad()
        loss = task.loss(task.model, batch)
        loss.backward()
        return loss.detach()

    def step(batch: Any) -> torch.Tensor:
        loss = gradients(batch)
        optimizer.step()
        return loss

    if next(task.model.parameters()).device.type != "cuda":
        return step
    whole = isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    captured = step if whole else gradients
    held = tree_map(torch.clone, next(iter(task.loader)))
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            captured(held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        out = captured(held)
    # The graph writes into this very state: it is zeroed, not made anew.
    task.model.load_state_dict(before)
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()

    def replay(batch: Any) -> torch.Tensor:
        for kept, new in zip(tree_leaves(held), tree_leaves(batch), strict=True):
            kept.copy_(new)
        graph.replay()
        if not whole:
            optimizer.step()
        return out.clone()

    return replay


def follow(task: Task, rate_at: Callable[[int], float], optimizer: Any, steps: int) -> Iterator[int]:
    """Trains along a schedule; yields the number of steps taken."""
    stream, step = iter(task.loader), stepper(task, optimizer)
    ones = [1.0] * len(optimizer.param_groups)
    for taken in range(steps):
        set_rate(optimizer, rate_at(taken), ones)
        step(next(stream))
        yield taken + 1


def cosine(peak: float, steps: int) -> Callable[[int], float]:
    warm = max(round(0.02 * steps), 1)
    return lambda s: (
        peak * (min((s + 1) / warm, 1.0) if s < warm else 0.5 + 0.5 * math.cos(math.pi * (s - warm) / (steps - warm)))
    )


def wsd(peak: float, steps: int) -> Callable[[int], float]:
    warm, decay = max(round(0.02 * steps), 1), round(0.2 * steps)
    return lambda s: peak * min((s + 1) / warm, 1.0, (steps - s) / decay)


def one_cycle(peak: float, steps: int) -> Callable[[int], float]:
    up = round(0.3 * steps)
    return lambda s: (
        peak * (0.04 + 0.96 * s / up if s < up else 0.5 + 0.5 * math.cos(math.pi * (s - up) / (steps - up)))
    )


def found_rate(task: Task, optimizer: Any, steps: int = 100) -> float:
    """The usual range test: an exponential sweep, the steepest descent of the smoothed loss; undone afterwards."""
    from trainkit.autolrs._snapshot import Snapshot

    before = Snapshot([task.model], [optimizer])
    before.save()
    rates = [1e-6 * (1e6 ** (i / (steps - 1))) for i in range(steps)]
    losses: list[float] = []
    stream, smooth, best = iter(task.loader), 0.0, math.inf
    for i, rate in enumerate(rates):
        set_rate(optimizer, rate, [1.0] * len(optimizer.param_groups))
        loss = task.loss(task.model, next(stream))
        smooth = 0.9 * smooth + 0.1 * loss.item()
        losses.append(smooth / (1 - 0.9 ** (i + 1)))
        best = min(best, losses[-1])
        if not math.isfinite(losses[-1]) or (i > 10 and losses[-1] > 4 * best):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    before.restore()
    steepest = min(range(11, len(losses) - 1), key=lambda i: losses[i + 1] - losses[i - 1])
    return rates[steepest]


def tuned(task: Task, default: float, preset: str, seed: int, steps: int) -> Iterator[tuple[int, Any]]:
    """Ours or the published algorithm; yields (steps charged so far, tuner)."""
    optimizer = task.optimizer(task.model, default)
    train_step = stepper(task, optimizer)
    kwargs: dict[str, Any] = {"preset": "paper", "stage_steps": max(steps // 12, 10)} if preset == "paper" else {}
    tuner = Tuner(task.model, optimizer, train_step, steps, loss=task.loss, count="all", seed=seed, **kwargs)
    for kept in tuner.run(task.loader):
        # While a kept trial is shown step by step, the weights are those at its end: not a point of the curve.
        if not tuner.replaying:
            yield kept.step + 1 + tuner.history.discarded_steps, tuner


def arms(task: str) -> list[tuple[str, float]]:
    """(arm, factor on the default rate or the grid's rate)."""
    found: list[tuple[str, float]] = [(arm, f) for f in (1.0, 1 / 30, 30.0) for arm in ("ours", "paper", "constant")]
    found += [("finder+cosine", 1.0), ("one-cycle", 1.0), ("wsd", 1.0), ("prodigy", 1.0), ("schedule-free", 1.0)]
    return found + [("cosine", rate) for rate in (TASKS | LIBRARY)[task](0, "cpu").grid]


def curve_of(task: Task, arm: str, factor: float, seed: int) -> tuple[list[tuple[int, float]], dict[str, Any]]:
    """[(steps charged, validation loss)] and notes; raises ImportError where a peer is not installed."""
    steps, peak, notes = task.steps, task.default * factor, {}
    curve = [(0, valid_loss(task))]
    if arm in ("ours", "paper"):
        last, tuner = 0, None
        for charged, current in tuned(task, peak, arm, seed, steps):
            tuner = current
            if charged // task.every > last // task.every or charged == steps:
                curve.append((charged, valid_loss(task)))
            last = charged
        assert tuner is not None
        h = tuner.history
        notes = {
            "kept": h.kept_steps,
            "discarded": h.discarded_steps,
            "forwards": h.extra_forwards,
            "search_seconds": h.search_seconds,
            "decision_seconds": h.decision_seconds,
            "asked": h.asked,
            **{key: h.as_dict()[key] for key in ("stages", "searches", "trials")},
        }
        return curve, notes
    optimizer: Any = task.optimizer(task.model, peak)
    rate_at: Callable[[int], float] = lambda s: peak  # noqa: E731
    spent = 0
    if arm == "cosine":
        rate_at = cosine(factor, steps)
    elif arm == "one-cycle":
        rate_at = one_cycle(peak, steps)
    elif arm == "wsd":
        rate_at = wsd(peak, steps)
    elif arm == "finder+cosine":
        spent = 100
        notes["found"] = found_rate(task, optimizer)
        rate_at = cosine(notes["found"], steps - spent)
    elif arm == "prodigy":
        from prodigyopt import Prodigy

        optimizer = Prodigy(task.model.parameters(), lr=1.0, weight_decay=optimizer.param_groups[0]["weight_decay"])
        rate_at = cosine(1.0, steps)
    elif arm == "schedule-free":
        import schedulefree

        kind = (
            schedulefree.SGDScheduleFree if isinstance(optimizer, torch.optim.SGD) else schedulefree.AdamWScheduleFree
        )
        free = 1.0 if isinstance(optimizer, torch.optim.SGD) else 2.5 * peak
        optimizer = kind(task.model.parameters(), lr=free, warmup_steps=round(0.02 * steps))
        optimizer.train()
        rate_at = lambda s: free  # noqa: E731
    for done in follow(task, rate_at, optimizer, steps - spent):
        if done % task.every == 0 or done == steps - spent:
            if arm == "schedule-free":
                optimizer.eval()
            curve.append((done + spent, valid_loss(task)))
            if arm == "schedule-free":
                optimizer.train()
    return curve, notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default="development,held-out", help="names, or these or bytes; comma-separated")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arms", default=None, help="comma-separated, default all")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="on a CPU, of one thread each")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no further run begins after so long")
    parser.add_argument(
        "--factors", default="1", help="on the default rate, comma-separated; all of the cosine's grid is run"
    )
    parser.add_argument("--out", type=Path, default=RUNS / "runs.jsonl")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    until = time.time() + args.seconds
    groups = {"development": [*DEVELOPMENT], "held-out": [*HELD_OUT]}
    factors = [float(word) for word in args.factors.split(",")]
    done = {key(json.loads(line)) for line in args.out.read_text().splitlines()} if args.out.exists() else set()
    names = [n for word in args.tasks.split(",") for n in groups.get(word, [word])]
    todo = []
    for seed in range(args.seeds):
        for name in names:
            for arm, factor in arms(name):
                wanted = arm == "cosine" or any(math.isclose(factor, f, rel_tol=1e-3) for f in factors)
                if wanted and (args.arms is None or arm in args.arms.split(",")):
                    todo.append((name, seed, arm, factor, args.device, args.out, until))
    todo = [job for job in todo if key(dict(zip(("task", "seed", "arm", "factor"), job, strict=False))) not in done]
    if args.device != "cpu" or args.processes == 1:
        for job in todo:
            one_run(*job)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        pool.starmap(one_run, todo, chunksize=1)


def key(run: dict[str, Any]) -> tuple[str, int, str, str]:
    """What tells a run from the others."""
    return run["task"], run["seed"], run["arm"], f"{run['factor']:.6g}"


def one_run(name: str, seed: int, arm: str, factor: float, device: str, target: Path, until: float) -> None:
    """Runs an arm and appends its line, whole or not at all; a peer that is not installed is said and left out."""
    if time.time() > until:
        return
    if device == "cpu":
        torch.set_num_threads(1)
    began = time.perf_counter()
    task = (TASKS | LIBRARY)[name](seed, device)
    torch.manual_seed(seed)
    try:
        curve, notes = curve_of(task, arm, factor, seed)
    except ImportError as error:
        print(f"{name} {arm}: missing ({error})")
        return
    result = {
        "task": name,
        "arm": arm,
        "factor": factor,
        "seed": seed,
        "device": device,
        "steps": task.steps,
        "seconds": time.perf_counter() - began,
        "curve": curve,
        **notes,
    }
    with target.open("a") as lines:
        lines.write(json.dumps(result) + "\n")
    print(f"{name} {arm} {factor:.6g} {seed}: {curve[-1][1]:.4g} in {result['seconds']:.1f} s", flush=True)


if __name__ == "__main__":
    main()
