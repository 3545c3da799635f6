"""The report of a lottery search: findings, tables with intervals, figures, the settings."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree
from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

from lottery.imp import Row, Store
from lottery.masks import flatten
from lottery.summary import DENSE
from tessera.infra.logger import Rows
from tessera.reports import lottery as figures
from tessera.reports.html import (
    Section,
    Table,
    bullets,
    config_section,
    paragraphs,
    read_json,
    terminal_table,
    write_report,
)
from tessera.reports.lottery import Point, arm_name, arms, main_arm, paired_points, series
from tessera.reports.style import plus_minus

EARLY, FINAL, STOP = "early_stop_test_accuracy", "final_test_accuracy", "early_stop_step"
WHEN = {EARLY: " at early stopping", FINAL: " at the end of training"}
ROUNDING = 1e-9  # equal accuracies summed in another order may differ by this much


class FirstLayer:
    """A store around a store that remembers the ticket's first-layer mask of every level that passes through.

    Give it to `lottery.imp.search` in the store's place; whether a level is trained or loaded, `masks[level]` is then
    bool [seeds, N, M] for N inputs and M units. Layers that are not matrices (convolutions) are left out.
    """

    def __init__(self, store: Store, path: str = "dense0/kernel", arm: str = "ticket"):
        self.store, self.path, self.arm = store, path, arm
        self.masks: dict[int, np.ndarray] = {}

    def has(self, level: int) -> bool:
        """Whether the store has the level."""
        return self.store.has(level)

    def load(self, level: int, like: PyTree) -> tuple[PyTree, list[Row]]:
        """Load from the store and remember."""
        tree, rows = self.store.load(level, like)
        self._remember(level, tree, rows)
        return tree, rows

    def save(self, level: int, tree: PyTree, rows: list[Row]) -> None:
        """Save to the store and remember."""
        self.store.save(level, tree, rows)
        self._remember(level, tree, rows)

    def _remember(self, level: int, tree: PyTree, rows: list[Row]) -> None:
        found = flatten(tree["masks"]).get(self.path)
        mine = [i for i, row in enumerate(rows) if row["arm"] in (DENSE, self.arm)]
        if found is not None and found.ndim == 3 and mine:
            self.masks[level] = np.asarray(found)[mine].astype(bool)


def lottery_report(
    workdir: Path | str,
    rows: Rows,
    masks: Mapping[int, np.ndarray] | None = None,
    mean_image: np.ndarray | None = None,
    value: str = "",
) -> Path:
    """Write `report.html` and `figures/*.png` of a search in `workdir`; settings are read from its `config.json`.

    Rows of one's own search need the measurement `value` only. Further sections are drawn where the rows have them:
    "early_stop_step" with "best_validation_loss"; "curve", a dict of lists step, validation_accuracy, validation_loss.

    Args:
      workdir: the run's directory, made if absent; without a `config.json` the page has no settings.
      rows: rows of the search, at least those of level 0; see `lottery.imp.search`.
      masks: level -> bool [seeds, pixels, units], the ticket's first layer (`FirstLayer.masks`); drawn if given.
      mean_image: mean training image, [H, W] or [H, W, C]; says how pixels lie, so needed to draw masks.
      value: the accuracy, a fraction, by which arms are compared; "" takes early_stop_test_accuracy or
        final_test_accuracy, what the rows have.

    Raises:
      ValueError: no rows, or none with the value.
      MissingMatplotlib: matplotlib is not installed; nothing is written.
    """
    if not rows:
        raise ValueError("a report needs at least the rows of level 0, got none")
    value = value or next((name for name in WHEN if _have(rows, name)), "")
    if not value or not _have(rows, value):
        keys = ", ".join(dict.fromkeys(key for row in rows for key in row))
        raise ValueError(f"a report needs value=, an accuracy in the rows ({value!r} is none of theirs): {keys}")
    Path(workdir).mkdir(parents=True, exist_ok=True)
    config = read_json(Path(workdir) / "config.json")
    lead = paragraphs(describe(rows, config)) + bullets(*finding_list(rows, value), *caveats(rows, value))
    sections = [Section("", lead), *figure_sections(rows, value)]
    if arms(rows) and masks and mean_image is not None:
        sections.append(first_layer_section(rows, masks, np.asarray(mean_image)))
    details = " Every network by itself is in tickets.csv." * (Path(workdir) / "tickets.csv").exists()
    sections += number_sections(rows, value, details)
    sections += [config_section(workdir)] * bool(config)
    name = config.get("data", {}).get("name", "")
    title = f"Lottery tickets{' on ' + name if name else ''}"
    return write_report(workdir, title, sections)


def _have(rows: Rows, *keys: str) -> bool:
    """Whether some row has the keys."""
    return any(all(row.get(key) is not None for key in keys) for row in rows)


def figure_sections(rows: Rows, value: str = EARLY) -> list[Section]:
    """Accuracy, differences, speed, learning curves and layers; with the dense network alone its learning curves."""
    main = main_arm(rows)
    name, bands = arm_name(main), "Bands are 95% intervals of the mean over seeds."
    bands = bands if several_seeds(rows) else "One seed, so no intervals."
    weights = "the weights with the lowest validation loss" if value == EARLY else "the trained weights"
    sections = []

    def add(title: str, caption: str, figure: Callable[..., Any], *arguments: Any, needs: tuple[str, ...]) -> None:
        if _have(rows, *needs):
            sections.append(Section(title, partial(figure, rows, *arguments), caption))

    curves = (
        "Means over seeds; each line is labeled with its weights remaining, the dense network is dashed. The climb "
        "from chance at the start is cut off in the upper panels."
    )
    if not arms(rows):
        add("Learning curves", curves, figures.curves_figure, needs=("curve",))
        return sections
    add(
        f"Accuracy{WHEN.get(value, '')}",
        f"Test accuracy of {weights}. Each line begins at the dense network (100%, dotted line) and gets sparser to "
        f"the right. {bands}",
        figures.accuracy_figure,
        value,
        needs=(value,),
    )
    add(
        "Differences, seed by seed",
        f"Mean of the differences between networks of the same seed; above zero the {name} is more accurate. Pairing "
        f"takes out what the seeds have in common. The left panel is cut where accuracy collapses. {bands}",
        figures.difference_figure,
        value,
        main,
        needs=(value,),
    )
    if value != FINAL:
        title, caption = (
            "Accuracy at the end of training",
            f"As the first figure, for the weights after the last step. {bands}",
        )
        add(title, caption, figures.accuracy_figure, FINAL, needs=(FINAL,))
    caption = "Left: a lower line learns faster. Right: the validation loss at that step."
    add("Speed and fit", caption, figures.speed_figure, needs=(STOP, "best_validation_loss"))
    add("Learning curves", curves, figures.curves_figure, needs=("curve",))
    caption = f"Mask of the {name}. Layers pruned at the same rate lie on top of each other."
    add("Layers", caption, figures.layer_figure, main, needs=("layers",))
    return sections


def first_layer_section(rows: Rows, masks: Mapping[int, np.ndarray], mean_image: np.ndarray) -> Section:
    """The first layer's mask over the input pixels."""
    densities = {row["level"]: row["density"] for row in rows}
    shape, seeds = mean_image.shape, len(next(iter(masks.values())))
    parts: list[Any] = [partial(figures.pixels_figure, masks, densities, shape, mean_image)]
    caption = (
        f"Above: how many first-layer weights of the {arm_name(main_arm(rows))} survive at each input pixel, relative "
        f"to the average pixel, over {_count(seeds, 'seed')}; first the mean training image. Percentages are weights "
        "remaining in the whole network."
    )
    if max(masks) > 0:
        parts.append(partial(figures.units_figure, masks, densities, shape))
        caption += (
            " Below: single hidden units of the first seed, a row per level; a filled pixel is a weight that survives. "
            "The units are those with the most weights left at the bottom."
        )
    return Section("First layer over the pixels", parts, caption)


