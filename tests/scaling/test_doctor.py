from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import f

from scaling import doctor
from scaling.coverage import EPOCH, isoflop_design
from scaling.fitting.bootstrap import bootstrap
from scaling.fitting.fit import FitConfig, fit
from scaling.isoflop import Curves, Minimum, PowerLaw, envelope, find_budgets
from scaling.isoflop import minimum as minimum_of
from scaling.laws import power_law, restrict
from scaling.published import CHINCHILLA, JOINT, SPARSITY
from scaling.rows import make_rows
from scaling.tables import read_csv


@pytest.mark.long
def test_the_traps_of_the_published_rows(shared_data):
    full = read_csv(shared_data("scaling/chinchilla_figure4.csv"))
    rows = full.without_highest_losses(5)
    fitted = fit(rows, CHINCHILLA)
    found = {
        finding.name: finding for finding in doctor.examine(fitted, 5.88e23, bootstrap(fitted, 100), all_rows=full)
    }
    assert found["convergence"].verdict == "fine"
    starts = found["unconverged starts"].numbers
    assert starts["starts"] == 4500 and starts["near_best"] < 1000
    # The mean over rows stops early and is far off.
    assert found["mean reduction"].verdict == "note"
    assert found["mean reduction"].numbers["ratio"] > 2
    assert abs(found["mean reduction"].numbers["a"] - found["mean reduction"].numbers["a_here"]) > 0.1
    assert found["ill conditioning"].numbers["condition"] > 100
    assert found["extrapolation"].numbers["factor"] == pytest.approx(5.88e23 / rows["flops"].max())
    assert found["extrapolation"].verdict == "warning"
    assert found["outliers"].verdict == "note"
    # The published file has 245 rows; the five dropped would move N* by more than half.
    assert found["dropped rows"].numbers["rows"] == 5 and found["dropped rows"].numbers["log_shift"] > 0.3
    # Stopping at default tolerances is a trap for the mean, not for the sum.
    assert found["loose tolerance"].numbers["ratio"] < found["mean reduction"].numbers["ratio"]
    assert abs(found["rounded parameters"].numbers["log_shift"]) < 0.1
    # Keeping all 245 is a warning: a handful of rows moves the optimum by more than its standard error.
    refitted = fit(full, CHINCHILLA, starts=fitted.theta[:, None])
    outliers = doctor.outliers(refitted, bootstrap(refitted, 100), 5.88e23)
    assert outliers.verdict == "warning"
    assert outliers.numbers["standard_errors"] > 1


EXPONENTS = {"alpha": 0.34, "beta": 0.28}


def rows_of(params, tokens, loss):
    return make_rows({"params": params, "tokens": tokens, "loss": loss})


def test_an_unconverged_fit_a_free_parameter_and_a_vanished_term_are_found():
    rng = np.random.default_rng(0)
    n, d = np.exp(rng.uniform(14, 22, 60)), np.exp(rng.uniform(18, 26, 60))
    rows = rows_of(n, d, 1.69 + 406.4 / n**0.34 + 410.7 / d**0.28)
    start = CHINCHILLA.starts()[:, 100:101]
    stopped = fit(rows, CHINCHILLA, FitConfig(search_steps=1, polish_steps=1), starts=start)
    assert not stopped.converged
    assert doctor.convergence(stopped).verdict == "warning"
    # Without experts in the rows nothing determines their exponents.
    truth = JOINT.raw({"S": 1.0, "A": 406.4, "B": 410.7, "E": 1.69, "sigma": 1.0, "chi": 0.2, "gamma": 0.5} | EXPONENTS)
    free = fit(rows, JOINT, FitConfig(search_steps=2, polish_steps=2), starts=truth[:, None])
    conditioning = doctor.conditioning(free)
    assert conditioning.verdict == "warning" and "chi" in conditioning.text


def minimum(budget, refused="", scatter=0.01, depth=0.1):
    return Minimum(budget, np.nan if refused else 1e6, 3.0, refused, 7, depth, scatter, (1.0, 0.0, 3.0))


def named(findings):
    return {finding.name: finding for finding in findings}


NO_DRAWS = np.zeros((2, 0))


def test_sound_minima_are_fine():
    minima = [minimum(b) for b in (1e18, 1e19, 1e20, 1e21)]
    found = doctor.examine_minima(PowerLaw(0.5, 0.0, 4, 0.01), minima, np.zeros((2, 10)), 2e21)
    assert {finding.verdict for finding in found} == {"fine"}


