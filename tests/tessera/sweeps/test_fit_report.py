import json
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import expectile

from scaling.published import find_law
from scaling.rows import RowError, make_rows
from tessera.cli import fit as fit_command
from tessera.cli import main as cli
from tessera.infra.config import ConfigError, build
from tessera.infra.config_files import load_config
from tessera.sweeps.fit_page import fit_page, number_sections, parameter_table, summary
from tessera.sweeps.fit_report import ScalingConfig, fit_runs, load_runs, misfit_sections, spread_of

T = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}


def sweep():
    budgets = np.repeat([1e17, 1e18, 1e19, 1e20], 8)
    params = 0.1 * budgets**0.4516 * np.tile(np.geomspace(1, 30, 8), 4)
    tokens = budgets / (6 * params)
    loss = T["E"] + T["A"] / params ** T["alpha"] + T["B"] / tokens ** T["beta"]
    noise = np.exp(0.002 * np.random.default_rng(0).standard_normal(32))
    return make_rows({"params": params, "tokens": tokens, "loss": loss * noise}, "sweep.csv")


@pytest.fixture(autouse=True)
def few_starts(monkeypatch):
    """The compared approaches find the optimum of these rows from few starts as well."""
    monkeypatch.setattr("tessera.sweeps.fit_report.COMPARED_STARTS", 60)


def write_fit(workdir, rows, config):
    found = fit_runs(workdir, rows, config)
    return found.result, fit_page(workdir, found, rows.source)


@pytest.mark.parametrize("approach", [2, pytest.param(3, marks=pytest.mark.long)])
def test_fit_json_and_report(tmp_path, approach):
    settings = {
        "runs": "sweep.csv",
        "approach": approach,
        "resamples": 40,
        "budgets": (1e20, 1e22),
        "fit": {"starts": 60, "keep": 4},
        "laws": ("curve",),  # by its closed form, as Chinchilla's: nothing is compiled
    }
    result, page = write_fit(tmp_path, sweep(), build(ScalingConfig, settings))
    saved = json.loads((tmp_path / "fit.json").read_text())
    assert saved["exponents"]["a"]["value"] == pytest.approx(result["exponents"]["a"]["value"])
    assert saved["exponents"]["a"]["value"] == pytest.approx(T["beta"] / (T["alpha"] + T["beta"]), abs=0.08)
    for row in saved["budgets"]:
        low, high = row["params_interval"]
        assert low < row["params"] < high
        assert 6 * row["params"] * row["tokens"] == pytest.approx(row["flops"])
    text = page.read_text()
    assert "IsoFLOP curves" in text and not re.search(r'(src|href)="http', text)
    if approach == 3:
        assert set(saved["parameters"]) == set(T) and saved["converged"]
        assert {finding["name"] for finding in saved["doctor"]} >= {"outliers", "extrapolation", "mean reduction"}
        assert (tmp_path / "figures" / "residuals.png").stat().st_size > 1000


def write(tmp_path, rows, **settings):
    shared = {"runs": "x", "resamples": 30, "laws": (), "budgets": (1e20,), "fit": {"starts": 60, "keep": 4}}
    return write_fit(tmp_path, rows, build(ScalingConfig, shared | settings))


@pytest.mark.parametrize("labelled", [True, False])
def test_the_envelope_takes_runs_by_label_or_by_size(tmp_path, labelled):
    params = np.repeat(np.geomspace(1e6, 1e9, 13), 20)
    tokens = params * np.tile(np.geomspace(0.5, 500, 20), 13)
    loss = true_loss(params, tokens) * np.exp(0.002 * np.random.default_rng(0).standard_normal(260))
    columns = {"params": params, "tokens": tokens, "loss": loss}
    rows = make_rows(columns | ({"run": np.repeat(np.arange(13), 20)} if labelled else {}), "curves.csv")
    result, page = write(tmp_path, rows, approach=1)
    a = result["exponents"]["a"]
    assert a["value"] == pytest.approx(T["beta"] / (T["alpha"] + T["beta"]), abs=0.06)
    assert a["interval"][0] < a["value"] < a["interval"][1]
    assert {f["name"]: f["verdict"] for f in result["doctor"]}["runs"] == ("fine" if labelled else "note")
    assert "Envelope" in page.read_text()


def test_a_law_without_a_best_size_is_reported(tmp_path):
    result, page = write(tmp_path, sweep(), law="curve", misfit=False)
    assert result["off_optimum"] == [] and np.isnan(result["budgets"][0]["params"])
    assert "no best size" in page.read_text()
    assert json.loads((tmp_path / "fit.json").read_text())["budgets"][0]["params"] is None


