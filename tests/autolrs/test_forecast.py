"""Forecasts: accuracy, calibration, equivariance, defined answers on pathological curves."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.autolrs import Forecast, forecast
from trainkit.autolrs._paper import paper_forecast

WINDOW, HORIZON = np.arange(100.0), 1000.0
RATES = (0.0003, 0.001, 0.003, 0.01, 0.03)
POWERS = (0.3, 0.5, 0.7, 1.0)


def single(rate, amplitude=1.5):
    return lambda t, seed: amplitude * np.exp(-rate * t) + 0.5


def three(t, seed):
    draw = np.random.default_rng(1000 + seed)
    rates, shares = 10 ** draw.uniform(-3.5, -1.5, 3), draw.dirichlet(np.ones(3))
    return 1.5 * (shares[:, None] * np.exp(-rates[:, None] * t)).sum(0) + 0.5


def power(exponent):
    return lambda t, seed: 1.5 * (t + 1.0) ** -exponent + 0.5


FAMILIES = {
    "one exponential": [single(r) for r in RATES],
    "three exponentials": [three],
    "power law": [power(p) for p in POWERS],
}


def outcomes(curve, noise, seeds):
    """Errors and standard deviations over the seeds."""
    errors, stds = [], []
    for seed in range(seeds):
        losses = curve(WINDOW, seed) + noise * np.random.default_rng(seed).standard_normal(len(WINDOW))
        found = forecast(losses, HORIZON)
        errors.append(abs(found.mean - float(curve(np.array([HORIZON]), seed)[0])))
        stds.append(found.std)
    return np.array(errors), np.array(stds)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_80_percent_band_covers_70_to_90_percent(family):
    hits = []
    for curve in FAMILIES[family]:
        for noise in (0.01, 0.05, 0.1):
            errors, stds = outcomes(curve, noise, 12)
            hits.append(errors <= 1.2816 * stds)
    assert 0.70 <= np.mean(hits) <= 0.90


def test_accuracy_of_one_exponential():
    assert np.median(outcomes(single(0.03), 0.1, 40)[0]) <= 0.035
    for rate in (0.003, 0.01, 0.03):
        assert np.median(outcomes(single(rate), 0.0, 1)[0]) <= 0.03


def test_a_hopeless_asymptote_gets_a_wide_band():
    _, stds = outcomes(single(0.001), 0.1, 10)
    assert np.median(stds) > 0.2


@settings(max_examples=25, deadline=None)
@given(
    scale=st.floats(1e-3, 1e6),
    shift=st.floats(-1e3, 1e3),
    seed=st.integers(0, 1000),
    noise=st.sampled_from([0.0, 0.01, 0.1]),
)
def test_scale_and_offset(scale, shift, seed, noise):
    losses = three(WINDOW, seed) + noise * np.random.default_rng(seed).standard_normal(len(WINDOW))
    plain, moved = forecast(losses, HORIZON), forecast(scale * losses + scale * shift, HORIZON)
    size = scale * (abs(plain.mean) + abs(shift) + 1.0)
    assert moved.mean == pytest.approx(scale * (plain.mean + shift), abs=1e-6 * size)
    assert moved.std == pytest.approx(scale * plain.std, rel=1e-4, abs=1e-6 * size)


def test_1000_y_plus_c():
    losses = single(0.01)(WINDOW, 0) + 0.05 * np.random.default_rng(3).standard_normal(100)
    plain, moved = forecast(losses, HORIZON), forecast(1000 * losses + 7, HORIZON)
    assert moved.mean == pytest.approx(1000 * plain.mean + 7, rel=1e-6)
    assert moved.std == pytest.approx(1000 * plain.std, rel=1e-6)


@pytest.mark.parametrize(
    "losses",
    [[], [math.nan], [1.0, 2.0, math.inf], [3.0, 2.0, math.nan], [math.inf] * 5],
    ids=["empty", "nan", "ends in inf", "ends in nan", "all inf"],
)
def test_diverged_curves_are_infinitely_bad(losses):
    assert forecast(losses, 100) == Forecast(math.inf, math.inf)


def test_short_and_flat_curves():
    assert forecast([2.0], 100) == Forecast(2.0, math.inf)
    assert forecast([3.0, 2.0], 100) == Forecast(2.0, 2.0)
    assert forecast([1.5] * 20, 100) == Forecast(1.5, 0.0)
    three_points = forecast([3.0, 2.0, 1.5], 100)
    assert math.isfinite(three_points.mean) and three_points.std > 0


@pytest.mark.parametrize(
    "losses",
    [
        np.arange(50.0),
        np.exp(np.arange(50.0)),
        np.r_[1.0, 1e300, 1.0, 1.0],
        np.r_[3.0, math.nan, 2.0, math.inf, 1.5, 1.2],
        np.tile([1.0, 2.0], 30),
        np.full(40, 1e-300),
    ],
    ids=["rising", "exploding", "spike", "holes", "oscillating", "tiny"],
)
def test_odd_curves_have_an_answer(losses):
    found = forecast(losses, 1000)
    assert math.isfinite(found.mean) and found.std >= 0


def test_outliers_do_not_move_it_far():
    losses = single(0.03)(WINDOW, 0) + 0.01 * np.random.default_rng(0).standard_normal(100)
    losses[[20, 55, 80]] += 5.0
    assert abs(forecast(losses, HORIZON).mean - 0.5) < 0.1


def test_floor_is_respected():
    losses = 1.0 - 0.005 * WINDOW
    assert forecast(losses, HORIZON).mean < 0.0
    bounded = forecast(losses, HORIZON, floor=0.0)
    assert bounded.mean >= 0.0 and bounded.std > 0.0


def test_steps_are_the_axis_of_the_horizon():
    every, losses = np.arange(0.0, 100.0, 10.0), single(0.03)(np.arange(0.0, 100.0, 10.0), 0)
    assert forecast(losses, HORIZON, steps=every).mean == pytest.approx(0.5, abs=0.03)


def test_the_published_forecaster_answers_where_it_used_to_stop():
    assert paper_forecast(single(0.03)(WINDOW, 0), HORIZON).mean == pytest.approx(0.5, abs=0.2)
    assert math.isinf(paper_forecast([1.0, math.nan], HORIZON).mean)
    for seed in range(20):  # rank-deficient fits
        noisy = single(0.001)(WINDOW, 0) + 0.1 * np.random.default_rng(seed).standard_normal(100)
        assert math.isfinite(paper_forecast(noisy, HORIZON).mean)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_on_unseen_amplitudes_and_horizons(family):
    hits = []
    for curve in FAMILIES[family]:
        for amplitude in (0.2, 5.0):
            for horizon in (300.0, 3000.0):
                for seed in range(20):
                    draw = np.random.default_rng(500 + seed)
                    losses = amplitude * curve(WINDOW, seed) + 0.03 * amplitude * draw.standard_normal(100)
                    found = forecast(losses, horizon)
                    truth = amplitude * float(curve(np.array([horizon]), seed)[0])
                    hits.append(abs(found.mean - truth) <= 1.2816 * found.std)
    assert 0.6 <= np.mean(hits) <= 0.95


def test_order_of_steps_tensors_and_holes_do_not_matter():
    import torch

    losses = single(0.03)(WINDOW, 0)
    order = np.random.default_rng(0).permutation(len(losses))
    assert forecast(losses[order], HORIZON, steps=order) == forecast(losses, HORIZON)
    assert forecast(torch.tensor(losses, requires_grad=True), HORIZON) == forecast(losses, HORIZON)
    assert math.isfinite(forecast([3.0, None, 2.0, 1.5, 1.2], 10).mean)
