"""A decoder's kernels in 8 or 4 bits: calibration on text, one block after the other, and how they lie under a plan.

Quantised are the projections of attention and the feed-forward kernels, dense or of experts; embedding, head, norms
and routers stay as they are. Axes: N rows of text, T tokens, D width, H query heads, h head dimension, F feed-forward
width, E experts, I and O inputs and outputs of a kernel.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int, PyTree

from sharding.errors import PlanError
from sharding.inference.quantize import (
    Calibration,
    QuantConfig,
    Quantized,
    is_quantized,
    quantize_matrix,
)
from tessera.compress.statistics import gather, kernels, run, statistics_of
from tessera.lm.warm_start import join_blocks, split_blocks
from tessera.models.lm_loss import replaced
from tessera.models.transformer import TransformerConfig
from tessera.optim.param_axes import Axes, kernel_axes
from tessera.parallel.decoder import ShardedDecoder, dequantize_layer
from tessera.serving.multi_lora import adapter_specs


def quantise_decoder(
    params: Mapping[str, Any],
    config: TransformerConfig,
    how: QuantConfig,
    calibration_NT: Int[Array, "N T"] | Int[np.ndarray, "N T"] | None = None,
) -> PyTree:
    """The decoder's parameters with every projection and feed-forward kernel as `Quantized`.

    A block's kernels see what the blocks before it compute once quantised (Frantar et al. 2022, section 4, setup).

    Args:
      params: float parameters of a decoder of `config`.
      config: the model; `serve` takes the result.
      how: bits, method and group.
      calibration_NT: text, for "awq" and "gptq".

    Raises:
      ValueError: a method that needs calibration text without any; a group that does not divide a kernel's inputs.
    """
    if how.method != "rtn" and (config.latent.kv_rank or not {"swiglu", "routed"}.issuperset(config.mlps)):
        raise ValueError(f"method={how.method!r}: latent attention and mlp={config.mlp!r} are quantized by 'rtn' only")
    if how.method != "rtn" and calibration_NT is None:
        raise ValueError(f"method={how.method!r} needs calibration text")
    blocks = split_blocks(params, config)
    plain_config = replace(config, dtype="float32", remat="none")
    x_NTD: Any = None
    if calibration_NT is not None:
        x_NTD = config.embedded(jnp.asarray(params["embed"]["table"])[jnp.asarray(calibration_NT)])
    made = []
    for i, block in enumerate(blocks):
        mlp = config.mlps[i]
        seen = {}
        if x_NTD is not None and how.method != "rtn":
            seen = gather(block, x_NTD, calibration_NT, plain_config, mlp, config.form(i))
        small = _quantise_block(block, how, seen)
        made.append(small)
        if seen:
            plain = dequantize_layer(small, "float32")
            x_NTD = run(plain, x_NTD, calibration_NT, plain_config, mlp, config.form(i))
    return join_blocks(params, made, config)


def _quantized_axes(path: tuple) -> Axes | None:
    """Axes of a kernel that is quantized, None for every other leaf."""
    names = [str(entry.key) for entry in path]
    inside = {"attention", "mlp"}.intersection(names)
    return kernel_axes(path) if names[-1] == "kernel" and "router" not in names and inside else None


def quantized_shapes(shapes: PyTree, how: QuantConfig) -> PyTree:
    """Shapes of a decoder's parameters with those of `Quantized` in place of every kernel that is quantized.

    Raises:
      ValueError: a group that does not divide a kernel's inputs.
    """

    def one(path: tuple, leaf: Any) -> Any:
        axes = _quantized_axes(path)
        if axes is None:
            return leaf
        stack = leaf.shape[: min(axes.inputs)]  # layers and experts
        into, groups, out = _groups(leaf.shape[len(stack) :], how, len(axes.inputs))
        parts = {"values": ((*into, *out), jnp.int4 if how.bits == 4 else jnp.int8)}
        parts["scales"] = ((*groups, *out), jnp.float32)
        if how.method == "awq":
            parts["channel"] = ((*into, *(1,) * len(out)), jnp.float32)
        made = {name: jax.ShapeDtypeStruct((*stack, *shape), dtype) for name, (shape, dtype) in parts.items()}
        return Quantized(**made)

    return jax.tree_util.tree_map_with_path(one, shapes)


def _quantise_block(block: Mapping[str, Any], how: QuantConfig, seen: Mapping[str, Any]) -> PyTree:
    made = dict(block)
    for names, leaf, inputs in kernels(block):
        statistics = statistics_of(seen, names)
        if "experts" in names:
            each = statistics or [None] * leaf.shape[0]
            leaf = _stack([_quantise(leaf[e], how, inputs, each[e]) for e in range(leaf.shape[0])])
        else:
            leaf = _quantise(leaf, how, inputs, statistics)
        made = replaced(made, names, leaf)
    return made


def _stack(members: list[Quantized]) -> Quantized:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *members)


def _quantise(kernel: Any, how: QuantConfig, count: int, seen: Calibration | None) -> Quantized:
    """A kernel of `count` input axes [inputs..., outputs...]; a group never spans two of the last input axis' rows."""
    into, groups, out = _groups(np.shape(kernel), how, count)
    flat = np.asarray(kernel, np.float64).reshape(int(np.prod(into)), int(np.prod(out)))
    found = quantize_matrix(flat, how, seen)
    channel = None if found.channel is None else found.channel.reshape(*into, *(1,) * len(out))
    return Quantized(found.values.reshape(*into, *out), found.scales.reshape(*groups, *out), channel)


