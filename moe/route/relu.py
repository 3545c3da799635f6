"""ReLU routing (ReMoE): the experts of a token are those with positive logits; a penalty sets their mean number."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from moe.routing import Routing, make_routing, prepare


def relu(logits_NE: Float[Array, "N E"], mask_N: Bool[Array, " N"] | None = None) -> Routing:
    """Route to all experts with positive logits, which are the weights (ReMoE: Wang et al. 2024).

    K = E, with expert E and weight 0 where the logit is not positive, and no bound on the rows but N E. Train it with
    `losses.relu_penalty`, whose coefficient `update_penalty` moves.

    Args:
      logits_NE: router logits.
      mask_N: False for padding.

    Returns:
      A routing whose `probs_NE` are the weights over their sum, uniform for a token without experts.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe import route
      >>> routing = route.relu(jnp.array([[2.0, -1.0, 3.0], [-1.0, -1.0, -1.0]]))
      >>> routing.experts_NK.tolist(), routing.weights_NK.tolist()
      ([[0, 3, 2], [3, 3, 3]], [[2.0, 0.0, 3.0], [0.0, 0.0, 0.0]])
    """
    logits_NE, mask_N = prepare(logits_NE, mask_N)
    e = logits_NE.shape[-1]
    weights_NE = jax.nn.relu(logits_NE)
    sum_N1 = weights_NE.sum(axis=-1, keepdims=True)
    probs_NE = jnp.where(sum_N1 > 0, weights_NE / jnp.where(sum_N1 > 0, sum_N1, 1.0), 1 / e)
    experts_NE = jnp.broadcast_to(jnp.arange(e, dtype=jnp.int32)[None], logits_NE.shape)
    return make_routing(experts_NE, weights_NE, probs_NE, logits_NE, mask_N, weights_NE > 0)


def update_penalty(
    penalty: Float[Array, "*L"], choices: Float[Array, "*L"], k: float | int, rate: float = 1.2
) -> Float32[Array, "*L"]:
    """Update the coefficient of ReMoE's penalty, penalty * rate^sign(choices - k) (Wang et al. 2024).

    To be called after the optimizer's step. Choices above k are a sparsity 1 - choices / E below 1 - k / E, by which
    the authors' code decides (thu-ml/ReMoE, `training.py`; at equality it divides, here nothing changes).

    Args:
      penalty: coefficients, 1e-8 at first in the paper.
      choices: experts a token had in the last batch, averaged over its tokens (over all devices) and layers.
      k: experts a token should have.
      rate: alpha in the paper.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe import route
      >>> route.update_penalty(jnp.ones(2), jnp.array([4.0, 1.0]), k=2, rate=2.0).tolist()
      [2.0, 0.5]
    """
    return penalty.astype(jnp.float32) * jnp.float32(rate) ** jnp.sign(choices.astype(jnp.float32) - k)
