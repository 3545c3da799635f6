"""Pages about a finished search: connectivity of its tickets, overlap of their masks, sharpness of their minima."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from lottery import masks as masks_lib
from lottery import summary, transfer
from lottery.connectivity import STABLE
from tessera.infra.memo import Pieces
from tessera.reports.html import Section, Table, paragraphs
from tessera.reports.lottery_figures import arm_name
from tessera.reports.run_report import config_section, write_report
from tessera.reports.style import DASHES, MARKERS, MUTED, PALETTE, canvas, label_lines, ramp, titles, weights_axis
from tessera.tickets.probes import AnalysisConfig, overlap_rows, path_rows, sharpness_rows
from tessera.tickets.setup import Finished, starts_of
from tessera.tickets.studies.study import with_interval

Rows = list[dict[str, Any]]
# The runs that are compared along a line train in orders of their own.
OTHER_ORDER = 500_000


def analyse(search: Finished, pieces: Pieces, config: AnalysisConfig, levels: Sequence[int]) -> dict[str, Rows]:
    """Rows of all three parts for the given levels of a search, computed once.

    connectivity: every ticket (and dense network) is trained a second time from its starting point in another order of
    the data, and the line between the two ends is walked. overlap: masks of every two seeds of one arm. sharpness: of
    every network at the end of its training.
    """
    found: dict[str, Rows] = {"connectivity": [], "overlap": [], "sharpness": []}
    for level in levels:
        for arm in dict.fromkeys(row["arm"] for row in search.level(level)[1]):
            for name, rows in _one_arm(search, pieces, config, level, arm).items():
                found[name] += rows
    return found


def _one_arm(search: Finished, pieces: Pieces, config: AnalysisConfig, level: int, arm: str) -> dict[str, Rows]:
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
    found = {"sharpness": pieces.rows(f"{name}_sharpness", sharp)}
    if arm in ("dense", "ticket"):
        found["connectivity"] = pieces.rows(f"{name}_connectivity", connected)
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
    return path_rows(setup, params, setup.train(starts).params, config)


def analysis_report(workdir: Path | str, search: Finished, found: dict[str, Rows], config: AnalysisConfig) -> Path:
    """Write report.html, figures and CSV files of the three parts in `workdir`; returns the page's path."""
    workdir = Path(workdir)
    for name, rows in found.items():
        if rows:
            summary.write_csv(rows, workdir / f"{name}.csv")
    sections = [Section("", paragraphs(*_words(found)))]
    sections += [_connectivity(found["connectivity"], config)] if found["connectivity"] else []
    sections += [_overlap(found["overlap"])] if found["overlap"] else []
    sections += [_sharpness(found["sharpness"], config)] if found["sharpness"] else []
    title = f"What the tickets of {search.store.directory.parent.name} are like"
    return write_report(workdir, title, [*sections, config_section(workdir)], subtitle=workdir.resolve().name)


def _by(rows: Rows, *names: str) -> dict[tuple, Rows]:
    cells: dict[tuple, Rows] = {}
    for row in rows:
        cells.setdefault(tuple(row[name] for name in names), []).append(row)
    return cells


def _words(found: dict[str, Rows]) -> list[str]:
    texts = []
    for (level, arm), rows in _by(found["connectivity"], "level", "arm").items():
        rises = [row["instability"] for row in rows]
        stable = "stable" if np.mean(rises) < STABLE else "not stable"
        name = "The dense networks" if arm == "dense" else f"At {rows[0]['density']:.1%} the tickets"
        texts.append(
            f"{name} (level {level}) are {stable} against the order of the data: the error rises by "
            f"{with_interval(rises)} points on the line between two runs (below 2 counts as stable)."
        )
    last = _by([row for row in found["overlap"] if row["path"] == "*"], "arm", "level")
    for arm in dict.fromkeys(arm for arm, _ in last):
        level = max(n for a, n in last if a == arm)
        ratios = [row["ratio"] for row in last[arm, level]]
        texts.append(
            f"At level {level} masks of different seeds ({arm_name(arm)}) share {with_interval(ratios, 1)} times "
            "as many weights as random masks of the same counts would."
        )
    return texts or ["Nothing could be compared: the search has one seed and no pruned level."]


