"""Probes of trained tickets: linear and nonlinear mode connectivity, sharpness (Hessian, SAM), overlap of masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from lottery import connectivity, controls, sharpness
from lottery import masks as masks_lib
from tessera.models.registry import STATISTICS, Network
from tessera.tickets.setup import Setup
from tessera.tickets.train import batched, evaluate


@dataclass(frozen=True)
class AnalysisConfig:
    """How closely to look at the networks of a search.

    Attributes:
      points: interpolation coefficients on every path between two networks (linear mode connectivity).
      curve_steps: batches on which the control point of a Bezier curve between the two networks is trained (nonlinear
        mode connectivity, Garipov et al. 2018); the curve is drawn beside the line. 0 leaves it out.
      curve_learning_rate: of its Adam.
      examples: training examples for curvature and for batch statistics.
      lanczos: Hessian products for the top eigenvalue.
      rho: radius of sharpness as in SAM.
    """

    points: int = 11
    curve_steps: int = 0
    curve_learning_rate: float = 1e-3
    examples: int = 1000
    lanczos: int = 20
    rho: float = 0.05

    def __post_init__(self):
        if self.points < 2 or self.examples < 1 or self.lanczos < 1 or self.rho <= 0:
            raise ValueError(f"{self}: points >= 2, examples >= 1, lanczos >= 1 and rho > 0 are needed")
        if self.curve_steps < 0 or self.curve_learning_rate <= 0:
            raise ValueError(f"{self}: curve_steps >= 0 and curve_learning_rate > 0 are needed")


def path_rows(
    setup: Setup, a: PyTree, b: PyTree, config: AnalysisConfig, part: str = "test", masks: PyTree | None = None
) -> list[dict[str, Any]]:
    """Measure mode connectivity: loss and error on the lines between two stacks [S, ...], one row per pair.

    With `config.curve_steps` also on a Bezier curve whose control point is trained, in `masks` if there are any. Batch
    statistics are estimated again on training examples at every point (REPAIR's reset, Jordan et al. 2023,
    arXiv:2211.08403, section 3.1), since the mean of two networks' statistics fits neither.

    Returns:
      Rows {alpha, loss, error (lists over the path), instability and barrier of the error, loss_barrier, ends, stable
      (instability below 2%)}; of the curve {curve_loss, curve_error, curve_instability, ...}.
    """
    data = batched(getattr(setup.splits, part))
    examples = _examples(setup, config.examples)

    def metrics(params: PyTree, data: Any, examples: Any) -> tuple[Array, Array]:
        loss, accuracy = evaluate(refreshed(setup.network, params, examples), data, setup.network.apply)
        return loss, 1 - accuracy

    @jax.jit
    def paths(a: PyTree, b: PyTree, bend: PyTree | None, data: Any, examples: Any) -> tuple[Array, tuple[Array, Array]]:
        def one(ends: tuple[PyTree, PyTree, PyTree | None]) -> tuple[Array, PyTree]:
            first, last, control = ends
            return connectivity.along(lambda p: metrics(p, data, examples), first, last, config.points, bend=control)

        return jax.lax.map(one, (a, b, bend))

    alphas, (loss, error) = jax.device_get(paths(a, b, None, data, examples))
    rows = []
    for alpha, losses, errors in zip(alphas, loss, error, strict=True):
        row = {"alpha": alpha.tolist()} | _heights(alpha, losses, errors)
        rows.append(
            row | {"ends": float(errors[0] + errors[-1]) / 2, "stable": row["instability"] < connectivity.STABLE}
        )
    if config.curve_steps:
        _, (loss, error) = jax.device_get(paths(a, b, _bends(setup, a, b, masks, config), data, examples))
        for row, losses, errors in zip(rows, loss, error, strict=True):
            found = _heights(np.asarray(row["alpha"]), losses, errors)
            row |= {f"curve_{name}": value for name, value in found.items()}
    return rows


def _heights(alpha: np.ndarray, losses: np.ndarray, errors: np.ndarray) -> dict[str, Any]:
    at, loss, error = (jnp.asarray(x) for x in (alpha, losses, errors))
    found: dict[str, Any] = {"loss": losses.tolist(), "error": errors.tolist()}
    found |= {"instability": float(connectivity.instability(error)), "barrier": float(connectivity.barrier(at, error))}
    return found | {"loss_barrier": float(connectivity.barrier(at, loss))}


def _bends(setup: Setup, a: PyTree, b: PyTree, masks: PyTree | None, config: AnalysisConfig) -> PyTree:
    """Control points [S, ...] of the curves from a to b, each trained on the same batches."""
    data = setup.splits.train
    size = min(setup.ticket.batch_size, len(data.labels))
    order = np.random.default_rng(2)
    index = np.stack([order.choice(len(data.labels), size, replace=False) for _ in range(config.curve_steps)])
    adam = optax.adam(config.curve_learning_rate)

    @jax.jit
    def fit(a: PyTree, b: PyTree, masks: PyTree | None, index: Array, x: Array, y: Array) -> PyTree:
        def one(ends: tuple[PyTree, PyTree, PyTree | None, Array]) -> PyTree:
            first, last, mask, key = ends
            loss = lambda params, rows: setup.loss(params, (x[rows], y[rows]))  # noqa: E731
            return connectivity.fit_bend(loss, first, last, index, adam, key=key, masks=mask)[0]

        keys = jax.random.split(jax.random.key(3), len(jax.tree.leaves(a)[0]))
        return jax.lax.map(one, (a, b, masks, keys))

    return fit(a, b, masks, jnp.asarray(index), jnp.asarray(data.images), jnp.asarray(data.labels))


def refreshed(network: Network, params: PyTree, examples: tuple[Array, Array]) -> PyTree:
    """Estimate a network's batch statistics again on examples [n, b, ...]; unchanged if it has none."""
    if STATISTICS not in params:
        return params

    def step(total: PyTree, x: Array) -> tuple[PyTree, None]:
        before = jax.tree.map(jnp.zeros_like, params[STATISTICS])
        # From zero, one update gives (1 - momentum) times the batch's statistics: that share is divided out below.
        _, after = network.train({**params, STATISTICS: before}, x)
        return jax.tree.map(jnp.add, total, after[STATISTICS]), None

    zero = jax.tree.map(jnp.zeros_like, params[STATISTICS])
    ones = jax.tree.map(jnp.ones_like, params[STATISTICS])
    x = examples[0]
    total, _ = jax.lax.scan(step, zero, x)
    # One update of ones minus one of zeros tells the momentum, which the network does not give.
    left = network.train({**params, STATISTICS: ones}, x[0])[1][STATISTICS]
    added = network.train({**params, STATISTICS: zero}, x[0])[1][STATISTICS]
    share = jax.tree.map(lambda k, a: 1 - jnp.mean(k - a), left, added)
    statistics = jax.tree.map(lambda t, s: t / (len(x) * s), total, share)
    return {**params, STATISTICS: statistics}


