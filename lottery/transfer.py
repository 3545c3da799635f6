"""Mask transfer: the mask of one run for the weights of another, whatever its seed, data, optimizer or width.

Morcos et al. 2019 (arXiv:1906.02773).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lottery import masks as masks_lib

__all__ = ["by_seed", "of_arm", "resize"]


def of_arm(tree: PyTree, rows: Sequence[Mapping[str, Any]], arm: str) -> tuple[PyTree, tuple[int, ...]]:
    """Select the networks of one arm in a stack.

    Args:
      tree: arrays [S, ...], e.g. the "masks" or "params" of a level.
      rows: S dicts with "arm" and "seed", the level's rows.
      arm: an arm's name; "dense" at level 0.

    Returns:
      (tree of their rows, seeds in the stack's order).

    Raises:
      ValueError: no row has this arm.

    Example:
      >>> rows = [{"arm": "ticket", "seed": 3}, {"arm": "reinit", "seed": 3}]
      >>> tree, seeds = lottery.transfer.of_arm({"kernel": jnp.array([[1], [2]])}, rows, "reinit")
      >>> tree["kernel"].tolist(), seeds
      ([[2]], (3,))
    """
    mine = [i for i, row in enumerate(rows) if row["arm"] == arm]
    if not mine:
        raise ValueError(f"no networks of arm {arm!r}; arms: {', '.join(dict.fromkeys(row['arm'] for row in rows))}")
    index = np.asarray(mine)
    return jax.tree.map(lambda leaf: leaf[index], tree), tuple(int(rows[i]["seed"]) for i in mine)


def resize(masks: PyTree, params: PyTree) -> PyTree:
    """Resize masks to networks of other widths: unit i gets the connections of unit i modulo the old width.

    Axes that grow repeat their units in order, axes that shrink lose the last. Densities of grown leaves are those of
    the original if the old width divides the new one.

    Args:
      masks: bool tree.
      params: parameters (arrays or shapes) with the same paths and numbers of axes.

    Raises:
      ValueError: other paths or another number of axes, naming the path.

    Example:
      >>> lottery.transfer.resize({"bias": jnp.array([True, False])}, {"bias": jnp.zeros(4)})["bias"].tolist()
      [True, False, True, False]
    """
    mine, theirs = masks_lib.flatten(masks), masks_lib.flatten(params)
    wrong = [path for path in [*theirs, *mine] if path not in mine or path not in theirs]
    if wrong:
        raise ValueError(f"resize: {wrong[0]} is in only one of masks and parameters; masks: {', '.join(mine)}")
    resized = {}
    for path, leaf in theirs.items():
        mask = jnp.asarray(mine[path])
        if mask.ndim != len(leaf.shape):
            raise ValueError(f"resize: {path} has shape {mask.shape}, the parameter {leaf.shape}")
        for axis, size in enumerate(leaf.shape):
            mask = mask.take(jnp.arange(size) % mask.shape[axis], axis=axis)
        resized[path] = mask
    return jax.tree.unflatten(jax.tree.structure(params), list(resized.values()))


def by_seed(found: tuple[PyTree, tuple[int, ...]], seeds: Sequence[int], shift: int = 0) -> PyTree:
    """Choose a mask for every one of `seeds`: of the same seed, or of the one `shift` places on in the other run.

    Args:
      found: what `of_arm` returns. Seeds the other run lacks take its networks in turn.
      seeds: of the run that gets the masks.
      shift: places.

    Example:
      >>> found = {"bias": jnp.array([[True], [False]])}, (3, 5)
      >>> lottery.transfer.by_seed(found, [5, 3])["bias"].tolist()
      [[False], [True]]
    """
    tree, have = found
    places = [(have.index(s) if s in have else i) + shift for i, s in enumerate(seeds)]
    index = np.asarray(places) % len(have)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], tree)
