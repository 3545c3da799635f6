"""The report of a plan: figures and tables of `tessera.planning.explain`, for the terminal and for pages."""

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Group

from sharding.analysis.hardware import HARDWARE, Hardware
from sharding.analysis.roofline import placements
from sharding.analysis.search import Judged, Ranking
from sharding.mesh import axis_names
from sharding.pipeline.lockstep import lockstep_schedule
from sharding.pipeline.schedules import summary
from sharding.plan import Plan
from tessera.infra.workdir import flatten, revision
from tessera.models.transformer import TransformerConfig, param_shapes
from tessera.parallel.decoder import ShardedDecoder
from tessera.planning.compile import Compiled
from tessera.planning.costs import forward_passes
from tessera.planning.explain import HEADROOM, Explained, crosses
from tessera.reports.html import Section, Table, paragraphs, terminal_table, write_report
from tessera.reports.sharding import placement_figure, schedule_figure
from tessera.reports.style import short

PAGE = "explain"
SHOWN = 4  # reasons for refusing plans
DRAWN = 12  # microbatches per stage up to which all of a schedule is drawn

# What the parts of `Memory` are called on a page.
PARTS = {
    "params": "parameters",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "saved": "activations saved for the backward pass",
    "attention": "activations of one layer's attention",
    "feed_forward": "activations of one layer's feed-forward part",
    "gathered": "all-gathered parameters of one layer",
    "logits": "logits and their gradient",
}

Rows = list[tuple[str, ...]]


def size(count: float | int) -> str:
    """Bytes as text: "1.52 GB"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def time(seconds: float | int) -> str:
    """A duration as text: "31 ms"."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def describe_plan(plan: Plan) -> str:
    """The plan in a line, with what differs from the defaults."""
    text = [plan.axes or "one device"]
    if plan.size("pp") > 1:
        chunks = f" x {plan.virtual}" if plan.virtual > 1 else ""
        text.append(f"{plan.schedule}{chunks}, {plan.microbatch_count} microbatches")
    text += ["sequence"] * (plan.sequence and plan.size("tp") > 1)
    text += ["zero 1"] * (plan.zero == 1 and plan.size("fsdp") > 1)
    text += [plan.context] * (plan.size("cp") > 1)
    return "; ".join(text)


