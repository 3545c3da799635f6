"""Context parallelism: attention over a sequence split among devices, by ring attention or DeepSpeed Ulysses.

All functions run inside shard_map, on one device's part of time.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sharding.attention import PLAIN, AttentionForm, finite, visible
from sharding.tensor_parallel import vary, varying

Partial = tuple[Float[Array, "B T K G h"], Float[Array, "B T K G"]]
"""Attention over some of the keys, normalized over them, and the log of the normalizer; float32."""


def zigzag_positions(index: Int[Array, ""] | int, parts: int, length: int) -> Int[Array, " T"]:
    """Compute the zigzag positions of part `index` of `parts`: chunks index and 2 parts - 1 - index.

    Under a causal mask early tokens attend to few keys and late ones to many; one chunk from each end gives every
    device the same work (Brandon et al. 2023, striped attention, pose the problem; the pairing is Llama 3's, section
    3.3.2).

    Args:
      index: part, traced or not.
      parts: number of parts.
      length: tokens of the full sequence, a multiple of 2 parts.

    Example:
      >>> import sharding
      >>> sharding.zigzag_positions(0, 2, 8).tolist(), sharding.zigzag_positions(1, 2, 8).tolist()
      ([0, 1, 6, 7], [2, 3, 4, 5])
    """
    chunk = length // (2 * parts)
    steps = jnp.arange(chunk, dtype=jnp.int32)
    return jnp.concatenate([index * chunk + steps, (2 * parts - 1 - index) * chunk + steps]).astype(jnp.int32)


def contiguous_positions(index: Int[Array, ""] | int, parts: int, length: int) -> Int[Array, " T"]:
    """Compute the positions of part `index` when time is split in order; `length` is a multiple of `parts`.

    Example:
      >>> import sharding
      >>> sharding.contiguous_positions(1, 2, 8).tolist()
      [4, 5, 6, 7]
    """
    return (index * (length // parts) + jnp.arange(length // parts)).astype(jnp.int32)


def ring_attention(
    q_BTHh: Float[Array, "B T H h"],
    k_BTKh: Float[Array, "B T K h"],
    v_BTKh: Float[Array, "B T K v"],
    form: AttentionForm = PLAIN,
    *,
    axis: str,
) -> Float[Array, "B T H v"]:
    """Compute causal ring attention: one device's queries over the keys of all devices (Liu et al. 2023).

    Keys and values are sent once around the ring; partial results are merged by their log-sum-exp (Milakov & Gimelshein
    2018). With time laid out by `zigzag_positions` every step but the first is two unmasked chunk products on every
    device: both query chunks attend to the low chunk of keys from an earlier part, the high query chunk to both chunks
    of keys from a later part. The backward pass recomputes the probabilities from the log-sum-exp and sends the keys
    around again, so its residuals are one device's part of q, k, v, the result and one number per query. With a sliding
    window the keys outside of it are masked: they go around the ring all the same.

    Args:
      q_BTHh: queries of this device, its low chunk first.
      k_BTKh: keys; K divides H.
      v_BTKh: values.
      form: sliding window, sinks, scale and soft-cap.
      axis: mesh axis of the ring.

    Returns:
      Attention output in q's dtype.

    Example:
      >>> import jax, jax.numpy as jnp, sharding
      >>> from functools import partial
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh, time = sharding.abstract_mesh(sharding.Plan("cp=4")), P(None, "cp")
      >>> attend = jax.shard_map(partial(sharding.ring_attention, axis="cp"), mesh=mesh, in_specs=time, out_specs=time)
      >>> q, kv = jnp.zeros((2, 64, 8, 16)), jnp.zeros((2, 64, 2, 16))
      >>> jax.eval_shape(attend, q, kv, kv).shape
      (2, 64, 8, 16)
      >>> one = sharding.analysis.count_collectives(attend, q, kv, kv)[0]
      >>> one.kind, one.count  # 3 steps around the ring
      ('permute', 3)
    """
    B, T, H, h = q_BTHh.shape
    K = k_BTKh.shape[2]
    q_BTKGh = q_BTHh.reshape(B, T, K, H // K, h)
    sinks_KG = None
    if form.sinks_H is not None:  # varying as the queries do, whose gradients are then summed over devices
        sinks_KG = vary(form.sinks_H.reshape(K, H // K).astype(jnp.float32), varying(q_BTHh))
    window = jnp.asarray(form.window, jnp.float32) if form.window is not None else None
    how = form._replace(sinks_H=None, window=None)
    return _ring(q_BTKGh, k_BTKh, v_BTKh, sinks_KG, window, axis, how).reshape(B, T, H, -1)


def ulysses_attention(
    q_BTHh: Float[Array, "B T H h"],
    k_BTKh: Float[Array, "B T K h"],
    v_BTKh: Float[Array, "B T K v"],
    form: AttentionForm = PLAIN,
    *,
    axis: str,
    attend: Callable[..., jax.Array],
) -> Float[Array, "B T H v"]:
    """Compute DeepSpeed Ulysses attention: all-to-all from time to heads, attention, and back (Jacobs et al. 2023, 3).

    Args:
      q_BTHh: queries; H must divide by the size of the axis. Time is laid out by `contiguous_positions`.
      k_BTKh: keys; where K does not divide by it, each goes to all devices whose queries look at it.
      v_BTKh: values.
      form: sliding window, sinks, scale and soft-cap, of all heads.
      axis: mesh axis that splits time.
      attend: causal attention (q, k, v, form) -> result on full sequences.

    Example:
      >>> import jax, jax.numpy as jnp, sharding
      >>> from functools import partial
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh, time = sharding.abstract_mesh(sharding.Plan("cp=4")), P(None, "cp")
      >>> inner = lambda q, k, v, form: jax.nn.dot_product_attention(q, k, v, is_causal=True)
      >>> ulysses = partial(sharding.ulysses_attention, axis="cp", attend=inner)
      >>> attend = jax.shard_map(ulysses, mesh=mesh, in_specs=time, out_specs=time)
      >>> x = jnp.zeros((2, 64, 8, 16))
      >>> [one.kind for one in sharding.analysis.count_collectives(attend, x, x, x)]
      ['all-to-all', 'all-to-all', 'all-to-all', 'all-to-all']
    """
    exchange = partial(jax.lax.all_to_all, axis_name=axis, tiled=True)
    ways = jax.lax.axis_size(axis)
    if times := ways // math.gcd(ways, k_BTKh.shape[2]) - 1:
        k_BTKh, v_BTKh = (jnp.repeat(x, times + 1, axis=2) for x in (k_BTKh, v_BTKh))
    with jax.named_scope("exchange_heads"):
        sequences = [exchange(x, split_axis=2, concat_axis=1) for x in (q_BTHh, k_BTKh, v_BTKh)]
    if form.sinks_H is not None:
        heads = sequences[0].shape[2]
        mine = jax.lax.dynamic_slice_in_dim(form.sinks_H, jax.lax.axis_index(axis) * heads, heads)
        form = form._replace(sinks_H=mine)
    if form.window is not None and jnp.ndim(form.window):
        form = form._replace(window=jax.lax.all_gather(form.window, axis, axis=1, tiled=True))
    result = attend(*sequences, form)
    with jax.named_scope("exchange_time"):
        return exchange(result, split_axis=1, concat_axis=2)


class _Tile(NamedTuple):
    """How a block of queries attends to a block of keys: the keys seen (None: all) and the form of the scores.

    `seen_TS` is [B, T, S] where rows differ.
    """

    seen_TS: jax.Array | None
    form: AttentionForm


def _scores(q_BTKGh: jax.Array, k_BSKh: jax.Array, how: _Tile) -> tuple[jax.Array, jax.Array | float]:
    """Scores, -inf where a key is hidden, and their derivative by the product of query and key."""
    products = jnp.einsum("btkgh,bskh->bkgts", q_BTKGh, k_BSKh, preferred_element_type=jnp.float32)
    form, size = how.form, q_BTKGh.shape[-1]
    s_BKGTS, slope = form.scores(products, size), form.scale or size**-0.5
    if form.softcap:
        slope = slope * (1 - jnp.square(s_BKGTS / form.softcap))
    if how.seen_TS is None:
        return s_BKGTS, slope
    seen_BKGTS = jnp.expand_dims(how.seen_TS, (0, 1, 2) if how.seen_TS.ndim == 2 else (1, 2))
    return jnp.where(seen_BKGTS, s_BKGTS, -jnp.inf), slope


def _attend(q_BTKGh: jax.Array, k_BSKh: jax.Array, v_BSKh: jax.Array, how: _Tile) -> Partial:
    """Attend over these keys alone; a query that sees none of them gets zeros and -inf."""
    s_BKGTS, _ = _scores(q_BTKGh, k_BSKh, how)
    lse_BKGT = jax.nn.logsumexp(s_BKGTS, axis=-1)
    shift_BKGT = lse_BKGT if how.seen_TS is None else finite(lse_BKGT)
    p_BKGTS = jnp.exp(s_BKGTS - shift_BKGT[..., None]).astype(v_BSKh.dtype)
    o_BTKGh = jnp.einsum("bkgts,bskh->btkgh", p_BKGTS, v_BSKh, preferred_element_type=jnp.float32)
    return o_BTKGh, lse_BKGT.transpose(0, 3, 1, 2)


def _merge(a: Partial, b: Partial) -> Partial:
    """Merge attention over two disjoint sets of keys, of which every query sees some of the first."""
    (a_BTKGh, a_BTKG), (b_BTKGh, b_BTKG) = a, b
    lse_BTKG = jnp.logaddexp(a_BTKG, b_BTKG)
    o_BTKGh = a_BTKGh * jnp.exp(a_BTKG - lse_BTKG)[..., None] + b_BTKGh * jnp.exp(b_BTKG - lse_BTKG)[..., None]
    return o_BTKGh, lse_BTKG


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    low, high = jnp.split(x, 2, axis=1)
    return low, high


def _send(tree: tuple[jax.Array, ...], axis: str) -> tuple[jax.Array, ...]:
    size = jax.lax.axis_size(axis)
    with jax.named_scope("ring"):
        return jax.lax.ppermute(tree, axis, [(i, (i + 1) % size) for i in range(size)])


class _Places(NamedTuple):
    """Which keys a device's queries see: of its own part, and of another part's halves.

    `window` is None without one, [] or, of this device's queries, [B, T]. Chunk i of the 2 p chunks of a sequence
    begins at position i T / 2; device d has chunks d and 2 p - 1 - d.
    """

    rank: jax.Array
    size: int
    length: int
    window: jax.Array | None
    form: AttentionForm

    def own(self) -> _Tile:
        """The device's two chunks are in order, so causal by index where there is no window."""
        at_T = jnp.arange(self.length)
        if self.window is not None:
            at_T = zigzag_positions(self.rank, self.size, self.size * self.length)
        return _Tile(visible(at_T, at_T, self.window), self.form)

    def chunks(self, query: jax.Array, key: jax.Array, window: Any) -> _Tile:
        """Queries of one chunk, with their windows, over keys of an earlier one."""
        if window is None:
            return _Tile(None, self.form)
        steps = jnp.arange(self.length // 2)
        at_T, at_S = (chunk * (self.length // 2) + steps for chunk in (query, key))
        return _Tile(visible(at_T, at_S, window), self.form)

    def step(self, distance: jax.Array) -> tuple[jax.Array, _Tile, _Tile]:
        """What part rank - distance sends: whether it is earlier, and two blocks.

        The first is the high queries over its low keys. The other is, from an earlier part, the low queries over its
        low keys, else the high queries over its high keys.
        """
        earlier = distance <= self.rank  # or the keys come from around the end of the ring
        source, last = (self.rank - distance) % self.size, 2 * self.size - 1
        high = last - self.rank
        above = mixed = self.window  # of the high queries, and of the other block's
        if self.window is not None and self.window.ndim:
            below, above = _halves(self.window)
            mixed = jnp.where(earlier, below, above)
        other = self.chunks(jnp.where(earlier, self.rank, high), jnp.where(earlier, source, last - source), mixed)
        return earlier, self.chunks(high, source, above), other


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _ring(
    q_BTKGh: jax.Array,
    k_BTKh: jax.Array,
    v_BTKh: jax.Array,
    sinks_KG: jax.Array | None,
    window: jax.Array | None,
    axis: str,
    form: AttentionForm,
) -> jax.Array:
    return _ring_forward(q_BTKGh, k_BTKh, v_BTKh, sinks_KG, window, axis, form)[0]


def _ring_forward(
    q_BTKGh: jax.Array,
    k_BTKh: jax.Array,
    v_BTKh: jax.Array,
    sinks_KG: jax.Array | None,
    window: jax.Array | None,
    axis: str,
    form: AttentionForm,
) -> tuple[jax.Array, tuple]:
    size = jax.lax.axis_size(axis)
    places = _Places(jax.lax.axis_index(axis), size, q_BTKGh.shape[1], window, form)
    q_low, q_high = _halves(q_BTKGh)
    result = _attend(q_BTKGh, k_BTKh, v_BTKh, places.own())

    def step(carry: tuple, distance: jax.Array) -> tuple[tuple, None]:
        (o_low, lse_low), (o_high, lse_high), traveling = carry
        traveling = _send(traveling, axis)
        (k_low, k_high), (v_low, v_high) = (_halves(x) for x in traveling)
        earlier, first_block, other_block = places.step(distance)
        high = _merge((o_high, lse_high), _attend(q_high, k_low, v_low, first_block))
        other = _attend(
            jnp.where(earlier, q_low, q_high),
            jnp.where(earlier, k_low, k_high),
            jnp.where(earlier, v_low, v_high),
            other_block,
        )
        low, merged = _merge((o_low, lse_low), other), _merge(high, other)
        pick = lambda a, b: jnp.where(earlier, a, b)  # noqa: E731
        return (jax.tree.map(pick, low, (o_low, lse_low)), jax.tree.map(pick, high, merged), traveling), None

    halves = [_halves(x) for x in result]
    carry = ((halves[0][0], halves[1][0]), (halves[0][1], halves[1][1]), (k_BTKh, v_BTKh))
    (low, high, _), _ = jax.lax.scan(step, carry, jnp.arange(1, size))
    o_BTKGh, lse_BTKG = (jnp.concatenate(pair, axis=1) for pair in zip(low, high, strict=True))
    if sinks_KG is not None:
        sinks_BTKG = jnp.broadcast_to(sinks_KG[None, None], lse_BTKG.shape)
        o_BTKGh, lse_BTKG = _merge((o_BTKGh, lse_BTKG), (jnp.zeros_like(o_BTKGh), sinks_BTKG))
    o_BTKGh = o_BTKGh.astype(q_BTKGh.dtype)
    return o_BTKGh, (q_BTKGh, k_BTKh, v_BTKh, sinks_KG, window, o_BTKGh, lse_BTKG)


def _attend_backward(query: tuple, k_BSKh: jax.Array, v_BSKh: jax.Array, how: _Tile) -> tuple:
    """Compute gradients (dq, dk, dv) of one partial product in float32: Dao et al. (2022), appendix B.2.

    `query` holds q, the result's gradient, the log-sum-exp over all keys and sum(result * gradient) per query.
    """
    q_BTKGh, g_BTKGh, lse_BTKG, inner_BTKG = query
    s_BKGTS, slope = _scores(q_BTKGh, k_BSKh, how)
    p_BKGTS = jnp.exp(s_BKGTS - lse_BTKG.transpose(0, 2, 3, 1)[..., None])
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    dv_BSKh = product("bkgts,btkgh->bskh", p_BKGTS.astype(g_BTKGh.dtype), g_BTKGh)
    dp_BKGTS = product("btkgh,bskh->bkgts", g_BTKGh, v_BSKh)
    ds_BKGTS = p_BKGTS * (dp_BKGTS - inner_BTKG.transpose(0, 2, 3, 1)[..., None]) * slope
    ds_BKGTS = ds_BKGTS.astype(q_BTKGh.dtype)
    return product("bkgts,bskh->btkgh", ds_BKGTS, k_BSKh), product("bkgts,btkgh->bskh", ds_BKGTS, q_BTKGh), dv_BSKh


def _ring_backward(axis: str, form: AttentionForm, saved: tuple, g_BTKGh: jax.Array) -> tuple:
    q_BTKGh, k_BTKh, v_BTKh, sinks_KG, window, o_BTKGh, lse_BTKG = saved
    size = jax.lax.axis_size(axis)
    places = _Places(jax.lax.axis_index(axis), size, q_BTKGh.shape[1], window, form)
    inner_BTKG = (o_BTKGh.astype(jnp.float32) * g_BTKGh.astype(jnp.float32)).sum(-1)
    query = (q_BTKGh, g_BTKGh, lse_BTKG, inner_BTKG)
    low, high = zip(*(_halves(x) for x in query), strict=True)
    dq, dk, dv = _attend_backward(query, k_BTKh, v_BTKh, places.own())

    def step(carry: tuple, distance: jax.Array) -> tuple[tuple, None]:
        dq_low, dq_high, traveling = carry
        # The gradients of keys and values travel with them.
        k, v, dk, dv = _send(traveling, axis)
        (k_low, k_high), (v_low, v_high) = _halves(k), _halves(v)
        earlier, first_block, other_block = places.step(distance)
        pick = lambda a, b: jnp.where(earlier, a, b)  # noqa: E731
        dq_first, dk_first, dv_first = _attend_backward(high, k_low, v_low, first_block)
        dq_other, dk_other, dv_other = _attend_backward(
            jax.tree.map(pick, low, high), pick(k_low, k_high), pick(v_low, v_high), other_block
        )
        dq_low += jnp.where(earlier, dq_other, 0)
        dq_high += dq_first + jnp.where(earlier, 0, dq_other)
        dk += jnp.concatenate([dk_first + jnp.where(earlier, dk_other, 0), jnp.where(earlier, 0, dk_other)], axis=1)
        dv += jnp.concatenate([dv_first + jnp.where(earlier, dv_other, 0), jnp.where(earlier, 0, dv_other)], axis=1)
        return (dq_low, dq_high, (k, v, dk, dv)), None

    carry = (*_halves(dq), (k_BTKh, v_BTKh, dk, dv))
    (dq_low, dq_high, traveled), _ = jax.lax.scan(step, carry, jnp.arange(1, size))
    dk, dv = _send(traveled[2:], axis)  # one more step returns them to their devices
    dq = jnp.concatenate([dq_low, dq_high], axis=1)
    # A sink's share of the softmax has the value zero, so that its gradient is -share * sum(result * gradient).
    share_BTKG = 0.0 if sinks_KG is None else jnp.exp(sinks_KG[None, None] - lse_BTKG)
    dsinks_KG = None if sinks_KG is None else -(share_BTKG * inner_BTKG).sum((0, 1))
    return dq.astype(q_BTKGh.dtype), dk.astype(k_BTKh.dtype), dv.astype(v_BTKh.dtype), dsinks_KG, None


_ring.defvjp(_ring_forward, _ring_backward)
