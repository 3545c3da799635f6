"""The page of a search: its tables, its findings and what is remembered for it."""

import json
import math

import numpy as np
import pytest
from report_cases import make_rows, read
from scipy import stats

from lottery.imp import Memory, SearchConfig, Store, Trained, search
from tessera.tickets import report
from tessera.tickets.report import FirstLayer, level_table, lottery_report, summary_table


def ticket_rows(seeds=3, levels=3):
    rows = []
    for level in range(levels + 1):
        for arm in ("dense",) if level == 0 else ("ticket", "reinit"):
            for seed in range(seeds):
                value = 0.9 + 0.01 * seed - (0.05 * level if arm == "reinit" else 0.0)
                curve = {"step": [5, 10], "validation_loss": [1.0, 1.1 - value], "validation_accuracy": [0.5, value]}
                rows.append(
                    {"level": level, "arm": arm, "seed": seed, "density": 0.5**level, "alive": 64 >> level}
                    | {"prunable": 64, "layers": {"dense0/kernel": 0.5**level}, "start_step": 0, "curve": curve}
                    | {"early_stop_step": 10, "early_stop_test_accuracy": value, "final_test_accuracy": value}
                    | {"best_validation_loss": 1.1 - value}
                )
    return rows


@pytest.mark.parametrize("seeds, levels", [(3, 3), (1, 3), (2, 0)])
def test_ticket_report_of_any_search(tmp_path, monkeypatch, seeds, levels):
    if seeds != 3:  # the page is drawn for each, the files beside it once
        monkeypatch.setattr("tessera.reports.html._write_png", lambda path, figure: None)
    rows = ticket_rows(seeds, levels)
    masks = {level: np.ones((seeds, 16, 4), bool) for level in range(levels + 1)}
    (tmp_path / "config.json").write_text(json.dumps({"data": {"name": "digits"}, "search": {"rate": 0.5}}))
    found = read(lottery_report(tmp_path, rows, masks, np.zeros((4, 4))))
    assert "Lottery tickets on digits" in found.text
    assert ("One seed" in found.text) == (seeds == 1)
    assert ("Down to 12.5% of the weights the winning ticket" in found.text) == (levels > 0)
    assert ("unit 0" in found.text) == (levels > 0)
    table = found.tables[0]
    assert len(table) == levels + 2
    if seeds == 3 and levels:
        half = 4.302652729911275 * 1.0 / math.sqrt(3)  # t(0.975, 2 degrees of freedom); the seeds' deviation is 1 point
        assert table[0] == ["level", "weights (%)", "weights", "winning ticket", "reinitialized"]
        assert table[4] == ["3", "12.5", "8", f"91.00 ± {half:.2f}", f"76.00 ± {half:.2f}"]


def test_the_page_of_ones_own_rows_shows_what_they_have(tmp_path, monkeypatch):
    monkeypatch.setattr("tessera.reports.html._write_png", lambda path, figure: None)
    rows = [
        {key: row[key] for key in ("level", "arm", "seed", "density", "alive", "prunable", "layers")}
        | {"my_accuracy": row["final_test_accuracy"]}
        for row in ticket_rows()
    ]
    with pytest.raises(ValueError, match="value=, an accuracy in the rows .*prunable, layers, my_accuracy"):
        lottery_report(tmp_path, rows)
    found = read(lottery_report(tmp_path / "new", rows, value="my_accuracy"))
    assert "Down to 12.5% of the weights the winning ticket" in found.text
    assert all(name in found.text for name in ("Differences, seed by seed", "Layers", "91.00"))
    assert not any(name in found.text for name in ("Speed and fit", "Learning curves", "early stopping", "Settings"))


def test_cells_at_least_as_accurate_as_the_dense_network_are_marked():
    table = level_table(ticket_rows(), "early_stop_test_accuracy")
    assert table.marked == {(1, 3), (2, 3), (3, 3)}
    rich = summary_table(ticket_rows())
    assert rich.row_count == 4 and [str(column.header) for column in rich.columns][0] == "level"


