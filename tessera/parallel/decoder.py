"""The decoder under a plan: the same numbers as on one device, every collective written out.

The model is three functions of one device's part of the parameters and the batch (`DecoderParts`), to be called inside
shard_map: embed, layer and head_loss. `make_loss` runs them one after the other; a pipeline runs them by stage. A layer
is the ordinary `tessera.models.transformer.Block` with one device's number of heads and feed-forward channels.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree

from sharding.context_parallel import contiguous_positions, ring_attention, ulysses_attention, zigzag_positions
from sharding.errors import PlanError, nearest_divisor
from sharding.pipeline.stages import split_layers
from sharding.plan import DATA_AXES, Plan
from sharding.rules import mirrored_specs, param_specs, shardings
from sharding.tensor_parallel import INSIDE, RESIDUAL, explicit, gather_params, keep_gathers_out, vary
from sharding.vocab_parallel import lookup, token_losses
from tessera.models.layers import attention, rms_norm
from tessera.models.remat import Remat
from tessera.models.transformer import DTYPES, Block, Decoder, TransformerConfig, feed_forward
from tessera.parallel.moe import SplitMoE, check_experts
from tessera.step import LossFn

Micro = Mapping[str, Any]
Stream = PyTree
"""The residual stream [B, T, D], or (residual stream, auxiliary losses so far []) of a model with routed layers."""
Sums = tuple[jax.Array, jax.Array, dict[str, jax.Array]]


@dataclass(frozen=True)
class DecoderParts:
    """A decoder as functions of one device's arrays, called inside shard_map over the plan's mesh.

    Attributes:
      config: the whole model.
      plan: how it is split.
      z_loss: coefficient of the z-loss, see `tessera.losses.cross_entropy`.
      platform: what is compiled for, "tpu" for example; "" is the default backend's.
    """

    config: TransformerConfig
    plan: Plan
    z_loss: float = 0.0
    platform: str = ""

    @property
    def tp(self) -> str | None:
        """The tensor-parallel axis, None if the plan has none."""
        return next(iter(self.plan.present("tp")), None)

    @property
    def routed(self) -> bool:
        """Whether layers have routed experts: the residual stream then comes with the sum of their auxiliary losses."""
        return "routed" in self.config.pattern

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """Axes that split the batch's rows."""
        return self.plan.present(*DATA_AXES)

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Axes that split the tokens."""
        return self.batch_axes + self.plan.present("cp")

    @property
    def residual_axes(self) -> tuple[str, ...]:
        """Axes over which the residual stream varies."""
        return self.token_axes + (self.plan.present("tp") if self.plan.sequence else ())

    @cached_property
    def specs(self) -> PyTree:
        """Partition of every parameter."""
        return param_specs(parameter_shapes(self.config), self.plan.sizes, self.plan.rules, zero=self.plan.zero)

    @cached_property
    def layer_specs(self) -> PyTree:
        """Partition of one layer's parameters, without the layer axis."""
        specs = self.specs
        if not self.config.scan:
            return specs["blocks_0"]
        is_spec = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
        return jax.tree.map(lambda spec: PartitionSpec(*spec[1:]), specs["blocks"], is_leaf=is_spec)

    @property
    def local(self) -> TransformerConfig:
        """The config of one device's part of a block."""
        c, tp = self.config, self.plan.size("tp")
        return replace(c, heads=c.heads // tp, kv_heads=c.kv_size // tp, head_dim=c.head_size, ff=c.ff_size // tp)

    def check(self, batch_size: int, length: int) -> None:
        """Refuse a model or a batch that does not divide.

        Raises:
          PlanError: parameters (see `sharding.rules.param_specs`), rows over the data axes and into microbatches,
            tokens over cp (twice for the ring's load balance) and tp, layers over stages, or experts (see
            `tessera.parallel.moe.check_experts`).
        """
        plan, sizes = self.plan, self.plan.sizes
        _ = self.specs
        if self.routed:
            check_experts(self.config.moe, plan)
        if not self.config.scan and len(self.config.pattern) > 1:
            raise PlanError(
                f"plan {plan.axes!r}: layers that differ (moe.every={self.config.moe.every}) need scan=True"
            )
        cp, tp = sizes["cp"], sizes["tp"] if self.plan.sequence else 1
        chunks = 2 * cp if plan.context == "ring" and cp > 1 else cp
        ways = math.lcm(chunks, cp * tp)
        if batch_size % plan.data:
            axes = " x ".join(f"{axis}={sizes[axis]}" for axis in self.batch_axes)
            near = nearest_divisor(batch_size, plan.data)
            raise PlanError(f"batch_size={batch_size} does not divide by {axes}; nearest valid size of both: {near}")
        if plan.size("pp") > 1:
            self._check_stages(batch_size)
        if length % ways:
            near = max(1, round(length / ways)) * ways
            raise PlanError(
                f"length={length} does not divide into {ways} parts for cp={cp}, tp={tp}; nearest valid: {near}"
            )
        if plan.context == "all_to_all" and cp > 1 and self.local.kv_size % cp:
            raise PlanError(
                f"context='all_to_all' splits the {self.local.kv_size} key/value heads of a tp device over cp={cp}; "
                f"nearest valid: cp={nearest_divisor(self.local.kv_size, cp)}, or context='ring'"
            )

    def _check_stages(self, batch_size: int) -> None:
        """Refuse layers that cannot be stages, and rows of a device that are not so many microbatches."""
        stages, parts, rows = self.plan.size("pp"), self.plan.microbatch_count, batch_size // self.plan.data
        if not self.config.scan:
            raise PlanError(f"plan {self.plan.axes!r}: a pipeline needs stacked layers; set model.scan=True")
        if len(self.config.remat_groups) > 1:
            raise PlanError(
                f"plan {self.plan.axes!r}: all stages run one program, so their layers are recomputed alike; "
                f"remat={self.config.remat!r} has groups: choose one policy"
            )
        split_layers(self.config.layers // len(self.config.pattern), stages, self.plan.virtual)
        if rows % parts:
            valid = [n for n in range(stages, rows + 1) if rows % n == 0]
            near = min(valid, key=lambda n: abs(n - parts), default=None)
            choose = f"batch_size={self.plan.data * parts}" if near is None else f"microbatches={near}"
            raise PlanError(
                f"plan {self.plan.axes!r}: batch_size={batch_size} over {self.plan.data} data copies leaves {rows} "
                f"rows, which do not divide into microbatches={parts} of {stages} stages; nearest valid: {choose}"
            )

    def positions(self, length: int) -> Int[Array, " T"]:
        """Positions of the tokens this device holds of a sequence of `length`."""
        if not self.plan.present("cp"):
            return jnp.arange(length, dtype=jnp.int32)
        cut = zigzag_positions if self.plan.context == "ring" else contiguous_positions
        return cut(jax.lax.axis_index("cp"), self.plan.size("cp"), length)

    def embed(self, shared: PyTree, micro: Micro) -> Stream:
        """Tokens int32 [B, T + 1] to the residual stream; reads embed/table of `shared`."""
        tokens_BT = micro["tokens"]
        tokens_BT = jnp.take(tokens_BT, self.positions(tokens_BT.shape[1] - 1), axis=1)
        table_VD = self._gather(shared["embed"], self.specs["embed"])["table"]
        with jax.named_scope("embed"):
            x_BTD = explicit(self.tp, self.plan.sequence)(lookup(tokens_BT, table_VD, self.tp), RESIDUAL)
        x_BTD = vary(x_BTD, self.residual_axes)
        return (x_BTD, jnp.float32(0)) if self.routed else x_BTD

    def layer(self, layer: PyTree, stream: Stream, micro: Micro) -> Stream:
        """One block on the residual stream, or with `moe.every` n > 1 the n blocks of one step of the scan."""
        tokens_BT, pattern = micro["tokens"], self.config.pattern
        positions_T = self.positions(tokens_BT.shape[1] - 1)
        positions_BT = jnp.broadcast_to(positions_T[None], (tokens_BT.shape[0], positions_T.shape[0]))
        x_BTD, auxiliary = stream if self.routed else (stream, None)
        with jax.named_scope("layer"):
            params = self._gather(layer, self.layer_specs)
            for i, mlp in enumerate(pattern):
                block = Block(self.local, explicit(self.tp, self.plan.sequence), self._attend(), mlp, self._feed)
                one = params if len(pattern) == 1 else params[f"layer_{i}"]
                (x_BTD, _), sown = block.apply({"params": one}, x_BTD, positions_BT, mutable=["intermediates"])
                if mlp == "routed":
                    auxiliary += sown["intermediates"]["mlp"]["aux_loss"][0]
        return (x_BTD, auxiliary) if self.routed else x_BTD

    def head_loss(self, shared: PyTree, stream: Stream, micro: Micro) -> Sums:
        """Sums over this device's tokens: of the loss, of their number, and of the metrics.

        Reads final_norm and head (embed where tied) of `shared`. The sums are equal on all devices of tp.
        """
        tokens_BT = micro["tokens"]
        x_BTD, auxiliary = stream if self.routed else (stream, None)
        labels_BT = jnp.take(tokens_BT, self.positions(tokens_BT.shape[1] - 1) + 1, axis=1)
        gain = self._gather(shared["final_norm"], self.specs["final_norm"])["gain"]
        with jax.named_scope("head"):
            x_BTD = explicit(self.tp, self.plan.sequence)(rms_norm(x_BTD, gain, self.config.norm_eps), INSIDE)
            if self.config.tied:
                head_DV = self._gather(shared["embed"], self.specs["embed"])["table"].T
            else:
                head_DV = self._gather(shared["head"], self.specs["head"])["kernel"]
            logits_BTV = jnp.einsum("btd,dv->btv", x_BTD, head_DV, preferred_element_type=jnp.float32)
            nll_BT, lse_BT, right_BT = token_losses(logits_BTV, labels_BT, self.tp)
        weight = jnp.float32(labels_BT.size)
        metrics = {"cross_entropy": nll_BT.sum(), "accuracy": right_BT.sum()}
        loss = metrics["cross_entropy"] + self.z_loss * jnp.square(lse_BT).sum()
        if self.routed:
            metrics["aux_loss"] = auxiliary * weight
            loss += metrics["aux_loss"]
        return loss, weight, metrics

    def layers(self, params: PyTree, stream: Stream, micro: Micro) -> Stream:
        """All blocks; the backward pass recomputes what the config's `remat` says, and gathered parameters always."""
        groups, period, start = self.config.remat_groups, len(self.config.pattern), 0
        if not self.config.scan:
            for i, way in enumerate(group for group in groups for _ in range(group.layers)):
                stream = self.recomputed(way)(params[f"blocks_{i}"], stream, micro)
            return stream
        for way in groups:
            layer, end = self.recomputed(way), start + way.layers // period
            blocks = params["blocks"]
            if len(groups) > 1:
                blocks = jax.tree.map(lambda leaf, start=start, end=end: leaf[start:end], blocks)
            stream, _ = jax.lax.scan(partial(_scanned, layer, micro), stream, blocks)
            start = end
        return stream

    def recomputed(self, way: Remat) -> Callable[[PyTree, Stream, Micro], Stream]:
        """`layer`, keeping for the backward pass what `way` says and never gathered parameters."""
        fsdp = next(iter(self.plan.present("fsdp")), None)
        if way.base == "none" and not (fsdp and self.plan.zero == 3):
            return self.layer
        policy = keep_gathers_out(way.policy or jax.checkpoint_policies.everything_saveable, fsdp)
        return jax.checkpoint(self.layer, policy=policy, prevent_cse=not self.config.scan)

    def _gather(self, params: PyTree, specs: PyTree) -> PyTree:
        fsdp = next(iter(self.plan.present("fsdp")), None)
        return gather_params(params, specs, DTYPES[self.config.dtype], fsdp=fsdp, vary_over=self.residual_axes)

    def _feed(self, config: TransformerConfig, mlp: str, name: str) -> nn.Module:
        if mlp != "routed":
            return feed_forward(config, mlp, name)
        ff = config.moe.width_of(self.config.ff_size)
        return SplitMoE(config.moe, self.plan, config.width, ff, self.token_axes, self.platform, name=name)

    def _attend(self) -> Callable[..., jax.Array]:
        if not self.plan.present("cp"):
            return attention
        if self.plan.context == "ring":
            return partial(ring_attention, axis="cp")
        return partial(ulysses_attention, axis="cp", attend=attention)


def _scanned(layer: Callable[..., Stream], micro: Micro, stream: Stream, one: PyTree) -> tuple[Stream, None]:
    return layer(one, stream, micro), None


def make_loss(parts: DecoderParts, mesh: Mesh | AbstractMesh) -> LossFn:
    """`loss(params, batch, key)` as `tessera.next_token.make_loss` gives it, under a plan without pipeline stages.

    Args:
      parts: model and plan.
      mesh: from `sharding.mesh`.
    """
    axes = parts.token_axes

    def local_loss(params: PyTree, batch: Micro) -> tuple[jax.Array, dict[str, jax.Array]]:
        stream = parts.layers(params, parts.embed(params, batch), batch)
        loss, weight, metrics = parts.head_loss(params, stream, batch)
        with jax.named_scope("loss"):
            loss, weight, metrics = jax.lax.psum(vary_all((loss, weight, metrics), axes), axes)
        return jax.tree.map(lambda total: total / weight, (loss, metrics))

    specs = (parts.specs, {"tokens": PartitionSpec(parts.batch_axes or None)})
    sharded = jax.shard_map(local_loss, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())

    def loss_fn(params: PyTree, batch: Micro, key: Any = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        del key
        return sharded(params, {"tokens": batch["tokens"]})

    return loss_fn


def vary_all(tree: PyTree, axes: tuple[str, ...]) -> PyTree:
    """`vary` every leaf over the axes: a count that is a constant varies over no axis until it is told to."""
    return jax.tree.map(lambda x: vary(jnp.asarray(x), axes), tree)


def state_shardings(parts: DecoderParts, mesh: Mesh, state: PyTree) -> PyTree:
    """Shardings of a train state: parameters by the plan; moments and averages over fsdp whatever `zero` is.

    Args:
      parts: model and plan.
      mesh: from `sharding.mesh.make_mesh`.
      state: `tessera.step.TrainState` of arrays or shapes.
    """
    shapes = parameter_shapes(parts.config)
    whole = param_specs(shapes, parts.plan.sizes, parts.plan.rules)
    specs = mirrored_specs(state, shapes, whole)
    return shardings(mesh, specs.replace(params=parts.specs))


def batch_sharding(parts: DecoderParts, mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data axes."""
    return NamedSharding(mesh, PartitionSpec(parts.batch_axes or None))


@functools.lru_cache(maxsize=16)  # a plan is checked many times, its shapes made once
def parameter_shapes(config: TransformerConfig) -> PyTree:
    """Shapes of a decoder's parameters; nothing is allocated."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]
