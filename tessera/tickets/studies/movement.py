"""How far weights move from their initialization, and whether a picture drawn into them is still there afterwards.

A ticket is an initialization: if training erased it, nothing could be left to win with. Dense networks are trained by
several optimizers, each at the best of its learning rates. Of every layer: correlation of the weights with their
initialization and their relative distance from it, along training. In a second run of the same seeds a picture, one
training image enlarged, takes the place of the initial weights of one matrix, with their mean and variance.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from lottery import masks as masks_lib
from lottery import summary
from tessera.infra.config import ConfigError, build
from tessera.infra.memo import Memo
from tessera.optim.optimizer import OptimizerConfig, make_optimizer
from tessera.reports.html import Table
from tessera.reports.style import Figure, canvas, deferred, line_with_band, log_values, look, titles
from tessera.tickets.setup import Setup, init_stack, make_setup
from tessera.tickets.studies.study import Study, column, with_interval
from tessera.tickets.train import measure, train_blocks


@dataclass(frozen=True)
class MovementConfig:
    """Optimizers, and when their networks are looked at.

    Attributes:
      optimizers: (name, learning rate) pairs; of every name the rate of the lowest mean validation loss counts.
      steps: of training, rising from 1; the last step is added.
      layer: the matrix that the picture is drawn into, a path; "" for no picture.
    """

    optimizers: tuple[tuple[str, float], ...] = (("adam", 1e-3), ("momentum", 0.05), ("muon", 0.02))
    steps: tuple[int, ...] = (10, 30, 100, 300)
    layer: str = "dense1/kernel"

    def __post_init__(self):
        if list(self.steps) != sorted(set(self.steps)) or not self.steps or self.steps[0] < 1 or not self.optimizers:
            raise ValueError(f"{self}: steps that rise from 1 and an optimizer are needed")


def run(config: Any, memo: Memo) -> Study:
    """Train every optimizer at every rate, with and without the picture."""
    study = build(MovementConfig, config.study, "config.study")
    setup = make_setup(config)
    if study.steps[-1] >= setup.ticket.steps:
        raise ConfigError(f"config.study.steps: {study.steps[-1]} is not below the {setup.ticket.steps} of training")
    shapes = masks_lib.flatten(jax.eval_shape(setup.network.init, jax.random.key(0)))
    if study.layer and (study.layer not in shapes or len(shapes[study.layer].shape) != 2):
        raise ConfigError(
            f"config.study.layer={study.layer!r} is no matrix; choose from "
            f"{', '.join(path for path, leaf in shapes.items() if len(leaf.shape) == 2)}"
        )
    rows, shown = [], {}
    for drawn in (False, True) if study.layer else (False,):
        for name, lr in study.optimizers:
            label = f"{name}_{lr:g}" + "_picture" * drawn
            rows += memo.rows(label, train, setup, study, config, name, lr, drawn)
    best = best_rates(rows)
    if study.layer:
        like = {"before": jax.ShapeDtypeStruct(shapes[study.layer].shape, jnp.float32)}
        like["after"] = like["before"]
        for name, lr in best.items():
            shown[name] = memo.tree(f"picture_{name}", like, _pictures, setup, study, config, name, lr)
    return _study([row for row in rows if best[row["optimizer"]] == row["lr"]], best, shown, study, setup)


def best_rates(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The learning rate of the lowest mean validation loss at the end, by optimizer, without the picture."""
    last = max(row["step"] for row in rows)
    losses: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if row["step"] == last and not row["picture"] and row["layer"] == "*":
            losses.setdefault(row["optimizer"], {}).setdefault(row["lr"], []).append(row["validation_loss"])
    return {name: min(rates, key=lambda lr: np.mean(rates[lr])) for name, rates in losses.items()}


def picture(image: Float[np.ndarray, "H W C"], weights: Float[Array, "I O"]) -> Float[Array, "I O"]:
    """An image, enlarged to the shape of a matrix, with the mean and standard deviation of its weights."""
    large = jax.image.resize(jnp.asarray(image).mean(-1), weights.shape, "linear")
    large = (large - large.mean()) / large.std()
    return weights.mean() + weights.std() * large


def _starts(setup: Setup, study: MovementConfig, drawn: bool) -> PyTree:
    params = init_stack(setup, setup.search.seeds)
    if not drawn:
        return params
    image = setup.splits.train.images[0]
    *parents, name = study.layer.split("/")

    def draw(tree: Any, parents: list[str]) -> Any:
        if parents:
            return {**tree, parents[0]: draw(tree[parents[0]], parents[1:])}
        return {**tree, name: jax.vmap(lambda weights: picture(image, weights))(tree[name])}

    return draw(params, parents)


def _trained(
    setup: Setup, study: MovementConfig, config: Any, name: str, lr: float, start: PyTree, after: Any
) -> tuple[Any, Any]:
    settings = build(
        OptimizerConfig, {**config.optimizer, "name": name}, "config.optimizer", lr=lr, steps=setup.ticket.steps
    )
    programs = setup.programs_for(make_optimizer(settings))
    state = programs.init(start, masks_lib.ones(start))
    marks = [*study.steps, setup.ticket.steps]
    seeds = setup.search.seeds
    names = [f"{name} at {lr:g}, seed {seed}" for seed in seeds]
    order: dict[str, Any] = {"config": setup.ticket, "size": setup.size, "seeds": seeds, "names": names}
    _, state = train_blocks(programs, state, masks_lib.ones(start), marks, **order, after=after)
    return programs, state