def number_sections(rows: Rows, value: str = EARLY, details: str = "") -> list[Section]:
    """Tables of means and intervals: accuracy; folded away, at the end if that is another, and early-stopping steps."""
    how = "Mean over seeds ± half-width of the 95% interval." if several_seeds(rows) else "One seed: no intervals."
    marked = " Highlighted: on average at least as accurate as the dense network." if arms(rows) else ""
    title = f"<h3>Test accuracy{WHEN.get(value, '')} (%)</h3>"
    sections = [Section("Numbers", [title, level_table(rows, value)], f"{how}{marked}{details}")]
    more: list[Any] = []
    if value != FINAL and _have(rows, FINAL):
        more += ["<h3>Test accuracy at the end of training (%)</h3>", level_table(rows, FINAL)]
    if _have(rows, STOP):
        more += ["<h3>Step of the lowest validation loss</h3>", level_table(rows, STOP, 1)]
    fold = "Accuracy at the end of training, early-stopping step"
    return sections + [Section("More numbers", more, how, fold=fold)] * bool(more)


def level_table(rows: Rows, value: str, scale: int = 100) -> Table:
    """A line per level, a column per arm, "mean ± half-width" in the cells; level 0 is the dense network throughout."""
    lines = series(rows, value)
    dense = lines.get(DENSE, [])
    columns = arms(rows) or [DENSE]
    first = {row["level"]: row for row in reversed(rows)}
    most = max(point.seeds for points in lines.values() for point in points)
    body, marked, digits = [], set(), 2 if scale == 100 else 0
    for index, level in enumerate(sorted(first)):
        cells: list[str | None] = []
        for place, arm in enumerate(columns):
            point = next((p for p in lines.get(arm, []) if p.level == level), None)
            other = f" (n={point.seeds})" if point and point.seeds != most else ""
            cells.append(_with_interval(point, scale, digits) + other if point else None)
            if point and level and dense and value != STOP and point.mean >= dense[0].mean - ROUNDING:
                marked.add((index, 3 + place))
        alive = first[level]
        name = "0 (dense)" if level == 0 else str(level)
        body.append([name, f"{100 * alive['density']:#.3g}".rstrip("."), f"{alive['alive']:,}", *cells])
    head = ["level", "weights (%)", "weights", *(arm_name(arm) for arm in columns)]
    return Table(head, body, frozenset(marked))


