"""Rotary positions and causal attention as pure functions.

Axes: B batch, T and S query and key times, H query heads, K key/value heads (K divides H), G = H / K, h head dimension,
v that of values, f pairs of rotated channels.
"""

from dataclasses import dataclass
from math import ceil, floor, log, pi
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sharding.attention import PLAIN, AttentionForm, visible


@dataclass(frozen=True)
class RopeScaling:
    """Rotary positions of a model whose context was extended after pretraining.

    Attributes:
      kind: "none"; "linear" (position interpolation, Chen et al. 2023, arXiv:2306.15595), all frequencies over
        `factor`; "llama3" (Llama 3.1) and "yarn" (Peng et al. 2023, arXiv:2309.00071), slow ones over `factor`, fast
        ones as they are, a ramp between.
      factor: by which the context grows.
      original_length: context of pretraining in tokens, for llama3 and yarn.
      low_freq_factor, high_freq_factor: llama3: turns over original_length up to which a frequency is scaled, and from
        which it stays.
      beta_slow, beta_fast: yarn: the same, rounded outwards to whole channels.
      attention_factor: yarn: factor on rotated queries and keys; 0 takes 0.1 ln(factor) + 1 (section 3.4).
    """

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_slow: float = 1.0
    beta_fast: float = 32.0
    attention_factor: float = 0.0

    def __post_init__(self):
        if self.factor < 1:
            raise ValueError(f"factor={self.factor} must be at least 1")
        if self.kind in ("llama3", "yarn") and self.original_length < 1:
            raise ValueError(f"original_length={self.original_length}: {self.kind} needs the context of pretraining")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not 0 < getattr(self, low) < getattr(self, high):
                raise ValueError(f"{low}={getattr(self, low)} must be positive and below {high}={getattr(self, high)}")

    @property
    def magnitude(self) -> float:
        """Factor on rotated queries and keys."""
        if self.kind != "yarn":
            return 1.0
        return self.attention_factor or 0.1 * log(self.factor) + 1.0


