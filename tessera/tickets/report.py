"""The report of a lottery search: what was found in words, tables with intervals, figures, the settings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree
from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

from lottery.imp import Row, Store
from lottery.masks import flatten
from lottery.summary import DENSE
from tessera.reports import lottery_curves, lottery_figures
from tessera.reports.html import Section, Table, paragraphs
from tessera.reports.lottery_figures import arm_name, arms, main_arm, series
from tessera.reports.lottery_findings import ROUNDING, caveats, describe, findings
from tessera.reports.mask_figures import pixels_figure, units_figure
from tessera.reports.run_report import config_section, read_json, write_report

Rows = Sequence[Mapping[str, Any]]
EARLY, FINAL = "early_stop_test_accuracy", "final_test_accuracy"


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
) -> Path:
    """Write `report.html` and `figures/*.png` of a search in `workdir`; settings are read from its `config.json`.

    Args:
      workdir: the run's directory.
      rows: rows of the search, at least those of level 0; see `lottery.imp.search`.
      masks: level -> bool [seeds, pixels, units], the ticket's first layer (`FirstLayer.masks`); drawn if given.
      mean_image: mean training image, [H, W] or [H, W, C]; says how pixels lie, so needed to draw masks.

    Raises:
      ValueError: no rows.
    """
    if not rows:
        raise ValueError("a report needs at least the rows of level 0, got none")
    config = read_json(Path(workdir) / "config.json")
    opening = Section("", paragraphs(describe(rows, config), findings(rows)), caveats(rows))
    sections = [opening]
    if arms(rows):  # with the dense network alone there is nothing to compare yet
        sections += [*accuracy_sections(rows), speed_section(rows)]
    sections.append(curves_section(rows))
    if arms(rows):
        sections.append(layers_section(rows))
    if arms(rows) and masks and mean_image is not None:
        sections.append(first_layer_section(rows, masks, np.asarray(mean_image)))
    sections += [*number_sections(rows), config_section(workdir)]
    name = config.get("data", {}).get("name", "")
    return write_report(
        workdir, f"Lottery tickets{' on ' + name if name else ''}", sections, subtitle=Path(workdir).resolve().name
    )


def accuracy_sections(rows: Rows) -> list[Section]:
    """Accuracy at early stopping and at the end, and what separates the arms seed by seed."""
    name = arm_name(main_arm(rows))
    bands = "Bands are 95% intervals of the mean over seeds." if several_seeds(rows) else "One seed, so no intervals."
    sections = [
        Section(
            "Accuracy at early stopping",
            lottery_figures.accuracy_figure(rows, EARLY),
            "Test accuracy of the weights with the lowest validation loss. Each line begins at the dense network "
            f"(100%, dotted line) and gets sparser to the right. {bands}",
        )
    ]
    sections += [
        Section(
            "Differences, seed by seed",
            lottery_figures.difference_figure(rows, EARLY, main_arm(rows)),
            f"Mean of the differences between networks of the same seed; above zero the {name} is more accurate. "
            f"Pairing takes out what the seeds have in common. The left panel is cut where accuracy collapses. {bands}",
        ),
        Section(
            "Accuracy at the end of training",
            lottery_figures.accuracy_figure(rows, FINAL),
            f"As the first figure, for the weights after the last step. {bands}",
        ),
    ]
    return sections


def speed_section(rows: Rows) -> Section:
    """Early-stopping step and loss."""
    return Section(
        "Speed and fit",
        lottery_figures.speed_figure(rows),
        "Left: a lower line learns faster. Right: the validation loss at that step.",
    )


def curves_section(rows: Rows) -> Section:
    """Learning curves at a few levels."""
    return Section(
        "Learning curves",
        lottery_curves.curves_figure(rows),
        "Means over seeds; each line is labelled with its weights remaining, the dense network is dashed. The climb "
        "from chance at the start is cut off in the upper panels.",
    )


def layers_section(rows: Rows) -> Section:
    """What is left of each layer."""
    return Section(
        "Layers",
        lottery_figures.layer_figure(rows, main_arm(rows)),
        f"Mask of the {arm_name(main_arm(rows))}. Layers pruned at the same rate lie on top of each other.",
    )


def first_layer_section(rows: Rows, masks: Mapping[int, np.ndarray], mean_image: np.ndarray) -> Section:
    """The first layer's mask over the input pixels."""
    densities = {row["level"]: row["density"] for row in rows}
    shape = mean_image.shape
    seeds = next(iter(masks.values())).shape[0]
    parts: list[Any] = [pixels_figure(masks, densities, shape, mean_image)]
    caption = (
        f"Above: how many first-layer weights of the {arm_name(main_arm(rows))} survive at each input pixel, relative "
        f"to the average pixel, over {seeds} seed{'s' * (seeds != 1)}; first the mean training image. Percentages are "
        "weights remaining in the whole network."
    )
    if max(masks) > 0:
        parts.append(units_figure(masks, densities, shape))
        caption += (
            " Below: single hidden units of the first seed, a row per level; a filled pixel is a weight that survives. "
            "The units are those with the most weights left at the bottom."
        )
    return Section("First layer over the pixels", parts, caption)


