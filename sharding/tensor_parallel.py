"""Tensor and sequence parallelism (Megatron-LM) as explicit collectives at the edges of a block, inside shard_map.

The functions run with `check_vma=True`: JAX tracks over which mesh axes a value varies, so the transpose of every
collective is the one Megatron-LM writes by hand (Shoeybi et al. 2019, section 3, f and g; Korthikanti et al. 2022,
section 4.2.2). Where x is marked varying over tp, its gradient is summed over tp; the transpose of an all-gather is a
reduce-scatter.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PyTree

from sharding.rules import Spread, path_name

FULL_PRECISION = r"(^|/)router/|/gain$"  # routers choose in float32, gains are small
TIME = 1  # dimension of [B, T, D] along which the residual stream is split
INSIDE = ("batch", "time", "width")  # inputs of a layer's first products
RESIDUAL = ("batch", "sequence", "width")  # the residual stream and its updates


def varying(x: Any) -> tuple[str, ...]:
    """Mesh axes along which an array or a shape inside shard_map may differ between devices, sorted."""
    kind = jax.typeof(x) if isinstance(x, jax.Array) else x
    return tuple(sorted(kind.manual_axis_type.varying))


def vary(tree: PyTree, axes: Sequence[str]) -> PyTree:
    """Mark arrays as varying over mesh axes: no data moves forward, and gradients are summed over the new axes.

    Example:
      >>> import jax, jax.numpy as jnp, sharding
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = sharding.abstract_mesh(sharding.Plan("tp=2"))
      >>> def gradient(w, x):  # of a replicated w, from shards of x
      ...     return jax.grad(lambda w: (sharding.vary(w, ("tp",)) * x).sum())(w)
      >>> step = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), P("tp")), out_specs=P())
      >>> [one.kind for one in sharding.analysis.count_collectives(step, jnp.zeros(4), jnp.zeros(8))]
      ['all-reduce']
    """

    def mark(x: Any) -> Any:
        missing = tuple(axis for axis in axes if axis not in varying(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)


def all_gather_sequence(x_BTD: Float[Array, "B T D"], tp: str | None, sequence: bool) -> Float[Array, "B S D"]:
    """Give every tensor-parallel device all tokens: Megatron's f, or under sequence parallelism an all-gather of time.

    Args:
      x_BTD: the residual stream of one device.
      tp: mesh axis of tensor parallelism, None without.
      sequence: sequence parallelism: the residual stream is split along time.

    Example:
      >>> import jax, jax.numpy as jnp, sharding
      >>> from functools import partial
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = sharding.abstract_mesh(sharding.Plan("tp=4"))
      >>> gather = partial(sharding.all_gather_sequence, tp="tp", sequence=True)
      >>> gathered = jax.shard_map(gather, mesh=mesh, in_specs=P(None, "tp"), out_specs=P("tp"))
      >>> jax.eval_shape(gathered, jnp.zeros((1, 8, 16))).shape  # 4 devices with 8 tokens each
      (4, 8, 16)
    """
    if tp is None:
        return x_BTD
    with jax.named_scope("all_gather_sequence"):
        return jax.lax.all_gather(x_BTD, tp, axis=TIME, tiled=True) if sequence else vary(x_BTD, (tp,))


def reduce_scatter_sequence(x_BTD: Float[Array, "B T D"], tp: str | None, sequence: bool) -> Float[Array, "B S D"]:
    """Sum tensor-parallel partial results: Megatron's g (all-reduce), or with sequence parallelism a reduce-scatter.

    Args:
      x_BTD: partial sums of one device, all tokens.
      tp: mesh axis of tensor parallelism, None without.
      sequence: sequence parallelism: every device gets its tokens of the residual stream.

    Example:
      >>> import jax, jax.numpy as jnp, sharding
      >>> from functools import partial
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = sharding.abstract_mesh(sharding.Plan("tp=4"))
      >>> scatter = partial(sharding.reduce_scatter_sequence, tp="tp", sequence=True)
      >>> summed = jax.shard_map(scatter, mesh=mesh, in_specs=P("tp"), out_specs=P(None, "tp"))
      >>> jax.eval_shape(summed, jnp.zeros((4, 8, 16))).shape  # 4 devices with 8 tokens each
      (1, 8, 16)
    """
    if tp is None:
        return x_BTD
    with jax.named_scope("reduce_scatter_sequence"):
        if sequence:
            return jax.lax.psum_scatter(x_BTD, tp, scatter_dimension=TIME, tiled=True)
        return jax.lax.psum(x_BTD, tp)


def explicit(tp: str | None, sequence: bool) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array]:
    """Make the `constrain` of a block whose kernels are one device's shards.

    It is `all_gather_sequence` at the inputs of products and `reduce_scatter_sequence` at their outputs.
    """

    def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        if axes == INSIDE:
            return all_gather_sequence(x, tp, sequence)
        return reduce_scatter_sequence(x, tp, sequence) if axes == RESIDUAL else x

    return constrain


def spread_dimension(leaf: jax.Array, spread: Spread, spec: PartitionSpec) -> jax.Array:
    """Give every device its part of a dimension that it had to be enlarged for: padded, or its indices repeated.

    Where the axis splits another dimension in storage, the two are exchanged (an all-to-all, whose transpose is one
    too); where it splits none, every device cuts its part out of its copy. Gradients of copies are added up.

    Args:
      leaf: one device's part as it is stored.
      spread: the dimension.
      spec: of the stored leaf.
    """
    ways, at = jax.lax.axis_size(spread.axis), leaf.ndim + spread.dimension
    size = spread.enlarge(leaf.shape[at], ways)
    with jax.named_scope("spread_dimension"):
        if spread.repeat:
            leaf = jnp.repeat(leaf, spread.repeat, axis=at)
        else:
            leaf = jnp.pad(leaf, [(0, size - leaf.shape[at] if i == at else 0) for i in range(leaf.ndim)])
        stored = next((i for i, entry in enumerate(spec) if spread.axis in _axes(entry)), None)
        if stored is not None:
            return jax.lax.all_to_all(leaf, spread.axis, at, stored, tiled=True)
        start = jax.lax.axis_index(spread.axis) * (size // ways)
        return jax.lax.dynamic_slice_in_dim(vary(leaf, (spread.axis,)), start, size // ways, at)


def gather_params(
    params: PyTree,
    specs: PyTree,
    dtype: Any,
    *,
    fsdp: str | None,
    vary_over: Sequence[str] = (),
    spreads: PyTree = None,
) -> PyTree:
    """All-gather one layer's parameters over fsdp (FSDP, ZeRO-3), in the compute dtype (mixed precision).

    Kernels are cast before they are sent, so a bfloat16 model gathers half the bytes; the gradient of a gathered kernel
    is reduce-scattered in that dtype and then summed over `vary_over` in float32, already as one shard.

    Args:
      params: float32 shards of one device; quantized kernels (with `scales`) stay as they are.
      specs: PartitionSpec of every leaf, of the same rank.
      dtype: of kernels and tables; gains and routers stay in float32 and are replicated.
      fsdp: the mesh axis, None if the plan has none.
      vary_over: axes over which the values computed with these parameters vary and the parameters do not.
      spreads: dimensions that are enlarged first, from `sharding.rules.spreads`, None where none is.

    Example:
      >>> import jax, jax.numpy as jnp, sharding
      >>> from jax.sharding import PartitionSpec as P
      >>> specs = {"kernel": P("fsdp", None)}
      >>> def total(shards):
      ...     return sharding.gather_params(shards, specs, jnp.bfloat16, fsdp="fsdp")["kernel"].sum()[None]
      >>> mesh = sharding.abstract_mesh(sharding.Plan("fsdp=4"))
      >>> step = jax.shard_map(total, mesh=mesh, in_specs=(specs,), out_specs=P("fsdp"))
      >>> [one] = sharding.analysis.count_collectives(step, {"kernel": jnp.zeros((64, 8))})
      >>> one.kind, one.bytes
      ('all-gather', 1024)
    """

    def gather(path: tuple, leaf: Any, spec: PartitionSpec, spread: Spread | None = None) -> Any:
        if _is_quantized(leaf):
            return vary(leaf, vary_over)
        dimension = next((i for i, entry in enumerate(spec) if fsdp and fsdp in _axes(entry)), None)
        exact = leaf.ndim < 2 or re.search(FULL_PRECISION, path_name(path)) is not None
        leaf = vary(leaf, vary_over) if exact else vary(leaf, vary_over).astype(dtype)
        if spread is not None:
            leaf = spread_dimension(leaf, spread, spec)
        if exact:
            return leaf
        if dimension is None:
            return leaf
        with jax.named_scope("gather_params"):
            return jax.lax.all_gather(leaf, fsdp, axis=dimension, tiled=True)

    rest = (specs,) if spreads is None else (specs, spreads)
    return jax.tree_util.tree_map_with_path(gather, params, *rest, is_leaf=_is_quantized)


def _is_quantized(node: Any) -> bool:
    return hasattr(node, "scales")


def keep_gathers_out(policy: Callable[..., Any], fsdp: str | None) -> Callable[..., Any]:
    """Make a checkpoint policy that never saves gathered parameters: the backward pass gathers them again (ZeRO-3)."""

    def saveable(primitive: Any, *args: Any, **params: Any) -> Any:
        if fsdp is not None and primitive.name == "all_gather" and fsdp in params.get("axis_name", ()):
            return False
        return policy(primitive, *args, **params)

    return saveable


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()
