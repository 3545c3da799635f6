"""Scores: what each weight is worth, a tree of float32 arrays like the parameters. The lowest are pruned first."""

import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from lottery.masks import path_name


def magnitude(params: PyTree) -> PyTree:
    """Absolute values in float32 (Frankle & Carbin 2019, section 2)."""
    return jax.tree.map(lambda p: jnp.abs(p.astype(jnp.float32)), params)


def random(params: PyTree, *, key: Array) -> PyTree:
    """Uniform scores in [0, 1), float32: random pruning as a control. Each leaf's draw depends on key and its path."""

    def draw(path: tuple, leaf: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, zlib.crc32(path_name(path).encode())), leaf.shape)

    return jax.tree_util.tree_map_with_path(draw, params)


def _magnitude(params: PyTree, *, key: Array) -> PyTree:
    del key
    return magnitude(params)


# One calling convention, score(params, *, key), for code that takes the name from a config.
SCORES: dict[str, Callable[..., PyTree]] = {"magnitude": _magnitude, "random": random}