@pytest.mark.parametrize(
    "name, minima, law, draws, budget",
    [
        ("edge minima", [minimum(1e18), minimum(1e19, "larger sizes")], PowerLaw(0.5, 0, 4, 0), NO_DRAWS, 1e19),
        ("scatter", [minimum(1e18, scatter=0.08)], PowerLaw(0.5, 0, 4, 0), NO_DRAWS, 1e19),
        ("few budgets", [minimum(1e18)], PowerLaw(0.5, 0, 2, 0), NO_DRAWS, 1e19),
        ("lost resamples", [minimum(1e18)], PowerLaw(0.5, 0, 4, 0), np.array([[1, np.nan], [1, np.nan]]), 1e19),
        ("extrapolation", [minimum(1e18), minimum(1e22, "edge")], PowerLaw(0.5, 0, 4, 0), NO_DRAWS, 1e20),
    ],
)
def test_each_trap_is_warned_of(name, minima, law, draws, budget):
    found = named(doctor.examine_minima(law, minima, draws, budget))
    assert found[name].verdict == "warning"


def test_an_envelope_of_edge_sizes_is_warned_of():
    flops = np.geomspace(1e15, 1e18, 50)
    # Four sizes, of which the largest is the lowest from early on.
    losses = np.stack([3 + 0.1 * np.abs(np.log(flops / c)) for c in (1e15, 2e15, 4e15, 8e15)])
    curves = Curves(flops, np.array([1.0, 2.0, 3.0, 4.0]), losses)
    law, found = envelope(curves)
    findings = named(doctor.examine_envelope(found, curves, NO_DRAWS, 1e17, named=False))
    assert findings["edge minima"].verdict == "warning" and findings["edge minima"].numbers["share"] < 0.5
    assert findings["runs"].verdict == "note"
    assert findings["extrapolation"].verdict == "warning"


def fitted_sweep():
    rows = isoflop_design(EPOCH, budgets=4, sizes=7, noise=0.003)
    return fit(rows, CHINCHILLA, FitConfig(objective="normal"), starts=CHINCHILLA.raw(EPOCH)[:, None])


def test_optima_that_are_as_likely_are_told_with_their_distance():
    one = fitted_sweep()
    assert doctor.near_optima(one, 1e22).verdict == "fine"
    other = one.theta + np.array([np.log(2.0), 0, 0, 0, 0])
    # n log(1 + 0.05) is 1.4 for 28 rows, under chi-squared's 3.84; n log(1 + 0.2) is 5.1.
    both = {"basins_PK": np.stack([one.theta, other], 1)}
    near = doctor.near_optima(replace(one, **both, basin_values=one.value * np.array([1, 1.05])), 1e22)
    assert near.verdict == "warning" and "A " in near.text
    # N* goes as A^(1 / (alpha + beta)).
    exponent = 1 / (one.parameters["alpha"] + one.parameters["beta"])
    assert near.numbers["log_shift"] == pytest.approx(np.log(2) * exponent)
    assert doctor.near_optima(replace(one, **both, basin_values=one.value * np.array([1, 1.2])), 1e22).verdict == "fine"


def test_further_columns_are_held_where_one_says():
    """Rounding b_S moves N* by what the law itself says at that sparsity, and not at all of a dense model."""
    truth = {"a_S": 16.8, "c_S": 45.8, "B": 400.0, "c": 0.651, "b_S": 0.724, "b_N": 0.25, "b_D": 0.25}
    grid = isoflop_design(EPOCH, budgets=4, sizes=6)
    sizes = {name: np.tile(grid[name], 3) for name in ("params", "tokens")}
    columns = sizes | {"sparsity": np.repeat([0.0, 0.5, 0.75], len(grid))}
    theta = SPARSITY.raw(truth)
    blank = make_rows(columns | {"loss": np.ones(len(columns["sparsity"]))})
    rows = make_rows(columns | {"loss": np.exp(SPARSITY.predict(theta[:, None], SPARSITY.gather(blank))[:, 0])})
    found = fit(rows, SPARSITY, FitConfig(objective="normal"), starts=theta[:, None])
    # At 75% the coefficient of N is a_S .25^b_S + c_S, and N* goes as its power 1 / (b_N + b_D).
    coefficient = lambda b_S, density: 16.8 * density**b_S + 45.8  # noqa: E731
    for sparsity in (0.0, 0.5, 0.75):
        moved = doctor.rounding(found, 1e20, {"sparsity": sparsity}).numbers["log_shift"]
        wanted = 2 * np.log(coefficient(0.72, 1 - sparsity) / coefficient(0.724, 1 - sparsity))
        assert moved == pytest.approx(wanted, rel=0.02, abs=1e-9)
    assert doctor.rounding(found, 1e20) == doctor.rounding(found, 1e20, {"sparsity": 0.5})


