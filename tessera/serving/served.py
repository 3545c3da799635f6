"""A trained decoder made ready for inference: its parameters, and the `ShardedDecoder` that prefills and decodes."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from moe.gate import RouterConfig
from moe.layer import MoEConfig, serving
from sharding.errors import PlanError, nearest_sizes
from sharding.inference.quantize import is_quantized
from sharding.plan import Plan
from sharding.rules import path_name
from tessera.lm.warm_start import join_blocks, split_blocks
from tessera.models.transformer import DTYPES, TransformerConfig
from tessera.parallel.decoder import ShardedDecoder

FLOAT32 = r"(^|/)router/|/gain$|^adapters/"  # routers choose in float32, the others are small


def serve(
    params: Mapping[str, Any], config: TransformerConfig, plan: Plan, dtype: str = ""
) -> tuple[PyTree, ShardedDecoder]:
    """Parameters and model as they are served under a plan.

    Blocks are stacked, key/value heads repeated and the vocabulary padded where tp does not divide them, latent
    attention caches latents, what is for training only (capacity, noise, auxiliary losses, recomputation) is off, and
    kernels have the compute dtype.

    Args:
      params: of a decoder of `config`, any float dtype, on any device; beside its parts there may be "adapters", from
        `tessera.lm.lora.stack`.
      config: the model.
      plan: all its sizes known (see `Plan.fill`).
      dtype: "float32" or "bfloat16"; "" keeps the model's.

    Raises:
      PlanError: heads, layers or experts that do not divide; first dense layers with pp.
      ValueError: a router that looks ahead (refused by `TransformerConfig` already).
    """
    if config.first_dense and plan.size("pp") > 1:
        raise PlanError(
            f"plan {plan.axes!r}: moe.first_k_dense_replace={config.first_dense} is served without pp: the stages of a "
            "KV cache have equally many layers, and the first dense ones are all on one"
        )
    tp = plan.size("tp")
    params = join_blocks(params, split_blocks(params, config), replace(config, scan=True))
    config = replace(config, scan=True, remat="none", dtype=dtype or config.dtype, kv_heads=config.kv_size)
    config = replace(config, moe=tokenwise(config.moe), ff=config.ff_size)
    config = replace(config, head_dim=0 if config.latent.kv_rank else config.head_size)
    config = replace(config, latent=replace(config.latent, absorbed=config.latent.kv_rank > 0))
    if config.heads % tp:
        near = nearest_sizes(config.heads, {"tp": tp})
        raise PlanError(f"plan {plan.axes!r}: {config.heads} heads do not divide by tp={tp}; nearest valid: {near}")
    if config.kv_size % tp:
        times = tp // math.gcd(tp, config.kv_size)
        params, config = repeat_heads(params, times), replace(config, kv_heads=config.kv_size * times)
    vocabulary = config.vocab_size
    if more := -vocabulary % tp:
        params, config = pad_vocabulary(params, more), replace(config, vocab_size=vocabulary + more)

    def cast(path: tuple, leaf: Any) -> Any:
        unchanged = is_quantized(leaf) or re.search(FLOAT32, path_name(path))
        return leaf if unchanged else jnp.asarray(leaf, DTYPES[config.dtype])

    decoder = ShardedDecoder(config, replace(plan, sequence=False), padded_from=vocabulary if more else 0)
    if not decoder.even_stages:
        near = nearest_sizes(decoder.units, {"pp": plan.size("pp")})
        raise PlanError(f"plan {plan.axes!r}: {decoder.units} layers do not divide by pp; nearest valid: {near}")
    _ = decoder.specs
    return jax.tree_util.tree_map_with_path(cast, params, is_leaf=is_quantized), decoder


def repeat_heads(params: PyTree, times: int) -> PyTree:
    """Every key/value head `times` times: the same model, with a copy for each device that needs it."""

    def repeat(path: tuple, leaf: Any) -> Any:
        if not re.search(r"attention/(key|value)/(kernel|bias|gain|kernel/b)$", path_name(path)):
            return leaf
        if not is_quantized(leaf):
            return jnp.repeat(leaf, times, axis=-2)

        def each(array: Any) -> Any:
            return array if array is None or array.shape[-2] != leaf.values.shape[-2] else jnp.repeat(array, times, -2)

        return leaf._replace(values=each(leaf.values), scales=each(leaf.scales), zeros=each(leaf.zeros))

    return jax.tree_util.tree_map_with_path(repeat, params, is_leaf=is_quantized)


def pad_vocabulary(params: PyTree, more: int) -> PyTree:
    """So many rows of zeros behind the embedding table, and columns behind the head if there is one."""

    def pad(path: tuple, leaf: Any) -> Any:
        at = {"embed/table": 0, "head/kernel": 1}.get(path_name(path))
        return leaf if at is None else jnp.pad(leaf, [(0, more if i == at else 0) for i in range(leaf.ndim)])

    return jax.tree_util.tree_map_with_path(pad, params, is_leaf=is_quantized)


def tokenwise(moe: MoEConfig) -> MoEConfig:
    """The layer without what it does in training only: every token is treated by itself and nothing is dropped."""
    mixture = replace(serving(moe.mixture), dropout=0.0)
    router: RouterConfig = replace(moe.router, jitter=0.0)
    return replace(moe, router=router, mixture=mixture, balance=0.0, importance=0.0, load=0.0, z=0.0, bias_rate=0.0)