def test_serving_many_tokens_asks_for_a_smaller_model(tmp_path):
    result = fit_runs(
        tmp_path, sweep(), neutral("x", budgets=(1e20,), resamples=0, inference_tokens=(0.0, 1e12))
    ).result
    none, much = result["inference"]
    assert none["params"] == pytest.approx(result["budgets"][0]["params"], rel=1e-3)
    assert much["params"] < none["params"] and much["saved"] > 0


def test_a_missing_cluster_column_is_named(tmp_path):
    with pytest.raises(RowError, match="column 'model': the column is missing, which config.cluster names"):
        write(tmp_path, sweep(), cluster="model")


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="runs is empty"):
        build(ScalingConfig, {"runs": "", "budgets": (1.0,)})
    with pytest.raises(ConfigError, match="budgets .*positive finite numbers are wanted"):
        build(ScalingConfig, {"runs": "x", "budgets": (0.0,)})
    with pytest.raises(ConfigError, match="budgets and beyond are empty"):
        build(ScalingConfig, {"runs": "x", "beyond": ()})
    with pytest.raises(ConfigError, match="a parabola needs at least 4 sizes"):
        build(ScalingConfig, {"runs": "x", "nearest": 3})


def neutral(path, **settings):
    """The settings of the config as it is, for a table, with few resamples."""
    given, _ = load_config("fit", ("fit_scaling",))
    quick = {"resamples": 30, "laws": (), "misfit": False, "fit": {"starts": 60, "keep": 4}}
    return build(ScalingConfig, given | {"runs": str(path)} | quick | settings)


def findings(result):
    return {finding["name"]: finding for finding in result["doctor"]}


@pytest.mark.parametrize("approach", [1, 2, 3])
def test_the_neutral_config_plans_beyond_the_largest_run_and_drops_nothing(tmp_path, approach):
    rows = sweep()
    found = fit_runs(tmp_path, rows, neutral("sweep.csv", approach=approach)).result
    assert [row["flops"] for row in found["budgets"]] == pytest.approx([1e20, 1e21, 1e22])
    assert findings(found)["dropped rows"]["verdict"] == "fine"
    assert [row["approach"] for row in found["approaches"]] == [
        "1, envelope",
        "2, parabola",
        "2, akima",
        "3, chinchilla",
    ]
    # All say what was dropped when something is.
    fewer = fit_runs(tmp_path, rows, neutral("sweep.csv", approach=approach, resamples=0, drop_highest=3)).result
    assert "3 of 32 rows" in findings(fewer)["dropped rows"]["text"] and fewer["rows"] == 29


def test_rows_outside_every_budget_are_told_and_budgets_asked_for(tmp_path):
    rows = sweep()
    twice = {name: np.concatenate([values, values[:5] * 1e-3]) for name, values in rows.columns.items()}
    outside = make_rows(twice | {"loss": np.concatenate([rows["loss"], rows["loss"][:5] * 2])}, "sweep.csv")
    config = neutral("sweep.csv", approach=2, isoflops=(1e17, 1e18, 1e19, 1e20), resamples=0)
    finding = findings(fit_runs(tmp_path, outside, config).result)["rows outside budgets"]
    assert finding["verdict"] == "warning" and finding["numbers"]["rows"] == 5
    scattered = make_rows(rows.columns | {"flops": rows["flops"] * np.geomspace(1, 9, 32)}, "sweep.csv")
    with pytest.raises(ValueError, match="(?s)sweep.csv: 0 of 0 budgets.*--config.isoflops=.6e18"):
        fit_runs(tmp_path, scattered, config_of := neutral("sweep.csv", approach=2, resamples=0))
    page = fit_runs(tmp_path, scattered, replace(config_of, approach=3))
    assert "IsoFLOP curves" not in [section.title for section in page.own]


GRID = np.geomspace(1e7, 1e9, 5)
N, D = (x.ravel() for x in np.meshgrid(GRID, 1e2 * GRID))


def true_loss(params, tokens):
    return T["E"] + T["A"] / params ** T["alpha"] + T["B"] / tokens ** T["beta"]


UNDETERMINED = {
    "all runs have N = 1e.08 params": (np.full(5, 1e8), 1e2 * GRID, true_loss(1e8, 1e2 * GRID)),
    "all runs have D = 1e.10 tokens": (GRID, np.full(5, 1e10), true_loss(GRID, 1e10)),
    "N and D are proportional .D = 20 N.": (GRID, 20 * GRID, true_loss(GRID, 20 * GRID)),
    "all runs have one budget": (GRID, 1e18 / GRID, true_loss(GRID, 1e18 / GRID)),
    "all losses are 3": (N, D, np.full(25, 3.0)),
    "5 rows for 5 parameters": (N[::6], D[::6] * [1, 3, 1, 3, 1], true_loss(N[::6], D[::6] * [1, 3, 1, 3, 1])),
    "least value: these losses do not fall": (N, D, 3 * D**0.05 / N**0.05),
}


