"""What figures show, read off their axes."""

import math

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from tessera.reports import style


def test_a_band_is_as_high_above_its_line_as_below():
    _, (ax,) = style.canvas()
    x, y, half = np.array([1.0, 2.0, 4.0]), np.array([5.0, 7.0, 6.0]), np.array([0.5, 1.0, 2.0])
    style.line_with_band(ax, x, y, half, color="#000000")
    (band,) = ax.collections
    corners = band.get_paths()[0].vertices
    for at, middle, width in zip(x, y, half, strict=True):
        heights = corners[corners[:, 0] == at, 1]
        assert (heights.min(), heights.max()) == (middle - width, middle + width)


@pytest.mark.parametrize("values", [(0, 3.0, 40.0), (3.0, 40.0), (-1.0, 40.0, 3.0, 0)])
def test_a_log_axis_spans_the_positive_values(values):
    _, (ax,) = style.canvas()
    style.log_values(ax, values=values)
    assert ax.get_yscale() == "log" and ax.get_ylim() == pytest.approx((3 / 1.15, 40 * 1.15))
    assert ax.get_yticks().tolist() == [5, 10, 20]


def test_an_interval_ends_where_values_end():
    assert style.plus_minus(0.9867, 0.0143, 100, 2, (0.0, 1.0)) == "98.67 (97.24 to 100.00)"
    assert (
        style.plus_minus(0.9, 0.02, 100, 2, (0.0, 1.0)) == "90.00 ± 2.00" and style.plus_minus(0.9, math.nan) == "0.90"
    )
    figure, (ax,) = style.canvas()
    style.line_with_band(ax, [0, 1], [99.5, 50.0], [2.0, 60.0], within=(0.0, 100.0), color="#0072b2")
    (band,) = ax.collections
    heights = np.concatenate([path.vertices[:, 1] for path in band.get_paths()])
    assert (heights.min(), heights.max()) == (0, 100)


@pytest.mark.parametrize("limits", [(3.1e9, 3.9e9), (210.0, 480.0), (6.0, 9.5)])
def test_a_narrow_log_axis_has_several_ticks(limits):
    _, (ax,) = style.canvas()
    style.log_values(ax, "x", limits)
    assert len(ax.get_xticks()) >= 2 and all(limits[0] <= tick <= limits[1] for tick in ax.get_xticks())