def _connectivity(rows: Rows, config: AnalysisConfig) -> Section:
    figure, (left, right) = canvas(2, width=9.6, height=3.6)
    cells = _by(rows, "level", "arm")
    ends, body = [], []
    for (level, arm), colour in zip(cells, ramp(len(cells)), strict=True):
        mine = cells[level, arm]
        alpha = np.asarray(mine[0]["alpha"])
        for ax, name, scale in ((left, "error", 100), (right, "loss", 1)):
            ax.plot(alpha, scale * np.mean([row[name] for row in mine], axis=0), color=colour)
        label = "dense" if arm == "dense" else f"{mine[0]['density']:.1%}"
        ends.append((alpha[-1], float(np.mean([row["loss"][-1] for row in mine])), label, colour))
        stable = f"{sum(row['stable'] for row in mine)} of {len(mine)}"
        rises = [with_interval([row[name] for row in mine]) for name in ("instability", "barrier")]
        body.append([label, level, *rises, with_interval([row["loss_barrier"] for row in mine], 1, 4), stable])
    for ax in (left, right):
        ax.set_xlabel("place on the line between two runs", fontsize=9, color=MUTED)
    titles(left, "Test error", y="%")
    titles(right, "Test loss", y="nats")
    label_lines(right, ends)
    head = ["weights", "level", "error rise (points)", "error barrier (points)", "loss barrier (nats)", "stable"]
    caption = (
        "Each network was trained twice from the same starting point in different orders of the data; mean over seeds "
        f"at {config.points} places on the straight line between the ends. Rise: highest error minus the ends' mean "
        "(Frankle et al. 2020); barrier: highest rise over the straight line between the ends. A network with batch "
        "normalization gets new statistics at every place."
    )
    return Section("Connectivity", [figure, Table(head, body)], caption)


def _overlap(rows: Rows) -> Section:
    figure, (ax,) = canvas(1, width=6.6, height=3.6)
    whole = [row for row in rows if row["path"] == "*"]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    ends = []
    for i, arm in enumerate(arms):
        cells = _by([row for row in whole if row["arm"] == arm], "density")
        at = [100 * density for (density,) in cells]
        mean = [float(np.mean([row["ratio"] for row in part])) for part in cells.values()]
        look = {"color": PALETTE[i % 7], "marker": MARKERS[i % 7], "linestyle": DASHES[i % 7], "markersize": 4}
        ax.plot(at, mean, **look)
        ends.append((at[-1], mean[-1], arm_name(arm), PALETTE[i % 7]))
    weights_axis(ax, [row["density"] for row in whole])
    ax.axhline(1, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    titles(ax, "Weights shared by masks of two seeds", y="times what chance has")
    label_lines(ax, ends)
    body = [
        [arm_name(arm), level, path, part[0]["distance"], with_interval([row["ratio"] for row in part], 1)]
        + [with_interval([row["z"] for row in part], 1, 1)]
        for (arm, level, path), part in _by(rows, "arm", "level", "path").items()
    ]
    head = ["arm", "level", "layer", "distance", "shared / chance", "standard deviations"]
    caption = (
        "Over all pairs of seeds; the pairs share seeds, so intervals are a little too narrow. Chance: independent "
        "random masks with the same count in every layer (* is the whole network, layers independent). Distance: "
        "fraction of prunable weights on which two masks differ (first pair)."
    )
    return Section("Overlap over seeds", [figure, Table(head, body)], caption)


def _sharpness(rows: Rows, config: AnalysisConfig) -> Section:
    figure, (left, right) = canvas(2, width=9.6, height=3.6)
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm != "dense"]
    cells, body = _by(rows, "arm", "level"), []
    for ax, name, title in ((left, "eigenvalue", "Top Hessian eigenvalue"), (right, "sharpness", "SAM sharpness")):
        ends = []
        for i, arm in enumerate(arms):
            mine = {part[0]["density"]: part for (a, _), part in cells.items() if a in (arm, "dense")}
            at = [100 * density for density in mine]
            mean = [float(np.mean([row[name] for row in part])) for part in mine.values()]
            ax.plot(at, mean, color=PALETTE[i % 7], marker=MARKERS[i % 7], linestyle=DASHES[i % 7], markersize=4)
            ends.append((at[-1], mean[-1], arm_name(arm), PALETTE[i % 7]))
        weights_axis(ax, [row["density"] for row in rows])
        titles(ax, title, y="of the training loss" if name == "eigenvalue" else f"rise in nats at radius {config.rho}")
        if ax is right or not arms:
            label_lines(ax, ends)
    for (arm, level), part in cells.items():
        values = [
            with_interval([row[name] for row in part], 1, 4) for name in ("train_loss", "eigenvalue", "sharpness")
        ]
        body.append([arm_name(arm), level, *values, max(row["residual"] for row in part)])
    head = ["arm", "level", "training loss", "top eigenvalue", "sharpness", "largest residual"]
    caption = (
        f"At the end of training, over {config.examples} training examples, in the space of the weights alive. "
        f"Eigenvalues by {config.lanczos} Lanczos steps; an eigenvalue lies within its residual of the value given."
    )
    return Section("Sharpness", [figure, Table(head, body)], caption)
