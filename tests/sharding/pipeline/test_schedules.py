"""Pipeline schedules: formulas of the papers tick for tick, what must hold in a table, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.errors import PlanError
from sharding.pipeline.lockstep import RUNNABLE, SPLIT, lockstep_schedule, phases, require_lockstep, slots
from sharding.pipeline.schedules import Schedule, Work, bubble, bubble_formula, check, draw, live, needs, peak_live
from sharding.pipeline.timelines import (
    Ticks,
    dualpipev,
    gpipe,
    interleaved,
    one_f_one_b,
    simulate,
    timeline,
    zero_bubble,
)

NAMES = ("gpipe", "1f1b", "interleaved", "zb_h1", "zb_h2")


@st.composite
def sizes(draw_, names=NAMES):
    """(name, stages, microbatches, chunks) that a schedule can have and its formula covers."""
    name = draw_(st.sampled_from(names))
    p = draw_(st.integers(1, 6))
    if name == "dualpipev":
        return name, p, draw_(st.integers(2 * p, 4 * p + 2)), 2
    if name == "zb_h1" and "zb_h2" not in names:  # in lockstep the formula begins there
        return name, p, draw_(st.integers(max(p, 2 * (p - 1)), 4 * p + 2)), 1
    if name == "interleaved":
        return name, p, p * draw_(st.integers(1, 4)), draw_(st.integers(1, 3))
    return name, p, draw_(st.integers(2 * p - 1 if name == "zb_h2" else p, 3 * p + 2)), 1


@settings(deadline=None, max_examples=60)
@given(sizes())
def test_timelines_are_valid_and_take_exactly_the_promised_ticks(size):
    name, p, m, v = size
    schedule = timeline(name, p, m, v)
    check(schedule)
    assert bubble(schedule) == pytest.approx(bubble_formula(name, p, m, v), abs=1e-12)
    work = 3 if name.startswith("zb") else 2
    lead = {"gpipe": 2, "1f1b": 2, "interleaved": 2, "zb_h1": 1, "zb_h2": 1}[name]
    assert schedule.ticks == work * m * v + lead * (p - 1)


@settings(deadline=None, max_examples=60)
@given(sizes(RUNNABLE))
def test_lockstep_tables_have_the_same_bubble_and_every_message_is_used_at_once(size):
    name, p, m, v = size
    schedule = lockstep_schedule(name, p, m, v)
    require_lockstep(schedule)
    split = name in SPLIT
    if not split:
        assert schedule.ticks == 2 * (m * v + p - 1)
        assert slots(schedule)[0] == max(peak_live(schedule))
    idle = 1 - len(schedule.kinds) * m * v / schedule.ticks
    assert idle == pytest.approx(bubble_formula(name, p, m, v), abs=1e-12)
    assert idle - (p - 1) / schedule.ticks <= bubble(schedule) + 1e-12 <= idle + 2e-12
    for again in (0.0, 1.0, 2.5):  # ticks last as long as their slowest stage, B longer where it computes again
        assert schedule.bubble(again) == pytest.approx(bubble_formula(name, p, m, v, again), abs=1e-12)
    saved = [("F", "B"), ("B", "W")] if split else [("F", "B")]
    for stage, spans in enumerate(schedule.spans()):  # no two things in one slot at a time
        for first, last in saved:
            where = slots(schedule, first, last)[1]
            held = [
                (where[stage][w.microbatch, w.chunk], spans[w].start, spans[w._replace(kind=last)].end)
                for w in spans
                if w.kind == first
            ]
            for a, b in ((a, b) for a in held for b in held if a < b and a[0] == b[0]):
                assert a[2] <= b[1] or b[2] <= a[1]
    # The scans' rows say what the table says.
    found = phases(schedule)
    for kind in schedule.kinds:
        rows = [phase.rows[:, :, phase.kinds.index(kind)] for phase in found if kind in phase.kinds]
        assert all(one.shape[1:] == (p, 5) for one in rows)
        assert np.concatenate(rows)[..., 0].sum() == p * m * v, kind


@pytest.mark.parametrize("p, m", [(1, 1), (2, 2), (4, 8), (5, 23), (8, 64)])
def test_live_activations_are_those_of_the_papers(p, m):
    assert peak_live(gpipe(p, m)) == [m] * p
    assert peak_live(one_f_one_b(p, m)) == [p - s for s in range(p)]
    assert max(peak_live(zero_bubble(p, m, "zb_h1"))) <= p
    assert max(peak_live(zero_bubble(p, m, "zb_h2"))) <= 2 * p - 1
    # Stages that keep step hold more: 2 (p - s) - 1, still whatever m is.
    assert peak_live(lockstep_schedule("1f1b", p, m)) == [min(m, 2 * (p - s) - 1) for s in range(p)]
    assert slots(lockstep_schedule("gpipe", p, m))[0] == m
    # Of ZB-H1 inputs as of 1F1B, and no more than these again of residuals for W.
    zero = lockstep_schedule("zb_h1", p, m)
    assert slots(zero)[0] == min(m, 2 * p - 1) and slots(zero, "B", "W")[0] == min(m, max(1, 2 * (p - 1)))
    assert max(peak_live(zero)) == min(m, 2 * p - 1)


@pytest.mark.parametrize("p, m", [(1, 2), (2, 4), (3, 8), (4, 10), (6, 20)])
def test_dualpipev_has_the_activations_and_the_bubble_of_its_publication(p, m):
    """DeepSeek-AI's table, for PP = 2 p: PP + 1 live chunks, and (PP/2 - 1)(F&B + B - 3 W) idle, B there with W."""
    schedule = dualpipev(p, m)
    check(schedule)
    assert peak_live(schedule) == [2 * p + 1] * p
    for ticks in (Ticks(), Ticks(10, 10, 8), Ticks(20, 20, 19)):
        f, b, w = ticks.F, ticks.B, ticks.W
        assert _in_blocks(schedule, ticks) - 2 * m * (f + b + w) == (p - 1) * ((f + b + w) + (b + w) - 3 * w)
        # Where F and B send what they have made at once, half of it.
        assert dualpipev(p, m, ticks).ticks - 2 * m * (f + b + w) == (p - 1) * (f + b - w)
    lockstep = lockstep_schedule("dualpipev", p, m)
    assert lockstep.ticks - 6 * m == 2 * (p - 1)
    assert slots(lockstep)[0] == 2 * p + 1 and slots(lockstep, "B", "W")[0] <= 2 * p + 1
    assert max(peak_live(lockstep)) <= 3 * p + 1
    for works in (works for tick in lockstep.works() for works in tick):
        forward = [work.microbatch for work in works if work.kind == "F"]
        assert all(work.microbatch not in forward for work in works if work.kind == "B"), "F and B wait for each other"