def _groups(shape: tuple[int, ...], how: QuantConfig, count: int) -> tuple[tuple[int, ...], ...]:
    """Sizes of a kernel's input axes, the numbers of groups along them, and sizes of its output axes."""
    into, out = shape[:count], shape[count:]
    if how.group and into[-1] % how.group:
        raise ValueError(f"group={how.group} does not divide the last input axis of a kernel {shape}")
    return into, (*into[:-1], into[-1] // how.group) if how.group else (1,) * count, out


def quantized_specs(params: PyTree, decoder: ShardedDecoder) -> PyTree:
    """Partition of every array of served parameters: a quantized kernel's values, scales and factors like the kernel.

    That of "adapters", if there are any, is from `tessera.serving.multi_lora.adapter_specs`.

    Raises:
      PlanError: groups that do not divide by the mesh axes that split the kernel's inputs.
    """

    def one(node: Any, spec: PartitionSpec) -> Any:
        if not is_quantized(node):
            return spec

        def cut(array: Any, spec: PartitionSpec = spec) -> PartitionSpec | None:
            if array is None:
                return None
            entries = [None if size == 1 else entry for size, entry in zip(array.shape, spec, strict=False)]
            for size, entry in zip(array.shape, entries, strict=False):
                ways = 1
                for axis in (entry,) if isinstance(entry, str) else entry or ():
                    ways *= decoder.plan.size(axis)
                if size % ways:
                    raise PlanError(f"scales {array.shape} of a quantised kernel do not divide by {entry}={ways}")
            return PartitionSpec(*entries)

        of_groups = spec
        if node.groups is not None:  # every device has the scales of all groups
            entries, count = (*spec, *[None] * (node.values.ndim - len(spec))), node.values.ndim - node.groups.ndim
            of_groups = PartitionSpec(*entries[: node.scales.ndim - 1 - count], None, *entries[-count:])
        return Quantized(
            cut(node.values),
            cut(node.scales, of_groups),
            cut(node.channel),
            cut(node.zeros, of_groups),
            cut(node.groups),
        )

    model = {name: part for name, part in params.items() if name != "adapters"}
    specs = jax.tree.map(one, model, decoder.specs, is_leaf=is_quantized)
    return specs | {name: adapter_specs(params[name], decoder.specs) for name in params.keys() - model.keys()}
