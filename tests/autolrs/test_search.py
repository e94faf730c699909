"""The search: asking, telling, following an optimum, racing trials."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from paths import BENCHMARKS

from trainkit.autolrs import Forecast, Losses, LRSearch, Rules, Search, SkoptSearch, forecast, race


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


def rules(**changes):
    def forecaster(steps, losses, horizon):
        return forecast(losses, horizon, steps=steps, floor=0.0)

    return Rules(
        **{"stage": 0, "rate_at": lambda r, s: r, "forecaster": forecaster, "fallback": lambda low: low / 10, **changes}
    )


def test_the_winner_is_kept_and_the_books_balance():
    trials = Bowl()
    outcome = race(trials, LRSearch(1e-3, 1.9), Search(100, 600, 48, 8, 300), rules())
    kept = [r for r in outcome.trials if r.status == "kept"]
    assert len(kept) == 1 and kept[0].rate == outcome.rate and kept[0].steps == outcome.kept == 48
    assert trials.taken == outcome.kept + outcome.discarded == sum(r.steps for r in outcome.trials)
    assert outcome.discarded <= 300
    again = Bowl()
    again.restart()
    again.advance([outcome.rate] * 48)
    assert np.array_equal(trials.kept, again.x)
    assert all(r.loss_steps[0] == 100 and r.horizon == 600 for r in outcome.trials)


def test_bad_trials_stop_early():
    outcome = race(Bowl(), LRSearch(1e-3, 1.9), Search(0, 500, 64, 10, 10_000), rules())
    assert any(r.status == "stopped" and r.steps < 64 for r in outcome.trials)
    slow = race(Bowl(), LRSearch(1e-3, 1.9), Search(0, 500, 64, 10, 10_000), rules(halving=False))
    assert all(r.steps == 64 for r in slow.trials)


def test_diverging_trials_leave_the_others_alone():
    outcome = race(Bowl(lambda rate: rate > 0.1), LRSearch(1e-3, 1.9), Search(0, 500, 40, 8, 1000), rules())
    assert {r.status for r in outcome.trials if r.rate > 0.1} == {"diverged"}
    assert outcome.kept == 40 and outcome.rate <= 0.1


def test_all_diverging_falls_back_below_the_lowest():
    outcome = race(Bowl(lambda rate: True), LRSearch(1e-3, 1.9), Search(0, 500, 40, 4, 1000), rules())
    assert outcome.kept == 0 and outcome.rate == pytest.approx(min(r.rate for r in outcome.trials) / 10)
    assert outcome.discarded == sum(r.steps for r in outcome.trials)


def test_a_known_rate_that_works_costs_nothing():
    outcome = race(Bowl(), LRSearch(1e-3, 1.9), Search(0, 40, 40, 5, 160), rules(begin=0.1, look=True))
    assert outcome.rate == 0.1 and outcome.kept == 40 and outcome.discarded == 0


def test_a_known_rate_that_does_not_work_is_lowered():
    trials = Bowl(lambda rate: rate > 0.02)
    outcome = race(trials, LRSearch(1e-3, 1.9), Search(0, 40, 40, 5, 160), rules(begin=0.1, look=True))
    assert [r.status for r in outcome.trials] == ["diverged", "diverged", "kept"]
    assert outcome.rate == pytest.approx(0.01) and outcome.kept == 40


def test_a_known_rate_that_shakes_stays_when_a_lower_one_is_worse():
    """Its loss comes back by half; what is slower falls less far, and what is slower still is not tried."""

    class Shaken(Bowl):
        def advance(self, rates):
            self.at += len(rates)
            slow, early = rates[0] < 0.05, self.at <= 10
            return Losses((self.at,), (1.25 - 0.001 * self.at if slow else 0.02 if early else 0.8,))

    outcome = race(Shaken(), LRSearch(1e-5, 1.9), Search(0, 40, 40, 5, 160), rules(begin=0.1, look=True))
    assert [r.rate for r in outcome.trials] == pytest.approx([0.1, 10**-1.5])
    assert outcome.rate == 0.1 and outcome.kept == 40 and 0 < outcome.discarded <= 40


def decide(trials, **changes):
    """A deciding search after a first one at 0.01, its trials' last ten steps annealed."""
    settings = {"begin": 0.01, "low": 1e-5, "high": 1.0, "fallen": 1.0, **changes}
    return race(trials, LRSearch(1e-5, 1.0), Search(100, 130, 30, 5, 150, decay=10), rules(**settings))


