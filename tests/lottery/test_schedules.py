import numpy as np
import pytest

from lottery import schedules


def test_geometric_is_the_papers_series():
    np.testing.assert_allclose(schedules.densities(schedules.geometric(0.2, 4)), [0.8, 0.64, 0.512, 0.4096])
    assert schedules.geometric(0.2, 0) == []


@pytest.mark.parametrize("density", [0.9, 0.5, 0.036])
def test_one_shot_and_cubic_end_where_they_should(density):
    np.testing.assert_allclose(schedules.densities(schedules.one_shot(density)), [density])
    for levels in (1, 2, 7):
        alive = schedules.densities(schedules.cubic(density, levels))
        progress = np.arange(1, levels + 1) / levels
        np.testing.assert_allclose(alive, density + (1 - density) * (1 - progress) ** 3)
        assert alive[-1] == pytest.approx(density)


@pytest.mark.parametrize(
    "call",
    [
        lambda: schedules.geometric(0.0, 3),
        lambda: schedules.geometric(1.0, 3),
        lambda: schedules.geometric(0.2, -1),
        lambda: schedules.one_shot(1.5),
        lambda: schedules.cubic(0.0, 3),
    ],
)
def test_impossible_fractions_are_refused(call):
    with pytest.raises(ValueError, match="fraction|levels"):
        call()
