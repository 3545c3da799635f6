"""A plan on paper: pictures and tables of `tessera.planning.explain`, for the terminal and for pages."""

from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Group
from rich.table import Table as Text

from sharding.analysis.hardware import HARDWARE
from sharding.analysis.roofline import Placed, placements
from sharding.analysis.search import Ranking
from sharding.mesh import axis_names
from sharding.pipeline.lockstep import lockstep_schedule
from sharding.pipeline.schedules import Schedule, summary
from sharding.plan import Plan
from tessera.models.transformer import TransformerConfig
from tessera.parallel.decoder import DecoderParts, parameter_shapes
from tessera.planning.compile import Compiled
from tessera.planning.explain import HEADROOM, Explained, crosses
from tessera.reports.html import Section, Table, paragraphs
from tessera.reports.mesh_figure import placement_figure
from tessera.reports.run_report import write_report
from tessera.reports.schedule_figure import schedule_figure

PAGE = "explain"
DRAWN = 12  # microbatches per stage up to which a schedule is drawn whole

Rows = list[tuple[str, ...]]


def size(count: float | int) -> str:
    """Bytes in words: "1.52 GB"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def time(seconds: float | int) -> str:
    """A duration in words: "31 ms"."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def plan_words(plan: Plan) -> str:
    """The plan in a line, with what differs from the defaults."""
    words = [plan.axes or "one device"]
    if plan.size("pp") > 1:
        chunks = f" x {plan.virtual}" if plan.virtual > 1 else ""
        words.append(f"{plan.schedule}{chunks}, {plan.microbatch_count} microbatches")
    words += ["sequence"] * (plan.sequence and plan.size("tp") > 1)
    words += ["zero 1"] * (plan.zero == 1 and plan.size("fsdp") > 1)
    words += [plan.context] * (plan.size("cp") > 1)
    return "; ".join(words)


def placement_rows(params: Sequence[Placed]) -> Rows:
    """A row for every parameter."""
    rows: Rows = []
    for one in params:
        shape, local = (" x ".join(map(str, sizes)) for sizes in (one.shape, one.local))
        rows.append((one.path, shape, one.sharding, local, size(one.bytes)))
    return rows


def memory_rows(explained: Explained, compiled: Compiled | None) -> Rows:
    """The estimate by what it is for, and beside its sum the compiler's figure."""
    memory, limit = explained.memory, explained.hardware.memory
    rows: Rows = [(name, size(amount), f"{100 * amount / limit:.2f}%") for name, amount in memory.rows()]
    rows.append(("most at once", size(memory.total), f"{100 * memory.total / limit:.2f}%"))
    if memory.host:
        rows.append(("offloaded to the host", size(memory.host), "none of it"))
    if compiled:
        error = memory.total / compiled.total - 1
        rows.append(("the compiler's", size(compiled.total), f"{100 * compiled.total / limit:.2f}%"))
        rows.append(("estimate against it", f"{100 * error:+.1f}%", ""))
    return rows


def collective_rows(explained: Explained) -> Rows:
    """A row for every kind, group and cause of collectives."""
    rows: Rows = []
    for one in explained.moved:
        network = " (network)" if crosses(one, explained.run.plan) else ""
        group = f"{' x '.join(one.axes)} ({one.group}){network}"
        rows.append((one.kind, group, one.cause, f"{one.runs:,}", size(one.moved)))
    total = sum(one.moved for one in explained.moved)
    return [*rows, ("all", "", "", f"{sum(one.runs for one in explained.moved):,}", size(total))]


