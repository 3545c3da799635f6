"""Layouts of layers on pipeline stages, and parameters arranged by stage.

The model's layers are cut into `stages * chunks` parts of consecutive layers; part k is chunk k // stages of stage k %
stages, or the pipeline is folded (`sharding.pipeline.schedules.place`). Parts may differ in size: each is padded to the
largest, and the padding is never computed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from sharding.errors import PlanError
from sharding.pipeline.schedules import place


@dataclass(frozen=True)
class StageLayout:
    """Layers of every part of the model, in the model's order.

    Attributes:
      counts: layers of parts 0, 1, ...; each at least 1, there are stages * chunks of them.
      stages: p.
      chunks: v, parts on one stage (1 unless the schedule is interleaved or folded).
      folded: odd chunks go from the last stage back to the first, as DualPipeV wants it.

    Example:
      >>> from sharding.pipeline import StageLayout
      >>> StageLayout((3, 2), stages=2).index.tolist()  # layers by stage and slot, -1 is padding
      [0, 1, 2, 3, 4, -1]
    """

    counts: tuple[int, ...]
    stages: int
    chunks: int = 1
    folded: bool = False

    def __post_init__(self) -> None:
        if self.stages < 1 or self.chunks < 1:
            raise PlanError(f"stages={self.stages} and chunks={self.chunks} must be at least 1")
        if len(self.counts) != self.stages * self.chunks:
            raise PlanError(
                f"{len(self.counts)} layer counts {self.counts} for {self.stages} stages x {self.chunks} chunks; "
                f"{self.stages * self.chunks} are needed"
            )
        if min(self.counts) < 1:
            raise PlanError(f"layer counts {self.counts}: every part needs at least 1 layer")

    @property
    def layers(self) -> int:
        """L, layers of the model."""
        return sum(self.counts)

    @property
    def slots(self) -> int:
        """n, slots for layers in every part: the largest count."""
        return max(self.counts)

    @property
    def even(self) -> bool:
        """Whether all parts have the same number of layers, so that nothing is padded."""
        return len(set(self.counts)) == 1

    @property
    def in_place(self) -> bool:
        """Whether the order by stage is the model's order: `stack_stages` and `unstack_stages` are then identities."""
        return self.even and self.chunks == 1

    @cached_property
    def index(self) -> np.ndarray:
        """int32 [p * v * n]: the layer in each place, ordered by stage, chunk and slot; -1 is padding."""
        starts = np.cumsum((0, *self.counts))
        index = np.full((self.stages, self.chunks, self.slots), -1, np.int32)
        for part, count in enumerate(self.counts):
            index[*place(part, self.stages, self.folded), :count] = starts[part] + np.arange(count)
        return index.reshape(-1)


def split_layers(layers: int, stages: int, chunks: int = 1, folded: bool = False) -> StageLayout:
    """Split layers into parts as equal as possible; where they differ, the last parts (before the head) are smaller.

    Args:
      layers, stages, chunks: numbers of them.
      folded: see `StageLayout`.

    Raises:
      PlanError: fewer layers than parts.

    Example:
      >>> from sharding.pipeline import split_layers
      >>> split_layers(layers=7, stages=3).counts
      (3, 2, 2)
    """
    parts = stages * chunks
    if layers < parts:
        raise PlanError(
            f"{layers} layers cannot be cut into {stages} stages x {chunks} chunks = {parts} parts; take at most "
            f"{max(1, layers // max(1, chunks))} stages"
        )
    counts = tuple(layers // parts + (part < layers % parts) for part in range(parts))
    return StageLayout(counts, stages, chunks, folded)


def stack_stages(layers: PyTree, layout: StageLayout) -> PyTree:
    """Arrange leaves [L, ...] in the model's order by stage: [p * v * n, ...], zeros for padding.

    Sharded over the pipeline axis on its first dimension, the result has each stage's layers on that stage.

    Raises:
      PlanError: a leaf's first dimension is not the layout's number of layers.

    Example:
      >>> import jax.numpy as jnp
      >>> from sharding.pipeline import split_layers, stack_stages
      >>> stack_stages({"w": jnp.arange(1, 6)}, split_layers(layers=5, stages=2))["w"].tolist()
      [1, 2, 3, 4, 5, 0]
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(layers):
        if not leaf.ndim or leaf.shape[0] != layout.layers:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise PlanError(f"{name} has shape {leaf.shape}; its first axis must be the {layout.layers} layers")
    if layout.in_place:
        return layers
    present = layout.index >= 0

    def arrange(leaf: Any) -> jax.Array:
        placed = jnp.take(leaf, np.maximum(layout.index, 0), axis=0)
        return jnp.where(present.reshape(-1, *[1] * (leaf.ndim - 1)), placed, jnp.zeros((), placed.dtype))

    return jax.tree.map(arrange, layers)


def unstack_stages(layers: PyTree, layout: StageLayout) -> PyTree:
    """Undo `stack_stages`: leaves [p * v * n, ...] by stage to [L, ...] in the model's order.

    Example:
      >>> import jax.numpy as jnp
      >>> from sharding.pipeline import split_layers, unstack_stages
      >>> unstack_stages({"w": jnp.array([1, 2, 3, 4, 5, 0])}, split_layers(layers=5, stages=2))["w"].tolist()
      [1, 2, 3, 4, 5]
    """
    if layout.in_place:
        return layers
    places = np.argsort(np.where(layout.index < 0, layout.layers, layout.index), kind="stable")[: layout.layers]
    return jax.tree.map(lambda leaf: jnp.take(leaf, places, axis=0), layers)


def store_across(shape: tuple[int, ...], spec: PartitionSpec, axis: str, sizes: Mapping[str, int]) -> PartitionSpec:
    """Split stacked layers for storage over the stage axis where their number does not divide by the stages.

    The layers cannot be split then, so another dimension is (ZeRO over the stages): the one with the most elements on a
    device among those that divide, or none. A step moves the layers to their stages and their gradients back
    (all-to-all); state, optimizer and checkpoints have the model's order and no padding.

    Args:
      shape: of the parameter, layers first.
      spec: how the other mesh axes split it.
      axis: the stage axis.
      sizes: mesh axis -> size.

    Example:
      >>> from jax.sharding import PartitionSpec
      >>> from sharding.pipeline import store_across
      >>> tuple(store_across((7, 12, 24), PartitionSpec(None, "fsdp"), "pp", {"pp": 3, "fsdp": 2}))
      (None, 'fsdp', 'pp')
    """
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    names = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in entries]
    ways = [math.prod(sizes.get(name, 1) for name in group) for group in names]
    fits = [i for i in range(1, len(shape)) if shape[i] % (ways[i] * sizes[axis]) == 0]
    if not fits:
        return spec
    chosen = max(fits, key=lambda i: shape[i] // ways[i])
    entries[chosen] = (*names[chosen], axis) if names[chosen] else axis
    return PartitionSpec(*entries)
