import numpy as np
import pytest
from scipy.stats import f, norm

from scaling import misfit
from scaling.coverage import EPOCH, around, isoflop_design
from scaling.fitting.discrepancy import estimate_discrepancy
from scaling.fitting.fit import FitConfig, fit
from scaling.laws import restrict, tie
from scaling.optimum import chinchilla_optimum
from scaling.published import CHINCHILLA, COMPUTE, CURVE
from scaling.rows import make_rows

FEW = FitConfig(starts=60)
START = around(CHINCHILLA.raw(EPOCH)[:, None])


def sweep(bend=0.0, noise=0.003, seed=0, budgets=6, sizes=8):
    """Runs of Chinchilla's law, times 1 + bend (log10(C / 1e20))^2 with a tilt in D / N."""
    rows = isoflop_design(EPOCH, budgets=budgets, sizes=sizes, noise=noise, seed=seed)
    place = np.log10(rows["flops"] / 1e20) + 0.3 * np.log10(rows["tokens"] / rows["params"] / 20)
    return make_rows({**rows.columns, "loss": rows["loss"] * (1 + bend * place**2)}, "runs.csv")


def fitted(rows, objective="normal"):
    return fit(rows, CHINCHILLA, FitConfig(objective=objective), starts=START)


@pytest.mark.parametrize("bend", [0.0, 0.001, 0.01])
def test_the_f_test_is_that_of_linear_regression(bend):
    rows = sweep(bend)
    one = fitted(rows)
    found = misfit.lack_of_fit(one)
    x = np.stack([np.log10(rows["flops"]), np.log10(rows["tokens"] / rows["params"])])
    x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    extra = np.stack([x[0], x[1], x[0] ** 2, x[1] * x[0], x[1] ** 2], 1)
    slopes = CHINCHILLA.slopes(one.theta, rows)
    squares = []
    for design in (slopes, np.concatenate([slopes, extra], 1)):
        unit = design / np.linalg.norm(design, axis=0)
        rest = one.residuals - unit @ np.linalg.lstsq(unit, one.residuals, rcond=1e-10)[0]
        squares.append(np.sum(rest**2))
    ratio = (squares[0] - squares[1]) / 5 / (squares[1] / (48 - 10))
    assert found.terms == 5
    # pytest.approx is right to 1e-12 whatever `rel`: so small is p for the largest bend.
    assert found.p == pytest.approx(f.sf(ratio, 5, 38), rel=1e-2, abs=0)
    assert found.rejected == (bend == 0.01) and misfit.examine_law(one).verdict == (
        "warning" if bend == 0.01 else "fine"
    )


def test_a_true_law_is_rejected_as_often_as_the_level_says():
    p = [misfit.lack_of_fit(fitted(sweep(seed=seed, budgets=4, sizes=7))).p for seed in range(24)]
    # Uniform under the law: of 24, 12 below a half with standard deviation 2.4.
    assert 3 < np.sum(np.array(p) < 0.5) < 21 and np.sum(np.array(p) < 0.01) < 3


def test_kriging_is_the_conditional_of_a_gaussian():
    one = fitted(sweep(0.004, budgets=4, sizes=5))
    found = one.discrepancy()
    new = make_rows({"params": [1e9, 3e9], "tokens": [3e10, 1e11], "loss": [1.0, 1.0]})
    m = int(np.argmax(found.share))
    length, variance = found.settings[m]
    assert found.share[0] < 0.01 and variance > 0
    # Flat prior on parameters as a limit: joint covariance of observations and new values, conditioned by hand.
    both = np.concatenate([misfit.coordinates(CHINCHILLA, one.rows), misfit.coordinates(CHINCHILLA, new)], 1)
    apart = ((both[:, :, None] - both[:, None, :]) ** 2).sum(0)
    slopes = np.concatenate([CHINCHILLA.slopes(one.theta, rows) for rows in (one.rows, new)])
    slopes = slopes / np.linalg.norm(slopes[:20], axis=0)
    prior = variance * np.exp(-0.5 * apart / length**2) + 1e6 * slopes @ slopes.T
    seen = prior[:20, :20] + np.eye(20)
    weights = np.linalg.solve(seen, prior[:20, 20:]).T
    mean = CHINCHILLA.predict(one.theta[:, None], CHINCHILLA.gather(new))[:, 0] - weights @ one.residuals
    covariance = found.noise[m] ** 2 * (prior[20:, 20:] - weights @ prior[:20, 20:])
    got_mean, got = found._law_and_discrepancy(new, m, joint=True)
    np.testing.assert_allclose(got_mean, mean, rtol=1e-3)
    np.testing.assert_allclose(got, covariance, rtol=0.02, atol=1e-9)
    np.testing.assert_allclose(found._law_and_discrepancy(new, m)[1], np.diag(got), rtol=1e-6)


