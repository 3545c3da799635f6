import csv
import math

import numpy as np
import pytest
from scipy import stats

from lottery import summary


def make_rows(arms=("ticket", "reinit"), levels=2, seeds=5):
    rng = np.random.default_rng(0)
    rows = [
        {"arm": "dense", "level": 0, "seed": s, "density": 1.0, "accuracy": float(rng.normal())} for s in range(seeds)
    ]
    for level in range(1, levels + 1):
        for arm in arms:
            for seed in range(seeds):
                density = 0.8**level
                rows.append(
                    {"arm": arm, "level": level, "seed": seed, "density": density, "accuracy": float(rng.normal())}
                )
    return rows


def values(rows, arm, level):
    return np.array([row["accuracy"] for row in rows if row["arm"] == arm and row["level"] == level])


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_intervals_agree_with_scipy(confidence):
    rows = make_rows()
    table = summary.summarize(rows, "accuracy", confidence)
    assert [(row["arm"], row["level"]) for row in table] == [
        ("dense", 0), ("ticket", 1), ("ticket", 2), ("reinit", 1), ("reinit", 2),
    ]  # fmt: skip
    for row in table:
        x = values(rows, row["arm"], row["level"])
        low, high = stats.ttest_1samp(x, 0).confidence_interval(confidence)
        np.testing.assert_allclose((row["mean"] - row["half_width"], row["mean"] + row["half_width"]), (low, high))
        assert row["n"] == 5 and row["density"] == pytest.approx(0.8 ** row["level"])


def test_a_value_of_zero_counts_and_none_does_not():
    same = {"arm": "ticket", "level": 0, "density": 1.0}
    rows = [same | {"seed": seed, "gap": value} for seed, value in enumerate((0.0, 3.0, None, 0))]
    (found,) = summary.summarize(rows, "gap")
    assert (found["mean"], found["n"]) == (1.0, 3)


@pytest.mark.parametrize("against", ["reinit", "dense"])
def test_differences_are_paired_by_seed(against):
    rows = make_rows()
    shuffled = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    table = summary.differences(shuffled, "accuracy", "ticket", against)
    assert [row["level"] for row in table] == [1, 2]
    for row in table:
        other = values(rows, against, 0 if against == "dense" else row["level"])
        result = stats.ttest_rel(values(rows, "ticket", row["level"]), other)
        low, high = result.confidence_interval(0.95)
        np.testing.assert_allclose((row["mean"] - row["half_width"], row["mean"] + row["half_width"]), (low, high))
        assert row["n"] == 5


def test_missing_values_are_left_out_and_counted():
    rows = make_rows()
    for row in rows:
        if row["arm"] == "ticket" and row["seed"] in (1, 3):
            row["accuracy"] = None
    table = {(row["arm"], row["level"]): row for row in summary.summarize(rows, "accuracy")}
    assert table["ticket", 1]["n"] == 3 and table["reinit", 1]["n"] == 5
    assert [row["n"] for row in summary.differences(rows, "accuracy", "ticket", "reinit")] == [3, 3]


def test_one_seed_has_a_mean_but_no_interval():
    mean, half_width, n = summary.interval([2.5])
    assert (mean, n) == (2.5, 1) and math.isnan(half_width)
    mean, half_width, n = summary.interval([])
    assert math.isnan(mean) and math.isnan(half_width) and n == 0


def test_csv_gives_every_number_back(tmp_path):
    rows = make_rows()
    for i, row in enumerate(rows):
        row |= {"layers": {"dense0/kernel": 1 / 3 + i, "output/kernel": 0.1}, "curve": [1.0, 2.0]}
    rows[0]["note"] = 'a "quoted", cell'
    rows[1]["note"] = None
    path = summary.write_csv(rows, tmp_path / "new" / "rows.csv")
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(rows)
    assert list(read[0]) == [
        "arm",
        "level",
        "seed",
        "density",
        "accuracy",
        "layers/dense0/kernel",
        "layers/output/kernel",
        "note",
    ]
    for mine, theirs in zip(read, rows, strict=True):
        assert float(mine["accuracy"]) == theirs["accuracy"]
        assert float(mine["layers/dense0/kernel"]) == theirs["layers"]["dense0/kernel"]
        assert mine["note"] == (theirs.get("note") or "")
    assert [p.name for p in path.parent.iterdir()] == ["rows.csv"]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'speed'.*accuracy"):
        summary.summarize(make_rows(), "speed")
    with pytest.raises(ValueError, match="'ticketing'.*dense, ticket, reinit"):
        summary.differences(make_rows(), "accuracy", "ticketing", "reinit")


# The tail index against distributions whose index is known.

KNOWN = [
    (stats.pareto(2.0), 0.5),
    (stats.pareto(5.0), 0.2),
    (stats.expon(), 0.0),
    (stats.uniform(1, 1), -1.0),
    (stats.beta(1, 2, loc=1), -0.5),
]


@pytest.mark.parametrize(("law", "index"), KNOWN, ids=[str(index) for _, index in KNOWN])
def test_known_laws(law, index):
    sample = law.rvs(size=20_000, random_state=np.random.default_rng(0))
    assert summary.pareto_index(sample, 800) == pytest.approx(index, abs=0.15)


def test_the_index_is_hosking_and_walliss_and_knows_neither_place_nor_scale():
    sample = stats.genpareto(0.3).rvs(size=(2, 40), random_state=np.random.default_rng(1))
    found = summary.pareto_index(sample, 12)
    for one, index in zip(sample, found, strict=True):
        ordered = sorted(one)
        excess = [x - ordered[-13] for x in ordered[-12:]]
        a0 = sum(excess) / 12
        a1 = sum((12 - j) / 11 * x for j, x in enumerate(excess, 1)) / 12
        assert index == pytest.approx(-(a0 / (a0 - 2 * a1) - 2), rel=1e-12)
    np.testing.assert_allclose(summary.pareto_index(5 * sample - 1000, 12), found, rtol=1e-9)


def test_the_interval_covers_a_known_index_about_as_often_as_it_says():
    found = summary.tail_power(300, 60, 1 / 3, trials=60)
    assert found.covers >= 48 / 60 and found.below == 0 and found.above > 0.3
    assert summary.tail_power(300, 60, -0.5, trials=60).below > 0.8


def test_impossible_requests():
    with pytest.raises(ValueError, match="k=5 of 5"):
        summary.pareto_index(np.arange(1.0, 6.0), 5)
    assert np.isnan(summary.pareto_index(np.ones(5), 3))
