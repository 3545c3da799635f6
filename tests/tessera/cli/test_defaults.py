"""What commands choose where a config says nothing."""

import numpy as np
import pytest

from scaling.sweeps.plan import Family, PlanConfig, plan_runs
from tessera.cli import analyze_ticket, quantize, sweep
from tessera.sweeps.report import ReportConfig


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
    assert sweep.with_target(ReportConfig(), runs).target == 4e13
    assert sweep.with_target(ReportConfig(target=1e15), runs).target == 1e15


def test_a_last_smaller_batch_has_its_own_weight():
    rows = np.arange(40.0)[:, None]
    found = quantize.mean_loss(
        lambda params, batch: (0.0, {"cross_entropy": params * batch["tokens"].mean()}), 2.0, rows
    )
    assert found == pytest.approx(2 * rows.mean())
