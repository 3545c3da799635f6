"""What commands choose where a config says nothing."""

import pytest

from scaling.sweeps.plan import Family, PlanConfig, plan_runs
from tessera.cli import analyze_ticket, sweep


@pytest.mark.parametrize(
    ("have", "levels"),
    [
        ([], [0]),
        ([0], [0]),
        ([0, 1, 2], [0, 1, 2]),
        (range(13), [0, 1, 2, 6, 12]),
        (range(20), [0, 1, 2, 10, 19]),
    ],
)
def test_levels_of_a_search_are_looked_at_from_the_first_to_the_last(have, levels):
    assert analyze_ticket.spread(list(have)) == levels


def test_a_planner_aims_at_ten_times_the_largest_budget():
    runs = plan_runs(Family(), PlanConfig(widths=(16, 32, 64), budgets=(1e12, 4e12, 2e12)), {"data": "bytes"})
    assert sweep.target_of(runs) == 4e13
