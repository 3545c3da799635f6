"""DeepSeek's routers: selection by score + bias, group-limited experts, and loss-free balancing of the bias."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from moe.routing import Routing, check_k, make_routing, prepare, take

SCORES = {
    "sigmoid": jax.nn.sigmoid,
    "softmax": jax.nn.softmax,
    # The square root has no gradient at 0, which softplus reaches in float32 near a logit of -104.
    "sqrt_softplus": lambda logits: jnp.sqrt(jnp.maximum(jax.nn.softplus(logits), 1e-30)),
}
"""Scores of the experts from router logits."""


def limit_groups(
    scores_NE: Float32[Array, "N E"], groups: int, top_groups: int, group_score: Literal["top2", "max"]
) -> Float32[Array, "N E"]:
    """Set scores outside the best `top_groups` of `groups` blocks of consecutive experts to -inf (DeepSeek-V2 2024).

    Args:
      scores_NE: scores of the experts.
      groups: blocks.
      top_groups: blocks per token.
      group_score: a block's score is its "max" (DeepSeek-V2, section 2.1.2) or the sum of its "top2" (V3).

    Raises:
      ValueError: the experts do not divide into the groups, or top_groups is not in 1..groups.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe import route
      >>> route.limit_groups(jnp.array([[1.0, 2.0, 3.0, 0.0]]), 2, 1, "max").tolist()
      [[-inf, -inf, 3.0, 0.0]]
    """
    n, e = scores_NE.shape
    if groups < 1 or e % groups:
        raise ValueError(f"{e} experts do not divide into {groups} groups")
    if not 1 <= top_groups <= groups:
        raise ValueError(f"top_groups={top_groups} of {groups} groups: top_groups must be in 1..{groups}")
    scores_NGM = scores_NE.reshape(n, groups, e // groups)
    best = min(2 if group_score == "top2" else 1, e // groups)
    score_NG = jax.lax.top_k(scores_NGM, best)[0].sum(axis=-1)
    chosen_NI = jax.lax.top_k(score_NG, top_groups)[1]
    inside_NG = (chosen_NI[:, :, None] == jnp.arange(groups)[None, None]).any(axis=1)
    return jnp.where(inside_NG[:, :, None], scores_NGM, -jnp.inf).reshape(n, e)


def sigmoid_top_k(
    logits_NE: Float[Array, "N E"],
    k: int,
    mask_N: Bool[Array, " N"] | None = None,
    *,
    bias_E: Float[Array, " E"] | None = None,
    groups: int = 1,
    top_groups: int = 1,
    group_score: Literal["top2", "max"] = "top2",
    normalize: float = 1.0,
    scale: float = 1.0,
    score: Literal["sigmoid", "softmax", "sqrt_softplus"] = "sigmoid",
) -> Routing:
    """Route by the k largest score + bias; weights are the scores without bias (DeepSeek-V3 2024, eq. 12-16).

    Args:
      logits_NE: router logits.
      k: choices.
      mask_N: False for padding.
      bias_E: added for the selection only, no gradient; see `update_bias`. None is zeros.
      groups: blocks of consecutive experts (those of one node).
      top_groups: blocks a token's experts may come from.
      group_score: score of a block, see `limit_groups`.
      normalize: p of the p-norm by which the chosen scores are divided: 1 is their sum (V3), 2 the Euclidean norm
        (DBRX), 0 leaves them. A single one is left as it is: the quotient would be 1 and give the router no gradient.
      scale: factor on the weights (2.5 in V3).
      score: "sigmoid" (V3), "softmax" (V2, Ernie 4.5) or "sqrt_softplus", sqrt(log(1 + exp(logit))) (V4).

    Returns:
      A routing whose `probs_NE` are the scores over their sum (V3, eq. 19).

    Raises:
      ValueError: k, groups or top_groups out of range, or fewer than k experts in the groups.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe import route
      >>> bias_E = jnp.array([5.0, 0.0, 0.0])
      >>> routing = route.sigmoid_top_k(jnp.array([[0.0, 0.0, 9.0]]), k=1, bias_E=bias_E, normalize=0.0)
      >>> routing.experts_NK.tolist(), routing.weights_NK.tolist()
      ([[0]], [[0.5]])
    """
    logits_NE, mask_N = prepare(logits_NE, mask_N)
    e = logits_NE.shape[-1]
    check_k(k, e)
    scores_NE = SCORES[score](logits_NE)
    select_NE = jax.lax.stop_gradient(scores_NE)
    if bias_E is not None:
        select_NE = select_NE + jax.lax.stop_gradient(bias_E.astype(jnp.float32))[None]
    if groups > 1:
        select_NE = limit_groups(select_NE, groups, top_groups, group_score)
        if k > top_groups * (e // groups):
            raise ValueError(f"k={k} experts out of {top_groups} groups of {e // groups}: raise top_groups or lower k")
    experts_NK = jax.lax.top_k(select_NE, k)[1]
    weights_NK = take(scores_NE, experts_NK)
    if normalize and k > 1:
        weights_NK /= jnp.maximum(jnp.linalg.norm(weights_NK, normalize, axis=-1, keepdims=True), 1e-20)
    probs_NE = scores_NE / jnp.maximum(scores_NE.sum(axis=-1, keepdims=True), 1e-20)
    return make_routing(experts_NK, scale * weights_NK, probs_NE, logits_NE, mask_N)


def update_bias(
    bias_E: Float[Array, "*L E"], load_E: Float[Array, "*L E"], rate: float = 1e-3
) -> Float32[Array, "*L E"]:
    """Update the bias of loss-free balancing, b_i + rate sign(mean load - load_i) (Wang et al. 2024, algorithm 1).

    To be called after the optimizer's step.

    Args:
      bias_E: biases, with any leading layer axes.
      load_E: counts or shares of every expert's tokens in the last batch (over all devices).
      rate: u in the paper, where 1e-3 was best.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe import route
      >>> route.update_bias(jnp.zeros(3), jnp.array([4.0, 1.0, 1.0]), rate=0.5).tolist()
      [-0.5, 0.5, 0.5]
    """
    load_E = load_E.astype(jnp.float32)
    return bias_E.astype(jnp.float32) + rate * jnp.sign(load_E.mean(axis=-1, keepdims=True) - load_E)
