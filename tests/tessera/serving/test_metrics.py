"""Counts of a histogram against its definition."""

import pytest

from tessera.serving.metrics import Histogram, histogram


@pytest.mark.parametrize("values", [(), (0.5,), (0.5, 1.0, 1.5, 9.0)])
def test_buckets_count_what_is_up_to_their_bounds(values):
    found = Histogram((1.0, 2.0))
    for value in values:
        found.add(value)
    below = [sum(value <= bound for value in values) for bound in found.bounds]
    assert (found.below, found.total, found.sum) == (below, len(values), sum(values))
    text = "\n".join(histogram("wait_seconds", "Waiting.", found))
    assert f'le="2.0"}} {below[1]}' in text and f'le="+Inf"}} {len(values)}' in text
