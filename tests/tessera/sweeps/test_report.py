import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from scaling.batch import critical_batch
from scaling.fitting.fit import FitConfig
from scaling.rows import make_rows
from scaling.sweeps.sweep import table
from tessera.reports.html import Table, section_html
from tessera.sweeps.fit_report import ScalingConfig
from tessera.sweeps.report import (
    ReportConfig,
    best_rows,
    enough,
    fit_sweep,
    isoflop_part,
    lr_minima,
    lr_section,
    noise_section,
    surface_part,
    sweep_page,
    target_of,
)

T = {"A": 40.0, "B": 900.0, "E": 1.2, "alpha": 0.45, "beta": 0.5}
BUDGETS = (1e11, 2e11, 4e11, 8e11)


def rows(*, sizes=8, factors=(1.0,), batches=(16,), noise=0.002, shift=1.0, budgets=BUDGETS):
    """Rows as a sweep writes them, losses from a law; a learning rate off the best one costs."""
    rng, found = np.random.default_rng(0), []
    for params in np.geomspace(2e3 * shift, 2e5 * shift, sizes).round():
        for factor in factors:
            for batch in batches:
                for budget in budgets:
                    tokens = budget / (6 * params)
                    loss = T["E"] + T["A"] / params ** T["alpha"] + T["B"] / tokens ** T["beta"]
                    loss += 0.05 * np.log(factor / 1.5) ** 2 + 0.02 * np.log(batch / 20) ** 2
                    loss *= np.exp(noise * rng.standard_normal())
                    name = f"w{params:g}-{factor:g}-{batch}"
                    found.append(
                        {
                            "run": name,
                            "width": round(params**0.5),
                            "layers": 2,
                            "params": int(params),
                            "lr": 0.01 * factor,
                        }
                        | {
                            "batch": batch,
                            "seed": 0,
                            "budget": budget,
                            "steps": int(tokens / 1024),
                            "tokens": int(tokens),
                        }
                        | {"flops": 6 * params * int(tokens), "loss": float(loss), "epochs": tokens / 1e7}
                        | {"gradient_signal": 0.1 * rng.uniform(0.5, 1.5), "gradient_noise": 3.0}
                    )
    return found


def reported(tmp_path, monkeypatch, found, **changes):
    quick = partial(ScalingConfig, fit=FitConfig(starts=100, keep=8))
    monkeypatch.setattr("tessera.sweeps.report.ScalingConfig", quick)
    (tmp_path / "runs.csv").write_text(table(found))
    found = fit_sweep(tmp_path, ReportConfig(resamples=40, **changes), length=64)
    return found.lead, sweep_page(tmp_path, found).read_text(), json.loads((tmp_path / "fit.json").read_text())


@pytest.mark.long
def test_a_sweep_is_fitted_both_ways(tmp_path, monkeypatch):
    lead, page, fit = reported(tmp_path, monkeypatch, rows())
    truth = T["beta"] / (T["alpha"] + T["beta"])
    assert fit["isoflop"]["exponents"]["a"]["value"] == pytest.approx(truth, abs=0.06)
    assert fit["parametric"]["exponents"]["a"]["value"] == pytest.approx(truth, abs=0.1)
    low, high = fit["isoflop"]["exponents"]["a"]["interval"]
    assert low < truth < high
    assert lead[0].startswith("8 runs of 8 sizes, 32 readouts at 4 budgets") and "4 of 4 budgets" in lead[1]
    assert any(text.startswith("Akima splines in place of the parabolas give C^0.") for text in lead)
    for title in ("IsoFLOP curves", "Minima", "Gradient noise", "Rows", "Parametric fit"):
        assert f"<h2>{title}" in page
    assert "<h3>Doctor</h3>" in page
    assert not re.search(r'(src|href)="http', page)


def as_rows(found):
    return make_rows({name: [row[name] for row in found] for name in found[0]})


def shown(sections):
    return "".join(section_html(section) for section in sections)


def test_runs_that_diverged_are_shown(tmp_path):
    (tmp_path / "runs.csv").write_text(table(rows(sizes=3)))
    (tmp_path / "diverged.csv").write_text("run,params,lr,budget,steps,error\nw9,81,0.5,1e9,40,the loss is nan\n")
    found = fit_sweep(tmp_path, ReportConfig(resamples=5), length=64)
    assert "1 runs diverged: w9." in found.lead
    shown = next(section for section in found.own if section.title == "Diverged runs")
    assert shown.content.rows == [["w9", "81", "0.5", "40", "the loss is nan"]]


