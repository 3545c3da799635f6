"""Probes of trained tickets: linear mode connectivity, sharpness (top Hessian eigenvalue, SAM), overlap of masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
      examples: training examples for curvature and for batch statistics.
      lanczos: Hessian products for the top eigenvalue.
      rho: radius of sharpness as in SAM.
    """

    points: int = 11
    examples: int = 1000
    lanczos: int = 20
    rho: float = 0.05

    def __post_init__(self):
        if self.points < 2 or self.examples < 1 or self.lanczos < 1 or self.rho <= 0:
            raise ValueError(f"{self}: points >= 2, examples >= 1, lanczos >= 1 and rho > 0 are needed")


def path_rows(setup: Setup, a: PyTree, b: PyTree, config: AnalysisConfig, part: str = "test") -> list[dict[str, Any]]:
    """Measure linear mode connectivity: loss and error on the lines between two stacks [S, ...], one row per pair.

    Batch statistics are estimated again on training examples at every point (REPAIR's reset, Jordan et al. 2023,
    arXiv:2211.08403, section 3.1), since the mean of two networks' statistics fits neither.

    Returns:
      Rows {alpha, loss, error (lists over the path), instability and barrier of the error, loss_barrier, ends, stable
      (instability below 2%)}.
    """
    data = batched(getattr(setup.splits, part))
    examples = _examples(setup, config.examples)

    def metrics(params: PyTree, data: Any, examples: Any) -> tuple[Array, Array]:
        loss, accuracy = evaluate(refreshed(setup.network, params, examples), data, setup.network.apply)
        return loss, 1 - accuracy

    @jax.jit
    def paths(a: PyTree, b: PyTree, data: Any, examples: Any) -> tuple[Array, tuple[Array, Array]]:
        def one(pair: tuple[PyTree, PyTree]) -> tuple[Array, PyTree]:
            return connectivity.along(lambda p: metrics(p, data, examples), pair[0], pair[1], config.points)

        return jax.lax.map(one, (a, b))

    alphas, (loss, error) = jax.device_get(paths(a, b, data, examples))
    rows = []
    for alpha, losses, errors in zip(alphas, loss, error, strict=True):
        rise = float(connectivity.instability(jnp.asarray(errors)))
        row: dict[str, Any] = {"alpha": alpha.tolist(), "loss": losses.tolist(), "error": errors.tolist()}
        row |= {"instability": rise, "barrier": float(connectivity.barrier(jnp.asarray(alpha), jnp.asarray(errors)))}
        row |= {"loss_barrier": float(connectivity.barrier(jnp.asarray(alpha), jnp.asarray(losses)))}
        rows.append(row | {"ends": float(errors[0] + errors[-1]) / 2, "stable": rise < connectivity.STABLE})
    return rows


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
