"""A decoder as it is served: what its parameters become under a plan, and its functions on one device's part.

The layers are the ordinary `tessera.models.transformer.Block`, with attention that reads a cache. Axes: N rows, T
tokens of a row, D width, V vocabulary, L layers, K key/value heads, h head dimension; inside shard_map one device's
sizes.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from moe.gate import RouterConfig
from moe.layer import MoEConfig, serving
from sharding.errors import PlanError, nearest_divisor
from sharding.inference.attention import cached_attention
from sharding.inference.kv_cache import Cache, CacheConfig, Read
from sharding.inference.quantize import is_quantized
from sharding.plan import DATA_AXES, Plan
from sharding.rules import param_specs, path_name
from sharding.tensor_parallel import INSIDE, RESIDUAL, explicit, gather_params
from sharding.vocab_parallel import lookup
from tessera.lm.warm_start import join_blocks, split_blocks
from tessera.models.layers import attention, rms_norm
from tessera.models.transformer import DTYPES, Block, Decoder, TransformerConfig, feed_forward
from tessera.parallel.moe import SplitMoE
from tessera.serving.quantized import dequantise_layer, quantised_specs

KEPT = r"(^|/)router/|/gain$"  # stays float32: routers choose in it, gains are small


class Work(NamedTuple):
    """Tokens of a call [N, T], the position [N] of each row's first, and how to read the rows' cache (None: empty)."""

    tokens: Any
    starts: Any
    read: Read | None


@dataclass(frozen=True)
class Served:
    """A decoder under a plan.

    Attributes:
      config: the model as it is served, from `serve`: blocks scanned, key/value heads repeated up to tp.
      plan: how it is split.
      platform: what is compiled for; "" is the default backend's.
    """

    config: TransformerConfig
    plan: Plan
    platform: str = ""

    @property
    def tp(self) -> str | None:
        """The tensor-parallel axis, None if the plan has none."""
        return next(iter(self.plan.present("tp")), None)

    @property
    def cp(self) -> str | None:
        """The axis that splits positions of the cache."""
        return next(iter(self.plan.present("cp")), None)

    @property
    def pp(self) -> str | None:
        """The axis of pipeline stages."""
        return next(iter(self.plan.present("pp")), None)

    @property
    def data_axes(self) -> tuple[str, ...]:
        """Axes that split the slots."""
        return self.plan.present(*DATA_AXES)

    @property
    def local(self) -> TransformerConfig:
        """The config of one device's part of a block."""
        c, tp = self.config, self.plan.size("tp")
        return replace(c, heads=c.heads // tp, kv_heads=c.kv_size // tp, head_dim=c.head_size, ff=c.ff_size // tp)

    @cached_property
    def specs(self) -> PyTree:
        """Partition of every parameter; PlanError where one does not divide."""
        return param_specs(shapes(self.config), self.plan.sizes, self.plan.rules, zero=self.plan.zero)

    def cache(self, slots: int, length: int, dtype: str = "") -> CacheConfig:
        """Sizes of a cache for this model; its dtype is the model's unless given."""
        c = self.config
        return CacheConfig(c.layers, slots, c.kv_size, length, c.head_size, dtype or c.dtype)

    def specs_for(self, params: PyTree) -> PyTree:
        """`specs` with those of quantised kernels in place of plain ones."""
        return quantised_specs(params, self.specs, self.plan.sizes)

    def embed(self, params: PyTree, tokens_NT: Int[Array, "N T"]) -> Float[Array, "N T D"]:
        """Rows of the table, in the compute dtype."""
        table_VD = self._whole({"embed": params["embed"]}, {"embed": self.specs["embed"]})["embed"]["table"]
        with jax.named_scope("embed"):
            x_NTD = explicit(self.tp, False)(lookup(tokens_NT, table_VD, self.tp), RESIDUAL)
        return x_NTD.astype(DTYPES[self.config.dtype])

    def layers(
        self, params: PyTree, x_NTD: Float[Array, "N T D"], cache: Cache, work: Work
    ) -> tuple[Float[Array, "N T D"], Float[Array, "L N K T h"], Float[Array, "L N K T h"]]:
        """This stage's blocks; also the keys and values of the call's tokens, for `cache.append`.

        The cache is only read. Of its L layers, pattern position i of unit u is layer u * period + i.
        """
        period = len(self.config.pattern)
        steps_T = jnp.arange(x_NTD.shape[1], dtype=jnp.int32)
        positions_NT = work.starts[:, None] + steps_T[None]

        def unit(x_NTD: jax.Array, one: tuple) -> tuple[jax.Array, Any]:
            number, layer = one
            made: list[tuple[jax.Array, jax.Array]] = []
            layer = self._whole(dequantise_layer(layer, self.config.dtype), self._layer_specs)
            for i, mlp in enumerate(self.config.pattern):
                block = Block(
                    self.local,
                    explicit(self.tp, False),
                    self._attend(cache, number * period + i, work, made),
                    mlp,
                    self._feed,
                )
                part = layer if period == 1 else layer[f"layer_{i}"]
                x_NTD, _ = block.apply({"params": part}, x_NTD, positions_NT, work.tokens)
            return x_NTD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)

        units = jax.tree.leaves(params["blocks"])[0].shape[0]
        with jax.named_scope("layers"):
            x_NTD, pair = jax.lax.scan(unit, x_NTD, (jnp.arange(units), params["blocks"]))
        k, v = (leaf.reshape(-1, *leaf.shape[2:]) for leaf in pair)
        return x_NTD, k, v

    def logits(self, params: PyTree, x_NTD: Float[Array, "N T D"]) -> Float[Array, "N T V"]:
        """float32 logits, this device's part of the vocabulary."""
        names = ("final_norm", "embed" if self.config.tied else "head")
        own = self._whole({name: params[name] for name in names}, {name: self.specs[name] for name in names})
        with jax.named_scope("head"):
            x_NTD = rms_norm(x_NTD, own["final_norm"]["gain"], self.config.norm_eps)
            x_NTD = explicit(self.tp, False)(x_NTD, INSIDE)
            head_DV = own["embed"]["table"].T if self.config.tied else own["head"]["kernel"]
            product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            return product("ntd,dv->ntv", x_NTD, head_DV.astype(x_NTD.dtype))

    @cached_property
    def _layer_specs(self) -> PyTree:
        is_spec = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
        return jax.tree.map(lambda spec: PartitionSpec(*spec[1:]), self.specs["blocks"], is_leaf=is_spec)

    def _whole(self, params: PyTree, specs: PyTree) -> PyTree:
        fsdp = next(iter(self.plan.present("fsdp")), None)
        if fsdp is None or self.plan.zero != 3:
            return params
        return gather_params(params, specs, DTYPES[self.config.dtype], fsdp=fsdp)

    def _attend(self, cache: Cache, layer: Any, work: Work, made: list[tuple[jax.Array, jax.Array]]) -> Any:
        def attend(q_NTHh: jax.Array, k_NTKh: jax.Array, v_NTKh: jax.Array) -> jax.Array:
            made.append((k_NTKh.transpose(0, 2, 1, 3), v_NTKh.transpose(0, 2, 1, 3)))
            if work.read is None:
                return attention(q_NTHh, k_NTKh, v_NTKh)
            return cached_attention(q_NTHh, k_NTKh, v_NTKh, work.read(cache, layer), work.starts, self.cp)

        return attend

    def _feed(self, config: TransformerConfig, mlp: str, name: str) -> nn.Module:
        if mlp != "routed" or not self.plan.present("tp", "ep"):
            return feed_forward(replace(config, ff=self.local.ff_size), mlp, name)
        moe = self.config.moe
        ff = moe.width_of(self.config.ff_size)
        return SplitMoE(moe, self.plan, config.width, ff, (), self.platform, name=name)


