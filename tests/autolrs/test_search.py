"""The search: asking, telling, following an optimum, racing trials."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from paths import BENCHMARKS

from trainkit.autolrs import LRSearch, forecast
from trainkit.autolrs._plan import Search
from trainkit.autolrs._prior import default_prior
from trainkit.autolrs._race import Ground, Losses, race
from trainkit.autolrs._skopt import SkoptSearch
from trainkit.autolrs.strategies import Bayesian, Forecasting, Paper, Situation


def valley(best, floor=0.3):
    """A loss that is quadratic in log rate."""
    return lambda lr: floor + 0.2 * (math.log10(lr) - math.log10(best)) ** 2


def explore(search, loss, asks, noise=0.02, seed=0):
    draw = np.random.default_rng(seed)
    for _ in range(asks):
        lr = search.ask()
        search.tell(lr, loss(lr) + noise * draw.standard_normal(), noise)
    return search.best()


def test_finds_the_valley():
    regrets = []
    for seed in range(8):
        loss = valley(10 ** np.random.default_rng(seed).uniform(-4, -1))
        regrets.append(loss(explore(LRSearch(1e-5, 1.0, seed), loss, 10, seed=seed)) - 0.3)
    assert np.mean(regrets) <= 0.02


@pytest.mark.parametrize("jump", [30.0, 1 / 30.0])
def test_follows_a_thirtyfold_jump_within_one_stage(jump):
    search = LRSearch(1e-5, 1.0)
    explore(search, valley(3e-3), 9)
    search.next_stage()
    found = explore(search, valley(3e-3 * jump), 6)
    assert abs(math.log10(found / (3e-3 * jump))) < 0.5


def test_nan_and_inf_are_only_bad():
    search = LRSearch(1e-5, 1.0)
    for lr, mean in [(1e-3, 1.0), (1e-1, math.nan), (1.0, math.inf), (1e-2, 0.8)]:
        search.tell(lr, mean, 0.1)
    assert search.best() == 1e-2
    assert 1e-5 <= search.ask() < 1e-1


def test_everything_diverged():
    search = LRSearch(1e-5, 1.0)
    for _ in range(6):
        search.tell(search.ask(), math.inf, math.inf)
    assert 1e-5 <= search.best() <= 1.0


def test_asks_stay_inside_and_apart():
    search = LRSearch(1e-4, 1e-1)
    asked = []
    for _ in range(12):
        asked.append(search.ask())
        search.tell(asked[-1], valley(1e-4)(asked[-1]), 0.01)
    assert all(1e-4 * 0.999 <= lr <= 1e-1 * 1.001 for lr in asked)
    assert len({round(math.log10(lr), 2) for lr in asked}) == len(asked)


@pytest.mark.parametrize("kind", [LRSearch, SkoptSearch])
def test_state_goes_through_json_and_asks_the_same(kind):
    search, other = kind(1e-5, 1.0, 3), kind(1e-5, 1.0, 99 if kind is LRSearch else 3)
    explore(search, valley(1e-2), 2 if kind is SkoptSearch else 4)
    other.load_state_dict(json.loads(json.dumps(search.state_dict())))
    if kind is LRSearch:
        assert other.ask() == search.ask()
    assert other.best() == search.best()
    search.next_stage()
    assert search.state_dict()["stage"] == 1


def test_a_rate_told_again_is_corrected():
    search = LRSearch(1e-5, 1.0)
    search.tell(1e-3, 5.0, 0.1)
    search.tell(1e-2, 1.0, 0.1)
    search.tell(1e-3, 0.1, 0.1)
    assert search.best() == 1e-3


@pytest.mark.parametrize("low, high", [(1.0, 1e-3), (0.0, 1.0), (1e-3, 1e-3), (1e-3, math.inf), (math.nan, 1.0)])
def test_bad_ranges(low, high):
    for kind in (LRSearch, SkoptSearch):
        with pytest.raises(ValueError, match="0 < low < high"):
            kind(low, high)


class Bowl:
    """Trials on f = 1/2 sum h x^2 under SGD; counts what is restored and kept."""

    averaged = True

    def __init__(self, poison=None):
        self.h, self.poison = np.geomspace(1e-2, 1.0, 10), poison
        self.x, self.taken, self.kept = np.ones(10), 0, None

    def restart(self):
        self.x, self.at = np.ones(10), 0
        return Losses((0,), (float(0.5 * self.h.sum()),))

    def advance(self, rates):
        values = []
        for rate in rates:
            with np.errstate(over="ignore"):
                self.x = self.x - rate * self.h * self.x
            self.at += 1
            self.taken += 1
            bad = self.poison is not None and self.poison(rate)
            values.append(math.nan if bad else float(0.5 * (self.h * self.x**2).sum()))
        return Losses(tuple(range(self.at - len(rates) + 1, self.at + 1)), tuple(values))

    def keep(self):
        self.kept = self.x.copy()

    def agree(self, value):
        return value


def forecaster(steps, losses, horizon):
    return forecast(losses, horizon, steps=steps, floor=0.0)


def staged(trials, search, plan, **ground):
    """A stage of a given length, as `stage_steps` has it."""
    strategy = Forecasting(search, forecaster, plan.trial_steps, plan.horizon - plan.start)
    return race(trials, strategy, plan, Ground(0, lambda rate, step: rate, **ground))


def bayesian(trials, plan, *, present=0.1, usual=0.1, first=True, low=1e-3, high=1.9):
    """The default's search of a run of 1000 steps."""
    done = 0.0 if first else present * plan.start
    left = 1000 - plan.start
    began = math.inf if first else 2.0 * Bowl().restart().values[0]
    best = math.inf if first else began
    at = Situation(first, done, began, best, 0.75 * left, left, left, plan.trial_steps, present, usual, present)
    strategy = Bayesian(default_prior(), at, [], [], low, high, True)
    return race(trials, strategy, plan, Ground(0, lambda rate, step: rate, done))