def test_refused_budgets_are_shown_as_refused():
    # All sizes are far too large for the smallest budget.
    found = as_rows(rows(shift=4.0, budgets=(1e9, *BUDGETS)))
    result, lead, sections = isoflop_part(found, ReportConfig(resamples=20), Path("runs.csv"))
    refused = [m for m in result["minima"] if m["refused"]]
    assert [m["budget"] for m in refused] == pytest.approx([1e9], rel=1e-3)
    assert any(line.startswith("Refused at 1e9 FLOPs: the points scatter") for line in lead)
    assert [section.title for section in sections[:3]] == ["IsoFLOP curves", "Minima", "What to train"]
    assert "the points scatter" in shown(sections)


def test_a_sweep_without_minima_says_so():
    found = as_rows(rows(shift=100.0, budgets=(1e10, 2e10)))
    result, lead, sections = isoflop_part(found, ReportConfig(resamples=20), Path("runs.csv"))
    assert "0 of 2 budgets" in result["refused"] and "No power law" in lead[0]
    assert "more than the parabola is deep" in shown(sections)


def test_a_learning_rate_grid_is_read_by_width():
    grid = rows(sizes=3, factors=(0.5, 1.0, 2.0, 4.0), budgets=(1e11,), noise=0.0)
    found = as_rows([row | {"tokens": 10**6} for row in grid])
    assert [m.params for m in lr_minima(found)] == pytest.approx([0.015] * 3, rel=1e-3)
    assert "moves by a factor of 1.00" in shown([lr_section(found)])


def test_a_grid_of_learning_rates_and_batches_is_fitted():
    found = as_rows(rows(sizes=4, factors=(0.5, 1.0, 2.0, 4.0), batches=(8, 16, 32, 64), noise=0.0))
    numbers, section = surface_part(found)
    page = shown([section])
    assert "Best batch: 20 (" in page and "Best lr: 0.015 (" in page
    assert [one["batch"] for one in numbers] == pytest.approx([20.0] * 16)
    assert "Best lr: 0.015 (parameters / 2e4)^" in page and "(tokens / " in page
    # At one budget sizes and tokens are proportional: the learning rate is a rule of the sizes alone.
    numbers, section = surface_part(found.take(found["budget"] == found["budget"].max()))
    assert len(numbers) == 4 and re.search(r"Best lr: 0.015 .parameters / 2e4.\^-?0.00\.", shown([section]))


def test_the_best_of_a_grid_is_what_isoflops_are_drawn_through():
    found = rows(sizes=4, factors=(0.5, 1.0, 2.0), noise=0.0)
    best = best_rows(as_rows(found))
    assert len(best) == 16 and set(best["lr"].tolist()) == {0.02}
    # Of every seed its own best: two of four times four, the second's at another learning rate.
    other = [row | {"seed": 1, "loss": row["loss"] + 0.2 * (row["lr"] != 0.005)} for row in found]
    both = best_rows(as_rows(found + other))
    assert len(both) == 32 and set(both.take(both["seed"] == 1)["lr"].tolist()) == {0.005}


@pytest.mark.slow
def test_enough_is_when_the_interval_is_tight():
    found = rows()
    assert not enough(found[:4], ReportConfig(stop_at=10.0))  # one size
    assert enough(found, ReportConfig(stop_at=1.0, target=1e13))
    assert not enough(found, ReportConfig(stop_at=1e-4, target=1e13))
    with pytest.raises(ValueError, match="not be negative"):
        ReportConfig(stop_at=-1.0)


def test_a_critical_batch_and_its_interval_are_in_tokens():
    """Of sequences of 64 tokens: mean noise over mean signal, and `scaling.critical_batch`'s interval."""
    found = make_rows({name: [row[name] for row in rows()] for name in rows()[0]})
    section = noise_section(found, 64)
    (body,) = [part.rows for part in section.content if isinstance(part, Table)]
    for budget, (name, runs, tokens, interval) in zip(BUDGETS, body, strict=True):
        mine = found.take(found["budget"] == budget)
        batch = critical_batch(mine["gradient_signal"], mine["gradient_noise"])
        assert tokens == pytest.approx(64 * 3.0 / mine["gradient_signal"].mean()) and runs == 8
        ends = [float(number) for number in re.findall(r"[\d.]+", interval.replace(",", ""))]
        assert ends == pytest.approx([64 * batch.low, 64 * batch.high], rel=0.01), name


def test_a_sweep_plans_for_ten_times_its_largest_run():
    found = make_rows({name: [row[name] for row in rows()] for name in rows()[0]})
    assert target_of(found, ReportConfig()) == 10 * found["flops"].max() != 10 * max(BUDGETS)
    assert target_of(found, ReportConfig(target=5e13)) == 5e13
