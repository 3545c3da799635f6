"""ZeRO / FSDP: all-gather sharded parameters before a step, reduce-scatter their gradients after it.

Rajbhandari et al. (2020). Runs inside shard_map.
"""

from dataclasses import dataclass

import jax
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from sharding.rules import is_spec


@dataclass(frozen=True)
class ShardedParams:
    """One device's shards of parameters.

    Attributes:
      params: shards.
      specs: their PartitionSpecs.
      axes: mesh axes over which gradients must be summed.
      gathered: the axes of `axes` along which `all_gather` and `reduce_scatter` act; along the others the model's
        functions gather and scatter by themselves, layer by layer.

    Example:
      >>> import jax, jax.numpy as jnp, sharding
      >>> from jax.sharding import PartitionSpec as P
      >>> def double(w):
      ...     stored = sharding.ShardedParams(w, P("fsdp"), ("fsdp",), ("fsdp",))
      ...     return stored.reduce_scatter(2 * stored.all_gather(), jnp.float32(1))
      >>> mesh = sharding.abstract_mesh(sharding.Plan("fsdp=4"))
      >>> step = jax.shard_map(double, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"))
      >>> sharding.analysis.totals(sharding.analysis.count_collectives(step, jnp.zeros(64)))
      {'all-gather': (1, 192.0), 'reduce-scatter': (1, 192.0)}
    """

    params: PyTree
    specs: PyTree
    axes: tuple[str, ...]
    gathered: tuple[str, ...]

    def _parts(self, spec: PartitionSpec) -> list[tuple[int, str]]:
        """List (dimension, mesh axis) for every axis of `axes` along which a leaf is sharded."""
        found = []
        for dimension, names in enumerate(spec):
            for name in names if isinstance(names, tuple) else (names,):
                if name in self.axes:
                    found.append((dimension, name))
        return found

    def all_gather(self) -> PyTree:
        """All-gather the parameters, the inner mesh axis of a dimension first."""

        def gather(x: jax.Array, spec: PartitionSpec) -> jax.Array:
            for dimension, name in reversed(self._parts(spec)):
                if name in self.gathered:
                    x = lax.all_gather(x, name, axis=dimension, tiled=True)
            return x

        return jax.tree.map(gather, self.params, self.specs)

    def reduce_scatter(self, grads: PyTree, scale: jax.Array) -> PyTree:
        """Sum gradients over devices, times `scale`, sharded like the parameters and in their dtype."""

        def scatter(grad: jax.Array, param: jax.Array, spec: PartitionSpec) -> jax.Array:
            parts = self._parts(spec)
            others = tuple(axis for axis in self.axes if axis not in {name for _, name in parts})
            for dimension, name in parts:
                if name in self.gathered:
                    grad = lax.psum_scatter(grad, name, scatter_dimension=dimension, tiled=True)
            grad = lax.psum(grad, others) if others else grad
            return (grad * scale).astype(param.dtype)

        return jax.tree.map(scatter, grads, self.params, self.specs)


def broadcast_specs(specs: PyTree, tree: PyTree) -> PyTree:
    """Make a spec for every leaf of `tree`, from a prefix tree of specs."""
    return jax.tree.map(lambda spec, branch: jax.tree.map(lambda _: spec, branch), specs, tree, is_leaf=is_spec)
