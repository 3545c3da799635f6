"""Published pipeline schedules (GPipe, 1F1B, interleaved 1F1B, zero bubble) as simulated timelines, to read and draw.

Every stage starts a work as soon as its inputs are ready. These are the timelines of the papers' figures, in which
stages are asynchronous; `sharding.pipeline.lockstep` has the schedules that run as one SPMD program.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sharding.errors import PlanError
from sharding.pipeline.schedules import Row, Schedule, Work, needs, require_sizes


@dataclass(frozen=True)
class Ticks:
    """Ticks of each kind of work; W is only used by schedules that split the backward pass."""

    F: int = 1
    B: int = 1
    W: int = 1

    def __post_init__(self) -> None:
        if min(self.F, self.B, self.W) < 1:
            raise ValueError(f"F={self.F}, B={self.B}, W={self.W} ticks: each must be at least 1")


def simulate(
    chunks: int, orders: Sequence[Sequence[Work]], ticks: Ticks = Ticks(), folded: bool = False
) -> tuple[Row, ...]:
    """Simulate stages that run lists of works in order, waiting where the next one is not ready; return the table.

    Args:
      chunks: v.
      orders: the works of every stage, in the order it runs them.
      ticks: of each kind of work.
      folded: see `sharding.pipeline.schedules.Schedule`.

    Raises:
      ValueError: all stages wait and none runs anything: the orders deadlock.
    """
    ended: list[dict[Work, int]] = [{} for _ in orders]  # work -> first tick after it
    rows: list[list[Work | None]] = []

    def put(tick: int, stage: int, work: Work) -> None:
        while len(rows) <= tick:
            rows.append([None] * len(orders))
        rows[tick][stage] = work

    free = [0] * len(orders)
    now = 0
    while any(len(done) < len(order) for done, order in zip(ended, orders, strict=True)):
        for stage, order in enumerate(orders):
            if free[stage] > now or len(ended[stage]) == len(order):
                continue
            work = order[len(ended[stage])]
            wanted = needs(work, stage, len(orders), chunks, folded)
            if all(ended[other].get(needed, now + 1) <= now for other, needed in wanted):
                free[stage] = ended[stage][work] = now + getattr(ticks, work.kind)
                for tick in range(now, free[stage]):
                    put(tick, stage, work)
        if max(free) <= now:
            raise ValueError(f"tick {now}: every stage waits; the orders of works deadlock")
        now += 1
    return tuple(tuple(row) for row in rows)


def gpipe(stages: int, microbatches: int, ticks: Ticks = Ticks()) -> Schedule:
    """Make GPipe: all forward, then all backward passes, the last microbatch first (Huang et al. 2019, figure 2(c))."""
    require_sizes("gpipe", stages, microbatches)
    order = [Work("F", i) for i in range(microbatches)] + [Work("B", i) for i in reversed(range(microbatches))]
    rows = simulate(1, [order] * stages, ticks)
    return Schedule("gpipe", stages, microbatches, 1, rows)


def _alternate(forward: list[Work], backward: list[Work], warmup: int) -> list[Work]:
    """Order `warmup` forwards, then forward and backward in turns, then the remaining backwards."""
    order = forward[:warmup]
    for i, work in enumerate(forward[warmup:]):
        order += [work, backward[i]]
    return order + backward[len(forward) - warmup :]


def one_f_one_b(stages: int, microbatches: int, ticks: Ticks = Ticks()) -> Schedule:
    """Make 1F1B (PipeDream-Flush): Narayanan et al. (2021), figure 4 top; at most p - s live microbatches."""
    require_sizes("1f1b", stages, microbatches)
    forward = [Work("F", i) for i in range(microbatches)]
    backward = [Work("B", i) for i in range(microbatches)]
    orders = [_alternate(forward, backward, stages - 1 - stage) for stage in range(stages)]
    return Schedule("1f1b", stages, microbatches, 1, simulate(1, orders, ticks))


def interleaved(stages: int, microbatches: int, chunks: int = 2, ticks: Ticks = Ticks()) -> Schedule:
    """Make interleaved 1F1B: Narayanan et al. (2021), section 2.2, figure 4 bottom; a tick is 1 / v of a stage.

    Microbatches go round in groups of p; stage s runs 2 (p - s - 1) + (v - 1) p forward passes before its first
    backward.
    """
    require_sizes("interleaved", stages, microbatches, chunks)
    p, v = stages, chunks
    forward, backward = [], []
    for k in range(microbatches * v):
        group, within = divmod(k, p * v)
        chunk, i = within // p, group * p + within % p
        forward.append(Work("F", i, chunk))
        backward.append(Work("B", i, v - 1 - chunk))
    warmups = [min(2 * (p - stage - 1) + (v - 1) * p, len(forward)) for stage in range(p)]
    orders = [_alternate(forward, backward, warmup) for warmup in warmups]
    rows = simulate(v, orders, ticks)
    return Schedule("interleaved", p, microbatches, v, rows)


def zero_bubble(stages: int, microbatches: int, kind: str = "zb_h1", ticks: Ticks = Ticks()) -> Schedule:
    """Make a zero-bubble schedule: backward passes split, weight gradients in the bubbles (Qi et al. 2023, 2.1, 2.2).

    After its first forward passes a stage repeats B, W, F; later stages, which begin later, delay more of their W, so
    that the B of earlier stages come sooner and W fills the end.

    Args:
      stages: p.
      microbatches: m; "zb_h2" reaches no bubble from m = 2 p - 1 on.
      kind: "zb_h1" holds at most p live microbatches, the peak of 1F1B; "zb_h2" 2 p - 1.
      ticks: of each kind of work.

    Raises:
      ValueError: an unknown kind, or too few microbatches.

    Example:
      >>> from sharding.pipeline import bubble, zero_bubble
      >>> round(bubble(zero_bubble(4, 8, "zb_h1")), 3), bubble(zero_bubble(4, 8, "zb_h2"))
      (0.111, 0.0)
    """
    if kind not in ("zb_h1", "zb_h2"):
        raise ValueError(f"kind={kind!r}: choose zb_h1 or zb_h2")
    require_sizes(kind, stages, microbatches)
    orders = []
    for stage in range(stages):
        warmup, delay = (stages - stage, stage) if kind == "zb_h1" else (2 * (stages - stage) - 1, 2 * stage)
        warmup = min(warmup, microbatches)
        order = [Work("F", i) for i in range(warmup)]
        for i in range(microbatches):
            order.append(Work("B", i))
            order += [Work("W", i - delay)] if i >= delay else []
            order += [Work("F", i + warmup)] if i + warmup < microbatches else []
        orders.append(order + [Work("W", i) for i in range(max(0, microbatches - delay), microbatches)])
    return Schedule(kind, stages, microbatches, 1, simulate(1, orders, ticks))


def dualpipev(stages: int, microbatches: int, ticks: Ticks = Ticks()) -> Schedule:
    """Make DualPipeV: two chunks a stage in a V, forward and backward passes of different microbatches in pairs.

    Sea AI Lab cut DualPipe (DeepSeek-AI 2024, section 3.2.1) in half: one copy of the parameters, embedding and head on
    stage 0. The order of works is that of `dualpipev.py` in DeepSeek-AI's DualPipe repository; F&B is F, then B and W.

    Args:
      stages: p, devices.
      microbatches: m, at least 2 p.
      ticks: of each kind of work of a chunk.

    Raises:
      PlanError: too few microbatches.
    """
    require_sizes("dualpipev", stages, microbatches, 2)
    if microbatches < 2 * stages:
        raise PlanError(f"dualpipev: {microbatches} microbatches are fewer than twice the {stages} stages")
    orders = []
    for stage in range(stages):
        order: list[Work] = []
        later: list[Work] = []  # weight gradients that wait
        count: dict[tuple[str, int], int] = {}

        def add(kind: str, chunk: int, order: list = order, later: list = later, count: dict = count) -> None:
            """Append F, B with its W ("BW"), or B whose W waits ("B")."""
            work = Work(kind[0], count.get((kind[0], chunk), 0), chunk)
            count[kind[0], chunk] = work.microbatch + 1
            order.append(work)
            if kind == "BW":
                order.append(work._replace(kind="W"))
            elif kind == "B":
                later.append(work._replace(kind="W"))

        rest = stages - stage - 1
        for kinds, times in (
            ([("F", 0)], 2 * rest),
            ([("F", 0), ("F", 1)], stage + 1),
            ([("B", 1), ("W", 0), ("F", 1)], rest),
            ([("F", 0), ("BW", 1), ("F", 1), ("BW", 0)], microbatches - 2 * stages + stage + 1),
            ([("BW", 1), ("F", 1), ("BW", 0)], rest),
        ):
            for kind, chunk in kinds * times:
                if kind == "W":
                    order.append(later.pop(0))
                else:
                    add(kind, chunk)
        for k in range(2 * (stage + 1)):  # the second half of these leave their W for the end
            add("B" if k > stage else "BW", 1 - k % 2)
        for _ in range(rest):
            order.append(later.pop(0))
            add("B", 0)
        orders.append(order + later)
    return Schedule("dualpipev", stages, microbatches, 2, simulate(2, orders, ticks, folded=True), folded=True)


def timeline(name: str, stages: int, microbatches: int, chunks: int = 1) -> Schedule:
    """Make the published schedule called `name`, with every work one tick long.

    Raises:
      ValueError: no schedule of this name, impossible sizes, or several chunks for a schedule that is not interleaved.

    Example:
      >>> from sharding.pipeline import draw, timeline
      >>> print(draw(timeline("interleaved", stages=2, microbatches=2, chunks=2), note=False))
      stage 0 | F0.0 F1.0 F0.1 F1.1 .    B0.1 .    B1.1 B0.0 B1.0
      stage 1 | .    F0.0 F1.0 F0.1 B0.1 F1.1 B1.1 B0.0 B1.0 .
    """
    known = (*PLAIN, "interleaved")
    if name not in known:
        raise ValueError(f"no schedule {name!r}; choose one of {', '.join(known)}")
    if name == "interleaved":
        return interleaved(stages, microbatches, chunks)
    if chunks != 1 and not (name == "dualpipev" and chunks == 2):
        raise ValueError(f"{name} has one chunk per stage, not {chunks}; the schedule with several is 'interleaved'")
    return PLAIN[name](stages, microbatches)


PLAIN: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "dualpipev": dualpipev,
    "zb_h1": lambda stages, microbatches: zero_bubble(stages, microbatches, "zb_h1"),
    "zb_h2": lambda stages, microbatches: zero_bubble(stages, microbatches, "zb_h2"),
}