def rope_frequencies(dim: int, theta: float = 1e4, scaling: RopeScaling = RopeScaling()) -> Float[Array, " f"]:
    """Radians per position of every pair of `dim` channels, float32 [dim / 2], the fastest first; see `RopeScaling`."""
    frequency_f = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    if scaling.kind == "none":
        return frequency_f
    if scaling.kind == "linear":
        return frequency_f / scaling.factor
    if scaling.kind == "llama3":
        turns_f, low = scaling.original_length * frequency_f / (2 * pi), scaling.low_freq_factor
        stays_f = (turns_f - low) / (scaling.high_freq_factor - low)
    else:
        # Pairs, in fractions, that turn beta_fast and beta_slow times over the original length.
        turns = (scaling.beta_fast, scaling.beta_slow)
        fast, slow = (dim * log(scaling.original_length / (2 * pi * n)) / (2 * log(theta)) for n in turns)
        first, last = max(floor(fast), 0), min(ceil(slow), dim - 1)
        stays_f = 1 - (jnp.arange(dim // 2, dtype=jnp.float32) - first) / max(last - first, 1e-3)
    stays_f = jnp.clip(stays_f, 0.0, 1.0)
    return frequency_f * (stays_f + (1 - stays_f) / scaling.factor)


def rope(
    x_BTHh: Float[Array, "B T H h"],
    positions_BT: Int[Array, "B T"],
    theta: float = 1e4,
    scaling: RopeScaling = RopeScaling(),
) -> Float[Array, "B T H h"]:
    """Rotate pairs of channels by an angle that grows with the position: RoFormer (Su et al. 2021), eq. 34.

    Channel i is paired with i + h/2 (the GPT-NeoX and Llama layout, not the interleaved one of the paper; the two
    differ by a fixed permutation of channels). Pair i turns by `position * theta ** (-2 i / h)` radians.

    Args:
      x_BTHh: queries or keys; h must be even.
      positions_BT: integer position of every token; they need not be contiguous.
      theta: base of the wavelengths.
      scaling: of the wavelengths.

    Raises:
      ValueError: h is odd.
    """
    h = x_BTHh.shape[-1]
    if h % 2:
        raise ValueError(f"rope pairs channels, so the head dimension must be even, not {h}")
    return rotate(x_BTHh, positions_BT, rope_frequencies(h, theta, scaling), scaling.magnitude)


def rotate(
    x_BTHh: Float[Array, "B T H h"],
    positions_BT: Int[Array, "B T"],
    frequency_f: Float[Array, " f"],
    magnitude: Float[Array, ""] | float = 1.0,
) -> Float[Array, "B T H h"]:
    """Rotate the pairs of channels i and i + f by position * frequency_f[i], times `magnitude`; see `rope`."""
    angle_BTf = positions_BT[..., None].astype(jnp.float32) * frequency_f[None, None, :]
    cos, sin = (magnitude * turn(angle_BTf)[:, :, None, :] for turn in (jnp.cos, jnp.sin))
    first, second = jnp.split(x_BTHh.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHh.dtype)


def attention(
    q_BTHh: Float[Array, "B T H h"],
    k_BSKh: Float[Array, "B S K h"],
    v_BSKv: Float[Array, "B S K v"],
    form: AttentionForm = PLAIN,
    *,
    causal: bool = True,
    mask: Bool[Array, "#B #H #T S"] | None = None,
    implementation: Literal["xla", "cudnn"] | None = None,
) -> Float[Array, "B T H v"]:
    """Softmax of q·k / sqrt(h) applied to v: Vaswani et al. (2017), eq. 1, with grouped keys (Ainslie et al. 2023).

    Query head i reads key/value head i // (H / K). The softmax is float32. A sliding window hides scores; that all are
    computed is what XLA does with the causal mask too.

    Args:
      q_BTHh: queries.
      k_BSKh: keys; K must divide H.
      v_BSKv: values.
      form: sliding window, sinks, scale and soft-cap.
      causal: query t sees keys 0..t only, those in the window.
      mask: True where a query may look; combined with `causal`.
      implementation: passed to `jax.nn.dot_product_attention` where that can compute the form; None lets JAX choose.

    Raises:
      ValueError: K does not divide H.
    """
    (B, T, H, h), (_, S, K, v) = q_BTHh.shape, v_BSKv.shape
    if H % K:
        raise ValueError(f"{H} query heads cannot share {K} key/value heads evenly")
    library = form.sinks_H is None and not form.softcap and v == h
    if causal and (form.windowed or not library):
        seen_TS = visible(jnp.arange(T), jnp.arange(S), form.window)[None, None]
        mask, causal = seen_TS if mask is None else mask & seen_TS, False
    if library:
        return jax.nn.dot_product_attention(
            q_BTHh,
            k_BSKh,
            v_BSKv,
            mask=mask,
            is_causal=causal,
            scale=form.scale or None,
            implementation=implementation,
        )
    q_BTKGh = q_BTHh.reshape(B, T, K, H // K, h)
    s_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGh, k_BSKh, preferred_element_type=jnp.float32)
    s_BHTS = form.scores(s_BKGTS, h).reshape(B, H, T, S)
    s_BHTS = s_BHTS if mask is None else jnp.where(mask, s_BHTS, -jnp.inf)
    lse_BHT = jax.nn.logsumexp(s_BHTS, axis=-1)
    if form.sinks_H is not None:
        lse_BHT = jnp.logaddexp(lse_BHT, form.sinks_H.astype(jnp.float32)[None, :, None])
    p_BKGTS = jnp.exp(s_BHTS - lse_BHT[..., None]).astype(v_BSKv.dtype).reshape(s_BKGTS.shape)
    return jnp.einsum("bkgts,bskv->btkgv", p_BKGTS, v_BSKv).reshape(B, T, H, v).astype(q_BTHh.dtype)
