import re

import numpy as np
import pytest

from scaling.plausible import examine_rows
from scaling.rows import make_rows


def table(**changes):
    params, tokens = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 1e9, 4), np.geomspace(1e9, 1e11, 4)))
    columns = {"params": params, "tokens": tokens, "flops": 6 * params * tokens, "loss": 2 + 300 / params**0.3}
    return make_rows({name: changes.get(name, lambda x: x)(values) for name, values in columns.items()}, "runs.csv")


def one_lost(x):
    return np.where(np.arange(16) == 0, 20.0, x)


def first_twice(x):
    return np.concatenate([x, x[:1]])


@pytest.mark.parametrize(
    "name, says, vocabulary, changes",
    [
        ("counted FLOPs", "lie between 0.333 and 0.333", 0, {"flops": lambda c: c / 3}),
        ("units of sizes", "fewer: are they in billions", 0, {"tokens": lambda d: d / 1e9, "flops": lambda c: c / 1e9}),
        ("units of sizes", "fewer: are they in millions", 0, {"params": lambda n: n / 1e6, "flops": lambda c: c / 1e6}),
        ("unit of loss", "perplexities", 0, {"loss": lambda y: np.exp(y)}),
        ("unit of loss", "bits", 100, {"loss": lambda y: y / np.log(2)}),
        (
            "unit of loss",
            "row 1.: these runs have learned nothing",
            0,
            {"loss": one_lost},
        ),
        (
            "doubled rows",
            "1 of 17 rows have .*row 17",
            0,
            dict.fromkeys(("params", "tokens", "flops", "loss"), first_twice),
        ),
    ],
)
def test_each_slip_is_one_line_and_nothing_else_is(name, says, vocabulary, changes):
    assert {finding.verdict for finding in examine_rows(table())} == {"fine"}
    warned = [finding for finding in examine_rows(table(**changes), vocabulary) if finding.verdict == "warning"]
    assert [finding.name for finding in warned] == [name]
    assert re.search(says, warned[0].text), warned[0].text