def time_rows(explained: Explained) -> Rows:
    """What bounds the step."""
    at, hardware = explained.time, explained.hardware
    rows: Rows = [
        ("computing", time(at.compute), f"{explained.flops:.3g} FLOP at {hardware.flops / 1e12:.4g} TFLOP/s"),
        ("memory", time(at.memory), f"{size(explained.traffic)} at {size(hardware.bandwidth)}/s"),
        ("communication", time(at.communication), f"{size(sum(one.moved for one in explained.moved))} sent"),
    ]
    if explained.schedule:
        rows.append(("pipeline bubble", f"{100 * at.bubble:.1f}%", "of the step idle"))
    rows += [
        ("step, all at once", time(at.overlapped), f"{explained.tokens_per_second:,.0f} tokens per second"),
        ("step, one after the other", time(at.serial), f"bound by {at.bound}"),
        (
            "arithmetic intensity",
            f"{explained.intensity:.0f}",
            f"FLOP per byte; {hardware.name} is bound by arithmetic from {hardware.ridge:.0f} on",
        ),
    ]
    return rows


def search_rows(ranking: Ranking, count: int = 8) -> Rows:
    """The best plans that fit."""
    return [(plan_words(one.plan), size(one.memory), time(one.seconds)) for one in ranking.fits[:count]]


def search_words(ranking: Ranking, explained: Explained) -> str:
    """What the search looked at, in a sentence or two."""
    hardware = explained.hardware
    words = (
        f"{ranking.tried:,} plans for {explained.run.plan.devices} devices were looked at: {ranking.refused:,} do not "
        f"divide the model or the batch, {ranking.too_large:,} need more than {100 * HEADROOM:.0f}% of the "
        f"{size(hardware.memory)} of a {hardware.name}, {len(ranking.fits):,} fit."
    )
    if not ranking.fits and ranking.smallest:
        words += f" The smallest is {plan_words(ranking.smallest.plan)}: {size(ranking.smallest.memory)}."
    return words + " Times are at best, with everything overlapped, by formulas."


TABLES: dict[str, tuple[str, ...]] = {
    "Parameters": ("parameter", "shape", "split", "one device's part", "bytes"),
    "Memory of one device": ("part", "bytes", "of the device"),
    "Collectives of a step": ("kind", "axes (devices)", "cause", "runs", "one device sends"),
    "Time at best": ("what", "at least", "from"),
    "Best plans": ("plan", "memory", "step at best"),
}


def tables(explained: Explained, compiled: Compiled | None, ranking: Ranking | None) -> dict[str, Rows]:
    """All tables, by the titles of `TABLES`."""
    found = {
        "Parameters": placement_rows(explained.params),
        "Memory of one device": memory_rows(explained, compiled),
        "Collectives of a step": collective_rows(explained),
        "Time at best": time_rows(explained),
    }
    return found | ({"Best plans": search_rows(ranking)} if ranking else {})