def serve(params: Mapping[str, Any], config: TransformerConfig, plan: Plan, dtype: str = "") -> tuple[PyTree, Served]:
    """Parameters and model as they are served under a plan.

    Blocks are stacked, key/value heads repeated where there are fewer than tp, what is for training only (capacity,
    noise, auxiliary losses, recomputation) is off, and kernels have the compute dtype.

    Args:
      params: of a decoder of `config`, any float dtype, on any device.
      config: the model.
      plan: all its sizes known (see `Plan.fill`).
      dtype: "float32" or "bfloat16"; "" keeps the model's.

    Raises:
      PlanError: heads, layers, experts or vocabulary that do not divide; a router that cannot be split.
      ValueError: a router that looks ahead (refused by `TransformerConfig` already).
    """
    tp = plan.size("tp")
    params = join_blocks(params, split_blocks(params, config), replace(config, scan=True))
    config = replace(config, scan=True, remat="none", dtype=dtype or config.dtype, kv_heads=config.kv_size)
    config = replace(config, moe=tokenwise(config.moe), head_dim=config.head_size, ff=config.ff_size)
    if config.heads % tp:
        near = nearest_divisor(config.heads, tp)
        raise PlanError(f"plan {plan.axes!r}: {config.heads} heads do not divide by tp={tp}; nearest valid: tp={near}")
    if "routed" in config.pattern and plan.present("tp", "ep"):
        if config.moe.biases and tp > 1:
            raise PlanError(f"plan {plan.axes!r}: experts with biases run without tp only")
    if tp > config.kv_size:
        if tp % config.kv_size:
            near = nearest_divisor(config.heads, config.kv_size)
            raise PlanError(
                f"plan {plan.axes!r}: tp={tp} is no multiple of kv_heads={config.kv_size}; nearest valid: tp={near}"
            )
        params = repeat_heads(params, tp // config.kv_size)
        config = replace(config, kv_heads=tp)

    def cast(path: tuple, leaf: Any) -> Any:
        kept = is_quantized(leaf) or re.search(KEPT, path_name(path))
        return leaf if kept else jnp.asarray(leaf, DTYPES[config.dtype])

    served = Served(config, plan)
    _ = served.specs
    return jax.tree_util.tree_map_with_path(cast, params, is_leaf=is_quantized), served


def repeat_heads(params: PyTree, times: int) -> PyTree:
    """Every key/value head `times` times: the same model, with a copy for each device that needs it."""

    def repeat(path: tuple, leaf: Any) -> Any:
        if not re.search(r"attention/(key|value)/kernel$", path_name(path)):
            return leaf
        if not is_quantized(leaf):
            return jnp.repeat(leaf, times, axis=-2)
        scales = jnp.repeat(leaf.scales, times, axis=-2) if leaf.scales.shape[-2] > 1 else leaf.scales
        return leaf._replace(values=jnp.repeat(leaf.values, times, axis=-2), scales=scales)

    return jax.tree_util.tree_map_with_path(repeat, params, is_leaf=is_quantized)


def tokenwise(moe: MoEConfig) -> MoEConfig:
    """The layer without what it does in training only: every token is treated by itself and nothing is dropped."""
    mixture = replace(serving(moe.mixture), dropout=0.0)
    router: RouterConfig = replace(moe.router, jitter=0.0)
    return replace(moe, router=router, mixture=mixture, balance=0.0, importance=0.0, load=0.0, z=0.0, bias_rate=0.0)


@functools.lru_cache(maxsize=16)
def shapes(config: TransformerConfig) -> PyTree:
    """Shapes of a decoder's parameters."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]
