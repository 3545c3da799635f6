"""A pipeline schedule drawn as a timeline: a lane per stage, time to the right, a colour per kind of work."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from sharding.pipeline.schedules import Schedule, bubble, peak_live

INK = "#1f2933"
MUTED = "#66737f"
IDLE = "#eef1f4"
# Okabe & Ito's blue, green and vermilion: apart under the common colour blindnesses; later chunks are lighter.
COLOURS = {"F": "#0072b2", "B": "#008a67", "W": "#d55e00"}
NAMES = {"F": "forward", "B": "backward", "W": "weight gradient"}


def schedule_figure(schedules: Sequence[Schedule], width: float = 9.6) -> Figure:
    """Timelines under each other on one axis, time in ticks of a whole stage: a tick of one of v chunks is 1 / v.

    Lengths compare where the ticks mean the same work: beside a schedule that splits B and W, others need B of 2 ticks.

    Made with matplotlib's object API; nothing is kept in its global state.

    Args:
      schedules: at least one.
      width: of the figure, inches.

    Raises:
      ValueError: no schedules.
    """
    if not schedules:
        raise ValueError("a timeline figure needs at least one schedule")
    heights = [0.28 * schedule.stages + 0.5 for schedule in schedules]
    figure = Figure(figsize=(width, sum(heights) + 0.75), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(schedules), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})[:, 0]
    time = max(schedule.ticks / schedule.chunks for schedule in schedules)
    for ax, schedule in zip(axes, schedules, strict=True):
        draw_timeline(ax, schedule, time, labels=width * 72 / time > 9 * schedule.chunks)
    axes[-1].set_xlabel("time (ticks of a whole stage)", fontsize=9, color=MUTED)
    kinds = [kind for kind in COLOURS if any(kind in schedule.kinds for schedule in schedules)]
    handles = [Patch(color=COLOURS[kind], label=NAMES[kind]) for kind in kinds] + [Patch(color=IDLE, label="idle")]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False, fontsize=9)
    return figure


def draw_timeline(ax: Axes, schedule: Schedule, time: float | None = None, labels: bool = True) -> None:
    """Draw one schedule on an Axes.

    Args:
      ax: where.
      schedule: what.
      time: length of the time axis in ticks of a whole stage, default the schedule's.
      labels: write the microbatch's number into every box.
    """
    tick = 1 / schedule.chunks
    for stage, found in enumerate(schedule.spans()):
        start = tick * min(span.start for span in found.values())
        end = tick * max(span.end for span in found.values())
        ax.add_patch(Rectangle((start, stage - 0.42), end - start, 0.84, facecolor=IDLE, edgecolor="none"))
        for work, span in found.items():
            shade = 0.45 + 0.55 * (schedule.chunks - work.chunk) / schedule.chunks
            long = tick * (span.end - span.start)
            box = Rectangle((tick * span.start, stage - 0.42), long, 0.84, linewidth=0.5, edgecolor="white")
            box.set_facecolor((*_rgb(COLOURS[work.kind]), shade))
            box.set_gid(f"{work.kind}{work.microbatch}.{work.chunk}@{stage}")
            ax.add_patch(box)
            if labels:
                middle = tick * (span.start + span.end) / 2
                colour = "white" if shade > 0.7 else INK
                ax.text(middle, stage, str(work.microbatch), ha="center", va="center", fontsize=6.5, color=colour)
    ax.set_xlim(0, time or tick * schedule.ticks)
    ax.set_ylim(schedule.stages - 0.4, -0.6)  # stage 0 on top
    ax.set_yticks(range(schedule.stages), [f"stage {stage}" for stage in range(schedule.stages)])
    ax.tick_params(colors=INK, labelsize=8, length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    chunks = f", {schedule.chunks} chunks" if schedule.chunks > 1 else ""
    # Part of a chunk counts as that part of a stage's layers.
    live = max(peak_live(schedule)) / schedule.chunks
    title = (
        f"{schedule.name}{chunks}: bubble {100 * bubble(schedule):.1f}%, at most {live:g} microbatches live on a stage"
    )
    ax.set_title(title, loc="left", fontsize=9.5, fontweight="bold", color=INK, pad=4)


def _rgb(colour: str) -> tuple[float, float, float]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))  # type: ignore[return-value]
