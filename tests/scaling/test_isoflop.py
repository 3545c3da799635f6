import numpy as np
import pytest

from scaling import isoflop
from scaling.coverage import EPOCH, isoflop_design
from scaling.fitting.fit import FitConfig, fit
from scaling.isoflop import approach_2, find_budgets, group_budgets, minima
from scaling.optimum import chinchilla_optimum
from scaling.published import CHINCHILLA
from scaling.rows import make_rows

T = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
BUDGETS = np.array([1e17, 1e18, 1e19, 1e20, 1e21])


def surface(params, tokens):
    return T["E"] + T["A"] / params ** T["alpha"] + T["B"] / tokens ** T["beta"]


def sweep(reach=2.0, sizes=9, noise=0.0, seed=0):
    best = chinchilla_optimum({k: np.array(v) for k, v in T.items()}, BUDGETS).params[:, 0]
    params = (best[:, None] * reach ** np.linspace(-1, 1, sizes)).ravel()
    flops = np.repeat(BUDGETS, sizes)
    loss = surface(params, flops / (6 * params))
    return make_rows(
        {
            "params": params,
            "flops": flops,
            "loss": loss + noise * np.random.default_rng(seed).standard_normal(len(loss)),
        }
    )


@pytest.mark.parametrize("how", ["parabola", "akima"])
def test_the_true_exponent_is_found_near_the_optimum(how):
    rows = sweep(reach=1.5)
    law, found = isoflop.approach_2(rows, isoflop.group_budgets(rows["flops"]), how=how)
    assert law.exponent == pytest.approx(T["beta"] / (T["alpha"] + T["beta"]), abs=2e-3)
    assert law.points == 5 and not any(m.refused for m in found)
    exact = chinchilla_optimum({k: np.array(v) for k, v in T.items()}, [1e19])
    assert law(1e19) == pytest.approx(float(exact.params[0, 0]), rel=0.02)


def test_edges_scatter_and_few_sizes_are_refused():
    x = np.exp(np.linspace(0, 2, 7))
    log = np.log(x)
    assert "larger sizes" in isoflop.minimum(x, 3 - log + 0.1 * log**2, 1.0).refused
    assert "smaller sizes" in isoflop.minimum(x, 3 + log + 0.1 * log**2, 1.0).refused
    assert "downwards" in isoflop.minimum(x, 3 - (log - 1) ** 2, 1.0).refused
    noisy = 3 + 0.02 * (log - 1) ** 2 + 0.03 * np.array([-1, 2, 0, -2, 0, 2, -1])
    assert "scatter" in isoflop.minimum(x, noisy, 1.0).refused
    assert "3 sizes" in isoflop.minimum(x[:3], x[:3], 1.0).refused
    assert "larger sizes" in isoflop.minimum(x, -log, 1.0, how="akima").refused
    rows = make_rows({"params": x[:3], "flops": [1e3] * 3, "loss": [3.0, 2.0, 3.0]})
    with pytest.raises(ValueError, match="0 of 1 budgets have a minimum.*3 sizes"):
        isoflop.approach_2(rows, np.zeros(3, int))


def test_akima_averages_repeated_sizes_by_weight():
    x = np.exp(np.array([0.0, 1, 2, 2, 3, 4]))
    y = np.array([4.0, 2.0, 0.0, 2.0, 2.0, 4.0])
    even = isoflop.minimum(x, y, 1.0, how="akima")
    assert even.loss == pytest.approx(1.0) and even.params == pytest.approx(np.exp(2))
    assert isoflop.minimum(x, y, 1.0, weights=np.array([1.0, 1, 3, 1, 1, 1]), how="akima").loss == pytest.approx(0.5)


def test_budgets_are_grouped_by_gaps_or_by_name():
    flops = np.array([1.02e18, 9.9e18, 1e18, 1.05e19, 3e20])
    np.testing.assert_array_equal(isoflop.group_budgets(flops), [0, 1, 0, 1, 2])
    np.testing.assert_array_equal(isoflop.nearest_budgets(flops, [1e18, 1e19]), [0, 1, 0, 1, -1])


