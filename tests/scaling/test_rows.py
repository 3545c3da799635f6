import numpy as np
import pytest

from scaling.fitting.fit import fit
from scaling.published import CHINCHILLA, SPARSITY
from scaling.rows import RowError, make_rows

GOOD = {"params": [1e6, 2e6], "tokens": [1e8, 3e8], "loss": [3.0, 2.5]}


@pytest.mark.parametrize("left_out", ["params", "tokens", "flops"])
def test_the_third_size_follows_from_the_other_two(left_out):
    params, tokens = np.array([1e6, 2e6]), np.array([1e8, 3e8])
    full = {"params": params, "tokens": tokens, "flops": 6 * params * tokens}
    rows = make_rows({**{k: v for k, v in full.items() if k != left_out}, "loss": [3.0, 2.5]})
    for name, values in full.items():
        np.testing.assert_allclose(rows[name], values, rtol=1e-14)


@pytest.mark.parametrize(
    "column, bad, says",
    [
        ("loss", 0.0, "not positive"),
        ("loss", float("nan"), "not finite"),
        ("params", -5, "not positive"),
        ("tokens", float("inf"), "not finite"),
        ("tokens", "many", "'many' is not a number"),
        ("params", "", "empty"),
        ("params", None, "empty"),
    ],
)
def test_a_bad_value_is_reported_by_row_and_column(column, bad, says):
    columns = {name: list(values) for name, values in GOOD.items()}
    columns[column][1] = bad
    with pytest.raises(RowError, match=f"row 2, column '{column}'.*{says}") as caught:
        make_rows(columns)
    assert [problem[:2] for problem in caught.value.problems] == [(2, column)]


def test_every_bad_value_is_reported_at_once():
    with pytest.raises(RowError) as caught:
        make_rows({"params": [0, 1], "tokens": ["x", 1], "loss": [1, -1]})
    assert [problem[:2] for problem in caught.value.problems] == [(1, "params"), (1, "tokens"), (2, "loss")]


@pytest.mark.parametrize("columns, named", [({"params": [1], "loss": [1]}, "tokens, flops"), ({"params": [1]}, "loss")])
def test_missing_columns_are_named(columns, named):
    with pytest.raises(RowError, match=named):
        make_rows(columns)


def test_a_row_of_a_file_is_named_by_its_line():
    rows = make_rows({"params": [1, 2, 3], "tokens": [1] * 3, "loss": [4.0, 9.0, 2.0]}, "a.csv", np.array([2, 4, 5]))
    assert rows.places([0]) == "line 2 of a.csv"
    assert rows.take(np.array([2, 0])).places([0, 1]) == "lines 5 and 2 of a.csv"
    assert make_rows(GOOD).places([0, 1]) == "rows 1 and 2"
    with pytest.raises(RowError, match="line 4, column 'params': -2 is not positive"):
        make_rows({"params": [1, -2], "tokens": [1] * 2, "loss": [4.0, 9.0]}, "a.csv", np.array([2, 4]))


def test_too_few_rows_and_columns_a_law_needs():
    with pytest.raises(ValueError, match="2 rows cannot determine the 5 parameters"):
        fit(make_rows(GOOD), CHINCHILLA)
    rows = make_rows({**GOOD, "sparsity": [0.5, 1.0]})
    with pytest.raises(RowError, match="row 2, column 'sparsity': 1.0 must be at least 0 and under 1"):
        SPARSITY.gather(rows)
    with pytest.raises(RowError, match="sparsity.*the column is missing"):
        SPARSITY.gather(make_rows(GOOD))
    with pytest.raises(RowError, match="row 1, column 'sparsity': 'half' is not a number"):
        SPARSITY.gather(make_rows({**GOOD, "sparsity": ["half", 0.5]}))


def test_dropping_the_highest_losses_keeps_the_order():
    rows = make_rows({"params": [1, 2, 3, 4], "tokens": [1] * 4, "loss": [4.0, 9.0, 2.0, 8.0]})
    assert rows.without_highest_losses(2)["params"].tolist() == [1, 3]
    with pytest.raises(ValueError, match="cannot drop 4 of 4"):
        rows.without_highest_losses(4)


def test_sizes_have_units_and_losses_have_none():
    """A loss of "3.2k" is a typing error, whatever it would be as a number."""
    sizes = {"params": ["1.2B", "70M", "5e3k"], "tokens": ["3T", "2 b", "1e9"]}
    rows = make_rows({**sizes, "loss": ["3.2", "2.9", "2.5"]})
    assert rows["params"].tolist() == [1.2e9, 7e7, 5e6] and rows["tokens"].tolist() == [3e12, 2e9, 1e9]
    with pytest.raises(RowError, match="'3.2k' is not a number"):
        make_rows({**sizes, "loss": ["3.2k", "2.9", "2.5"]})