def train(setup: Setup, study: MovementConfig, config: Any, name: str, lr: float, drawn: bool) -> list[dict[str, Any]]:
    """Train all seeds by one optimizer; a row a seed, step and layer ("*": all matrices), with the final accuracy."""
    start = _starts(setup, study, drawn)
    seeds = setup.search.seeds
    rows: list[dict[str, Any]] = []

    def after(step: int, state: Any, row: Mapping[str, Any]) -> None:
        for path, (correlations, distances) in moved(start, state.params).items():
            for i, seed in enumerate(seeds):
                found = {"optimizer": name, "lr": lr, "picture": drawn, "seed": seed, "step": step, "layer": path}
                found |= {"correlation": float(correlations[i]), "distance": float(distances[i])}
                rows.append(found | {"validation_loss": row["validation_loss"][i]})

    programs, state = _trained(setup, study, config, name, lr, start, after)
    tests = measure(programs, state)
    return [{**row, "accuracy": tests[seeds.index(row["seed"])]["final_test_accuracy"]} for row in rows]


def moved(before: PyTree, after: PyTree) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(Correlation, relative distance) of each matrix of a stack and its earlier self, float64 [S]; "*" is all of them.

    The distance is |after - before| / |before|.
    """
    first, last = ({p: np.asarray(x, np.float64) for p, x in masks_lib.flatten(t).items()} for t in (before, after))
    flat = {path: (x.reshape(len(x), -1), last[path].reshape(len(x), -1)) for path, x in first.items() if x.ndim > 2}
    flat["*"] = tuple(np.concatenate(side, 1) for side in zip(*flat.values(), strict=True))  # type: ignore[assignment]

    def both(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, y = (side - side.mean(1, keepdims=True) for side in (a, b))
        correlation = (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))
        return correlation, np.linalg.norm(b - a, axis=1) / np.linalg.norm(a, axis=1)

    return {path: both(*pair) for path, pair in flat.items()}


def _pictures(setup: Setup, study: MovementConfig, config: Any, name: str, lr: float) -> PyTree:
    """The matrix of the first seed that held the picture, before and after training."""
    start = _starts(setup, study, True)
    _, state = _trained(setup, study, config, name, lr, start, lambda step, state, row: None)
    before, after = (masks_lib.flatten(tree)[study.layer][0] for tree in (start, state.params))
    return {"before": before, "after": after}


def _study(
    rows: list[dict[str, Any]],
    best: Mapping[str, float],
    shown: Mapping[str, PyTree],
    study: MovementConfig,
    setup: Setup,
) -> Study:
    last = max(row["step"] for row in rows)
    ends = [row for row in rows if row["step"] == last]
    layers = [path for path in dict.fromkeys(row["layer"] for row in ends) if path != "*"] + ["*"]

    def cell(name: str, layer: str, drawn: bool = False) -> list[dict[str, Any]]:
        return [r for r in ends if (r["optimizer"], r["layer"], r["picture"]) == (name, layer, drawn)]

    body, findings = [], []
    for name, lr in best.items():
        for layer in layers:
            mine = cell(name, layer)
            told = [with_interval(column(mine, key), 1.0, 3) for key in ("correlation", "distance")]
            accuracy = with_interval(column(mine, "accuracy")) if layer == "*" else None
            body.append([name, f"{lr:g}", "all" if layer == "*" else layer, *told, accuracy])
        whole = cell(name, "*")
        text = (
            f"{name} at {lr:g}: after {last} steps weights correlate with their initialization by "
            f"{with_interval(column(whole, 'correlation'), 1.0, 3)} and are "
            f"{with_interval(column(whole, 'distance'), 1.0)} of its norm away"
        )
        if study.layer:
            drawn = column(cell(name, study.layer, True), "correlation")
            text += f"; {study.layer} correlates with the picture drawn into it by {with_interval(drawn, 1.0, 3)}"
        findings.append(text + ".")
    head = ["optimizer", "rate", "layer", "correlation with the start", "distance / norm", "test accuracy (%)"]
    caption = (
        f"Means and 95% intervals over {len(setup.search.seeds)} seeds, dense networks, each optimizer at the best of "
        "its learning rates by validation loss. Below, the matrix with the picture after training."
    )
    title = "How far weights move from their initialization"
    return Study(title, findings, Table(head, body), _figure(rows, shown), caption, rows)


@deferred
def _figure(rows: list[dict[str, Any]], shown: Mapping[str, PyTree]) -> Figure:
    """Correlation and distance along training; the picture before and after."""
    count = max(len(shown) + 1, 2)
    figure, axes = canvas(count, 2 if shown else 1, width=2.9 * count, height=6.2 if shown else 3.4)
    whole = [row for row in rows if row["layer"] == "*" and not row["picture"]]
    steps = sorted({row["step"] for row in whole})
    for ax, (key, title) in zip(axes, (("correlation", "Correlation"), ("distance", "Distance / norm")), strict=False):
        for i, name in enumerate(dict.fromkeys(row["optimizer"] for row in whole)):
            cells = [[r[key] for r in whole if (r["optimizer"], r["step"]) == (name, step)] for step in steps]
            mean, half, _ = zip(*map(summary.interval, cells), strict=True)
            line_with_band(ax, steps, mean, half, label=name, **look(i))
        log_values(ax, "x", values=steps)
        titles(ax, title, "step", "with the initialization")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside lower center", ncols=9)
    for ax in axes[2:count]:
        ax.remove()
    if shown:
        first = next(iter(shown.values()))["before"]
        pictures = {"before": first} | {f"after, {name}": tree["after"] for name, tree in shown.items()}
        for ax, (title, weights) in zip(axes[count:], pictures.items(), strict=True):
            spread = 3 * float(np.std(weights))
            ax.imshow(np.asarray(weights), cmap="gray", vmin=-spread, vmax=spread, aspect="auto")
            ax.set_axis_off()
            titles(ax, title)
    return figure
