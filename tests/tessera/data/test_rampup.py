"""Batch-size ramp: Megatron-LM's sizes, the order of the data without a ramp, exact resumption."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.data.loader import token_batches
from tessera.data.rampup import RampedBatches, RampUp, stages

RAMP = RampUp(4, 4, 40, 12)


def megatron(start, increment, samples, target, seen):
    """Batch size by Megatron-LM's documentation of --rampup-batch-size: equal shares of the samples for every size."""
    if seen > samples:
        return target
    each = samples / ((target - start) // increment)
    return start + int(seen / each) * increment


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.integers(1, 200), st.integers(1, 60))
@settings(max_examples=60)
def test_sizes_are_megatrons_and_the_stages_say_them(start, increment, number, samples, steps):
    target = start + increment * number
    ramp = RampUp(start, increment, samples, target)
    sizes, seen = [], 0
    for _ in range(steps):
        sizes.append(ramp.size(seen))
        if seen * number % samples:  # elsewhere the two differ by the rounding of a quotient
            assert sizes[-1] == megatron(start, increment, samples, target, seen)
        seen += sizes[-1]
    told = [one.size for one in stages(ramp, steps) for _ in range(one.first, one.last + 1)]
    assert told == sizes
    assert all(one.seen == sum(sizes[: one.first - 1]) for one in stages(ramp, steps))


def batches(ramp=RAMP, **options):
    tokens = np.arange(4001, dtype=np.int32) % 97
    size = 4 if ramp else 12
    found = token_batches(tokens, batch_size=ramp.unit if ramp else size, length=8, seed=1, **options)
    return RampedBatches(found, ramp) if ramp else found


def test_the_order_is_that_of_equal_batches_and_goes_on_where_it_was():
    plain, ramped = batches(None), batches()
    expected = np.concatenate([next(plain)["ids"] for _ in range(20)])
    found, states = [], []
    for _ in range(12):
        states.append(ramped.get_state())
        found.append(next(ramped)["ids"])
    assert [len(ids) for ids in found] == [4] * 5 + [8] * 3 + [12] * 4  # 20 samples each, the second to 44
    np.testing.assert_array_equal(np.concatenate(found), expected[: sum(map(len, found))])
    for at in (0, 3, 5, 7, 11):
        again = batches()
        again.set_state(states[at])
        for ids in found[at:]:
            np.testing.assert_array_equal(next(again)["ids"], ids)


def test_two_processes_share_every_batch():
    whole, parts = batches(), [batches(process_index=i, process_count=2) for i in range(2)]
    for _ in range(9):
        ids = [next(part)["ids"] for part in parts]
        np.testing.assert_array_equal(np.stack(ids, 1).ravel(), next(whole)["ids"])


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((0, 4, 40, 12), "positive numbers"),
        ((12, 4, 40, 12), "a start below batch_size=12"),
        ((4, 3, 40, 12), "increments of 3 do not lead from start=4 to batch_size=12: choose a divisor of 8"),
    ],
)
def test_sizes_that_make_no_ramp_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        RampUp(*sizes)
