"""Forms of causal attention: sliding windows, soft-capped scores and attention sinks, for every way it is computed.

Plain, ring and Ulysses attention and attention over a KV cache take one `AttentionForm`. Axes: see `sharding`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num


class AttentionForm(NamedTuple):
    """What the scores and the softmax of an attention layer are besides softmax(q k / sqrt(h)) v.

    Attributes:
      window: sliding window (Beltagy et al. 2020, arXiv:2004.05150, section 3.1): number of tokens that a query sees,
        itself included; 0 for all before it. A number, an array [] where layers of one scan differ, or [B, T] where
        queries do (`packed_window`).
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


def visible(query_T: Int[Array, "*N T"], key_S: Int[Array, "*N S"], window: Any = None) -> Bool[Array, "*M T S"]:
    """Whether a query sees a key, by their positions: causal attention in a sliding window.

    Args:
      query_T: positions of queries in their row, of which packed documents have several.
      key_S: positions of keys.
      window: see `AttentionForm`; with its [B, T] the result is [B, T, S].

    Example:
      >>> import jax.numpy as jnp
      >>> import sharding
      >>> sharding.visible(jnp.arange(4), jnp.arange(4), window=2).astype(int).tolist()
      [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """
    distance_TS = jnp.expand_dims(query_T, -1) - jnp.expand_dims(key_S, -2)
    if window is not None and jnp.ndim(window):
        window = jnp.expand_dims(window, -1)
        distance_TS = jnp.expand_dims(distance_TS, tuple(range(window.ndim - distance_TS.ndim)))
    seen_TS = distance_TS >= 0
    return seen_TS if window is None else seen_TS & ((distance_TS < window) | (window == 0))


def packed_window(positions_BT: Int[Array, "*N T"], window: Any = None) -> Num[Array, "*N T"]:
    """Sliding windows that end at the boundaries of documents packed into a row (block-diagonal causal attention).

    A token sees its document's tokens up to itself, so many as its position in it and one, and of these those in the
    layer's window. It takes no ids of the keys' documents: a ring of devices sends nothing more.

    Args:
      positions_BT: positions that restart at 0 in every document; negative for padding, which sees itself alone.
      window: of the layer, see `AttentionForm`.

    Example:
      >>> import jax.numpy as jnp
      >>> import sharding
      >>> window = sharding.packed_window(jnp.array([0, 1, 0, 1, 2]))
      >>> sharding.visible(jnp.arange(5), jnp.arange(5), window).astype(int).tolist()
      [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    """
    own_BT = jnp.maximum(positions_BT, 0) + 1
    if window is None:
        return own_BT
    return jnp.where(jnp.asarray(window) > 0, jnp.minimum(own_BT, window), own_BT)


def finite(x: jax.Array) -> jax.Array:
    """Replace what is not finite by zero: log-sum-exps of no keys."""
    return jnp.where(jnp.isfinite(x), x, 0.0)
