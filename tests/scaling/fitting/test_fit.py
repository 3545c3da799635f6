from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize

from scaling.coverage import isoflop_design
from scaling.fitting.bootstrap import bootstrap, refit, resamples, search_again
from scaling.fitting.fit import FitConfig, fit, make_problem, polish, row_losses
from scaling.laws import tie
from scaling.published import CHINCHILLA, find_law
from scaling.rows import RowError, make_rows
from scaling.tables import read_csv

# Besiroglu et al. (2024): estimates, and standard errors from 4000 resamples.
PUBLISHED = {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658}
ERRORS = {"A": 124.5, "B": 1293.0, "E": 0.0257, "alpha": 0.0154, "beta": 0.0206}


CACHE: dict = {}


@pytest.fixture
def fitted(shared_data):
    """The published recipe on the published rows, fitted once."""
    if "fit" not in CACHE:
        rows = read_csv(shared_data("scaling/chinchilla_figure4.csv")).without_highest_losses(5)
        CACHE["fit"] = fit(rows, CHINCHILLA)
    return CACHE["fit"]


def objective(theta, rows, counts):
    """The published objective and its gradient in numpy."""
    n, d = np.log(rows["params"]), np.log(rows["tokens"])
    parts = np.stack([theta[0] - theta[3] * n, theta[1] - theta[4] * d, np.full(len(n), theta[2])])
    top = parts.max(0)
    share = np.exp(parts - top)
    residual = top + np.log(share.sum(0)) - np.log(rows["loss"])
    share /= share.sum(0)
    size = np.abs(residual)
    value = np.sum(counts * np.where(size <= 1e-3, 0.5 * size**2, 1e-3 * (size - 0.5e-3)))
    pull = counts * np.clip(residual, -1e-3, 1e-3)
    slopes = [share[0], share[1], share[2], -share[0] * n, -share[1] * d]
    return value, np.array([np.sum(pull * slope) for slope in slopes])


@pytest.mark.long
def test_the_exact_huber_optimum(fitted):
    found = fitted.parameters
    exact = {"A": 477.826, "B": 2143.417, "E": 1.817218, "alpha": 0.3473105, "beta": 0.3671724}
    for name, value in exact.items():
        assert found[name] == pytest.approx(value, rel=1e-6)
    assert fitted.value == pytest.approx(1.0182740178e-3, rel=1e-9)
    assert fitted.converged
    value, gradient = objective(fitted.theta, fitted.rows, np.ones(240))
    assert value == pytest.approx(fitted.value, rel=1e-12)
    assert np.abs(gradient).max() < 1e-7


def test_the_published_estimates_are_within_a_tenth_of_their_standard_errors(fitted):
    for name, value in PUBLISHED.items():
        assert abs(fitted.parameters[name] - value) < 0.1 * ERRORS[name]


def test_bootstrap_standard_errors(fitted):
    boot = bootstrap(fitted, 4000)
    assert boot.converged_B.all()
    for found, name in zip(boot.standard_errors(), CHINCHILLA.parameters, strict=True):
        assert found == pytest.approx(ERRORS[name], rel=0.05)


def test_resamples_agree_with_scipy(fitted):
    counts = resamples(3, 240, seed=7)
    boot = refit(fitted, counts)
    for b in range(3):
        baseline = minimize(
            objective,
            fitted.theta,
            args=(fitted.rows, counts[:, b]),
            jac=True,
            method="L-BFGS-B",
            options={"ftol": 1e-15, "gtol": 1e-12, "maxiter": 5000, "maxcor": 20},
        )
        assert boot.value_B[b] <= baseline.fun * (1 + 1e-9)
        np.testing.assert_allclose(boot.theta_PB[:, b], baseline.x, rtol=1e-4)


def test_many_resamples_at_once_end_where_few_do(fitted):
    counts = resamples(96, 240, seed=5)
    many = refit(fitted, counts)
    few = [refit(fitted, counts[:, i : i + 48]) for i in (0, 48)]
    assert many.converged_B.all()
    np.testing.assert_allclose(many.value_B, np.concatenate([boot.value_B for boot in few]), rtol=1e-10)
    np.testing.assert_allclose(many.theta_PB, np.concatenate([boot.theta_PB for boot in few], 1), rtol=1e-4)


def assert_as_search(fitted, count):
    counts = resamples(count, 240, seed=3)
    boot = refit(fitted, counts)
    for b in range(count):
        again = search_again(fitted, counts[:, b])
        assert boot.value_B[b] == pytest.approx(again.value, rel=1e-8)
        np.testing.assert_allclose(boot.theta_PB[:, b], again.theta, rtol=1e-4)


def test_scoring_basins_equals_a_search_from_every_start(fitted):
    assert_as_search(replace(fitted, config=replace(fitted.config, starts=600)), 1)


