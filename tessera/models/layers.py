"""The pure functions a decoder block is made of: RMSNorm, rotary positions, attention and SwiGLU.

Axes: B batch, T and S query and key times, D width, H query heads, K key/value heads (K divides H), h head dimension,
F feed-forward width. Every function computes in the dtype of `x` and takes parameters of any float dtype; statistics
(means, softmax, angles) are float32. Kernels are never fused, so that no sharded axis is ever sliced.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int


def rms_norm(x: Float[Array, "*N D"], gain: Float[Array, " D"], eps: float = 1e-6) -> Float[Array, "*N D"]:
    """Divide by the root mean square over the last axis and scale: Zhang & Sennrich (2019), eq. 4.

    Args:
      x: activations of any float dtype.
      gain: one factor per channel.
      eps: added to the mean square, so that a zero vector stays zero.

    Returns:
      An array of x's shape and dtype; the statistics are float32.
    """
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    # Spelled out because the tests forbid implicit rank promotion.
    gain = gain.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (x32 * scale * gain).astype(x.dtype)


def rope(
    x_BTHh: Float[Array, "B T H h"], positions_BT: Int[Array, "B T"], theta: float = 1e4
) -> Float[Array, "B T H h"]:
    """Rotate pairs of channels by an angle that grows with the position: RoFormer (Su et al. 2021), eq. 34.

    Channel i is paired with i + h/2 (the GPT-NeoX and Llama layout, not the interleaved one of the paper; the two
    differ by a fixed permutation of channels). Pair i turns by `position * theta ** (-2 i / h)` radians.

    Args:
      x_BTHh: queries or keys; h must be even.
      positions_BT: integer position of every token; they need not be contiguous.
      theta: base of the wavelengths.

    Raises:
      ValueError: h is odd.
    """
    h = x_BTHh.shape[-1]
    if h % 2:
        raise ValueError(f"rope pairs channels, so the head dimension must be even, not {h}")
    frequency_f = theta ** (-jnp.arange(0, h, 2, dtype=jnp.float32) / h)
    angle_BTf = positions_BT[..., None].astype(jnp.float32) * frequency_f[None, None, :]
    cos, sin = jnp.cos(angle_BTf)[:, :, None, :], jnp.sin(angle_BTf)[:, :, None, :]
    first, second = jnp.split(x_BTHh.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHh.dtype)


def to_heads(x_BTD: Float[Array, "B T D"], kernel_DHh: Float[Array, "D H h"]) -> Float[Array, "B T H h"]:
    """Project activations to one vector per head; computes in x's dtype."""
    return jnp.einsum("btd,dhk->bthk", x_BTD, kernel_DHh.astype(x_BTD.dtype))


def from_heads(x_BTHh: Float[Array, "B T H h"], kernel_HhD: Float[Array, "H h D"]) -> Float[Array, "B T D"]:
    """Project the heads' outputs back to the residual stream; computes in x's dtype."""
    return jnp.einsum("bthk,hkd->btd", x_BTHh, kernel_HhD.astype(x_BTHh.dtype))


def attention(
    q_BTHh: Float[Array, "B T H h"],
    k_BSKh: Float[Array, "B S K h"],
    v_BSKh: Float[Array, "B S K h"],
    *,
    causal: bool = True,
    mask: Bool[Array, "#B #H #T S"] | None = None,
    implementation: Literal["xla", "cudnn"] | None = None,
) -> Float[Array, "B T H h"]:
    """Softmax of q·k / sqrt(h) applied to v: Vaswani et al. (2017), eq. 1, with grouped keys (Ainslie et al. 2023).

    Query head i reads key/value head i // (H / K). The softmax is float32.

    Args:
      q_BTHh: queries.
      k_BSKh: keys; K must divide H.
      v_BSKh: values.
      causal: query t sees keys 0..t only.
      mask: True where a query may look; combined with `causal`.
      implementation: passed to `jax.nn.dot_product_attention`; None lets JAX choose.

    Raises:
      ValueError: K does not divide H.
    """
    heads, kv_heads = q_BTHh.shape[2], k_BSKh.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key/value heads evenly")
    return jax.nn.dot_product_attention(
        q_BTHh, k_BSKh, v_BSKh, mask=mask, is_causal=causal, implementation=implementation
    )


def swiglu(
    x: Float[Array, "*N D"], gate: Float[Array, "D F"], up: Float[Array, "D F"], down: Float[Array, "F D"]
) -> Float[Array, "*N D"]:
    """Gated feed-forward layer (silu(x gate) * (x up)) down without biases: Shazeer (2020), eq. 6."""
    gate, up, down = (kernel.astype(x.dtype) for kernel in (gate, up, down))
    gated, raised = checkpoint_name(x @ gate, "gate_up"), checkpoint_name(x @ up, "gate_up")
    return (jax.nn.silu(gated) * raised) @ down
