"""Expert specialization: mutual information between experts and token classes, and agreement between seeds.

Axes: C classes (token classes, positions, languages), E experts. Tables of counts add up over batches: collect them
with `joint_counts` on the device, and evaluate them on the host.

Example:
  >>> import numpy as np
  >>> from moe import specialization
  >>> round(specialization.mutual_information(1000 * np.eye(4)).normalized, 2)
  1.0
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Num

from moe.routing import Routing


def joint_counts(routing: Routing, classes_N: Int[Array, " N"], classes: int) -> Float32[Array, "C E"]:
    """Count choices by class of the token and expert; padding and classes outside 0..C-1 are ignored."""
    class_NC = (classes_N[:, None] == jnp.arange(classes)[None]).astype(jnp.float32)
    expert_NE = (routing.experts_NK[:, :, None] == jnp.arange(routing.num_experts)[None, None]).sum(axis=1)
    return class_NC.T @ expert_NE.astype(jnp.float32)


class Information(NamedTuple):
    """Estimates of mutual information, in nats.

    Fields:
      plain: the plug-in estimate.
      corrected: without its leading bias, (C'-1)(E'-1) / 2n for C' classes and E' experts that occur (Miller 1955); at
        least 0.
      normalized: `corrected` over the smaller of the two entropies: 1 if expert and class determine each other.
    """

    plain: float
    corrected: float
    normalized: float


def mutual_information(counts_CE: Num[np.ndarray, "C E"] | Num[Array, "C E"]) -> Information:
    """Estimate the mutual information I(class; expert) from a table of counts; zeros for an empty table."""
    table = np.asarray(counts_CE, np.float64)
    total = table.sum()
    if total == 0:
        return Information(0.0, 0.0, 0.0)
    joint = table / total
    rows, columns = joint.sum(1), joint.sum(0)
    occurs = joint > 0
    plain = float((joint[occurs] * np.log(joint[occurs] / np.outer(rows, columns)[occurs])).sum())
    bias = ((rows > 0).sum() - 1) * ((columns > 0).sum() - 1) / (2 * total)
    corrected = max(plain - float(bias), 0.0)
    smaller = min(_entropy(rows), _entropy(columns))
    return Information(max(plain, 0.0), corrected, corrected / smaller if smaller > 0 else 0.0)


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


class Agreement(NamedTuple):
    """Similarity of two seeds' experts: correlation of their class profiles under the best matching.

    Specialization is stable across seeds where `matched` is well above `chance`.

    Fields:
      matched: mean correlation of the matched experts.
      chance: its mean with the classes of one seed shuffled (the best matching of noise is positive).
      pairs: for every expert of the first seed the expert of the second, [E].
    """

    matched: float
    chance: float
    pairs: np.ndarray


def agreement(
    counts_CE: Num[np.ndarray, "C E"] | Num[Array, "C E"],
    other_CE: Num[np.ndarray, "C2 E2"] | Num[Array, "C2 E2"],
    *,
    shuffles: int = 20,
    seed: int = 0,
) -> Agreement:
    """Match the experts of two runs by their class profiles (Hungarian algorithm) and measure their agreement.

    A profile is p(expert | class) minus the expert's overall share, so that popularity alone is no similarity.

    Args:
      counts_CE: table of one run.
      other_CE: table of another run, same classes, same number of experts.
      shuffles: random shuffles of the classes for `chance`.
      seed: of the shuffles.

    Raises:
      ValueError: tables of different shapes.
    """
    if counts_CE.shape != other_CE.shape:
        raise ValueError(f"tables of {counts_CE.shape} and {other_CE.shape}: runs must share classes and experts")
    ours, theirs = _profiles(counts_CE), _profiles(other_CE)
    pairs, matched = _match(ours, theirs)
    rng = np.random.default_rng(seed)
    chance = [_match(ours, rng.permutation(theirs, axis=0))[1] for _ in range(shuffles)]
    return Agreement(matched, float(np.mean(chance)) if chance else 0.0, pairs)


def _profiles(counts_CE: Num[np.ndarray, "C E"] | Num[Array, "C E"]) -> np.ndarray:
    table = np.asarray(counts_CE, np.float64)
    profile = table / np.maximum(table.sum(1, keepdims=True), 1)
    profile -= table.sum(0, keepdims=True) / max(table.sum(), 1)
    return profile / np.maximum(np.linalg.norm(profile, axis=0, keepdims=True), 1e-12)


def _match(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, float]:
    from scipy.optimize import linear_sum_assignment  # half a second, and models import this module

    similarity = ours.T @ theirs
    rows, columns = linear_sum_assignment(-similarity)
    return columns, float(similarity[rows, columns].mean())
