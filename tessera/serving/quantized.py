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
from jaxtyping import Array, Float, Int, PyTree

from moe.gate import gate
from sharding.attention import AttentionForm
from sharding.errors import PlanError
from sharding.inference.quantize import (
    Calibration,
    QuantConfig,
    Quantized,
    is_quantized,
    observe,
    quantize_matrix,
)
from tessera.lm.warm_start import join_blocks, split_blocks
from tessera.models.transformer import Block, LayerForm, TransformerConfig, attention, project_qkv
from tessera.optim.param_axes import kernel_axes
from tessera.parallel.decoder import ShardedDecoder, dequantize_layer


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
    x_NTD = None
    if calibration_NT is not None:
        x_NTD = config.embedded(jnp.asarray(params["embed"]["table"])[jnp.asarray(calibration_NT)])
    made = []
    for i, block in enumerate(blocks):
        mlp = config.mlps[i]
        seen = {}
        if x_NTD is not None and how.method != "rtn":
            seen = watch(block, x_NTD, calibration_NT, plain_config, mlp, config.form(i))
        small = _quantise_block(block, how, seen)
        made.append(small)
        if seen:
            plain = dequantize_layer(small, "float32")
            x_NTD = _run(plain_config, mlp, config.form(i))(plain, x_NTD, jnp.asarray(calibration_NT))
    return join_blocks(params, made, config)


def _run(config: TransformerConfig, mlp: str, form: LayerForm) -> Any:
    @jax.jit
    def run(block: PyTree, x_NTD: jax.Array, tokens_NT: jax.Array) -> jax.Array:
        positions_NT = jnp.broadcast_to(jnp.arange(x_NTD.shape[1], dtype=jnp.int32)[None], x_NTD.shape[:2])
        return Block(config, mlp=mlp).apply({"params": block}, x_NTD, positions_NT, tokens_NT, form)[0]

    return run


def watch(
    block: Mapping[str, Any],
    x_NTD: Float[Array, "N T D"],
    tokens_NT: Any,
    config: TransformerConfig,
    mlp: str,
    form: LayerForm,
) -> dict[str, Any]:
    """What every kernel of a block reads: name -> `Calibration`, or one per expert."""
    a, positions = block["attention"], jnp.arange(x_NTD.shape[1], dtype=jnp.int32)
    positions_NT = jnp.broadcast_to(positions[None], x_NTD.shape[:2])

    def norm(name: str, x: jax.Array, position: str) -> jax.Array:
        here, both = config.norm_position == position, config.norm_position == "both"
        suffix = "_post_norm" if both and position == "post" else "_norm"
        return config.norm(x, jnp.asarray(block[f"{name}{suffix}"]["gain"])) if here or both else x

    y_NTD = norm("attention", x_NTD, "pre")
    projected = project_qkv(jax.tree.map(jnp.asarray, a), y_NTD, positions_NT, config, form)
    sinks_H = jnp.asarray(a["sinks"]["logit"]) if config.sinks else None
    mixed_NTHh = attention(
        *projected, AttentionForm(form.window, sinks_H, config.score_scale, config.attention_softcap)
    )
    inner = observe(y_NTD.reshape(-1, config.width))
    seen: dict[str, Any] = dict.fromkeys(("query", "key", "value"), inner)
    seen["output"] = observe(mixed_NTHh.reshape(-1, config.heads * config.head_size))
    added_NTD = jnp.einsum("nthk,hkd->ntd", mixed_NTHh, jnp.asarray(a["output"]["kernel"]))
    if config.output_bias:
        added_NTD += jnp.asarray(a["output_bias"]["bias"])[None, None]
    x_NTD = x_NTD + norm("attention", added_NTD, "post")
    y_MD = norm("mlp", x_NTD, "pre").reshape(-1, config.width)
    if mlp != "routed":
        seen |= _watch_feed(block["mlp"], y_MD)
        return seen
    if not replace(config.moe, shared=0, shared_gate=False).plain:
        raise ValueError("experts are quantised with calibration if they are SwiGLU without biases; use method='rtn'")
    router = jax.tree.map(jnp.asarray, block["mlp"].get("router", {}))
    routing = gate(router, y_MD, config.moe.router, tokens_N=jnp.asarray(tokens_NT).reshape(-1))
    chosen_MK, experts = np.asarray(routing.experts_NK), block["mlp"]["experts"]
    each = []
    for e in range(config.moe.router.experts):
        one = jax.tree.map(lambda leaf: leaf[e], experts)  # noqa: B023
        each.append(_watch_feed(one, y_MD[np.flatnonzero((chosen_MK == e).any(1))]))
    seen["experts"] = {name: [found[name] for found in each] for name in ("gate", "up", "down")}
    if "shared" in block["mlp"]:
        seen["shared"] = _watch_feed(block["mlp"]["shared"], y_MD)
    return seen