@pytest.mark.slow
def test_scoring_basins_equals_a_search_from_every_start_on_fifty_resamples(fitted):
    assert_as_search(fitted, 50)


def test_a_resample_starts_in_the_basin_that_is_best_for_it(fitted):
    # A local optimum of Chinchilla's law: its A vanished, so that nothing moves it back.
    lost = fitted.theta.copy()
    lost[0] = -300.0
    solved = polish(lost[:, None], np.ones((240, 1)), fitted.rows, CHINCHILLA, fitted.config)
    assert solved.converged[0] and solved.value[0] > 2 * fitted.value
    both = np.concatenate([solved.theta, fitted.theta[:, None]], 1)
    two = replace(fitted, basins_PK=both, basin_values=np.array([solved.value[0], fitted.value]))
    boot = refit(two, resamples(3, 240, seed=7))
    assert (boot.basin_B == 1).all()
    np.testing.assert_allclose(boot.value_B, refit(fitted, resamples(3, 240, seed=7)).value_B, rtol=1e-10)
    # Rows that the worse optimum serves better: the nearest to it of the 240.
    residual = CHINCHILLA.predict(two.basins_PK, CHINCHILLA.gather(fitted.rows)) - np.log(fitted.rows["loss"])[:, None]
    near = np.argsort(np.abs(residual[:, 0]) - np.abs(residual[:, 1]))[:40]
    assert refit(two, np.isin(np.arange(240), near)[:, None].astype(float)).basin_B.tolist() == [0]


def test_resamples_are_counts_and_clusters_stay_together():
    counts = resamples(20, 6, seed=1)
    assert (counts.sum(0) == 6).all()
    labels = ["a", "a", "b", "b", "b", "c"]
    counts = resamples(20, 6, seed=1, clusters=labels)
    np.testing.assert_array_equal(counts[0], counts[1])
    np.testing.assert_array_equal(counts[2], counts[4])
    assert (counts[0] + counts[2] + counts[5] == 3).all()
    with pytest.raises(ValueError, match="2 cluster labels for 6 rows"):
        resamples(1, 6, clusters=["a", "b"])


@pytest.mark.parametrize("kind, norm", [("laplace", 1), ("normal", 2)])
def test_free_scale_likelihoods_reach_scipys_optimum(fitted, kind, norm):
    found = fit(fitted.rows, CHINCHILLA, FitConfig(objective=kind), starts=fitted.theta[:, None])

    def total(theta):
        n, d = np.log(fitted.rows["params"]), np.log(fitted.rows["tokens"])
        parts = [theta[0] - theta[3] * n, theta[1] - theta[4] * d, np.full(len(n), theta[2])]
        return np.sum(np.abs(np.logaddexp.reduce(parts) - np.log(fitted.rows["loss"])) ** norm)

    options = {"xatol": 1e-9, "fatol": 1e-13, "maxiter": 4000, "maxfev": 4000}
    baseline = minimize(total, found.theta, method="Nelder-Mead", options=options)
    assert total(found.theta) <= baseline.fun * (1 + 1e-6)
    scale = (total(found.theta) / 240) ** (1 / norm)
    assert found.scale == pytest.approx(scale, rel=1e-9)
    density = {1: -np.log(2 * scale) - 1, 2: -0.5 * np.log(2 * np.pi * scale**2) - 0.5}[norm]
    assert found.log_likelihood == pytest.approx(240 * density, rel=1e-9)


def test_only_an_unweighted_fit_of_log_losses_has_a_likelihood(fitted):
    config = FitConfig(objective="normal")
    columns = dict(fitted.rows.columns) | {"weight": np.linspace(1, 2, len(fitted.rows))}
    rows = make_rows(columns)
    for changes in ({}, {"residuals": "loss"}, {"overprediction": 2.0}, {"weights": "weight"}):
        found = replace(fitted, rows=rows, config=replace(config, **changes))
        assert (found.log_likelihood is None) == bool(changes)


def test_a_threshold_must_be_positive():
    with pytest.raises(ValueError, match="delta 0.0"):
        FitConfig(delta=0.0)


@pytest.mark.parametrize("name", ["chinchilla", "kaplan"])
def test_exponents_are_held_at_zero_where_loss_rises(name):
    rng = np.random.default_rng(0)
    params, tokens = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 5)))
    loss = 3 * tokens**0.05 * params**-0.05 * np.exp(0.002 * rng.standard_normal(25))
    law = find_law(name)
    fitted = fit(make_rows({"params": params, "tokens": tokens, "loss": loss}), law, FitConfig(starts=300))
    rising = law.parameters.index("beta" if name == "chinchilla" else "alpha_D")
    assert fitted.theta[rising] == law.least
    draws = refit(fitted, resamples(20, 25)).theta_PB
    assert (draws[[law.parameters.index(one) for one in law.nonnegative]] >= law.least).all()
    # The rest is at its optimum under the bound: nothing gained by moving any other parameter.
    problem = make_problem(fitted.rows, law, fitted.config)
    moved = row_losses(fitted.theta[:, None] + 1e-4 * np.eye(len(fitted.theta)), problem, law)[0].sum(0)
    assert (np.delete(moved, rising) >= fitted.value * (1 - 1e-9)).all()


