"""The parts that studies share: a search in the study's directory, arms compared seed by seed, the page."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from lottery import criteria, imp, prune, summary
from lottery import masks as masks_lib
from tessera.infra.logger import write_text
from tessera.infra.memo import Memo
from tessera.reports.html import (
    Section,
    Table,
    bullets,
    config_section,
    paragraphs,
    read_json,
    table_markdown,
    write_report,
)
from tessera.reports.style import INK, MARKERS, PALETTE, Axes, Figure, canvas, deferred, plus_minus, seed_marks, titles
from tessera.tickets.setup import Finished, LevelStore, Setup, search_tickets

Rows = Sequence[Mapping[str, Any]]
DENSE = summary.DENSE
FEW = 3  # seeds, with fewer of which a range is given and no interval


class Study(NamedTuple):
    """Title, findings in sentences, a table or several by heading, the picture with its caption, rows for the CSV."""

    title: str
    findings: Sequence[str]
    table: Table | Mapping[str, Table]
    figure: Figure | Callable[[], Figure]
    caption: str
    rows: Rows

    @property
    def tables(self) -> Mapping[str, Table]:
        """The tables by heading."""
        return {"Numbers": self.table} if isinstance(self.table, Table) else self.table


def write_study(workdir: Path | str, study: Study) -> Path:
    """Write rows.csv, table.md, report.html and figures/ into the run's directory; returns the page's path.

    Raises:
      MissingMatplotlib: matplotlib is not installed; rows.csv and table.md are written.
    """
    workdir = Path(workdir)
    summary.write_csv(study.rows, workdir / "rows.csv")
    write_text(workdir / "table.md", markdown(study))
    setting = describe(read_json(workdir / "config.json"))
    sections = [
        Section("", paragraphs(*filter(None, [setting])) + bullets(*study.findings)),
        Section("Picture", study.figure, study.caption),
        *(Section(heading, table) for heading, table in study.tables.items()),
        config_section(workdir),
    ]
    return write_report(workdir, study.title, sections)


def describe(config: Mapping[str, Any]) -> str:
    """The network, data, training and seeds of a study's settings in a sentence; "" where there are none."""
    model, data, train = (config.get(name) or {} for name in ("model", "data", "train"))
    if not (model.get("name") and data.get("name")):
        return ""
    hidden = "-".join(map(str, model.get("hidden", ())))
    text = f"Network {model['name']}{f' ({hidden})' if hidden else ''} on {data['name']}"
    if train.get("steps"):
        steps = str(train["steps"]).removesuffix("it")
        text += f", {f'{int(steps):,} steps' if steps.isdigit() else steps}"
        text += f" of {train['batch_size']} examples" if train.get("batch_size") else ""
    seeds = config.get("seeds", ())
    return f"{text}, {len(seeds)} seed{'s' * (len(seeds) != 1)}." if seeds else f"{text}."


def markdown(study: Study) -> str:
    """Findings and tables as Markdown, for docs/results."""
    lines = [f"- {text}" for text in study.findings]
    for heading, table in study.tables.items():
        lines += ["", f"**{heading}**"] if len(study.tables) > 1 else []
        lines += ["", table_markdown(table).rstrip("\n")]
    return "\n".join(lines) + "\n"


def run_search(setup: Setup, memo: Memo, config: Any, folder: str = "levels") -> tuple[Finished, imp.Result]:
    """Run, or go on with, the setup's search, its levels stored in `folder` of the study's directory."""
    store = LevelStore(memo.directory / folder)

    def train_fn(starts: imp.Starts, *, level: int) -> imp.Trained:
        memo.say(f"{folder} {level}")
        return setup.train(starts, store.unfinished(level))

    rows = search_tickets(setup, store, train_fn, config)
    return Finished(setup, config, store), rows


def magnitude_masks(params: PyTree, density: float) -> tuple[PyTree, dict[str, int]]:
    """Masks [S, ...] of the largest weights of every layer of a stack, and how many weights stay, by path."""
    one = jax.tree.map(lambda leaf: leaf[0], params)
    which = masks_lib.prunable(one)
    counts = {path: max(round(density * size), 1) for path, size in prune.sizes(one, which).items()}
    mask = lambda p: prune.keep(criteria.magnitude(p), masks_lib.ones(p), which, counts)  # noqa: E731
    return jax.jit(jax.vmap(mask))(params), counts


