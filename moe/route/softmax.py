"""Token-choice routers with a softmax: top-k (Mixtral), Switch and GShard."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from moe.routing import Routing, check_k, make_routing, prepare, take


def jitter(x_ND: Float[Array, "N D"], epsilon: float = 1e-2, *, key: Key[Array, ""] | None) -> Float[Array, "N D"]:
    """Multiply a router's input by uniform noise in [1 - epsilon, 1 + epsilon] (Fedus et al. 2021, section 2.4).

    Args:
      x_ND: input of the router (the experts get it without noise).
      epsilon: half the width of the interval.
      key: None switches the noise off, as in evaluation.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from moe import route
      >>> noisy = route.jitter(jnp.ones((4, 8)), 0.1, key=jax.random.key(0))
      >>> bool((abs(noisy - 1) <= 0.1).all())
      True
    """
    if key is None or epsilon == 0:
        return x_ND
    noise_ND = jax.random.uniform(key, x_ND.shape, jnp.float32, 1 - epsilon, 1 + epsilon)
    return (x_ND.astype(jnp.float32) * noise_ND).astype(x_ND.dtype)


def top_k(
    logits_NE: Float[Array, "N E"],
    k: int,
    mask_N: Bool[Array, " N"] | None = None,
    *,
    softmax: Literal["before", "after"] = "after",
    scale: float = 1.0,
) -> Routing:
    """Route to the k most probable experts (top-k gating; Mixtral: Jiang et al. 2024, section 2.1).

    Args:
      logits_NE: router logits.
      k: choices.
      mask_N: False for padding.
      softmax: "after" selection, over the chosen logits, so that weights sum to one (Mixtral; at k = 1 the weight is 1
        and has no gradient), or "before", over all experts, so that weights are probabilities and sum to less.
      scale: factor on the weights.

    Raises:
      ValueError: k is not in 1..E.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe import route
      >>> routing = route.top_k(jnp.array([[0.0, 2.0, 2.0, 1.0]]), k=2)
      >>> routing.experts_NK.tolist(), routing.weights_NK.tolist()
      ([[1, 2]], [[0.5, 0.5]])
    """
    logits_NE, mask_N = prepare(logits_NE, mask_N)
    check_k(k, logits_NE.shape[-1])
    probs_NE = jax.nn.softmax(logits_NE)
    chosen_NK, experts_NK = jax.lax.top_k(logits_NE, k)
    weights_NK = jax.nn.softmax(chosen_NK) if softmax == "after" else take(probs_NE, experts_NK)
    return make_routing(experts_NK, scale * weights_NK, probs_NE, logits_NE, mask_N)


def switch(logits_NE: Float[Array, "N E"], mask_N: Bool[Array, " N"] | None = None) -> Routing:
    """Route to one expert, weighted by its probability (Switch: Fedus et al. 2021, section 2.1; `jitter` is its noise).

    Example:
      >>> import jax.numpy as jnp
      >>> from moe import route
      >>> routing = route.switch(jnp.log(jnp.array([[0.25, 0.75]])))
      >>> routing.experts_NK.tolist(), round(float(routing.weights_NK[0, 0]), 3)
      ([[1]], 0.75)
    """
    return top_k(logits_NE, 1, mask_N, softmax="before")


def gshard(
    logits_NE: Float[Array, "N E"],
    mask_N: Bool[Array, " N"] | None = None,
    *,
    key: Key[Array, ""] | None = None,
) -> Routing:
    """Route to two experts, the second with probability 2 g2 (GShard: Lepikhin et al. 2020, algorithm 1).

    Weights are normalized over both, also where the second expert is not drawn, as in the paper. Use
    `dispatch.capacity` for the paper's capacity and `losses.load_balance(routing, choices="first")` for its loss.

    Args:
      logits_NE: router logits of at least two experts.
      mask_N: False for padding.
      key: None always routes to the second expert, as in evaluation.

    Raises:
      ValueError: fewer than two experts.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe import route
      >>> route.gshard(jnp.array([[1.0, 3.0, 2.0]])).experts_NK.tolist()
      [[1, 2]]
    """
    logits_NE, mask_N = prepare(logits_NE, mask_N)
    check_k(2, logits_NE.shape[-1])
    probs_NE = jax.nn.softmax(logits_NE)
    chosen_N2, experts_N2 = jax.lax.top_k(logits_NE, 2)
    weights_N2 = jax.nn.softmax(chosen_N2)  # g / (g1 + g2)
    routed_N2 = None
    if key is not None:
        second_N = 2 * weights_N2[:, 1] > jax.random.uniform(key, mask_N.shape, jnp.float32)
        routed_N2 = jnp.stack([jnp.ones_like(second_N), second_N], axis=-1)
    return make_routing(experts_N2, weights_N2, probs_NE, logits_NE, mask_N, routed_N2)
