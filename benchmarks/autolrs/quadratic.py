"""Search quality on a noisy quadratic whose best rate is known in closed form.

f(x) = 1/2 sum h_i x_i^2, h log-spaced from 1e-2 to 1, d = 50, x0 = 1, SGD with gradient noise N(0, 0.1^2) a coordinate,
rates in [1e-3, 1.9], stages of 1000 steps. Chosen over best: expected f at the stage's end under the chosen rate, over the
least over 400 rates. Ours searches through the controller that callback and tuner use.

Run: python benchmarks/autolrs/quadratic.py [--seeds 20]
"""

import argparse
import math

import numpy as np
import torch

from trainkit.autolrs import Forecast, LRSearch, Options
from trainkit.autolrs._controller import Controller
from trainkit.autolrs._plan import Search
from trainkit.autolrs._race import Ground, Losses, race
from trainkit.autolrs._skopt import SkoptSearch
from trainkit.autolrs.strategies import Forecasting, Paper

H = np.geomspace(1e-2, 1.0, 50)
NOISE, LOW, HIGH, TAU = 0.1, 1e-3, 1.9, 1000
RATES = np.geomspace(LOW, HIGH, 400)


def expected(x: np.ndarray, rate: float, steps: int, h: np.ndarray = H) -> float:
    """E f after `steps` steps at a constant rate."""
    keep = 1.0 - rate * h
    q = keep**2
    variance = (rate * NOISE) ** 2 * np.where(np.abs(1 - q) < 1e-12, steps, (1 - q**steps) / np.where(q == 1, 1, 1 - q))
    return float(0.5 * (h * ((x * keep**steps) ** 2 + variance)).sum())


class Quadratic:
    """Trials on the quadratic; the same noise draws for every trial."""

    averaged = True

    def __init__(self, x: np.ndarray, seed: int, steps: int, h: np.ndarray = H) -> None:
        self.x0, self.h = x, h
        self.draws = NOISE * np.random.default_rng(seed).standard_normal((steps, len(h)))
        self.x, self.at, self.kept = x.copy(), 0, x

    def loss(self) -> float:
        with np.errstate(over="ignore", invalid="ignore"):
            return float(0.5 * (self.h * self.x**2).sum())

    def restart(self) -> Losses:
        self.x, self.at = self.x0.copy(), 0
        return Losses((0,), (self.loss(),))

    def advance(self, rates: list[float]) -> Losses:
        values = []
        for rate in rates:
            self.x = self.x - rate * (self.h * self.x + self.draws[self.at])
            self.at += 1
            values.append(self.loss())
        return Losses(tuple(range(self.at - len(rates) + 1, self.at + 1)), tuple(values))

    def keep(self) -> None:
        self.kept = self.x.copy()

    def agree(self, value):
        return value


def ended(x, seed, outcome):
    ratio = expected(x, outcome.rate, TAU) / min(expected(x, r, TAU) for r in RATES)
    end = Quadratic(x, seed, TAU)
    end.advance([outcome.rate] * TAU)
    return ratio, outcome, end.x


class Blind(torch.optim.Optimizer):
    """An optimizer without a usual rate: the whole range is searched."""

    def __init__(self) -> None:
        super().__init__([torch.nn.Parameter(torch.zeros(1))], {"lr": 1e-3})


def searcher(arm, seed):
    """What carries an arm's knowledge from stage to stage."""
    if arm == "paper":
        return SkoptSearch(LOW, HIGH, seed)
    if arm == "oracle":
        return LRSearch(LOW, HIGH, seed)
    controller = Controller(Options(LOW, HIGH, stage_steps=TAU, warmup_steps=0, seed=seed))
    controller.begin(3 * TAU, Blind())
    return controller


def one(x, seed, arm, search, stage):
    cold, ground = stage == 0, Ground(0, lambda rate, step: rate)
    discards = 1000 if cold else math.floor(0.35 / 0.65 * TAU)
    if arm == "ours":
        start = search.kept = stage * TAU
        trial, most = (ARGS.trial, 12) if cold else (ARGS.later, 7)
        outcome = search.search(Search(start, start + TAU, trial, most, discards), Quadratic(x, seed, TAU))
        return ended(x, seed, outcome)
    if arm == "paper":
        plan = Search(0, TAU, 100, 10, 1000)
        return ended(x, seed, race(Quadratic(x, seed, TAU), Paper(search, TAU), plan, ground))
    if arm == "oracle":  # noise-free losses at the horizon, the same trial lengths and search
        plan = Search(0, TAU, ARGS.trial if cold else ARGS.later, 12 if cold else 7, discards)
        state = {}

        class Told(Quadratic):
            def advance(self, rs):
                state["rate"] = rs[0]
                return super().advance(rs)

        trials = Told(x, seed, TAU)

        def told(steps, losses, horizon):
            return Forecast(expected(x, state["rate"], TAU), 1e-9)

        return ended(x, seed, race(trials, Forecasting(search, told, plan.trial_steps, TAU), plan, ground))
    raise ValueError(arm)


def main() -> None:
    for arm in ARGS.arms.split(","):
        ratios = [[], [], []]
        discarded = [[], [], []]
        for seed in range(ARGS.seeds):
            x = np.ones(len(H))
            search = searcher(arm, seed)
            for stage in range(1 if arm == "paper" else 3):
                ratio, outcome, x = one(x, 1000 * seed + stage, arm, search, stage)
                if arm != "ours":
                    search.next_stage()
                ratios[stage].append(ratio)
                discarded[stage].append(outcome.discarded)
                if ARGS.verbose:
                    print(
                        arm,
                        seed,
                        stage,
                        round(ratio, 2),
                        f"{outcome.rate:.3g}",
                        outcome.discarded,
                        [
                            (
                                f"{t.rate:.3g}",
                                t.steps,
                                t.status,
                                f"{t.mean:.3g}±{t.std:.2g}",
                                f"{expected(np.ones(50), t.rate, TAU):.3g}",
                            )
                            for t in outcome.trials
                        ]
                        if stage == 0
                        else "",
                    )
        for stage, values in enumerate(ratios):
            if values:
                print(
                    f"{arm:8} stage {stage + 1}: chosen/best median {np.median(values):.2f}  p90 {np.quantile(values, 0.9):.2f}"
                    f"  discarded max {max(discarded[stage])}"
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--arms", default="ours,oracle,paper")
    parser.add_argument("--trial", type=int, default=250)
    parser.add_argument("--later", type=int, default=120)
    parser.add_argument("--verbose", action="store_true")
    ARGS = parser.parse_args()
    main()
