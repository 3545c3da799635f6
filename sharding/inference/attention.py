"""Attention of new tokens over a KV cache and over each other, merged by log-sum-exp (as in flash decoding).

The cache is only read while the layers run; the new tokens' keys are appended afterwards, in one write for all layers.
Axes: see `sharding.inference`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sharding.attention import PLAIN, AttentionForm, finite, visible
from sharding.inference.kv_cache import Blocks, Past

Partial = tuple[Float[Array, "N T K G h"], Float[Array, "N T K G"]]
"""Attention over some of the keys, normalized over them, and the log of the normalizer (-inf for no key); float32."""


def over_past(
    q_NTKGh: Float[Array, "N T K G h"],
    past: Past,
    starts_N: Int[Array, " N"],
    cp: str | None = None,
    form: AttentionForm = PLAIN,
    first: Any = 0,
    new: Any = 0,
) -> Partial:
    """Attend over the cached keys of a slot, positions 0..starts-1, or those of a sliding window.

    Args:
      q_NTKGh: queries.
      past: keys and values of this device; the products with int8 ones are multiplied by their scales.
      starts_N: tokens in the cache, over all devices of cp.
      cp: mesh axis that splits positions; the result is this device's part.
      form: window, scale and soft-cap; sinks are not added here.
      first: position of the first key, where `past` is a block of the cache.
      new: position from which on keys count.
    """
    ways, index = (1, 0) if cp is None else (jax.lax.axis_size(cp), jax.lax.axis_index(cp))
    position_S = jnp.arange(past.k.shape[2], dtype=jnp.int32) * ways + index
    position_S += first
    seen_NS = position_S[None] < starts_N[:, None]
    seen_NS &= (position_S >= new)[None]
    seen_NTS = seen_NS[:, None]
    if form.window is not None:
        position_NT = starts_N[:, None] + jnp.arange(q_NTKGh.shape[1], dtype=jnp.int32)[None]
        seen_NTS &= visible(position_NT, jnp.broadcast_to(position_S[None], seen_NS.shape), form.window)
    dtype = q_NTKGh.dtype
    v, v_scale = (past.k, past.k_scale) if past.v is None else (past.v, past.v_scale)
    k_NKSh, v_NKSh = past.k.astype(dtype), v.astype(dtype)
    s_NKGTS = jnp.einsum("ntkgh,nksh->nkgts", q_NTKGh, k_NKSh, preferred_element_type=jnp.float32)
    if past.k_scale is not None:
        s_NKGTS *= past.k_scale[:, :, None, None]
    s_NKGTS = jnp.where(seen_NTS[:, None, None], form.scores(s_NKGTS, q_NTKGh.shape[-1]), -jnp.inf)
    top_NKGT = finite(s_NKGTS.max(-1))
    p_NKGTS = jnp.exp(s_NKGTS - top_NKGT[..., None])
    sum_NKGT = p_NKGTS.sum(-1)
    if v_scale is not None:
        p_NKGTS *= v_scale[:, :, None, None]
    o_NKGTh = jnp.einsum("nkgts,nksh->nkgth", p_NKGTS.astype(dtype), v_NKSh, preferred_element_type=jnp.float32)
    o_NKGTh /= jnp.maximum(sum_NKGT, 1e-30)[..., None]
    lse_NKGT = jnp.log(sum_NKGT) + top_NKGT
    return o_NKGTh.transpose(0, 3, 1, 2, 4), lse_NKGT.transpose(0, 3, 1, 2)


def over_live(
    q_NTKGh: Float[Array, "N T K G h"], blocks: Blocks, starts_N: Int[Array, " N"], form: AttentionForm = PLAIN
) -> Partial:
    """Attend like `over_past`, block by block, as far as the longest of the rows reaches (flash decoding).

    The rest of the cache is not read. Blocks past the end of a row change its numbers in no bit.
    """

    def more(carry: tuple) -> Array:
        return carry[0] * blocks.size < starts_N.max()

    def step(carry: tuple) -> tuple:
        number, part = carry
        new = number * blocks.size
        first = jnp.minimum(new, blocks.length - blocks.size)  # the last one may overlap the one before
        block = over_past(q_NTKGh, blocks.read(first), starts_N, None, form, first, new)
        return number + 1, merge(part, block)

    empty = jnp.zeros(q_NTKGh.shape, jnp.float32), jnp.full(q_NTKGh.shape[:-1], -jnp.inf)
    return jax.lax.while_loop(more, step, (jnp.int32(0), empty))[1]


def over_chunk(
    q_NTKGh: Float[Array, "N T K G h"],
    k_NTKh: Float[Array, "N T K h"],
    v_NTKh: Float[Array, "N T K v"],
    form: AttentionForm = PLAIN,
) -> Partial:
    """Attend causally over the call's own tokens; sinks are not added here."""
    at_T = jnp.arange(q_NTKGh.shape[1])
    s_NKGTS = jnp.einsum("ntkgh,nskh->nkgts", q_NTKGh, k_NTKh, preferred_element_type=jnp.float32)
    seen_TS = visible(at_T, at_T, form.window)
    s_NKGTS = jnp.where(seen_TS[None, None, None], form.scores(s_NKGTS, q_NTKGh.shape[-1]), -jnp.inf)
    lse_NKGT = jax.nn.logsumexp(s_NKGTS, axis=-1)
    p_NKGTS = jnp.exp(s_NKGTS - lse_NKGT[..., None]).astype(v_NTKh.dtype)
    o_NTKGh = jnp.einsum("nkgts,nskh->ntkgh", p_NKGTS, v_NTKh, preferred_element_type=jnp.float32)
    return o_NTKGh, lse_NKGT.transpose(0, 3, 1, 2)


