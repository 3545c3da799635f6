"""The page of `tessera demo`: five ideas, each with a picture, its command, what was seen, and where to go on."""

import html
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scaling import isoflop
from scaling.tables import read_csv
from tessera.infra.logger import METRICS, Rows, clock, read_object, read_rows, write_text
from tessera.pages.runs import read_tickets
from tessera.pages.token_experts import CAPTION, held_out_text, route_text, sentence, text_parts
from tessera.reports import comparison, curves, lottery, scaling, style
from tessera.reports.html import Section, page, paragraphs, read_json, table_of
from tessera.reports.style import Figure, short, titles

TITLES = {
    "ticket": "A winning ticket on digits",
    "experts": "Routed experts beside a dense model",
    "plan": "The same model on eight devices",
    "tokens": "Which tokens take which experts",
    "sweep": "A scaling law from a tiny sweep",
}
PROMPT = "def "
PLAN = "dp=2, tp=2, pp=2"
SERVED = "tp=2"
TOKENS = 480
EQUAL = 1e-5  # nats by which losses of a plan may differ from those of one device
ACCURACY = "early_stop_test_accuracy"


class Part(NamedTuple):
    """One part of the page: the picture's parts, what was seen, how to read it, where to go on; what is wrong."""

    pictures: list[Any]
    seen: str
    caption: str
    onward: str
    wrong: str = ""


def as_json(value: Mapping[str, Any]) -> str:
    """A JSON file's text."""
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def write_tour(root: Path, commands: Mapping[str, Sequence[str]]) -> tuple[Path, list[str]]:
    """Write report.html of a finished tour.

    Args:
      root: the tour's directory.
      commands: of every part, as they are shown.

    Returns:
      The page's path, and what should be equal and is not.

    Raises:
      MissingMatplotlib: matplotlib is not installed.
    """
    parts = {name: read(root) for name, read in READERS.items()}
    spent = read_object(root / "done.json").values() if (root / "done.json").exists() else ()
    took, used = (clock(sum(one[name] for one in spent)) for name in ("seconds", "processor"))
    lead = (
        "Five ideas about neural networks that use only part of themselves, on real data that came with the packages: "
        "scikit-learn's handwritten digits and the sources of Python's standard library. What is said of each is "
        f"computed from the runs that this page was made of ({took} for all commands, {used} of processor time)."
    )
    sections = [Section("", paragraphs(lead)), *(_section(name, part, commands[name]) for name, part in parts.items())]
    path = root / "report.html"
    write_text(path, page("Tessera in five ideas", sections))
    return path, [part.wrong for part in parts.values() if part.wrong]


def _section(name: str, part: Part, commands: Sequence[str]) -> Section:
    onward = f"<p>To go on: {part.onward}</p>"
    caption = f'<p class="caption">{html.escape(part.caption)}</p>'
    seen = f"<p><strong>{html.escape(part.seen)}</strong></p>"
    return Section(TITLES[name], [seen, *part.pictures, caption, _commands(commands), onward])


def _commands(commands: Sequence[str]) -> str:
    """Commands that wrap between words, as a browser would also break a line behind the hyphens of a flag."""
    word = '<span style="display: inline-block; max-width: 100%">{}</span>'
    lines = [" ".join(word.format(html.escape(each)) for each in ["$", *command.split(" ")]) for command in commands]
    return f'<pre style="white-space: pre-wrap; overflow-wrap: anywhere"><code>{"<br>".join(lines)}</code></pre>'


def _code(text: str) -> str:
    return f'<pre style="white-space: pre-wrap; overflow-wrap: anywhere"><code>{html.escape(text)}</code></pre>'


def ticket_part(root: Path) -> Part:
    """Accuracy of ticket and controls, and their difference at the lowest density."""
    rows = read_tickets(root / "ticket")
    seeds = len({row["seed"] for row in rows})
    last = {other: lottery.paired_points(rows, ACCURACY, "ticket", other)[-1] for other in ("reinit", "random_mask")}
    told = [_told(point, other) for other, point in last.items()]
    density = f"{100 * next(iter(last.values())).density:.3g}%"
    seen = f"At {density} of the weights the winning ticket's test accuracy is {' and '.join(told)}; {seeds} seeds."
    caption = (
        "Magnitude pruning in rounds (Frankle & Carbin 2019). The controls have as many weights, trained as long: the "
        "ticket's mask with fresh initial weights, and a random mask. Bands are 95% Student-t intervals; the right "
        "panel's differences are paired by seed."
    )
    onward = (
        "<code>tessera find-ticket --config=lottery_mnist:short</code>, then <code>tessera analyze-ticket</code>; "
        "docs/tickets.md, docs/results/lottery_mnist.md."
    )
    return Part([partial(ticket_figure, rows)], seen, caption, onward)