def _in_blocks(schedule, ticks):
    """The time of a step whose pairs of F and B (with its W) are one block each, and send at its end."""
    p, m = schedule.stages, schedule.microbatches
    queues = []
    for stage, spans in enumerate(schedule.spans()):
        order = sorted(spans, key=lambda work: spans[work].start)
        rest, sizes = p - stage - 1, []
        sizes += [1] * (2 * p + 3 * rest)  # first forward passes; then B, W, F
        pairs = [3, 3] * (m - 2 * p + stage + 1)
        sizes += ([1, 2, *pairs[1:]] if stage == p - 1 else pairs) + [2, 3] * rest
        blocks, at = [], 0
        for size in sizes:
            blocks, at = [*blocks, order[at : at + size]], at + size
        while at < len(order):
            size = 1 + (order[at].kind == "B" and order[at + 1 : at + 2] == [order[at]._replace(kind="W")])
            blocks, at = [*blocks, order[at : at + size]], at + size
        queues.append(blocks)
    end, free = [{} for _ in range(p)], [0] * p
    while any(queues):
        for stage, queue in enumerate(queues):
            while queue:
                found = [one for work in queue[0] for one in needs(work, stage, p, 2, True)]
                wanted = [(s, n) for s, n in found if s != stage or n not in queue[0]]
                if any(n not in end[s] for s, n in wanted):
                    break
                block = queue.pop(0)
                begin = max([free[stage], *(end[s][n] for s, n in wanted)])
                free[stage] = begin + sum(getattr(ticks, work.kind) for work in block)
                end[stage] |= dict.fromkeys(block, free[stage])
    return max(free)


