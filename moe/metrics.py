"""Router metrics as functions of a `Routing`: load, balance, drop fraction, entropy; float32.

Axes: N tokens, E experts, K choices. Padding is not counted. `moe.specialization` has metrics by class of token.

Example:
  >>> import jax.numpy as jnp
  >>> from moe import metrics, route
  >>> metrics.load(route.top_k(jnp.array([[0.0, 1.0], [0.0, 2.0]]), k=1)).tolist()
  [0.0, 2.0]
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from moe.routing import Routing, is_routed


def counts(experts: Int[Array, "..."], num_experts: int) -> Float32[Array, " E"]:
    """Count the ids of every expert (histogram); ids of any shape, those outside 0..E-1 are ignored.

    A comparison and a sum: exact below 2^24 choices, and no scatter.
    """
    hot = experts.reshape(-1, 1) == jnp.arange(num_experts, dtype=experts.dtype)[None]
    return hot.sum(axis=0).astype(jnp.float32)


def load(routing: Routing, placed_NK: Bool[Array, "N K"] | None = None) -> Float32[Array, " E"]:
    """Count the choices of every expert (expert load); only those in `placed_NK` if it is given."""
    e = routing.num_experts
    experts_NK = routing.experts_NK if placed_NK is None else jnp.where(placed_NK, routing.experts_NK, e)
    return counts(experts_NK, e)


def importance(routing: Routing) -> Float32[Array, " E"]:
    """Sum the gate weights of every expert over the batch (importance: Shazeer et al. 2017, eq. 6)."""
    hot_NKE = routing.experts_NK[:, :, None] == jnp.arange(routing.num_experts)[None, None]
    return (routing.weights_NK[:, :, None] * hot_NKE).sum(axis=(0, 1))


def squared_variation(values: Float[Array, " E"]) -> Float32[Array, ""]:
    """Compute the squared coefficient of variation, variance / mean^2; 0 for zeros."""
    values = values.astype(jnp.float32)
    return values.var() / jnp.maximum(jnp.square(values.mean()), 1e-20)


def drop_fraction(routing: Routing, placed_NK: Bool[Array, "N K"]) -> Float32[Array, ""]:
    """Compute the share of routed choices that were dropped for lack of capacity."""
    routed_NK = is_routed(routing)
    return (routed_NK & ~placed_NK).sum() / jnp.maximum(routed_NK.sum(), 1).astype(jnp.float32)


def max_violation(load_E: Float[Array, "*L E"]) -> Float32[Array, "*L"]:
    """Compute MaxVio, (largest load - mean load) / mean load (Wang et al. 2024, eq. 4): 0 balanced, E - 1 collapsed."""
    load_E = load_E.astype(jnp.float32)
    mean = load_E.mean(axis=-1)
    return (load_E.max(axis=-1) - mean) / jnp.maximum(mean, 1e-20)


def entropy(probs: Float[Array, "*N E"]) -> Float32[Array, "*N"]:
    """Compute the Shannon entropy over the last axis, in nats; at most ln E."""
    probs = probs.astype(jnp.float32)
    return -(probs * jnp.log(jnp.maximum(probs, 1e-30))).sum(axis=-1)


def of_load(share_E: Float[Array, "*L E"]) -> dict[str, Array]:
    """Compute the metrics that follow from the load: max_violation and load_entropy (nats).

    They are no means over tokens: those of a batch come from the load of all its tokens, not from those of its parts.

    Args:
      share_E: shares of the choices, which sum to one, with any leading layer axes.
    """
    return {"max_violation": max_violation(share_E), "load_entropy": entropy(share_E)}


def token_means(found: dict[str, Array]) -> dict[str, Array]:
    """Make means over tokens of the metrics of `summary`, so that parts of a batch can be averaged by their tokens.

    The shares of the choices, load and drop_fraction, become choices per token: where tokens have different numbers of
    choices (`route.relu`), the mean of the parts' shares is not the share of the batch.

    Args:
      found: metrics of one layer, or with leading layer axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe import metrics, route
      >>> one, two = (route.relu(jnp.array(x)) for x in ([[1.0, 1.0]], [[1.0, -1.0]]))
      >>> means = [metrics.token_means(metrics.summary(routing)) for routing in (one, two)]
      >>> mean = {name: (means[0][name] + means[1][name]) / 2 for name in means[0]}
      >>> [round(x, 3) for x in metrics.of_token_means(mean)["load"].tolist()]  # two and one of three choices
      [0.667, 0.333]
    """
    choices = found["choices"]
    return {
        "load": found["load"] * choices[..., None],
        "entropy": found["entropy"],
        "confidence": found["confidence"],
        "choices": choices,
        "drop_fraction": found["drop_fraction"] * choices,
    }


def of_token_means(means: dict[str, Array]) -> dict[str, Array]:
    """Compute the metrics of `summary` from `token_means` of all tokens."""
    choices = jnp.maximum(means["choices"], 1e-20)
    share_E = means["load"] / choices[..., None]
    return means | {"load": share_E, **of_load(share_E), "drop_fraction": means["drop_fraction"] / choices}


def summary(routing: Routing, placed_NK: Bool[Array, "N K"] | None = None) -> dict[str, Array]:
    """Compute the router metrics of one layer for a log.

    Args:
      routing: any routing.
      placed_NK: choices within the capacity, from `dispatch.capacity`; None where nothing is dropped.

    Returns:
      load [E], shares of the choices, one in all; max_violation, entropy (mean over tokens, nats), load_entropy (nats),
      confidence (mean largest probability), choices (routed ones per token), drop_fraction: scalars.
    """
    load_E = load(routing)
    share_E = load_E / jnp.maximum(load_E.sum(), 1.0)
    weight_N = routing.mask_N.astype(jnp.float32)
    tokens = jnp.maximum(weight_N.sum(), 1.0)
    return {
        "load": share_E,
        **of_load(share_E),
        "entropy": (entropy(routing.probs_NE) * weight_N).sum() / tokens,
        "confidence": (routing.probs_NE.max(axis=-1) * weight_N).sum() / tokens,
        "choices": load_E.sum() / tokens,
        "drop_fraction": jnp.float32(0) if placed_NK is None else drop_fraction(routing, placed_NK),
    }
