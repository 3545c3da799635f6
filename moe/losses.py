"""Auxiliary losses of routers (load balancing, importance, load, z) as functions of a `Routing`; float32 scalars.

Axes: N tokens, E experts, K choices, G groups of consecutive tokens (sequences, for instance). Padding is not counted.

Example:
  >>> import jax.numpy as jnp
  >>> from moe import losses, route
  >>> float(losses.load_balance(route.uniform(jnp.zeros((8, 4)), k=2)))
  1.0
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from moe.metrics import counts, importance, squared_variation
from moe.routing import Routing


def load_balance(
    routing: Routing,
    groups: int = 1,
    *,
    choices: Literal["all", "first", "scores"] = "all",
    axis_name: str | tuple[str, ...] | None = None,
) -> Float32[Array, ""]:
    """Compute the load-balancing loss E sum_i f_i P_i (Fedus et al. 2021, eq. 4-6): 1 balanced, E collapsed.

    f_i is the share of choices of expert i (no gradient), P_i the mean probability of expert i. GShard's l_aux
    (Lepikhin et al. 2020, algorithm 1) is this with `choices="first"`, divided by E^2; DeepSeek-V3's sequence-wise loss
    (eq. 17-20) is this with one group per sequence and `choices="scores"`.

    Args:
      routing: any routing.
      groups: the mean over so many groups of consecutive tokens; 1 is the full batch. Groups of padding alone do not
        count.
      choices: "all" K choices, the "first" alone, or the K highest "scores" (probabilities), whatever bias, groups or
        noise made of them.
      axis_name: mapped axes over which f and P are averaged first, so that the global batch is balanced, not each
        device's (Qiu et al. 2025); with `groups=1`.

    Raises:
      ValueError: the tokens do not divide into the groups, or both groups and axis_name are given.
    """
    e, n = routing.num_experts, routing.mask_N.shape[0]
    if groups < 1 or n % groups:
        raise ValueError(f"{n} tokens do not divide into {groups} groups")
    if groups > 1 and axis_name is not None:
        raise ValueError(f"groups={groups} and axis_name={axis_name!r}: a balance is either per group or global")
    experts_NK = routing.experts_NK
    if choices == "first":
        experts_NK = experts_NK[:, :1]
    elif choices == "scores":
        best_NK = jax.lax.top_k(jax.lax.stop_gradient(routing.probs_NE), routing.k)[1]
        experts_NK = jnp.where(routing.mask_N[:, None], best_NK, e)
    experts_GMK = experts_NK.reshape(groups, n // groups, -1)
    counts_GE = jax.vmap(lambda experts: counts(experts, e))(experts_GMK)
    weight_GM1 = routing.mask_N.reshape(groups, -1, 1).astype(jnp.float32)
    sums_GE = (routing.probs_NE.reshape(groups, -1, e) * weight_GM1).sum(axis=1)
    tokens_G1 = weight_GM1.sum(axis=1)
    if axis_name is not None:
        counts_GE, sums_GE, tokens_G1 = jax.lax.psum((counts_GE, sums_GE, tokens_G1), axis_name)
    f_GE = jax.lax.stop_gradient(counts_GE / jnp.maximum(counts_GE.sum(axis=-1, keepdims=True), 1.0))
    p_GE = sums_GE / jnp.maximum(tokens_G1, 1.0)
    return e * (f_GE * p_GE).sum() / jnp.maximum((tokens_G1 > 0).sum(), 1)


def relu_penalty(routing: Routing, k: int, axis_name: str | tuple[str, ...] | None = None) -> Float32[Array, ""]:
    """Compute the penalty of ReLU routing, mean over tokens of sum_e f_e w_e (ReMoE: Wang et al. 2024).

    f_e is the load of expert e over that of a balanced one with k choices a token (no gradient), so that busy experts
    are held back more: the Switch loss with weights for probabilities, as in the authors' code (thu-ml/ReMoE,
    `ReLURouter.apply_l1_reg`), which adds it for every layer.

    Args:
      routing: of `route.relu`.
      k: choices that a token should have.
      axis_name: mapped axes over which load and mean are taken too, for the loss of the global batch.
    """
    e = routing.num_experts
    tokens = routing.mask_N.sum().astype(jnp.float32)
    totals = (counts(routing.experts_NK, e), importance(routing), tokens)
    load_E, weights_E, tokens = totals if axis_name is None else jax.lax.psum(totals, axis_name)
    f_E = jax.lax.stop_gradient(load_E) * e / (k * jnp.maximum(tokens, 1.0))
    return (f_E * weights_E).sum() / jnp.maximum(tokens, 1.0)


def importance_loss(routing: Routing, axis_name: str | tuple[str, ...] | None = None) -> Float32[Array, ""]:
    """Compute the importance loss, CV(sum of gate weights per expert)^2 (Shazeer et al. 2017, eq. 6-7).

    Args:
      routing: any routing.
      axis_name: mapped axes over which the gate weights are summed too, for the loss of the global batch.
    """
    return squared_variation(_summed(importance(routing), axis_name))


def load_loss(routing: Routing, axis_name: str | tuple[str, ...] | None = None) -> Float32[Array, ""]:
    """Compute the load loss, CV(load)^2 of the smooth load (Shazeer et al. 2017, appendix A, eq. 11).

    Args:
      routing: of `noisy_top_k` or `hierarchical`.
      axis_name: mapped axes over which the load is summed too, for the loss of the global batch.

    Raises:
      ValueError: the router gave no smooth load (only `noisy_top_k` and `hierarchical` do).
    """
    if routing.load_NE is None:
        raise ValueError("the load loss needs Routing.load_NE: route with noisy_top_k or hierarchical")
    return squared_variation(_summed(routing.load_NE.sum(axis=0), axis_name))


def _summed(values_E: Array, axis_name: str | tuple[str, ...] | None) -> Array:
    return values_E if axis_name is None else jax.lax.psum(values_E, axis_name)


def z_loss(routing: Routing) -> Float32[Array, ""]:
    """Compute the router z-loss, the mean over tokens of logsumexp(logits)^2 (ST-MoE: Zoph et al. 2022, eq. 5)."""
    return masked_mean(jnp.square(jax.nn.logsumexp(routing.logits_NE, axis=-1)), routing)


def masked_mean(values_N: Float[Array, " N"], routing: Routing) -> Float32[Array, ""]:
    """Average over the tokens that are not padding; 0 without any."""
    weight_N = routing.mask_N.astype(jnp.float32)
    return (values_N.astype(jnp.float32) * weight_N).sum() / jnp.maximum(weight_N.sum(), 1.0)
