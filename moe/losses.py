"""Auxiliary losses of routers (load balancing, importance, load, z) as functions of a `Routing`; float32 scalars.

Axes: N tokens, E experts, K choices, G groups of consecutive tokens (sequences, for instance). Padding is not counted.

Example:
  >>> import jax.numpy as jnp
  >>> from moe import losses, route
  >>> float(losses.load_balance(route.uniform(jnp.zeros((8, 4)), k=2)))
  1.0
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from moe.metrics import counts, importance, squared_variation
from moe.routing import Routing

Choices = Literal["all", "first", "scores"]


def batch_sums(
    routing: Routing, choices: Choices = "all", axis_name: str | tuple[str, ...] | None = None
) -> Float32[Array, "6 E"]:
    """Sum over the tokens what the losses of a whole batch are functions of.

    Where a batch goes through a model in parts, the sums of all parts (or their mean: no loss depends on the scale)
    give the loss of the batch, and with `linearized` its gradient by parts: the balance of Qiu et al. (2025), exact.

    Args:
      routing: any routing.
      choices: see `load_balance`.
      axis_name: mapped axes to sum over too.

    Returns:
      Rows: choices counted by the balance loss, probabilities, gate weights, all choices, smooth load (zeros without),
      and in every column the number of tokens.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe import losses, route
      >>> sums = losses.batch_sums(route.uniform(jnp.zeros((8, 4)), k=2))
      >>> sums[0].tolist(), sums[5].tolist()
      ([4.0, 4.0, 4.0, 4.0], [8.0, 8.0, 8.0, 8.0])
    """
    e, weight_N1 = routing.num_experts, routing.mask_N[:, None].astype(jnp.float32)
    rows = (
        counts(_counted(routing, choices), e),
        (routing.probs_NE * weight_N1).sum(axis=0),
        importance(routing),
        counts(routing.experts_NK, e),
        jnp.zeros(e) if routing.load_NE is None else routing.load_NE.sum(axis=0),
        jnp.broadcast_to(weight_N1.sum(), (e,)),
    )
    return _summed(jnp.stack([row.astype(jnp.float32) for row in rows]), axis_name)


def balance_of(sums_SE: Float32[Array, "6 E"]) -> Float32[Array, ""]:
    """Compute `load_balance` of a whole batch from its `batch_sums`.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe import losses, route
      >>> float(losses.balance_of(losses.batch_sums(route.uniform(jnp.zeros((8, 4)), k=2))))
      1.0
    """
    return _balance(sums_SE[:1], sums_SE[1:2], sums_SE[5:, :1])


def penalty_of(sums_SE: Float32[Array, "6 E"], k: int) -> Float32[Array, ""]:
    """Compute `relu_penalty` of a whole batch from its `batch_sums`."""
    tokens = jnp.maximum(sums_SE[5, 0], 1.0)
    f_E = jax.lax.stop_gradient(sums_SE[3]) * sums_SE.shape[1] / (k * tokens)
    return (f_E * sums_SE[2]).sum() / tokens


def linearized(
    loss: Callable[[Float32[Array, "S E"]], Float32[Array, ""]],
    own_SE: Float32[Array, "S E"],
    batch_SE: Float32[Array, "S E"],
) -> Float32[Array, ""]:
    """Compute a loss of a whole batch with the gradient by one part of it.

    The value is `loss(batch)`, whichever part it is; the mean over the parts of the gradients is that of the loss of
    the mean of their sums, because each part's is the derivative by the sums times the derivative of its own.

    Args:
      loss: of sums.
      own_SE: sums of this part.
      batch_SE: mean of the parts' sums.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from moe import losses
      >>> cube = lambda sums: (sums**3).sum()
      >>> mean = jnp.array([[2.0]])  # of the parts 1 and 3
      >>> jax.value_and_grad(lambda own: losses.linearized(cube, own, mean))(jnp.array([[3.0]]))[1].tolist()
      [[12.0]]
    """
    value, slope_SE = jax.value_and_grad(loss)(jax.lax.stop_gradient(batch_SE))
    return value + (jax.lax.stop_gradient(slope_SE) * (own_SE - jax.lax.stop_gradient(own_SE))).sum()


def _counted(routing: Routing, choices: Choices) -> Array:
    """The experts that the balance loss counts, the number of experts for none."""
    if choices == "first":
        return routing.experts_NK[:, :1]
    if choices == "scores":
        best_NK = jax.lax.top_k(jax.lax.stop_gradient(routing.probs_NE), routing.k)[1]
        return jnp.where(routing.mask_N[:, None], best_NK, routing.num_experts)
    return routing.experts_NK


def _balance(
    counts_GE: Float32[Array, "G E"], probs_GE: Float32[Array, "G E"], tokens_G1: Float32[Array, "G 1"]
) -> Float32[Array, ""]:
    f_GE = jax.lax.stop_gradient(counts_GE / jnp.maximum(counts_GE.sum(axis=-1, keepdims=True), 1.0))
    p_GE = probs_GE / jnp.maximum(tokens_G1, 1.0)
    return counts_GE.shape[-1] * (f_GE * p_GE).sum() / jnp.maximum((tokens_G1 > 0).sum(), 1)


def load_balance(
    routing: Routing,
    groups: int = 1,
    *,
    choices: Choices = "all",
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
    if groups == 1:
        return balance_of(batch_sums(routing, choices, axis_name))
    experts_GMK = _counted(routing, choices).reshape(groups, n // groups, -1)
    counts_GE = jax.vmap(lambda experts: counts(experts, e))(experts_GMK)
    weight_GM1 = routing.mask_N.reshape(groups, -1, 1).astype(jnp.float32)
    sums_GE = (routing.probs_NE.reshape(groups, -1, e) * weight_GM1).sum(axis=1)
    return _balance(counts_GE, sums_GE, weight_GM1.sum(axis=1))


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
    return penalty_of(batch_sums(routing, axis_name=axis_name), k)


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
