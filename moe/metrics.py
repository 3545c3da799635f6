"""What a routing looks like: load, balance, certainty. Functions of a `Routing`; float32.

Axes: N tokens, E experts, K choices. Padding counts nowhere. See `moe.specialisation` for who goes where.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from moe.routing import Routing, taken


def counts(experts: Int[Array, "..."], num_experts: int) -> Float32[Array, " E"]:
    """How often every expert occurs among ids of any shape; ids outside 0..E-1 count nowhere.

    A comparison and a sum: exact below 2^24 choices, and no scatter.
    """
    hot = experts.reshape(-1, 1) == jnp.arange(num_experts, dtype=experts.dtype)[None]
    return hot.sum(axis=0).astype(jnp.float32)


def load(routing: Routing, kept_NK: Bool[Array, "N K"] | None = None) -> Float32[Array, " E"]:
    """Choices that go to every expert; of those only the `kept_NK` ones if given."""
    e = routing.num_experts
    experts_NK = routing.experts_NK if kept_NK is None else jnp.where(kept_NK, routing.experts_NK, e)
    return counts(experts_NK, e)


def importance(routing: Routing) -> Float32[Array, " E"]:
    """Sum of the weights of every expert over the batch: Shazeer et al. (2017), eq. 6."""
    hot_NKE = routing.experts_NK[:, :, None] == jnp.arange(routing.num_experts)[None, None]
    return (routing.weights_NK[:, :, None] * hot_NKE).sum(axis=(0, 1))


def squared_variation(values: Float[Array, " E"]) -> Float32[Array, ""]:
    """Squared coefficient of variation, variance / mean^2; 0 for zeros."""
    values = values.astype(jnp.float32)
    return values.var() / jnp.maximum(jnp.square(values.mean()), 1e-20)


def drop_fraction(routing: Routing, kept_NK: Bool[Array, "N K"]) -> Float32[Array, ""]:
    """Share of the choices that went to an expert and found no place there (0 when nothing is dropped)."""
    there_NK = taken(routing)
    return (there_NK & ~kept_NK).sum() / jnp.maximum(there_NK.sum(), 1).astype(jnp.float32)


def max_violation(load_E: Float[Array, " E"]) -> Float32[Array, ""]:
    """(largest load - mean load) / mean load: MaxVio of Wang et al. (2024), eq. 4. 0 is balance, E - 1 collapse."""
    load_E = load_E.astype(jnp.float32)
    mean = load_E.mean()
    return (load_E.max() - mean) / jnp.maximum(mean, 1e-20)


def entropy(probs: Float[Array, "*N E"]) -> Float32[Array, "*N"]:
    """-sum p log p over the last axis, in nats; ln E is the largest."""
    probs = probs.astype(jnp.float32)
    return -(probs * jnp.log(jnp.maximum(probs, 1e-30))).sum(axis=-1)


def summary(routing: Routing, kept_NK: Bool[Array, "N K"] | None = None) -> dict[str, Array]:
    """What a log wants of one layer.

    Args:
      routing: any routing.
      kept_NK: choices that found a place, from a capacity plan; None where nothing is dropped.

    Returns:
      load [E], shares of the choices, one in all; max_violation, entropy (mean over tokens, nats), load_entropy (nats),
      confidence (mean largest probability), drop_fraction: scalars.
    """
    load_E = load(routing)
    share_E = load_E / jnp.maximum(load_E.sum(), 1.0)
    weight_N = routing.mask_N.astype(jnp.float32)
    tokens = jnp.maximum(weight_N.sum(), 1.0)
    return {
        "load": share_E,
        "max_violation": max_violation(load_E),
        "entropy": (entropy(routing.probs_NE) * weight_N).sum() / tokens,
        "load_entropy": entropy(share_E),
        "confidence": (routing.probs_NE.max(axis=-1) * weight_N).sum() / tokens,
        "drop_fraction": jnp.float32(0) if kept_NK is None else drop_fraction(routing, kept_NK),
    }