def _with_interval(point: Point, scale: float | int, digits: int) -> str:
    """A mean with its interval; of seeds that are all equal Student's t makes one of width 0, which says nothing."""
    if point.half == 0:
        return f"{scale * point.mean:.{digits}f} (all {point.seeds} equal)"
    return plus_minus(point.mean, point.half, scale, digits, point.within)


def several_seeds(rows: Rows) -> bool:
    """Whether there are two seeds at least, so that intervals exist."""
    return len({row["seed"] for row in rows}) > 1


def summary_table(rows: Rows) -> RichTable:
    """Test accuracy at early stopping per level and arm, for the terminal, with the findings underneath."""
    title = "Test accuracy at early stopping (%)"
    table = terminal_table(level_table(rows, EARLY), title, box=SIMPLE_HEAD, caption=findings(rows))
    table.caption_justify = "left"
    return table


def describe(rows: Rows, config: Mapping[str, Any]) -> str:
    """What was run, in a few sentences; `config` holds the settings of the script, any of which may be missing."""
    search, train, model, optimizer = (config.get(name, {}) for name in ("search", "train", "model", "optimizer"))
    seeds, levels = _count(len({row["seed"] for row in rows}), "seed"), max(row["level"] for row in rows)
    last = min(rows, key=lambda row: row["density"])
    hidden = "-".join(str(size) for size in model.get("hidden", ()))
    kind = f"fully connected {hidden} network" if hidden else f"{model.get('name', '')} network".strip()
    text = f"A {kind} of {last['prunable']:,} prunable weights was trained"
    text += f" for {_steps(train['steps'])}" if train.get("steps") else ""
    if optimizer.get("name"):
        batches = f", batches of {train['batch_size']}" if train.get("batch_size") else ""
        text += f" with {optimizer['name']} (learning rate {config.get('lr', '?')}{batches})"
    if not levels:
        return f"{text}, with {seeds}. Nothing has been pruned yet."
    text += f", then pruned in {_count(levels, 'round')} down to {percent(last['density'])} ({last['alive']:,} weights)"
    text += f", with {seeds}.{_describe_pruning(search, last.get('start_step', 0))}"
    controls = [arm_name(arm) for arm in arms(rows) if arm != main_arm(rows)]
    return text + (f" Compared with it: {', '.join(controls)}." if controls else "")


