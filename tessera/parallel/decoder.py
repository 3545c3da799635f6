"""The decoder under a plan: one device's part of it, every collective written out, for training and for serving.

`ShardedDecoder` holds pure functions of one device's parameters and activations, to be called inside `jax.shard_map`
over the plan's mesh. They run the ordinary `tessera.models.transformer.Block` with one device's number of heads,
feed-forward channels and experts, and give the numbers of one device. Training and serving differ in the attention they
hand to the block: full, ring or Ulysses attention over the batch, or attention over a KV cache.

Axes: B rows (N of a serving call), T tokens of a row, S this device's tokens of the residual stream, D width, V
vocabulary, L layers, K key/value heads, h head dimension, E experts; one device's sizes.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key, Num, PyTree

from moe.kernels import Quantized
from moe.layer import ExpertAxes, MoEConfig
from moe.metrics import token_means
from sharding.attention import AttentionForm
from sharding.context_parallel import contiguous_positions, ring_attention, ulysses_attention, zigzag_positions
from sharding.errors import PlanError, nearest_sizes
from sharding.inference.adapters import AdaptedProjection
from sharding.inference.attention import cached_attention
from sharding.inference.few_rows import RowKernel, RowProjection
from sharding.inference.kv_cache import Blocks, Cache, Past, Read
from sharding.inference.quantize import dequantize, is_quantized
from sharding.inference.sample import vocabulary_ids
from sharding.pipeline.stages import split_layers, store_across
from sharding.plan import DATA_AXES, Plan
from sharding.rules import Rules, is_spec, mirrored_specs, param_specs, path_name, shardings, spreads
from sharding.tensor_parallel import INSIDE, RESIDUAL, explicit, gather_params, keep_gathers_out, vary, varying
from sharding.vocab_parallel import linear_cross_entropy, lookup
from tessera.models.remat import Remat
from tessera.models.transformer import (
    DTYPES,
    Attend,
    Block,
    LayerForm,
    Stack,
    TransformerConfig,
    attention,
    form_of,
    param_shapes,
)
from tessera.optim.param_axes import kernel_axes
from tessera.step import ROUTER_MEANS, LossFn, padding_share, router_metrics, with_mean_weights

Micro = Mapping[str, Any]
Sums = tuple[jax.Array, jax.Array, dict[str, jax.Array]]

NOISY = ("gshard", "noisy", "hierarchical", "sparsemixer")
"""Routers that draw noise in training, on every device for its own tokens."""

ROUTERS = ("top_k", "switch", "sigmoid", "softmax_groups", "hash", "relu", *NOISY)
"""Routers that choose for every token by itself, so that splitting the batch changes nothing but their noise."""


LIVE_BLOCK = 128
"""Positions of the KV cache that attention reads at a time on one CPU."""


class Stream(NamedTuple):
    """What goes from layer to layer in training.

    Attributes:
      x: residual stream [B, S, D].
      aux_loss: sum of the auxiliary losses so far, float32 []; None without routed layers.
      router: `ROUTER_MEANS` summed over this device's tokens, [L, E] or [L], the layers so far at the end; with
        "sums" [L, 6, E] where the batch asks for them, as in `tessera.models.lm_loss.lm_loss`.
      key: for the noise of this device's routers from here on, and a sign of training; None switches noise and capacity
        off, as in evaluation.
    """

    x: Any
    aux_loss: Any = None
    router: Any = None
    key: Any = None


class Layer(NamedTuple):
    """One step of a stack, or stacked ones.

    Attributes:
      params: of its blocks.
      forms: `TransformerConfig.forms` of it.
      sums: of its router over the whole batch that the tokens are a part of, see `tessera.models.lm_loss.lm_loss`.
      adapters: in serving, of its kernels (see `tessera.lm.lora.stack`), and which one each row has; None without.
    """

    params: PyTree
    forms: LayerForm | None = None
    sums: Any = None
    adapters: tuple[PyTree, Any] | None = None


class DecodeInputs(NamedTuple):
    """Tokens of a serving call [N, T], position [N] of each row's first, how its KV cache is read (None: empty).

    `adapter` [N] is that of each row where the parameters have adapters; None is the base for all.
    """

    tokens: Any
    starts: Any
    read: Read | None
    adapter: Any = None


@dataclass(frozen=True)
class ShardedDecoder:
    """One device's part of a decoder, as functions called inside `jax.shard_map` over the plan's mesh.

    Attributes:
      config: the model.
      plan: how it is split.
      z_loss: coefficient of the z-loss, see `tessera.losses.cross_entropy`.
      loss_chunk_size: tokens of a device whose logits the loss computes at a time, see `sharding.linear_cross_entropy`;
        0 takes all at once.
      platform: what is compiled for, "tpu" for example; "" is the default backend's.
      dropping: under pipeline stages, where no key goes from layer to layer: whether a capacity and `mixture.slack`
        hold, as in training.
      padded_from: tokens of the vocabulary where the table and the head of `config` have been padded to more rows, as
        for serving; 0 is all of them.
    """

    config: TransformerConfig
    plan: Plan
    z_loss: float = 0.0
    platform: str = ""
    dropping: bool = False
    loss_chunk_size: int = 0
    padded_from: int = 0

    def axis(self, name: str) -> str | None:
        """The mesh axis of that name, None if the plan does not split along it."""
        return next(iter(self.plan.present(name)), None)

    @property
    def tp(self) -> str | None:
        """Axis of tensor parallelism."""
        return self.axis("tp")

    @property
    def cp(self) -> str | None:
        """Axis of context parallelism."""
        return self.axis("cp")

    @property
    def pp(self) -> str | None:
        """Axis of pipeline stages."""
        return self.axis("pp")

    @property
    def vocabulary(self) -> int:
        """V, tokens of the vocabulary without padding."""
        return self.padded_from or self.config.vocab_size

    @property
    def routed(self) -> bool:
        """Whether some layers have routed experts."""
        return "routed" in self.config.pattern

    @property
    def units(self) -> int:
        """Steps of the scan over the (routed) layers: layers, or with `moe.every` n > 1 units of n blocks."""
        c = self.config
        return (c.layers - c.first_dense) // len(c.pattern)

    @property
    def cache_size(self) -> int:
        """Channels of a head's key, and of its value, in a KV cache."""
        if self.config.latent.absorbed:
            return self.config.latent.kv_rank + self.config.latent.rope_dim
        return max(self.config.head_size, self.config.value_size)

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """Axes that split the rows of a batch, or the slots of a KV cache."""
        return self.plan.present(*DATA_AXES)

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Axes that split the tokens of a batch."""
        return self.batch_axes + self.plan.present("cp")

    @property
    def residual_axes(self) -> tuple[str, ...]:
        """Axes over which the residual stream varies."""
        return self.token_axes + (self.plan.present("tp") if self.plan.sequence else ())

    @cached_property
    def specs(self) -> PyTree:
        """Partition of every parameter as it is stored; PlanError where one does not divide."""
        return self.stored(self.plan.zero)

    def stored(self, zero: int) -> PyTree:
        """Partition of every parameter at a ZeRO stage.

        Blocks that do not divide by the pipeline's stages are split over them along another dimension, see
        `sharding.pipeline.stages.store_across`.
        """
        sizes = dict(sizes_of_params(self.plan)) | ({} if self.even_stages else {"pp": 1})
        found = _param_specs(self.config, tuple(sizes.items()), self.plan.rules, zero)
        if isinstance(found, PlanError):
            raise PlanError(str(found), found.reason)
        if self.even_stages:
            return found
        across = lambda leaf, spec: store_across(leaf.shape, spec, "pp", self.plan.sizes)  # noqa: E731
        return {**found, "blocks": jax.tree.map(across, param_shapes(self.config)["blocks"], found["blocks"])}

    @property
    def even_stages(self) -> bool:
        """Whether every pipeline stage has as many layers as the others."""
        return not self.config.scan or self.units % self.plan.size("pp") == 0

    @cached_property
    def spreads(self) -> PyTree:
        """What of every parameter tp does not divide, see `sharding.rules.spreads`."""
        return spreads(param_shapes(self.config), self.plan.sizes, self.plan.rules)

    def layer_specs(self, stack: Stack) -> PyTree:
        """Partition of the parameters of one step of a stack, without the layer axis."""
        specs = self.specs[stack.name]
        if not self.config.scan:
            return specs
        return jax.tree.map(lambda spec: PartitionSpec(*spec[1:]), specs, is_leaf=is_spec)

    @property
    def local(self) -> TransformerConfig:
        """The config of one device's part of a block; routed experts are cut by `expert_axes`."""
        c, tp = self.config, self.plan.size("tp")
        moe = c.moe
        if self.routed:
            moe = replace(moe, ff=moe.width_of(c.ff_size))
            if self.platform == "tpu" and moe.mixture.backend == "auto":  # also compiled on a machine without a TPU
                moe = replace(moe, mixture=replace(moe.mixture, backend="tpu"))
        # Where tp does not divide the key/value heads, each is on all devices whose queries look at it.
        sizes: Any = {"heads": c.heads // tp, "kv_heads": c.kv_size // math.gcd(c.kv_size, tp), "ff": c.ff_size // tp}
        return replace(c, **sizes, head_dim=0 if c.latent.kv_rank else c.head_size, moe=moe)

    @property
    def expert_axes(self) -> ExpertAxes:
        """Mesh axes that split routed experts and their tokens."""
        exchange: Any = {"tpu": "ragged", "gpu": "ragged", "cpu": "padded"}.get(self.platform, "auto")
        return ExpertAxes(self.axis("ep"), self.tp, self.token_axes, exchange)

    def _stays_quantized(self, path: str) -> bool:
        """Whether a quantized kernel is one of experts, of which the grouped matmul widens the live ones."""
        return self.config.moe.mixture.dispatch == "dropless" and not self.plan.present("fsdp") and "/experts/" in path

    def gather(self, params: PyTree, name: str, specs: PyTree = None) -> PyTree:
        """All-gather parameters over fsdp (ZeRO-3), in the compute dtype: `sharding.tensor_parallel.gather_params`.

        Args:
          params: the part `name` of the parameters, of a stack one step's.
          name: of the part.
          specs: its partition, default that of the whole part.
        """
        how: Any = {"fsdp": self.axis("fsdp"), "vary_over": self.residual_axes, "spreads": self.spreads[name]}
        return gather_params(params, self.specs[name] if specs is None else specs, DTYPES[self.config.dtype], **how)

    # The model: embedding, blocks, head.

    def embed(self, params: PyTree, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B S D"]:
        """Look tokens up in the vocabulary-parallel embedding table, embed/table of `params`."""
        table_VD = self.gather(params["embed"], "embed")["table"]
        if self.vocabulary % self.plan.size("tp") or self.padded_from:  # ids of padding are as wrong as any other
            tokens_BT = jnp.where(tokens_BT < self.vocabulary, tokens_BT, -1)
        with jax.named_scope("embed"):
            x_BSD = explicit(self.tp, self.plan.sequence)(lookup(tokens_BT, table_VD, self.tp), RESIDUAL)
            return self.config.embedded(x_BSD)

    def unit(
        self,
        stack: Stack,
        layer: Layer,
        x_BSD: Float[Array, "B S D"],
        positions_BT: Int[Array, "B T"],
        tokens_BT: Int[Array, "B T"] | None,
        attend: Callable[[int], Attend],
        *,
        sow: tuple[str, ...] = (),
        key: Key[Array, ""] | None = None,
        packed: bool = False,
    ) -> tuple[Float[Array, "B S D"], Any]:
        """Run the blocks of one step of a stack: one, or with `moe.every` n > 1 the n blocks of its pattern.

        Args:
          stack: the stack.
          layer: this device's part of their parameters, and the forms of their attention.
          x_BSD: residual stream.
          positions_BT: rotary positions.
          tokens_BT: token ids, for the hash router.
          attend: index of a block in the pattern -> its attention.
          sow: collections of which to return what the routed block sowed (None without one).
          key: of routed experts in training; None is evaluation.
          packed: see `tessera.models.transformer.Block`.
        """
        params = self.gather(layer.params, stack.name, self.layer_specs(stack))
        if layer.adapters is not None:
            params = _adapted(params, *layer.adapters)
        forms, sums_SE = jax.lax.stop_gradient((layer.forms, layer.sums))
        sown = None
        for i, mlp in enumerate(stack.pattern):
            constrain = explicit(self.tp, self.plan.sequence)
            block = Block(self.local, constrain, attend(i), mlp, self.expert_axes, packed)
            one = params if len(stack.pattern) == 1 else params[f"layer_{i}"]
            how: Any = {"mutable": list(sow), "rngs": {} if key is None else {"router": key}}
            variables = {"params": one}
            if sums_SE is not None and mlp == "routed":
                variables["balance"] = {"mlp": {"sums": sums_SE}}
            (x_BSD, _), state = block.apply(variables, x_BSD, positions_BT, tokens_BT, form_of(forms, i), **how)
            if sow and mlp == "routed":
                sown = {name: value for kind in sow for name, value in state[kind]["mlp"].items()}
        return x_BSD, sown

    def head(self, params: PyTree, x_BSD: Float[Array, "B S D"]) -> tuple[Float[Array, "B T D"], Float[Array, "D V"]]:
        """Inputs of the output layer and this device's columns of it; reads final_norm and head (embed where tied)."""
        name = "embed" if self.config.tied else "head"
        gain = self.gather(params["final_norm"], "final_norm")["gain"]
        x_BTD = explicit(self.tp, self.plan.sequence)(self.config.norm(x_BSD, gain), INSIDE)
        head = self.gather(params[name], name)
        return x_BTD, head["table"].T if self.config.tied else head["kernel"]

    def logits(self, params: PyTree, x_BSD: Float[Array, "B S D"]) -> Float[Array, "B T V"]:
        """float32 logits of this device's part of the vocabulary; those of padding are -inf, so that none is drawn."""
        if "rows" in params:  # see `tessera.serving.layout`
            x_BTD = self.config.norm(x_BSD, params["final_norm"]["gain"])
            head = RowProjection(params["rows"], params["rows"].values.shape[::-1], 1)
            return self.config.cap(head(x_BTD.astype(jnp.float32)))
        logits_BTV = self.config.logits(*self.head(params, x_BSD))
        columns = logits_BTV.shape[-1]
        if columns * self.plan.size("tp") == self.vocabulary:
            return logits_BTV
        return jnp.where(vocabulary_ids(columns, self.tp)[None, None] < self.vocabulary, logits_BTV, -jnp.inf)

    # Training.

    def positions(self, length: int) -> Int[Array, " T"]:
        """Positions of the tokens this device holds of a sequence of `length`."""
        if not self.cp:
            return jnp.arange(length, dtype=jnp.int32)
        cut = zigzag_positions if self.plan.context == "ring" else contiguous_positions
        return cut(jax.lax.axis_index("cp"), self.plan.size("cp"), length)

    def own(self, x_BT: Num[Array, "B U"]) -> Num[Array, "B T"]:
        """The columns of this device's tokens, of an array with one for every input of the sequence."""
        return jnp.take(x_BT, self.positions(x_BT.shape[1]), axis=1)

    def begin(self, shared: PyTree, micro: Micro, key: Key[Array, ""] | None = None) -> Stream:
        """Tokens int32 [B, T + 1] to the stream before the first layer; `key` as in `Stream`, equal on all devices."""
        x_BSD = vary(self.embed(shared, self.own(micro["tokens"][:, :-1])), self.residual_axes)
        if not self.routed:
            return Stream(x_BSD)
        routed = self.config.mlps.count("routed")
        experts = self.config.moe.router.experts
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(ROUTER_MEANS, (routed,)) | {"load": (routed, experts)}
        if asks_for_sums(micro):
            shapes["sums"] = (routed, 6, experts)
        axes = self.token_axes + self.plan.present("tp")
        if key is not None:
            for axis in self.token_axes:  # not tp, whose devices route the same tokens
                key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        router = {name: vary(jnp.zeros(shape), axes) for name, shape in shapes.items()}
        return Stream(x_BSD, jnp.float32(0), router, key)

    def begin_stages(self, shared: PyTree, micro: Micro) -> Stream:
        """`begin`, and the first dense layers of a routed model, which all belong to a pipeline's first stage."""
        stream = self.begin(shared, micro)
        for stack in self.config.stacks[:-1]:
            stream = self.stack_layers(stack, shared[stack.name], stream, micro)
        return stream

    def layer(self, stack: Stack, layer: Layer, stream: Stream, micro: Micro) -> Stream:
        """One step of a stack (see `unit`) on the stream."""
        tokens_BT, packed = micro["tokens"][:, :-1], "positions" in micro
        if packed:
            positions_BT = self.own(micro["positions"])
        else:
            positions_T = self.positions(tokens_BT.shape[1])
            positions_BT = jnp.broadcast_to(positions_T[None], (tokens_BT.shape[0], positions_T.shape[0]))
        ids_BT = self.own(tokens_BT) if self.config.moe.router.name == "hash" else None
        key, mine = (None, None) if stream.key is None else jax.random.split(stream.key)
        if self.dropping:
            mine = jax.random.key(0)  # a sign of training; nothing that draws noise runs under stages
        with jax.named_scope("layer"):
            attend = lambda _: self._attend()  # noqa: E731
            collections = ("intermediates", "balance") if asks_for_sums(micro) else ("intermediates",)
            how: Any = {"sow": collections, "key": mine, "packed": packed}
            x_BSD, sown = self.unit(stack, layer, stream.x, positions_BT, ids_BT, attend, **how)
        if "routed" not in stack.pattern:
            return stream._replace(x=x_BSD)
        found = token_means(jax.lax.stop_gradient(sown["routing"][0]))
        # Layers come in order of depth, whichever stage runs them: what is new goes to the end.
        router, count = {}, self.own(micro["mean_live"]).sum() if "mean_live" in micro else positions_BT.size
        for name, sums in stream.router.items():
            mine = jax.lax.stop_gradient(sown["sums"][0]) if name == "sums" else found[name] * count
            new = vary(mine, sorted(jax.typeof(sums).mat.varying))
            router[name] = jnp.concatenate([sums[1:], new[None]])
        return Stream(x_BSD, stream.aux_loss + sown["aux_loss"][0], router, key)

    def head_loss(self, shared: PyTree, stream: Stream, micro: Micro) -> Sums:
        """Sums over this device's tokens: of the loss, of their number, and of the metrics.

        The sums are equal on all devices of tp. Weights of the targets have a mean of one over the whole batch.
        """
        labels_BT = self.own(micro["tokens"][:, 1:])
        weights_BT = self.own(micro["mean_weights"]) if "mean_weights" in micro else jnp.ones(labels_BT.shape)
        weight = jnp.float32(labels_BT.size)
        with jax.named_scope("head"):
            x_BTD, head_DV = self.head(shared, stream.x)
            # Marked before the chunks, so that its gradient is summed over devices after them.
            head_DV = vary(head_DV, varying(x_BTD))
            x_ND, labels_N, weights_N = (x.reshape(-1, *x.shape[2:]) for x in (x_BTD, labels_BT, weights_BT))
            how: Any = {"z": self.z_loss, "softcap": self.config.logit_softcap, "chunk": self.loss_chunk_size}
            how["vocabulary"] = self.vocabulary
            loss, metrics = linear_cross_entropy(x_ND, head_DV, labels_N, weights_N, self.tp, **how)
        if self.routed:
            metrics["aux_loss"] = stream.aux_loss * weight
            loss += metrics["aux_loss"]
            for name, sums in stream.router.items():
                metrics[f"router/{name}"] = jax.lax.pmean(sums, self.tp) if self.tp else sums
        return loss, weight, metrics

    def layers(self, params: PyTree, stream: Stream, micro: Micro) -> Stream:
        """All blocks, with activation checkpointing by the config's `remat`; gathered parameters are never saved."""
        for stack in self.config.stacks:
            stream = self.stack_layers(stack, params[stack.name], stream, micro)
        return stream

    def stack_layers(self, stack: Stack, blocks: PyTree, stream: Stream, micro: Micro) -> Stream:
        """The blocks of one stack, see `layers`."""
        groups, start, forms = self.config.groups(stack), 0, self.config.forms(stack)
        sums = micro.get("router_sums") if "routed" in stack.pattern else None
        if not self.config.scan:
            number = self.config.mlps[: stack.start].count("routed")
            sums = None if sums is None else sums[number]
            return self.checkpointed(stack, groups[0])(Layer(blocks, form_of(forms, 0), sums), stream, micro)
        for group in groups:
            layer, end = self.checkpointed(stack, group), start + group.layers // len(stack.pattern)
            mine = Layer(blocks, forms, sums)
            if len(groups) > 1:
                mine = jax.tree.map(lambda leaf, start=start, end=end: leaf[start:end], mine)

            def step(stream: Stream, one: Layer, layer: Any = layer) -> tuple[Stream, None]:
                return layer(one, stream, micro), None

            stream, _ = jax.lax.scan(step, stream, mine)
            start = end
        return stream

    def checkpointed(self, stack: Stack, group: Remat) -> Callable[[Layer, Stream, Micro], Stream]:
        """`layer` with activation checkpointing by a group's policy, which never saves gathered parameters."""
        fsdp, layer = self.axis("fsdp"), partial(self.layer, stack)
        if group.base == "none" and not (fsdp and self.plan.zero == 3):
            return layer
        policy = keep_gathers_out(group.policy or jax.checkpoint_policies.everything_saveable, fsdp)
        return jax.checkpoint(layer, policy=policy, prevent_cse=not self.config.scan)

    def _attend(self) -> Attend:
        if not self.cp:
            return self.config.attend
        if self.plan.context == "ring":
            return partial(ring_attention, axis="cp")
        return partial(ulysses_attention, axis="cp", attend=self.config.attend)

    # Serving: prefill and decode with a KV cache.

    def cached_layers(
        self, params: PyTree, x_NTD: Float[Array, "N T D"], cache: Cache, inputs: DecodeInputs
    ) -> tuple[Float[Array, "N T D"], Float[Array, "L N K T h"], Float[Array, "L N K T h"]]:
        """This stage's blocks over a KV cache; also the keys and values of the call's tokens, for `cache.append`.

        The cache is only read. Of its L layers, block i of the pattern in step u of a stack is start + u * period + i.
        """
        steps_T = jnp.arange(x_NTD.shape[1], dtype=jnp.int32)
        positions_NT = inputs.starts[:, None] + steps_T[None]

        def step(stack: Stack, x_NTD: jax.Array, one: tuple) -> tuple[jax.Array, Any]:
            number, layer, forms, adapters = one
            made: list[tuple[jax.Array, jax.Array]] = []

            def attend(i: int) -> Attend:
                def over_cache(q_NTHh: Any, k_NTKh: Any, v_NTKv: Any, form: AttentionForm) -> jax.Array:
                    # The cache has keys and values of one size; zeros change no score and are cut off again.
                    wide_q, wide_k, wide_v = (_widen(x, self.cache_size) for x in (q_NTHh, k_NTKh, v_NTKv))
                    made.append((wide_k.transpose(0, 2, 1, 3), wide_v.transpose(0, 2, 1, 3)))
                    if inputs.read is None:
                        return attention(q_NTHh, k_NTKh, v_NTKv, form)
                    past = self._past(inputs.read, cache, number + i, isinstance(params[stack.name], tuple))
                    y_NTHh = cached_attention(wide_q, wide_k, wide_v, past, inputs.starts, self.cp, form)
                    return y_NTHh[..., : v_NTKv.shape[-1]]

                return over_cache

            layer = dequantize_layer(layer, self.config.dtype, self._stays_quantized)
            chosen = None if adapters is None else (adapters, inputs.adapter)
            layer = Layer(layer, forms, adapters=chosen)
            x_NTD, _ = self.unit(stack, layer, x_NTD, positions_NT, inputs.tokens, attend)
            return x_NTD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)

        pairs = []
        every = {} if inputs.adapter is None else params.get("adapters", {})
        for stack in self.config.stacks:
            period, blocks, adapters = len(stack.pattern), params[stack.name], every.get(stack.name)
            with jax.named_scope("layers"):
                if isinstance(blocks, tuple):  # see `tessera.serving.layout`
                    each, forms, shapes = [], self.config.forms(stack), param_shapes(self.config)[stack.name]
                    for u, layer in enumerate(blocks):
                        given = None if adapters is None else adapters[u]
                        one = (stack.start + period * u, _projections(layer, shapes), form_of(forms, u), given)
                        x_NTD, pair = step(stack, x_NTD, one)
                        each.append(pair)
                    pair = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
                else:
                    units = jax.tree.leaves(blocks)[0].shape[0]
                    numbers = stack.start + period * jnp.arange(units)
                    layers = numbers, blocks, self._forms(stack, units), adapters
                    x_NTD, pair = jax.lax.scan(partial(step, stack), x_NTD, layers)
            pairs.append([leaf.reshape(-1, *leaf.shape[2:]) for leaf in pair])
        k, v = pairs[0] if len(pairs) == 1 else (jnp.concatenate(both) for both in zip(*pairs, strict=True))
        return x_NTD, k, v

    def _past(self, read: Read, cache: Cache, layer: Any, live: bool) -> Past | Blocks:
        """What a layer reads of the cache: on one CPU (`live`) block by block, as far as there are tokens."""
        length = cache.k.shape[3]
        if not live or cache.table is not None or length <= LIVE_BLOCK:
            return read(cache, layer)
        return Blocks(lambda first: read(cache, layer, first, LIVE_BLOCK), LIVE_BLOCK, length)

    def _forms(self, stack: Stack, units: int) -> LayerForm | None:
        """The forms of this stage's units of a stack."""
        forms = self.config.forms(stack)
        if self.pp is None:
            return forms
        first = jax.lax.axis_index(self.pp) * units
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, units), forms)

    # What a plan cannot do.

    def check(self, batch_size: int, length: int) -> None:
        """Refuse a model or a batch that does not divide.

        Raises:
          PlanError: parameters (see `sharding.rules.param_specs`), rows over the data axes and into microbatches,
            tokens over cp (twice for the ring's load balance) and tp, layers over stages, or experts (see
            `check_experts`).
        """
        plan, sizes = self.plan, self.plan.sizes
        _ = self.specs
        if self.routed:
            check_experts(self.config.moe, plan)
        cp, tp = sizes["cp"], sizes["tp"] if self.plan.sequence else 1
        chunks = 2 * cp if plan.context == "ring" and cp > 1 else cp
        ways = math.lcm(chunks, cp * tp)
        if batch_size % plan.data:
            axes = " x ".join(f"{axis}={sizes[axis]}" for axis in self.batch_axes)
            near = nearest_sizes(batch_size, {axis: sizes[axis] for axis in self.batch_axes})
            more = -(-batch_size // plan.data) * plan.data
            raise PlanError(
                f"batch_size={batch_size} does not divide by {axes}; nearest valid: {near}, or batch_size={more}",
                f"batch_size={batch_size} by {' x '.join(self.batch_axes)}",
            )
        if plan.size("pp") > 1:
            self._check_stages(batch_size)
        if length % ways:
            best = max(1, round(length / ways)) * ways
            raise PlanError(
                f"length={length} does not divide into {ways} parts for cp={cp}, tp={tp}; nearest valid: length={best}",
                f"length={length} by cp x tp",
            )
        if plan.context == "all_to_all" and cp > 1 and self.local.heads % cp:
            raise PlanError(
                f"context='all_to_all' splits the {self.local.heads} heads of a tp device over cp={cp}; "
                f"nearest valid: {nearest_sizes(self.local.heads, {'cp': cp})}, or context='ring'",
                f"{self.config.heads} heads by cp x tp",
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
        split_layers(self.units, stages, self.plan.virtual)
        if rows % parts:
            valid = [n for n in range(stages, rows + 1) if rows % n == 0]
            near = min(valid, key=lambda n: abs(n - parts), default=None)
            choose = f"batch_size={self.plan.data * parts}" if near is None else f"microbatches={near}"
            raise PlanError(
                f"plan {self.plan.axes!r}: batch_size={batch_size} over {self.plan.data} data copies leaves {rows} "
                f"rows, which do not divide into microbatches={parts} of {stages} stages; nearest valid: {choose}",
                "rows of a data copy by microbatches",
            )


def _widen(x: jax.Array, size: int) -> jax.Array:
    """Zeros behind the last axis, up to a size."""
    return x if x.shape[-1] == size else jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])


