"""Routers that choose among all tokens, expert choice and Soft MoE: not causal."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe.routing import Routing, Slots, make_routing, prepare


def expert_choice(
    logits_NE: Float[Array, "N E"],
    capacity: int,
    mask_N: Bool[Array, " N"] | None = None,
    *,
    places: Int[Array, ""] | None = None,
) -> Routing:
    """Let every expert choose its `capacity` most probable tokens (expert choice: Zhou et al. 2022, eq. 1-2).

    A token may have any number of experts, so K = E, with expert E and weight 0 where it was not chosen; `rows` is
    E * capacity. The weights are softmax probabilities over experts and need not sum to one.

    Args:
      logits_NE: router logits.
      capacity: tokens per expert, k in the paper (n c / e).
      mask_N: False for padding, which no expert chooses (it then has fewer than `capacity` tokens).
      places: tokens per expert known at run time only, at most `capacity`; for a batch with padding.

    Raises:
      ValueError: capacity is not in 1..N.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe import route
      >>> route.expert_choice(jnp.array([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]]), capacity=1).experts_NK.tolist()
      [[0, 2], [2, 2], [2, 1]]
    """
    logits_NE, mask_N = prepare(logits_NE, mask_N)
    n, e = logits_NE.shape
    if not 1 <= capacity <= n:
        raise ValueError(f"every expert chooses capacity={capacity} of {n} tokens: capacity must be in 1..{n}")
    probs_NE = jax.nn.softmax(logits_NE)
    wanted_EN = jnp.where(mask_N[None], probs_NE.T, -1.0)
    tokens_EC = jax.lax.top_k(jax.lax.stop_gradient(wanted_EN), capacity)[1]
    within_1C = jnp.arange(capacity)[None] < (capacity if places is None else places)
    chosen_EN = jnp.zeros((e, n), bool).at[jnp.arange(e)[:, None], tokens_EC].set(within_1C)
    experts_NE = jnp.broadcast_to(jnp.arange(e, dtype=jnp.int32)[None], (n, e))
    return make_routing(experts_NE, probs_NE, probs_NE, logits_NE, mask_N, chosen_EN.T, rows=e * capacity, causal=False)


def soft(logits_NEP: Float[Array, "N E P"], mask_N: Bool[Array, " N"] | None = None) -> Routing:
    """Mix all tokens into every slot and all slots into every token (Soft MoE: Puigcerver et al. 2023, eq. 1-3).

    `Routing.slots` has the dispatch and combine weights, for `dispatch.soft`. The other fields sum over an expert's
    slots: K = E, weights and probabilities are combine weights, logits the logsumexp.

    Args:
      logits_NEP: X Phi for P slots per expert.
      mask_N: False for padding, which is in no slot.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe import route
      >>> slots = route.soft(jnp.zeros((4, 2, 3))).slots
      >>> slots.dispatch_NEP.sum(0).tolist() == jnp.ones((2, 3)).tolist()
      True
    """
    n, e, p = logits_NEP.shape
    flat_NS, mask_N = prepare(logits_NEP.reshape(n, e * p), mask_N)
    # Without any token the softmax would divide zero by zero.
    dispatch_NS = jax.nn.softmax(flat_NS, axis=0, where=(mask_N | ~mask_N.any())[:, None])
    combine_NS = jnp.where(mask_N[:, None], jax.nn.softmax(flat_NS, axis=1), 0.0)
    probs_NE = jax.nn.softmax(flat_NS, axis=1).reshape(n, e, p).sum(axis=-1)
    experts_NE = jnp.broadcast_to(jnp.arange(e, dtype=jnp.int32)[None], (n, e))
    logits_NE = jax.nn.logsumexp(flat_NS.reshape(n, e, p), axis=-1)
    slots = Slots(dispatch_NS.reshape(n, e, p), combine_NS.reshape(n, e, p))
    return make_routing(experts_NE, probs_NE, probs_NE, logits_NE, mask_N, slots=slots, causal=False)
