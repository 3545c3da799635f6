"""Sparse networks at equal compute: lottery tickets beside sparse training (SET, RigL, DPF), pruning and supermasks.

All methods train the same architecture from the same seeds' initializations on the same batches and end with the same
number of weights. They are ranked where each executed the same training FLOPs, the search for its mask included: a mask
is multiplied in and saves none. Beside that, each in one run, where only the search for tickets takes more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lottery import imp, prune
from lottery import masks as masks_lib
from tessera.infra.config import ConfigError, build
from tessera.infra.memo import Memo
from tessera.reports.html import Table
from tessera.reports.style import Figure, canvas, deferred
from tessera.tickets.setup import Setup, make_setup, with_steps
from tessera.tickets.studies.sparse_methods import (
    METHODS,
    MethodInputs,
    Result,
    SparseConfig,
    fixed,
    make_inputs,
    one_shot,
)
from tessera.tickets.studies.study import DENSE, Comparison, Study, column, direction, run_search, same

# Arms of the search that make rows here, and what they are called.
SEARCHED = {"ticket": "ticket (iterative)", "random_mask": "random mask, fixed", "at_init": "pruned at initialization"}
TICKET = SEARCHED["ticket"]


# What trains when, and what a row's `budget` says.
EQUAL, ONE_RUN = "equal", "one run"
ONE_SHOT = "ticket (one shot)"


def run(config: Any, memo: Memo) -> Study:
    """Search for tickets, train with every other method, once in one run and once with the whole search's steps."""
    study = build(SparseConfig, config.study, "config.study")
    setup = make_setup(config)
    wrong = [arm for arm in setup.search.arms if arm not in SEARCHED]
    if wrong or setup.search.rewind or not setup.search.levels:
        raise ConfigError(
            f"config.search: arms among {', '.join(SEARCHED)}, rewind 0 and a level are needed, found arms {wrong}, "
            f"rewind {setup.search.rewind}, levels {setup.search.levels}"
        )
    inputs, _ = make_inputs(setup, study, config)
    _, found = run_search(setup, memo, config)
    steps, runs = setup.ticket.steps, found.levels + 1
    rows = _searched(found, steps)
    for name in study.methods:
        rows += memo.rows(name, _trained, inputs, METHODS[name].name, METHODS[name].train)

    whole, half = (replace(inputs, setup=with_steps(setup, config, steps=n)) for n in (runs * steps, runs * steps // 2))
    masks = {DENSE: masks_lib.ones(inputs.initial)}
    masks |= {SEARCHED[arm]: _masks(found, arm, inputs.seeds) for arm in setup.search.arms if arm != "ticket"}
    training: dict[str, Callable[[MethodInputs], Result]] = {
        **{name: partial(fixed, masks=tree) for name, tree in masks.items()},
        ONE_SHOT: partial(one_shot, half=half),
        **{METHODS[name].name: METHODS[name].train for name in study.methods},
    }
    equal = [row | {"budget": EQUAL} for row in rows if row["method"] == TICKET]
    for name, train in training.items():
        equal += memo.rows(f"equal {name}", _trained, whole, name, train, EQUAL)
    return _study([*rows, *equal], steps, runs, step_flops(setup))


def _masks(found: imp.Result, arm: str, seeds: Sequence[int]) -> PyTree:
    """Masks [seeds, ...] of an arm's last level."""
    return jax.tree.map(lambda *leaf: jnp.stack(leaf), *[found.ticket(seed, found.levels, arm)[0] for seed in seeds])


def _searched(found: imp.Result, steps: int) -> list[dict[str, Any]]:
    """Rows of the dense networks and of the last level's arms."""
    density = {(row["level"], row["arm"], row["seed"]): row["alive"] / row["prunable"] for row in found}

    def searched(row: Mapping[str, Any]) -> dict[str, Any]:
        arm, seed, last = row["arm"], row["seed"], found.levels
        alive = [density[level, arm if level else DENSE, seed] for level in range(row["level"] + 1)]
        used = alive if arm == "ticket" else alive[-1:]
        return _row(
            SEARCHED.get(arm, DENSE),
            row,
            alive[-1],
            steps * len(used),
            float(np.mean(used)),
            last / (last + 1) if arm == "ticket" else 0.0,
        )

    return [searched(row) for row in found if row["level"] in (0, found.levels)]


def _trained(
    inputs: MethodInputs, name: str, train: Callable[[MethodInputs], Result], budget: str = ONE_RUN
) -> list[dict[str, Any]]:
    result = train(inputs)
    shapes = jax.eval_shape(inputs.setup.network.init, jax.random.key(0))
    total = sum(prune.sizes(shapes, inputs.which).values())
    alive = np.asarray(jax.vmap(lambda mask: sum(masks_lib.count(mask, inputs.which).values()))(result.masks))
    steps = inputs.setup.ticket.steps
    return [
        _row(name, row, int(n) / total, steps, sparse, found, budget)
        for row, n, sparse, found in zip(result.rows, alive, result.sparse, result.found, strict=True)
    ]


def _row(
    method: str,
    row: Mapping[str, Any],
    density: float,
    steps: int,
    sparse: float,
    found: float,
    budget: str = ONE_RUN,
) -> dict[str, Any]:
    """`steps` were executed; `sparse` and `found` are shares of them, see `sparse_methods.Result`."""
    measured = {name: row[name] for name in ("seed", "final_test_accuracy", "final_test_loss")}
    shares = {"density": density, "steps": steps, "sparse_steps": sparse * steps, "found": found}
    return {"method": method, **measured, **shares, "budget": budget, "note": row.get("note", "")}


def step_flops(setup: Setup) -> float:
    """FLOPs that XLA counts in the gradient of one batch's loss, masks or not."""
    params = jax.eval_shape(setup.network.init, jax.random.key(0))
    example = setup.splits.train
    batch = tuple(
        jax.ShapeDtypeStruct((setup.ticket.batch_size, *x.shape[1:]), x.dtype) for x in (example.images, example.labels)
    )
    counted = jax.jit(jax.grad(setup.loss)).lower(params, batch).cost_analysis()
    return float((counted or {})["flops"])


def _study(rows: list[dict[str, Any]], steps: int, runs: int, flops: float) -> Study:
    """The page: `steps` of one run, `runs` of the search, executed `flops` of a step."""
    equal, once = (Comparison([row for row in rows if row["budget"] == b], "method") for b in (EQUAL, ONE_RUN))
    for arms in (equal, once):
        means = {name: arms.mean(name, 0) for name in arms.arms}
        arms.arms.sort(key=means.__getitem__, reverse=True)
    heads = (
        f"Equal training FLOPs: {runs * steps} steps each, the search included",
        f"One run of {steps} steps each, an iterative ticket's search beside it",
    )
    columns = {
        "executed (GFLOP)": lambda mine: f"{mine[0]['steps'] * flops / 1e9:.3g}",
        "sparse count (GFLOP)": lambda mine: f"{np.mean(column(mine, 'sparse_steps')) * flops / 1e9:.3g}",
        "until the mask is final": lambda mine: f"{np.mean(column(mine, 'found')):.0%}",
        "remarks": lambda mine: "; ".join(dict.fromkeys(note for note in column(mine, "note") if note)),
    }
    base = {TICKET: "ticket"} if TICKET in equal.arms else {}
    tables = {head: _results_first(arms.table(base, columns)) for head, arms in zip(heads, (equal, once), strict=True)}
    caption = (
        "Test accuracy after the last step. Small marks are seeds, large ones means with 95% intervals; dotted: the "
        "mean of the dense networks of as many steps. Executed: a mask is multiplied in and saves nothing. The sparse "
        "count leaves out, as the papers do, products of dead weights. Neither has updates and the choice of masks."
    )
    hidden = sorted({name for arms in (equal, once) for name in arms.arms if name not in _near(arms)})
    caption += f" Left out, far below: {', '.join(hidden)}." * bool(hidden)
    panels = ((f"{runs * steps} steps each, search included", equal), (f"{steps} steps, the search beside it", once))
    return Study(
        "Ways to a sparse network, at equal compute",
        [*_findings(equal, heads[0], base), *_findings(once, heads[1], {})],
        tables,
        _figure(panels),
        caption,
        rows,
    )


def _findings(arms: Comparison, head: str, base: Mapping[str, str]) -> list[str]:
    means = [f"{name} {100 * arms.mean(name, 0):.2f}%" for name in arms.arms]
    found = [
        f"{head}, {arms.density(0)} of the weights. From the best mean down: {', '.join(means)}; the dense networks "
        f"have {100 * np.mean(arms.dense):.2f}%."
    ]
    for ticket in base:
        sides: dict[str, list[str]] = {"ahead of": [], "behind": [], "not told apart from": []}
        for name in arms.arms:
            if name != ticket:
                sides[direction(arms.gains(name, ticket, 0), *sides)].append(name)
        found += [
            f"{side[0].upper()}{side[1:]} the {ticket}: {', '.join(names)}." for side, names in sides.items() if names
        ]
    return found


def _results_first(table: Table, at: int = 2, count: int = 4) -> Table:
    """The table with its `count` columns of costs and remarks from `at` on moved to the end."""
    move = lambda row: [*row[:at], *row[at + count :], *row[at : at + count]]  # noqa: E731
    return Table(move(table.columns), [move(row) for row in table.rows])


def _near(arms: Comparison) -> list[str]:
    """Arms that are drawn: one much worse than the others would leave them no room."""
    means = [arms.mean(name, 0) for name in arms.arms]
    least = np.median(means) - 3 * (max(means) - np.median(means))
    return [name for name, mean in zip(arms.arms, means, strict=True) if mean >= least]


@deferred
def _figure(panels: Sequence[tuple[str, Comparison]]) -> Figure:
    figure, axes = canvas(len(panels), width=10.4, height=1.3 + 0.36 * max(len(arms.arms) for _, arms in panels))
    for ax, (title, arms) in zip(axes, panels, strict=True):
        arms.draw(ax, title, same(_near(arms)))
    return figure