def terminal(explained: Explained, compiled: Compiled | None, ranking: Ranking | None) -> Group:
    """The tables for a terminal."""
    parts = []
    for title, rows in tables(explained, compiled, ranking).items():
        table = Text(*TABLES[title], title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        parts.append(table)
    texts = [verdict(explained, compiled)] + ([search_words(ranking, explained)] if ranking else [])
    return Group(*parts, *texts)


def verdict(explained: Explained, compiled: Compiled | None) -> str:
    """Whether it fits and how long a step takes, in two sentences."""
    run, hardware = explained.run, explained.hardware
    needed = compiled.total if compiled else explained.memory.total
    fits = needed <= hardware.memory if compiled else explained.fits
    source = "by the compiler" if compiled else "by the estimate"
    words = (
        f"On {run.plan.devices} x {hardware.name} under {plan_words(run.plan)}, a step of {run.batch_size} x "
        f"{run.length} tokens {'fits' if fits else 'does not fit'}: {size(needed)} of {size(hardware.memory)} per "
        f"device {source}. It takes at least {time(explained.time.overlapped)}, bound by {explained.time.bound}."
    )
    if compiled:
        words += f" Compiling took {time(compiled.compile_seconds)} after {time(compiled.lower_seconds)} of tracing."
    return words


def picture_sections(parts: DecoderParts) -> list[Section]:
    """Pictures of a plan: the mesh with the largest parameter on it, and the pipeline's schedule if there is one."""
    plan = parts.plan
    placed = placements(parameter_shapes(parts.config), parts.specs, plan.sizes)
    largest = max(placed, key=lambda one: (sum(map(bool, one.axes)), one.bytes))
    sizes = {name: plan.size(name) for name in axis_names(plan)}
    sections = [
        Section(
            "Mesh and placement",
            placement_figure(sizes, largest),
            "Left: a parameter cut into parts. Right: the devices of the mesh in the colour of the part they store.",
        )
    ]
    if plan.size("pp") > 1:
        stages = plan.size("pp")
        drawn = min(plan.microbatch_count, max(stages, DRAWN))
        if plan.virtual > 1:
            drawn -= drawn % stages
        caption = f"The table the step runs. {schedule_of(plan, plan.microbatch_count)}"
        if drawn < plan.microbatch_count:
            caption += f" Drawn: the same schedule with {drawn} microbatches."
        table = lockstep_schedule(plan.schedule, stages, drawn, plan.virtual)
        sections.append(Section("Pipeline schedule", schedule_figure([table]), caption))
    return sections


def schedule_of(plan: Plan, microbatches: int) -> str:
    """The schedule's summary as a sentence."""
    table: Schedule = lockstep_schedule(plan.schedule, plan.size("pp"), microbatches, plan.virtual)
    words = summary(table).split(", live")[0]
    return words[0].upper() + words[1:] + "."


def write_page(
    workdir: Path | str, name: str, explained: Explained, compiled: Compiled | None, ranking: Ranking | None
) -> Path:
    """Write `explain.html` in `workdir`; returns its path."""
    found = tables(explained, compiled, ranking)
    run, hardware = explained.run, explained.hardware
    captions = {
        "Memory of one device": "Estimated from sizes. The most at once is the state, what is saved, and the larger of "
        "the head and a layer's backward pass with the gradients.",
        "Collectives of a step": "Counted in the program, trips of loops included. What one device sends is by the "
        "ring algorithms: (n - 1) / n of an array, twice that for an all-reduce.",
        "Time at best": f"No program reaches a datasheet's peaks. {hardware.name}: {'; '.join(hardware.sources)}.",
        "Best plans": search_words(ranking, explained) if ranking else "",
    }
    shown = [Section("", paragraphs(verdict(explained, compiled)))]
    shown += picture_sections(DecoderParts(run.model, run.plan, run.z_loss))
    for title, rows in found.items():
        shown.append(Section(title, Table(TABLES[title], rows), captions.get(title, "")))
    shown.append(hardware_section(explained))
    return write_report(workdir, f"Plan of {name}", shown, subtitle=plan_words(run.plan), name=PAGE)


def hardware_section(explained: Explained) -> Section:
    """The peaks of every known device."""
    rows = [
        (
            one.name,
            f"{one.flops / 1e12:.4g}",
            f"{one.memory / 2**30:.4g}",
            f"{one.bandwidth / 1e9:.4g}",
            f"{one.links / 1e9:.4g}",
            f"{one.network / 1e9:.4g}",
            "; ".join(one.sources),
        )
        for one in HARDWARE.values()
    ]
    columns = ("device", "bf16 TFLOP/s", "HBM GiB", "HBM GB/s", "links GB/s", "network GB/s", "source")
    caption = "Links and network: what one device can send, in one direction."
    return Section("Hardware", Table(columns, rows), caption, fold="Peaks of the devices that are known, with sources")


def run_sections(config: TransformerConfig, plan: Plan, workdir: Path) -> tuple[list[Section], str]:
    """For a run's own report: pictures of its plan, and a link to the page of `scripts/explain.py` if there is one."""
    page = workdir / f"{PAGE}.html"
    link = f'<p><a href="{page.name}">What this plan costs: memory, collectives, time at best</a></p>'
    pictures = picture_sections(DecoderParts(config, plan.fill(jax.device_count()))) if plan.axes else []
    return pictures, link if page.exists() else ""