@pytest.mark.parametrize("cause", UNDETERMINED)
def test_what_rows_cannot_determine_is_said_in_place_of_an_optimum(tmp_path, cause):
    params, tokens, loss = UNDETERMINED[cause]
    if len(params) == 5 and "rows for" not in cause:
        # Three runs of each, so that the number of rows is not the cause.
        params, tokens = np.repeat(params, 3), np.repeat(tokens, 3)
        loss = np.repeat(loss, 3) * np.exp(0.002 * np.random.default_rng(0).standard_normal(15))
    config = neutral("sweep.csv", resamples=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fit_runs(tmp_path, make_rows({"params": params, "tokens": tokens, "loss": loss}), config)
    assert re.search(cause, found.result["undetermined"])
    assert "exponents" not in found.result and all(np.isnan(row["params"]) for row in found.result["budgets"])
    assert re.search(f"The optimum is undetermined: .*{cause}", " ".join(summary(found.result)))
    assert not any(section.title in ("Loss surface", "What to train") for section in found.own)
    if "all runs have N" in cause:  # E and A / N^alpha are one number: A and alpha may be anything
        values = found.result["parameters"]
        assert {"A", "alpha", "E"} & {name for name in values if values[name].get("undetermined")}
    if "proportional" in cause:
        assert "The optimum is undetermined" in fit_page(tmp_path, found, "sweep.csv").read_text()


def test_the_growth_of_a_law_with_further_columns_is_that_of_its_own_optima(tmp_path):
    # Sparse models: a single column more, so that N* at a sparsity is Chinchilla's with another A.
    t = {"a_S": 16.8, "c_S": 45.8, "B": 400.0, "c": 0.651, "b_S": 0.722, "b_N": 0.245, "b_D": 0.28}
    sparsity = np.tile([0.0, 0.5, 0.75], 25)
    params, tokens = np.repeat(N, 3), np.repeat(D, 3)
    size = (t["a_S"] * (1 - sparsity) ** t["b_S"] + t["c_S"]) / params ** t["b_N"]
    rows = make_rows(
        {"params": params, "tokens": tokens, "sparsity": sparsity, "loss": size + 400 / tokens**0.28 + 0.651}
    )
    found = {}
    for at in ({}, {"sparsity": 0.9}):
        config = neutral("x", law="sparsity", resamples=0, at=at, fit={"starts": 100, "keep": 4})
        result = fit_runs(tmp_path, rows, config).result
        assert result["held"] == {"sparsity": at.get("sparsity", 0.5)}
        assert result["exponents"]["a"]["value"] == pytest.approx(0.28 / 0.525, rel=1e-3)
        assert f"Optima are for sparsity = {result['held']['sparsity']}" in " ".join(summary(result))
        found[len(at)] = [row["params"] for row in result["budgets"]]
    # A(S) N^-b_N + B D^-b_D: N* goes as A^(1 / (b_N + b_D)).
    size = [t["a_S"] * (1 - s) ** t["b_S"] + t["c_S"] for s in (0.5, 0.9)]
    np.testing.assert_allclose(np.divide(found[1], found[0]), (size[1] / size[0]) ** (1 / 0.525), rtol=1e-3)
    with pytest.raises(ValueError, match="config.at names 'experts', which sparsity does not use"):
        fit_runs(tmp_path, rows, neutral("x", law="sparsity", resamples=0, at={"experts": 8.0}))


def from_command_line(*argv):
    """The settings of `tessera fit ARGV`, with few resamples."""
    return build(ScalingConfig, invocation_of(*argv).config)


def invocation_of(*argv):
    quick = ("--config.resamples=0", "--config.laws=()", "--config.misfit=False", "--config.fit.starts=60")
    options, overrides = cli.parse_flags(cli.COMMANDS["fit"], [*argv, *quick])
    config, name = cli._load(cli.COMMANDS["fit"], vars(options))
    return cli.invoke(fit_command.SCHEMA, config, overrides, name, vars(options))


def planted(path, header, factor):
    """Write the planted law's runs without noise, sizes in units of `factor` and tokens in billions."""
    loss = T["E"] + T["A"] / N ** T["alpha"] + T["B"] / D ** T["beta"]
    rows = (f"{n / factor},{d / 1e9},{y:.9f}" for n, d, y in zip(N, D, loss, strict=True))
    path.write_text("\n".join([f"{header},tokens (B),loss", *rows]))


@pytest.mark.parametrize(
    "header, units, first",
    [
        ("Weights (M)", (), "note: units read: params: numbers without a unit are taken times 1e6"),
        ("weights", ("--config.units.params=1e6",), "note: units read: tokens:"),
        ("weights", (), "warning: units of sizes: Half of the runs have .*--config.units.params=1e6"),
    ],
)
def test_units_come_before_the_answer_and_give_the_planted_law(tmp_path, monkeypatch, capsys, header, units, first):
    monkeypatch.setattr(fit_command, "print_report", lambda page, workdir, found, source: page(workdir, found, source))
    planted(tmp_path / "runs.csv", header, 1e6)
    columns = (f"--config.columns.params={header}", "--config.columns.tokens=tokens (B)")
    where = (f"--config.runs={tmp_path / 'runs.csv'}", f"--workdir={tmp_path / 'fit'}")
    fit_command.main(invocation_of(*where, *columns, *units))
    text, saved = capsys.readouterr().out, json.loads((tmp_path / "fit" / "fit.json").read_text())
    found = {name: one["value"] for name, one in saved["parameters"].items()}
    read = not first.startswith("warning")
    assert found["A"] == pytest.approx(T["A"] if read else T["A"] / 1e6 ** T["alpha"], rel=1e-3)
    assert found["alpha"] == pytest.approx(T["alpha"], rel=1e-3)
    told = re.search(first, text)
    assert told and told.start() < text.index("standard") and "counted FLOPs" not in text
    assert text.count(told[0]) == 1 and told[0].split(": ", 2)[2][:30] in (tmp_path / "fit" / "report.html").read_text()


def test_names_and_values_are_set_one_by_one():
    config = from_command_line(
        *(
            "--config.runs=x",
            "--config.columns.params=parameter_count",
            "--config.columns.loss=val",
            "--config.tie.beta=alpha",
        ),
        *("--config.hold.E=1.69", "--config.at.sparsity=0.75", '--config.hold={"A": 3.0}'),
    )
    assert dict(config.columns) == {"params": "parameter_count", "loss": "val"}
    assert config.tie == (("beta", "alpha"),) and config.at == (("sparsity", 0.75),) and dict(config.hold) == {"A": 3.0}
    with pytest.raises(ConfigError, match="config.hold.E"):
        from_command_line("--config.runs=x", "--config.hold.E=much")


OWN_LAWS = """
import jax.numpy as jnp, scaling
line = scaling.custom_law(
    "line", lambda p, x: p["height"] + p["slope"] * jnp.log(x["tokens"]), {"height": (1.0, 9.0), "slope": (-0.1, 0.1)},
    columns=("tokens",), signed=("slope",),
)
level = scaling.custom_law("level", lambda p, x: p["height"] + 0 * x["tokens"], {"height": (3.0,)}, columns=("tokens",))
"""


def recipes():
    """Setting on the command line, parameters that it must give, and from where."""
    stream = np.random.default_rng(0)
    loss = (3 + 200 / D**0.25) * np.exp(0.05 * stream.standard_normal(25))
    rows = make_rows({"params": N, "tokens": D, "loss": loss, "w": np.tile([1.0, 4.0, 0.0, 2.0, 9.0], 5)}, "runs.csv")
    log_c, log_d = np.log(rows["flops"]), np.log(D)
    power, squares = "--config.law=compute --config.hold.E=0", "--config.fit.objective=normal"
    slope, height = np.polyfit(log_c, np.log(loss), 1)
    yield "a law of C alone", f"{power} {squares}", rows, {"A": np.exp(height), "alpha": -slope}
    slope, height = np.polyfit(log_c, np.log(loss), 1, w=np.sqrt(rows["w"]))
    yield "weights", f"{power} {squares} --config.fit.weights=w", rows, {"A": np.exp(height), "alpha": -slope}
    a, e = np.polyfit(D**-0.25, loss, 1)
    yield (
        "residuals of the loss",
        f"--config.law=curve --config.hold.alpha=0.25 {squares} --config.fit.residuals=loss",
        rows,
        {"A": a, "E": e},
    )
    slope, height = np.polyfit(log_d, loss, 1)
    yield (
        "signed",
        f"--config.law=OWN:line {squares} --config.fit.residuals=loss",
        rows,
        {"height": height, "slope": slope},
    )
    level = expectile(np.log(loss), 0.2)
    over = f"{squares} --config.fit.overprediction=4"
    yield "asymmetric squares", f"--config.law=OWN:level {over}", rows, {"height": np.exp(level)}
    level = np.quantile(loss, 1 / 10.5, method="inverted_cdf")
    over = "--config.fit.objective=laplace --config.fit.residuals=loss --config.fit.overprediction=9.5"
    yield "asymmetric absolute values", f"--config.law=OWN:level {over}", rows, {"height": level}
    whole = make_rows({"params": N, "tokens": D, "loss": 1.7 + 400 / N**0.3 + 500 / D**0.3})
    yield "tied and held", "--config.tie.beta=alpha --config.hold.E=1.7", whole, {"A": 400, "B": 500, "alpha": 0.3}


@pytest.mark.parametrize("name", [name for name, *_ in recipes()])
def test_what_recipes_need_is_set_from_the_command_line(tmp_path, name):
    argv, rows, wanted = next(rest for one, *rest in recipes() if one == name)
    (tmp_path / "laws.py").write_text(OWN_LAWS)
    config = from_command_line("--config.runs=x", *argv.replace("OWN", str(tmp_path / "laws.py")).split())
    found = fit_runs(tmp_path, rows, config).result
    assert found["converged"]
    values = {key: value["value"] for key, value in found["parameters"].items()}
    assert values == pytest.approx(wanted, rel=2e-5)


def test_a_law_of_ones_own_held_and_tied(tmp_path):
    (tmp_path / "laws.py").write_text(
        "import scaling\n"
        "mine = scaling.power_law('mine', (('P', (('p', 'log_params', -1.0),)), ('Q', (('q', 'log_tokens', -1.0),)),"
        " ('R', ())), {'P': (4.0, 6.0), 'Q': (4.0, 6.0), 'R': (0.0,), 'p': (0.3,), 'q': (0.3,)})\n"
    )
    settings = {"law": f"{tmp_path / 'laws.py'}:mine", "resamples": 0}
    rows = make_rows({"params": N, "tokens": D, "loss": 1.7 + 400 / N**0.3 + 500 / D**0.3})
    result = fit_runs(tmp_path, rows, neutral("x", tie={"q": "p"}, hold={"R": 1.7}, **settings)).result
    values = {name: found["value"] for name, found in result["parameters"].items()}
    assert values == pytest.approx({"P": 400, "Q": 500, "p": 0.3}, rel=1e-4)
    with pytest.raises(ValueError, match="has no scaling.Law yours; it has mine"):
        fit_runs(tmp_path, rows, neutral("x", law=f"{tmp_path / 'laws.py'}:yours"))


def terms_gain(result):
    numbers = findings(result)["lack of fit"]["numbers"]
    return numbers["scale_with"] / numbers["scale"]


AS_GADRE = {"tie": {"beta": "alpha"}, "resamples": 0, "fit": {"residuals": "loss", "objective": "normal"}}
# Their 1.4B and 7B runs (params, tokens, loss), and how far off five small ones predict them: by scipy's curve_fit.
GADRE_LARGE = {
    (1439795200, 28795904000, 2.65685871): -0.0077952,
    (1439795200, 115183616000, 2.47241307): 0.0149793,
    (6889410560, 137788211200, 2.38222042): -0.0429525,
}


def gadre_error(result, params, tokens, loss):
    p = {name: found["value"] for name, found in result["parameters"].items()}
    return (p["E"] + p["A"] / params ** p["alpha"] + p["B"] / tokens ** p["alpha"]) / loss - 1


# Published or recomputed answers, with how near to come (the tables' README): settings beside the neutral ones, and
# (value of the result, answer, tolerance).
PUBLIC = {
    "porian_refinedweb_tuned": [
        ({"approach": 2, "resamples": 0}, lambda r: r["exponents"]["a"]["value"], 0.4969, 0.04),
        ({"approach": 2, "curve": "akima", "resamples": 0}, lambda r: r["exponents"]["a"]["value"], 0.4969, 0.0075),
        ({"approach": 2, "resamples": 0}, lambda r: sum(not m["refused"] for m in r["minima"]), 12, 0),
    ],
    "llama3_isoflop": [
        ({"approach": 2, "resamples": 0}, lambda r: r["exponents"]["b"]["value"], 0.535, 0.015),
        # Rejected: five smooth terms halve the residuals.
        ({"resamples": 0}, lambda r: findings(r)["lack of fit"]["numbers"]["p"], 0.0, 1e-25),
        ({"resamples": 0}, terms_gain, 0.5, 0.06),
    ],
    "marin_comma_isoflop": [
        ({"approach": 2, "resamples": 50}, lambda r: r["exponents"]["a"]["value"], 0.426, 0.01),
        ({"approach": 2, "resamples": 50}, lambda r: r["approaches"][3]["a"], 0.345, 0.01),
        ({"approach": 2, "resamples": 50}, lambda r: findings(r)["approaches disagree"]["verdict"] == "warning", 1, 0),
        ({"approach": 2, "resamples": 50}, lambda r: findings(r)["counted FLOPs"]["numbers"]["least"], 0.74, 0.005),
        ({"approach": 2, "resamples": 50}, lambda r: findings(r)["counted FLOPs"]["numbers"]["largest"], 1.07, 0.005),
    ],
    "frantar_t5_sparsity": [
        ({"law": "sparsity", "resamples": 0}, lambda r: r["value"] / 48, 4.8801e-6, 4.8801e-10),
    ],
    "gadre_c4": [
        ({"tie": {"beta": "alpha"}, "resamples": 0}, lambda r: r["parameters"]["alpha"]["value"] / 2, 0.121, 0.005),
        # As they fit it, by squares of the loss itself.
        (AS_GADRE, lambda r: r["parameters"]["alpha"]["value"] / 2, 0.121236, 1e-6),
        *((AS_GADRE, lambda r, row=row: gadre_error(r, *row), off, 1e-5) for row, off in GADRE_LARGE.items()),
    ],
    "muennighoff_data_constrained": [
        (
            {"law": "data_constrained", "resamples": 0, "hold": {
                "A": float(np.exp(6.255414)), "B": float(np.exp(7.3049974)), "E": float(np.exp(0.6254804)),
                "alpha": 0.3526596, "beta": 0.3526596,
            }},
            lambda r: r["value"], 0.0158047, 0.0158047e-4,
        ),
    ],
}  # fmt: skip


SLOW = ("muennighoff_data_constrained",)  # no sum of powers: it is compiled


@pytest.mark.parametrize("table", [pytest.param(t, marks=[pytest.mark.slow] * (t in SLOW)) for t in PUBLIC])
def test_public_tables_give_their_sources_answers(tmp_path, shared_data, table):
    path, found = shared_data(f"scaling/public/{table}.csv"), {}
    rows = load_runs(neutral(path))
    if table == "gadre_c4":
        # Their five small runs: 20 tokens per parameter at four sizes, and 320 at the smallest.
        small = (rows["params"] < 5e8) & (rows["mult"] == 1.0)
        rows = rows.take(small | ((rows["params"] < 2e7) & (rows["mult"] == 16.0)))
        assert len(rows) == 5
    for settings, read, answer, tolerance in PUBLIC[table]:
        settings = settings | {"fit": settings.get("fit", {}) | {"starts": 150}}
        key = str(settings)
        found[key] = found.get(key) or fit_runs(tmp_path, rows, neutral(path, **settings)).result
        assert read(found[key]) == pytest.approx(answer, abs=max(tolerance, 1e-12)), (settings, answer)


def bent_sweep(bend, seed):
    """Chinchilla's law times 1 + bend (log10 C / 1e18)^2 with a tilt in N: no parametric law of ours."""
    rows = sweep()
    place = np.log10(rows["flops"] / 1e18) + 0.5 * np.log10(rows["tokens"] / rows["params"] / 20)
    noise = np.exp(0.001 * np.random.default_rng(seed).standard_normal(len(rows)))
    loss = true_loss(rows["params"], rows["tokens"]) * (1 + bend * place**2) * noise
    return make_rows(rows.columns | {"loss": loss}, "bent.csv")


@pytest.mark.long
@pytest.mark.parametrize(("bend", "seed"), [(0.01, 0), pytest.param(-0.008, 2, marks=pytest.mark.slow)])
def test_every_value_of_a_rejected_law_lies_in_its_interval(tmp_path, bend, seed):
    rows, settings = bent_sweep(bend, seed), {"misfit": True, "resamples": 10, "fit": {"starts": 30, "keep": 2}}
    found = fit_runs(tmp_path, rows, neutral("x", inference_tokens=(1e12,), **settings))
    result, text = found.result, " ".join(summary(found.result))
    assert result["rejected"] and result["next_runs"] == []
    assert any(
        "None is recommended: the law is rejected" in str(section.content) for section in number_sections(result)
    )
    # The slope is that between the runs, and the table's, beyond them, another.
    flops, params = ([row[name] for row in result["budgets"]] for name in ("flops", "params"))
    slope = np.polyfit(np.log([flops[0], flops[-1]]), np.log([params[0], params[-1]]), 1)[0]
    assert "between 1e17 and 1e20 FLOPs" in text and f"last budget below, parameters as C^{slope:.3f}" in text
    assert "serve 1e12 tokens, by the law alone" in text
    inside = [(row[name], row[f"{name}_interval"]) for row in result["budgets"] for name in ("params", "tokens")]
    inside += [(row[name], row[f"{name}_interval"]) for row in result["budgets"] for name in ("ratio", "loss")]
    inside += [(found["value"], found["interval"]) for found in result["exponents"].values()]
    inside += [(row["a"], row["interval"]) for row in result["approaches"] if row["interval"]]
    for value, (low, high) in inside:
        assert low <= value <= high
    for row in result["budgets"]:
        assert 6 * row["params"] * row["tokens"] == pytest.approx(row["flops"])
    # The law by itself, by its closed form, has its own name.
    p = {name: found["value"] for name, found in result["parameters"].items()}
    assert result["exponents"]["a"]["law"] == pytest.approx(p["beta"] / (p["alpha"] + p["beta"]))
    budget = result["budgets"][1]
    size = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"]))
    size *= (budget["flops"] / 6) ** (p["beta"] / (p["alpha"] + p["beta"]))
    assert budget["params_law"] == pytest.approx(size)
    assert f"The law by itself would have C^{result['exponents']['a']['law']:.3f}" in " ".join(summary(result))
    # Whichever approach is asked for, approach 3 has one value and one interval.
    minima = fit_runs(tmp_path, rows, neutral("x", approach=2, **settings)).result
    assert minima["approaches"][3]["a"] == pytest.approx(result["exponents"]["a"]["value"], abs=1e-4)
    assert minima["approaches"][3]["interval"] == pytest.approx(result["exponents"]["a"]["interval"], abs=1e-4)


def test_a_law_of_flops_alone_is_not_held_at_one_number_of_them(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fit_runs(tmp_path, sweep(), neutral("x", law="compute", misfit=True, resamples=5)).result
    assert result["held"] == {} and not any("Optima are for" in text for text in summary(result))
    assert "2 different log_flops" in findings(result)["backtest"]["text"]


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"budgets": (1e20, float("nan"))}, "budgets .*positive finite"),
        ({"budgets": (float("inf"),)}, "budgets .*positive finite"),
        ({"isoflops": (float("nan"),)}, "isoflops .*positive finite"),
        ({"hold": {"E": float("nan")}}, "hold .*finite"),
        ({"inference_tokens": (float("nan"),)}, "inference_tokens .*finite"),
        ({"within": float("nan")}, "within nan"),
        ({"resamples": 1}, "resamples 1: an interval needs at least 2"),
        ({"resamples": -5}, "resamples -5"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_settings_that_are_no_numbers_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        build(ScalingConfig, {"runs": "x"} | settings)


def test_a_long_fit_shows_its_stages(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tessera.sweeps.fit_report.LONG", 0)
    fit_runs(tmp_path, sweep(), neutral("x"), show=True)
    said = capsys.readouterr().err
    assert "fit 0/5  32 runs, 30 resamples (--config.resamples=300 for fewer)" in said and "resamples 30/30" in said


def test_errors_beyond_the_value_are_of_the_logarithm_alone():
    draws = np.exp(np.log(2e4) + 4 * np.random.default_rng(0).standard_normal(400))
    wide = {"value": 2e4, "se": float(draws.std(ddof=1)), "log_se": float(np.log(draws).std(ddof=1))}
    wide["interval"] = np.percentile(draws, [2.5, 97.5]).tolist()
    result = {"level": 0.95, "undetermined": "", "parameters": {"A": wide, "alpha": {"value": 0.3, "se": 0.01}}}
    table = parameter_table(result)
    assert table.columns[2:4] == ["standard error", "of its logarithm"]
    (_, _, error, log_error, _), alpha = table.rows
    assert error == "–" and float(log_error) == pytest.approx(np.log(draws).std(ddof=1), rel=1e-3)
    assert alpha[2:4] == ["0.01", None]


def test_single_losses_have_no_envelope_that_could_disagree(tmp_path):
    result = fit_runs(tmp_path, sweep(), neutral("x", approach=2)).result
    envelope = result["approaches"][0]
    assert envelope["a"] is not None and "not compared: no column `run`" in envelope["refused"]
    assert "approach 1" not in findings(result)["approaches disagree"]["text"]
    assert findings(result)["approaches disagree"]["numbers"]["approaches"] == 3


@pytest.mark.parametrize("bend", [0.01, 0.0])
def test_a_rejected_law_buys_no_run(tmp_path, bend):
    # With the discrepancy (below) or without, the law is as wrong.
    result = fit_runs(tmp_path, bent_sweep(bend, 0), neutral("x", resamples=0)).result
    assert bool(result["next_runs"]) == (not bend) and bool(result["next_runs_withheld"]) == bool(bend)
    assert ("Next run to buy: " in " ".join(summary(result))) == (not bend)


def test_the_next_run_is_told_with_where_it_lies_outside_the_rows(tmp_path):
    result = fit_runs(tmp_path, sweep(), neutral("x", resamples=0)).result
    ratios = sweep()["tokens"] / sweep()["params"]
    assert result["rows_ratio"] == pytest.approx([ratios.min(), ratios.max()])
    run = {"flops": 6e20, "params": 1e9, "before": 0.2, "after": 0.1}
    for ratio, outside in ((0.9 * ratios.min(), True), (ratios.min(), False), (1.1 * ratios.max(), True)):
        result["next_runs"] = [run | {"after": 0.15, "tokens": 20e9}, run | {"tokens": 1e9 * ratio}]
        line = next(text for text in summary(result) if text.startswith("Next run"))
        assert "1e9 parameters on " in line and "takes the error of log N* from 0.2 to 0.1." in line
        page = next(section for section in number_sections(result) if section.title == "The next run to buy")
        assert "it is not the best model, see What to train" in page.caption
        assert ("outside those of the rows" in line, "outside those of the rows" in page.caption) == (outside, outside)


def test_splines_are_not_judged_as_parabolas(tmp_path):
    found = fit_runs(tmp_path, sweep(), neutral("x", approach=2, curve="akima"))
    assert not {"cubic term", "scatter"} & set(findings(found.result))
    assert "parabola" not in found.own[0].caption


def test_sentences_about_a_law_without_a_formula_and_a_single_size(tmp_path):
    (tmp_path / "laws.py").write_text(OWN_LAWS)
    config = from_command_line("--config.runs=x", f"--config.law={tmp_path / 'laws.py'}:line")
    result = fit_runs(tmp_path, sweep(), config).result
    assert summary(result)[0].startswith("line, fitted to 32 runs: height = ")
    # A reason with brackets is told whole.
    params = np.geomspace(1e7, 1e9, 9)
    rows = make_rows({"params": params, "tokens": 20 * params, "loss": true_loss(params, 20 * params)})
    found = fit_runs(tmp_path, rows, neutral("x"))
    refused = next(row["refused"] for row in found.result["approaches"] if row["approach"].startswith("3"))
    assert refused == "undetermined: N and D are proportional (D = 20 N): runs of one size with other tokens are needed"
    # One ratio of tokens has no axis.
    titles = [ax.get_title(loc="left") for ax in next(s for s in found.own if s.title == "Residuals").content().axes]
    assert len(titles) == 2 and not any("tokens per parameter" in title for title in titles)
    lost = {"A": {"value": float("inf")}, "E": {"value": 1.7}, "B": {"value": 2.0, "undetermined": True}}
    told = parameter_table({"level": 0.95, "undetermined": "N and D are proportional", "parameters": lost})
    assert [row[1] for row in told.rows] == ["undetermined", "1.7", "undetermined"]


def test_laws_of_columns_that_the_runs_lack_are_not_compared(monkeypatch):
    compared = []

    def compare(rows, laws, config):
        compared.extend(law.name for law in laws)
        raise LookupError

    monkeypatch.setattr("tessera.sweeps.fit_report.misfit.compare_laws", compare)
    rows = make_rows({"params": np.geomspace(1e6, 1e9, 9), "tokens": np.geomspace(1e8, 1e9, 9), "loss": [3.0] * 9})
    config = ScalingConfig("runs.csv", misfit=False, laws=("chinchilla", "sparsity", "fine_grained_moe", "kaplan"))
    with pytest.raises(LookupError):
        misfit_sections(rows, find_law("kaplan"), config, {"doctor": []})
    assert compared == ["kaplan", "chinchilla"]


def test_standard_errors_are_of_the_finite_draws():
    draws = np.array([1.0, np.nan, 4.0, np.inf, 7.0])
    assert spread_of(draws) == pytest.approx(3.0) and np.isnan(spread_of(draws[:2]))


@pytest.mark.long
def test_rows_without_noise_have_a_report(tmp_path):
    """All resamples agree on N* to the last bits, which leaves a histogram no width."""
    sizes, tokens = (grid.ravel() for grid in np.meshgrid(1e6 * 4.0 ** np.arange(4), 1e8 * 4.0 ** np.arange(4)))
    rows = {"params": sizes, "tokens": tokens, "loss": 1.7 + 400 / sizes**0.34 + 410 / tokens**0.28}
    settings = {"runs": "exact.csv", "resamples": 8, "fit": {"starts": 20, "keep": 2}, "laws": ("curve",)}
    result, _ = write_fit(tmp_path, make_rows(rows), build(ScalingConfig, settings))
    assert result["exponents"]["a"]["value"] == pytest.approx(0.28 / (0.28 + 0.34), rel=1e-3)