def number_sections(rows: Rows) -> list[Section]:
    """Tables of means and intervals: accuracy at early stopping; folded away, at the end, and early-stopping steps."""
    how = "Mean over seeds ± half-width of the 95% interval." if several_seeds(rows) else "One seed: no intervals."
    marked = " Highlighted: on average at least as accurate as the dense network." if arms(rows) else ""
    more: list[Any] = ["<h3>Test accuracy at the end of training (%)</h3>", level_table(rows, FINAL)]
    more += ["<h3>Step of the lowest validation loss</h3>", level_table(rows, "early_stop_step", 1)]
    return [
        Section(
            "Numbers",
            ["<h3>Test accuracy at early stopping (%)</h3>", level_table(rows, EARLY)],
            f"{how}{marked} Every network by itself is in tickets.csv.",
        ),
        Section("More numbers", more, how, fold="Accuracy at the end of training, early-stopping step"),
    ]


def level_table(rows: Rows, value: str, scale: int = 100) -> Table:
    """A line per level, a column per arm, "mean ± half-width" in the cells; level 0 is the dense network throughout."""
    lines = series(rows, value)
    dense = lines.get(DENSE, [])
    columns = arms(rows) or [DENSE]
    first = {row["level"]: row for row in reversed(rows)}
    most = max(point.seeds for points in lines.values() for point in points)
    body, marked = [], set()
    for index, level in enumerate(sorted(first)):
        cells: list[str | None] = []
        for place, arm in enumerate(columns):
            point = next((p for p in lines.get(arm, []) if p.level == level), None)
            cells.append(point and cell_text(point, scale, most))
            if point and level and dense and value != "early_stop_step" and point.mean >= dense[0].mean - ROUNDING:
                marked.add((index, 3 + place))
        alive = first[level]
        name = "0 (dense)" if level == 0 else str(level)
        body.append([name, f"{100 * alive['density']:#.3g}".rstrip("."), f"{alive['alive']:,}", *cells])
    head = ["level", "weights (%)", "weights", *(arm_name(arm) for arm in columns)]
    return Table(head, body, frozenset(marked))


def cell_text(point: lottery_figures.Point, scale: int, most: int) -> str:
    """Mean and half-width in the table's units; the number of seeds where it is not the usual one."""
    digits = 2 if scale == 100 else 0
    text = f"{scale * point.mean:.{digits}f}"
    text += f" ± {scale * point.half:.{digits}f}" if np.isfinite(point.half) else ""
    return text + (f" (n={point.seeds})" if point.seeds != most else "")


def several_seeds(rows: Rows) -> bool:
    """Whether there is anything to take an interval over."""
    return len({row["seed"] for row in rows}) > 1


def summary_table(rows: Rows) -> RichTable:
    """Test accuracy at early stopping per level and arm, for the terminal, with the findings underneath."""
    table = level_table(rows, EARLY)
    rich = RichTable(box=SIMPLE_HEAD, title="Test accuracy at early stopping (%)", caption=findings(rows))
    rich.caption_justify = "left"
    shown = [i for i, name in enumerate(table.columns) if name != "weights"]
    for i in shown:
        rich.add_column(table.columns[i], justify="right")
    for line, row in enumerate(table.rows):
        cells = [f"[bold]{row[i]}[/]" if (line, i) in table.marked else str(row[i] or "–") for i in shown]
        rich.add_row(*cells)
    return rich
