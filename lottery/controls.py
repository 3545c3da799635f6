"""Controls for lottery tickets: what they are compared with, and how far two masks are from chance."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from lottery import criteria, prune
from lottery import masks as masks_lib

__all__ = ["Overlap", "magnitude_at_init", "overlap", "same_sign", "shuffle_masks"]


def shuffle_masks(masks: PyTree, which: PyTree | None = None, *, key: Array) -> PyTree:
    """Shuffle masks within every layer: the ticket's density in each layer, nothing else of it.

    Frankle et al. 2021 (arXiv:2009.08576), section 4.

    Example:
      >>> masks = {"kernel": jnp.array([True, False, False])}
      >>> int(lottery.controls.shuffle_masks(masks, key=jax.random.key(0))["kernel"].sum())
      1
    """
    return masks_lib.random_like(masks, which, key=key)


def same_sign(initial: PyTree, fresh: PyTree, which: PyTree) -> PyTree:
    """Reinitialize with the same signs: another initialization with the first one's signs in prunable leaves.

    Zhou et al. 2019 (arXiv:1905.01067), section 4.1. Other leaves are fresh's. A weight that is exactly zero in either
    stays zero.

    Example:
      >>> initial, fresh = {"kernel": jnp.array([-1.0, 2.0])}, {"kernel": jnp.array([0.5, 0.25])}
      >>> lottery.controls.same_sign(initial, fresh, {"kernel": True})["kernel"].tolist()
      [-0.5, 0.25]
    """
    return jax.tree.map(lambda i, f, p: jnp.abs(f) * jnp.sign(i) if p else f, initial, fresh, which)


def magnitude_at_init(initial: PyTree, masks: PyTree, which: PyTree) -> PyTree:
    """Prune at initialization by magnitude, to the ticket's count in every layer (Frankle et al. 2021).

    Example:
      >>> initial, masks = {"kernel": jnp.array([-3.0, 1.0, 2.0])}, {"kernel": jnp.array([False, True, True])}
      >>> lottery.controls.magnitude_at_init(initial, masks, {"kernel": True})["kernel"].tolist()
      [True, False, True]
    """
    counts = masks_lib.count(masks, which)
    return prune.keep(criteria.magnitude(initial), masks_lib.ones(initial), which, counts)


@dataclass(frozen=True)
class Overlap:
    """How many weights two masks of a layer share, and how many independent ones of the same counts would.

    Attributes:
      shared: weights that both have.
      expected: mean of the hypergeometric distribution.
      deviation: its standard deviation.
      jaccard: shared over the weights that either has.
      z: (shared - expected) / deviation; nan where chance has no spread.

    Example:
      >>> lottery.controls.Overlap(shared=3, expected=1.0, deviation=0.5, jaccard=0.6, z=4.0).z
      4.0
    """

    shared: int
    expected: float
    deviation: float
    jaccard: float
    z: float


def overlap(a: PyTree, b: PyTree, which: PyTree) -> dict[str, Overlap]:
    """Compare the overlap of two mask trees with chance, for every prunable layer by name, and for all together as "*".

    Chance is a random mask with the same count in each layer (`structures.layers`), layers independent, so that layers
    of different density do not look like agreement.

    Raises:
      ValueError: b has other leaves or shapes than a (naming the path).

    Example:
      >>> a, b = {"kernel": jnp.arange(4) < 2}, {"kernel": jnp.arange(4) < 2}
      >>> found = lottery.controls.overlap(a, b, {"kernel": True})["kernel"]
      >>> found.shared, found.expected, found.jaccard
      (2, 1.0, 1.0)
    """
    masks_lib.check(b, a)
    both = jax.tree.map(jnp.logical_and, a, b)
    mine, theirs, shared = (jax.device_get(masks_lib.count(tree, which)) for tree in (a, b, both))
    sizes = prune.sizes(a, which)
    counts = {layer: [size, *(int(x[layer]) for x in (mine, theirs, shared))] for layer, size in sizes.items()}
    result = {layer: _overlap([count]) for layer, count in counts.items()}
    return result | {prune.EVERYTHING: _overlap(list(counts.values()))}


def _overlap(counts: list[list[int]]) -> Overlap:
    expected = sum(a * b / n for n, a, b, _ in counts)
    variance = sum(a * b * (n - a) * (n - b) / (n * n * (n - 1)) for n, a, b, _ in counts if n > 1)
    shared = sum(both for *_, both in counts)
    either = sum(a + b - both for _, a, b, both in counts)
    deviation = math.sqrt(variance)
    z = (shared - expected) / deviation if deviation else math.nan
    return Overlap(shared, expected, deviation, shared / either if either else math.nan, z)
