"""Lockstep pipeline schedules for one SPMD program: messages are used in the next tick.

A compiled program is the same on every device, so a tick of the program is F, then B, then W of those stages that have
them; a stage without one skips it, and a tick takes as long as its slowest stage. In the table
(`sharding.pipeline.schedules.Schedule`) a tick is as many rows as its busiest stage has works.

With p stages, v chunks and m microbatches, F of chunk c of microbatch i = g p + r runs on stage s in tick g p v + c p +
r + s (v = 1: tick i + s) and B in tick v p - 1 + g p v + (v-1-c) p + r + p-1-s (v = 1: i + 2 (p-1) - s), so that the
last chunk on the last stage runs F and B of a microbatch in one tick. Stage s then holds the inputs of 2 (p-s) - 1
microbatches at most, where the asynchronous timeline of the paper holds p - s; the bubble is the same. GPipe runs all
F, then all B, the last microbatch first.

ZB-H1 (Qi et al. 2023) has the F and B of 1F1B, B without the gradients of the weights, and W in what F and B leave
idle. A tick of the middle is F, B and W; in the ticks before the first B of stage 0 and after its last F there is no W
besides F and B, and the last ticks are B or W alone. So the step idles for (p-1)(F+B-W), the paper's bubble, from m = 2
(p-1) on. DualPipeV has two chunks in the form of a V: F of chunk 0 in tick 2 i + s and of chunk 1 in 2 i + 2 p-1-s, B
of chunk 1 in 2 i + 2 p + s and of chunk 0 in 2 i + 4 p-1-s. F and B of a tick are of different chunks and microbatches,
so that neither waits for the other: what F sends can be sent while B computes.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sharding.errors import PlanError
from sharding.pipeline.schedules import KINDS, Row, Schedule, Work, check, part_of, place, require_sizes

RUNNABLE = ("gpipe", "1f1b", "interleaved", "zb_h1", "dualpipev")
SPLIT = ("zb_h1", "dualpipev")
"""Schedules that run the gradients of the weights (W) apart from B."""


@dataclass(frozen=True)
class Lockstep(Schedule):
    """A schedule for one SPMD program; attributes as of `Schedule`.

    Attributes:
      starts: first row of every tick of the program.
    """

    starts: tuple[int, ...] = ()

    def works(self) -> list[list[list[Work]]]:
        """List the works of every tick and stage, in order."""
        ends = (*self.starts[1:], len(self.rows))
        blocks = [self.rows[start:end] for start, end in zip(self.starts, ends, strict=True)]
        return [[[row[s] for row in block if row[s]] for s in range(self.stages)] for block in blocks]  # type: ignore[misc]

    def bubble(self, again: float = 0.0) -> float:
        """Compute the idle fraction of a step whose ticks last as long as their slowest stage.

        Args:
          again: forward passes that B computes again. F and W take as long as each other, B as W besides, and where the
            backward pass is not split B takes the time of both.
        """
        costs = {"F": 1.0, "B": (1.0 if "W" in self.kinds else 2.0) + again, "W": 1.0}
        spent = [[sum(costs[work.kind] for work in works) for works in tick] for tick in self.works()]
        return 1 - sum(map(sum, spent)) / (self.stages * sum(map(max, spent)))

    def busy(self) -> float:
        """Fraction of the program's works that are no idle ones: of 1F1B 1 - bubble."""
        count = sum(len({work.kind for works in tick for work in works}) for tick in self.works())
        return sum(len(works) for tick in self.works() for works in tick) / (count * self.stages)


