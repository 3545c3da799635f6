"""The layout of a served model's weights on one CPU: an array a layer, kernels transposed for products of few rows.

A scan over stacked layers copies every layer's weights, on CPUs most of the time of a step; the loop over a tuple of
layers is unrolled instead, and compiles for longer.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from jaxtyping import PyTree

from sharding.inference.few_rows import RowKernel, lay_out_rows
from sharding.inference.quantize import QuantConfig, is_quantized, quantize_matrix
from sharding.rules import path_name
from tessera.models.transformer import TransformerConfig
from tessera.optim.param_axes import kernel_axes

LAYOUTS = ("auto", "stacked", "rows")
ROWS = r"(^|/)(attention/(query|key|value|output)|mlp/(gate|up|down))/kernel$"


def lay_out(params: Mapping[str, Any], config: TransformerConfig) -> PyTree:
    """Parameters from `serve` with a tuple of layers in place of every stack, and `RowKernel` in place of kernels.

    The output layer is "rows" beside the embedding table or the head, which stay: the table itself where it is tied and
    float32. It is int8 where the blocks' kernels are quantized. Experts stay as they are.
    """
    small = any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized)))

    def one(path: tuple, leaf: Any) -> Any:
        axes = kernel_axes(path) if re.search(ROWS, path_name(path)) else None
        return leaf if axes is None else lay_out_rows(leaf, len(axes.inputs))

    made = dict(params)
    for stack in config.stacks:
        blocks = params[stack.name]
        count = jax.tree.leaves(blocks)[0].shape[0]
        layers = [jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(count)]
        made[stack.name] = tuple(jax.tree_util.tree_map_with_path(one, layer, is_leaf=is_quantized) for layer in layers)
    head_OI = params["embed"]["table"] if config.tied else params["head"]["kernel"].T
    rows = lay_out_rows(quantize_matrix(head_OI.T, QuantConfig(8)), 1) if small else RowKernel(head_OI)
    kinds = "int8 times int8, rows quantized on the fly" if small else config.dtype
    logging.info("weights are laid out for one CPU: unrolled layers, transposed kernels, products in %s", kinds)
    for name, stack in made.get("adapters", {}).items():
        layers = [jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(len(made[name]))]
        made["adapters"] = made["adapters"] | {name: tuple(layers)}
    return made | {"rows": rows}