def test_interleaved_holds_more_by_the_papers_factor():
    # Korthikanti et al. (2022), section 4.2.3: 1 + (p - 1) / (p v) times the activations of 1F1B.
    p, m, v = 4, 16, 2
    assert max(peak_live(interleaved(p, m, v))) / v / max(peak_live(one_f_one_b(p, m))) == 1 + (p - 1) / (p * v)


def test_1f1b_runs_in_three_scans_and_at_the_ticks_of_the_design():
    p, m = 4, 8
    found = phases(lockstep_schedule("1f1b", p, m))
    assert [(x.kinds, len(x.rows)) for x in found] == [("F", 3), ("FB", 8), ("B", 3)]
    for kind, first, tick in (
        ("F", 0, lambda i, s: i + s),
        ("B", p - 1, lambda i, s: i + 2 * (p - 1) - s),
    ):
        rows = np.concatenate([x.rows[:, :, x.kinds.index(kind)] for x in found if kind in x.kinds])
        for at, stage in zip(*np.nonzero(rows[..., 0]), strict=True):
            assert first + at == tick(rows[at, stage, 1], stage)
    assert [x.kinds for x in phases(lockstep_schedule("gpipe", p, m))] == ["F", "B"]
    zero = [(x.kinds, len(x.rows)) for x in phases(lockstep_schedule("zb_h1", p, m))]
    assert zero == [("F", 3), ("FB", 3), ("FBW", 5), ("BW", 3), ("W", 3)]


def test_a_backward_pass_twice_as_long_leaves_the_fraction_as_it_is():
    # Time of a step in forward passes: (m + p - 1) (1 + 2), Narayanan et al. (2021), section 2.2.1.
    for make in (gpipe, one_f_one_b):
        schedule = make(4, 8, Ticks(B=2))
        check(schedule)
        assert schedule.ticks == (8 + 3) * 3 and bubble(schedule) == pytest.approx(3 / 11)


def test_drawings():
    assert draw(one_f_one_b(2, 2), note=False) == "stage 0 | F0 F1 .  B0 .  B1\nstage 1 | .  F0 B0 F1 B1 ."
    assert "F3.1" in draw(interleaved(2, 4, 2)) and "bubble 11.1%" in draw(interleaved(2, 4, 2))
    assert "live activations by stage [2, 1]" in draw(one_f_one_b(2, 4))


def changed(schedule, tick, stage, work):
    rows = [list(row) for row in schedule.rows]
    rows[tick][stage] = work
    return replace(schedule, rows=tuple(map(tuple, rows)))


GOOD = one_f_one_b(2, 2)
BAD_TABLES = {
    "missing": (changed(GOOD, 1, 0, None), r"stage 0 never runs .*'F', microbatch=1.* \(1 missing"),
    "twice": (changed(GOOD, 2, 0, Work("F", 0)), "runs .* in tick 0 and again in tick 2"),
    "unknown": (changed(GOOD, 2, 0, Work("F", 7)), "but there are 2 microbatches"),
    "early": (changed(changed(GOOD, 0, 1, Work("F", 0)), 1, 1, None), "starts .* in tick 0, .* stage 0 ends in tick 0"),
    "ragged": (replace(GOOD, rows=((None,), *GOOD.rows[1:])), "tick 0 has 1 cells for 2 stages"),
    "no backward": (Schedule("x", 1, 1, 1, ((Work("F", 0),),)), "never runs .*'B'"),
}


