"""Curves of a run against loops over their rows."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from tessera.reports.curves import smooth


@pytest.mark.parametrize("window", [1, 3, 5])
def test_a_moving_mean_is_of_the_finite_values_that_are_there(window):
    values = np.array([4.0, 1.0, np.nan, 8.0, 2.0, np.inf, np.nan, np.nan, np.nan, 3.0])
    near = [values[max(i - window // 2, 0) : i + window // 2 + 1] for i in range(len(values))]
    finite = [part[np.isfinite(part)] for part in near]
    expected = [part.mean() if len(part) else np.nan for part in finite]
    np.testing.assert_allclose(smooth(values, window), expected, rtol=1e-12)
