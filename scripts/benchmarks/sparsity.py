"""What sparse weights save: a pruned feed-forward layer beside the dense one, measured here, counted for accelerators.

The layer is relu(x W1) W2. Where neurons are cut, W1 has fewer columns and W2 fewer rows; where blocks are pruned, live
blocks are listed; an unstructured or n:m mask is multiplied into dense weights, as training and serving do here, or
listed weight by weight in a compressed sparse row (CSR) matrix of SciPy.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lottery import block_sparse
from scripts.benchmarks.timing import Contest, Row
from sharding.analysis import find_hardware
from tessera.infra.schema import Schema

DENSE = "dense"


@dataclass(frozen=True)
class SparsityBenchmark:
    """A pruned feed-forward layer.

    Attributes:
      suite: the benchmark's name.
      cores: that the process may use; 0 is all.
      d: inputs and outputs.
      ff: hidden units.
      rows: of x, each a case; one alone is a decoding step.
      train: rows of x of the case that computes gradients of x and both weights too; 0 for none.
      densities: of the weights.
      blocks: sides of pruned blocks, 64 or 128.
      rounds: that are counted.
      chips: accelerators whose floors are counted, names of `sharding.analysis.HARDWARE`; () for none.
      large: (rows, d, ff) of the layers that they are counted for, bfloat16.
    """

    suite: str = "sparsity"
    cores: int = 1
    d: int = 512
    ff: int = 2048
    rows: tuple[int, ...] = (1024, 8)
    train: int = 1024
    densities: tuple[float, ...] = (0.5, 0.25, 0.1, 0.02)
    blocks: tuple[int, ...] = (128, 64)
    rounds: int = 7
    chips: tuple[str, ...] = ("v5p", "v6e", "H200")
    large: tuple[tuple[int, int, int], ...] = ((16384, 4096, 14336), (16, 4096, 14336))


SCHEMA = Schema(SparsityBenchmark)
Layer = Callable[..., jax.Array]  # (x, w1, w2) -> y


def rows(config: Any) -> Iterator[Row]:
    """Measured cases, each against the dense layer; then counted ones."""
    keys = jax.random.split(jax.random.key(0), 3)
    w1 = jax.random.normal(keys[0], (config.d, config.ff)) / config.d**0.5
    w2 = jax.random.normal(keys[1], (config.ff, config.d)) / config.ff**0.5
    for count in config.rows:
        x = jax.random.normal(keys[2], (count, config.d))
        calls = {name: _forward(layer, x, *weights) for name, (layer, *weights) in layers(config, w1, w2).items()}
        calls |= {f"CSR (SciPy), {density:.0%}": _csr(x, w1, w2, density) for density in config.densities}
        yield from Contest(
            f"forward, {count} rows, {config.d} x {config.ff}", calls, DENSE, rounds=config.rounds
        ).rows()
    if config.train:
        x = jax.random.normal(keys[2], (config.train, config.d))
        calls = {name: _train(layer, x, *weights) for name, (layer, *weights) in layers(config, w1, w2).items()}
        case = f"forward and gradients, {config.train} rows, {config.d} x {config.ff}"
        yield from Contest(case, calls, DENSE, rounds=config.rounds).rows()
    for chip in config.chips:
        for shape in config.large:
            yield from counted(chip, *shape)


def mask_of(shape: tuple[int, ...], density: float, block: int = 1, seed: int = 0) -> np.ndarray:
    """A random mask with round(density * blocks) live blocks."""
    units = shape[0] // block, shape[1] // block
    live = np.zeros(units[0] * units[1], bool)
    live[np.random.default_rng(seed).permutation(live.size)[: max(round(density * live.size), 1)]] = True
    return np.kron(live.reshape(units), np.ones((block, block), bool))


def layers(config: Any, w1: jax.Array, w2: jax.Array) -> dict[str, tuple]:
    """Name -> (layer, its weights)."""

    def masked(x: jax.Array, w1: tuple, w2: tuple) -> jax.Array:
        return plain(x, w1[0] * w1[1], w2[0] * w2[1])

    def plain(x: jax.Array, w1: jax.Array, w2: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ w1) @ w2

    def listed(x: jax.Array, w1: Any, w2: Any) -> jax.Array:
        return block_sparse.multiply(jax.nn.relu(block_sparse.multiply(x, w1)), w2)

    pair = lambda w, mask: (w, jnp.asarray(mask, w.dtype))  # noqa: E731
    found: dict[str, tuple] = {DENSE: (plain, w1, w2)}
    half = lambda w: np.tile(np.array([True, True, False, False])[:, None], (w.shape[0] // 4, w.shape[1]))  # noqa: E731
    found["2:4 mask, w * m, 50%"] = (masked, pair(w1, half(w1)), pair(w2, half(w2)))
    for density in config.densities:
        masks = (mask_of(w1.shape, density), mask_of(w2.shape, density, seed=1))
        found[f"unstructured mask, w * m, {density:.0%}"] = (masked, pair(w1, masks[0]), pair(w2, masks[1]))
        for block in config.blocks:
            packed = (
                block_sparse.pack(w, jnp.asarray(mask_of(w.shape, density, block, seed)), block)
                for seed, w in enumerate((w1, w2))
            )
            found[f"blocks of {block}, {density:.0%}"] = (listed, *packed)
        left = max(round(density * config.ff), 1)
        found[f"neurons cut, {density:.0%}"] = (plain, w1[:, :left], w2[:left])
    return found


def _forward(layer: Layer, *arguments: Any) -> Callable[[], object]:
    compiled = jax.jit(layer)
    return lambda: jax.block_until_ready(compiled(*arguments))


def _train(layer: Layer, x: jax.Array, *weights: Any) -> Callable[[], object]:
    """The gradients of x and of the weights that are numbers to be trained."""
    trained = [
        w.blocks if isinstance(w, block_sparse.BlockWeights) else w[0] if isinstance(w, tuple) else w for w in weights
    ]

    def loss(x: jax.Array, trained: list[jax.Array]) -> jax.Array:
        whole = [
            w._replace(blocks=t)
            if isinstance(w, block_sparse.BlockWeights)
            else (t, w[1])
            if isinstance(w, tuple)
            else t
            for w, t in zip(weights, trained, strict=True)
        ]
        return jnp.sum(layer(x, *whole) ** 2)

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return lambda: jax.block_until_ready(compiled(x, trained))


def _csr(x: jax.Array, w1: jax.Array, w2: jax.Array, density: float) -> Callable[[], object]:
    from scipy.sparse import csr_matrix

    left, right = (csr_matrix(np.asarray(w).T * mask_of(w.shape, density, seed=i).T) for i, w in enumerate((w1, w2)))
    columns = np.ascontiguousarray(np.asarray(x).T)
    return lambda: right @ np.maximum(left @ columns, 0)


def counted(chip: str, count: int, d: int, ff: int, density: float = 0.1) -> Iterator[Row]:
    """Floors by roofline, not measured: the larger of FLOPs at the peak and bytes of weights and rows at the bandwidth.

    bfloat16. Unstructured masks execute dense products. 2:4 halves FLOPs and stores 9/16 of the bytes on GPUs with
    sparse tensor cores, by a kernel that is not here; no TPU has them.
    """
    hardware = find_hardware(chip)
    values, flops = 2 * d * ff, 4 * count * d * ff
    activations = 2 * count * (2 * d + 2 * ff)
    cases = {DENSE: (1.0, 2.0 * values), f"unstructured mask, w * m, {density:.0%}": (1.0, 2.0 * values)}
    if hardware.platform == "gpu":
        cases["2:4 by sparse tensor cores, 50%"] = (0.5, 2.0 * values * 9 / 16)
    cases[f"blocks of 128, {density:.0%}"] = (density, 2.0 * values * density)
    cases[f"neurons cut, {density:.0%}"] = (density, 2.0 * values * density)
    dense = 0.0
    for name, (share, weights) in cases.items():
        cut = density if name.startswith("neurons") else 1.0
        moved = weights + activations - (1 - cut) * 4 * count * ff
        seconds = max(share * flops / hardware.flops, moved / hardware.bandwidth)
        dense = dense or seconds
        ratio = None if name == DENSE else (dense / seconds,) * 3
        bound = "FLOPs" if share * flops / hardware.flops > moved / hardware.bandwidth else "bytes"
        case = f"counted floor, not measured: {chip}, {count} rows, {d} x {ff}"
        yield Row(case, name, seconds, 1 / seconds, ratio, DENSE if ratio else "", {"bound by": bound})
