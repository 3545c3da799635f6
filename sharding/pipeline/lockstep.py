"""Lockstep pipeline schedules (GPipe, 1F1B, interleaved 1F1B) for one SPMD program: messages are used in the next tick.

A compiled program is the same on every device, so a tick of the program is one F of some stages, or one B, or first F
then B; a stage without work in it idles. In the table (`sharding.pipeline.schedules.Schedule`) the rows of such a
program hold one kind of work each: an F row, or a B row, or an F row followed by a B row.

With p stages, v chunks and m microbatches, F of chunk c of microbatch i = g p + r runs on stage s in F row
g p v + c p + r + s (v = 1: row i + s) and B in B row g p v + (v-1-c) p + r + p-1-s (v = 1: row i + p-1-s). In 1F1B
the first B row follows F row v p - 1, so that the last chunk on the last stage runs F and B of a microbatch in one
tick; for v = 1, B of i runs in tick i + 2 (p-1) - s. Stage s then holds the inputs of 2 (p-s) - 1 microbatches at
most, where the asynchronous timeline of the paper holds p - s; the bubble is the same. GPipe runs all F rows, then all
B rows, the last microbatch first.
"""

from typing import NamedTuple

import numpy as np

from sharding.errors import PlanError
from sharding.pipeline.schedules import Row, Schedule, Work, check, require_sizes

RUNNABLE = ("gpipe", "1f1b", "interleaved")


def lockstep_schedule(name: str, stages: int, microbatches: int, chunks: int = 1) -> Schedule:
    """Make the lockstep schedule called `name`: "gpipe", "1f1b" or "interleaved" (1F1B over several chunks).

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
    if chunks != 1 and name != "interleaved":
        raise PlanError(f"{name} has one chunk per stage, not {chunks}; the schedule with several is 'interleaved'")
    require_sizes(name, stages, microbatches, chunks)
    p, m, v = stages, microbatches, chunks
    count = m * v + p - 1
    forward: list[list[Work | None]] = [[None] * p for _ in range(count)]
    backward: list[list[Work | None]] = [[None] * p for _ in range(count)]
    for i in range(m):
        for c in range(v):
            for s in range(p):
                forward[i // p * p * v + c * p + i % p + s][s] = Work("F", i, c)
                order = m - 1 - i if name == "gpipe" else i
                backward[order // p * p * v + (v - 1 - c) * p + order % p + p - 1 - s][s] = Work("B", i, c)
    first = count if name == "gpipe" else v * p - 1  # the tick of the first B row
    rows: list[Row] = []
    for tick in range(first + count):
        rows += [tuple(forward[tick])] if tick < count else []
        rows += [tuple(backward[tick - first])] if tick >= first else []
    return Schedule(f"{name} in lockstep", p, m, v, tuple(rows))


def require_lockstep(schedule: Schedule) -> None:
    """Refuse a table that an SPMD program with a single message per direction cannot run.

    Raises:
      ValueError: a row holds two kinds of work, there is W, or a message is not used in the next row of its kind.
    """
    check(schedule)
    place: dict[tuple[int, Work], int] = {}
    count = {"F": 0, "B": 0}
    for tick, row in enumerate(schedule.rows):
        kinds = {work.kind for work in row if work}
        if len(kinds) != 1 or not kinds <= set(count):
            raise ValueError(
                f"{schedule.name}: row {tick} holds {sorted(kinds) or 'nothing'}; it must hold F or B alone"
            )
        kind = kinds.pop()
        place.update({(stage, work): count[kind] for stage, work in enumerate(row) if work})
        count[kind] += 1
    p, v = schedule.stages, schedule.chunks
    for (stage, work), at in place.items():
        # Where the output goes: the next part of the model for F, the one before for B.
        part = work.chunk * p + stage + (1 if work.kind == "F" else -1)
        if 0 <= part < p * v:
            used = place[part % p, work._replace(chunk=part // p)]
            if used != at + 1:
                raise ValueError(
                    f"{schedule.name}: stage {stage} sends the result of {work} in {work.kind} row {at}, but stage "
                    f"{part % p} uses it in row {used}; a lockstep program uses it in row {at + 1}"
                )


class Phase(NamedTuple):
    """Consecutive ticks with the same kinds of work, as arrays to scan over.

    Attributes:
      kinds: "F", "B" or "FB" (F, then B).
      forward: int32 [ticks, p, 4], each stage's F in each tick: active (0 or 1), microbatch, chunk, and the slot where
        its input is saved for the backward pass; zeros where idle. Empty for kind "B".
      backward: the same of B, with the slot of the saved input.
    """

    kinds: str
    forward: np.ndarray
    backward: np.ndarray


def slots(schedule: Schedule) -> tuple[int, list[dict[tuple[int, int], int]]]:
    """Allocate slots for saved stage inputs: their number, and for every stage the slot of each (microbatch, chunk).

    A slot is used from F to B. The number is the peak of live activations over all stages: 2 p - 1 for 1F1B whatever
    the number of microbatches, m for GPipe.
    """
    number = 0
    found = []
    for spans in schedule.spans():
        slot_of: dict[tuple[int, int], int] = {}
        free_from: list[int] = []  # first row in which a slot is free again
        for work, span in sorted(spans.items(), key=lambda item: item[1].start):
            if work.kind == "F":
                slot = next((k for k, row in enumerate(free_from) if row <= span.start), len(free_from))
                free_from += [0] if slot == len(free_from) else []
                free_from[slot] = spans[work._replace(kind="B")].end
                slot_of[work.microbatch, work.chunk] = slot
        number = max(number, len(free_from))
        found.append(slot_of)
    return number, found


def phases(schedule: Schedule) -> list[Phase]:
    """Split a lockstep table into its scans: three for 1F1B (F; F and B; B), two for GPipe.

    Raises:
      ValueError: the table is not lockstep.
    """
    require_lockstep(schedule)
    kinds = "".join(next(work.kind for work in row if work) for row in schedule.rows)
    # Pairs first, but a single pair (the turn of GPipe) is cheaper as the end of one scan and the start of the
    # next.
    ticks: list[str] = []
    while kinds:
        step = "FB" if kinds.startswith("FBFB") or (ticks[-1:] == ["FB"] and kinds.startswith("FB")) else kinds[0]
        ticks.append(step)
        kinds = kinds[len(step) :]
    where = slots(schedule)[1]
    result: list[Phase] = []
    row = 0
    while ticks:
        same = next((k for k, tick in enumerate(ticks) if tick != ticks[0]), len(ticks))
        step, ticks = ticks[0], ticks[same:]
        block = schedule.rows[row : row + same * len(step)]
        row += same * len(step)
        arrays = {kind: np.zeros((same if kind in step else 0, schedule.stages, 4), np.int32) for kind in "FB"}
        for k, cells in enumerate(block):
            for stage, work in enumerate(cells):
                if work:
                    slot = where[stage][work.microbatch, work.chunk]
                    arrays[work.kind][k // len(step), stage] = (1, work.microbatch, work.chunk, slot)
        result.append(Phase(step, arrays["F"], arrays["B"]))
    return result