@functools.lru_cache(maxsize=256)
def lockstep_schedule(name: str, stages: int, microbatches: int, chunks: int = 1) -> Lockstep:
    """Make the lockstep schedule called `name`, one of `RUNNABLE`.

    Args:
      name: "gpipe", "1f1b", "interleaved" (1F1B over several chunks), "zb_h1" or "dualpipev".
      stages: p.
      microbatches: m.
      chunks: v; DualPipeV has two.

    Raises:
      PlanError: another name, impossible sizes (`sharding.pipeline.schedules.require_sizes`), or several chunks for a
        schedule that is not interleaved.

    Example:
      >>> from sharding.pipeline import draw, lockstep_schedule
      >>> print(draw(lockstep_schedule("gpipe", stages=2, microbatches=2), note=False))
      stage 0 | F0 F1 .  .  B1 B0
      stage 1 | .  F0 F1 B1 B0 .
    """
    if name not in RUNNABLE:
        raise PlanError(f"schedule {name!r} is not one that runs; choose one of {', '.join(RUNNABLE)}")
    folded = name == "dualpipev"
    v = 2 if folded else chunks
    if chunks not in (1, v) or (v != 1 and name not in ("interleaved", "dualpipev")):
        raise PlanError(f"{name} has one chunk per stage, not {chunks}; the schedule with several is 'interleaved'")
    require_sizes(name, stages, microbatches, v)
    p, m = stages, microbatches
    first = m + p - 1 if name == "gpipe" else v * p - 1
    ticks: list[list[list[Work]]] = []

    def put(tick: int, stage: int, work: Work) -> None:
        ticks.extend([[] for _ in range(p)] for _ in range(len(ticks), tick + 1))
        ticks[tick][stage].append(work)

    for kind in "FB":  # F first, as the program runs it
        for i in range(m):
            order = m - 1 - i if name == "gpipe" and kind == "B" else i
            for part in range(v * p):
                s, c = place(part, p, folded)
                if folded:
                    tick = 2 * i + part if kind == "F" else 2 * i + 4 * p - 1 - part
                elif kind == "F":
                    tick = i // p * p * v + i % p + part
                else:
                    tick = first + order // p * p * v + order % p + v * p - 1 - part
                put(tick, s, Work(kind, i, c))
    if name in SPLIT:
        _fill(ticks)
        rows, starts = _rows(ticks, {})
    else:
        rows, starts = _rows(ticks, {"F": 0, "B": 1})
    return Lockstep(f"{name} in lockstep", p, m, v, rows, folded, starts)


