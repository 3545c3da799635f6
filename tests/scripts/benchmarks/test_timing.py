"""Turns, medians and ratios."""

import time

import pytest

from scripts.benchmarks.timing import Contest, Timing, take_turns


def test_contestants_take_turns_and_warm_up_uncounted():
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


def test_a_contestant_that_takes_too_long_has_one_round():
    calls = []

    def slow():
        calls.append("slow")
        time.sleep(0.02)

    timings = take_turns({"slow": slow, "fast": lambda: None}, rounds=4, warmup=1, patience=0.01)
    assert len(timings["slow"].seconds) == 1 and len(timings["fast"].seconds) == 4 and calls == ["slow"] * 2
    assert timings["slow"].ratio(timings["fast"])[0] < 1


def test_rows_compare_rates_of_work():
    """Half the time for a quarter of the work is half the rate."""
    clock = iter([0.0, 1.0, 10.0, 12.0])  # ours: 1 s, the baseline: 2 s
    contest = Contest("a", {"ours": lambda: None, "base": lambda: None}, "base", {"ours": 5.0, "base": 20.0}, 1, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: next(clock))
        ours, base = contest.rows(lambda name, timing: {"name": name})
    assert ours.rate == 5.0 and base.rate == 10.0 and ours.ratio == (0.5, 0.5, 0.5) and base.ratio is None
    assert ours.baseline == "base" and ours.more == {"name": "ours"} and ours.as_json()["seconds"] == 1.0
