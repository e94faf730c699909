"""Two traps for a search by short trials, through the controller that callback and tuner use.

Decoy: rates below an edge fall fast for a hundred steps and then stall at 1.0; those above it fall slowly, to 0.14 at the
stage's end, and far above they diverge. Edge and noise differ from seed to seed, trials are 100 steps of 1000.

Jump: the noisy quadratic of quadratic.py twice from the same start; in the second stage the unit of the rate has changed, so
that the best rate is exactly 30 times higher (or lower) than in the first one.

Run: python benchmarks/autolrs/traps.py [--seeds 40] [--arms ours,last,paper]
"""

import argparse
import math
from collections.abc import Sequence

import numpy as np
from quadratic import TAU, Blind, H, Quadratic, expected

from trainkit.autolrs import Forecast, Options
from trainkit.autolrs._controller import Controller
from trainkit.autolrs._plan import Search
from trainkit.autolrs._race import Losses, Outcome, Trials
from trainkit.autolrs.strategies import Forecasting

JUMP = 30.0
# As in quadratic.py: trials of at most 250 and 120 steps, at most 1000 and 538 discarded.
COLD = Search(0, TAU, 250, 12, 1000)
LATER = Search(TAU, 2 * TAU, 120, 7, math.floor(0.35 / 0.65 * TAU))


class LastLosses(Controller):
    """No forecast: a trial is worth the mean of its last ten losses."""

    def _strategy(self, search: Search) -> Forecasting:
        def last(steps: Sequence[float], losses: Sequence[float], horizon: float) -> Forecast:
            return Forecast(float(np.mean(losses[-10:])), float(np.std(losses[-10:])) / math.sqrt(10.0))

        return Forecasting(self._backend, last, search.trial_steps, search.horizon - search.start)


def controller(arm: str, low: float, high: float, seed: int) -> Controller:
    """Of a run of three stages."""
    options = Options(low, high, stage_steps=TAU, preset="paper" if arm == "paper" else "default", seed=seed)
    made = LastLosses(options) if arm == "last" else Controller(options)
    made.begin(3 * TAU, Blind())
    return made


def search(made: Controller, trials: Trials, plan: Search) -> Outcome:
    """The next stage's search; the published method's is of ten trials of a tenth of the stage."""
    return made.search(Search(0, TAU, TAU // 10, 10, TAU) if made.options.preset == "paper" else plan, trials)


class Decoy:
    """Curves that depend on rate and step alone, and noise."""

    averaged = True

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.edge, self.noise = 10.0 ** draw.uniform(-3.0, -2.0), 10.0 ** draw.uniform(-2.5, -1.3)
        self.draws, self.at = draw.standard_normal(TAU), 0

    def restart(self) -> Losses:
        self.at = 0
        return Losses((0,), (2.0,))

    def advance(self, rates: list[float]) -> Losses:
        steps = range(self.at + 1, self.at + len(rates) + 1)
        self.at += len(rates)
        return Losses(tuple(steps), tuple(self.loss(max(rates), s) + self.noise * self.draws[s] for s in steps))

    def loss(self, rate: float, step: int) -> float:
        if rate < self.edge:
            return 1.0 + math.exp(-step / 30)
        return 0.1 + 1.9 * math.exp(-step / 250) if rate < 100 * self.edge else math.inf

    def keep(self) -> None:
        pass

    def agree(self, value):
        return value


class Rescaled(Quadratic):
    """The quadratic with another unit of the rate."""

    def __init__(self, seed: int, unit: float) -> None:
        super().__init__(np.ones(len(H)), seed, TAU)
        self.unit = unit

    def advance(self, rates: list[float]) -> Losses:
        return super().advance([rate / self.unit for rate in rates])


def decoys(arm: str, seeds: int) -> None:
    chosen, discarded = [], []
    for seed in range(seeds):
        trials = Decoy(seed)
        outcome = search(controller(arm, 1e-5, 1.0, seed), trials, Search(0, TAU, 100, 10, TAU))
        chosen.append(outcome.rate < trials.edge)
        discarded.append(outcome.discarded)
    print(f"{arm:6} decoy: chosen in {sum(chosen)} of {seeds} seeds, discarded at most {max(discarded)}", flush=True)


def jumps(arm: str, unit: float, seeds: int) -> None:
    x, rates = np.ones(len(H)), np.geomspace(1e-4, 2.0, 800)
    losses = [expected(x, r, TAU) for r in rates]
    best = float(rates[int(np.argmin(losses))])
    ratios, decades, discarded = [], [], []
    for seed in range(seeds):
        made = controller(arm, 1e-4, 10.0, seed)
        search(made, Rescaled(1000 * seed, 1.0), COLD)
        outcome = search(made, Rescaled(1000 * seed + 1, unit), LATER)
        ratios.append(expected(x, outcome.rate / unit, TAU) / min(losses))
        decades.append(abs(math.log10(outcome.rate / unit / best)))
        discarded.append(outcome.discarded)
    print(
        f"{arm:6} jump x {unit:.3g}: chosen/best median {np.median(ratios):.2f}  p90 {np.quantile(ratios, 0.9):.2f}, "
        f"within half a decade of the best rate in {sum(d <= 0.5 for d in decades)} of {seeds} seeds "
        f"(farthest {max(decades):.2f}), discarded at most {max(discarded)}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--arms", default="ours,last,paper")
    args = parser.parse_args()
    for arm in args.arms.split(","):
        decoys(arm, args.seeds)
        jumps(arm, JUMP, args.seeds)
        jumps(arm, 1.0 / JUMP, args.seeds)


if __name__ == "__main__":
    main()
