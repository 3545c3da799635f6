"""Pages about a finished search: connectivity of its tickets, overlap of their masks, sharpness of their minima."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from lottery import masks as masks_lib
from lottery import summary, transfer
from lottery.connectivity import STABLE
from tessera.infra.memo import Memo
from tessera.reports import style
from tessera.reports.html import Section, Table, bullets, config_section, write_report
from tessera.reports.lottery import arm_name
from tessera.reports.style import MUTED, Axes, canvas, label_lines, line_with_band, titles
from tessera.tickets.probes import AnalysisConfig, overlap_rows, path_rows, sharpness_rows
from tessera.tickets.setup import Finished, starts_of
from tessera.tickets.studies.study import FEW, with_interval

Rows = list[dict[str, Any]]
# The runs that are compared along a line train in orders of their own.
OTHER_ORDER = 500_000


def analyze(search: Finished, memo: Memo, config: AnalysisConfig, levels: Sequence[int]) -> dict[str, Rows]:
    """Rows of all three parts for the given levels of a search, computed once.

    connectivity: every ticket (and dense network) is trained a second time from its starting point in another order of
    the data, and the line between the two ends is walked. overlap: masks of every two seeds of one arm. sharpness: of
    every network at the end of its training.
    """
    found: dict[str, Rows] = {"connectivity": [], "overlap": [], "sharpness": []}
    for level in levels:
        for arm in dict.fromkeys(row["arm"] for row in search.level(level)[1]):
            for name, rows in _one_arm(search, memo, config, level, arm).items():
                found[name] += rows
    return found


def _one_arm(search: Finished, memo: Memo, config: AnalysisConfig, level: int, arm: str) -> dict[str, Rows]:
    tree, rows = search.level(level)
    mine = [row for row in rows if row["arm"] == arm]
    seeds = [int(row["seed"]) for row in mine]
    about: Rows = [{"level": level, "arm": arm, "seed": s, "density": mine[0]["density"]} for s in seeds]
    params, masks = (transfer.of_arm(tree[part], rows, arm)[0] for part in ("params", "masks"))

    def sharp() -> Rows:
        return _with(about, sharpness_rows(search.setup, params, masks, config))

    def connected() -> Rows:
        return _with(about, _second_runs(search, params, masks, seeds, config))

    name = f"level{level}_{arm}"
    found = {"sharpness": memo.rows(f"{name}_sharpness", sharp)}
    if arm in ("dense", "ticket"):
        found["connectivity"] = memo.rows(f"{name}_connectivity", connected)
    if arm != "dense" and len(seeds) > 1:
        which = masks_lib.prunable(jax.tree.map(lambda m: m[0], masks), search.setup.search.rules)
        found["overlap"] = [about[0] | row for row in overlap_rows(masks, seeds, which)]
    return found


def _with(about: Rows, rows: Rows) -> Rows:
    return [a | b for a, b in zip(about, rows, strict=True)]


def _second_runs(search: Finished, params: PyTree, masks: PyTree, seeds: list[int], config: AnalysisConfig) -> Rows:
    """The networks trained again from where they started, in another order, and the line to the first ends."""
    setup = search.setup
    dense, dense_rows = search.level(0)
    start, _ = transfer.of_arm(dense["reset"], dense_rows, "dense")
    # Level 0 too starts at the step the survivors go back to: two runs from the same point.
    orders, names = [OTHER_ORDER + seed for seed in seeds], ["again"] * len(seeds)
    starts = starts_of(masks_lib.apply(start, masks), masks, orders, names, setup.search.rewind)
    return path_rows(setup, params, setup.train(starts).params, config, masks=masks)


def analysis_report(workdir: Path | str, search: Finished, found: dict[str, Rows], config: AnalysisConfig) -> Path:
    """Write report.html, figures and CSV files of the three parts in `workdir`; returns the page's path.

    Raises:
      MissingMatplotlib: matplotlib is not installed; the CSV files are written.
    """
    workdir, parts = Path(workdir), {"connectivity": _connectivity, "overlap": _overlap, "sharpness": _sharpness}
    shown = [name for name in parts if found[name]]
    for name in shown:
        summary.write_csv(found[name], workdir / f"{name}.csv")
    sections = [Section("", bullets(*_findings(found))), *(parts[name](found[name], config) for name in shown)]
    title = f"Connectivity, overlap and sharpness of the tickets of {search.store.directory.parent.name}"
    return write_report(workdir, title, [*sections, config_section(workdir)])


def _by(rows: Rows, *names: str) -> dict[tuple, Rows]:
    cells: dict[tuple, Rows] = {}
    for row in rows:
        cells.setdefault(tuple(row[name] for name in names), []).append(row)
    return cells


def _column(rows: Rows, name: str) -> list[Any]:
    return [row[name] for row in rows]


def _findings(found: dict[str, Rows]) -> list[str]:
    texts = []
    for (level, arm), rows in _by(found["connectivity"], "level", "arm").items():
        rises = _column(rows, "instability")
        stable = "stable" if np.mean(rises) < STABLE else "not stable"
        name = "The dense networks" if arm == "dense" else f"At {rows[0]['density']:.1%} the tickets"
        texts.append(
            f"{name} (level {level}) are {stable} against the order of the data (linear mode connectivity): the error "
            f"rises by {with_interval(rises)} points on the line between two runs; below 2 counts as stable."
        )
    whole = _by([row for row in _distinct(found["overlap"])[0] if row["path"] == "*"], "arm", "level")
    deepest = {arm: max(n for a, n in whole if a == arm) for arm, _ in whole}
    for arm, level in deepest.items():
        texts.append(
            f"At level {level} masks of different seeds ({arm_name(arm)}) share "
            f"{with_interval(_column(whole[arm, level], 'ratio'), 1)} times as many weights as random masks of the "
            "same counts would."
        )
    sharp = _by(found["sharpness"], "arm", "level")
    last = {arm: max(n for a, n in sharp if a == arm) for arm, _ in sharp}
    shown = [
        f"{arm_name(a)} {with_interval(_column(sharp[a, n], 'eigenvalue'), 1)} (level {n})" for a, n in last.items()
    ]
    texts += [f"Top Hessian eigenvalue of the training loss: {', '.join(shown)}."] * bool(shown)
    return texts or ["Nothing could be compared: the search has one seed and no pruned level."]


def _connectivity(rows: Rows, config: AnalysisConfig) -> Section:
    figure, axes = canvas(2, height=3.6)
    cells, body = _by(rows, "level", "arm"), []
    for ((level, arm), mine), color in zip(cells.items(), style.ramp(len(cells)), strict=True):
        label = "dense" if arm == "dense" else f"{mine[0]['density']:.1%}"
        for ax, name, scale in zip(axes, ("error", "loss"), (100, 1), strict=True):
            mean, half = _mean_and_half(np.asarray(_column(mine, name)).T, scale)
            within = (0.0, 100.0 if name == "error" else math.inf)
            line_with_band(ax, mine[0]["alpha"], mean, half, within=within, color=color, linewidth=1.5, label=label)
            if config.curve_steps:
                curve = scale * np.mean(_column(mine, f"curve_{name}"), axis=0)
                line_with_band(ax, mine[0]["alpha"], curve, color=color, linewidth=1.5, linestyle="dashed")
        measured = ("instability", "barrier", *(("curve_barrier",) if config.curve_steps else ()))
        rises = [with_interval(_column(mine, name)) for name in measured]
        stable = f"{sum(_column(mine, 'stable'))} of {len(mine)}"
        body.append([label, level, *rises, with_interval(_column(mine, "loss_barrier"), 1, 4), stable])
    titles(axes[0], "Test error", x="interpolation coefficient", y="%")
    titles(axes[1], "Test loss", x="interpolation coefficient", y="nats")
    label_lines(axes[1])
    head = ["weights", "level", "error rise (points)", "error barrier (points)", "loss barrier (nats)", "stable"]
    if config.curve_steps:
        head.insert(4, "on the curve (points)")
    caption = (
        "Each network was trained twice from the same starting point in different orders of the data; mean over seeds "
        f"and 95% intervals at {config.points} interpolation coefficients on the straight line "
        "between the ends (0 and 1). Rise: highest error minus the ends' mean "
        "(Frankle et al. 2020); barrier: highest rise over the straight line between the ends. A network with batch "
        "normalization gets new statistics at every point."
    )
    if config.curve_steps:
        caption += (
            " Dashed: on a quadratic Bezier curve between the same ends, whose control point was trained on "
            f"{config.curve_steps} batches, each at a random point of the curve (Garipov et al. 2018)."
        )
    return Section(
        "Mode connectivity" if config.curve_steps else "Linear mode connectivity", [figure, Table(head, body)], caption
    )


def _mean_and_half(values: Iterable[Any], scale: float | int = 1) -> tuple[np.ndarray, np.ndarray | None]:
    """Mean and half-width of the interval of every point of a curve; no half-widths where there are too few seeds."""
    found = [summary.interval(point) for point in values]
    mean, half = (scale * np.array([one[i] for one in found]) for i in (0, 1))
    return mean, half if min(n for *_, n in found) >= FEW else None


def _draw_arms(ax: Axes, rows: Rows, name: str) -> None:
    """Draw the mean of a value against weights remaining, a line per arm that begins at the dense network."""
    for i, arm in enumerate(arm for arm in dict.fromkeys(_column(rows, "arm")) if arm != "dense"):
        cells = _by([row for row in rows if row["arm"] in ("dense", arm)], "density")
        mean, half = _mean_and_half(_column(part, name) for part in cells.values())
        place = [100 * density for (density,) in cells]
        line_with_band(ax, place, mean, half, within=(0.0, math.inf), label=arm_name(arm), **style.look(i))
    style.weights_axis(ax, _column(rows, "density"))


def _distinct(rows: Rows) -> tuple[Rows, dict[str, str]]:
    """The rows without arms that have the masks of one before, and which arm's those are."""
    by_arm = {
        arm: [{k: v for k, v in row.items() if k != "arm"} for row in mine] for (arm,), mine in _by(rows, "arm").items()
    }
    names = list(by_arm)
    equal = {b: a for i, b in enumerate(names) for a in names[:i][::-1] if by_arm[a] == by_arm[b]}
    return [row for row in rows if row["arm"] not in equal], equal


