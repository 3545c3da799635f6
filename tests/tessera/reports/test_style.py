"""What figures show, read off their axes."""

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