def test_the_winner_is_kept_and_the_books_balance():
    for search in (staged, bayesian):
        trials = Bowl()
        if search is staged:
            outcome = staged(trials, LRSearch(1e-3, 1.9), Search(100, 600, 48, 8, 300))
        else:
            outcome = bayesian(trials, Search(100, 1000, 48, 8, 300), first=False)
        kept = [r for r in outcome.trials if r.status == "committed"]
        assert len(kept) == 1 and kept[0].rate == outcome.rate and kept[0].steps == outcome.committed == 48
        assert trials.taken == outcome.committed + outcome.discarded == sum(r.steps for r in outcome.trials)
        assert outcome.discarded <= 300
        again = Bowl()
        again.restart()
        again.advance([outcome.rate] * 48)
        assert np.array_equal(trials.kept, again.x)
        assert all(r.loss_steps[0] == 100 for r in outcome.trials)


def test_bad_trials_stop_early():
    outcome = staged(Bowl(), LRSearch(1e-3, 1.9), Search(0, 500, 64, 10, 10_000))
    assert any(r.status == "stopped" and r.steps < 64 for r in outcome.trials)


def test_diverging_trials_leave_the_others_alone():
    outcome = staged(Bowl(lambda rate: rate > 0.1), LRSearch(1e-3, 1.9), Search(0, 500, 40, 8, 1000))
    assert {r.status for r in outcome.trials if r.rate > 0.1} == {"diverged"}
    assert outcome.committed == 40 and outcome.rate <= 0.1


def test_all_diverging_adopts_nothing():
    for search in (
        lambda t, p: staged(t, LRSearch(1e-3, 1.9), p),
        bayesian,
    ):
        outcome = search(Bowl(lambda rate: True), Search(0, 500, 40, 4, 1000))
        assert outcome.rate is None and outcome.committed == 0
        assert outcome.discarded == sum(r.steps for r in outcome.trials)


def test_the_first_two_rates_are_the_class_s_usual_one_and_the_user_s():
    """A smaller rate of the user's is not tried where the usual one works."""
    for bad, user, rates in ((2.0, 0.01, [0.3]), (0.2, 0.01, [0.3, 0.01]), (2.0, 1.5, [0.3, 1.5])):
        outcome = bayesian(Bowl(lambda rate, bad=bad: rate > bad), Search(0, 1000, 40, 5, 160), present=user, usual=0.3)
        assert [r.rate for r in outcome.trials] == pytest.approx(rates)


def test_a_rate_of_which_nothing_is_known_is_found_below_those_that_diverge():
    """The descent goes down as far as `low`."""
    outcome = bayesian(Bowl(lambda rate: rate > 2e-5), Search(0, 1000, 40, 6, 400), present=0.1, low=1e-5, high=1.0)
    assert outcome.rate is not None and outcome.rate <= 2e-5


def test_the_model_is_asked_and_each_rate_has_a_forecast():
    outcome = bayesian(Bowl(), Search(100, 1000, 40, 5, 160), first=False)
    assert outcome.asked >= 1 and outcome.reason and outcome.rate > 0.1
    healthy = [r for r in outcome.trials if r.status != "diverged"]
    assert all(math.isfinite(r.mean) and r.std >= 0 for r in healthy)


def test_nothing_depends_on_the_loss_s_unit():
    class Scaled(Bowl):
        def restart(self):
            first = super().restart()
            return Losses(first.steps, tuple(1e6 * v - 3e5 for v in first.values))

        def advance(self, rates):
            new = super().advance(rates)
            return Losses(new.steps, tuple(1e6 * v - 3e5 for v in new.values))

    plain, scaled = (bayesian(kind(), Search(0, 1000, 40, 5, 160)) for kind in (Bowl, Scaled))
    assert [r.rate for r in plain.trials] == pytest.approx([r.rate for r in scaled.trials])
    assert plain.rate == pytest.approx(scaled.rate)


