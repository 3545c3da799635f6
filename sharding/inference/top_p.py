"""Vocab-parallel top-k and top-p (nucleus) thresholds, exact without sorting: bisection over the bits of a float32.

Axes: see `sharding.inference`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32


def log_normalizer(logits_NV: Float[Array, "N V"], tp: str | None) -> Float[Array, " N"]:
    """Compute the log-sum-exp over the full vocabulary."""
    if tp is None:
        return jax.nn.logsumexp(logits_NV, axis=-1)
    top_N = jax.lax.pmax(logits_NV.max(-1), tp)
    return top_N + jnp.log(jax.lax.psum(jnp.exp(logits_NV - top_N[:, None]).sum(-1), tp))


def cutoff(
    x_NV: Float[Array, "N V"],
    weight_NV: Float[Array, "N V"],
    need_N: Float[Array, " N"],
    known_N: Float[Array, " N"],
    asked_N: Bool[Array, " N"],
    tp: str | None,
) -> Float[Array, " N"]:
    """Find the largest t with weights of all x >= t adding up to `need`; the smallest x where all do not.

    Weights of one give a top-k threshold, probabilities a top-p one. At most 32 rounds, each with one sum over devices,
    and none if no row asks.

    Args:
      x_NV: finite, float32, this device's columns.
      weight_NV: of each, not negative.
      need_N: above 0.
      known_N: the result of rows that do not ask.
      asked_N: rows to compute; equal on all devices of tp.
      tp: mesh axis that splits the vocabulary.
    """
    least_N, most_N = x_NV.min(-1), x_NV.max(-1)
    if tp is not None:
        least_N, most_N = jax.lax.pmin(least_N, tp), jax.lax.pmax(most_N, tp)
    # The answer lies in low <= t < high.
    low_N = ordered(jnp.where(asked_N, least_N, known_N))
    high_N = jnp.where(asked_N, ordered(most_N), low_N) + 1

    def open_rows(bounds: tuple) -> Array:
        return (bounds[1] - bounds[0] > 1).any()

    def halve(bounds: tuple) -> tuple:
        low_N, high_N = bounds
        middle_N = low_N + (high_N - low_N) // 2
        sum_N = jnp.where(x_NV >= number(middle_N)[:, None], weight_NV, 0.0).sum(-1)
        enough_N = (sum_N if tp is None else jax.lax.psum(sum_N, tp)) >= need_N
        wide_N = high_N - low_N > 1
        return jnp.where(wide_N & enough_N, middle_N, low_N), jnp.where(wide_N & ~enough_N, middle_N, high_N)

    low_N, _ = jax.lax.while_loop(open_rows, halve, (low_N, high_N))
    return number(low_N)


def ordered(x: Float[Array, "*N"]) -> UInt32[Array, "*N"]:
    """Map float32 numbers to integers of the same order, by their bits."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def number(key: UInt32[Array, "*N"]) -> Float[Array, "*N"]:
    """Invert `ordered`."""
    bits = jnp.where(key >> 31 == 1, key & jnp.uint32((1 << 31) - 1), ~key)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