def test_a_report_needs_rows(tmp_path):
    with pytest.raises(ValueError, match="level 0"):
        lottery_report(tmp_path, [])


def test_first_layer_remembers_masks_whether_levels_are_trained_or_loaded():
    import jax

    def init(key):
        return {
            "dense0": {"kernel": jax.random.normal(key, (6, 4))},
            "output": {"kernel": jax.random.normal(key, (4, 2))},
        }

    def train_fn(starts, *, level):
        return Trained(starts.params, [{} for _ in starts.names])

    config = SearchConfig(seeds=(0, 1), levels=2, rate=0.5, arms=("reinit", "ticket"))
    trained = FirstLayer(Memory())
    assert isinstance(trained, Store)
    search(init, train_fn, trained, config)
    loaded = FirstLayer(trained.store)
    search(init, train_fn, loaded, config)
    for level, alive in enumerate((24, 12, 6)):
        assert trained.masks[level].shape == (2, 6, 4) and trained.masks[level].dtype == bool
        assert (trained.masks[level].sum((1, 2)) == alive).all()
        assert (loaded.masks[level] == trained.masks[level]).all()
        kept = trained.store.levels[level][0]["masks"]["dense0"]["kernel"]
        assert (np.asarray(kept)[-2:] == trained.masks[level]).all(), "the ticket's rows, not the control's"


def test_findings_name_the_sparsest_level_that_keeps_up():
    fall = {"dense": 0.0, "ticket": 0.0, "reinit": -0.02, "random_mask": -0.04}

    def accuracy(arm, level, seed):
        noise = 0.001 * seed * (level + 1)
        return 0.95 + noise + (fall[arm] * level if arm != "ticket" else (-0.1 if level == 4 else 0.01))

    rows = make_rows(accuracy=accuracy)
    point = report.matching(rows)
    assert point is not None and point.level == 3
    text = report.findings(rows)
    differences = [0.01 + 0.001 * seed * 3 for seed in range(3)]
    low, high = stats.t.interval(0.95, 2, np.mean(differences), stats.sem(differences))
    assert text.startswith("Down to 51.2% of the weights the winning ticket is on average at least as accurate")
    assert f"{100 * np.mean(differences):+.2f} points (95% interval {100 * low:+.2f} to {100 * high:+.2f})" in text
    assert "over reinitialized" in text and "over random mask" in text
    assert "lowest at the same step as the dense network's, on average" in text
    assert "3 seeds" in " ".join(report.caveats(rows))


def test_findings_say_so_when_no_ticket_wins_and_when_there_is_one_seed():
    rows = make_rows(seeds=1, accuracy=lambda arm, level, seed: 0.9 - 0.1 * level)
    assert report.matching(rows) is None
    text = report.findings(rows)
    assert text.startswith("At no level") and "nearest at 80.0%" in text and "−10.00 points" in text
    assert "interval" not in text and "One seed: there are no intervals" in report.caveats(rows)[0]


def test_description_reads_settings_and_does_without_them():
    config = {
        "lr": 0.0012,
        "model": {"hidden": [300, 100]},
        "optimizer": {"name": "adam"},
        "train": {"steps": "400it", "batch_size": 60},
        "search": {"rate": 0.2, "output_rate": -1.0, "scope": "layer", "score": "magnitude"},
    }
    text = report.describe(make_rows(), config)
    parts = ("300-100", "400 steps with adam", "20% by magnitude of each layer (10% of the output", "3 seeds", "41.0%")
    assert all(part in text for part in parts)
    assert "4 rounds" in report.describe(make_rows(), {})


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(1.0, "100%"), (0.9949, "99.5%"), (0.1234, "12.3%"), (0.05123, "5.12%"), (0.0012345, "0.123%")],
)
def test_percentages_have_the_digits_that_tell_networks_apart(fraction, text):
    assert report.percent(fraction) == text