def _sizes(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def memory_rows(explained: Explained, compiled: Compiled | None) -> Rows:
    """The estimate by what it is for, and beside its sum the compiler's figure."""
    memory, limit = explained.memory, explained.hardware.memory
    amounts = [*((PARTS[name], amount) for name, amount in memory.rows()), ("peak", memory.total)]
    rows: Rows = [(name, size(amount), f"{100 * amount / limit:.2f}%") for name, amount in amounts]
    rows += [("offloaded to the host", size(memory.host), "none of it")] * bool(memory.host)
    if compiled:
        rows.append(("the compiler's", size(compiled.total), f"{100 * compiled.total / limit:.2f}%"))
        rows.append(("estimate against it", f"{100 * (memory.total / compiled.total - 1):+.1f}%", ""))
    return rows


def collective_rows(explained: Explained) -> Rows:
    """A row for every kind, group and cause of collectives."""
    rows: Rows = []
    for one in explained.moved:
        network = " (network)" if crosses(one, explained.run.plan) else ""
        group = f"{' x '.join(one.axes)} ({one.group}){network}"
        rows.append((one.kind, group, one.cause, f"{one.runs:,}", size(one.moved)))
    runs, moved = (sum(getattr(one, name) for one in explained.moved) for name in ("runs", "moved"))
    return [*rows, ("all", "", "", f"{runs:,}", size(moved))]


def time_rows(explained: Explained) -> Rows:
    """Lower bounds of a step's time by the roofline, and which one binds."""
    at, hardware = explained.time, explained.hardware
    ridge = f"FLOP per byte; {hardware.name} is bound by arithmetic from {hardware.ridge:.0f} on"
    again = forward_passes(explained.run.model, explained.run.plan) - 1
    stages = [
        ("pipeline bubble", f"{100 * at.bubble:.1f}%", "of the step idle"),
        ("stages compute again", f"{again:g} forward passes", stage_remat(explained.run.model)),
    ]
    return [
        ("computing", time(at.compute), f"{short(explained.flops)} FLOP at {hardware.flops / 1e12:.4g} TFLOP/s"),
        ("memory", time(at.memory), f"{size(explained.traffic)} at {size(hardware.bandwidth)}/s"),
        ("communication", time(at.communication), f"{size(sum(one.moved for one in explained.moved))} sent"),
        *(stages if explained.schedule else []),
        (
            "step, communication overlapped",
            time(at.overlapped),
            f"{explained.tokens_per_second:,.0f} tokens per second",
        ),
        ("step, serialized", time(at.serial), f"bound by {at.bound}"),
        ("arithmetic intensity", f"{explained.intensity:.0f}", ridge),
    ]


def stage_remat(config: TransformerConfig) -> str:
    """What a pipeline's stage computes again in its backward pass, by the model's `remat`."""
    layers = {
        "none": "nothing: a layer's residuals are saved from the forward pass on",
        "full": "the stage from its input, and each layer again from its own",
        "dots": "the stage from its input, and of each layer what is no product",
        "names": "the stage from its input, and of each layer what is not saved",
    }
    return f"{layers[config.remat_groups[0].base]} (remat={config.remat})"


def describe_search(ranking: Ranking, explained: Explained) -> str:
    """The plans of the search by outcome, in a sentence or two."""
    return (
        search_outcome(ranking, explained.run.plan.devices, explained.hardware)
        + " Times are at best, with everything overlapped, by formulas."
    )


def search_outcome(ranking: Ranking, devices: int, hardware: Hardware) -> str:
    """How many plans were refused and for which reasons, how many are too large, and how many fit."""
    text = f"{ranking.tried:,} plans for {devices} devices were looked at: "
    if ranking.refused == ranking.tried:
        text += "every one was refused, because sizes do not divide"
    else:
        text += f"{ranking.refused:,} do not divide the model or the batch"
    if ranking.reasons:
        shown = "; ".join(f"{reason}: {count:,}" for reason, count in ranking.reasons[:SHOWN])
        others = sum(count for _, count in ranking.reasons[SHOWN:])
        text += f" ({shown}{f'; others: {others:,}' if others else ''})"
    if ranking.refused == ranking.tried:
        return text + "."
    text += (
        f", {ranking.too_large:,} need more than {100 * HEADROOM:.0f}% of the {size(hardware.memory)} of a "
        f"{hardware.name}, {len(ranking.fits):,} fit."
    )
    if not ranking.fits and ranking.smallest:
        text += f" The smallest is {describe_judged(ranking.smallest)}: {size(ranking.smallest.memory)}."
    return text


def describe_judged(one: Judged) -> str:
    """A plan of the search in a line, with its gradient accumulation."""
    parts = f"; {one.grad_accum_steps} accumulated parts" if one.grad_accum_steps > 1 else ""
    return describe_plan(one.plan) + parts


TABLES: dict[str, tuple[str, ...]] = {
    "Parameters": ("parameter", "shape", "split", "one device's part", "bytes"),
    "Memory of one device": ("part", "bytes", "of the device"),
    "Collectives of a step": ("kind", "axes (devices)", "cause", "runs", "one device sends"),
    "Time at best": ("what", "at least", "from"),
    "Best plans": ("plan", "memory", "step at best"),
}


def tables(explained: Explained, compiled: Compiled | None, ranking: Ranking | None, best: int = 8) -> dict[str, Rows]:
    """All tables, by the titles of `TABLES`; of the plans that fit the `best`."""
    found: dict[str, Rows] = {
        "Parameters": [(p.path, _sizes(p.shape), p.sharding, _sizes(p.local), size(p.bytes)) for p in explained.params],
        "Memory of one device": memory_rows(explained, compiled),
        "Collectives of a step": collective_rows(explained),
        "Time at best": time_rows(explained),
    }
    if ranking:
        fits = ranking.fits[:best]
        found["Best plans"] = [(describe_judged(one), size(one.memory), time(one.seconds)) for one in fits]
    return found


def terminal(explained: Explained, compiled: Compiled | None, ranking: Ranking | None) -> Group:
    """The tables for a terminal."""
    found = tables(explained, compiled, ranking)
    texts = [verdict(explained, compiled)] + ([describe_search(ranking, explained)] if ranking else [])
    return Group(*(terminal_table(Table(TABLES[title], rows), title) for title, rows in found.items()), *texts)


def verdict(explained: Explained, compiled: Compiled | None) -> str:
    """Whether it fits and how long a step takes, in two sentences."""
    run, hardware = explained.run, explained.hardware
    needed, source = (compiled or explained.memory).total, "by the compiler" if compiled else "by the estimate"
    fits = needed <= hardware.memory if compiled else explained.fits
    parts = f" in {run.step.grad_accum_steps} accumulated parts" * (run.step.grad_accum_steps > 1)
    text = (
        f"On {run.plan.devices} x {hardware.name} under {describe_plan(run.plan)}, a step of {run.batch_size} x "
        f"{run.length} tokens{parts} {'fits' if fits else 'does not fit'}: {size(needed)} of {size(hardware.memory)} "
        f"per device {source}. It takes at least {time(explained.time.overlapped)}, bound by {explained.time.bound}."
    )
    if compiled:
        text += f" Compiling took {time(compiled.compile_seconds)} after {time(compiled.lower_seconds)} of tracing."
    return text


def picture_sections(decoder: ShardedDecoder) -> list[Section]:
    """Pictures of a plan: the mesh with the largest parameter on it, and the pipeline's schedule if there is one."""
    plan, stages = decoder.plan, decoder.plan.size("pp")
    placed = placements(param_shapes(decoder.config), decoder.specs, plan.sizes)
    largest = max(placed, key=lambda one: (sum(map(bool, one.axes)), one.bytes))
    sizes = {name: plan.size(name) for name in axis_names(plan)}
    caption = "Left: a parameter cut into parts. Right: the devices of the mesh in the color of the part they store."
    sections = [Section("Mesh and placement", partial(placement_figure, sizes, largest), caption)]
    if stages > 1:
        drawn = min(plan.microbatch_count, max(stages, DRAWN))
        drawn -= drawn % stages if plan.virtual > 1 else 0
        table, full = (
            lockstep_schedule(plan.schedule, stages, m, plan.virtual) for m in (drawn, plan.microbatch_count)
        )
        text = summary(full).split(", live")[0]
        caption = f"The table the step runs. {text[0].upper() + text[1:]}."
        if drawn < plan.microbatch_count:
            caption += f" Drawn: the same schedule with {drawn} microbatches."
        sections.append(Section("Pipeline schedule", partial(schedule_figure, [table]), caption))
    return sections


def model_line(explained: Explained) -> str:
    """The model by its shape and number of parameters, in a sentence."""
    model = explained.run.model
    count = sum(math.prod(one.shape) for one in explained.params)
    adapted = f" ({explained.trained:,} in adapters, which are all that a step trains)" if explained.run.lora else ""
    text = f"The model: {count:,} parameters{adapted}, {model.layers} layers, {model.width} wide, {model.heads} heads"
    if model.mlp == "routed":
        text += f", {model.moe.router.experts} experts a routed layer, {model.moe.router.k} a token"
    return f"{text}, vocabulary {model.vocab_size:,}."


def settings_section(settings: Mapping[str, Any]) -> Section:
    """The command, the revision of the code and every setting, folded away."""
    made = {"command": shlex.join([Path(sys.executable).name, *sys.argv]), **revision()}
    tables = [Table(columns, [(key, str(value)) for key, value in sorted(flatten(found).items())])
              for columns, found in ((("run", ""), made), (("setting", "value"), settings)) if found]  # fmt: skip
    return Section("Settings", tables, fold="The command, the revision of the code and every setting")


def write_page(
    workdir: Path | str,
    name: str,
    explained: Explained,
    compiled: Compiled | None,
    ranking: Ranking | None,
    settings: Mapping[str, Any] = {},
) -> Path:
    """Write `explain.html` in `workdir`; returns its path. `settings` are those of the run, to be told.

    Raises:
      MissingMatplotlib: matplotlib is not installed.
    """
    run, hardware = explained.run, explained.hardware
    captions = {
        "Memory of one device": "Estimated from sizes. The peak is parameters, optimizer state, saved activations, and "
        "the larger of the logits and a layer's backward pass with the gradients.",
        "Collectives of a step": "Counted in the program, trips of loops included. What one device sends is by the "
        "ring algorithms: (n - 1) / n of an array, twice that for an all-reduce.",
        "Time at best": f"Overlapped: all communication is hidden behind arithmetic; serialized: none of it is. No "
        f"program reaches a datasheet's peaks. {hardware.name}: {'; '.join(hardware.sources)}.",
        "Best plans": describe_search(ranking, explained) if ranking else "",
    }
    found = tables(explained, compiled, ranking)
    sections = [
        Section("", paragraphs(verdict(explained, compiled), model_line(explained))),
        *picture_sections(run.decoder(run.plan)),
        *(Section(title, Table(TABLES[title], rows), captions.get(title, "")) for title, rows in found.items()),
        hardware_section(),
        settings_section(settings),
    ]
    return write_report(workdir, f"Plan of {name}", sections, subtitle=describe_plan(run.plan), name=PAGE)


def hardware_section() -> Section:
    """The peaks of every known device."""
    scales = {"bf16 TFLOP/s": ("flops", 1e12), "HBM GiB": ("memory", 2**30), "HBM GB/s": ("bandwidth", 1e9)}
    scales |= {"links GB/s": ("links", 1e9), "network GB/s": ("network", 1e9)}
    rows = [
        (one.name, *(f"{getattr(one, name) / scale:.4g}" for name, scale in scales.values()), "; ".join(one.sources))
        for one in HARDWARE.values()
    ]
    caption = "Links and network: what one device can send, in one direction."
    fold = "Peaks of the devices that are known, with sources"
    return Section("Hardware", Table(("device", *scales, "source"), rows), caption, fold)


def run_sections(config: TransformerConfig, plan: Plan, workdir: Path) -> tuple[list[Section], str]:
    """For a run's own report: pictures of its plan, and a link to the page of `scripts/explain.py` if there is one."""
    page = workdir / f"{PAGE}.html"
    link = f'<p><a href="{page.name}">What this plan costs: memory, collectives, time at best</a></p>'
    pictures = picture_sections(ShardedDecoder(config, plan.fill(jax.device_count()))) if plan.axes else []
    return pictures, link if page.exists() else ""