def _describe_pruning(search: Mapping[str, Any], start: int) -> str:
    """Describe a round of pruning: criterion, structure, scope, rate, rewinding."""
    back = f"their values at step {start:,}" if start else "their initial values"
    resets = f", sets the ticket's surviving weights back to {back} and trains again."
    unit, scope = search.get("structure", "unstructured"), str(search.get("scope"))
    schedule, rate, output = search.get("schedule", "geometric"), search.get("rate"), search.get("output_rate", -1)
    by = f" by {search['score']}" if search.get("score") else ""
    by += f" in units of {unit}" if unit != "unstructured" else ""
    if scope in ("uniform", "erk") or search.get("density") or schedule != "geometric":
        names = {"uniform": "every layer alike", "erk": "densities by ERK", "layer": "layer by layer"}
        how = names.get(scope, "over the whole network")
        return f" Every round prunes{by}, {how}, on a {schedule} schedule{resets}"
    if not rate:
        return ""
    where = "the network"
    if scope == "layer":
        other = [f"{own:.0%} where {pattern!r} matches" for pattern, own in search.get("rates", ())]
        if search.get("output", "^output/"):
            other.append(f"{rate / 2 if output < 0 else output:.0%} of the output layer")
        where = "each layer" + (f" ({', '.join(other)})" if other else "")
    return f" Every round removes the lowest {rate:.0%}{by} of {where}{resets}"


def matching(rows: Rows, value: str = EARLY) -> Point | None:
    """The sparsest level at which the main arm's mean is at least the dense network's: the paired difference there.

    None if there is no such level. The level is chosen by looking at the results, so its interval is that of a level
    picked among many.
    """
    found = [point for point in paired_points(rows, value, main_arm(rows), DENSE) if point.mean >= -ROUNDING]
    return found[-1] if found else None


def findings(rows: Rows, value: str = EARLY) -> str:
    """The sentences of `finding_list`."""
    return " ".join(finding_list(rows, value))


def finding_list(rows: Rows, value: str = EARLY) -> list[str]:
    """Where the ticket matches the dense network, its lead over each control, and its speed, a sentence each."""
    arm, lines, when = main_arm(rows), series(rows, value), WHEN.get(value, "")
    if DENSE not in lines:
        return ["The dense network has no test accuracy, so nothing can be compared with it."]
    dense, name = lines[DENSE][0], arm_name(arm)
    base = accuracy(dense)
    differences = paired_points(rows, value, arm, DENSE)
    if not differences:
        return [f"The dense network reaches a test accuracy of {base}{when}."]
    point = matching(rows, value)
    if point is None:
        near = max(differences, key=lambda p: p.mean)
        return [
            f"At no level is the {name} on average as accurate as the dense network ({base}{when}); it "
            f"comes nearest at {percent(near.density)} of the weights, {points(near)}."
        ]

    def there(name: str, other: str) -> list[Point]:
        return [p for p in paired_points(rows, name, arm, other) if p.level == point.level]

    own = next(p for p in lines[arm] if p.level == point.level)
    texts = [
        f"Down to {percent(point.density)} of the weights the {name} is on average at least as accurate as the dense "
        f"network: {accuracy(own)} against {base}{when}, a difference of "
        f"{points(point)}."
    ]
    short = [p for p in differences if p.density > point.density and p.mean < -ROUNDING]
    if len(short) > 4:
        worst = -100 * min(p.mean for p in short)
        texts.append(f"On the way it falls short at {len(short)} levels, by at most {worst:.2f} points.")
    elif short:
        where = ", ".join(f"{percent(p.density)} ({signed(100 * p.mean)} points)" for p in short)
        texts.append(f"It falls short on the way at {where}.")
    leads = [f"{points(p)} over {arm_name(other)}" for other in arms(rows) for p in there(value, other)]
    texts += [f"The difference there: {lead}." for lead in leads]
    for p in there(STOP, DENSE) if _have(rows, STOP) else ():
        if p.mean == 0:
            texts.append("Its validation loss is lowest at the same step as the dense network's, on average.")
            continue
        when = "earlier than" if p.mean < 0 else "later than"
        known = f" (95% interval of the change {signed(p.low, 0)} to {signed(p.high, 0)})" * bool(np.isfinite(p.half))
        texts.append(f"Its validation loss is lowest {abs(p.mean):,.0f} steps {when} the dense network's{known}.")
    return texts


