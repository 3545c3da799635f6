import warnings

import numpy as np
import pytest

from scaling.coverage import EPOCH, isoflop_design
from scaling.fitting.fit import FitConfig, fit
from scaling.published import CHINCHILLA, COMPUTE
from scaling.rows import make_rows

SIZES = np.geomspace(1e7, 1e10, 12)


def published_loss(params, tokens):
    return EPOCH["E"] + EPOCH["A"] / params ** EPOCH["alpha"] + EPOCH["B"] / tokens ** EPOCH["beta"]


def runs(params, tokens):
    noise = np.exp(0.002 * np.random.default_rng(0).standard_normal(len(params)))
    return make_rows({"params": params, "tokens": tokens, "loss": published_loss(params, tokens) * noise}, "runs.csv")


@pytest.mark.parametrize(
    ("cause", "tokens"), [("D = 20 N", 20 * SIZES), ("one budget", 1e20 / SIZES), ("D = 1e.10", np.full(12, 1e10))]
)
def test_an_undetermined_fit_says_so_and_gives_no_interval(cause, tokens):
    fitted = fit(runs(SIZES, tokens), CHINCHILLA, FitConfig(starts=40))
    new = make_rows({"params": [1e9], "tokens": [2e9], "loss": [1.0]})
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with pytest.warns(UserWarning, match=f"undetermined by runs.csv .*{cause}.*no interval") as told:
            found = fitted.predict(new)
    assert len(told) == 1 and np.isfinite(found.loss[0]) and np.isnan([found.low[0], found.high[0]]).all()
    for text in (repr(fitted), fitted.summary()):
        assert "undetermined: " in text and fitted.undetermined in text


def test_a_determined_fit_gives_an_interval_without_a_word():
    fitted = fit(isoflop_design(EPOCH, budgets=4, sizes=5, noise=0.002), CHINCHILLA, FitConfig(starts=40))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fitted.predict(make_rows({"params": [1e9], "tokens": [2e10], "loss": [1.0]}))
    assert found.low[0] < found.loss[0] < found.high[0] and not fitted.undetermined
    assert "undetermined" not in repr(fitted) + fitted.summary()


def test_variances_of_more_parameters_than_places_are_no_negative_numbers():
    # Two FLOP counts, three parameters: the information has an eigenvalue of rounding, of either sign.
    for seed in range(8):
        flops = np.repeat([1e18, 1e19], 7)
        noise = np.exp(0.02 * np.random.default_rng(seed).standard_normal(14))
        params = np.sqrt(flops / 120) * np.tile(np.geomspace(0.3, 3, 7), 2)
        rows = make_rows({"params": params, "flops": flops, "loss": (1.8 + 2000 / flops**0.17) * noise})
        discrepancy = fit(rows, COMPUTE, FitConfig(starts=20)).discrepancy()
        far = make_rows({"params": [1e9, 1e10], "flops": [1e20, 1e22], "loss": [1.0, 1.0]})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            low, high = discrepancy.predict(far)
        assert (low < high).all()
