"""Prints the tables of the lines that run.py left: `python benchmarks/autolrs/report.py [--out runs/autolrs/runs.jsonl]`.

Final losses over those of the tuned cosine, the grid's rate with the least median over its seeds. The tasks that every choice
was made on, and those that none was made on, are apart. Then how often the loss that a run ended with lay in the 80 % band of
its last forecast.
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from library import DEVELOPMENT, HELD_OUT, RUNS

# Of a Gaussian, what lies within so many stds is 80 %.
_BAND = 1.2816


def final(run: dict[str, Any]) -> float:
    """The last validation loss; inf for nan."""
    loss = run["curve"][-1][1]
    return float(loss) if loss is not None and math.isfinite(loss) else math.inf


def table(names: tuple[str, ...], found: dict[tuple[str, str, float], list[dict[str, Any]]]) -> None:
    others = [("ours", 1 / 30), ("ours", 30.0), ("constant", 1.0)]
    print("| task | cosine | its rate | ours | worst seed | ours, default / 30 | x 30 | constant default | discarded |")
    print("|---|---|---|---|---|---|---|---|---|")
    ratios, worst, shares = [], [], []
    for name in names:
        grid = {
            f: median(map(final, runs)) for (task, arm, f), runs in found.items() if (task, arm) == (name, "cosine")
        }
        ours = found.get((name, "ours", 1.0), [])
        if not grid or not ours:
            continue
        rate = min(grid, key=lambda f: grid[f])
        finals = [final(run) / grid[rate] for run in ours]
        share = median(run["discarded"] / run["steps"] for run in ours)
        ratios.append(median(finals))
        worst.append(max(finals))
        shares.append(share)
        cells = [grid[rate], rate]
        rest = []
        for arm, factor in others:
            near = [
                r for (t, a, f), r in found.items() if (t, a) == (name, arm) and math.isclose(f, factor, rel_tol=1e-3)
            ]
            rest.append(f"{median(map(final, near[0])) / grid[rate]:.3f}" if near else "-")
        print(
            f"| {name} | {cells[0]:.4g} | {cells[1]:.2g} | {ratios[-1]:.3f} | {worst[-1]:.2f} | {' | '.join(rest)} "
            f"| {100 * share:.0f} % |"
        )
    if ratios:
        print(
            f"\n{len(ratios)} tasks: median {median(ratios):.3f}, geometric mean {geometric_mean(ratios):.3f}, worst task "
            f"{max(ratios):.2f}, worst seed {max(worst):.2f}, discarded in the median {100 * median(shares):.0f} %\n"
        )


def coverage(runs: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    """How often what came lay in the last forecast's band, and the factor on its std with which 80 % would have."""
    errors = []
    for run in runs:
        held = [s for s in run["searches"] if s["trials"] and s["mean"] is not None]
        if run["task"] in names and held and math.isfinite(final(run)):
            errors.append(abs(final(run) - held[-1]["mean"]) / max(held[-1]["std"], 1e-12) / _BAND)
    if errors:
        inside = sum(e <= 1.0 for e in errors) / len(errors)
        factor = sorted(errors)[min(math.ceil(0.8 * len(errors)), len(errors)) - 1]
        print(f"in the 80 % band {inside:.2f} of {len(errors)}; 80 % would be at {factor:.2f} of the std")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RUNS / "runs.jsonl")
    args = parser.parse_args()
    found: dict[tuple[str, str, float], list[dict[str, Any]]] = defaultdict(list)
    for line in args.out.read_text().splitlines():
        run = json.loads(line)
        found[run["task"], run["arm"], float(f"{run['factor']:.6g}")].append(run)
    ours = [run for (_, arm, _), runs in found.items() if arm == "ours" for run in runs]
    for title, names in (("Development", DEVELOPMENT), ("Held out", HELD_OUT)):
        print(f"## {title}\n")
        table(names, found)
        coverage(ours, names)
        print()


if __name__ == "__main__":
    main()