@pytest.mark.parametrize("table, message", BAD_TABLES.values(), ids=BAD_TABLES)
def test_tables_that_are_no_step_are_refused(table, message):
    with pytest.raises(ValueError, match=message):
        check(table)


def test_tables_that_cannot_run_in_lockstep_are_refused():
    late = lockstep_schedule("gpipe", 2, 2)
    with pytest.raises(ValueError, match="at most F, B, W in order"):
        require_lockstep(replace(late, starts=(0, *late.starts[2:])))
    rows = (late.rows[0], (late.rows[1][0], None), (None, Work("F", 0)), *late.rows[2:])
    with pytest.raises(ValueError, match="in tick 0, but stage 1 uses it in tick 2"):
        require_lockstep(replace(late, rows=rows, starts=tuple(range(len(rows)))))
    with pytest.raises(ValueError, match="deadlock"):
        simulate(1, [[Work("B", 0), Work("F", 0)]])


REFUSED = [
    (
        lambda: lockstep_schedule("1f1b", 4, 3),
        "3 microbatches cannot fill 4 stages; take at least 4 microbatches, or at most 3",
    ),
    (lambda: lockstep_schedule("interleaved", 4, 6, 2), "does not divide 6; take 4 or 8 microbatches"),
    (lambda: lockstep_schedule("1f1b", 4, 8, 2), "1f1b has one chunk per stage, not 2"),
    (lambda: timeline("gpipe", 4, 8, 2), "gpipe has one chunk per stage, not 2"),
    (lambda: lockstep_schedule("zb_h2", 4, 8), "'zb_h2' is not one that runs"),
    (lambda: lockstep_schedule("zb_h1", 4, 8, 2), "zb_h1 has one chunk per stage, not 2"),
    (lambda: dualpipev(4, 7), "7 microbatches are fewer than twice the 4 stages"),
    (lambda: timeline("2f2b", 4, 8), "no schedule '2f2b'; choose one of gpipe"),
    (lambda: gpipe(0, 8), "stages=0 must be at least 1"),
    (lambda: zero_bubble(2, 4, "zb_v"), "zb_v"),
    (lambda: bubble_formula("zb_h2", 4, 6), "from 2 p - 1 = 7 microbatches on; 6 are fewer"),
    (lambda: bubble_formula("dualpipex", 4, 6), "no bubble formula"),
    (lambda: Ticks(B=0), "B=0"),
]


@pytest.mark.parametrize("call, message", REFUSED, ids=[message[:24] for _, message in REFUSED])
def test_sizes_are_refused_with_the_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    assert issubclass(PlanError, ValueError)


def test_live_counts_ticks():
    assert live(one_f_one_b(2, 2)) == [[1, 2, 2, 2, 1, 1], [0, 1, 1, 1, 1, 0]]


NEEDED = {
    "the first part": (Work("F", 3), 0, []),
    "the next stage": (Work("F", 3), 1, [(0, Work("F", 3))]),
    "the next chunk": (Work("F", 3, 1), 0, [(2, Work("F", 3, 0))]),
    "the last part backward": (Work("B", 3, 1), 2, [(2, Work("F", 3, 1))]),
    "the stage before": (Work("B", 3, 1), 1, [(1, Work("F", 3, 1)), (2, Work("B", 3, 1))]),
    "the chunk before": (Work("B", 3, 0), 2, [(2, Work("F", 3, 0)), (0, Work("B", 3, 1))]),
    "a weight gradient": (Work("W", 3, 0), 1, [(1, Work("B", 3, 0))]),
}


@pytest.mark.parametrize(("work", "stage", "expected"), NEEDED.values(), ids=NEEDED)
def test_what_a_work_waits_for(work, stage, expected):
    """Three stages of two chunks: parts 0 to 5 of the model are chunk 0 of stages 0, 1, 2, then chunk 1."""
    assert list(needs(work, stage, 3, 2)) == expected
