"""Parameters that devices store in parts: put together before a step, their gradients summed and taken apart after it.

Runs inside shard_map.
"""

from dataclasses import dataclass
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import PyTree


@dataclass(frozen=True)
class Stored:
    """Parameters as a device stores them: in parts as `specs` says.

    `axes` are the mesh axes over which gradients must be summed; along those of them in `gathered` the whole is put
    together before the step and gradients are taken apart after it, along the rest the model's functions do both.
    """

    params: PyTree
    specs: PyTree
    axes: tuple[str, ...]
    gathered: tuple[str, ...]

    def _parts(self, spec: PartitionSpec) -> list[tuple[int, str]]:
        """(dimension, mesh axis) for every axis of `axes` along which a leaf is stored in parts."""
        found = []
        for dimension, names in enumerate(spec):
            for name in names if isinstance(names, tuple) else (names,):
                if name in self.axes:
                    found.append((dimension, name))
        return found

    def gather(self) -> PyTree:
        """Whole leaves; the inner mesh axis of a dimension first."""

        def whole(x: jax.Array, spec: PartitionSpec) -> jax.Array:
            for dimension, name in reversed(self._parts(spec)):
                if name in self.gathered:
                    x = lax.all_gather(x, name, axis=dimension, tiled=True)
            return x

        return jax.tree.map(whole, self.params, self.specs)

    def scatter(self, grads: PyTree, scale: jax.Array) -> PyTree:
        """Gradients summed over devices, times `scale`, in parts as the parameters are, in their dtype."""

        def part(grad: jax.Array, param: jax.Array, spec: PartitionSpec) -> jax.Array:
            parts = self._parts(spec)
            others = tuple(axis for axis in self.axes if axis not in {name for _, name in parts})
            for dimension, name in parts:
                if name in self.gathered:
                    grad = lax.psum_scatter(grad, name, scatter_dimension=dimension, tiled=True)
            grad = lax.psum(grad, others) if others else grad
            return (grad * scale).astype(param.dtype)

        return jax.tree.map(part, grads, self.params, self.specs)


def is_spec(x: Any) -> bool:
    """Whether a node of a tree is a PartitionSpec, which JAX would else take for a branch."""
    return isinstance(x, PartitionSpec)


def spread(specs: PyTree, tree: PyTree) -> PyTree:
    """A spec for every leaf of `tree`, from a tree of specs that may stop at any of its branches."""
    return jax.tree.map(lambda spec, branch: jax.tree.map(lambda _: spec, branch), specs, tree, is_leaf=is_spec)