def test_budgets_are_found_and_rows_outside_have_none():
    grid = sweep()
    flops = np.concatenate([grid["flops"], np.geomspace(1e14, 1e16, 30), [3e22, 3e22, 3e22]])
    params = np.concatenate([grid["params"], np.full(30, 1e7), [1e9] * 3])
    rows = make_rows({"params": params, "flops": flops, "loss": np.ones(len(flops))})
    groups, budgets = isoflop.find_budgets(rows)
    np.testing.assert_allclose(budgets, BUDGETS)
    # Neither a stretch of FLOPs without gaps nor runs of one size are a budget.
    assert (groups[45:] == -1).all() and (groups[:45] == np.repeat(np.arange(5), 9)).all()
    # A column says it outright: FLOPs of a decayed branch differ from the budget it was planned for.
    named = make_rows(rows.columns | {"budget": np.concatenate([np.repeat([1, 2, 2, 4, 5], 9), np.full(33, 9)])})
    assert isoflop.find_budgets(named)[0].max() == 2


@pytest.mark.parametrize("options", [{"nearest": 5}, {"within": 3.0}])
def test_sizes_near_the_minimum_leave_out_what_is_no_parabola(options):
    # log N is skewed: loss rises more steeply towards small sizes.
    x = np.linspace(-4, 4, 17)
    loss = 3 + 0.02 * x**2 - 0.004 * x**3
    everywhere = isoflop.minimum(np.exp(x), loss, 1.0)
    near = isoflop.minimum(np.exp(x), loss, 1.0, **options)
    assert abs(np.log(near.params)) < 0.15 * abs(np.log(everywhere.params)) and near.runs < 6
    assert everywhere.cubic_scatter < 1e-9 < everywhere.scatter
    weighed = isoflop.minimum(np.exp(x), loss, 1.0, weights=np.ones(17), **options)
    assert weighed.params == near.params and np.isnan(weighed.cubic_scatter)


def test_of_two_ways_to_leave_sizes_out_the_narrower_holds():
    x = np.linspace(-4, 4, 17)
    loss = 3 + 0.02 * x**2 - 0.004 * x**3
    by = lambda **options: isoflop.minimum(np.exp(x), loss, 1.0, **options)  # noqa: E731
    assert by(nearest=13, within=3.0) == by(within=3.0) != by(nearest=13)
    assert by(nearest=5, within=30.0) == by(nearest=5) != by(within=30.0)


def test_the_envelope_of_training_curves():
    params = np.geomspace(1e6, 1e10, 33)
    curves = [(n, np.geomspace(n / 5, n * 2000, 60)) for n in params]
    columns = {
        "params": np.concatenate([np.full(60, n) for n, _ in curves]),
        "tokens": np.concatenate([d for _, d in curves]),
    }
    rows = make_rows({**columns, "loss": surface(columns["params"], columns["tokens"])})
    law, envelope = isoflop.approach_1(rows, np.repeat(np.arange(33), 60))
    assert law.exponent == pytest.approx(T["beta"] / (T["alpha"] + T["beta"]), abs=0.005)
    assert (np.diff(envelope[:, 2]) < 0).all()
    with pytest.raises(ValueError, match="inner sizes"):
        isoflop.approach_1(rows.take(np.arange(120)), np.repeat([0, 1], 60))


def test_a_staircase_has_the_slope_of_the_line_through_its_middles():
    # Each of five sizes is the lowest in a window of log FLOPs about the one it is best for, N* ~ C^0.6.
    sizes = np.exp(np.linspace(0, 6, 7))
    flops = np.exp(np.linspace(-2, 12, 1401))
    losses = (np.log(sizes)[:, None] - 0.6 * np.log(flops)[None, :]) ** 2
    law, _ = isoflop.envelope(isoflop.Curves(flops, sizes, losses))
    assert law.exponent == pytest.approx(0.6, abs=2e-3) and law(1.0) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("shared", [True, False])