def test_intervals_hold_new_runs_whether_the_law_is_true_or_not():
    far = isoflop_design(EPOCH, budgets=2, sizes=4, lowest=1e22, highest=3e22)
    shares = {}
    for bend in (0.0, 0.01):
        held = []
        for seed in range(5):
            found = fitted(sweep(bend, seed=seed, budgets=4, sizes=7)).discrepancy()
            again = sweep(bend, seed=100 + seed, budgets=4, sizes=7)
            low, high = found.predict(again)
            held.append(np.mean((low <= again["loss"]) & (again["loss"] <= high)))
        shares[bend] = np.mean(held)
        width = np.log(np.divide(*found.predict(far)[::-1]))
        assert (width > np.median(np.log(high / low))).all()
    assert 0.9 < shares[0.0] < 0.99 and 0.9 < shares[0.01] < 1


def test_optima_of_a_bent_law_are_found():
    rows = sweep(0.01, noise=0.001)
    one = fitted(rows)
    draws = one.discrepancy().optima([1e20]).params[0]
    low, high = np.percentile(draws, [0.5, 99.5])
    size = np.geomspace(1e7, 1e11, 4001)
    tokens = 1e20 / 6 / size
    place = 0.3 * np.log10(tokens / size / 20)
    loss = EPOCH["E"] + EPOCH["A"] / size ** EPOCH["alpha"] + EPOCH["B"] / tokens ** EPOCH["beta"]
    assert low < size[np.argmin(loss * (1 + 0.01 * place**2))] < high and high < 3 * low
    exact = fitted(sweep(noise=0.001)).discrepancy()
    best = float(chinchilla_optimum(EPOCH, [1e20]).params[0, 0])
    low, high = np.percentile(exact.optima([1e20]).params[0], [2.5, 97.5])
    assert low < best < high


def test_a_backtest_predicts_the_larger_runs():
    found = misfit.backtest(sweep(), CHINCHILLA, FEW, share=0.1, resampled=20)
    assert found.rows == 32 and len(found.held_out) == 16 and found.plain.shape == (2, 16)
    assert abs(found.bias) < 0.003 and found.inside().mean() > 0.8
    assert misfit.examine_backtests([found]).verdict == "fine"
    # The larger runs are all 5% worse than the law says.
    rows = sweep()
    worse = make_rows({**rows.columns, "loss": rows["loss"] * np.where(rows["flops"] > 3e20, 1.05, 1.0)})
    broken = misfit.backtest(worse, CHINCHILLA, FEW, share=0.1)
    finding = misfit.examine_backtests([broken])
    assert finding.verdict == "warning" and finding.numbers["bias_0.1"] == pytest.approx(np.log(1.05), abs=0.01)
    with pytest.raises(ValueError, match="runs.csv: 0 of 48 runs are below"):
        misfit.backtest(rows, CHINCHILLA, FEW, share=1e-4)
    assert misfit.examine_backtests([]).verdict == "note"


def test_errors_of_rows_left_out_are_those_of_refits():
    rows = sweep(budgets=3, sizes=4)
    squares = FitConfig(objective="normal")
    law = tie(CHINCHILLA, beta="alpha")
    candidate = misfit._candidate(fit(rows, law, squares, starts=law.starts()[:, ::20]))
    for i in (0, 5, 11):
        rest = rows.take(np.arange(12) != i)
        refit = fit(rest, law, squares, starts=candidate.fitted.theta[:, None])
        predicted = law.predict(refit.theta[:, None], law.gather(rows))[i, 0]
        h = np.sum(misfit.basis(law.slopes(candidate.fitted.theta, rows))[i] ** 2)
        assert candidate.fitted.residuals[i] / (1 - h) == pytest.approx(predicted - np.log(rows["loss"][i]), rel=0.1)


def test_the_smaller_of_laws_that_predict_alike_is_chosen():
    small = tie(CHINCHILLA, beta="alpha")
    same = isoflop_design({**EPOCH, "beta": EPOCH["alpha"]}, budgets=4, sizes=7, noise=0.003)
    found = misfit.compare_laws(same, [CHINCHILLA, small, CURVE], FEW)
    assert found[0].law is small and found[-1].law is CURVE
    assert misfit.examine_laws(found, CHINCHILLA).verdict == "note"
    assert misfit.examine_laws(found, small).verdict == "fine"
    other = isoflop_design({**EPOCH, "beta": 0.6, "B": 3e5}, budgets=4, sizes=7, noise=0.003)
    found = misfit.compare_laws(other, [small, CHINCHILLA], FEW)
    assert found[0].law is CHINCHILLA and misfit.examine_laws(found, small).verdict == "warning"


def test_runs_at_too_few_places_are_no_backtest():
    rows = isoflop_design(EPOCH, budgets=4, sizes=7, noise=0.002)  # two FLOP counts below a tenth
    with pytest.raises(ValueError, match="14 runs below .* have 2 different log_flops.* 3 parameters of compute"):
        misfit.backtest(rows, COMPUTE, FEW, share=0.1)
    assert misfit.backtest(rows, CURVE, FEW, share=0.1).rows == 14
    finding = misfit.examine_backtests([], refused=["the 14 runs have 2 different log_flops"])
    assert finding.verdict == "note" and "smaller ones: the 14 runs have 2 different log_flops" in finding.text


