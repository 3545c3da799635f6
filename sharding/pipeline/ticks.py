"""One pipeline stage's part of a step: forward and backward work of a tick, and the scans over ticks.

Runs inside shard_map, where every array is this device's part. The rows of a lockstep table
(`sharding.pipeline.lockstep.Phase`) give a stage's work: (active, microbatch, chunk, slot of F, slot of B).

Axes: p stages, m microbatches, v chunks, n layers of a chunk, b rows of a microbatch on a device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, PyTree

from sharding.pipeline.split import SplitLayer
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
    """Messages between stages: activations to the next part of the model, their gradients to the one before.

    Each is a tuple: what the stage before sent; of a folded pipeline also what the stage after sent, and what this
    stage made itself, for its own other chunk.
    """

    forward: tuple[PyTree, ...]
    backward: tuple[PyTree, ...]


class Carry(NamedTuple):
    """Carry of a stage's scan over ticks.

    Attributes:
      inbox: received in the previous tick.
      saved: from F to B, leaves [slots, ...]: the input of this stage, or with `Stage.keep` its output and the layers'
        residuals [slots, n, ...].
      rest: residuals from B to W, leaves [slots, n, ...].
      shared: sum of the gradients of the shared parameters so far, float32.
      layers: sum of the gradients of this stage's layers so far, leaves [v * n, ...] float32.
      sums: sum of losses, weights and metrics so far.
    """

    inbox: Messages
    saved: PyTree
    rest: PyTree
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
      folded: see `sharding.pipeline.schedules.Schedule`.
      split: a layer's F, B and W; None where B is the whole backward pass of layers that are computed again.
      keep: F saves the layers' residuals, so that B computes nothing again; else B starts from the stage's input.
      apart: W is work of its own; else B runs it at once.
      paired: F and B of a tick go through their layers side by side, in one loop, so that what one sends can be on its
        way while the other computes. They must not be of the same microbatch and chunk; `skip_idle` is off.
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
    folded: bool = False
    split: SplitLayer | None = None
    keep: bool = False
    apart: bool = False
    paired: bool = False

    def micro(self, i: Int[Array, ""]) -> PyTree:
        """Select microbatch i, leaves [b, ...]."""
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), self.batch)

    def chunk(self, tree: PyTree, chunk: Int[Array, ""]) -> PyTree:
        """Select one chunk, leaves [n, ...] of [v * n, ...]."""
        if self.chunks == 1 or tree is None:
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

    def forward_layers(self, layers: PyTree, present: Any, x: PyTree, micro: PyTree) -> tuple[PyTree, list]:
        """Run F of one chunk's layers; also their residuals [n, ...]."""
        return lax.scan(lambda x, layer: self.forward_layer(layer, x, micro), x, (layers, present))

    def forward_layer(self, layer: Any, x: PyTree, micro: PyTree) -> tuple[PyTree, list]:
        """Run F of one layer, (parameters, whether it is none of padding or None): its output and residuals."""
        params, is_layer = layer
        assert self.split is not None
        run = partial(self.split.forward, params, micro, x)
        return run() if is_layer is None else self.when(is_layer, run, (x, self.nothing(run)[1]))

    def backward_layers(
        self, layers: PyTree, present: Any, saved: list, d_y: PyTree, micro: PyTree, beside: Any = None
    ) -> tuple[PyTree, PyTree, Any]:
        """Run B of one chunk's layers, the last first; also the residuals for W [n, ...], or what W makes of them.

        Beside them, in the same loop, F of another chunk's: `beside` is (layers, present, x, micro), and the last
        result what `forward_layers` gives of it.
        """
        split, size = self.split, jax.tree.leaves(layers)[0].shape[0]
        assert split is not None

        def body(carry: tuple[PyTree, PyTree], layer: Any) -> tuple[tuple[PyTree, PyTree], Any]:
            (d_y, x), (params, is_layer, saved, k) = carry, layer

            def run() -> tuple[PyTree, PyTree]:
                d_x, rest = split.backward(params, micro, saved, d_y)
                return d_x, rest if self.apart else split.weights(params, micro, rest)

            kept = None
            if beside is not None:
                x, kept = self.forward_layer(self.load(beside[:2], size - 1 - k), x, beside[3])
            d_y, made = run() if present is None else self.when(is_layer, run, (d_y, self.nothing(run)[1]))
            return (d_y, x), (made, kept)

        start = d_y, None if beside is None else beside[2]
        over = (layers, present, saved, jnp.arange(size))
        (d_x, y), (made, kept) = lax.scan(body, start, over, reverse=True)
        return d_x, made, (y, jax.tree.map(lambda leaf: leaf[::-1], kept))

    def weight_layers(self, layers: PyTree, present: Any, rest: list, micro: PyTree) -> PyTree:
        """Run W of one chunk's layers: gradients of their parameters [n, ...]."""
        split = self.split
        assert split is not None

        def body(nothing: None, layer: Any) -> tuple[None, PyTree]:
            params, is_layer, rest = layer
            run = lambda: split.weights(params, micro, rest)  # noqa: E731
            return None, run() if present is None else self.when(is_layer, run, self.nothing(run))

        return lax.scan(body, None, (layers, present, rest))[1]

    def nothing(self, run: Callable[[], PyTree]) -> PyTree:
        """Zeros like the result of `run`, which is not computed."""
        return zeros_like(jax.eval_shape(run), ())

    def first_last(self, chunk: Int[Array, ""]) -> tuple[jax.Array, jax.Array]:
        """Whether this chunk is the first part of the model, and whether it is the last."""
        last = self.ends[0 if self.folded and self.chunks % 2 == 0 else 1]
        return self.ends[0] & (chunk == 0), last & (chunk == self.chunks - 1)

    def received(self, messages: tuple[PyTree, ...], chunk: Int[Array, ""], kind: str) -> PyTree:
        """Select the message for a chunk: of a folded pipeline its chunks go down and up in turn."""
        if not self.folded:
            return messages[0]
        down = (chunk % 2 == 0) == (kind == "F")

        def pick(before: jax.Array, after: jax.Array, own: jax.Array) -> jax.Array:
            turned = jnp.where(down, self.ends[0], self.ends[1])
            return jnp.where(turned, own, jnp.where(down, before, after))

        return jax.tree.map(pick, *messages)

    def load(self, slots: PyTree, slot: Int[Array, ""]) -> PyTree:
        """Read one slot."""
        return jax.tree.map(lambda saved: lax.dynamic_index_in_dim(saved, slot, keepdims=False), slots)

    def store(self, slots: PyTree, new: PyTree, slot: Int[Array, ""], active: jax.Array) -> PyTree:
        """Write one slot, where the stage is active."""

        def write(slots: jax.Array, new: jax.Array) -> jax.Array:
            old = lax.dynamic_index_in_dim(slots, slot, keepdims=False)
            return lax.dynamic_update_index_in_dim(slots, jnp.where(active, new, old), slot, 0)

        return jax.tree.map(write, slots, new)

    def begin(self, carry: Carry, row: Int[Array, "5"]) -> PyTree:
        """Make the input of F: the embedding on the first part of the model, else what was received."""
        active, i, chunk, _, _ = row
        embed = lambda: vary(self.fns.embed(self.shared, self.micro(i)), self.axes)  # noqa: E731
        inbox = self.received(carry.inbox.forward, chunk, "F")
        return lax.cond((active > 0) & self.first_last(chunk)[0], embed, lambda: inbox)

    def forward(self, carry: Carry, row: Int[Array, "5"], save: bool) -> tuple[Carry, PyTree]:
        """Run F of a tick; return the carry and the message to the next part of the model.

        With `save` what B needs is saved, and B computes the loss; without, the last part computes the loss here.
        """
        active, i, chunk, slot, _ = row
        active = active > 0
        last = self.first_last(chunk)[1]
        micro, x = self.micro(i), self.begin(carry, row)
        layers, present = self.chunk((self.layers, self.present), chunk)

        def add_loss() -> Sums:
            loss = vary(self.fns.head_loss(self.shared, y, micro), self.axes)
            return jax.tree.map(jnp.add, carry.sums, loss)

        if save and self.keep:
            run = lambda: self.forward_layers(layers, present, x, micro)  # noqa: E731
            y, residuals = self.when(active, run, (x, self.nothing(run)[1]))
            return carry._replace(saved=self.store(carry.saved, (y, residuals), slot, active)), y
        # Where the layers are computed again, B does all of the last part.
        y = self.when(active & ~last if save else active, lambda: self.run_layers(layers, present, x, micro), x)
        if not save:
            return carry._replace(sums=lax.cond(active & last, add_loss, lambda: carry.sums)), y
        return carry._replace(saved=self.store(carry.saved, x, slot, active)), y

    def backward(self, carry: Carry, row: Int[Array, "5"], beside: Any = None) -> tuple[Carry, PyTree, Any]:
        """Run B of a tick, from what F saved; return the carry and the message to the part of the model before.

        Without `keep` the part is computed again from its input (rematerialization). `beside` and the last result are
        those of `backward_layers`.
        """
        active, i, chunk, slot, rest_slot = row
        active = active > 0
        first, last = self.first_last(chunk)
        micro = self.micro(i)
        inbox = self.received(carry.inbox.backward, chunk, "B")

        def run() -> tuple[PyTree, PyTree, PyTree, Sums, PyTree, Any]:
            saved = self.load(carry.saved, slot)
            layers, present = self.chunk((self.layers, self.present), chunk)
            pull: Any = None
            if self.keep:
                y, residuals = saved
            elif self.split is not None:
                y, residuals = self.forward_layers(layers, present, saved, micro)
            else:
                y, pull = jax.vjp(lambda layers, x: self.run_layers(layers, present, x, micro), layers, saved)

            def head() -> tuple[PyTree, PyTree, Sums]:
                def loss(shared: PyTree, y: PyTree) -> tuple[jax.Array, Any]:
                    total, weight, metrics = vary(self.fns.head_loss(shared, y, micro), self.axes)
                    return total, (weight, metrics)

                total, pull_loss, rest = jax.vjp(loss, self.shared, y, has_aux=True)
                d_shared, d_y = pull_loss(vary(jnp.ones_like(total), self.axes))
                sums = jax.tree.map(jnp.add, carry.sums, (total, *rest))
                return d_y, jax.tree.map(jnp.add, carry.shared, d_shared), sums

            d_y, shared, sums = lax.cond(active & last, head, lambda: (inbox, carry.shared, carry.sums))
            if not self.skip_idle:  # the result of an idle stage must be zero
                d_y = jax.tree.map(lambda x: jnp.where(active, x, jnp.zeros((), x.dtype)), d_y)
            made: PyTree
            if pull is not None:
                (made, d_x), other = pull(d_y), None
            else:
                d_x, made, other = self.backward_layers(layers, present, residuals, d_y, micro, beside)

            def embed() -> PyTree:
                pull_embed = jax.vjp(lambda shared: vary(self.fns.embed(shared, micro), self.axes), self.shared)[1]
                return jax.tree.map(jnp.add, shared, pull_embed(d_x)[0])

            shared = lax.cond(active & first, embed, lambda: shared)
            if self.apart:
                return d_x, shared, carry.layers, sums, self.store(carry.rest, made, rest_slot, active), other
            return d_x, shared, self.add(carry.layers, made, chunk), sums, carry.rest, other

        def skip() -> tuple[PyTree, PyTree, PyTree, Sums, PyTree]:
            return inbox, carry.shared, carry.layers, carry.sums, carry.rest

        found = (*lax.cond(active, lambda: run()[:5], skip), None) if self.skip_idle else run()
        d_x, shared, layers, sums, rest, other = found
        return carry._replace(shared=shared, layers=layers, sums=sums, rest=rest), d_x, other

    def pair(self, carry: Carry, forward: Int[Array, "5"], backward: Int[Array, "5"]) -> tuple[Carry, PyTree, PyTree]:
        """Run F and B of a tick side by side; return the carry and both messages."""
        active, i, chunk, slot, _ = forward
        x = self.begin(carry, forward)
        beside = (*self.chunk((self.layers, self.present), chunk), x, self.micro(i))
        done, d_x, (y, kept) = self.backward(carry, backward, beside)
        saved = self.store(carry.saved, (y, kept) if self.keep else x, slot, active > 0)
        return done._replace(saved=saved), y, d_x

    def weights(self, carry: Carry, row: Int[Array, "5"]) -> Carry:
        """Run W of a tick: the gradients of a chunk's weights, from what its B saved."""
        active, i, chunk, _, slot = row
        layers, present = self.chunk((self.layers, self.present), chunk)

        def run() -> PyTree:
            made = self.weight_layers(layers, present, self.load(carry.rest, slot), self.micro(i))
            if not self.skip_idle:
                made = jax.tree.map(lambda x: jnp.where(active > 0, x, jnp.zeros((), x.dtype)), made)
            return self.add(carry.layers, made, chunk)

        total = lax.cond(active > 0, run, lambda: carry.layers) if self.skip_idle else run()
        return carry._replace(layers=total)

    def send(self, tree: PyTree, step: int) -> tuple[PyTree, ...]:
        """Send arrays to the next stage (step 1) or the previous one (-1); several chunks make the stages a ring.

        Of a folded pipeline they are sent both ways, as chunks go both ways, and kept for this stage's other chunk.
        """
        if self.stages == 1:
            return (tree,) * (3 if self.folded else 1)

        def shift(step: int) -> PyTree:
            pairs = [(s, (s + step) % self.stages) for s in range(self.stages)]
            ring = self.chunks > 1 and not self.folded
            pairs = [pair for pair in pairs if ring or pair[1] - pair[0] == step]
            return jax.tree.map(lambda x: lax.ppermute(x, self.stage_axis, pairs), tree)

        return (shift(1), shift(-1), tree) if self.folded else (shift(step),)

    def scan(self, carry: Carry, kinds: str, rows: Int[Array, "ticks kinds 5"], save: bool = True) -> Carry:
        """Run the ticks of one phase: F, B and W of each, then its messages.

        F and B of a tick depend on each other on the last part of the model alone, and W on B alone where they are of
        the same microbatch.
        """

        def tick(carry: Carry, row: Int[Array, "kinds 5"]) -> tuple[Carry, None]:
            forward, backward = carry.inbox
            for k, kind in enumerate(kinds):
                if self.paired and kinds.startswith("FB") and k < 2:
                    if k == 0:
                        carry, y, d_x = self.pair(carry, row[0], row[1])
                        forward, backward = self.send(y, 1), self.send(d_x, -1)
                elif kind == "F":
                    carry, y = self.forward(carry, row[k], save)
                    forward = self.send(y, 1)
                elif kind == "B":
                    carry, d_x, _ = self.backward(carry, row[k])
                    backward = self.send(d_x, -1)
                else:
                    carry = self.weights(carry, row[k])
            return carry._replace(inbox=Messages(forward, backward)), None

        return lax.scan(tick, carry, rows)[0]
