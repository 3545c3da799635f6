"""Forms of causal attention: sliding windows, soft-capped scores and attention sinks, for every way it is computed.

Plain, ring and Ulysses attention and attention over a KV cache take one `AttentionForm`. Axes: see `sharding`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class AttentionForm(NamedTuple):
    """What the scores and the softmax of an attention layer are besides softmax(q k / sqrt(h)) v.

    Attributes:
      window: sliding window (Beltagy et al. 2020, arXiv:2004.05150, section 3.1): number of tokens that a query sees,
        itself included; 0 for all before it. A number, or an array [] where layers of one scan differ.
      sinks_H: attention sinks: a logit for every query head that takes part in its softmax and has no value (OpenAI
        2025, arXiv:2508.10925, section 2.2); None without.
      scale: factor on the scores; 0 takes h^-0.5.
      softcap: scores s become softcap tanh(s / softcap) (Gemma 2, arXiv:2408.00118, section 2); 0 leaves them.

    Example:
      >>> import sharding
      >>> sharding.AttentionForm(window=128, softcap=50.0).sinks_H is None
      True
    """

    window: Any = None
    sinks_H: Any = None
    scale: float = 0.0
    softcap: float = 0.0

    def scores(self, products: Float[Array, "..."], size: int) -> Float[Array, "..."]:
        """Scores of inner products of queries and keys with `size` channels."""
        s = products * (self.scale or size**-0.5)
        return self.softcap * jnp.tanh(s / self.softcap) if self.softcap else s


PLAIN = AttentionForm()


def visible(query_T: Int[Array, "*N T"], key_S: Int[Array, "*N S"], window: Any = None) -> Bool[Array, "*N T S"]:
    """Whether a query sees a key, by their positions: causal attention in a sliding window.

    Args:
      query_T: positions of queries.
      key_S: positions of keys.
      window: see `AttentionForm`.

    Example:
      >>> import jax.numpy as jnp
      >>> import sharding
      >>> sharding.visible(jnp.arange(4), jnp.arange(4), window=2).astype(int).tolist()
      [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """
    distance_TS = jnp.expand_dims(query_T, -1) - jnp.expand_dims(key_S, -2)
    seen_TS = distance_TS >= 0
    return seen_TS if window is None else seen_TS & ((distance_TS < window) | (window == 0))


def finite(x: jax.Array) -> jax.Array:
    """Replace what is not finite by zero: log-sum-exps of no keys."""
    return jnp.where(jnp.isfinite(x), x, 0.0)
