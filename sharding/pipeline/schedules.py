"""Pipeline schedules as data: a table of ticks x stages whose cells say what a stage does in a tick.

A model is cut into `stages * chunks` parts of consecutive layers; part k is chunk k // stages of stage k % stages, so
that chunks > 1 goes round the stages several times. A batch is cut into microbatches. The work of one stage on one
chunk of one microbatch is a forward pass F, a backward pass B and, where a schedule splits it off, the gradient of
the weights W (B is then the gradient of the input alone). This module has the table, what can be read off it, and
what must hold in it; `sharding.pipeline.timelines` makes the tables of the known schedules and
`sharding.pipeline.lockstep` those that one SPMD program can run.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from sharding.errors import PlanError

KINDS = ("F", "B", "W")


class Work(NamedTuple):
    """What a cell holds: kind "F", "B" or "W", the microbatch, and the stage's chunk (0 unless interleaved)."""

    kind: str
    microbatch: int
    chunk: int = 0


class Span(NamedTuple):
    """When a work runs: the ticks start, start + 1, ..., end - 1."""

    start: int
    end: int


Row = tuple[Work | None, ...]


@dataclass(frozen=True)
class Schedule:
    """A timeline of one training step.

    Attributes:
      name: what to call it.
      stages: p.
      microbatches: m.
      chunks: v, parts of the model on one stage.
      rows: one tuple per tick with a cell per stage; None is an idle stage. Work that takes several ticks fills
        several consecutive cells.
    """

    name: str
    stages: int
    microbatches: int
    chunks: int
    rows: tuple[Row, ...]

    @property
    def ticks(self) -> int:
        """Number of ticks from the first work to the last."""
        return len(self.rows)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of work that occur, in the order of `KINDS`."""
        found = {cell.kind for row in self.rows for cell in row if cell}
        return tuple(kind for kind in KINDS if kind in found)

    def spans(self) -> list[dict[Work, Span]]:
        """For every stage, when each work runs.

        Raises:
          ValueError: a work's cells are not consecutive, so it runs twice or is interrupted.
        """
        found: list[dict[Work, Span]] = [{} for _ in range(self.stages)]
        for tick, row in enumerate(self.rows):
            for stage, work in enumerate(row):
                if work is None:
                    continue
                start, end = found[stage].get(work, Span(tick, tick))
                if end != tick:
                    raise ValueError(
                        f"{self.name}: stage {stage} runs {work} in tick {end - 1} and again in tick {tick}"
                    )
                found[stage][work] = Span(start, tick + 1)
        return found


def needs(work: Work, stage: int, stages: int, chunks: int) -> Iterator[tuple[int, Work]]:
    """Yield the (stage, work) pairs that must have ended before `work` may start on `stage`."""
    kind, i, c = work
    if kind == "F":
        if stage > 0:
            yield stage - 1, Work("F", i, c)
        elif c > 0:
            yield stages - 1, Work("F", i, c - 1)
    elif kind == "B":
        yield stage, Work("F", i, c)
        if stage < stages - 1:
            yield stage + 1, Work("B", i, c)
        elif c < chunks - 1:
            yield 0, Work("B", i, c + 1)
    else:
        yield stage, Work("B", i, c)


def check(schedule: Schedule) -> None:
    """Refuse a table that is not a training step.

    Every stage must run every kind of work exactly once for each microbatch and chunk, without interruption, and
    nothing before what it needs (`needs`) has ended.

    Raises:
      ValueError: says which stage, work and ticks break this.
    """
    for tick, row in enumerate(schedule.rows):
        if len(row) != schedule.stages:
            raise ValueError(f"{schedule.name}: tick {tick} has {len(row)} cells for {schedule.stages} stages")
    spans = schedule.spans()
    every = {
        Work(kind, i, c)
        for kind in dict.fromkeys((*schedule.kinds, "F", "B"))
        for i in range(schedule.microbatches)
        for c in range(schedule.chunks)
    }
    for stage, found in enumerate(spans):
        if missing := sorted(every - set(found)):
            raise ValueError(f"{schedule.name}: stage {stage} never runs {missing[0]} ({len(missing)} missing in all)")
        if extra := sorted(set(found) - every):
            raise ValueError(
                f"{schedule.name}: stage {stage} runs {extra[0]}, but there are {schedule.microbatches} microbatches "
                f"and {schedule.chunks} chunks"
            )
        for work, span in found.items():
            for other, needed in needs(work, stage, schedule.stages, schedule.chunks):
                if (end := spans[other][needed].end) > span.start:
                    raise ValueError(
                        f"{schedule.name}: stage {stage} starts {work} in tick {span.start}, but {needed} on stage "
                        f"{other} ends in tick {end - 1}; it may start in tick {end} at the earliest"
                    )


def bubble(schedule: Schedule) -> float:
    """Idle fraction of a step: 1 - work / (stages x time), in [0, 1).

    As in Qi et al. (2023), section 5.3, the time is that of the stage that is longest at it, from its first work to its
    last: what a stage waits before it starts, the next step can fill unless something synchronises the stages. For
      GPipe,
    1F1B and interleaved 1F1B stage 0 begins and ends the step, so this is the whole table.
    """
    spans = schedule.spans()
    busy = sum(span.end - span.start for found in spans for span in found.values())
    time = max(max(s.end for s in found.values()) - min(s.start for s in found.values()) for found in spans)
    return 1 - busy / (schedule.stages * time)


def bubble_formula(name: str, stages: int, microbatches: int, chunks: int = 1) -> float:
    """The bubble the papers promise, as a fraction of the step, where F, B and W take equal time.

    (p-1)/(m+p-1) for "gpipe" (Huang et al. 2019, section 2.3) and "1f1b"; (p-1)/(v m+p-1) for "interleaved" (Narayanan
    et al. 2021, section 2.2, who divide by the work alone: (p-1)/(v m)); (p-1)/(3 m+p-1) for "zb-h1" and 0 for
    "zb-h2" from m = 2 p - 1 on (Qi et al. 2023, table 2).

    Raises:
      ValueError: no formula for `name`, or too few microbatches for it.
    """
    p, m = stages, microbatches
    formulas = {"gpipe": m, "1f1b": m, "interleaved": chunks * m, "zb-h1": 3 * m}
    if name == "zb-h2":
        if m < 2 * p - 1:
            raise ValueError(f"zb-h2 has no bubble from 2 p - 1 = {2 * p - 1} microbatches on; {m} are fewer")
        return 0.0
    if name not in formulas:
        raise ValueError(f"no bubble formula for {name!r}; there are {', '.join((*formulas, 'zb-h2'))}")
    return (p - 1) / (formulas[name] + p - 1)


def live(schedule: Schedule) -> list[list[int]]:
    """Activations held by each stage in each tick, in units of one chunk of one microbatch: [stage][tick].

    A microbatch's activations are held from the tick its F starts until its B ends, or its W where B and W are split
    (what a matrix product's weight gradient needs is its input).
    """
    last = "W" if "W" in schedule.kinds else "B"
    result = []
    for found in schedule.spans():
        held = [0] * schedule.ticks
        for work, span in found.items():
            if work.kind == "F":
                for tick in range(span.start, found[work._replace(kind=last)].end):
                    held[tick] += 1
        result.append(held)
    return result


def peak_live(schedule: Schedule) -> list[int]:
    """The most activations each stage ever holds, in units of one chunk of one microbatch (1 / v of a stage's
    layers)."""
    return [max(held) for held in live(schedule)]


def draw(schedule: Schedule, note: bool = True) -> str:
    """The table as text: a line per stage, a column per tick.

    F3 is the forward pass of microbatch 3, B3 and W3 its backward passes, F3.1 that of chunk 1, a dot an idle tick.
    With `note` a last line has the bubble and the peak of live activations.
    """

    def cell(work: Work | None) -> str:
        if work is None:
            return "."
        return f"{work.kind}{work.microbatch}" + (f".{work.chunk}" if schedule.chunks > 1 else "")

    cells = [[cell(work) for work in row] for row in schedule.rows]
    wide = max(len(text) for row in cells for text in row)
    lines = []
    for stage in range(schedule.stages):
        line = " ".join(row[stage].ljust(wide) for row in cells)
        lines.append(f"stage {stage:>{len(str(schedule.stages - 1))}} | {line.rstrip()}")
    if note:
        lines.append(summary(schedule))
    return "\n".join(lines)


def summary(schedule: Schedule) -> str:
    """One line: name, sizes, ticks, bubble and peak of live activations of every stage."""
    chunks = f", {schedule.chunks} chunks" if schedule.chunks > 1 else ""
    return (
        f"{schedule.name}: {schedule.stages} stages, {schedule.microbatches} microbatches{chunks}; "
        f"{schedule.ticks} ticks, bubble {100 * bubble(schedule):.1f}%, live activations by stage {peak_live(schedule)}"
    )


def require_sizes(name: str, stages: int, microbatches: int, chunks: int = 1) -> None:
    """Refuse sizes no pipeline can have.

    Raises:
      PlanError: a size below 1, fewer microbatches than stages, or an interleaved pipeline whose microbatches are
        not a multiple of its stages; says the nearest valid number.
    """
    sizes: Mapping[str, int] = {"stages": stages, "microbatches": microbatches, "chunks": chunks}
    for what, size in sizes.items():
        if size < 1:
            raise PlanError(f"{name}: {what}={size} must be at least 1")
    if microbatches < stages:
        raise PlanError(
            f"{name}: {microbatches} microbatches cannot fill {stages} stages; take at least {stages} microbatches, "
            f"or at most {microbatches} stages"
        )
    if chunks > 1 and microbatches % stages:
        low = microbatches - microbatches % stages
        raise PlanError(
            f"{name}: with {chunks} chunks per stage the microbatches go round in groups of {stages} (the stages), "
            f"which does not divide {microbatches}; take {low} or {low + stages} microbatches"
        )
