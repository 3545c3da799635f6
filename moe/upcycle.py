"""Sparse upcycling of dense layers to experts, and merging of experts into a dense layer (mean, SLERP, TIES, DARE).

Works on the parameters of one feed-forward layer, or of a stack of layers (any leading axes): dense {gate, up,
down}/kernel [*L, D, F], routed router/kernel [*L, D, E] and experts/{gate, up, down}/kernel [*L, E, D, F], the trees of
`tessera.models.transformer` and `moe.layer`. Axes: L layers, D width, F feed-forward width, E experts.

Example:
  >>> import jax
  >>> from moe import experts, upcycle
  >>> dense = {name: {"kernel": leaf} for name, leaf in experts.initialize(8, 16, 0, key=jax.random.key(0)).items()}
  >>> routed = upcycle.upcycle(dense, experts=4, key=jax.random.key(1))
  >>> routed["experts"]["up"]["kernel"].shape, upcycle.merge(routed)["up"]["kernel"].shape
  ((4, 8, 16), (8, 16))
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

Method = Literal["mean", "slerp", "ties", "dare"]


def upcycle(
    dense: Mapping[str, Any],
    experts: int,
    *,
    key: Key[Array, ""],
    router_scale: float = 0.02,
    noise: float = 0.0,
) -> dict[str, Any]:
    """Initialize experts as copies of a dense layer (sparse upcycling: Komatsuzaki et al. 2023, section 3).

    With weights that sum to one (`route.top_k` with its softmax after the selection, and no shared experts) the routed
    layer equals the dense one for any router. `route.switch` and other unnormalized routers shrink the output at first.

    Args:
      dense: {gate, up, down}/kernel, and biases if there are any.
      experts: E.
      key: for the router's kernel, normal with standard deviation router_scale (0.02 in section A.1.1), and the noise.
      router_scale: see `key`.
      noise: standard deviation of noise on the experts' kernels over that of the kernel, so that experts differ; 0
        leaves the outputs as they are.

    Raises:
      ValueError: `dense` is not such a layer, or experts below 1.
    """
    if experts < 1:
        raise ValueError(f"experts={experts}: at least 1 is needed")
    kernel = dense["up"]["kernel"] if "up" in dense else None
    if kernel is None or "down" not in dense:
        raise ValueError(f"a dense feed-forward layer has up and down kernels; this has {sorted(dense)}")
    router_key, noise_key = jax.random.split(key)

    def copies(path: Any, leaf: Array) -> Array:
        axis = leaf.ndim - (1 if path[-1].key == "bias" else 2)
        stacked = jnp.repeat(jnp.expand_dims(leaf, axis), experts, axis=axis)
        if noise and path[-1].key != "bias":
            one = jax.random.fold_in(noise_key, sorted(dense).index(path[0].key))
            stacked += noise * leaf.std() * jax.random.normal(one, stacked.shape, stacked.dtype)
        return stacked

    router = router_scale * jax.random.normal(router_key, (*kernel.shape[:-1], experts), jnp.float32)
    copied = jax.tree_util.tree_map_with_path(copies, {name: dict(leaf) for name, leaf in dense.items()})
    return {"router": {"kernel": router}, "experts": copied}


def merge(
    routed: Mapping[str, Any],
    base: Mapping[str, Any] | None = None,
    *,
    method: Method = "mean",
    weights: Float[Array, " E"] | None = None,
    density: float = 0.2,
    scale: float = 1.0,
    key: Key[Array, ""] | None = None,
) -> PyTree:
    """Merge experts into one dense layer (model merging).

    "mean" is their weighted mean. "slerp" interpolates on the sphere (Shoemake 1985), expert after expert, each kernel
    as one vector. "ties" (Yadav et al. 2023) and "dare" (Yu et al. 2024) merge the differences from `base`, the dense
    layer that was upcycled: TIES trims each difference to its largest `density` of entries, elects a sign per entry by
    the summed values, and averages the entries of that sign; DARE drops all but a random `density` of entries, scales
    the rest up by its inverse, and adds their weighted mean. Both give base + scale * merged difference.

    Args:
      routed: parameters with "experts"; router and shared experts are left out.
      base: {gate, up, down} of the dense layer, for "ties" and "dare".
      method: see above.
      weights: of the experts (their load, for instance), scaled to sum to one; equal if None. TIES averages without
        weights.
      density: share of entries that remain.
      scale: factor on the merged difference.
      key: for "dare".

    Raises:
      ValueError: an unknown method, a missing base or key, invalid weights, density outside (0, 1].
    """
    experts = routed["experts"]
    e = experts["up"]["kernel"].shape[-3]
    if method not in ("mean", "slerp", "ties", "dare"):
        raise ValueError(f"method={method!r}: choose one of mean, slerp, ties, dare")
    if method in ("ties", "dare") and base is None:
        raise ValueError(f"{method} merges differences from the dense layer that was upcycled: pass base=")
    if method == "dare" and key is None:
        raise ValueError("dare drops entries at random: pass key=")
    if not 0 < density <= 1:
        raise ValueError(f"density={density} must be in (0, 1]")
    weights_E = jnp.full(e, 1 / e) if weights is None else jnp.asarray(weights, jnp.float32)
    if weights_E.shape != (e,) or not bool((weights_E >= 0).all() & (weights_E.sum() > 0)):
        raise ValueError(f"weights of the {e} experts must be {e} numbers, none negative, not all zero")
    weights_E = weights_E / weights_E.sum()

    def one(path: Any, stack: Array) -> Array:
        axis = stack.ndim - (2 if path[-1].key == "bias" else 3)
        stack = jnp.moveaxis(stack, axis, 0)
        if method == "mean":
            return jnp.tensordot(weights_E, stack, 1)
        if method == "slerp":
            return slerp(stack, weights_E, ends=1 if path[-1].key == "bias" else 2)
        assert base is not None
        start = base[path[0].key][path[-1].key]
        if method == "ties":
            return start + scale * ties(stack - start[None], density, ends=1 if path[-1].key == "bias" else 2)
        assert key is not None
        own = jax.random.fold_in(jax.random.fold_in(key, sorted(experts).index(path[0].key)), path[-1].key == "bias")
        return start + scale * jnp.tensordot(weights_E, dare(stack - start[None], density, key=own), 1)

    return jax.tree_util.tree_map_with_path(one, {name: dict(leaf) for name, leaf in experts.items()})


def slerp(stack: Float[Array, " E *S"], weights_E: Float[Array, " E"], ends: int = 2) -> Float[Array, "*S"]:
    """Interpolate experts spherically (SLERP: Shoemake 1985), each towards the next by its share of the weight so far.

    The direction moves along the great circle and the norm linearly. The last `ends` axes are one vector; nearly
    parallel or opposite vectors are interpolated linearly.
    """
    axes = tuple(range(-ends, 0))

    def norm(x):
        return jnp.sqrt(jnp.square(x).sum(axes, keepdims=True))

    total, merged = weights_E[0], stack[0]
    for i in range(1, stack.shape[0]):
        total = total + weights_E[i]
        t = weights_E[i] / jnp.maximum(total, 1e-20)
        a, b = norm(merged), norm(stack[i])
        u, v = merged / jnp.maximum(a, 1e-20), stack[i] / jnp.maximum(b, 1e-20)
        angle = jnp.arccos(jnp.clip((u * v).sum(axes, keepdims=True), -1.0, 1.0))
        sine = jnp.sin(angle)
        safe = jnp.where(sine > 1e-4, sine, 1.0)
        along = (jnp.sin((1 - t) * angle) * u + jnp.sin(t * angle) * v) / safe * ((1 - t) * a + t * b)
        merged = jnp.where(sine > 1e-4, along, (1 - t) * merged + t * stack[i])
    return merged


def ties(deltas: Float[Array, " E *S"], density: float, ends: int = 2) -> Float[Array, "*S"]:
    """Trim, elect signs and merge (TIES: Yadav et al. 2023, algorithm 1, without its scale).

    Each expert is trimmed to the round(density n) largest of its n entries (the last `ends` axes), and ties with these.
    """
    n = 1
    for size in deltas.shape[deltas.ndim - ends :]:
        n *= size
    flat = jnp.abs(deltas).reshape(*deltas.shape[: deltas.ndim - ends], n)
    smallest = jax.lax.top_k(flat, max(1, round(density * n)))[0][..., -1]
    threshold = smallest.reshape(*smallest.shape, *(1,) * ends)
    trimmed = jnp.where(jnp.abs(deltas) >= threshold, deltas, 0)
    sign = jnp.sign(trimmed.sum(0))
    agree = (jnp.sign(trimmed) == sign[None]) & (trimmed != 0)
    return jnp.where(agree, trimmed, 0).sum(0) / jnp.maximum(agree.sum(0), 1)


def dare(deltas: Float[Array, " E *S"], density: float, *, key: Key[Array, ""]) -> Float[Array, " E *S"]:
    """Drop entries at random and scale up the rest (DARE: Yu et al. 2024, eq. 4-5 with drop rate 1 - density)."""
    return jnp.where(jax.random.bernoulli(key, density, deltas.shape), deltas / density, 0)