def sizes_of_params(plan: Plan) -> tuple[tuple[str, int], ...]:
    """The axes that split parameters, by which many plans are alike."""
    named = {axis for _, axes in plan.rules.params for axis in ((axes,) if isinstance(axes, str) else axes)}
    return tuple((axis, size) for axis, size in plan.sizes.items() if axis in named)


@functools.lru_cache(maxsize=4096)  # a search looks at thousands of plans, and hundreds of ways to split parameters
def _param_specs(config: TransformerConfig, sizes: tuple[tuple[str, int], ...], rules: Rules, zero: int) -> Any:
    """`param_specs`, or the error that it raises."""
    try:
        return param_specs(param_shapes(config), dict(sizes), rules, zero=zero)
    except PlanError as error:
        return error


def check_experts(config: MoEConfig, plan: Plan) -> None:
    """Refuse routed experts whose numbers under the plan would differ from those of one device.

    Noise (jitter, the routers of `NOISY`) is drawn by every device for its own tokens, and a capacity is that of every
    device's own tokens (under stages of a microbatch): the numbers of one device with so many times more
    `mixture.groups`.

    Raises:
      PlanError: a router that looks at other tokens, expert dropout, noise under pipeline stages, sequences split over
        cp.
    """
    router, pp = config.router, plan.size("pp") > 1
    split_time = plan.size("cp") > 1 and config.balance and config.balance_scope == "sequence"
    wrong = {
        f"router.name={router.name!r} (choose one of {', '.join(ROUTERS)})": router.name not in ROUTERS,
        f"router.name={router.name!r} with pp > 1, where no noise is drawn": pp and router.name in NOISY,
        f"router.jitter={router.jitter} with pp > 1, where no noise is drawn": pp and router.jitter,
        f"mixture.dropout={config.mixture.dropout}": config.mixture.dropout,
        "balance_scope='sequence' with cp > 1 (choose 'batch')": split_time,
    }
    for setting, refused in wrong.items():
        if refused:
            raise PlanError(f"plan {plan.axes!r} and moe.{setting}: not the same numbers as on one device")


