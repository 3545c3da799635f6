"""Late rewinding against rewinding to 0: Frankle et al. 2020 (arXiv:1912.05671), section 5, at equal density.

Two searches share their dense networks: in one the survivors go back to the initialization and train the whole
schedule, in the other they go back to step k and train what is left of it.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from lottery import imp, summary
from lottery.levels import level_like
from tessera.infra.config import ConfigError, build
from tessera.infra.memo import Pieces
from tessera.reports.html import Table
from tessera.reports.style import INK, MARKERS, PALETTE, Figure, canvas, deferred, label_lines, titles
from tessera.tickets.setup import Setup, make_setup
from tessera.tickets.store import LevelStore
from tessera.tickets.studies.study import Study, with_interval

UNITS = {"final_test_loss": ("test loss", "nats", 1.0, 3), "final_test_accuracy": ("test accuracy", "points", 100.0, 2)}


@dataclass(frozen=True)
class RewindingConfig:
    """value: what is compared, "final_test_loss" or "final_test_accuracy"."""

    value: str = "final_test_loss"

    def __post_init__(self):
        if self.value not in UNITS:
            raise ValueError(f"value={self.value!r}: choose one of {', '.join(UNITS)}")


def run(config: Any, pieces: Pieces) -> Study:
    """Search twice, compare seed by seed."""
    study = build(RewindingConfig, config.study, "config.study")
    late = make_setup(config)
    if not late.search.rewind or late.search.rewind_optimizer or late.search.arms != ("ticket",):
        raise ConfigError("config.search: rewind above 0, rewind_optimizer False and arms ('ticket',) are needed here")
    rows = _searched(late, LevelStore(pieces.directory / "late"), pieces)
    # The dense networks are the same; only what survivors go back to differs.
    early = replace(late, search=replace(late.search, rewind=0), ticket=replace(late.ticket, rewind=0))
    store = LevelStore(pieces.directory / "early")
    if not store.has(0):
        params = jax.eval_shape(late.network.init, jax.random.key(0))
        tree, dense = LevelStore(pieces.directory / "late").load(0, level_like(params, late.search, 0))
        store.save(0, {**tree, "reset": imp.initial_weights(late.network.init, late.search)}, dense)
    rows = [{**row, "rewind": late.search.rewind} for row in rows]
    rows += [{**row, "rewind": 0} for row in _searched(early, store, pieces)]
    return _study(rows, study, late)


def _searched(setup: Setup, store: LevelStore, pieces: Pieces) -> list[dict[str, Any]]:
    def train_fn(starts: imp.Starts, *, level: int) -> imp.Trained:
        pieces.say(f"{store.directory.name} level {level}")
        return setup.train(starts, store.unfinished(level))

    return imp.search(setup.network.init, train_fn, store, setup.search, evidence=setup.evidence)


def _study(rows: list[dict[str, Any]], study: RewindingConfig, setup: Setup) -> Study:
    name, unit, scale, digits = UNITS[study.value]
    late, levels = setup.search.rewind, range(1, setup.search.levels + 1)
    dense = [row[study.value] for row in rows if row["level"] == 0 and row["rewind"] == late]
    cell = lambda k, level: [row for row in rows if row["rewind"] == k and row["level"] == level]  # noqa: E731
    # Positive is good for late rewinding whatever is measured.
    sign = -1 if "loss" in study.value else 1
    body: list[list[Any]] = [["100%", with_interval(dense, scale, digits), None, None, None]]
    findings = []
    for level in levels:
        early, then = cell(0, level), cell(late, level)
        gain = [sign * (b[study.value] - a[study.value]) for a, b in zip(early, then, strict=True)]
        density = f"{early[0]['density']:.1%}"
        values = [with_interval([row[study.value] for row in part], scale, digits) for part in (early, then)]
        better = f"{sum(g > 0 for g in gain)} of {len(gain)}"
        body.append([density, *values, with_interval(gain, scale, digits), better])
        mean, half, _ = summary.interval(gain)
        verdict = "better" if mean - half > 0 else "worse" if mean + half < 0 else "not told apart from rewinding to 0"
        findings.append(
            f"At {density} of the weights rewinding to step {late} is {verdict}: {with_interval(gain, scale, digits)} "
            f"{unit}, above 0 in favour of late rewinding, paired over {len(gain)} seeds."
        )
    figure = _figure(rows, study, setup)
    head = ["weights", f"to step 0 ({name})", f"to step {late}", f"late minus 0, {unit}, + is better", "seeds better"]
    caption = "After the last step, on the test set; means and 95% intervals over seeds. Dotted: the dense networks."
    return Study("Late rewinding and rewinding to 0", findings, Table(head, body), figure, caption, _short(rows))


@deferred
def _figure(rows: list[dict[str, Any]], study: RewindingConfig, setup: Setup) -> Figure:
    """Both arms side by side at every level: seeds pale, means with their intervals."""
    name, unit, scale, _ = UNITS[study.value]
    late, levels = setup.search.rewind, np.arange(1, setup.search.levels + 1)
    figure, (ax,) = canvas(1, width=6.4, height=3.6)
    densities = []
    for i, (k, label) in enumerate(((0, "to step 0"), (late, f"to step {late}"))):
        parts = [[row for row in rows if row["rewind"] == k and row["level"] == level] for level in levels]
        values = [[scale * row[study.value] for row in part] for part in parts]
        found = [summary.interval(part) for part in values]
        means, halves = ([one[j] for one in found] for j in (0, 1))
        x = levels + 0.2 * (i - 0.5)
        for place, part in zip(x, values, strict=True):
            ax.plot(
                [place] * len(part), part, MARKERS[i], color=PALETTE[i], alpha=0.35, markersize=4, markeredgewidth=0
            )
        ax.errorbar(x, means, halves, color=PALETTE[i], marker=MARKERS[i], capsize=3)[0].set_label(label)
        densities = [part[0]["density"] for part in parts]
    dense = scale * np.mean([row[study.value] for row in rows if row["level"] == 0 and row["rewind"] == late])
    ax.axhline(dense, color=INK, linewidth=0.9, linestyle=(0, (1.5, 1.5)))
    ax.text(0.01, dense, "dense", transform=ax.get_yaxis_transform(), fontsize=8, va="bottom")
    ax.set_xlim(0.5, len(levels) + 0.5)
    ax.set_xticks(levels, [f"{density:.1%}" for density in densities])
    label_lines(ax)
    titles(ax, f"Rewinding: {name} of the ticket", "weights remaining", unit if "loss" in study.value else "%")
    return figure


def _short(rows: list[dict[str, Any]]) -> list[PyTree]:
    return [{key: value for key, value in row.items() if key != "curve"} for row in rows]
