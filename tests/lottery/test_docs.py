"""The example in docs/tickets.md runs and does what it says."""

import re
from pathlib import Path

import numpy as np
import pytest

from lottery import criteria, imp, masks, structures

PAGE = (Path(__file__).parents[2] / "docs" / "tickets.md").read_text(encoding="utf-8")


@pytest.mark.docs
def test_the_example_prunes_whole_blocks_to_the_allocated_counts():
    scope: dict = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(code, scope)
    kept = {path: np.asarray(mask) for path, mask in masks.flatten(scope["mask"]).items()}
    wanted = {path: 16 * count for path, count in scope["counts"].items()}
    assert {path: int(mask.sum()) for path, mask in kept.items()} == wanted
    assert sum(scope["counts"].values()) * 16 == 96, "half of 192 weights"
    assert list(scope["counts_by_layer"].values()) == [115, 77, 38, 26], "90, 60, 30 and 20% of 128"
    assert np.all(np.asarray(scope["pattern"]["net"]["weight"]).reshape(6, 2, 4).sum(-1) == 2)
    assert len(scope["rows"]) == 2 + 2 * 2 * 2
    mask, weights = scope["ticket"], scope["weights"]
    assert float(masks.density(mask, masks.prunable(mask))) == 0.25
    initial = scope["init_fn"](imp.search_keys(scope["settings"], 0, "init")[1])
    np.testing.assert_allclose(weights["Dense_0"]["kernel"], initial["Dense_0"]["kernel"] * mask["Dense_0"]["kernel"])


def test_every_criterion_and_structure_is_on_the_page():
    for name in (*criteria.CRITERIA, *structures.STRUCTURES):
        assert name in PAGE
