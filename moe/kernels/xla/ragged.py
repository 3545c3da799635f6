"""Grouped products by a ragged dot, with gathers and epilogues around it in XLA: tokamax's kernels, or XLA's own.

For GPUs, where a loop of plain JAX over tiles waits for the host in every turn. XLA's ragged dot is right on any
platform; on GPUs it is a dense product with zeros for the rows of other groups, G times the work.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from moe.kernels.implementations import zeros
from moe.kernels.metadata import group_bounds
from moe.kernels.quantize import dequantize
from moe.kernels.spec import (
    BlockOperands,
    BlockSpec,
    ContractionOperands,
    ContractionSpec,
    GroupedOperands,
    GroupedSpec,
    swiglu,
)

# (x, w, sizes, contracted axes, group axes of w, dtype of the result) -> product.
Dot = Callable[[Array, Array, Array, tuple[int, int], list[int], Any], Array]


def xla_dot(x: Array, w: Array, sizes: Array, axes: tuple[int, int], groups: list[int], out_dtype: Any) -> Array:
    """Multiply by `jax.lax.ragged_dot_general` over the contracted axes of x and w; x's rows are ragged."""
    begins, ends = group_bounds(sizes, x.shape[0])
    dimensions = jax.lax.RaggedDotDimensionNumbers((((axes[0],), (axes[1],)), ((), ())), [0], groups)
    out = jax.lax.ragged_dot_general(x, w, ends - begins, dimensions, preferred_element_type=jnp.float32)
    return out.astype(out_dtype)


def grouped(operands: GroupedOperands, spec: GroupedSpec, dot: Dot = xla_dot):
    """Grouped matmul, see `spec.GroupedOperands` and `spec.GroupedSpec`; sums are rounded before the epilogue."""
    w = operands.w
    if operands.scales:
        channels = operands.channels or (None,) * len(w)
        each = zip(w, operands.scales, channels, strict=True)
        w = tuple(dequantize(values, scales, operands.x.dtype, channel) for values, scales, channel in each)
    x_MK = operands.x if operands.gather is None else operands.x.at[operands.gather].get(mode="clip")
    axis = 2 if spec.transpose else 1
    outs = [dot(x_MK, each, operands.sizes, (1, axis), [0], spec.out_dtype) for each in w]
    inside_M1 = (jnp.arange(operands.rows) < jnp.sum(operands.sizes))[:, None]
    outs = [jnp.where(inside_M1, out, 0) for out in outs]
    if spec.epilogue == "combine":
        return combine(outs[0], operands.tokens, operands.weights, spec)
    if spec.epilogue == "swiglu":
        outs = [swiglu(*(out.astype(jnp.float32) for out in outs)).astype(spec.out_dtype), *outs]
    return tuple(outs) if spec.save_residuals else outs[0]


def contract(operands: ContractionOperands, spec: ContractionSpec, dot: Dot = xla_dot):
    """Ragged contraction: (G, K, N), zeros for empty groups."""
    x_MK = operands.x if operands.gather is None else operands.x.at[operands.gather].get(mode="clip")
    # Rows past the sum are multiplied by zero, which leaves NaN.
    inside_M1 = (jnp.arange(operands.dy.shape[0]) < jnp.sum(operands.sizes))[:, None]
    x_MK, dy_MN = (jnp.where(inside_M1, array, 0) for array in (x_MK, operands.dy))
    return dot(x_MK, dy_MN, operands.sizes, (0, 0), [], spec.out_dtype)


def combine(rows_MN: Array, tokens_M: Any, weights_M: Any, spec: GroupedSpec) -> jax.Array:
    """Combine after a kernel: sum each token's weighted rows, in the order of the rows where the spec asks for it.

    Without that by XLA's scatter, atomic additions on GPUs; with it there are none. Where no token has more rows than
    M / T, as in dropless routing, they are gathered and summed; else the tokens' first rows are added, then
    their second, and so on.

    Args:
      rows_MN: rows of the product, zeros past the sum of the group sizes.
      tokens_M: destination of each row.
      weights_M: factor of each row, or None.
      spec: for num_tokens, deterministic and out_dtype.
    """
    m, t = rows_MN.shape[0], spec.num_tokens
    if not spec.deterministic:
        values_MN = rows_MN.astype(jnp.float32) * (1.0 if weights_M is None else weights_M[:, None])
        out_TN = zeros((t, rows_MN.shape[1]), jnp.float32, rows_MN)
        return out_TN.at[tokens_M].add(values_MN).astype(spec.out_dtype)
    order_M = jnp.argsort(tokens_M, stable=True)
    starts_T = jnp.searchsorted(tokens_M[order_M], jnp.arange(t)).astype(jnp.int32)
    counts_T = jnp.diff(starts_T, append=m)

    def weighted(row):
        weights = 1.0 if weights_M is None else weights_M[row][..., None]
        return rows_MN[row].astype(jnp.float32) * weights

    def by_rank():
        def add(rank, out_TN):
            row_T = order_M[jnp.minimum(starts_T + rank, m - 1)]
            return out_TN + jnp.where((rank < counts_T)[:, None], weighted(row_T), 0)

        out_TN = zeros((t, rows_MN.shape[1]), jnp.float32, rows_MN)
        return jax.lax.fori_loop(zeros((), jnp.int32, rows_MN), jnp.max(counts_T), add, out_TN)

    most = -(-m // t)  # a token's rows in dropless dispatch

    def at_once():
        rank_1K = jnp.arange(most, dtype=jnp.int32)[None]
        rows_TKN = weighted(order_M[jnp.minimum(starts_T[:, None] + rank_1K, m - 1)])
        return jnp.sum(jnp.where((rank_1K < counts_T[:, None])[..., None], rows_TKN, 0), axis=1)

    return jax.lax.cond(jnp.all(counts_T <= most), at_once, by_rank).astype(spec.out_dtype)


def block_matmul(operands: BlockOperands, spec: BlockSpec):
    """Block-sparse matmul by the dense product: (M, outputs x b)."""
    x_MK, steps, b = operands.x, operands.steps, spec.block
    blocks = jnp.where(steps.live[:, None, None] > 0, operands.other[steps.b], 0)
    if spec.transpose:
        blocks = blocks.swapaxes(1, 2)
    w = zeros((x_MK.shape[1] // b, spec.outputs, b, b), blocks.dtype, x_MK).at[steps.a, steps.o].set(blocks)
    w_KN = w.swapaxes(1, 2).reshape(x_MK.shape[1], -1)
    return jnp.matmul(x_MK, w_KN, preferred_element_type=jnp.float32).astype(spec.out_dtype)


def block_contract(operands: BlockOperands, spec: BlockSpec):
    """Weight gradient of the live blocks out of the dense one: (outputs, b, b)."""
    steps, b = operands.steps, spec.block
    dense = jnp.matmul(operands.x.T, operands.other, preferred_element_type=jnp.float32)
    tiles = dense.reshape(dense.shape[0] // b, b, -1, b).swapaxes(1, 2)
    out = zeros((spec.outputs, b, b), spec.out_dtype, operands.x)
    return out.at[steps.o].set(tiles[steps.a, steps.b].astype(spec.out_dtype))