def test_a_weight_of_two_is_a_row_that_is_there_twice():
    rng = np.random.default_rng(0)
    tokens = np.geomspace(1e7, 1e10, 12)
    loss = (2 + 300 / tokens**0.3) * np.exp(0.01 * rng.standard_normal(12))
    weight = np.array([1.0, 2.0, 0.0] * 4)
    columns = {"params": np.ones(12), "tokens": tokens, "loss": loss}
    weighed = fit(make_rows(columns | {"w": weight}), find_law("curve"), FitConfig(weights="w"))
    twice = fit(make_rows(columns).take(np.repeat(np.arange(12), weight.astype(int))), find_law("curve"))
    np.testing.assert_allclose(weighed.theta, twice.theta, rtol=1e-7)
    assert weighed.value == pytest.approx(twice.value, rel=1e-9)
    np.testing.assert_allclose(refit(weighed, np.ones((12, 1))).theta_PB[:, 0], twice.theta, rtol=1e-7)
    with pytest.raises(RowError, match="row 1, column 'w': -1.0 is a negative weight"):
        fit(make_rows(columns | {"w": -weight}), find_law("curve"), FitConfig(weights="w"))


def test_tied_exponents_are_the_law_of_gadre_et_al():
    # E + (a M^eta + b M^-eta) C^-eta with M = D / N, eq. 4; eta = alpha / 2.
    params, tokens = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 1e9, 4), np.geomspace(1e9, 1e11, 4)))
    ratio, flops = tokens / params, 6 * params * tokens
    loss = 1.8 + (60 * ratio**0.12 + 90 * ratio**-0.12) * flops**-0.12
    fitted = fit(make_rows({"params": params, "tokens": tokens, "loss": loss}), tie(CHINCHILLA, beta="alpha"))
    found = fitted.parameters
    assert found["alpha"] == pytest.approx(0.24, rel=1e-6) and found["E"] == pytest.approx(1.8, rel=1e-6)
    assert found["A"] == pytest.approx(60 * 6**-0.12, rel=1e-5) and found["B"] == pytest.approx(90 * 6**-0.12, rel=1e-5)
    with pytest.raises(ValueError, match="beta cannot be tied to A, which is of another kind"):
        tie(CHINCHILLA, beta="A")
    with pytest.raises(ValueError, match="no parameter 'gamma'"):
        tie(CHINCHILLA, beta="gamma")


def test_many_rows_are_searched_by_some_and_fitted_by_all(monkeypatch):
    truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
    rows = isoflop_design(truth, budgets=30, sizes=10, noise=0.01)
    all_rows = fit(rows, CHINCHILLA, FitConfig(starts=60))
    few = rows.thin(50)
    # One of each part by rising FLOPs: six rows a part.
    ranks = np.argsort(np.argsort(rows["flops"], kind="stable"))[few]
    assert sorted(ranks // 6) == list(range(50))
    monkeypatch.setattr("scaling.fitting.fit.MOST_SEARCHED", 50)
    searched = fit(rows, CHINCHILLA, FitConfig(starts=60))
    assert searched.value == pytest.approx(all_rows.value, rel=1e-9)
    np.testing.assert_allclose(searched.theta, all_rows.theta, rtol=1e-5)
    # The first pass saw a sixth of the rows, so its objectives are about a sixth.
    assert searched.search.ended.value.min() < 0.25 * all_rows.search.ended.value.min()


def test_resamples_in_parts_are_those_of_one(monkeypatch):
    truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
    rows = isoflop_design(truth, budgets=4, sizes=5, noise=0.01)
    one, seen = fit(rows, CHINCHILLA, starts=CHINCHILLA.raw(truth)[:, None]), []
    whole = bootstrap(one, 150)
    monkeypatch.setattr("scaling.fitting.bootstrap.MOST_COUNTS", 20)
    parts = bootstrap(one, 150, watch=seen.append)
    np.testing.assert_allclose(parts.value_B, whole.value_B, rtol=1e-9)
    assert seen == [64, 64, 22]


@pytest.mark.parametrize("setting", [{"tol": np.nan}, {"starts": -1}, {"keep": 0}, {"search_steps": 0}])
def test_settings_without_a_meaning_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        FitConfig(**setting)


def test_too_few_rows_are_counted_and_holding_is_named_as_on_the_command_line():
    with pytest.raises(ValueError, match=r"1 row cannot .*--config.hold.beta=VALUE, from Python scaling.restrict"):
        fit(make_rows({"params": [1e8], "tokens": [1e9], "loss": [3.0]}), CHINCHILLA)