def _fill(ticks: list[list[list[Work]]]) -> None:
    """Put W where F and B leave stages idle, then beside F and B of all stages, then into ticks of its own.

    A tick lasts as long as its busiest stage, so a W beside the F and B of others costs nothing. A tick with all three
    kinds is longer by W; the earliest in which every stage has a W that waits are made so, as long as the step does not
    get longer, for the sooner W runs the less is saved for it.
    """
    room = [max(len(works) for works in tick) for tick in ticks]
    placed, waiting = _place(ticks, room)
    while True:
        more = [t for t, size in enumerate(room) if size == 2 and min(count[t] for count in waiting) > 0]
        more = more[: len(placed[0]) - len(ticks)]
        while more:
            wider = [size + (t in more) for t, size in enumerate(room)]
            found = _place(ticks, wider)
            if len(more) + len(found[0][0]) <= len(placed[0]):
                break
            more = more[: len(more) // 2]
        if not more:
            break
        room, (placed, waiting) = wider, found
    ticks += [[[] for _ in placed] for _ in range(len(placed[0]) - len(ticks))]
    for stage, one in enumerate(placed):
        for tick, work in zip(ticks, one, strict=True):
            tick[stage] += [work] if work else []


def _place(ticks: list[list[list[Work]]], room: list[int]) -> tuple[list[list[Work | None]], list[list[int]]]:
    """Place W in ticks of so much room and more at the end: each stage's W by tick, and how many wait in it."""
    placed: list[list[Work | None]] = []
    waits = []
    for stage in range(len(ticks[0])):
        waiting: list[Work] = []
        one: list[Work | None] = []
        count = []
        for tick, most in zip(ticks, room, strict=True):
            waiting += [work._replace(kind="W") for work in tick[stage] if work.kind == "B"]
            one.append(waiting.pop(0) if waiting and len(tick[stage]) < most else None)
            count.append(len(waiting))
        placed.append([*one, *waiting])
        waits.append(count)
    ends = max(map(len, placed))
    return [one + [None] * (ends - len(one)) for one in placed], waits


def _rows(ticks: list[list[list[Work]]], fixed: dict[str, int]) -> tuple[tuple[Row, ...], tuple[int, ...]]:
    """Rows of the table: a row a kind where `fixed` says which, else as many as the busiest stage has works."""
    rows: list[Row] = []
    starts = []
    for tick in ticks:
        starts.append(len(rows))
        kinds = sorted({fixed[work.kind] for works in tick for work in works}) if fixed else []
        block: list[list[Work | None]] = [[None] * len(tick) for _ in range(len(kinds) or max(map(len, tick)))]
        for stage, works in enumerate(tick):
            for k, work in enumerate(works):
                block[kinds.index(fixed[work.kind]) if fixed else k][stage] = work
        rows += [tuple(row) for row in block]
    return tuple(rows), tuple(starts)


def require_lockstep(schedule: Lockstep) -> None:
    """Refuse a table that an SPMD program with a single message per direction cannot run.

    Raises:
      ValueError: a stage has two works of a kind in a tick or not in the order F, B, W, or a message is not used in the
        next tick.
    """
    check(schedule)
    p, v, folded = schedule.stages, schedule.chunks, schedule.folded
    at: dict[tuple[int, Work], int] = {}
    for tick, stages in enumerate(schedule.works()):
        for stage, works in enumerate(stages):
            kinds = [KINDS.index(work.kind) for work in works]
            if kinds != sorted(set(kinds)):
                raise ValueError(
                    f"{schedule.name}: stage {stage} runs {works} in tick {tick}; at most F, B, W in order"
                )
            at |= {(stage, work): tick for work in works}
    for (stage, work), tick in at.items():
        # Where the output goes: the next part of the model for F, the one before for B.
        part = part_of(stage, work.chunk, p, folded) + {"F": 1, "B": -1, "W": p * v}[work.kind]
        if 0 <= part < p * v:
            other, chunk = place(part, p, folded)
            used = at[other, work._replace(chunk=chunk)]
            if used != tick + 1:
                raise ValueError(
                    f"{schedule.name}: stage {stage} sends the result of {work} in tick {tick}, but stage {other} uses "
                    f"it in tick {used}; a lockstep program uses it in tick {tick + 1}"
                )


class Phase(NamedTuple):
    """Consecutive ticks with the same kinds of work, as arrays to scan over.

    Attributes:
      kinds: the kinds in order, such as "F" or "FBW". rows: int32 [ticks, p, kinds, 5], each stage's work of every kind
      in each tick: active (0 or 1), microbatch, chunk,
        and the slots of what is saved from F to B and from B to W; zeros where idle.
    """

    kinds: str
    rows: np.ndarray


def slots(schedule: Schedule, first: str = "F", last: str = "B") -> tuple[int, list[dict[tuple[int, int], int]]]:
    """Allocate slots for what is saved from one work to another: their number, and each stage's of (microbatch, chunk).

    The number is the peak over all stages: for stage inputs, saved from F to B, 2 p - 1 for 1F1B whatever the number of
    microbatches is, m for GPipe.
    """
    number = 0
    found = []
    for spans in schedule.spans():
        slot_of: dict[tuple[int, int], int] = {}
        free_from: list[int] = []  # first row in which a slot is free again
        for work, span in sorted(spans.items(), key=lambda item: item[1].start):
            if work.kind == first:
                slot = next((k for k, row in enumerate(free_from) if row <= span.start), len(free_from))
                free_from += [0] if slot == len(free_from) else []
                free_from[slot] = spans[work._replace(kind=last)].end
                slot_of[work.microbatch, work.chunk] = slot
        number = max(number, len(free_from))
        found.append(slot_of)
    return number, found


def phases(schedule: Lockstep) -> list[Phase]:
    """Split a lockstep table into its scans: three for 1F1B (F; F and B; B), two for GPipe, five for ZB-H1.

    Raises:
      ValueError: the table is not lockstep.
    """
    require_lockstep(schedule)
    saved = slots(schedule)[1]
    rest = slots(schedule, "B", "W")[1] if "W" in schedule.kinds else [{}] * schedule.stages
    result: list[Phase] = []
    ticks = schedule.works()
    while ticks:
        kinds = [
            "".join(kind for kind in KINDS if any(work.kind == kind for works in tick for work in works))
            for tick in ticks
        ]
        same = next((k for k, found in enumerate(kinds) if found != kinds[0]), len(ticks))
        rows = np.zeros((same, schedule.stages, len(kinds[0]), 5), np.int32)
        for k, tick in enumerate(ticks[:same]):
            for stage, works in enumerate(tick):
                for kind, i, c in works:
                    where = saved[stage][i, c], rest[stage].get((i, c), 0)
                    rows[k, stage, kinds[0].index(kind)] = (1, i, c, *where)
        result.append(Phase(kinds[0], rows))
        ticks = ticks[same:]
    return result