def caveats(rows: Rows, value: str = EARLY) -> list[str]:
    """How far the findings can be trusted: the intervals over all levels, and how they were made."""
    dense = series(rows, value).get(DENSE, [])
    texts = []
    differences = [p for p in paired_points(rows, value, main_arm(rows), DENSE) if np.isfinite(p.half)]
    if differences:
        better, worse = [p for p in differences if p.low > 0], [p for p in differences if p.high < 0]
        sparsest = f" (sparsest: {percent(better[-1].density)})" if better else ""
        densest = f" (densest: {percent(worse[0].density)})" if worse else ""
        texts.append(
            f"Level by level, the 95% interval of {arm_name(main_arm(rows))} minus dense is above zero at "
            f"{len(better)}{sparsest}, below zero at {len(worse)}{densest} and around zero at "
            f"{len(differences) - len(better) - len(worse)} of {_count(len(differences), 'level')}."
        )
    if dense and dense[0].seeds < 2:
        texts.append("One seed: there are no intervals, and differences of this size may be chance.")
    elif dense and arms(rows):
        texts.append(
            f"Intervals are 95% Student-t over {dense[0].seeds} seeds, differences are paired by seed; the level named "
            "above was picked after seeing all of them, so judge it together with its neighbors."
        )
    return texts


def percent(fraction: float) -> str:
    """A fraction as a percentage; accuracies and large shares with one decimal, small shares with three digits."""
    value = 100 * fraction
    return f"{value:.0f}%" if np.isclose(value, 100) else f"{value:.1f}%" if value >= 10 else f"{value:#.3g}%"


def accuracy(point: Point) -> str:
    """An accuracy as a percentage, with the half-width of its interval in points, or its ends where one is 100%."""
    if np.isfinite(point.half) and point.mean + point.half > point.within[1]:
        return f"{percent(point.mean)} ({percent(point.low)} to {percent(point.high)})"
    return percent(point.mean) + (f" ± {100 * point.half:.1f}" if np.isfinite(point.half) else "")


def points(point: Point) -> str:
    """A difference of fractions in percentage points with its interval."""
    interval = f" (95% interval {signed(100 * point.low)} to {signed(100 * point.high)})"
    return f"{signed(100 * point.mean)} points{interval * bool(np.isfinite(point.half))}"


def signed(value: float, digits: int | None = None) -> str:
    """A number with its sign; by default two decimals below ten and one above."""
    digits = digits if digits is not None else 2 if abs(value) < 10 else 1
    return f"{value:+,.{digits}f}".replace("-", "−")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _steps(value: Any) -> str:
    text = str(value)
    number = text.removesuffix("it").removesuffix("ep")
    unit = "epoch" if text.endswith("ep") else "step"
    return f"{int(number):,} {unit}s" if number.isdigit() else f"{text} steps"
