"""Turns, medians and ratios."""

import pytest

from scripts.benchmarks.timing import Timing, take_turns


def test_rivals_take_turns_and_warm_up_uncounted():
    calls = []
    timings = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert all(len(timing.seconds) == 3 for timing in timings.values())


def test_ratio_is_taken_round_by_round():
    fast, slow = Timing((1.0, 2.0, 4.0)), Timing((3.0, 4.0, 4.0))
    assert fast.ratio(slow) == (2.0, 1.0, 3.0)
    assert fast.median == 2.0


def test_no_rounds_is_refused():
    with pytest.raises(ValueError, match="rounds=0"):
        take_turns({}, rounds=0)
