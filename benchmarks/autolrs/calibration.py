"""Coverage and error of forecasts: python benchmarks/autolrs/calibration.py [--seeds 40] [--first 0] [--peer].

Three families of curves (one exponential, sums of three, power laws) at three noise levels; first 100 losses of amplitude
1.5 forecast to step 1000, then other amplitudes, horizons and lengths of observation. `--peer` adds the published method.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np

from trainkit.autolrs import forecast
from trainkit.autolrs._paper import paper_forecast

Curve = Callable[[np.ndarray, int], np.ndarray]
NOISES = (0.01, 0.05, 0.1)
# (amplitude, losses, horizon); offset 0.5 in the first, 20 in the others.
SETTINGS = ((1.5, 100, 1000), (0.3, 100, 300), (5.0, 100, 3000), (5.0, 50, 1000), (0.3, 200, 3000))


def single(rate: float) -> Curve:
    return lambda t, seed: np.exp(-rate * t)


def three(t: np.ndarray, seed: int) -> np.ndarray:
    draw = np.random.default_rng(1000 + seed)
    rates, shares = 10 ** draw.uniform(-3.5, -1.5, 3), draw.dirichlet(np.ones(3))
    return np.asarray((shares[:, None] * np.exp(-rates[:, None] * t)).sum(0))


def power(exponent: float) -> Curve:
    return lambda t, seed: (t + 1.0) ** -exponent


CURVES: dict[tuple[str, str], Curve] = {
    ("one exponential", str(r)): single(r) for r in (0.0003, 0.001, 0.003, 0.01, 0.03)
}
CURVES |= {("three exponentials", ""): three}
CURVES |= {("power law", str(p)): power(p) for p in (0.3, 0.5, 0.7, 1.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--first", type=int, default=0, help="first seed of the noise (and of the sums of three)")
    parser.add_argument("--peer", action="store_true", help="the published method beside ours")
    args = parser.parse_args()
    seeds = range(args.first, args.first + args.seeds)
    spent, fits = 0.0, 0
    for amplitude, length, horizon in SETTINGS:
        offset = 0.5 if amplitude == 1.5 else 20.0
        print(f"\n### Amplitude {amplitude}, {length} losses, horizon {horizon}\n")
        print(
            "| curve | noise | in the 80 % band | median error | median std |" + (" published |" if args.peer else "")
        )
        print("|---|---|---|---|---|" + ("---|" if args.peer else ""))
        pooled: dict[str, list[bool]] = {}
        outside, steps = [], np.arange(float(length))
        for (family, parameter), curve in CURVES.items():
            for noise in (0.0, *NOISES):
                errors, stds, theirs = [], [], []
                for seed in seeds if noise else seeds[:1]:
                    draws = np.random.default_rng(seed).standard_normal(length)
                    losses = amplitude * curve(steps, seed) + offset + noise * draws
                    truth = amplitude * float(curve(np.array([float(horizon)]), seed)[0]) + offset
                    began = time.process_time()
                    found = forecast(losses, horizon)
                    spent, fits = spent + time.process_time() - began, fits + 1
                    errors.append(abs(found.mean - truth))
                    stds.append(found.std)
                    if args.peer:
                        theirs.append(abs(paper_forecast(losses.tolist(), horizon).mean - truth))
                hits = [e <= 1.2816 * s for e, s in zip(errors, stds, strict=True)]
                share = f"{np.mean(hits):.2f}" if noise else "-"
                row = f"| {family} {parameter} | {noise} | {share} | {np.median(errors):.3f} | {np.median(stds):.3f} |"
                print(row + (f" {np.median(theirs):.3f} |" if args.peer else ""), flush=True)
                if noise:
                    pooled.setdefault(family, []).extend(hits)
                    if not 0.55 <= np.mean(hits) <= 0.97:
                        outside.append(f"{family} {parameter} at {noise}: {np.mean(hits):.3f}")
        print("\npooled over noise > 0:", {k: round(float(np.mean(v)), 3) for k, v in pooled.items()})
        print("cells outside 0.55 to 0.97:", outside or "none")
    print(f"\n{spent / fits * 1e3:.1f} ms of processor time a forecast")


if __name__ == "__main__":
    main()
