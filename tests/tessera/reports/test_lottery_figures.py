"""Figures, checked by what they draw: the lines' data, limits and labels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tessera.reports import lottery_curves, lottery_figures, lottery_findings, mask_figures, style

ARMS = ("ticket", "reinit", "random_mask")
RATE = 0.8


def make_rows(seeds=3, levels=4, arms=ARMS, accuracy=None):
    """Rows of a made-up search; `accuracy(arm, level, seed)` defaults to a ticket that holds and controls that fall."""
    fall = {"dense": 0.0, "ticket": 0.0, "reinit": -0.02, "random_mask": -0.04}
    accuracy = accuracy or (lambda arm, level, seed: 0.95 + 0.003 * seed + fall.get(arm, -0.01) * level)
    rows = []
    for level in range(levels + 1):
        for arm in ("dense",) if level == 0 else arms:
            for seed in range(seeds):
                value = accuracy(arm, level, seed)
                steps = [10, 20, 30]
                rows.append(
                    {
                        "level": level,
                        "arm": arm,
                        "seed": seed,
                        "density": RATE**level,
                        "alive": round(1000 * RATE**level),
                        "prunable": 1000,
                        "layers": {"dense0/kernel": RATE**level, "output/kernel": 0.9**level},
                        "start_step": 0,
                        "early_stop_step": 20 + 10 * (arm != "ticket" and level > 0),
                        "early_stop_test_accuracy": value,
                        "final_test_accuracy": value - 0.01,
                        "best_validation_loss": 1 - value + 0.01,
                        "curve": {
                            "step": steps,
                            "train_loss": [1.0, 0.5, 0.2],
                            "validation_loss": [1.0, 0.5, 1.1 - value],
                            "validation_accuracy": [0.1, 0.6, value],
                        },
                    }
                )
    return rows


def lines(ax):
    """The drawn lines that carry data over levels (not the dense reference)."""
    return [line for line in ax.get_lines() if len(line.get_xdata()) > 2]


def test_series_begin_at_the_dense_network_and_carry_student_intervals():
    rows = make_rows(seeds=4)
    points = lottery_figures.series(rows, "early_stop_test_accuracy")
    assert [point.density for point in points["reinit"]] == pytest.approx([1, 0.8, 0.64, 0.512, 0.4096])
    values = [row["early_stop_test_accuracy"] for row in rows if row["arm"] == "reinit" and row["level"] == 2]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    point = points["reinit"][2]
    assert (point.mean - point.half, point.mean + point.half) == pytest.approx((low, high))


@pytest.mark.parametrize("value", ["early_stop_test_accuracy", "final_test_accuracy"])
def test_accuracy_figure_draws_every_arm_against_falling_log_scaled_weights(value):
    near, whole = lottery_figures.accuracy_figure(make_rows(), value).axes
    for ax in (near, whole):
        assert ax.get_xscale() == "log"
        left, right = ax.get_xlim()
        assert left > 100 > 100 * RATE**4 > right, "the axis runs from 100% down"
        drawn = lines(ax)
        assert len(drawn) == len(ARMS)
        assert drawn[0].get_xdata() == pytest.approx(100 * RATE ** np.arange(5))
        assert len(ax.collections) == len(ARMS), "a band per arm"
    assert near.get_ylim()[0] >= whole.get_ylim()[0]
    shown = [text.get_text() for text in whole.texts]
    assert {"winning ticket", "reinitialized", "random mask", "dense network"} <= set(shown)


def test_one_seed_has_lines_and_bands_without_height():
    ax = lottery_figures.accuracy_figure(make_rows(seeds=1)).axes[1]
    assert np.isfinite(lines(ax)[0].get_ydata()).all()
    vertices = [v for band in ax.collections for path in band.get_paths() for v in path.vertices]
    assert not vertices or not np.isfinite(vertices).all()


def test_differences_are_paired_by_seed():
    left, right = lottery_figures.difference_figure(make_rows()).axes
    assert lines(left)[0].get_ydata() == pytest.approx(np.zeros(4), abs=1e-9)
    assert lines(right)[0].get_ydata() == pytest.approx([2, 4, 6, 8])
    assert lines(right)[1].get_ydata() == pytest.approx([4, 8, 12, 16])


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"seeds": 1},
        {"levels": 0},
        {"levels": 1, "seeds": 2},
        {"levels": 25},
        {"arms": ("continue",)},
        {"arms": ("ticket", "my_own_arm")},
        {"arms": tuple(arm for arm in lottery_figures.ARM_ORDER)},
        {"accuracy": lambda arm, level, seed: 0.5},
        {"accuracy": lambda arm, level, seed: None if arm == "reinit" and level == 2 else 0.9 - 0.1 * level},
    ],
    ids=range(10),
)
def test_every_figure_of_every_search_renders_without_warnings(case, recwarn):
    if "accuracy" in case and case["accuracy"]("reinit", 2, 0) is None:
        rows = make_rows()
        for row in rows:
            if (row["arm"], row["level"]) == ("reinit", 2):
                row["early_stop_test_accuracy"] = row["early_stop_step"] = None
    else:
        rows = make_rows(**case)
    made = [
        lottery_figures.accuracy_figure(rows),
        lottery_figures.speed_figure(rows),
        lottery_curves.curves_figure(rows),
    ]
    made += [lottery_figures.layer_figure(rows, lottery_figures.main_arm(rows))]
    if lottery_figures.arms(rows):
        made.append(lottery_figures.difference_figure(rows, arm=lottery_figures.main_arm(rows)))
    for figure in made:
        figure.canvas.draw()
    assert not [w for w in recwarn if "matplotlib" in str(w.filename) or issubclass(w.category, RuntimeWarning)]
    assert lottery_findings.findings(rows) and lottery_findings.describe(rows, {})


def test_figures_do_not_touch_pyplot():
    import subprocess
    import sys

    code = "import sys; from tessera.reports import lottery_figures, mask_figures; "
    code += "sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_curves_average_over_the_steps_all_seeds_have():
    rows = [
        {"curve": {"step": [1, 2, 3], "validation_loss": [3.0, 2.0, 1.0]}},
        {"curve": {"step": [2, 3, 4], "validation_loss": [4.0, 5.0, 6.0]}},
    ]
    step, mean = lottery_curves.mean_curve(rows, "validation_loss")
    assert step.tolist() == [2, 3] and mean.tolist() == [3.0, 3.0]


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=12), st.floats(0.01, 0.3))
def test_labels_keep_their_distance_their_order_and_the_frame(positions, gap):
    placed = style.spread(positions, gap)
    assert min(placed) >= -1e-9 and max(placed) <= 1 + 1e-9
    room = min(gap, 1 / max(1, len(positions) - 1))
    assert (np.diff(sorted(placed)) >= room - 1e-9).all()
    by_place = np.asarray(positions)[np.argsort(placed, kind="stable")]
    assert (np.diff(by_place) >= 0).all()


def test_labels_that_fit_stay_where_they_are():
    assert style.spread([0.9, 0.1, 0.5], 0.1) == pytest.approx([0.9, 0.1, 0.5])
    assert style.spread([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])


@given(st.integers(1, 40), st.integers(1, 8))
def test_picked_levels_keep_the_ends(count, wanted):
    levels = list(range(3, 3 + count))
    picked = lottery_curves.pick(levels, wanted)
    assert len(picked) <= wanted and set(picked) <= set(levels) and picked == sorted(picked)
    assert picked[0] == 3 and (wanted == 1 or picked[-1] == levels[-1])


@given(st.integers(0, 2**31 - 1), st.sampled_from([(4, 5), (3, 2, 3), (4, 4, 1)]))
def test_pixel_use_counts_weights_of_each_pixel(seed, shape):
    mask = np.random.default_rng(seed).random((2, int(np.prod(shape)), 7)) < 0.3
    use = mask_figures.pixel_use(mask, shape)
    assert use.shape == shape[:2]
    counts = np.zeros(shape[:2])
    for pixel in np.nonzero(mask)[1]:
        counts[np.unravel_index(pixel, shape)[:2]] += 1
    assert use == pytest.approx(counts / counts.mean())


def test_a_mask_that_is_not_over_the_pixels_is_refused():
    with pytest.raises(ValueError, match="64 pixels in the middle; got shape \\(2, 60, 3\\)"):
        mask_figures.pixel_use(np.ones((2, 60, 3), bool), (8, 8))
    assert not mask_figures.pixel_use(np.zeros((1, 64, 3), bool), (8, 8)).any()


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 3)])
def test_mask_figures_draw_a_panel_per_level_and_unit(shape):
    rng = np.random.default_rng(0)
    masks = {level: rng.random((2, int(np.prod(shape)), 12)) < RATE**level for level in range(9)}
    densities = {level: RATE**level for level in masks}
    pixels = mask_figures.pixels_figure(masks, densities, shape, np.zeros(shape), count=4)
    assert [ax.get_title() for ax in pixels.axes][:5] == ["mean image", "100%", "51.2%", "32.8%", "16.8%"]
    units = mask_figures.units_figure(masks, densities, shape, units=5, count=3)
    (ax,) = units.axes
    shown = [int(text.get_text().split()[1]) for text in ax.texts if text.get_text().startswith("unit")]
    assert len(shown) == 5 and sum(text.get_text().endswith("%") for text in ax.texts) == 3
    drawn = np.ma.filled(ax.get_images()[0].get_array().astype(float), np.nan)
    assert drawn.shape == (3 * 4 + 2, 5 * 4 + 4)
    for column, unit in enumerate(shown):
        tile = drawn[-4:, 5 * column : 5 * column + 4]
        assert (tile == masks[8][0, :, unit].reshape(*shape[:2], -1).any(-1)).all()
    for figure in (pixels, units):
        figure.canvas.draw()


def test_findings_name_the_sparsest_level_that_keeps_up():
    fall = {"dense": 0.0, "ticket": 0.0, "reinit": -0.02, "random_mask": -0.04}

    def accuracy(arm, level, seed):
        noise = 0.001 * seed * (level + 1)
        return 0.95 + noise + (fall[arm] * level if arm != "ticket" else (-0.1 if level == 4 else 0.01))

    rows = make_rows(accuracy=accuracy)
    point = lottery_findings.matching(rows)
    assert point is not None and point.level == 3
    text = lottery_findings.findings(rows)
    differences = [0.01 + 0.001 * seed * 3 for seed in range(3)]
    low, high = stats.t.interval(0.95, 2, np.mean(differences), stats.sem(differences))
    assert text.startswith("Down to 51.2% of the weights the winning ticket is on average at least as accurate")
    assert f"{100 * np.mean(differences):+.2f} points (95% interval {100 * low:+.2f} to {100 * high:+.2f})" in text
    assert "over reinitialized" in text and "over random mask" in text
    assert "0 steps apart from" in text
    assert "3 seeds" in lottery_findings.caveats(rows)


def test_findings_say_so_when_no_ticket_wins_and_when_there_is_one_seed():
    rows = make_rows(seeds=1, accuracy=lambda arm, level, seed: 0.9 - 0.1 * level)
    assert lottery_findings.matching(rows) is None
    text = lottery_findings.findings(rows)
    assert text.startswith("At no level") and "nearest at 80.0%" in text and "−10.00 points" in text
    assert "interval" not in text and "One seed" in lottery_findings.caveats(rows)


def test_description_reads_settings_and_does_without_them():
    config = {
        "lr": 0.0012,
        "model": {"hidden": [300, 100]},
        "optimizer": {"name": "adam"},
        "train": {"steps": "400it", "batch_size": 60},
        "search": {"rate": 0.2, "output_rate": -1.0, "scope": "layer", "score": "magnitude"},
    }
    text = lottery_findings.describe(make_rows(), config)
    parts = ("300-100", "400 steps with adam", "20% by magnitude of each layer (10% of the output", "3 seeds", "41.0%")
    assert all(part in text for part in parts)
    assert "4 rounds" in lottery_findings.describe(make_rows(), {})
