"""Forms of attention by layer, and those that plain decoders do without: scaled positions, latents, soft-caps, sinks.

Axes: B batch, T and S query and key times, H query heads, K key/value heads (K divides H), G = H / K, h head dimension,
v that of values, f pairs of rotated channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, floor, log, pi
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sharding.attention import PLAIN, AttentionForm, visible


class LayerForm(NamedTuple):
    """What attention in one layer of a decoder does otherwise than in another; with leading axes of layers for a scan.

    Attributes:
      window: see `sharding.attention.AttentionForm`; float32 in an array, 0 for none, so that a pipeline can
        differentiate it.
      frequency_f: radians per position of every pair of rotated channels; zeros without positions (NoPE).
      magnitude: factor on rotated queries and keys.
    """

    window: Any
    frequency_f: Any
    magnitude: Any


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
      truncate: yarn: round the ramp's ends outwards to whole pairs of channels (gpt-oss does not).
      mscale, mscale_all_dim: yarn of DeepSeek: where both are set, the factor on queries and keys is the ratio of
        0.1 m ln(factor) + 1 for either; with the second, latent attention's scores are multiplied by its square.
    """

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_slow: float = 1.0
    beta_fast: float = 32.0
    attention_factor: float = 0.0
    truncate: bool = True
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

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
        if self.mscale and self.mscale_all_dim and not self.attention_factor:
            return self.temperature(self.mscale) / self.temperature(self.mscale_all_dim)
        return self.attention_factor or self.temperature(1.0)

    @property
    def latent_scale(self) -> float:
        """Factor on the scores of latent attention."""
        return self.temperature(self.mscale_all_dim) ** 2 if self.kind == "yarn" and self.mscale_all_dim else 1.0

    def temperature(self, mscale: float) -> float:
        """YaRN's 0.1 m ln(factor) + 1."""
        return 0.1 * mscale * log(self.factor) + 1.0


