"""Merge similar experts into fewer: REAM, router-weighted expert activation merging (Jha et al. 2026).

arXiv:2604.04356. Pruning throws weak experts away; here each joins a strong one that answers alike. Groups are made
around the most salient experts, the hidden neurons of their members are brought into the order of the group's first
expert, and kernels are averaged by saliency. The router keeps the columns of the first experts. On the host, as
assignments are solved by scipy; `tessera.compress` gathers what the functions take. Axes: E experts, M tokens, D width,
F feed-forward width, K experts that stay.

Example:
  >>> import numpy as np
  >>> from moe import ream
  >>> outputs, logits = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), np.array([[2.0, 1.9, -1.0], [1.0, 1.1, -2.0]])
  >>> ream.group_experts(np.array([3.0, 1.0, 2.0]), ream.expert_similarity(outputs, logits.T @ logits), keep=2)
  array([0, 0, 2])
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.special import expit

__all__ = ["expert_similarity", "group_experts", "merge_experts"]


def expert_similarity(
    outputs_ED: Float[np.ndarray, "E D"], gram_EE: Float[np.ndarray, "E E"]
) -> Float[np.ndarray, "E E"]:
    """Compute the similarity of experts, 0 to 1: of what they put out and of when the router asks for them.

    The mean of (1 + cosine of the mean outputs) / 2 and of 1 - distance over largest distance of the router's logits,
    those of an expert scaled to length one over the tokens.

    Args:
      outputs_ED: mean over tokens of router probability times output, of every expert on every token.
      gram_EE: the router's logits [M, E] times themselves, summed over tokens.

    Example:
      >>> import numpy as np
      >>> from moe import ream
      >>> ream.expert_similarity(np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), np.eye(3)).round(2).tolist()
      [[1.0, 0.5, 0.25], [0.5, 1.0, 0.25], [0.25, 0.25, 1.0]]
    """
    direction_ED = _unit(np.asarray(outputs_ED, np.float64))
    gram_EE = np.asarray(gram_EE, np.float64)
    length_E = np.sqrt(np.maximum(np.diag(gram_EE), 0)) + 1e-8
    share_E = np.diag(gram_EE) / length_E**2
    distance_EE = share_E[:, None] + share_E[None] - 2 * gram_EE / np.outer(length_E, length_E)
    distance_EE = np.sqrt(np.maximum(distance_EE, 0))
    np.fill_diagonal(distance_EE, 0)
    return ((1 + direction_ED @ direction_ED.T) / 2 + 1 - distance_EE / max(distance_EE.max(), 1e-30)) / 2


def group_experts(
    saliency_E: Float[np.ndarray, " E"], similarity_EE: Float[np.ndarray, "E E"], keep: int, size: int = 16
) -> Int[np.ndarray, " E"]:
    """Group experts around the `keep` most salient ones: for every expert the number of its group's first.

    The most salient expert takes the experts that are most like it until its group has `size`, then the next takes of
    what is left. So groups are few and large, and most of the experts that stay are as they were.

    Args:
      saliency_E: REAP's (`lottery.calibrated.reap`) or load.
      similarity_EE: `expert_similarity`.
      keep: groups, 1 to E.
      size: experts of a group at most.

    Raises:
      ValueError: groups too few or too small for all experts.

    Example:
      >>> import numpy as np
      >>> from moe import ream
      >>> ream.group_experts(np.array([1.0, 4.0, 3.0, 2.0]), np.eye(4), keep=2, size=2)
      array([1, 1, 2, 2])
    """
    experts = len(saliency_E)
    if not 1 <= keep <= experts or size < 1 or keep * size < experts:
        raise ValueError(
            f"{experts} experts in keep={keep} groups of at most size={size}: keep must be in 1..{experts} and "
            f"keep * size at least {experts}"
        )
    first = np.argsort(-np.asarray(saliency_E), kind="stable")[:keep]
    found = np.full(experts, -1)
    found[first] = first
    for one in first:
        near = np.argsort(-similarity_EE[one], kind="stable")
        found[near[found[near] < 0][: size - 1]] = one
    return found


def merge_experts(
    experts: Mapping[str, Mapping[str, Any]],
    first_E: Int[np.ndarray, " E"],
    saliency_E: Float[np.ndarray, " E"],
    x_MD: Float[np.ndarray, "M D"],
) -> dict[str, dict[str, np.ndarray]]:
    """Average the experts of each group by saliency, their hidden neurons brought into the order of the first one's.

    Neurons are assigned so that the sum of two distances is least: of what they compute on the tokens, and of their
    weights in the three kernels, both scaled to length one. An expert alone in its group stays as it is.

    Args:
      experts: SwiGLU experts {gate, up}/kernel [E, D, F] and down/kernel [E, F, D], without biases.
      first_E: `group_experts`.
      saliency_E: weights of the average; 0, an expert that no token chose, counts as the least that is not (as in the
        authors' code, at most .5).
      x_MD: tokens as the layer reads them.

    Returns:
      The same with K experts, in the order of their first ones.

    Raises:
      ValueError: no expert that any token chose.

    Example:
      >>> import numpy as np
      >>> from moe import ream
      >>> rng = np.random.default_rng(0)
      >>> one = {"gate": rng.normal(size=(4, 3)), "up": rng.normal(size=(4, 3)), "down": rng.normal(size=(3, 4))}
      >>> turned = {name: leaf[[2, 0, 1]] if name == "down" else leaf[:, [2, 0, 1]] for name, leaf in one.items()}
      >>> both = {name: {"kernel": np.stack([one[name], turned[name]])} for name in one}
      >>> merged = ream.merge_experts(both, np.array([0, 0]), np.array([2.0, 1.0]), rng.normal(size=(9, 4)))
      >>> bool(np.allclose(merged["up"]["kernel"][0], one["up"]))
      True
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    kernels = {name: np.asarray(experts[name]["kernel"]) for name in ("gate", "up", "down")}
    weight_E = np.array(saliency_E, np.float64)
    if not (weight_E > 0).any():
        raise ValueError("no token chose any of the experts: their saliency is 0")
    weight_E[weight_E == 0] = min(0.5, weight_E[weight_E > 0].min())

    def neurons(e: int) -> tuple[np.ndarray, np.ndarray]:
        """What the neurons of an expert compute [F, M], and their weights [F, 3 D]."""
        gate_DF, up_DF, down_FD = (kernels[name][e] for name in ("gate", "up", "down"))
        gated_MF = x_MD @ gate_DF
        return _unit((gated_MF * expit(gated_MF) * (x_MD @ up_DF)).T), _unit(
            np.concatenate([gate_DF.T, up_DF.T, down_FD], axis=1)
        )

    stays = np.unique(first_E)
    made = {name: leaf[stays].copy() for name, leaf in kernels.items()}
    for k, first in enumerate(stays.tolist()):
        others = np.flatnonzero((first_E == first) & (np.arange(len(first_E)) != first))
        if not len(others):
            continue
        share_E = weight_E / weight_E[[first, *others]].sum()
        total = {name: share_E[first] * leaf[first] for name, leaf in kernels.items()}
        here = neurons(first)
        for e in others.tolist():
            cost_FF = sum(_distance(one, two) for one, two in zip(here, neurons(e), strict=True))
            order_F = linear_sum_assignment(cost_FF)[1]
            for name, leaf in kernels.items():
                total[name] += share_E[e] * leaf[e].take(order_F, axis=0 if name == "down" else 1)
        for name, leaf in total.items():
            made[name][k] = leaf
    return {name: {"kernel": leaf} for name, leaf in made.items()}


def _unit(x: np.ndarray) -> np.ndarray:
    return x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-8)


def _distance(one_FI: np.ndarray, two_FI: np.ndarray) -> np.ndarray:
    """Euclidean distances of rows [F, F]."""
    squares = (one_FI**2).sum(1)[:, None] + (two_FI**2).sum(1)[None] - 2 * one_FI @ two_FI.T
    return np.sqrt(np.maximum(squares, 0))
