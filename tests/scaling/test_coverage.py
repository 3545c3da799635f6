import numpy as np
import pytest

from scaling.coverage import CHINCHILLA_QUANTITIES, EPOCH, _draw, isoflop_design, simulate_coverage
from scaling.fitting.fit import FitConfig
from scaling.fitting.intervals import bootstrap_interval, student_level
from scaling.published import CHINCHILLA, CURVE
from scaling.rows import make_rows

T = {"A": 300.0, "E": 2.0, "alpha": 0.3}
TOKENS = np.geomspace(1e6, 1e10, 40)
CURVE_RUNS = make_rows({"params": np.ones(40), "tokens": TOKENS, "loss": np.ones(40)})


def cover(sweeps, resampled, **rest):
    quantities = {name: (lambda p, name=name: p[name]) for name in T}
    return simulate_coverage(
        CURVE_RUNS, CURVE, T, quantities, noise=0.003, sweeps=sweeps, resampled=resampled, profiled=("alpha",), **rest
    )


def test_coverage_is_counted():
    found = cover(sweeps=12, resampled=60)
    assert found.converged.all() and found.sweeps == 12
    for name, share in found.share.items():
        low, high = found.intervals[name]
        assert share == np.mean((low <= found.truth[name]) & (found.truth[name] <= high))
        assert share >= 0.7
    assert found.profiled["alpha"] >= 0.7 and 0.85 < found.new_run <= 1


def test_an_interval_of_the_wrong_level_is_noticed():
    assert max(cover(sweeps=30, resampled=60, level=0.5).share.values()) < 0.85


def test_the_design_is_an_isoflop_grid():
    rows = isoflop_design(EPOCH, budgets=3, sizes=5)
    np.testing.assert_allclose(rows["flops"].reshape(3, 5), rows["flops"].reshape(3, 5)[:, :1] * np.ones((3, 5)))
    assert len(np.unique(rows["params"])) == 15
    np.testing.assert_allclose(np.unique(rows["flops"].round(-10)), np.geomspace(6e18, 3e21, 3), rtol=1e-6)
    np.testing.assert_allclose(rows["flops"], 6 * rows["params"] * rows["tokens"], rtol=1e-12)


def test_noise_of_heavy_tails_has_the_same_variance():
    # Student's t of 4 degrees of freedom has variance 2; its 97.5% point is 2.776, from tables.
    drawn = np.abs(_draw(np.random.default_rng(0), 100_000, "student"))
    assert np.quantile(drawn, 0.95) == pytest.approx(2.776 / np.sqrt(2), rel=0.02)


# A share of 400 sweeps has a standard error of 0.011: single ones may leave the band that their mean must keep.
def check_band(shares):
    assert 0.93 <= np.mean(shares) <= 0.97
    assert 0.915 <= min(shares) and max(shares) <= 0.985


@pytest.mark.slow
def test_95_percent_intervals_of_a_learning_curve_cover_the_truth():
    found = cover(sweeps=600, resampled=200)
    check_band([*found.share.values(), *found.profiled.values()])


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["normal", "huber"])
def test_95_percent_intervals_of_chinchillas_law_cover_the_truth(objective):
    found = simulate_coverage(
        isoflop_design(EPOCH, budgets=9, sizes=15),
        CHINCHILLA,
        EPOCH,
        CHINCHILLA_QUANTITIES,
        noise=0.01,
        sweeps=400,
        config=FitConfig(objective=objective),
        profiled=("alpha", "beta"),
    )
    check_band([*found.share.values(), *found.profiled.values()])
    assert 0.93 <= found.new_run <= 0.98


def test_percentiles_are_widened_for_few_rows():
    assert student_level(0.95, 10_000) == pytest.approx(0.95, abs=1e-3)
    assert 0.95 < student_level(0.95, 40) < student_level(0.95, 10) < 1
    # Of normal draws they are Student's interval.
    draws = np.random.default_rng(0).standard_normal(200_000)
    np.testing.assert_allclose(bootstrap_interval(draws, 15, 5), [-2.228, 2.228], atol=0.04)


def test_percentiles_are_bias_corrected():
    draws = np.exp(np.random.default_rng(0).standard_normal(200_000))
    plain = bootstrap_interval(draws, 15, 5, objective="huber")
    np.testing.assert_allclose(np.log(plain), [-1.96, 1.96], atol=0.02)
    np.testing.assert_allclose(bootstrap_interval(draws, 15, 5, objective="huber", estimate=1.0), plain, rtol=0.02)
    # Estimate half a standard deviation above the draws' middle: both ends move up by one (Efron 1981).
    moved = bootstrap_interval(draws, 15, 5, objective="huber", estimate=float(np.exp(0.5)))
    np.testing.assert_allclose(np.log(moved), [-0.96, 2.96], atol=0.04)
    np.testing.assert_array_equal(bootstrap_interval(draws, 15, 5, objective="huber", estimate=np.nan), plain)
