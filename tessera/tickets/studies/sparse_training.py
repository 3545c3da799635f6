"""Sparse networks at equal density: lottery tickets beside sparse training (SET, RigL, DPF), pruning and supermasks.

All methods train the same architecture from the same seeds' initializations on the same batches and end with the same
number of weights. What differs, and is in the table, is how many steps one network costs in all.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lottery import masks as masks_lib
from lottery import prune
from tessera.infra.config import ConfigError, build
from tessera.infra.memo import Memo
from tessera.tickets.setup import Setup, make_setup
from tessera.tickets.studies.sparse_methods import METHODS, Method, MethodInputs, SparseConfig, make_inputs
from tessera.tickets.studies.study import DENSE, Comparison, Study, column, run_search, same

# Arms of the search that make rows here, and what they are called.
SEARCHED = {"ticket": "ticket (iterative)", "random_mask": "random mask, fixed", "at_init": "pruned at initialization"}
TICKET = SEARCHED["ticket"]


def run(config: Any, memo: Memo) -> Study:
    """Search for tickets, train with every other method, compare."""
    study = build(SparseConfig, config.study, "config.study")
    setup = make_setup(config)
    wrong = [arm for arm in setup.search.arms if arm not in SEARCHED]
    if wrong or setup.search.rewind or not setup.search.levels:
        raise ConfigError(
            f"config.search: arms among {', '.join(SEARCHED)}, rewind 0 and a level are needed, found arms {wrong}, "
            f"rewind {setup.search.rewind}, levels {setup.search.levels}"
        )
    inputs, _ = make_inputs(setup, study, config)
    rows = _searched(setup, memo, config)
    for name in study.methods:
        rows += memo.rows(name, _trained, inputs, METHODS[name])
    return _study(rows, setup)


def _searched(setup: Setup, memo: Memo, config: Any) -> list[dict[str, Any]]:
    """Rows of the dense networks and of the last level's arms."""
    _, rows = run_search(setup, memo, config)
    steps, levels = setup.ticket.steps, setup.search.levels
    return [
        _row(
            SEARCHED.get(row["arm"], DENSE),
            row,
            row["alive"] / row["prunable"],
            (levels + 1) * steps if row["arm"] == "ticket" else steps,
        )
        for row in rows
        if row["level"] in (0, levels)
    ]


def _trained(inputs: MethodInputs, method: Method) -> list[dict[str, Any]]:
    found, masks = method.train(inputs)
    shapes = jax.eval_shape(inputs.setup.network.init, jax.random.key(0))
    total = sum(prune.sizes(shapes, inputs.which).values())
    alive = np.asarray(jax.vmap(lambda mask: sum(masks_lib.count(mask, inputs.which).values()))(masks))
    steps = inputs.setup.ticket.steps
    return [_row(method.name, row, int(n) / total, steps) for row, n in zip(found, alive, strict=True)]


def _row(method: str, row: Mapping[str, Any], density: float, steps: int) -> dict[str, Any]:
    measured = {name: row[name] for name in ("seed", "final_test_accuracy", "final_test_loss")}
    return {"method": method, **measured, "density": density, "steps": steps, "note": row.get("note", "")}


def _study(rows: list[dict[str, Any]], setup: Setup) -> Study:
    arms = Comparison(rows, "method")
    ranked = sorted(arms.arms, key=lambda name: -arms.mean(name, 0))
    means = [f"{name} {100 * arms.mean(name, 0):.2f}%" for name in ranked]
    findings = [
        f"At {arms.density(0)} of the weights, from the best mean down: {', '.join(means)}; "
        f"the dense networks have {100 * np.mean(arms.dense):.2f}%."
    ]
    caption = (
        f"Test accuracy after the last of {setup.ticket.steps} steps (an iterative ticket's last run). Small marks are "
        "seeds, large ones means with 95% intervals; dotted: the mean of the dense networks."
    )
    columns = {
        "steps in all": lambda mine: mine[0]["steps"],
        "remarks": lambda mine: "; ".join(dict.fromkeys(note for note in column(mine, "note") if note)),
    }
    table = arms.table({TICKET: "ticket"} if TICKET in arms.arms else {}, columns)
    figure = arms.figure({"Ways to a sparse network": same(ranked)})
    return Study("Ways to a sparse network, at equal density", findings, table, figure, caption, rows)
