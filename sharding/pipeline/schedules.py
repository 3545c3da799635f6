"""Pipeline schedules as tables of ticks x stages: validity, bubble, peak of live activations, drawing.

A model is split into `stages * chunks` parts of consecutive layers; part k is chunk k // stages of stage k % stages, so
that chunks > 1 goes round the stages several times, or to and fro where the pipeline is folded (`place`). A batch is
split into microbatches. The work of one stage on one chunk of one microbatch is a forward pass F, a backward pass B
and, in schedules that split it (zero bubble), the gradient of the weights W (B is then the gradient of the input
alone). `sharding.pipeline.timelines` makes the tables of the published schedules and `sharding.pipeline.lockstep` the
ones for one SPMD program.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from sharding.errors import PlanError

KINDS = ("F", "B", "W")


class Work(NamedTuple):
    """The work of a cell: kind "F", "B" or "W", the microbatch, and the stage's chunk (0 unless interleaved).

    Example:
      >>> from sharding.pipeline import Work
      >>> Work("F", microbatch=3).chunk
      0
    """

    kind: str
    microbatch: int
    chunk: int = 0


class Span(NamedTuple):
    """The ticks of a work: start, start + 1, ..., end - 1."""

    start: int
    end: int


Row = tuple[Work | None, ...]


@dataclass(frozen=True)
class Schedule:
    """A timeline of one training step.

    Attributes:
      name: of the schedule.
      stages: p.
      microbatches: m.
      chunks: v, parts of the model on one stage.
      rows: one tuple per tick with a cell per stage; None is an idle stage. Work of several ticks fills several
        consecutive cells.
      folded: odd chunks go back from the last stage to the first (a V for two), see `place`.

    Example:
      >>> from sharding.pipeline import timeline
      >>> schedule = timeline("1f1b", stages=4, microbatches=8)
      >>> schedule.ticks, schedule.rows[0]
      (22, (Work(kind='F', microbatch=0, chunk=0), None, None, None))
    """

    name: str
    stages: int
    microbatches: int
    chunks: int
    rows: tuple[Row, ...]
    folded: bool = False

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
        """Find, for every stage, the span of each work.

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


def place(part: int, stages: int, folded: bool = False) -> tuple[int, int]:
    """Find the (stage, chunk) of a part of the model; of a folded pipeline the odd chunks run from last to first stage.

    Example:
      >>> from sharding.pipeline import place
      >>> [place(part, stages=2, folded=True) for part in range(4)]
      [(0, 0), (1, 0), (1, 1), (0, 1)]
    """
    chunk, at = divmod(part, stages)
    return (stages - 1 - at if folded and chunk % 2 else at), chunk


def part_of(stage: int, chunk: int, stages: int, folded: bool = False) -> int:
    """Undo `place`: the part of the model that is a chunk of a stage."""
    return chunk * stages + (stages - 1 - stage if folded and chunk % 2 else stage)


def needs(work: Work, stage: int, stages: int, chunks: int, folded: bool = False) -> Iterator[tuple[int, Work]]:
    """Yield the (stage, work) pairs that must have ended before `work` may start on `stage`."""
    kind, i, c = work
    if kind == "W":
        yield stage, Work("B", i, c)
        return
    if kind == "B":
        yield stage, Work("F", i, c)
    part = part_of(stage, c, stages, folded) + (-1 if kind == "F" else 1)
    if 0 <= part < stages * chunks:
        other, chunk = place(part, stages, folded)
        yield other, Work(kind, i, chunk)


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
            for other, needed in needs(work, stage, schedule.stages, schedule.chunks, schedule.folded):
                if (end := spans[other][needed].end) > span.start:
                    raise ValueError(
                        f"{schedule.name}: stage {stage} starts {work} in tick {span.start}, but {needed} on stage "
                        f"{other} ends in tick {end - 1}; it may start in tick {end} at the earliest"
                    )


def bubble(schedule: Schedule) -> float:
    """Compute the pipeline bubble, the idle fraction of a step: 1 - work / (stages x time), in [0, 1).

    As in Qi et al. (2023), section 5.3, the time is the longest of a stage's from its first work to its last: the wait
    of a stage before it starts can be filled by the next step unless the stages are synchronized. For GPipe, 1F1B and
    interleaved 1F1B stage 0 begins and ends the step, so this is the full table.

    Example:
      >>> from sharding.pipeline import bubble, timeline
      >>> round(bubble(timeline("1f1b", stages=4, microbatches=8)), 4)
      0.2727
    """
    spans = schedule.spans()
    busy = sum(span.end - span.start for found in spans for span in found.values())
    time = max(max(s.end for s in found.values()) - min(s.start for s in found.values()) for found in spans)
    return 1 - busy / (schedule.stages * time)