def ticket_figure(rows: Rows) -> Figure:
    """Accuracy of every arm against weights remaining, and the ticket's minus each control's."""
    figure, axes = style.canvas(2, height=3.9)
    lines = lottery.series(rows, ACCURACY)
    lottery.draw_arms(axes[0], lines, 100)
    low = min(point.low for points in lines.values() for point in points)
    axes[0].set_ylim(100 * max(low - 0.01, 0), 100)
    axes[0].yaxis.set_major_formatter("{x:.4g}%")
    titles(axes[0], "Test accuracy", y="percent of the test images, at early stopping")
    style.label_lines(axes[0])
    for other in ("reinit", "random_mask"):
        points = lottery.paired_points(rows, ACCURACY, "ticket", other)
        lottery.draw_points(axes[1], points, 100, label=f"minus {lottery.arm_name(other)}", **lottery.arm_look(other))
    style.reference(axes[1], 0)
    style.weights_axis(axes[1], [row["density"] for row in rows])
    titles(axes[1], "Ticket minus its controls", y="percentage points of test accuracy")
    style.label_lines(axes[1])
    return figure


def _told(point: lottery.Point, other: str) -> str:
    names = {"reinit": "that of its mask with fresh weights", "random_mask": "that of a random mask"}
    more = "above" if point.mean > 0 else "below"
    return f"{abs(100 * point.mean):.2f} points {more} {names[other]} ({interval_text(point.mean, point.half, 2, 100)})"


def interval_text(mean: float, half: float | None, digits: int, scale: int = 1) -> str:
    """The 95% interval of a difference in words, and whether it is clear of zero; None and NaN are too few seeds."""
    if half is None or not np.isfinite(half):
        return "too few seeds for an interval"
    span = f"{scale * (mean - half):+.{digits}f} to {scale * (mean + half):+.{digits}f}".replace("-", "−")
    return f"95% interval {span}, {'clear' if abs(mean) > half else 'not clear'} of zero"


def experts_part(root: Path) -> Part:
    """Validation loss of the dense arm and the routed one."""
    made = [(arm, seed) for arm in ("dense", "moe") for seed in read_json(root / "experts" / "config.json")["seeds"]]
    runs = [comparison.read_run(root / "experts" / f"{arm}-{seed}", arm, seed) for arm, seed in made]
    table, (pair,) = comparison.loss_rows(runs), comparison.difference_rows(runs, "dense")
    dense, routed = table
    gap, half = pair["difference"], pair["± (95%)"]
    lower = "lower" if gap < 0 else "higher"
    config = runs[-1].config
    router = config["model"]["moe"]["router"]
    ratio = routed["kFLOPs per token"] / dense["kFLOPs per token"]
    ends = f"{pair['lowest']:+.3f} to {pair['highest']:+.3f}".replace("-", "−")
    seen = (
        f"With {router['k']} of {router['experts']} experts per token, at {ratio:.1%} of the dense model's FLOPs per "
        f"token, the routed model ends {abs(gap):.3f} nats per byte {lower} ({routed['mean']:.3f} against "
        f"{dense['mean']:.3f}; {interval_text(gap, half, 3)}; {ends} over {pair['seeds']} seeds)."
    )
    tokens = config["steps"] * config["batch_size"] * config["length"]
    caption = (
        f"Validation loss on held-out text; thick: mean over seeds, thin: every seed. Both saw the same {tokens:,} "
        "bytes in the same order; the routed model has more weights, of which a token uses as many. Experts need text: "
        "after a million bytes a larger one is ahead with every seed (docs/results/moe_lm.md)."
    )
    onward = (
        "<code>tessera compare --config=moe_vs_dense</code>; docs/moe.md, docs/tutorials/experts.md; "
        "<code>tessera train --config=moe_lm:tiny</code> for one run."
    )
    return Part([partial(comparison.loss_figure, comparison.arms(runs)), table_of(table)], seen, caption, onward)


