"""What crosses devices at the edges of a block, as explicit collectives inside shard_map.

The functions run with `check_vma=True`: JAX tracks over which mesh axes a value varies, so the transpose of every
collective is the one Megatron-LM writes by hand (Shoeybi et al. 2019, section 3, f and g; Korthikanti et al. 2022,
section 4.2.2). Where x is marked varying over tp, its gradient is summed over tp; an all-gather's is a
reduce-scatter.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PyTree

from sharding.rules import path_name

FULL_PRECISION = r"(^|/)router/"  # routers choose in float32
TIME = 1  # dimension of [B, T, D] along which the residual stream is split
INSIDE = ("batch", "time", "width")  # what a layer's first products read
RESIDUAL = ("batch", "sequence", "width")  # the residual stream, and what is added to it


def vary(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Mark x as varying over mesh axes; no data moves forward, and its gradient is summed over the new ones."""
    new = tuple(axis for axis in axes if axis not in jax.typeof(x).mat.varying)
    return jax.lax.pcast(x, new, to="varying") if new else x


def enter(x_BTD: Float[Array, "B T D"], tp: str | None, sequence: bool) -> Float[Array, "B S D"]:
    """Give every tensor-parallel device all tokens: gathered along time if the residual stream is split, else as is."""
    if tp is None:
        return x_BTD
    with jax.named_scope("enter"):
        return jax.lax.all_gather(x_BTD, tp, axis=TIME, tiled=True) if sequence else vary(x_BTD, (tp,))


def leave(x_BTD: Float[Array, "B T D"], tp: str | None, sequence: bool) -> Float[Array, "B S D"]:
    """Sum the tensor-parallel devices' partial results; each keeps its part of time if the residual stream is split."""
    if tp is None:
        return x_BTD
    with jax.named_scope("leave"):
        if sequence:
            return jax.lax.psum_scatter(x_BTD, tp, scatter_dimension=TIME, tiled=True)
        return jax.lax.psum(x_BTD, tp)


def explicit(tp: str | None, sequence: bool) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array]:
    """The `constrain` of a block whose kernels are one device's parts: `enter` before products, `leave` after them."""

    def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        if axes == INSIDE:
            return enter(x, tp, sequence)
        return leave(x, tp, sequence) if axes == RESIDUAL else x

    return constrain


def gather_params(
    params: PyTree, specs: PyTree, dtype: Any, *, fsdp: str | None, vary_over: Sequence[str] = ()
) -> PyTree:
    """Make one layer's parameters whole over fsdp, in the compute dtype.

    Kernels are cast before they travel, so a bfloat16 model gathers half the bytes; the gradient of a gathered kernel
    is reduce-scattered in that dtype and then summed over `vary_over` in float32, already one part's size.

    Args:
      params: float32 parts of one device.
      specs: partition of every leaf, of the same rank.
      dtype: of kernels and tables; gains and routers keep theirs, and lie whole on every device.
      fsdp: the mesh axis, None if the plan has none.
      vary_over: axes over which the values computed with these parameters vary and the parameters do not.
    """

    def gather(path: tuple, leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        dimension = next((i for i, entry in enumerate(spec) if fsdp and fsdp in _axes(entry)), None)
        leaf = vary(leaf, vary_over)
        if leaf.ndim < 2 or re.search(FULL_PRECISION, path_name(path)):
            return leaf
        leaf = leaf.astype(dtype)
        if dimension is None:
            return leaf
        with jax.named_scope("gather_params"):
            return jax.lax.all_gather(leaf, fsdp, axis=dimension, tiled=True)

    return jax.tree_util.tree_map_with_path(gather, params, specs)


def keep_gathers_out(policy: Callable[..., Any], fsdp: str | None) -> Callable[..., Any]:
    """A checkpoint policy that never saves gathered parameters: the backward pass gathers them again (ZeRO-3)."""

    def saveable(primitive: Any, *args: Any, **params: Any) -> Any:
        if fsdp is not None and primitive.name == "all_gather" and fsdp in params.get("axis_name", ()):
            return False
        return policy(primitive, *args, **params)

    return saveable


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()