def sharpness_rows(setup: Setup, params: PyTree, masks: PyTree, config: AnalysisConfig) -> list[dict[str, Any]]:
    """Measure sharpness: top Hessian eigenvalue (with the residual that bounds its error) and SAM's, per network.

    Of the mean training loss over the first `config.examples` examples of a fixed order, in the space of the weights
    that are alive; batch statistics are those of evaluation, held fixed.
    """
    x, y = _examples(setup, config.examples)
    lanczos = sharpness.LanczosConfig(steps=config.lanczos)

    def one(pair: tuple[PyTree, PyTree], x: Array, y: Array) -> tuple[Array, Array, Array, Array]:
        params, mask = pair
        if STATISTICS in params:
            mask = {**mask, STATISTICS: jax.tree.map(jnp.zeros_like, mask[STATISTICS])}

        def loss(p: PyTree) -> Array:
            return evaluate(p, (x, y), setup.network.apply)[0]

        key = jax.random.key(0)
        values, residuals = sharpness.top_eigenvalues(loss, params, mask, lanczos, key=key)
        return loss(params), values[0], residuals[0], sharpness.sharpness(loss, params, mask, config.rho)

    run = jax.jit(lambda pair, x, y: jax.lax.map(lambda p: one(p, x, y), pair))
    columns = [np.asarray(values).tolist() for values in run((params, masks), x, y)]
    names = ("train_loss", "eigenvalue", "residual", "sharpness")
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def overlap_rows(masks: PyTree, seeds: Sequence[int], which: PyTree) -> list[dict[str, Any]]:
    """Compare the overlap of every two masks of a stack with chance, by path and for all together ("*")."""
    rows = []
    for i in range(len(seeds)):
        for j in range(i + 1, len(seeds)):
            one, two = (jax.tree.map(lambda m, k=k: m[k], masks) for k in (i, j))
            distance = float(masks_lib.distance(one, two, which))
            for path, found in controls.overlap(one, two, which).items():
                row: dict[str, Any] = {"first": seeds[i], "second": seeds[j], "path": path, "distance": distance}
                row |= {"shared": found.shared, "expected": found.expected, "z": found.z, "jaccard": found.jaccard}
                rows.append(row | {"ratio": found.shared / found.expected if found.expected else float("nan")})
    return rows


def _examples(setup: Setup, count: int) -> tuple[Array, Array]:
    """Training examples of a fixed order in batches [n, b, ...], none left over."""
    data = setup.splits.train
    count = min(count, len(data.labels))
    size = min(100, count)
    index = np.random.default_rng(1).permutation(len(data.labels))[: count // size * size].reshape(-1, size)
    return jnp.asarray(data.images[index]), jnp.asarray(data.labels[index])