def test_the_density_by_which_a_law_is_chosen_is_that_of_refits_without_the_row():
    # With E at 0 the curve A / D^alpha is a straight line in logarithms: regressions without each row, by numpy.
    rows, line = sweep(budgets=3, sizes=4), restrict(CURVE, E=0.0)
    steps = restrict(CURVE, E=0.0, alpha=0.0)  # a constant
    found = misfit.compare_laws(rows, [line, steps], FEW)
    x, y = np.log(rows["tokens"]), np.log(rows["loss"])
    densities = {}
    for law, degree in ((line, 1), (steps, 0)):
        densities[law.name] = np.zeros(12)
        for i in range(12):
            rest = np.arange(12) != i
            design, there = (np.vander(values, degree + 1) for values in (x[rest], x[i : i + 1]))
            fit_, square, *_ = np.linalg.lstsq(design, y[rest], rcond=None)
            spread = (1 + (there @ np.linalg.inv(design.T @ design) @ there.T)[0, 0]) * square[0] / (11 - degree - 1)
            densities[law.name][i] = norm.logpdf(y[i], (there @ fit_)[0], np.sqrt(spread))
    for one in found:
        np.testing.assert_allclose(one.held_out, densities[one.law.name], atol=2e-5)
    gained = densities[line.name] - densities[steps.name]
    told = f"{gained.sum():+.1f} ± {np.sqrt(12) * gained.std(ddof=1):.1f}"
    for law in (line, steps):
        assert told in misfit.examine_laws(found, law).text


def test_many_runs_do_not_sharpen_the_noise_that_a_backtest_rests_on():
    # 92.6% of a thousand: 3.5 standard errors of a share, but the noise is known to 3% from 500 rows.
    rows, log_loss = isoflop_design(EPOCH, budgets=2, sizes=500), np.zeros(1000)
    log_loss[:74] = 1.0
    interval = np.tile([[np.exp(-0.5)], [np.exp(0.5)]], 1000)
    found = misfit.Backtest(0.1, 18000, make_rows({**rows.columns, "loss": np.exp(log_loss)}), interval, None, 0.0)
    assert misfit.examine_backtests([found]).verdict == "fine"
    log_loss[:100] = 1.0
    found = found._replace(held_out=make_rows({**rows.columns, "loss": np.exp(log_loss)}))
    assert misfit.examine_backtests([found]).verdict == "warning"


def test_runs_about_one_budget_are_no_backtest():
    rows = isoflop_design(EPOCH, budgets=2, sizes=8, lowest=1e18, highest=1e20, noise=0.001)
    jitter = np.exp(0.05 * np.random.default_rng(0).standard_normal(16))
    rows = make_rows({"params": rows["params"], "tokens": rows["tokens"] * jitter, "loss": rows["loss"]}, "runs.csv")
    with pytest.raises(ValueError, match="the 8 runs below .* do not determine chinchilla: all runs have one budget"):
        misfit.backtest(rows, CHINCHILLA, FEW, share=0.1)


def test_the_interval_score_is_that_of_gneiting_and_raftery():
    low, high = np.array([1.0, 1.0, 1.0]), np.array([2.0, 2.0, 2.0])
    loss = np.array([0.5, 1.5, 3.0])  # below, inside, above
    # Width, and 2 / alpha times the distance outside; logarithms.
    outside = np.array([np.log(1 / 0.5), 0.0, np.log(3 / 2)])
    found = misfit.interval_score(np.stack([low, high]), loss, level=0.9)
    np.testing.assert_allclose(found, np.log(2) + 2 / 0.1 * outside)


def test_bic_is_that_of_normal_residuals():
    """The law's parameters and the residuals' variance, at the likeliest variance."""
    (one,) = misfit.compare_laws(sweep(0.0), [CHINCHILLA])
    residuals = one.fitted.residuals
    log_likelihood = norm.logpdf(residuals, scale=np.sqrt(np.mean(residuals**2))).sum()
    assert one.log_likelihood == pytest.approx(log_likelihood)
    assert one.bic == pytest.approx(6 * np.log(len(residuals)) - 2 * log_likelihood)


def test_without_a_row_to_spare_the_discrepancy_is_the_prior():
    """Five rows and five parameters: a law that holds exactly has a tenth, every other setting an equal share."""
    rows = isoflop_design(EPOCH, budgets=5, sizes=7).take(np.array([0, 8, 17, 25, 34]))
    found = estimate_discrepancy(CHINCHILLA, CHINCHILLA.raw(EPOCH), rows, np.zeros(5))
    assert found.share[0] == pytest.approx(0.1)
    np.testing.assert_allclose(found.share[1:], 0.9 / (len(found.share) - 1))
