import numpy as np
import pytest

from scaling.bootstrap import bootstrap
from scaling.fit import FitConfig, fit
from scaling.intervals import profile, simulate_coverage
from scaling.published import CURVE
from scaling.rows import make_rows

T = {"A": 300.0, "E": 2.0, "alpha": 0.3}
TOKENS = np.geomspace(1e6, 1e10, 40)
NORMAL = FitConfig(objective="normal")


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
    assert high - low == pytest.approx(2 * 1.96 * se, rel=0.15)
    assert found.objectives[6] == pytest.approx(fitted.value, rel=1e-9)
    boot = bootstrap(fitted, 400, seed=0)
    assert boot.standard_errors()[1] == pytest.approx(se, rel=0.3)
    # Too narrow a range says so.
    assert profile(fitted, "E", p["E"] + se * np.linspace(-0.5, 0.5, 3)).interval == (-np.inf, np.inf)


def cover(sweeps, resampled):
    return simulate_coverage(
        runs(0.0),
        CURVE,
        T,
        {"alpha": lambda p: p["alpha"], "E": lambda p: p["E"], "log A": lambda p: np.log(p["A"])},
        noise=0.003,
        sweeps=sweeps,
        resampled=resampled,
    )


def test_coverage_is_counted():
    found = cover(sweeps=12, resampled=60)
    assert found.converged.all() and found.sweeps == 12
    for name, share in found.share.items():
        low, high = found.intervals[name]
        assert share == np.mean((low <= found.truth[name]) & (found.truth[name] <= high))
        assert share >= 0.7


@pytest.mark.slow
def test_95_percent_intervals_cover_the_truth():
    for share in cover(sweeps=600, resampled=200).share.values():
        assert 0.93 <= share <= 0.97
