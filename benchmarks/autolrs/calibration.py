"""Coverage and error of forecasts from 100 losses to step 1000: python benchmarks/autolrs/calibration.py [--seeds 40]."""

import argparse
import time

import numpy as np

from trainkit.autolrs import forecast, paper_forecast

WINDOW = np.arange(100.0)


def single(rate):
    return lambda t, seed: 1.5 * np.exp(-rate * t) + 0.5


def three(t, seed):
    draw = np.random.default_rng(1000 + seed)
    rates, shares = 10 ** draw.uniform(-3.5, -1.5, 3), draw.dirichlet(np.ones(3))
    return 1.5 * (shares[:, None] * np.exp(-rates[:, None] * t)).sum(0) + 0.5


def power(exponent):
    return lambda t, seed: 1.5 * (t + 1.0) ** -exponent + 0.5


CURVES = {("one exponential", r): single(r) for r in (0.0003, 0.001, 0.003, 0.01, 0.03)}
CURVES |= {("three exponentials", ""): three}
CURVES |= {("power law", p): power(p) for p in (0.3, 0.5, 0.7, 1.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=40)
    args = parser.parse_args()
    pooled: dict[str, list[bool]] = {}
    outside, spent, fits = [], 0.0, 0
    print("| curve | noise | in the 80 % band | median error | median std | published method: median error |")
    print("|---|---|---|---|---|---|")
    for (family, parameter), curve in CURVES.items():
        for noise in (0.0, 0.01, 0.05, 0.1):
            hits, errors, stds, theirs = [], [], [], []
            for seed in range(args.seeds if noise else 1):
                losses = curve(WINDOW, seed) + noise * np.random.default_rng(seed).standard_normal(100)
                truth = float(curve(np.array([1000.0]), seed)[0])
                began = time.process_time()
                found = forecast(losses, 1000)
                spent, fits = spent + time.process_time() - began, fits + 1
                errors.append(abs(found.mean - truth))
                stds.append(found.std)
                hits.append(errors[-1] <= 1.2816 * found.std)
                theirs.append(abs(paper_forecast(losses, 1000).mean - truth))
            share = f"{np.mean(hits):.2f}" if noise else "-"
            print(
                f"| {family} {parameter} | {noise} | {share} | {np.median(errors):.3f} | {np.median(stds):.3f} "
                f"| {np.median(theirs):.3f} |"
            )
            if noise:
                pooled.setdefault(family, []).extend(hits)
                if not 0.55 <= np.mean(hits) <= 0.97:
                    outside.append(f"{family} {parameter} at {noise}: {np.mean(hits):.2f}")
    print("\npooled over noise > 0:", {k: round(float(np.mean(v)), 2) for k, v in pooled.items()})
    print("cells outside 0.55 to 0.97:", outside or "none")
    print(f"{spent / fits * 1e3:.1f} ms of processor time a forecast")


if __name__ == "__main__":
    main()