def scaled_frequencies(dim: int, theta: float, scaling: RopeScaling) -> Float[Array, " f"]:
    """Radians per position of every pair of `dim` channels, float32 [dim / 2], the fastest first; see `RopeScaling`."""
    frequency_f = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    if scaling.kind == "linear":
        return frequency_f / scaling.factor
    if scaling.kind == "llama3":
        turns_f, low = scaling.original_length * frequency_f / (2 * pi), scaling.low_freq_factor
        stays_f = (turns_f - low) / (scaling.high_freq_factor - low)
    else:
        # Pairs, in fractions, that turn beta_fast and beta_slow times over the original length.
        turns = (scaling.beta_fast, scaling.beta_slow)
        fast, slow = (dim * log(scaling.original_length / (2 * pi * n)) / (2 * log(theta)) for n in turns)
        first, last = (floor(fast), ceil(slow)) if scaling.truncate else (fast, slow)
        first, last = max(first, 0), min(last, dim - 1)
        stays_f = 1 - (jnp.arange(dim // 2, dtype=jnp.float32) - first) / max(last - first, 1e-3)
    stays_f = jnp.clip(stays_f, 0.0, 1.0)
    return frequency_f * (stays_f + (1 - stays_f) / scaling.factor)


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (MLA: DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Attributes:
      kv_rank: width of the latent that keys and values are projected from; 0 has plain attention.
      q_rank: width of the latent of queries; 0 projects them from the residual stream.
      nope_dim: channels of a head's query and key without positions.
      rope_dim: rotated channels of a head's query, and of the one key that all heads share.
      value_dim: channels of a head's value.
      absorbed: queries are projected to the latents, which are then one key and value for all heads: the same function
        (section 2.1.2), with a KV cache of kv_rank + rope_dim channels a token. Serving sets it.
    """

    kv_rank: int = 0
    q_rank: int = 0
    nope_dim: int = 128
    rope_dim: int = 64
    value_dim: int = 128
    absorbed: bool = False

    def __post_init__(self):
        least = {"kv_rank": 0, "q_rank": 0, "nope_dim": 1, "rope_dim": 2, "value_dim": 1}
        if wrong := [f"{name}={getattr(self, name)} (>= {n})" for name, n in least.items() if getattr(self, name) < n]:
            raise ValueError(f"sizes of latent attention out of range: {', '.join(wrong)}")
        if self.rope_dim % 2:
            raise ValueError(f"rope_dim={self.rope_dim} is odd; rotary positions need an even one")

    def check(self, others: Mapping[str, Any]) -> None:
        """Refuse options of plain attention that are not 0.

        Raises:
          ValueError: one of them is set.
        """
        if plain := [f"{name}={value}" for name, value in others.items() if value]:
            raise ValueError(f"latent.kv_rank={self.kv_rank}: latent attention has no {', '.join(plain)}")

    def shapes(self, width: int, heads: int) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
        """Shapes of the kernels but the last, by name, and sizes of the norms' gains."""
        shapes: dict[str, tuple[int, ...]] = {
            "latent_down": (width, self.kv_rank),
            "key_rope": (width, self.rope_dim),
            "key_up": (self.kv_rank, heads, self.nope_dim),
            "value_up": (self.kv_rank, heads, self.value_dim),
        }
        query = (heads, self.nope_dim + self.rope_dim)
        if not self.q_rank:
            return shapes | {"query": (width, *query)}, {"latent_norm": self.kv_rank}
        shapes |= {"query_down": (width, self.q_rank), "query_up": (self.q_rank, *query)}
        return shapes, {"latent_norm": self.kv_rank, "query_down_norm": self.q_rank}


def attention(
    q_BTHh: Float[Array, "B T H h"],
    k_BSKh: Float[Array, "B S K h"],
    v_BSKv: Float[Array, "B S K v"],
    form: AttentionForm = PLAIN,
    *,
    causal: bool = True,
    mask: Bool[Array, "#B #H #T S"] | None = None,
    implementation: str = "auto",
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
      implementation: a key of `IMPLEMENTATIONS`, which the form suits (`check_implementation`).

    Raises:
      ValueError: K does not divide H.
    """
    (_, T, H, h), (_, S, K, v) = q_BTHh.shape, v_BSKv.shape
    if H % K:
        raise ValueError(f"{H} query heads cannot share {K} key/value heads evenly")
    implementation = resolved(implementation)
    if implementation == "splash" and causal and mask is None:
        return splash_attention(q_BTHh, k_BSKh, v_BSKv, form)
    library = form.sinks_H is None and not form.softcap and v == h
    if implementation == "cudnn" and library and isinstance(form.window, int) and causal and mask is None:
        how: Any = {"is_causal": True, "local_window_size": (form.window - 1, 0) if form.window else None}
        how |= {"scale": form.scale or None, "implementation": "cudnn"}
        return jax.nn.dot_product_attention(q_BTHh, k_BSKh, v_BSKv, **how)
    if causal and (form.window is not None or not library):
        seen_TS = visible(jnp.arange(T), jnp.arange(S), form.window)
        seen_BHTS = jnp.expand_dims(seen_TS, (0, 1) if seen_TS.ndim == 2 else 1)
        mask, causal = seen_BHTS if mask is None else mask & seen_BHTS, False
    if library:
        return jax.nn.dot_product_attention(
            q_BTHh,
            k_BSKh,
            v_BSKv,
            mask=mask,
            is_causal=causal,
            scale=form.scale or None,
            implementation="cudnn" if implementation == "cudnn" else "xla",
        )
    return scored_attention(q_BTHh, k_BSKh, v_BSKv, form, mask)


@dataclass(frozen=True)
class Implementation:
    """A way to compute attention: what it is, the platforms that it runs on, and whether it was timed there."""

    meaning: str
    platforms: tuple[str, ...]
    experimental: bool = False


IMPLEMENTATIONS = {
    "xla": Implementation("products and a softmax, fused by XLA", ("cpu", "gpu", "tpu")),
    "cudnn": Implementation("cuDNN's flash attention", ("gpu",), experimental=True),
    "splash": Implementation("JAX's Pallas splash attention", ("tpu",), experimental=True),
}


def resolved(name: str) -> str:
    """The implementation behind "auto": XLA's on every platform until another one was measured there."""
    return "xla" if name == "auto" else name


def check_implementation(name: str, platform: str, unsuited: Mapping[str, tuple[str, ...]]) -> str:
    """Check that an implementation of attention can run, and say which one does.

    Args:
      name: a key of `IMPLEMENTATIONS`, or "auto".
      platform: "cpu", "gpu" or "tpu".
      unsuited: implementation -> what of the model or the run it cannot compute.

    Returns:
      A line for the log.

    Raises:
      ValueError: it does not run there, or not for this model.
    """
    chosen = resolved(name)
    here = [each for each, how in IMPLEMENTATIONS.items() if platform in how.platforms]
    if chosen not in here:
        where = " and ".join(IMPLEMENTATIONS[chosen].platforms)
        raise ValueError(
            f"attention_implementation={name!r} runs on {where}, and this is {platform}: choose {' or '.join(here)}"
        )
    if wrong := unsuited.get(chosen, ()):
        raise ValueError(f"attention_implementation={name!r} cannot compute {', '.join(wrong)}: choose 'xla'")
    line = f"attention: {chosen} ({IMPLEMENTATIONS[chosen].meaning})"
    if IMPLEMENTATIONS[chosen].experimental:
        return f"{line}, experimental: not timed"
    others = [f"{each} (experimental, not timed)" for each in here if each != chosen and not unsuited.get(each)]
    return f"{line}; config.model.attention_implementation may also be {', '.join(others)}" if others else line


def splash_attention(
    q_BTHh: Float[Array, "B T H h"],
    k_BTKh: Float[Array, "B T K h"],
    v_BTKv: Float[Array, "B T K v"],
    form: AttentionForm,
    *,
    interpret: bool = False,
) -> Float[Array, "B T H v"]:
    """Causal attention by JAX's splash kernel for TPUs (flash attention: Dao et al. 2022), soft-caps included.

    Args:
      q_BTHh: queries; T is a multiple of 128.
      k_BTKh: keys; K divides H.
      v_BTKv: values.
      form: without sinks. Its window is a number, or [B, T] that of packed documents in a global layer.
      interpret: run the kernel in Pallas's interpreter.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, T, H, h = q_BTHh.shape
    packed = form.window is not None and jnp.ndim(form.window) == 2
    window = 0 if packed else int(form.window or 0)
    seen = masks.LocalMask((T, T), (window - 1, 0), 0) if window else masks.CausalMask((T, T))
    size = next(size for size in (512, 256, 128) if T % size == 0)
    forward, backward = "q kv kv_compute", "q_dkv kv_dkv kv_dkv_compute q_dq kv_dq"
    blocks: Any = {f"block_{name}": size for name in f"{forward} {backward}".split()}
    attend = splash.make_splash_mha(
        mask=masks.MultiHeadMask([seen] * H),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=form.softcap or None,
        block_sizes=splash.BlockSizes(**blocks),
        interpret=interpret,
    )
    q_BHTh, k_BKTh, v_BKTv = (x.transpose(0, 2, 1, 3) for x in (q_BTHh * (form.scale or h**-0.5), k_BTKh, v_BTKv))
    segments = None
    if packed:  # a document is known by its first position in the row
        start_BT = (jnp.arange(T)[None] - form.window + 1).astype(jnp.int32)
        segments = splash.SegmentIds(start_BT, start_BT)
    y_BHTv = jax.vmap(attend, in_axes=(0, 0, 0, None if segments is None else 0))(q_BHTh, k_BKTh, v_BKTv, segments)
    return y_BHTv.transpose(0, 2, 1, 3).astype(q_BTHh.dtype)


def scored_attention(
    q_BTHh: Float[Array, "B T H h"],
    k_BSKh: Float[Array, "B S K h"],
    v_BSKv: Float[Array, "B S K v"],
    form: AttentionForm,
    mask: Bool[Array, "#B #H #T S"] | None,
) -> Float[Array, "B T H v"]:
    """Attention whose scores are soft-capped, that has sinks, or whose values have another size than keys.

    Args:
      q_BTHh: queries.
      k_BSKh: keys; K divides H.
      v_BSKv: values.
      form: sinks, scale and soft-cap.
      mask: True where a query may look; None where it may look everywhere.
    """
    (B, T, H, h), (_, S, K, v) = q_BTHh.shape, v_BSKv.shape
    q_BTKGh = q_BTHh.reshape(B, T, K, H // K, h)
    s_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGh, k_BSKh, preferred_element_type=jnp.float32)
    s_BHTS = form.scores(s_BKGTS, h).reshape(B, H, T, S)
    s_BHTS = s_BHTS if mask is None else jnp.where(mask, s_BHTS, -jnp.inf)
    lse_BHT = jax.nn.logsumexp(s_BHTS, axis=-1)
    if form.sinks_H is not None:
        lse_BHT = jnp.logaddexp(lse_BHT, form.sinks_H.astype(jnp.float32)[None, :, None])
    p_BKGTS = jnp.exp(s_BHTS - lse_BHT[..., None]).astype(v_BSKv.dtype).reshape(s_BKGTS.shape)
    return jnp.einsum("bkgts,bskv->btkgv", p_BKGTS, v_BSKv).reshape(B, T, H, v).astype(q_BTHh.dtype)
