"""Figures, checked by what they draw: the lines' data, limits and labels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_cases import ARMS, RATE, make_rows
from scipy import stats

from tessera.reports import lottery, style
from tessera.tickets import report


def lines(ax):
    """The drawn lines that carry data over levels (not the dense reference)."""
    return [line for line in ax.get_lines() if len(line.get_xdata()) > 2]


def test_series_begin_at_the_dense_network_and_carry_student_intervals():
    rows = make_rows(seeds=4)
    points = lottery.series(rows, "early_stop_test_accuracy")
    assert [point.density for point in points["reinit"]] == pytest.approx([1, 0.8, 0.64, 0.512, 0.4096])
    values = [row["early_stop_test_accuracy"] for row in rows if row["arm"] == "reinit" and row["level"] == 2]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    point = points["reinit"][2]
    assert (point.mean - point.half, point.mean + point.half) == pytest.approx((low, high))


@pytest.mark.parametrize("value", ["early_stop_test_accuracy", "final_test_accuracy"])
def test_accuracy_figure_draws_every_arm_against_falling_log_scaled_weights(value):
    near, whole = lottery.accuracy_figure(make_rows(), value).axes
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
    ax = lottery.accuracy_figure(make_rows(seeds=1)).axes[1]
    assert np.isfinite(lines(ax)[0].get_ydata()).all()
    vertices = [v for band in ax.collections for path in band.get_paths() for v in path.vertices]
    assert not vertices or not np.isfinite(vertices).all()


def test_differences_are_paired_by_seed():
    left, right = lottery.difference_figure(make_rows()).axes
    assert lines(left)[0].get_ydata() == pytest.approx(np.zeros(4), abs=1e-9)
    assert lines(right)[0].get_ydata() == pytest.approx([2, 4, 6, 8])
    assert lines(right)[1].get_ydata() == pytest.approx([4, 8, 12, 16])


@pytest.mark.parametrize(
    "case",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"seeds": 1},
        {"levels": 0},
        pytest.param({"levels": 1, "seeds": 2}, marks=pytest.mark.slow),
        {"levels": 25},
        {"arms": ("continue",)},
        {"arms": ("ticket", "my_own_arm")},
        {"arms": tuple(arm for arm in lottery.ARM_ORDER)},
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
        lottery.accuracy_figure(rows),
        lottery.speed_figure(rows),
        lottery.curves_figure(rows),
    ]
    made += [lottery.layer_figure(rows, lottery.main_arm(rows))]
    if lottery.arms(rows):
        made.append(lottery.difference_figure(rows, arm=lottery.main_arm(rows)))
    for figure in made:
        figure.canvas.draw()
    assert not [w for w in recwarn if "matplotlib" in str(w.filename) or issubclass(w.category, RuntimeWarning)]
    assert report.findings(rows) and report.describe(rows, {})


def test_curves_average_over_the_steps_all_seeds_have():
    rows = [
        {"curve": {"step": [1, 2, 3], "validation_loss": [3.0, 2.0, 1.0]}},
        {"curve": {"step": [2, 3, 4], "validation_loss": [4.0, 5.0, 6.0]}},
    ]
    step, mean = lottery.mean_curve(rows, "validation_loss")
    assert step.tolist() == [2, 3] and mean.tolist() == [3.0, 3.0]


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=12), st.floats(0.01, 0.3))
def test_labels_keep_their_distance_their_order_and_the_frame(positions, gap):
    placed = style.spread(positions, gap)
    assert min(placed) >= -1e-9 and max(placed) <= 1 + 1e-9
    wanted = min(gap, 1 / max(1, len(positions) - 1))
    assert (np.diff(sorted(placed)) >= wanted - 1e-9).all()
    by_place = np.asarray(positions)[np.argsort(placed, kind="stable")]
    assert (np.diff(by_place) >= 0).all()


def test_labels_that_fit_stay_where_they_are():
    assert style.spread([0.9, 0.1, 0.5], 0.1) == pytest.approx([0.9, 0.1, 0.5])
    assert style.spread([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])


@given(st.integers(1, 40), st.integers(1, 8))
def test_picked_levels_keep_the_ends(count, wanted):
    levels = list(range(3, 3 + count))
    picked = style.pick(levels, wanted)
    assert len(picked) <= wanted and set(picked) <= set(levels) and picked == sorted(picked)
    assert picked[0] == 3 and (wanted == 1 or picked[-1] == levels[-1])


@given(st.integers(0, 2**31 - 1), st.sampled_from([(4, 5), (3, 2, 3), (4, 4, 1)]))
def test_pixel_use_counts_weights_of_each_pixel(seed, shape):
    mask = np.random.default_rng(seed).random((2, int(np.prod(shape)), 7)) < 0.3
    use = lottery.pixel_use(mask, shape)
    assert use.shape == shape[:2]
    counts = np.zeros(shape[:2])
    for pixel in np.nonzero(mask)[1]:
        counts[np.unravel_index(pixel, shape)[:2]] += 1
    assert use == pytest.approx(counts / counts.mean())


def test_a_mask_that_is_not_over_the_pixels_is_refused():
    with pytest.raises(ValueError, match="64 pixels in the middle; got shape \\(2, 60, 3\\)"):
        lottery.pixel_use(np.ones((2, 60, 3), bool), (8, 8))
    assert not lottery.pixel_use(np.zeros((1, 64, 3), bool), (8, 8)).any()


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 3)])
def test_mask_figures_draw_a_panel_per_level_and_unit(shape):
    rng = np.random.default_rng(0)
    masks = {level: rng.random((2, int(np.prod(shape)), 12)) < RATE**level for level in range(9)}
    densities = {level: RATE**level for level in masks}
    pixels = lottery.pixels_figure(masks, densities, shape, np.zeros(shape), count=4)
    assert [ax.get_title() for ax in pixels.axes][:5] == ["mean image", "100%", "51.2%", "32.8%", "16.8%"]
    units = lottery.units_figure(masks, densities, shape, units=5, count=3)
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


def test_no_interval_of_an_accuracy_passes_100_percent_nor_one_of_a_step_the_last():
    rows = [
        {"arm": arm, "seed": seed, "level": level, "density": 0.5**level, "alive": 4, "prunable": 8}
        | {"early_stop_test_accuracy": 1.0 - 0.02 * (seed == 0) * (arm != "reinit"), "early_stop_step": 300 - 9 * seed}
        | {"curve": {"step": [100, 300]}}
        for arm, level in (("dense", 0), ("ticket", 1), ("reinit", 1))
        for seed in range(3)
    ]
    (axes, _) = lottery.accuracy_figure(rows).axes
    tops = [path.vertices[:, 1].max() for band in axes.collections for path in band.get_paths() if len(path.vertices)]
    assert max(tops) == 100
    (axes, _) = (lottery.speed_figure([row | {"best_validation_loss": 0.1} for row in rows])).axes
    assert max(path.vertices[:, 1].max() for band in axes.collections for path in band.get_paths()) == 300
    cells = report.level_table(rows, "early_stop_test_accuracy").rows[1]
    assert cells[-2:] == ["99.33 (96.46 to 100.00)", "100.00 (all 3 equal)"]
    assert "same step" in " ".join(report.finding_list(rows)) and "99.3% (96.5% to 100%)" in report.findings(rows)
