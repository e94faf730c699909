"""How often the run's end lies in the 80 % band of its last search's forecast, and the factor that makes it so.

The factor on a forecast's std is fitted on the runs of all tasks but one and applied to that one.

Run: python benchmarks/autolrs/coverage.py [--out runs/autolrs/runs] after run.py --arms ours
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from library import RUNS

BAND = 1.2816


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RUNS / "runs")
    args = parser.parse_args()
    errors: dict[str, list[float]] = {}
    for path in sorted(args.out.glob("*.ours.*.json")):
        run = json.loads(path.read_text())
        held = [s for s in run["searches"] if s["trials"] and s["mean"] is not None]
        final = run["curve"][-1][1]
        if held and final is not None and math.isfinite(final):
            last = held[-1]
            errors.setdefault(run["task"], []).append((final - last["mean"]) / max(last["std"], 1e-12))
    found = np.concatenate([np.array(v) for v in errors.values()])
    hits: list[bool] = []
    for task, mine in errors.items():
        others = np.abs(np.concatenate([np.array(v) for name, v in errors.items() if name != task]))
        factor = float(np.quantile(others, 0.8)) / BAND
        covered = [abs(error) <= BAND * factor for error in mine]
        hits += covered
        print(f"{task:20} factor {factor:.2f}, covered {np.mean(covered):.2f} of {len(mine)}")
    print(f"as they are {np.mean(np.abs(found) <= BAND):.2f}, leave one task out {np.mean(hits):.2f} of {len(hits)}")
    print(f"factor on all tasks: {np.quantile(np.abs(found), 0.8) / BAND:.2f}")


if __name__ == "__main__":
    main()