def plan_part(root: Path) -> Part:
    """Losses of one device and of a plan, and what the model says under another."""
    losses = {name: curves.training_loss(read_rows(root / "plan" / name / METRICS)) for name in ("one", "split")}
    step, one = losses["one"]
    other_step, split = losses["split"]
    if not np.array_equal(step, other_step):
        raise ValueError(f"{root}/plan: the two runs have losses of other steps; remove that directory and start again")
    most = float(np.abs(one - split).max())
    texts = {name: (root / "plan" / f"{name}.txt").read_text(encoding="utf-8") for name in ("one", "split")}
    same = texts["one"] == texts["split"]
    wrong = [f"losses under {PLAN!r} differ from one device's by {short(most)}, more than {short(EQUAL)}"] * (
        not most <= EQUAL
    )
    wrong += [f"the texts continued on one device and under {SERVED!r} differ"] * (not same)
    verb, within = "" if same else "not ", "within" if most <= EQUAL else "NOT within"
    seen = (
        f"Over {len(step)} steps the losses under {PLAN} are those of one device to {short(most)} nats "
        f"({within} {short(EQUAL)}), and the text that the model writes under {SERVED} is {verb}the one that it writes "
        "on one device."
    )
    caption = (
        "The dense model of the second part goes on training: data, tensor and pipeline parallelism over eight "
        "devices that one CPU is split into, and one device beside it. Right: the difference of the two losses."
    )
    said = _code(texts["split"].rstrip())
    picture = partial(plan_figure, step, one, split)
    onward = (
        "<code>tessera explain --config=lm:base --config.plan='fsdp=4, tp=2' --hardware=H100</code> says what a plan "
        "costs; docs/tutorials/plan.md, docs/pipeline.md, docs/inference.md."
    )
    return Part([picture, f"<p>Continued under {SERVED}, greedily:</p>", said], seen, caption, onward, "; ".join(wrong))


def plan_figure(step: np.ndarray, one: np.ndarray, split: np.ndarray) -> Figure:
    """The losses over each other, and their difference."""
    figure, axes = style.canvas(2, height=3.4)
    style.line_with_band(axes[0], step, one, label="one device", color=style.INK, linewidth=3.2, alpha=0.45)
    style.line_with_band(axes[0], step, split, label=PLAN, **style.look(1))
    titles(axes[0], "Training loss", x="training step", y="nats per byte")
    style.line_with_band(axes[1], step, 1e6 * (split - one), **style.look(0))
    style.reference(axes[1], 0)
    titles(axes[1], "Eight devices minus one", x="training step", y="millionths of a nat")
    for ax in axes:
        style.steps_axis(ax)
    style.label_lines(axes[0])
    return figure


def tokens_part(root: Path) -> Part:
    """Held-out text colored by the experts of the routed model."""
    found = route_text(*held_out_text(root / "experts" / "moe-0", TOKENS))
    onward = (
        "<code>tessera report RUN --tokens=1000</code> draws any routed run; with "
        "<code>--config.model.moe.router.name=relu</code> or <code>--config.model.moe.null=2</code> some tokens take "
        "fewer experts (docs/moe.md)."
    )
    return Part(text_parts(found), sentence(found), CAPTION, onward)


def sweep_part(root: Path) -> Part:
    """IsoFLOP curves with their minima, and the power law through these."""
    rows, found = read_csv(root / "sweep" / "runs.csv"), read_json(root / "sweep" / "fit.json").get("isoflop", {})
    budgets = np.unique(rows["budget"]).tolist()
    groups = isoflop.nearest_budgets(rows["flops"], budgets)
    minima = isoflop.minima(rows, groups)
    inside = [one for one in minima if not one.refused]
    seen = f"{len(inside)} of {len(minima)} budgets have their lowest loss inside the sizes that were tried"
    a = found.get("exponents", {}).get("a")
    if a:
        span = a.get("interval")
        between = f" (95% interval {short(span[0])} to {short(span[1])})" if span else ""
        seen += f"; the best number of parameters grows as C^{a['value']:.2f} with the FLOPs C{between}."
    else:
        seen += f", too few for a power law: {found.get('refused', 'no fit was made')}."
    caption = (
        f"{len(np.unique(rows['run']))} decoders trained once each and read out at {len(budgets)} budgets (Hoffmann et "
        "al. 2022, approach 2): parabolas in log parameters, their minima as diamonds; a dotted parabola is refused. "
        "Tiny budgets say little about large ones."
    )
    onward = (
        "<code>tessera sweep --config=isoflop</code> (ten minutes), <code>tessera fit --config.runs=YOUR.csv</code>; "
        "docs/fits.md, docs/sweeps.md, docs/tutorials/law.md."
    )
    picture: Callable[[], Figure] = partial(scaling.isoflop_figure, rows, groups, budgets, minima=minima)
    return Part([picture], seen, caption, onward)


READERS: dict[str, Callable[[Path], Part]] = {
    "ticket": ticket_part,
    "experts": experts_part,
    "plan": plan_part,
    "tokens": tokens_part,
    "sweep": sweep_part,
}
