import numpy as np
import pytest
from scipy.optimize import minimize

from scaling.fitting.bootstrap import Bootstrap, bootstrap, interval
from scaling.fitting.fit import FitConfig, fit
from scaling.fitting.intervals import prediction_interval, profile
from scaling.published import CURVE
from scaling.rows import make_rows

T = {"A": 300.0, "E": 2.0, "alpha": 0.3}
TOKENS = np.geomspace(1e6, 1e10, 40)
NORMAL = FitConfig(objective="normal")
TIGHT = {"xatol": 1e-9, "fatol": 1e-14, "maxiter": 4000, "maxfev": 4000}


def runs(noise, seed=0):
    loss = T["E"] + T["A"] / TOKENS ** T["alpha"]
    drawn = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(40))
    return make_rows({"params": np.ones(40), "tokens": TOKENS, "loss": drawn})


def test_profile_and_bootstrap_intervals_agree_with_the_linear_theory():
    fitted = fit(runs(0.01), CURVE, NORMAL, starts=CURVE.raw(T)[:, None])
    # Standard error from the Jacobian of log loss, by hand.
    p, loss = fitted.parameters, fitted.parameters["E"] + fitted.parameters["A"] / TOKENS ** fitted.parameters["alpha"]
    power = 1 / TOKENS ** p["alpha"]
    slopes = np.stack([power / loss, 1 / loss, -p["A"] * power * np.log(TOKENS) / loss], 1)
    errors = np.sqrt(np.diag(np.linalg.inv(slopes.T @ slopes)) * np.sum(fitted.residuals**2) / 40)
    se = dict(zip(("A", "E", "alpha"), errors, strict=True))["E"]
    found = profile(fitted, "E", p["E"] + se * np.linspace(-3, 3, 13))
    low, high = found.interval
    assert low < p["E"] < high
    # Student's 97.5% point for 37 degrees of freedom; its noise is that of n - p.
    assert high - low == pytest.approx(2 * 2.0262 * se * np.sqrt(40 / 37), rel=0.03)
    assert found.objectives[6] == pytest.approx(fitted.value, rel=1e-9)
    # Resampled rows have the variance of the sandwich, their own squares in its middle, to first order in 1 / 40.
    inverse = np.linalg.inv(slopes.T @ slopes)
    sandwich = np.sqrt(np.diag(inverse @ (slopes.T * fitted.residuals**2) @ slopes @ inverse))
    found = bootstrap(fitted, 4000, seed=0).standard_errors()
    np.testing.assert_allclose(found[1:], sandwich[1:], rtol=0.1)
    # Too narrow a range says so.
    assert profile(fitted, "E", p["E"] + se * np.linspace(-0.5, 0.5, 3)).interval == (-np.inf, np.inf)


def test_profiles_of_several_values_are_refitted_side_by_side():
    fitted = fit(runs(0.01), CURVE, NORMAL, starts=CURVE.raw(T)[:, None])
    n, y = np.log(TOKENS), np.log(fitted.rows["loss"])
    for index, name in enumerate(CURVE.parameters):
        near = fitted.parameters[name] * np.array([0.9, 1.0, 1.1])
        found = profile(fitted, name, near)
        assert found.inside[1] and found.objectives[1] == pytest.approx(fitted.value, rel=1e-9)
        for value, objective in zip(near, found.objectives, strict=True):
            held = np.log(value) if name in CURVE.positive else value

            def squares(rest, held=held, index=index):
                a, e, alpha = np.insert(rest, index, held)
                return 0.5 * np.sum((np.logaddexp(a - alpha * n, e) - y) ** 2)

            baseline = minimize(squares, np.delete(fitted.theta, index), method="Nelder-Mead", options=TIGHT)
            assert objective == pytest.approx(baseline.fun, rel=1e-5)


def test_a_new_runs_loss_is_predicted():
    fitted = fit(runs(0.01), CURVE, NORMAL, starts=CURVE.raw(T)[:, None])
    boot = bootstrap(fitted, 200)
    beyond = make_rows({"params": [1.0, 1.0], "tokens": [1e8, 1e16], "loss": [1.0, 1.0]})
    low, high = prediction_interval(fitted, boot, beyond)
    middle = np.exp(CURVE.predict(fitted.theta[:, None], CURVE.gather(beyond))[:, 0])
    assert (low < middle).all() and (middle < high).all()
    # Wider than the noise alone, and wider where the curve is extrapolated.
    width = np.log(high / low)
    assert 2 * 1.4 * 0.01 < width[0] < 2 * 2.8 * 0.01 and width[1] > width[0]
    # Too few rows for an order statistic: Student's t.
    few = fit(fitted.rows.take(np.arange(0, 40, 4)), CURVE, NORMAL, starts=CURVE.raw(T)[:, None])
    low, high = prediction_interval(few, bootstrap(few, 200), beyond)
    assert np.isfinite([low, high]).all()


@pytest.mark.parametrize(("level", "ends"), [(0.95, (25, 975)), (0.5, (250, 750))])
def test_percentile_intervals_of_even_draws(level, ends):
    draws = np.random.default_rng(0).permutation(np.arange(1001.0))
    np.testing.assert_allclose(interval(np.stack([draws, 2 * draws]), level).T, [ends, np.multiply(2, ends)], rtol=1e-9)


def test_standard_errors_leave_out_fits_that_did_not_converge():
    draws, flags = np.random.default_rng(0).normal(size=(2, 6)), np.array([1, 1, 0, 1, 0, 1], bool)
    boot = Bootstrap(draws, np.zeros(6), flags, np.zeros(6, int), np.where(flags, draws, 1e9))
    np.testing.assert_allclose(boot.standard_errors(), draws[:, flags].std(axis=1, ddof=1))


def test_a_prediction_has_the_uncertainty_of_the_curve():
    """Half the width squared is in proportion to the noise's variance plus the curve's, whatever that is."""
    fitted = fit(runs(0.01), CURVE, NORMAL, starts=CURVE.raw(T)[:, None])
    place = make_rows({"params": [1.0], "tokens": [1e13], "loss": [1.0]})
    noise = np.sum(fitted.residuals**2) / (len(fitted.rows) - len(CURVE.parameters))
    normal = np.random.default_rng(0).normal(size=(len(fitted.theta), 400))
    ratios = []
    for spread in (0.0, 0.003, 0.01):
        theta = fitted.theta[:, None] + spread * normal
        boot = Bootstrap(theta, np.zeros(400), np.ones(400, bool), np.zeros(400, int), theta)
        low, high = prediction_interval(fitted, boot, place)
        curve = np.ptp(np.percentile(CURVE.predict(theta, CURVE.gather(place))[0], [15.865525, 84.134475])) / 2
        ratios.append(float(np.log(high / low)[0] / 2 / np.sqrt(noise + curve**2)))
    assert ratios == pytest.approx([ratios[0]] * 3, rel=1e-4)