def test_unconverged_resamples_are_counted():
    boot = bootstrap(fitted_sweep(), 20)
    assert doctor.lost_fits(boot).verdict == "fine"
    lost = doctor.lost_fits(boot._replace(converged_B=np.arange(20) > 2))
    assert lost.verdict == "warning" and lost.text.startswith("3 of 20 resamples did not converge")


def test_a_cubic_term_is_found_where_there_is_one():
    x, stream = np.linspace(-2, 2, 9), np.random.default_rng(0)
    for skew, verdict in ((0.0, "fine"), (0.01, "warning")):
        found = []
        for budget in (1e18, 1e19, 1e20):
            loss = 3 + 0.05 * x**2 + skew * x**3 + 0.003 * stream.standard_normal(9)
            found.append(minimum_of(np.exp(x), loss, budget))
        finding = doctor.cubic_term(found)
        assert finding.verdict == verdict
        # The F test of one more column a budget, with the squares added over budgets.
        squares = [sum(9 * getattr(m, name) ** 2 for m in found) for name in ("scatter", "cubic_scatter")]
        assert finding.numbers["p"] == pytest.approx(f.sf((squares[0] - squares[1]) / 3 / (squares[1] / 15), 3, 15))


def test_approaches_disagree_by_paired_draws_or_by_what_the_law_would_give():
    found = {"approach 2": (0.43, 0.36, 0.46), "approach 3": (0.345, 0.29, 0.41)}
    pair = ("approach 2", "approach 3")
    assert doctor.disagreement(found).verdict == "fine"
    assert doctor.disagreement(found, {pair: [0.01, 0.14]}).verdict == "warning"
    assert doctor.disagreement(found, {pair: [-0.01, 0.14]}).verdict == "fine"
    assert doctor.disagreement(found, None, {"approach 2": (0.43, 0.33, 0.37)}).verdict == "warning"
    one = fitted_sweep()
    exponents = doctor.minima_under_law(one, find_budgets(one.rows)[0], draws=20)
    a = one.parameters["beta"] / (one.parameters["alpha"] + one.parameters["beta"])
    assert np.percentile(exponents, 5) - 0.05 < a < np.percentile(exponents, 95) + 0.05


def test_growth_elsewhere_is_that_of_optima_not_of_two_names():
    # A / N^(alpha + 0.2): beta / (alpha + beta) is not the slope of log N*.
    size = (("alpha", "log_params", -1.0), ("more", "log_params", -1.0))
    terms = (("A", size), ("B", (("beta", "log_tokens", -1.0),)), ("E", ()))
    grid = {"A": (4.0, 6.0), "B": (5.0, 7.0), "E": (0.0, 0.5), "alpha": (0.1, 0.2), "beta": (0.3,), "more": (0.2,)}
    law = restrict(power_law("two", terms, grid), more=0.2)
    one = fit(isoflop_design(EPOCH, budgets=4, sizes=7, noise=0.001), law, FitConfig(starts=40))
    p = one.parameters
    found = {finding.name: finding for finding in doctor.examine(one, 1e22, lowest=1e20)}
    told = [found[name].numbers for name in ("mean reduction", "loose tolerance") if "a" in found[name].numbers]
    assert told
    for numbers in told:
        assert numbers["a_here"] == pytest.approx(p["beta"] / (p["alpha"] + 0.2 + p["beta"]), rel=1e-3)


def test_nothing_is_compared_of_an_undetermined_fit():
    params = np.geomspace(1e7, 1e10, 12)
    rows = rows_of(params, 20 * params, 2 + 300 / params**0.3)
    found = {finding.name: finding for finding in doctor.examine(fit(rows, CHINCHILLA, FitConfig(starts=40)), 1e22)}
    assert "N and D are proportional" in found["undetermined"].text and found["undetermined"].verdict == "warning"
    assert not {"mean reduction", "loose tolerance", "rounded parameters", "near-equal optima", "outliers"} & set(found)
    assert doctor.disagreement({"approach 2": (0.5, 0.4, 0.6)}).verdict == "note"