def bubble_formula(name: str, stages: int, microbatches: int, chunks: int = 1, again: float = 0.0) -> float:
    """Compute the bubble by the papers' formulas, as a fraction of the step, for F, B and W of equal time.

    (p-1)/(m+p-1) for "gpipe" (Huang et al. 2019, section 2.3) and "1f1b"; (p-1)/(v m+p-1) for "interleaved" (Narayanan
    et al. 2021, section 2.2, who divide by the work alone: (p-1)/(v m)); (p-1)/(3 m+p-1) for "zb_h1", which idles for
    (p-1)(F+B-W), and 0 for "zb_h2" from m = 2 p - 1 on (Qi et al. 2023, table 2). "dualpipev" idles for (p-1)(F&B+B-3W)
    in times of a chunk, half a stage (DeepSeek-AI's DualPipe repository, whose PP is 2 p and whose B includes W): with
    F&B = F+B, no time won by overlap, (p-1)/(3 m+p-1).

    With `again` B takes so many times F longer, as where it computes activations again: what is idle of "zb_h1" and
    "dualpipev" is then (p-1)(1+again) of m (3+again) + (p-1)(1+again); the others idle for the same fraction.

    Raises:
      ValueError: no formula for `name`, or too few microbatches for it.

    Example:
      >>> from sharding.pipeline import bubble_formula
      >>> bubble_formula("interleaved", stages=4, microbatches=8, chunks=3) == 3 / 27
      True
    """
    p, m = stages, microbatches
    formulas: dict[str, float] = {
        "gpipe": m,
        "1f1b": m,
        "interleaved": chunks * m,
        "zb_h1": m * (3 + again) / (1 + again),
    }
    formulas["dualpipev"] = formulas["zb_h1"]
    if name == "zb_h2":
        if m < 2 * p - 1:
            raise ValueError(f"zb_h2 has no bubble from 2 p - 1 = {2 * p - 1} microbatches on; {m} are fewer")
        return 0.0
    if name not in formulas:
        raise ValueError(f"no bubble formula for {name!r}; there are {', '.join((*formulas, 'zb_h2'))}")
    return (p - 1) / (formulas[name] + p - 1)


def live(schedule: Schedule) -> list[list[int]]:
    """Count live activations of each stage in each tick, in units of one chunk of one microbatch: [stage][tick].

    A microbatch's activations are held from the tick its F starts until its B ends, or its W where B and W are split
    (the weight gradient of a matrix product needs its input).
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
    """Compute each stage's peak of live activations, in units of one chunk (1 / v of its layers) of one microbatch.

    Example:
      >>> from sharding.pipeline import peak_live, timeline
      >>> peak_live(timeline("1f1b", stages=4, microbatches=8)), peak_live(timeline("gpipe", 4, 8))
      ([4, 3, 2, 1], [8, 8, 8, 8])
    """
    return [max(held) for held in live(schedule)]


def draw(schedule: Schedule, note: bool = True) -> str:
    """Draw a schedule as text: a line per stage, a column per tick.

    F3 is the forward pass of microbatch 3, B3 and W3 its backward passes, F3.1 that of chunk 1, a dot an idle tick.
    With `note` a last line has the bubble and the peak of live activations.

    Example:
      >>> from sharding.pipeline import draw, timeline
      >>> print(draw(timeline("1f1b", stages=2, microbatches=2), note=False))
      stage 0 | F0 F1 .  B0 .  B1
      stage 1 | .  F0 B0 F1 B1 .
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
    """Summarize a schedule in one line: name, sizes, ticks, bubble and peak of live activations of every stage."""
    chunks = f", {schedule.chunks} chunks" if schedule.chunks > 1 else ""
    return (
        f"{schedule.name}: {schedule.stages} stages, {schedule.microbatches} microbatches{chunks}; "
        f"{schedule.ticks} ticks, bubble {100 * bubble(schedule):.1f}%, live activations by stage {peak_live(schedule)}"
    )


def require_sizes(name: str, stages: int, microbatches: int, chunks: int = 1) -> None:
    """Refuse impossible sizes.

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
    if chunks > 1 and name == "interleaved" and microbatches % stages:
        low = microbatches - microbatches % stages
        raise PlanError(
            f"{name}: with {chunks} chunks per stage the microbatches go round in groups of {stages} (the stages), "
            f"which does not divide {microbatches}; take {low} or {low + stages} microbatches"
        )