def merge(a: Partial, b: Partial) -> Partial:
    """Merge attention over two disjoint sets of keys (Milakov & Gimelshein 2018); either may be empty."""
    (a_o, a_lse), (b_o, b_lse) = a, b
    top = finite(jnp.maximum(a_lse, b_lse))
    a_weight, b_weight = jnp.exp(a_lse - top), jnp.exp(b_lse - top)
    total = a_weight + b_weight
    o = (a_o * a_weight[..., None] + b_o * b_weight[..., None]) / jnp.maximum(total, 1e-30)[..., None]
    return o, jnp.log(total) + top


def merge_over(part: Partial, axis: str | None) -> Partial:
    """Merge the parts of all devices of a mesh axis: a max all-reduce and a sum all-reduce."""
    if axis is None:
        return part
    o, lse = part
    with jax.named_scope("merge_context"):
        top = finite(jax.lax.pmax(lse, axis))
        weight = jnp.exp(lse - top)
        sums = jax.lax.psum(jnp.concatenate([o * weight[..., None], weight[..., None]], axis=-1), axis)
    o, total = sums[..., :-1], sums[..., -1]
    return o / jnp.maximum(total, 1e-30)[..., None], jnp.log(total) + top


def cached_attention(
    q_NTHh: Float[Array, "N T H h"],
    k_NTKh: Float[Array, "N T K h"],
    v_NTKh: Float[Array, "N T K h"],
    past: Past | Blocks,
    starts_N: Int[Array, " N"],
    cp: str | None = None,
    form: AttentionForm = PLAIN,
) -> Float[Array, "N T H h"]:
    """Compute attention over the KV cache and, causally, over the call's own tokens (grouped-query attention).

    Args:
      q_NTHh: queries; head i uses key head i // G.
      k_NTKh: keys of the call's tokens.
      v_NTKh: values.
      past: cached keys and values of the rows' slots, one layer; as `Blocks` only those that a row needs are read,
        which is for one device.
      starts_N: number of cached tokens.
      cp: mesh axis that splits positions (context parallelism).
      form: sliding window, sinks, scale and soft-cap. Keys outside of a window are read too.

    Example:
      >>> import jax.numpy as jnp
      >>> from sharding.inference import CacheConfig, cached_attention, make_cache, read_range
      >>> cache = make_cache(CacheConfig(layers=1, slots=2, kv_heads=1, length=8, head_dim=4))
      >>> past = read_range(0, 2)(cache, 0)
      >>> q, kv = jnp.ones((2, 3, 2, 4)), jnp.ones((2, 3, 1, 4))
      >>> cached_attention(q, kv, kv, past, starts_N=jnp.zeros(2, jnp.int32)).shape
      (2, 3, 2, 4)
    """
    N, T, H, h = q_NTHh.shape
    K = k_NTKh.shape[2]
    q_NTKGh = q_NTHh.reshape(N, T, K, H // K, h)
    if isinstance(past, Blocks):
        before = over_live(q_NTKGh, past, starts_N, form)
    else:
        before = merge_over(over_past(q_NTKGh, past, starts_N, cp, form), cp)
    part = merge(before, over_chunk(q_NTKGh, k_NTKh, v_NTKh, form))
    if form.sinks_H is not None:
        sinks_NTKG = jnp.broadcast_to(form.sinks_H.reshape(1, 1, K, H // K).astype(jnp.float32), part[1].shape)
        part = merge(part, (jnp.zeros_like(part[0]), sinks_NTKG))
    return part[0].reshape(N, T, H, h).astype(q_NTHh.dtype)