def test_a_decoy_is_not_chosen():
    """Low rates fall fast at first and then stall at 1; high ones go on to 0.1."""

    class Decoy(Bowl):
        def advance(self, rates):
            values = []
            for rate in rates:
                self.at += 1
                low = rate < 3e-3
                values.append(1.0 + math.exp(-self.at / 8) if low else 0.1 + 1.9 * math.exp(-self.at / 60))
            return Losses(tuple(range(self.at - len(rates) + 1, self.at + 1)), tuple(values))

    fooled = 0
    for seed in range(10):
        outcome = staged(Decoy(), LRSearch(1e-5, 1.0, seed), Search(0, 1000, 100, 8, 10_000))
        fooled += outcome.rate < 3e-3
    assert fooled <= 1


def test_a_rate_that_exploded_is_not_forecast_back():
    """It comes down from 300 as steeply as if it would end below zero: the first rate must win."""

    class Bomb(Bowl):
        def advance(self, rates):
            values = []
            for rate in rates:
                self.at += 1
                values.append(0.1 if rate < 0.1 else 0.1 + 300 * math.exp(-self.at / 20))
            return Losses(tuple(range(self.at - len(rates) + 1, self.at + 1)), tuple(values))

        def restart(self):
            super().restart()
            return Losses((0,), (0.1,))

    outcome = staged(Bomb(), LRSearch(1e-3, 1.0), Search(0, 1000, 64, 6, 10_000), fallen=0.5)
    assert outcome.rate < 0.1


def test_the_published_search_keeps_no_trial():
    outcome = race(
        Bowl(), Paper(SkoptSearch(1e-3, 1.9), 500), Search(0, 500, 10, 4, 1000), Ground(0, lambda rate, step: rate)
    )
    assert outcome.committed == 0 and outcome.discarded == 40 and outcome.rate in [r.rate for r in outcome.trials]


def test_a_fall_of_which_little_is_known_is_not_forecast_to_rise():
    """On a noisy quadratic with a warmup: the loss is above its floor, and since it falls, below the last one."""
    h, x, losses = np.geomspace(1e-2, 1.0, 50), np.ones(50), []
    draws = 0.1 * np.random.default_rng(1).standard_normal((1000, 50))
    for step in range(121):
        losses.append(float(0.5 * (h * x**2).sum()))
        x = x - 0.021082 * min((step + 1) / 60, 1.0) * (h * x + draws[step])
    for seen in (97, 113, 121):
        assert 0.0 <= forecast(losses[:seen], 1000, floor=0.0).mean <= losses[seen - 1], seen


def test_nothing_faster_than_a_rate_that_diverged_is_asked():
    search = LRSearch(1e-4, 10.0)
    search.next_stage(0.2)
    for mean in (math.inf, 0.34, 0.4, 0.5, 0.6, 0.7):
        rate = search.ask()
        assert rate <= 0.2 * 1.0001
        search.tell(rate, mean, 0.1)


def test_a_faster_trial_that_rebounds_does_not_speak_against_a_slower_one():
    """At 1.0 the loss falls to 0.1 and then goes up to 3, which says nothing of what 0.3 will come to."""

    class Rebound(Bowl):
        def restart(self):
            super().restart()
            return Losses((0,), (5.0,))

        def advance(self, rates):
            values = []
            for rate in rates:
                self.at += 1
                path = 0.1 + 4.9 * math.exp(-min(rate, 1.0) * self.at / 12)
                values.append(path + (2.9 * math.exp((self.at - 100) / 15) if rate > 0.9 else 0.0))
            return Losses(tuple(range(self.at - len(rates) + 1, self.at + 1)), tuple(values))

    search = LRSearch(1e-3, 1.0)
    search.next_stage(0.3)
    outcome = staged(Rebound(), search, Search(0, 1000, 100, 2, 10_000))
    assert [r.rate for r in outcome.trials] == pytest.approx([0.3, 0.3 * 10**0.5])
    assert outcome.trials[0].mean < 0.5 and outcome.rate == pytest.approx(0.3)


def test_stages_of_a_given_length_end_near_the_best_rate() -> None:
    """The benchmark's noisy quadratic, through the controller: no lean to faster rates where a trial's end is forecast."""
    script = BENCHMARKS / "autolrs" / "quadratic.py"
    words = [sys.executable, script, "--seeds", "1", "--arms", "ours"]
    said = subprocess.run(words, capture_output=True, text=True, timeout=200, check=True).stdout
    found = re.findall(r"stage (\d): chosen/best median (\S+) .* discarded max (\d+)", said)
    assert [stage for stage, _, _ in found] == ["1", "2", "3"]
    for (_, ratio, discarded), (worst, most) in zip(found, ((4, 1000), (3, 538), (3, 538)), strict=True):
        assert float(ratio) <= worst
        assert int(discarded) <= most
