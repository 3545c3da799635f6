"""The tour's page: sentences that are right in both directions, and what must be equal."""

import json

import numpy as np
import pytest
from report_cases import make_rows

from lottery.summary import write_csv
from tessera.infra.logger import METRICS
from tessera.pages import tour
from tessera.pages.token_experts import TokenExperts, color_of, experts_table, sentence, text_html
from tests.tessera.reports.test_comparison import RUNS


def write_search(root, fall, spread=0.0):
    """A search whose controls lie `fall` below the ticket at every level, unevenly over seeds by `spread`."""

    def accuracy(arm, level, seed):
        return 0.9 - fall * (arm in ("reinit", "random_mask")) - spread * seed * (arm == "reinit")

    rows = make_rows(seeds=4, levels=2, accuracy=accuracy)
    (root / "ticket").mkdir(parents=True, exist_ok=True)
    keys = ("level", "arm", "seed", "density", "alive", "early_stop_test_accuracy")
    write_csv([{key: row[key] for key in keys} for row in rows], root / "ticket" / "tickets.csv")


@pytest.mark.parametrize(
    ("fall", "spread", "said"),
    [
        (0.05, 0.001, "5.15 points above that of its mask with fresh weights (95% interval +4.94 to +5.36, clear"),
        (-0.05, 0.001, "4.85 points below that of its mask with fresh weights (95% interval −5.06 to −4.64, clear"),
        (-0.03, 0.02, "0.00 points below that of its mask with fresh weights (95% interval −4.11 to +4.11, not clear"),
    ],
)
def test_the_ticket_and_its_controls(tmp_path, fall, spread, said):
    """Student's t with 3 degrees of freedom is 3.182; seeds 0 to 3 have a standard error of 0.6455 times the spread."""
    write_search(tmp_path, fall, spread)
    part = tour.ticket_part(tmp_path)
    assert said in part.seen.replace("0.00 points above", "0.00 points below") and "At 64% of the weights" in part.seen
    assert "one seed" not in part.seen and "+5.00 to +5.00, clear" in part.seen or fall < 0
    part.pictures[0]()


@pytest.mark.parametrize("half", [None, float("nan")])
def test_few_seeds_have_no_interval(half):
    assert tour.interval_text(0.5, half, 2) == "too few seeds for an interval"


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        (1, "too few seeds for an interval; −0.100 to −0.100 over 1 seeds"),
        (2, "too few seeds for an interval; −0.100 to −0.080 over 2 seeds"),
        (3, "95% interval −0.115 to −0.065, clear of zero; −0.100 to −0.080 over 3 seeds"),
    ],
)
def test_experts_beside_the_dense_arm(tmp_path, seeds, said):
    """As many seeds as the demo has, and others; 0.0248 is Student's half-width (scipy, in the comparison's tests)."""
    for run in RUNS:
        path = tmp_path / "experts" / f"{run.arm}-{run.seed}"
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(run.config))
        (path / METRICS).write_text("".join(json.dumps(row) + "\n" for row in run.rows))
    (tmp_path / "experts" / "config.json").write_text(json.dumps({"seeds": list(range(seeds))}))
    part = tour.experts_part(tmp_path)
    assert said in part.seen and "lower" in part.seen
    part.pictures[0]()


def write_plan(root, change, texts=("def a", "def a")):
    for name, extra, text in zip(("one", "split"), (0.0, change), texts, strict=True):
        (root / "plan" / name).mkdir(parents=True, exist_ok=True)
        rows = [{"step": step, "kind": "train", "loss": 9.0, "cross_entropy": 2.0 / step} for step in (1, 2, 3)]
        rows[1]["cross_entropy"] += extra
        (root / "plan" / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (root / "plan" / f"{name}.txt").write_text(text)


def test_a_plan_that_is_equal_and_one_that_is_not(tmp_path):
    write_plan(tmp_path, 4e-6)
    part = tour.plan_part(tmp_path)
    assert not part.wrong and "to 4e-6 nats (within 1e-5)" in part.seen and "is the one" in part.seen
    part.pictures[0]()
    write_plan(tmp_path, -4e-5, ("def a", "def b"))
    part = tour.plan_part(tmp_path)
    assert "differ from one device's by 4e-5, more than 1e-5; the texts" in part.wrong
    assert "NOT within" in part.seen and "is not the one" in part.seen
    write_plan(tmp_path, float("nan"))
    assert "differ from one device's by nan" in tour.plan_part(tmp_path).wrong


def test_losses_of_other_steps_are_refused(tmp_path):
    write_plan(tmp_path, 0.0)
    file = tmp_path / "plan" / "one" / "metrics.jsonl"
    file.write_text(file.read_text().rpartition('{"step"')[0])
    with pytest.raises(ValueError, match="losses of other steps"):
        tour.plan_part(tmp_path)


def test_a_text_by_its_experts():
    """Two layers, three experts, of which a token takes at most two."""
    text = "aaaaaaaaaa<\n"
    first = np.array([[2] * 10 + [0, 1], [0] * 5 + [1] * 5 + [2, 3]])
    experts = np.stack([first, np.full_like(first, 1)], 2)
    weights = np.stack([np.where(first < 3, 0.75, 0.0), np.where(first == 0, 0.0, 0.25)], 2)
    weights[1, -1] = 0.0
    found = TokenExperts(list(text), np.frombuffer(text.encode(), np.uint8), experts, weights, 3)
    assert found.used_LT[0].tolist() == [2] * 10 + [1, 2] and found.used_LT[1, -1] == 0
    told = sentence(found)
    assert "A token takes 0 to 2 of 3 experts, 1.67 on average." in told
    assert "Layer 1 is surest of the class “lower case”: 100% of 10 have expert 2 as their first" in told
    assert "Layer 2 is surest of the class “lower case”: 50% of 10" in told and "where chance is 33%" in told
    shown = text_html(found, 1)
    assert "&lt;" in shown and shown.count("<span") == 11 and shown.endswith("↵\n</div>")  # the last takes none
    assert 'title="experts 0 (0.75)"' in shown and 'title="experts 1 (0.75), 1 (0.25)"' in shown
    assert experts_table(found, 0).rows[2] == ["expert 2", "83.3%", "'a'"]
    assert experts_table(found, 1).rows[0][1] == "41.7%"
    assert len({color_of(expert, 16, 0.5) for expert in range(16)}) == 16
