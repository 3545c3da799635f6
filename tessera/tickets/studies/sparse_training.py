"""Every way to end with a sparse network, at equal density: tickets beside sparse training and supermasks.

All methods train the same architecture from the same seeds' initializations on the same batches and end with the same
number of weights. What differs, and is in the table, is how many steps are taken for one network in all.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lottery import imp, prune
from lottery import masks as masks_lib
from tessera.infra.config import ConfigError, build
from tessera.infra.memo import Pieces
from tessera.reports.html import Table
from tessera.reports.style import INK, PALETTE, Figure, canvas, deferred, seed_marks, titles
from tessera.tickets.setup import Setup, make_setup, search_tickets
from tessera.tickets.store import LevelStore
from tessera.tickets.studies.sparse_methods import METHODS, Ground, Method, SparseConfig, make_ground
from tessera.tickets.studies.study import Study, with_interval

# Arms of the search that make rows here, and what they are called.
SEARCHED = {"ticket": "ticket (iterative)", "random_mask": "random mask, fixed", "at_init": "pruned at initialization"}


def run(config: Any, pieces: Pieces) -> Study:
    """Search for tickets, train with every other method, compare."""
    study = build(SparseConfig, config.study, "config.study")
    setup = make_setup(config)
    wrong = [arm for arm in setup.search.arms if arm not in SEARCHED]
    if wrong or setup.search.rewind or not setup.search.levels:
        raise ConfigError(
            f"config.search: arms among {', '.join(SEARCHED)}, rewind 0 and a level are needed, found arms {wrong}, "
            f"rewind {setup.search.rewind}, levels {setup.search.levels}"
        )
    ground, _ = make_ground(setup, study, config)
    rows = _searched(setup, ground, pieces, config)
    for name in study.methods:
        rows += pieces.rows(name, lambda: _trained(ground, METHODS[name]))  # noqa: B023
    return _study(rows, study, setup)


def _searched(setup: Setup, ground: Ground, pieces: Pieces, config: Any) -> list[dict[str, Any]]:
    """Rows of the dense networks and of the last level's arms."""
    store = LevelStore(pieces.directory / "levels")

    def train_fn(starts: imp.Starts, *, level: int) -> imp.Trained:
        pieces.say(f"search level {level}")
        return setup.train(starts, store.unfinished(level))

    rows = search_tickets(setup, store, train_fn, config)
    steps, levels = setup.ticket.steps, setup.search.levels
    kept = [row for row in rows if row["level"] in (0, levels)]
    taken = {"dense": steps, "ticket": (levels + 1) * steps, "random_mask": steps, "at_init": steps}
    return [
        _row(SEARCHED.get(row["arm"], "dense"), row, row["alive"] / row["prunable"], taken[row["arm"]]) for row in kept
    ]


def _trained(ground: Ground, method: Method) -> list[dict[str, Any]]:
    found, masks = method.train(ground)
    shapes = jax.eval_shape(ground.setup.network.init, jax.random.key(0))
    total = sum(prune.sizes(shapes, ground.which).values())
    alive = np.asarray(jax.vmap(lambda mask: sum(masks_lib.count(mask, ground.which).values()))(masks))
    steps = ground.setup.ticket.steps
    return [_row(method.name, row, int(n) / total, steps) for row, n in zip(found, alive, strict=True)]


def _row(method: str, row: Mapping[str, Any], density: float, steps: int) -> dict[str, Any]:
    keep = {name: row[name] for name in ("seed", "final_test_accuracy", "final_test_loss")}
    return {"method": method, **keep, "density": density, "steps": steps, "note": row.get("note", "")}


def _study(rows: list[dict[str, Any]], study: SparseConfig, setup: Setup) -> Study:
    names = list(dict.fromkeys(row["method"] for row in rows))
    cell = {name: sorted((row for row in rows if row["method"] == name), key=lambda row: row["seed"]) for name in names}
    value, ticket = "final_test_accuracy", {row["seed"]: row for row in cell.get(SEARCHED["ticket"], [])}
    body: list[list[Any]] = []
    for name in names:
        mine = cell[name]
        gain = [row[value] - ticket[row["seed"]][value] for row in mine] if ticket and mine[0]["seed"] in ticket else []
        body.append(
            [name, f"{np.mean([row['density'] for row in mine]):.2%}", mine[0]["steps"]]
            + [with_interval([row[value] for row in mine])]
            + [with_interval(gain) if gain and name != SEARCHED["ticket"] else None]
            + ["; ".join(dict.fromkeys(row["note"] for row in mine if row["note"]))]
        )
    sparse = [name for name in names if name != "dense"]
    ranked = sorted(sparse, key=lambda name: -np.mean([row[value] for row in cell[name]]))
    density = np.mean([row["density"] for name in sparse for row in cell[name]])
    mean = lambda name: f"{100 * np.mean([row[value] for row in cell[name]]):.2f}%"  # noqa: E731
    findings = [
        f"At {density:.1%} of the weights, from the best mean down: "
        + ", ".join(f"{name} {mean(name)}" for name in ranked)
        + f"; the dense networks have {mean('dense')}."
    ]
    caption = (
        f"Test accuracy after the last of {setup.ticket.steps} steps (an iterative ticket's last run). Small marks are "
        "seeds, large ones means; dotted: the mean of the dense networks."
    )
    head = ["method", "weights", "steps in all", "test accuracy (%)", "points over ticket", "remarks"]
    figure = _figure({name: [100 * row[value] for row in cell[name]] for name in [*ranked, "dense"]})
    return Study("Ways to a sparse network, at equal density", findings, Table(head, body), figure, caption, rows)


@deferred
def _figure(values: Mapping[str, list[float]]) -> Figure:
    figure, (ax,) = canvas(1, width=7.2, height=0.9 + 0.34 * len(values))
    names = [name for name in values if name != "dense"]
    for place, name in enumerate(names):
        seed_marks(ax, place, values[name], PALETTE[0])
    ax.axvline(float(np.mean(values["dense"])), color=INK, linewidth=0.9, linestyle=(0, (1.5, 1.5)))
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    titles(ax, "Ways to a sparse network", "test accuracy (%)", "")
    return figure
