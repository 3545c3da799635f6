"""Routers without learned choices: hash of the token id, forced load and replayed choices (for benchmarks)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from moe.routing import Routing, check_k, make_routing, prepare, take


def hash_tokens(
    tokens_N: Int[Array, " N"], experts: int, k: int = 1, mask_N: Bool[Array, " N"] | None = None, *, seed: int = 0
) -> Routing:
    """Route by a random hash of the token id (Hash Layers: Roller et al. 2021, section 3.1).

    Every pair (token, expert) has a pseudorandom number (the finalizer of MurmurHash3) and the k largest win, so the k
    experts differ and no table over the vocabulary is needed.

    Args:
      tokens_N: token ids.
      experts: E.
      k: choices, of weight 1 / k each.
      mask_N: False for padding.
      seed: layers with different seeds hash differently.

    Raises:
      ValueError: k is not in 1..E.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe import route
      >>> experts_NK = route.hash_tokens(jnp.array([7, 3, 7]), experts=16).experts_NK
      >>> bool(experts_NK[0] == experts_NK[2])
      True
    """
    check_k(k, experts)
    pair_NE = (
        tokens_N.astype(jnp.uint32)[:, None] * jnp.uint32(0x9E3779B1) + jnp.arange(experts, dtype=jnp.uint32)[None]
    )
    h_NE = _mix(_mix(pair_NE) ^ jnp.uint32(seed * 0x85EBCA77 % 2**32))
    # 24 bits are exact in float32, where top_k is fast everywhere.
    experts_NK = jax.lax.top_k((h_NE >> 8).astype(jnp.float32), k)[1]
    return _constant(experts_NK, experts, mask_N)


def _mix(h: UInt32[Array, "*N"]) -> UInt32[Array, "*N"]:
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _constant(experts_NK: Int[Array, "N K"], experts: int, mask_N: Bool[Array, " N"] | None) -> Routing:
    """Route to given experts with equal weights, uniform probabilities and zero logits."""
    n, k = experts_NK.shape
    logits_NE, mask_N = prepare(jnp.zeros((n, experts)), mask_N)
    return make_routing(experts_NK, jnp.full((n, k), 1 / k), jax.nn.softmax(logits_NE), logits_NE, mask_N)


def uniform(
    logits_NE: Float[Array, "N E"], k: int, mask_N: Bool[Array, " N"] | None = None, *, skew: float = 0.0
) -> Routing:
    """Route with a forced load, balanced or of a chosen imbalance; weights as in `replay`.

    Without skew choice j of token n has expert (n k + j) mod E. With skew the load of expert e is proportional to
    (e + 1)^-skew (Zipf's law), at most one choice a token, by systematic sampling (Madow 1949): k points one apart on
    the running sum of the loads, whose offsets, the multiples of the golden ratio, fill [0, 1) evenly.

    Args:
      logits_NE: router logits, for the weights.
      k: choices.
      mask_N: False for padding; tokens are numbered without it.
      skew: exponent of the loads; 0 is perfect balance.

    Raises:
      ValueError: k is not in 1..E, or skew is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe import metrics, route
      >>> route.uniform(jnp.zeros((3, 4)), k=2).experts_NK.tolist()
      [[0, 1], [2, 3], [0, 1]]
      >>> metrics.load(route.uniform(jnp.zeros((1000, 4)), k=1, skew=1.0)).tolist()  # 480, 240, 160, 120
      [481.0, 239.0, 160.0, 120.0]
    """
    n, e = logits_NE.shape
    check_k(k, e)
    if skew < 0:
        raise ValueError(f"skew={skew}: 0 is a balanced load, above 0 the first experts have more")
    position_N = jnp.arange(n, dtype=jnp.int32) if mask_N is None else jnp.cumsum(mask_N, dtype=jnp.int32) - 1
    choice_K = jnp.arange(k, dtype=jnp.int32)
    if not skew:
        return replay(logits_NE, (k * position_N[:, None] + choice_K[None]) % e, mask_N)
    # 32-bit arithmetic wraps around, as the fraction of a multiple does.
    offset_N = (position_N.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)) >> 8
    point_NK = offset_N.astype(jnp.float32)[:, None] / 2**24 + choice_K[None]
    ends_E = jnp.asarray(np.cumsum(zipf_loads(e, k, skew))[:-1], jnp.float32)
    return replay(logits_NE, jnp.searchsorted(ends_E, point_NK, side="right").astype(jnp.int32), mask_N)


def zipf_loads(experts: int, k: int, skew: float) -> np.ndarray:
    """Compute the choices of every expert per token, proportional to (e + 1)^-skew, at most 1 and k in all."""
    wanted_E = (np.arange(experts) + 1.0) ** -skew
    for full in range(k + 1):  # the first experts have all tokens
        load_E = np.ones(experts)
        load_E[full:] = (k - full) * wanted_E[full:] / max(wanted_E[full:].sum(), 1e-300)
        if load_E.max() <= 1:
            break
    return load_E


def replay(
    logits_NE: Float[Array, "N E"], experts_NK: Int[Array, "N K"], mask_N: Bool[Array, " N"] | None = None
) -> Routing:
    """Route to given experts; weights are the softmax of their logits, with gradients to the router for k > 1.

    Args:
      logits_NE: router logits.
      experts_NK: experts of an earlier routing; E for a choice that is not routed.
      mask_N: False for padding.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe import route
      >>> earlier = route.top_k(jnp.array([[3.0, 0.0, 1.0]]), k=2)
      >>> route.replay(jnp.zeros((1, 3)), earlier.experts_NK).experts_NK.tolist()
      [[0, 2]]
    """
    logits_NE, mask_N = prepare(logits_NE, mask_N)
    routed_NK = experts_NK < logits_NE.shape[-1]
    chosen_NK = take(logits_NE, jnp.where(routed_NK, experts_NK, 0))
    # A row without any choice would divide zero by zero.
    weights_NK = jax.nn.softmax(chosen_NK, where=routed_NK | ~routed_NK.any(axis=-1, keepdims=True))
    return make_routing(experts_NK, weights_NK, jax.nn.softmax(logits_NE), logits_NE, mask_N, routed_NK)