def column(rows: Rows, key: str) -> list[Any]:
    """The values of a key."""
    return [row[key] for row in rows]


def same(names: Iterable[str]) -> dict[str, str]:
    """Names as their own labels."""
    return {name: name for name in names}


def with_interval(values: Iterable[float], scale: float | int = 100.0, digits: int = 2) -> str:
    """ "mean ± half-width" of the 95% Student-t interval, in the table's units.

    Of two values "mean (lowest to highest)": their interval spans anything.
    """
    sample = [float(value) for value in values]
    mean, half, n = summary.interval(sample)
    if 1 < n < FEW:
        return f"{scale * mean:.{digits}f} ({scale * min(sample):.{digits}f} to {scale * max(sample):.{digits}f})"
    return plus_minus(mean, half, scale, digits)


def direction(differences: Iterable[float], more: str, less: str, even: str, *, confidence: float = 0.95) -> str:
    """`more` or `less`, as the mean's sign is, where the Student-t interval of the mean leaves out 0, else `even`."""
    mean, half, _ = summary.interval(differences, confidence)
    return more if mean > half else less if -mean > half else even


def verdict(
    differences: Sequence[float],
    than: str,
    unit: str = "points",
    *,
    scale: float = 100.0,
    digits: int = 2,
    more: str = "better",
    less: str = "worse",
) -> str:
    """Say in which direction paired differences go, and how far: "worse than one dense by 0.97 ± 0.21 points".

    The word follows the mean's sign, so the number has none; where the 95% interval contains 0 the text is "not told
    apart from one dense (0.10 ± 0.21 points, + is better)".
    """
    mean, half, _ = summary.interval(differences)
    word = direction(differences, more, less, "")
    if word:
        return f"{word} than {than} by {plus_minus(abs(mean), half, scale, digits)} {unit}"
    return f"not told apart from {than} ({with_interval(differences, scale, digits)} {unit}, + is {more})"


