"""One pipeline stage's part of a step: forward and backward work of a tick, and the scans over ticks.

Runs inside shard_map, where every array is this device's part. The rows of a lockstep table
(`sharding.pipeline.lockstep.Phase`) give a stage's work: (active, microbatch, chunk, slot).

Axes: p stages, m microbatches, v chunks, n layers of a chunk, b rows of a microbatch on a device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, PyTree

from sharding.tensor_parallel import vary, varying

Sums = tuple[jax.Array, jax.Array, dict[str, jax.Array]]


class StageFns(NamedTuple):
    """The model as pure functions; an activation is a pytree of arrays of the same structure and shapes in all layers.

    Inside these functions arrays are one device's part, and `micro` is the batch's pytree with b rows.

    Attributes:
      embed: (shared, micro) -> activation.
      layer: (one layer's parameters, activation, micro) -> activation.
      head_loss: (shared, activation, micro) -> (sum of the losses [], sum of their weights [], {name: sum []}). The
        gradient is that of (sum of losses) / (sum of weights) over the full batch, so weights must not depend on
        parameters; an auxiliary loss is part of the activation and is added here, times the weight.

    Example:
      >>> import jax.numpy as jnp
      >>> from sharding.pipeline import StageFns
      >>> fns = StageFns(
      ...     embed=lambda shared, micro: micro["x"] @ shared["in"],
      ...     layer=lambda layer, x, micro: x + jnp.tanh(x @ layer["w"]),
      ...     head_loss=lambda shared, x, micro: (((x @ shared["out"]) ** 2).sum(), jnp.float32(x.shape[0]), {}),
      ... )
      >>> fns.embed({"in": jnp.ones((2, 3))}, {"x": jnp.ones((1, 2))}).tolist()
      [[2.0, 2.0, 2.0]]
    """

    embed: Callable[[PyTree, PyTree], PyTree]
    layer: Callable[[PyTree, PyTree, PyTree], PyTree]
    head_loss: Callable[[PyTree, PyTree, PyTree], Sums]


class Messages(NamedTuple):
    """Messages between stages: activations to the next one, their gradients to the previous one."""

    forward: PyTree
    backward: PyTree


class Carry(NamedTuple):
    """Carry of a stage's scan over ticks.

    Attributes:
      inbox: received in the previous tick.
      saved: inputs of this stage that wait for their backward pass, leaves [slots, b, ...].
      shared: sum of the gradients of the shared parameters so far, float32.
      layers: sum of the gradients of this stage's layers so far, leaves [v * n, ...] float32.
      sums: sum of losses, weights and metrics so far.
    """

    inbox: Messages
    saved: PyTree
    shared: PyTree
    layers: PyTree
    sums: Sums


def zeros_like(tree: PyTree, axes: tuple[str, ...], dtype: Any = None, lead: tuple[int, ...] = ()) -> PyTree:
    """Make zeros of the shapes of `tree` with `lead` in front, varying over `axes` and the leaves' own axes."""

    def zeros(x: Any) -> jax.Array:
        return vary(jnp.zeros(lead + x.shape, dtype or x.dtype), tuple(dict.fromkeys((*axes, *varying(x)))))

    return jax.tree.map(zeros, tree)


@dataclass(frozen=True)
class Stage:
    """One stage of a step.

    Attributes:
      fns: the model.
      shared: parameters of embedding and head, unsharded.
      layers: this stage's layers, leaves [v * n, ...].
      batch: leaves [m, b, ...].
      present: bool [v * n], False where a layer is padding; None if none is.
      ends: bool [2], whether this is the first stage and whether it is the last.
      chunks: v.
      stage_axis: mesh axis of the stages.
      stages: p.
      axes: mesh axes that activations vary over: the stages' and the batch's.
      skip_idle: idle ticks skip the layers (a branch), else run them and drop the result (a select).
    """

    fns: StageFns
    shared: PyTree
    layers: PyTree
    batch: PyTree
    present: Bool[Array, " n"] | None
    ends: Bool[Array, "2"]
    chunks: int
    stage_axis: str
    stages: int
    axes: tuple[str, ...]
    skip_idle: bool = True

    def micro(self, i: Int[Array, ""]) -> PyTree:
        """Select microbatch i, leaves [b, ...]."""
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), self.batch)

    def chunk(self, tree: PyTree, chunk: Int[Array, ""]) -> PyTree:
        """Select one chunk, leaves [n, ...] of [v * n, ...]."""
        if self.chunks == 1:
            return tree

        def pick(x: jax.Array) -> jax.Array:
            size = x.shape[0] // self.chunks
            return lax.dynamic_slice_in_dim(x, chunk * size, size)

        return jax.tree.map(pick, tree)

    def add(self, total: PyTree, part: PyTree, chunk: Int[Array, ""]) -> PyTree:
        """Add a chunk's gradients [n, ...] to the stage's [v * n, ...]."""

        def put(a: jax.Array, b: jax.Array) -> jax.Array:
            if self.chunks == 1:
                return a + b
            size = b.shape[0]
            now = lax.dynamic_slice_in_dim(a, chunk * size, size)
            return lax.dynamic_update_slice_in_dim(a, now + b, chunk * size, 0)

        return jax.tree.map(put, total, part)

    def run_layers(self, layers: PyTree, present: Bool[Array, " n"] | None, x: PyTree, micro: PyTree) -> PyTree:
        """Run one chunk's layers [n, ...] in sequence; padding is the identity."""

        def body(x: PyTree, layer: Any) -> tuple[PyTree, None]:
            if present is None:
                return vary(self.fns.layer(layer, x, micro), self.axes), None
            params, is_layer = layer
            return self.when(is_layer, lambda: vary(self.fns.layer(params, x, micro), self.axes), x), None

        return lax.scan(body, x, layers if present is None else (layers, present))[0]

    def when(self, needed: jax.Array, run: Callable[[], PyTree], otherwise: PyTree) -> PyTree:
        """Return `run()` where needed, else `otherwise`; see `skip_idle`."""
        if self.skip_idle:
            return lax.cond(needed, run, lambda: otherwise)
        return jax.tree.map(lambda new, old: jnp.where(needed, new, old), run(), otherwise)

    def first_last(self, chunk: Int[Array, ""]) -> tuple[jax.Array, jax.Array]:
        """Whether this chunk is the first part of the model, and whether it is the last."""
        return self.ends[0] & (chunk == 0), self.ends[1] & (chunk == self.chunks - 1)

    def forward(self, carry: Carry, row: Int[Array, "4"], save: bool) -> tuple[Carry, PyTree]:
        """Run F of a tick; return the carry and the message to the next stage.

        With `save` the input is saved for B, which computes the last part of the model by itself; without, the last
        part computes the loss here.
        """
        active, i, chunk, slot = row
        active = active > 0
        first, last = self.first_last(chunk)
        micro = self.micro(i)

        def embed() -> PyTree:
            return vary(self.fns.embed(self.shared, micro), self.axes)

        def run() -> PyTree:
            present = None if self.present is None else self.chunk(self.present, chunk)
            return self.run_layers(self.chunk(self.layers, chunk), present, x, micro)

        def add_loss() -> Sums:
            loss = vary(self.fns.head_loss(self.shared, y, micro), self.axes)
            return jax.tree.map(jnp.add, carry.sums, loss)

        x = lax.cond(active & first, embed, lambda: carry.inbox.forward)
        y = self.when(active & ~last if save else active, run, x)
        if not save:
            return carry._replace(sums=lax.cond(active & last, add_loss, lambda: carry.sums)), y

        def store(slots: jax.Array, new: jax.Array) -> jax.Array:
            old = lax.dynamic_index_in_dim(slots, slot, keepdims=False)
            return lax.dynamic_update_index_in_dim(slots, jnp.where(active, new, old), slot, 0)

        return carry._replace(saved=jax.tree.map(store, carry.saved, x)), y

    def backward(self, carry: Carry, row: Int[Array, "4"]) -> tuple[Carry, PyTree]:
        """Run B of a tick: recompute the part from its saved input (rematerialization) and back-propagate.

        Returns the carry and the message to the previous stage.
        """
        active, i, chunk, slot = row
        active = active > 0
        first, last = self.first_last(chunk)
        micro = self.micro(i)

        def run() -> tuple[PyTree, PyTree, PyTree, Sums]:
            x = jax.tree.map(lambda saved: lax.dynamic_index_in_dim(saved, slot, keepdims=False), carry.saved)
            present = None if self.present is None else self.chunk(self.present, chunk)
            layers = self.chunk(self.layers, chunk)
            y, pull = jax.vjp(lambda layers, x: self.run_layers(layers, present, x, micro), layers, x)

            def head() -> tuple[PyTree, PyTree, Sums]:
                def loss(shared: PyTree, y: PyTree) -> tuple[jax.Array, Any]:
                    total, weight, metrics = vary(self.fns.head_loss(shared, y, micro), self.axes)
                    return total, (weight, metrics)

                total, pull_loss, rest = jax.vjp(loss, self.shared, y, has_aux=True)
                d_shared, d_y = pull_loss(vary(jnp.ones_like(total), self.axes))
                sums = jax.tree.map(jnp.add, carry.sums, (total, *rest))
                return d_y, jax.tree.map(jnp.add, carry.shared, d_shared), sums

            received = (carry.inbox.backward, carry.shared, carry.sums)
            d_y, shared, sums = lax.cond(active & last, head, lambda: received)
            if not self.skip_idle:  # the result of an idle stage must be zero
                d_y = jax.tree.map(lambda x: jnp.where(active, x, jnp.zeros((), x.dtype)), d_y)
            d_layers, d_x = pull(d_y)

            def embed() -> PyTree:
                pull_embed = jax.vjp(lambda shared: vary(self.fns.embed(shared, micro), self.axes), self.shared)[1]
                return jax.tree.map(jnp.add, shared, pull_embed(d_x)[0])

            shared = lax.cond(active & first, embed, lambda: shared)
            return d_x, shared, self.add(carry.layers, d_layers, chunk), sums

        def idle() -> tuple[PyTree, PyTree, PyTree, Sums]:
            return carry.inbox.backward, carry.shared, carry.layers, carry.sums

        d_x, shared, layers, sums = lax.cond(active, run, idle) if self.skip_idle else run()
        return carry._replace(shared=shared, layers=layers, sums=sums), d_x

    def send(self, tree: PyTree, step: int) -> PyTree:
        """Send arrays to the next stage (step 1) or the previous one (-1); several chunks make the stages a ring."""
        if self.stages == 1:
            return tree
        pairs = [(s, (s + step) % self.stages) for s in range(self.stages)]
        pairs = [pair for pair in pairs if self.chunks > 1 or pair[1] - pair[0] == step]
        return jax.tree.map(lambda x: lax.ppermute(x, self.stage_axis, pairs), tree)

    def scan(self, carry: Carry, kinds: str, rows: tuple[jax.Array, jax.Array], save: bool = True) -> Carry:
        """Run the ticks of one phase; `rows` are int32 [ticks, 4] of F and of B, empty where there are none."""

        def tick(carry: Carry, row: Any) -> tuple[Carry, None]:
            inbox = carry.inbox
            if "F" in kinds:
                carry, y = self.forward(carry, row[0], save)
                inbox = inbox._replace(forward=self.send(y, 1))
            if "B" in kinds:
                carry, d_x = self.backward(carry, row[1])
                inbox = inbox._replace(backward=self.send(d_x, -1))
            return carry._replace(inbox=inbox), None

        forward, backward = rows
        xs = (forward if "F" in kinds else None, backward if "B" in kinds else None)
        return lax.scan(tick, carry, xs)[0]
