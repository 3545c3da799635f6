"""Controls: what a ticket is compared with, and how far two masks are from chance."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from lottery import criteria, prune
from lottery import masks as masks_lib


def shuffle_masks(masks: PyTree, *, key: Array) -> PyTree:
    """Masks permuted within every leaf: the ticket's density in each layer, nothing else of it (Frankle 2021, 4)."""
    return masks_lib.random_like(masks, key=key)


def same_sign(initial: PyTree, fresh: PyTree, which: PyTree) -> PyTree:
    """Another initialisation with the signs of the first in prunable leaves (Zhou et al. 2019, section 4.1).

    Other leaves are fresh's. A weight that is exactly zero in either stays zero.
    """
    return jax.tree.map(lambda i, f, p: jnp.abs(f) * jnp.sign(i) if p else f, initial, fresh, which)


def magnitude_at_init(initial: PyTree, masks: PyTree, which: PyTree) -> PyTree:
    """The ticket's count in every layer, at the largest weights of the initialisation (Frankle et al. 2021)."""
    counts = masks_lib.count(masks, which)
    return prune.keep(criteria.magnitude(initial), masks_lib.ones(initial), which, counts)


@dataclass(frozen=True)
class Overlap:
    """How many weights two masks of a leaf share, and how many independent ones of the same counts would.

    shared: weights both keep. expected, deviation: mean and standard deviation of the hypergeometric distribution.
    jaccard: shared over kept by either. z: (shared - expected) / deviation; nan where chance leaves no room.
    """

    shared: int
    expected: float
    deviation: float
    jaccard: float
    z: float


def overlap(a: PyTree, b: PyTree, which: PyTree) -> dict[str, Overlap]:
    """Overlap of two mask trees with chance, for every prunable leaf by path, and for all together as "*".

    Chance is a random mask with the same count in each leaf, leaves independent, so that layers of different density
    do not look like agreement.

    Raises:
      ValueError: b has other leaves or shapes than a (naming the path).
    """
    masks_lib.check(b, a)
    left, right, chosen = (masks_lib.flatten(tree) for tree in (a, b, which))
    counts = {
        path: [left[path].size] + [int(jnp.sum(x)) for x in (left[path], right[path], left[path] & right[path])]
        for path, keep in chosen.items()
        if keep
    }
    result = {path: _overlap([count]) for path, count in counts.items()}
    return result | {prune.EVERYTHING: _overlap(list(counts.values()))}


def _overlap(counts: list[list[int]]) -> Overlap:
    expected = sum(a * b / n for n, a, b, _ in counts)
    variance = sum(a * b * (n - a) * (n - b) / (n * n * (n - 1)) for n, a, b, _ in counts if n > 1)
    shared = sum(both for *_, both in counts)
    either = sum(a + b - both for _, a, b, both in counts)
    deviation = math.sqrt(variance)
    z = (shared - expected) / deviation if deviation else math.nan
    return Overlap(shared, expected, deviation, shared / either if either else math.nan, z)