class Peak(Bowl):
    """The loss at a trial's end is least at 0.1."""

    def __init__(self, start=1.4):
        super().__init__()
        self.rates, self.start = [], start

    def restart(self):
        super().restart()
        return Losses((0,), (self.start,))

    def advance(self, rates):
        self.rates += rates
        self.at += len(rates)
        top = max(self.rates[-self.at :])
        return Losses((self.at,), (0.5 + 0.3 * abs(math.log10(top) + 1.0),))


def test_deciding_trials_fall_to_zero_and_climb_until_one_is_worse():
    trials = Peak()
    outcome = decide(trials)
    assert [r.rate for r in outcome.trials] == pytest.approx([0.01, 10**-1.5, 0.1, 10**-0.5])
    assert outcome.rate == pytest.approx(0.1) and outcome.kept == 30 and outcome.discarded == 90
    first = np.array(trials.rates[:30]) / 0.01
    assert first == pytest.approx([1.0] * 20 + [(10 - i) / 11 for i in range(10)])


def test_a_climb_ends_at_the_range_s_end():
    outcome = decide(Peak(), high=0.05)
    assert [r.rate for r in outcome.trials] == pytest.approx([0.01, 10**-1.5, 0.05])
    assert outcome.rate == 0.05 and outcome.discarded == 60


def test_on_a_plateau_a_climb_begins_with_a_faster_rate():
    """What the present one does there is known; it is tried after all when the faster one does harm."""
    outcome = decide(Peak(), lean=lambda loss: 1e-6)
    assert [r.rate for r in outcome.trials] == pytest.approx([10**-1.5, 0.1, 10**-0.5])
    assert outcome.rate == pytest.approx(0.1) and outcome.discarded == 60
    outcome = decide(Peak(0.6), lean=lambda loss: 1e-6, begin=0.1, left=lambda loss: 0.1)
    assert [r.rate for r in outcome.trials] == pytest.approx([10**-0.5, 0.1])
    assert outcome.trials[0].status == "stopped" and outcome.rate == 0.1


def test_on_a_plateau_the_faster_of_two_that_look_alike_is_taken():
    class Flat(Bowl):
        def advance(self, rates):
            self.at += len(rates)
            self.top = rates[0] if self.at == len(rates) else self.top
            return Losses((self.at,), (0.5 + 0.004 * (2 + math.log10(self.top)),))

    class Start(Flat):
        def restart(self):
            super().restart()
            return Losses((0,), (0.51,))

    assert decide(Start()).rate == pytest.approx(0.01)
    assert decide(Start(), lean=lambda loss: 0.01).rate > 0.01


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
        outcome = race(Decoy(), LRSearch(1e-5, 1.0, seed), Search(0, 1000, 100, 8, 10_000), rules())
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

    outcome = race(Bomb(), LRSearch(1e-3, 1.0), Search(0, 1000, 64, 6, 10_000), rules(fallen=0.5))
    assert outcome.rate < 0.1


def test_point_forecasts_without_spread_do_not_break_the_race():
    outcome = race(
        Bowl(),
        SkoptSearch(1e-3, 1.9),
        Search(0, 500, 10, 4, 1000),
        rules(forecaster=lambda s, v, h: Forecast(v[-1], 0.0), halving=False, keep=False),
    )
    assert outcome.kept == 0 and outcome.discarded == 40


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
    outcome = race(Rebound(), search, Search(0, 1000, 100, 2, 10_000), rules())
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