def _overlap(rows: Rows, config: AnalysisConfig) -> Section:
    rows, equal = _distinct(rows)
    figure, (ax,) = canvas(width=6.6, height=3.6)
    _draw_arms(ax, [row for row in rows if row["path"] == "*"], "ratio")
    style.reference(ax, 1, color=MUTED)
    titles(ax, "Weights shared by masks of two seeds", y="over the number expected by chance")
    label_lines(ax)
    body = []
    for (arm, level, path), part in _by(rows, "arm", "level", "path").items():
        shared = [with_interval(_column(part, "ratio"), 1), with_interval(_column(part, "z"), 1, 1)]
        distance = part[0]["distance"] if path == "*" else None
        body.append([arm_name(arm), level, "all" if path == "*" else path, distance, *shared])
    head = ["arm", "level", "layer", "distance", "shared / chance", "standard deviations"]
    caption = (
        "Over all pairs of seeds; the pairs share seeds, so intervals are a little too narrow. Chance: independent "
        "random masks with the same count in every layer (all: the whole network, layers independent). Distance: "
        "fraction of prunable weights on which two masks differ (first pair, whole network)."
    )
    caption += "".join(f" {arm_name(arm)}: the same masks as {arm_name(other)}." for arm, other in equal.items())
    return Section("Overlap over seeds", [figure, Table(head, body)], caption)


def _sharpness(rows: Rows, config: AnalysisConfig) -> Section:
    figure, axes = canvas(2, height=3.6)
    for ax, name in zip(axes, ("eigenvalue", "sharpness"), strict=True):
        _draw_arms(ax, rows, name)
        ax.set_ylim(bottom=0)
    titles(axes[0], "Top Hessian eigenvalue", y="of the training loss")
    titles(axes[1], "SAM sharpness", y=f"rise in nats at radius {config.rho}")
    label_lines(axes[1])
    body = []
    for (arm, level), part in _by(rows, "arm", "level").items():
        values = [with_interval(_column(part, name), 1, 4) for name in ("train_loss", "eigenvalue", "sharpness")]
        body.append([arm_name(arm), level, *values, max(_column(part, "residual"))])
    head = ["arm", "level", "training loss", "top eigenvalue", "sharpness", "largest residual"]
    caption = (
        "Means over seeds with 95% intervals at the end of training, "
        f"over {config.examples} training examples, in the space of the weights alive. "
        f"Eigenvalues by {config.lanczos} Lanczos steps; an eigenvalue lies within its residual of the value given."
    )
    return Section("Sharpness", [figure, Table(head, body)], caption)