def make_loss(decoder: ShardedDecoder, mesh: Mesh | AbstractMesh) -> LossFn:
    """`loss(params, batch, key)` as `tessera.models.lm_loss.lm_loss` gives it, under a plan without pipeline stages.

    Args:
      decoder: model and plan.
      mesh: from `sharding.mesh`.
    """
    axes = decoder.token_axes

    def local_loss(params: PyTree, batch: Micro, key: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        stream = decoder.layers(params, decoder.begin(params, batch, key), batch)
        loss, weight, metrics = decoder.head_loss(params, stream, batch)
        with jax.named_scope("loss"):
            loss, weight, metrics = jax.lax.psum(vary_all((loss, weight, metrics), axes), axes)
        sums = {name: metrics.pop(name) for name in ("router/sums",) if name in metrics}
        loss, metrics = jax.tree.map(lambda total: total / weight, (loss, metrics))
        return loss, metrics | sums

    def specs(batch: Micro) -> Any:
        rows, same = PartitionSpec(decoder.batch_axes or None), PartitionSpec()
        return decoder.specs, {name: same if name == "router_sums" else rows for name in batch}, same

    def loss_fn(params: PyTree, batch: Micro, key: Any = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        micro = micro_of(batch, decoder)
        sharded = jax.shard_map(local_loss, mesh=mesh, in_specs=specs(micro), out_specs=PartitionSpec())
        loss, metrics = sharded(params, micro, key if decoder.routed else None)
        return loss, router_metrics(metrics) | padding_share(batch)

    return loss_fn


def micro_of(batch: Micro, decoder: ShardedDecoder) -> Micro:
    """What the decoder's functions look at in a batch, its weights scaled to mean one."""
    sums = ("router_sums",) if decoder.routed and decoder.config.moe.whole_batch else ()
    names = ("tokens", "positions", "mean_weights", "mean_live", *sums)
    return {name: value for name, value in with_mean_weights(batch).items() if name in names}


def asks_for_sums(micro: Micro) -> bool:
    """Whether the sums of routers are asked for, see `tessera.models.lm_loss.lm_loss`."""
    return "router_sums" in micro and micro["router_sums"] is None


def vary_all(tree: PyTree, axes: tuple[str, ...]) -> PyTree:
    """`vary` every leaf over the axes: a count that is a constant varies over no axis until it is told to."""
    return jax.tree.map(lambda x: vary(jnp.asarray(x), axes), tree)


def state_shardings(decoder: ShardedDecoder, mesh: Mesh, state: PyTree) -> PyTree:
    """Shardings of a train state: parameters by the plan; moments and averages over fsdp whatever `zero` is.

    Args:
      decoder: model and plan.
      mesh: from `sharding.mesh.make_mesh`.
      state: `tessera.step.TrainState` of arrays or shapes.
    """
    specs = mirrored_specs(state, param_shapes(decoder.config), decoder.stored(3))
    if state.frozen is not None:  # adapters are replicated, the model that they belong to is not
        return shardings(mesh, specs.replace(frozen={name: decoder.specs for name in state.frozen}))
    return shardings(mesh, specs.replace(params=decoder.specs))


def batch_sharding(decoder: ShardedDecoder, mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data axes."""
    return NamedSharding(mesh, PartitionSpec(decoder.batch_axes or None))


def _projections(layer: PyTree, stacked: PyTree) -> PyTree:
    """A block's parameters with a `RowProjection` in place of every `RowKernel`; `stacked` are the stack's shapes."""

    def one(path: tuple, node: Any, shape: Any) -> Any:
        if not isinstance(node, RowKernel):
            return node
        axes = kernel_axes(path)
        assert axes is not None
        return RowProjection(node, shape.shape[1:], len(axes.inputs))

    is_leaf = lambda node: isinstance(node, RowKernel) or is_quantized(node)  # noqa: E731
    return jax.tree_util.tree_map_with_path(one, layer, stacked, is_leaf=is_leaf)


def _adapted(params: PyTree, adapters: PyTree, adapter_N: jax.Array) -> PyTree:
    """A block's parameters with an `AdaptedProjection` in place of every kernel that has adapters."""
    if set(adapters) == {"a", "b"}:
        return AdaptedProjection(params, adapters["a"], adapters["b"], adapter_N)
    return {**params, **{name: _adapted(params[name], one, adapter_N) for name, one in adapters.items()}}


def dequantize_layer(layer: PyTree, dtype: str, keep: Callable[[str], bool] = lambda path: False) -> PyTree:
    """A block's parameters with float kernels in place of quantized ones.

    Args:
      layer: parameters of one block.
      dtype: of the float kernels.
      keep: path of a quantized kernel -> whether the grouped matmul of experts takes it as it is.
    """

    def convert(path: tuple, node: Any) -> Any:
        if not is_quantized(node):
            return node
        if keep(path_name(path)) and node.zeros is None and node.groups is None:
            return Quantized(node.values, node.scales, None if node.channel is None else node.channel[..., 0])
        return dequantize(node, DTYPES[dtype])

    return jax.tree_util.tree_map_with_path(convert, layer, is_leaf=is_quantized)
