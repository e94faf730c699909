"""Prints the table of the results that run.py left: `python benchmarks/autolrs/report.py --task digits`."""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from run import arms
from tasks import TASKS


def reached(curve: list[list[float]], target: float) -> float | None:
    """Steps charged until the validation loss was first at or below `target`."""
    return next((step for step, loss in curve if loss <= target), None)


def label(arm: str, factor: float) -> str:
    return f"cosine {factor:g}" if arm == "cosine" else arm if factor == 1.0 else f"{arm}, default x {factor:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=[*TASKS], required=True)
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--out", type=Path, default=Path("runs/autolrs"))
    args = parser.parse_args()
    seeds = range(args.seeds or (3 if args.task == "bytes" else 5))
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for arm, factor in arms(args.task):
        paths = [args.out / f"{args.task}.{arm}.{factor:.6g}.{seed}.json" for seed in seeds]
        found[arm, factor] = [json.loads(p.read_text()) for p in paths if p.exists()]
    # The grid's best rate, chosen on the median over seeds: what a user who pays for the whole grid would take.
    grid = {key: median(r["curve"][-1][1] for r in runs) for key, runs in found.items() if key[0] == "cosine" and runs}
    tuned = min(grid, key=lambda key: grid[key]) if grid else None
    cosine_end = {r["seed"]: r["curve"][-1][1] for r in found[tuned]} if tuned else {}
    paper_end = {r["seed"]: r["curve"][-1][1] for r in found["paper", 1.0]}
    steps = TASKS[args.task](0, "cpu").steps
    columns = ("seeds", "final loss, median", "seconds", "discarded", "to tuned cosine's loss", "to paper's loss")
    print(f"| {args.task}, {steps} steps charged | {' | '.join(columns)} |")
    print("|---|---|---|---|---|---|---|")
    for (arm, factor), runs in found.items():
        name = label(arm, factor) + (" (grid's best; costs the grid: x 7)" if (arm, factor) == tuned else "")
        if not runs:
            print(f"| {name} | missing | | | | | |")
            continue

        def to(ends: dict[int, float], runs: list[dict[str, Any]] = runs) -> str:
            hits = [reached(r["curve"], ends[r["seed"]]) for r in runs if r["seed"] in ends]
            some = sorted(h if h is not None else float("inf") for h in hits)
            if not some:
                return "-"
            middle = some[len(some) // 2]
            return (
                f"{middle:.0f}"
                if middle < float("inf")
                else f"not reached ({sum(h is not None for h in hits)}/{len(hits)})"
            )

        finals = [r["curve"][-1][1] for r in runs]
        discarded = median(r.get("discarded", 0) for r in runs)
        seconds = median(r["seconds"] for r in runs)
        cells = (
            len(runs),
            f"{median(finals):.4f}",
            f"{seconds:.1f}",
            f"{discarded:.0f}",
            to(cosine_end),
            to(paper_end),
        )
        print(f"| {name} | {' | '.join(map(str, cells))} |")
    missing = [label(*key) for key, runs in found.items() if len(runs) < len(seeds)]
    print(f"\nincomplete or missing: {', '.join(missing) or 'none'}")


if __name__ == "__main__":
    main()