def test_draws_of_approach_1_scatter_as_its_estimates_do_and_are_centered(shared):
    size = np.repeat(np.geomspace(3e7, 1e10, 11), 12)
    tokens, run = size * np.tile(np.geomspace(1, 300, 12), 11), np.repeat(np.arange(11), 12)
    design = make_rows({"params": size, "tokens": tokens, "loss": np.ones(132)})
    theta, stream = CHINCHILLA.raw(EPOCH)[:, None], np.random.default_rng(0)
    mean = CHINCHILLA.predict(theta, CHINCHILLA.gather(design))[:, 0]
    estimates, spreads, offsets = [], [], []
    for seed in range(12):
        # Of a run, or of every row.
        noise = 0.003 * (stream.standard_normal(11)[run] if shared else stream.standard_normal(132))
        rows = make_rows({"params": size, "tokens": tokens, "loss": np.exp(mean + noise)})
        fitted = fit(rows, CHINCHILLA, FitConfig(objective="normal"), starts=theta)
        estimates.append(isoflop.approach_1(rows, run)[0].exponent)
        draws = isoflop.bootstrap_envelope(fitted, run, 40, seed=seed)[0]
        spreads.append(np.std(draws))
        offsets.append(np.median(draws) - estimates[-1])
    # A standard deviation of 12 is right to a fifth.
    assert np.mean(spreads) == pytest.approx(np.std(estimates, ddof=1), rel=0.5)
    assert abs(np.mean(estimates) + np.mean(offsets) - EPOCH["beta"] / (EPOCH["alpha"] + EPOCH["beta"])) < 0.01
    lost = isoflop.bootstrap_envelope(fitted, np.zeros(132), 3)
    assert np.isnan(lost).all()


def test_resampled_minima():
    rows = sweep(reach=3.0, noise=0.002)
    counts = np.random.default_rng(0).multinomial(45, np.ones(45) / 45, size=50).T.astype(float)
    draws = isoflop.bootstrap_exponent(rows, isoflop.group_budgets(rows["flops"]), counts)
    assert 0 < np.nanstd(draws[0]) < 0.05
    assert np.nanmean(draws[0]) == pytest.approx(0.4516, abs=0.03)


@pytest.mark.parametrize("how", ["parabola", "akima"])
@pytest.mark.parametrize("loss", [2.0, 2.5, 2.7, 3.1, 4.1, 2.345678])
def test_minima_of_rounding_are_refused(loss, how):
    rows = isoflop_design(EPOCH, budgets=4, sizes=7)
    flat = make_rows(rows.columns | {"loss": np.full(len(rows), loss)})
    groups = group_budgets(rows["flops"])
    assert {m.refused for m in minima(flat, groups, how=how)} == {f"all losses are {loss:.4g}"}
    with pytest.raises(ValueError, match="0 of 4 budgets have a minimum.*all losses are"):
        approach_2(flat, groups, how=how)
    # A shallow curve that is no rounding keeps its minimum.
    x = np.log(rows["params"] / 1e9)
    shallow = make_rows(rows.columns | {"loss": loss + 1e-7 * (x - 0.5 * np.log(rows["flops"] / 1e20)) ** 2})
    assert any(not m.refused for m in minima(shallow, groups, how=how))


@pytest.mark.parametrize(
    ("cause", "columns"),
    [
        ("all runs have N = 1e.08 params", {"params": np.full(12, 1e8), "tokens": np.geomspace(1e9, 1e11, 12)}),
        ("D = 20 N", {"params": np.geomspace(1e7, 1e9, 12), "tokens": 20 * np.geomspace(1e7, 1e9, 12)}),
        ("share a number of FLOPs", {"params": np.geomspace(1e7, 1e9, 12), "tokens": np.tile([1e9, 4e10, 1e12], 4)}),
    ],
)
def test_rows_without_budgets_are_told_why(cause, columns):
    rows = make_rows(columns | {"loss": np.linspace(3, 2, 12)})
    with pytest.raises(ValueError, match=f"0 of 0 budgets have a minimum.*{cause}"):
        approach_2(rows, find_budgets(rows)[0])
