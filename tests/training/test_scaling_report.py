import json
import re

import numpy as np
import pytest

from scaling import style
from scaling.rows import make_rows
from training.config import ConfigError, build
from training.page import DARK
from training.scaling_report import ScalingConfig, write_fit

T = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}


def sweep():
    budgets = np.repeat([1e17, 1e18, 1e19, 1e20], 8)
    params = 0.1 * budgets**0.4516 * np.tile(np.geomspace(1, 30, 8), 4)
    tokens = budgets / (6 * params)
    loss = T["E"] + T["A"] / params ** T["alpha"] + T["B"] / tokens ** T["beta"]
    noise = np.exp(0.002 * np.random.default_rng(0).standard_normal(32))
    return make_rows({"params": params, "tokens": tokens, "loss": loss * noise}, "sweep.csv")


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


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="runs is empty"):
        build(ScalingConfig, {"runs": "", "budgets": (1.0,)})
    with pytest.raises(ConfigError, match="at least one positive number"):
        build(ScalingConfig, {"runs": "x"})


def test_figures_use_colours_that_the_page_darkens():
    assert {style.INK, style.MUTED, style.GRID, *style.PALETTE, *style.RAMP} <= set(DARK)