def _watch_feed(layer: Mapping[str, Any], y_MD: Float[Array, "M D"]) -> dict[str, Calibration]:
    gate_DF, up_DF = (jnp.asarray(layer[name]["kernel"]) for name in ("gate", "up"))
    outer, hidden_MF = observe(y_MD), jax.nn.silu(y_MD @ gate_DF) * (y_MD @ up_DF)
    return {"gate": outer, "up": outer, "down": observe(hidden_MF)}


def _quantise_block(block: Mapping[str, Any], how: QuantConfig, seen: Mapping[str, Any]) -> PyTree:
    def one(path: tuple, leaf: Any) -> Any:
        names = [str(entry.key) for entry in path]
        if names[-1] != "kernel" or "router" in names or names[0] not in ("attention", "mlp"):
            return leaf
        axes = kernel_axes(path)
        assert axes is not None
        found = seen.get(names[1], seen)
        statistics = found.get(names[-2]) if isinstance(found, Mapping) else found
        if "experts" in names:
            each = statistics or [None] * leaf.shape[0]
            return _stack([_quantise(leaf[e], how, axes.inputs, each[e]) for e in range(leaf.shape[0])])
        return _quantise(leaf, how, axes.inputs, statistics)

    return jax.tree_util.tree_map_with_path(one, block)


def _stack(members: list[Quantized]) -> Quantized:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *members)


def _quantise(kernel: Any, how: QuantConfig, inputs: tuple[int, ...], seen: Calibration | None) -> Quantized:
    """A kernel [inputs..., outputs...]; a group never spans two of the last input axis' rows."""
    shape, count = np.shape(kernel), len(inputs)
    into, out = shape[:count], shape[count:]
    if how.group and into[-1] % how.group:
        raise ValueError(f"group={how.group} does not divide the last input axis of a kernel {shape}")
    flat = np.asarray(kernel, np.float64).reshape(int(np.prod(into)), int(np.prod(out)))
    found = quantize_matrix(flat, how, seen)
    groups = (*into[:-1], into[-1] // how.group) if how.group else (1,) * count
    channel = None if found.channel is None else found.channel.reshape(*into, *(1,) * len(out))
    return Quantized(found.values.reshape(shape), found.scales.reshape(*groups, *out), channel)


def quantized_specs(params: PyTree, decoder: ShardedDecoder) -> PyTree:
    """Partition of every array of served parameters: a quantized kernel's values, scales and factors like the kernel.

    Raises:
      PlanError: groups that do not divide by the mesh axes that split the kernel's inputs.
    """

    def one(node: Any, spec: PartitionSpec) -> Any:
        if not is_quantized(node):
            return spec

        def cut(array: Any) -> PartitionSpec | None:
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

        return Quantized(cut(node.values), cut(node.scales), cut(node.channel))

    return jax.tree.map(one, params, decoder.specs, is_leaf=is_quantized)
