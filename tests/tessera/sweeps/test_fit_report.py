import json
import re

import numpy as np
import pytest

from scaling.rows import RowError, make_rows
from tessera.infra.config import ConfigError, build
from tessera.sweeps.fit_report import ScalingConfig, fit_page, fit_runs

T = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}


def sweep():
    budgets = np.repeat([1e17, 1e18, 1e19, 1e20], 8)
    params = 0.1 * budgets**0.4516 * np.tile(np.geomspace(1, 30, 8), 4)
    tokens = budgets / (6 * params)
    loss = T["E"] + T["A"] / params ** T["alpha"] + T["B"] / tokens ** T["beta"]
    noise = np.exp(0.002 * np.random.default_rng(0).standard_normal(32))
    return make_rows({"params": params, "tokens": tokens, "loss": loss * noise}, "sweep.csv")


def write_fit(workdir, rows, config):
    found = fit_runs(workdir, rows, config)
    return found.result, fit_page(workdir, found, rows.source)


@pytest.mark.parametrize("approach", [2, 3])
def test_fit_json_and_report(tmp_path, approach):
    settings = {"runs": "sweep.csv", "approach": approach, "resamples": 40, "budgets": (1e20, 1e22)}
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
    return write_fit(
        tmp_path, rows, build(ScalingConfig, {"runs": "x", "resamples": 30, "budgets": (1e20,)} | settings)
    )


@pytest.mark.parametrize("labelled", [True, False])
def test_the_envelope_takes_runs_by_label_or_by_size(tmp_path, labelled):
    params = np.repeat(np.geomspace(1e6, 1e9, 13), 20)
    tokens = params * np.tile(np.geomspace(0.5, 500, 20), 13)
    loss = T["E"] + T["A"] / params ** T["alpha"] + T["B"] / tokens ** T["beta"]
    columns = {"params": params, "tokens": tokens, "loss": loss}
    rows = make_rows(columns | ({"run": np.repeat(np.arange(13), 20)} if labelled else {}), "curves.csv")
    result, page = write(tmp_path, rows, approach=1)
    a = result["exponents"]["a"]
    assert a["value"] == pytest.approx(T["beta"] / (T["alpha"] + T["beta"]), abs=0.06)
    assert a["interval"][0] < a["value"] < a["interval"][1]
    assert {f["name"]: f["verdict"] for f in result["doctor"]}["runs"] == ("fine" if labelled else "note")
    assert "Envelope" in page.read_text()


def test_a_law_without_a_best_size_is_reported(tmp_path):
    result, page = write(tmp_path, sweep(), law="curve")
    assert result["off_optimum"] == [] and np.isnan(result["budgets"][0]["params"])
    assert "no best size" in page.read_text()
    assert json.loads((tmp_path / "fit.json").read_text())["budgets"][0]["params"] is None


def test_serving_many_tokens_asks_for_a_smaller_model(tmp_path):
    result, _ = write(tmp_path, sweep(), inference_tokens=(0.0, 1e12))
    none, much = result["inference"]
    assert none["params"] == pytest.approx(result["budgets"][0]["params"], rel=1e-3)
    assert much["params"] < none["params"] and much["saved"] > 0


def test_a_missing_cluster_column_is_named(tmp_path):
    with pytest.raises(RowError, match="column 'model': the column is missing, which config.cluster names"):
        write(tmp_path, sweep(), cluster="model")


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="runs is empty"):
        build(ScalingConfig, {"runs": "", "budgets": (1.0,)})
    with pytest.raises(ConfigError, match="at least one positive number"):
        build(ScalingConfig, {"runs": "x"})
