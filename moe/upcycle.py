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
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from moe.merging import Method, check_method, merge_leaf, unit_weights


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
    """Merge experts into one dense layer, by the methods of `moe.merging.merge`.

    "task", "ties" and "dare" merge the differences from `base`, the dense layer that was upcycled. Each kernel of a
    layer is one tensor.

    Args:
      routed: parameters with "experts"; router and shared experts are left out.
      base: {gate, up, down} of the dense layer, for "task", "ties" and "dare".
      method: of the merging.
      weights: of the experts (their load, for instance), scaled to sum to one; equal if None.
      density: share of entries that remain.
      scale: factor on the merged difference.
      key: for "dare".

    Raises:
      ValueError: an unknown method, a missing base or key, invalid weights, density outside (0, 1].
    """
    experts = routed["experts"]
    e = experts["up"]["kernel"].shape[-3]
    check_method(method, base is not None, key is not None, density)
    weights_E = unit_weights(weights, e, "experts")

    def one(path: Any, stack: Array) -> Array:
        ends = 1 if path[-1].key == "bias" else 2
        start = None if base is None else base[path[0].key][path[-1].key]
        own = None
        if key is not None:
            own = jax.random.fold_in(
                jax.random.fold_in(key, sorted(experts).index(path[0].key)), path[-1].key == "bias"
            )
        settings: dict[str, Any] = {"method": method, "density": density, "scale": scale, "key": own, "ends": ends}
        return merge_leaf(jnp.moveaxis(stack, stack.ndim - ends - 1, 0), start, weights_E, **settings)

    return jax.tree_util.tree_map_with_path(one, {name: dict(leaf) for name, leaf in experts.items()})