class Comparison:
    """Arms of a study side by side at every level, paired by seed.

    Args:
      rows: one a network, with the columns `by` and `pair`, "level" if there are several, and "density" of sparse ones;
        rows whose arm is "dense" are the reference.
      by: column that names the arm.
      value: column that is compared.
      heading: what the table calls it, with its unit in brackets.
      unit: of differences.
      scale: factor from the column to that unit.
      digits: after the decimal point.
      pair: column by which rows are paired.
      sign: 1 if more is better, -1 if less is; differences above 0 are then good.
    """

    def __init__(
        self,
        rows: Rows,
        by: str,
        value: str = "final_test_accuracy",
        *,
        heading: str = "test accuracy (%)",
        unit: str = "points",
        scale: float = 100.0,
        digits: int = 2,
        pair: str = "seed",
        sign: int = 1,
    ):
        self.by, self.value, self.heading, self.unit, self.pair = by, value, heading, unit, pair
        self.scale, self.digits, self.sign, self.side = scale, digits, sign, "over" if sign > 0 else "below"
        self.rows = sorted(rows, key=lambda row: row[pair])
        arms = [row for row in rows if row[by] != DENSE]
        self.arms = list(dict.fromkeys(column(arms, by)))
        self.levels = sorted({row.get("level", 0) for row in arms})
        self.dense = [row[value] for row in self.rows if row[by] == DENSE]
        self.sparse = all("density" in row for row in rows)

    def cell(self, arm: str, level: int) -> list[Mapping[str, Any]]:
        """Rows of an arm at a level, in order of the seeds; the dense networks are the same at all levels."""
        return [row for row in self.rows if row[self.by] == arm and (arm == DENSE or row.get("level", 0) == level)]

    def mean(self, arm: str, level: int, value: str = "") -> float:
        """Mean over seeds, unscaled."""
        return float(np.mean(column(self.cell(arm, level), value or self.value)))

    def show(self, arm: str, level: int, value: str = "") -> str:
        """Mean and interval over seeds."""
        return with_interval(column(self.cell(arm, level), value or self.value), self.scale, self.digits)

    def gains(self, arm: str, base: str, level: int) -> list[float]:
        """Differences arm - base, seed by seed, unscaled and signed so that above 0 is good."""
        both = zip(self.cell(arm, level), self.cell(base, level), strict=True)
        return [self.sign * (a[self.value] - b[self.value]) for a, b in both]

    def gain(self, arm: str, base: str, level: int) -> str:
        """Mean and interval of the paired differences."""
        return with_interval(self.gains(arm, base, level), self.scale, self.digits)

    def verdict(self, arm: str, base: str, level: int, than: str) -> str:
        """`verdict` on the paired differences, `than` being what the sentence calls the base."""
        return verdict(self.gains(arm, base, level), than, self.unit, scale=self.scale, digits=self.digits)

    def density(self, level: int) -> str:
        """Weights remaining at a level, over all arms."""
        return f"{np.mean([row['density'] for arm in self.arms for row in self.cell(arm, level)]):.1%}"

    def table(
        self, bases: Mapping[str, str], columns: Mapping[str, Callable[[list[Mapping[str, Any]]], Any]] = {}
    ) -> Table:
        """A line per level and arm: weights, arm, further `columns` of its rows, its value, gains over `bases`.

        Args:
          bases: arm -> what the heading calls it.
          columns: heading -> function of the rows of a cell.
        """
        cells = [(DENSE, self.levels[0])] if self.dense else []
        cells += [(arm, level) for level in self.levels for arm in self.arms]
        body: list[list[Any]] = []
        for arm, level in cells:
            mine = self.cell(arm, level)
            paired = arm != DENSE or len(self.levels) == 1
            gains = [self.gain(arm, base, level) if paired and arm != base else None for base in bases]
            weights = [f"{np.mean(column(mine, 'density')):.1%}"] if self.sparse else []
            body.append([*weights, arm, *(make(mine) for make in columns.values()), self.show(arm, level), *gains])
        over = [f"{self.unit} {self.side} {name}" for name in bases.values()]
        return Table([*["weights"] * self.sparse, self.by, *columns, self.heading, *over], body)

    def draw(self, ax: Axes, title: str, arms: Mapping[str, str], over: str = "") -> None:
        """Draw a dot plot: arms under each other, a color per level, seeds small, means with intervals large.

        Args:
          title: of the axes.
          arms: arm -> its label.
          over: an arm whose values are subtracted seed by seed; "" for none, then a dotted line is the dense mean.
        """
        count = len(self.levels)
        for place, arm in enumerate(arms):
            for i, level in enumerate(self.levels):
                found = self.gains(arm, over, level) if over else column(self.cell(arm, level), self.value)
                mean, half, n = summary.interval(values := [self.scale * value for value in found])
                y = place + (i - (count - 1) / 2) * 0.6 / count
                color, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
                label = f"{self.density(level)} of the weights" if count > 1 and not place else ""
                seed_marks(ax, y, values, color, marker, label)
                if n > 1:
                    ax.errorbar([mean], [y], xerr=[half], fmt="none", ecolor=color, capsize=3)
        if self.dense and not over:
            dense = self.scale * float(np.mean(self.dense))
            ax.axvline(dense, color=INK, linewidth=0.9, linestyle=(0, (1.5, 1.5)))
        ax.set_yticks(range(len(arms)), list(arms.values()))
        ax.invert_yaxis()
        titles(ax, title, f"{self.unit} {self.side} {over}, same {self.pair}" if over else self.heading)

    def figure(self, panels: Mapping[str, Mapping[str, str]], over: str = "") -> Callable[[], Figure]:
        """A figure of `draw`, one panel per title with its arms and their labels; drawn when it is called."""
        return _panels(self, panels, over)


@deferred
def _panels(comparison: Comparison, panels: Mapping[str, Mapping[str, str]], over: str) -> Figure:
    longest = max(map(len, panels.values()))
    figure, axes = canvas(len(panels), width=7.2 if len(panels) == 1 else 10.4, height=1.3 + 0.36 * longest)
    for ax, (title, arms) in zip(axes, panels.items(), strict=True):
        comparison.draw(ax, title, arms, over)
    handles, labels = axes[0].get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=9)
    return figure
