"""xla backend: plain JAX loops over the tiles of groups and over live blocks, on any platform.

On GPUs, where every turn of a loop would wait for the host, XLA's ragged and dense products (`xla/ragged.py`).

A group's first tile begins at its first row, so that no tile is multiplied for two groups, and its last is multiplied
in the fewest rows that cover it. Loops are without autodiff (the callers have custom_vjp).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from moe.kernels.implementations import by_platform, zeros
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
from moe.kernels.tiling import Tiling
from moe.kernels.xla import ragged

# A step multiplies full rows of x and w, so `inner` and `cols` are not used.
TILINGS = {
    "grouped": Tiling(rows=64),
    "contraction": Tiling(rows=64),
    "block": Tiling(rows=256),
    "block_contraction": Tiling(rows=256),
}

# A product of fewer rows is hardly faster, since its weight is read all the same.
SHORTEST = 16


def _heights(tile: int) -> tuple[int, ...]:
    """Return the heights at which a tile may be multiplied: most groups end in a partly filled one.

    Each is a branch of every loop, and makes the gradient of a layer a quarter longer to compile.
    """
    low = 3 * tile // 8  # measured next to quarters and halves
    return (low, tile) if low >= SHORTEST else (tile,)


def _by_height(end: Array, tile: int, product: Callable[[int], Any]) -> Any:
    """Compute `product(height)` for the smallest height that covers the rows before `end`."""
    heights = _heights(tile)
    if len(heights) == 1:
        return product(tile)
    return jax.lax.cond(end > heights[0], *(partial(product, height) for height in heights[::-1]))


def grouped(operands: GroupedOperands, spec: GroupedSpec, *, interpret: bool = False):
    """Grouped matmul, see `spec.GroupedOperands` and `spec.GroupedSpec`."""
    return by_platform(partial(_grouped, spec=spec), partial(ragged.grouped, spec=spec), operands)


def _grouped(operands: GroupedOperands, spec: GroupedSpec):
    x_TK, rows = operands.x, operands.rows
    tile = min(spec.tiling.rows, rows)
    columns = operands.w[0].shape[1 if spec.transpose else 2]
    combine = spec.epilogue == "combine"
    dtype = jnp.float32 if combine else spec.out_dtype
    outs = (zeros((spec.num_tokens if combine else rows, columns), dtype, x_TK),) * (3 if spec.save_residuals else 1)
    quantized = [(each or (None,) * len(operands.w)) for each in (operands.scales, operands.channels)]

    def products(x_RK, group, height):
        """Multiply the tile's first rows, zeros below; with SwiGLU its result first."""
        found = [
            _product(x_RK[:height], _of(w, group), *(None if a is None else a[group] for a in more), spec.transpose)
            for w, *more in zip(operands.w, *quantized, strict=True)
        ]
        if spec.epilogue == "swiglu":
            found = [swiglu(*found), *found]
        # Without residuals there is one output.
        return tuple(jnp.pad(each.astype(dtype), ((0, tile - height), (0, 0))) for each in found[: len(outs)])

    def step(group, fresh, start, end, mine_R, outs):
        del fresh
        x_RK = _take(x_TK, operands.gather, start, tile)
        found = _by_height(end, tile, partial(products, x_RK, group))
        if combine:
            weights_R = 1.0 if operands.weights is None else _slice(operands.weights, start, tile)[:, None]
            values_RN = jnp.where(mine_R[:, None], found[0] * weights_R, 0)
            return (outs[0].at[_slice(operands.tokens, start, tile)].add(values_RN),)
        return tuple(_write(out, start, mine_R, value) for out, value in zip(outs, found, strict=True))

    outs = over_tiles(operands.sizes, rows, tile, step, outs)
    return outs if spec.save_residuals else outs[0].astype(spec.out_dtype)


def contract(operands: ContractionOperands, spec: ContractionSpec, *, interpret: bool = False):
    """Ragged contraction: (G, K, N), zeros for empty groups."""
    return by_platform(partial(_contract, spec=spec), partial(ragged.contract, spec=spec), operands)


def _contract(operands: ContractionOperands, spec: ContractionSpec):
    rows = operands.dy.shape[0]
    tile = min(spec.tiling.rows, rows)
    shape = (operands.sizes.shape[0], operands.x.shape[1], operands.dy.shape[1])

    def step(group, fresh, start, end, mine_R, sums):
        # In both operands: rows of other groups may be NaN, and NaN times zero is NaN.
        x_RK = jnp.where(mine_R[:, None], _take(operands.x, operands.gather, start, tile), 0)
        dy_RN = jnp.where(mine_R[:, None], _slice(operands.dy, start, tile), 0)

        def product(height):
            dims = (((0,), (0,)), ((), ()))
            return jax.lax.dot_general(x_RK[:height], dy_RN[:height], dims, preferred_element_type=jnp.float32)

        return add(sums, group, fresh, _by_height(end, tile, product))

    sums = zeros(shape[1:], jnp.float32, operands.x), zeros(shape, spec.out_dtype, operands.x)
    return over_tiles(operands.sizes, rows, tile, step, sums)[1]


def over_tiles(sizes_G: Array, rows: int, tile: int, body: Callable[..., Any], carry: Any) -> Any:
    """Loop over the tiles of all groups: each begins at its group's first row, or where the last tile ended.

    No table of steps: what has to be computed to make one takes longer to compile than a dense layer.

    Args:
      sizes_G: rows of each group.
      rows: of x.
      tile: rows of a tile.
      body: (group, fresh, start, end, mine_R, carry) -> carry, with whether it is the group's first tile, the first row
        to load, the end of the tile's rows counted from there, and a mask of its rows among the `tile` that are loaded.
      carry: at the start.
    """
    # Running sums of what is not negative, as one sum under a triangle.
    before_GG = jnp.tri(sizes_G.shape[0], dtype=bool)
    sizes_G = jnp.maximum(sizes_G.astype(jnp.int32), 0)
    ends_G = jnp.minimum(jnp.sum(jnp.where(before_GG, sizes_G[None], 0), axis=1), rows)
    row_R = jnp.arange(tile, dtype=jnp.int32)

    def step(state):
        first, carry = state
        group = jnp.sum(ends_G <= first, dtype=jnp.int32)
        end = jnp.minimum(ends_G[group], first + tile)
        # The last tile is moved back rather than padded, so its rows are shifted.
        start = jnp.minimum(first, rows - tile)
        mine_R = (row_R >= first - start) & (row_R < end - start)
        fresh = (first == 0) | (first == ends_G[jnp.maximum(group - 1, 0)])
        return end, body(group, fresh, start, end - start, mine_R, carry)

    return jax.lax.while_loop(lambda state: state[0] < ends_G[-1], step, (zeros((), jnp.int32, sizes_G), carry))[1]


def add(sums: tuple[Array, Array], group: Array, fresh: Array, product_KN: Array) -> tuple[Array, Array]:
    """Add a tile's product to the sums of its group, which stay in the cache, and write them to the output.

    Args:
      sums: (K, N) float32 of the group, or of the one before if it is fresh, and the output (G, K, N).
      group: of the tile.
      fresh: whether it is the group's first tile.
      product_KN: of the tile, float32.
    """
    sum_KN, out_GKN = sums
    sum_KN = jnp.where(fresh, product_KN, sum_KN + product_KN)
    return sum_KN, jax.lax.dynamic_update_index_in_dim(out_GKN, sum_KN.astype(out_GKN.dtype), group, 0)


def block_matmul(operands: BlockOperands, spec: BlockSpec, *, interpret: bool = False):
    """Block-sparse matmul: (M, outputs x b)."""
    return by_platform(partial(_block_matmul, spec=spec), partial(ragged.block_matmul, spec=spec), operands)


def _block_matmul(operands: BlockOperands, spec: BlockSpec):
    x_MK, steps, b = operands.x, operands.steps, spec.block
    rows = x_MK.shape[0]
    tile = min(spec.tiling.rows, rows)
    contraction = (((1,), (1 if spec.transpose else 0,)), ((), ()))

    def row_tile(i, out_MN):
        start = jnp.minimum(i * tile, rows - tile)

        def step(s, carry):
            out_MN, sum_Rb = carry
            x_Rb = jax.lax.dynamic_slice(x_MK, (start, steps.a[s] * b), (tile, b))
            product_Rb = jax.lax.dot_general(
                x_Rb, operands.other[steps.b[s]], contraction, preferred_element_type=jnp.float32
            )
            same = (s > 0) & (steps.o[s] == steps.o[jnp.maximum(s - 1, 0)])
            sum_Rb = jnp.where(same, sum_Rb, 0) + jnp.where(steps.live[s] > 0, product_Rb, 0)
            # Every partial sum is written; the last of its column remains, also where row tiles overlap.
            place = (start, steps.o[s] * b)
            return jax.lax.dynamic_update_slice(out_MN, sum_Rb.astype(spec.out_dtype), place), sum_Rb

        return jax.lax.fori_loop(0, steps.count, step, (out_MN, zeros((tile, b), jnp.float32, x_MK)))[0]

    return jax.lax.fori_loop(0, -(-rows // tile), row_tile, zeros((rows, spec.outputs * b), spec.out_dtype, x_MK))


def block_contract(operands: BlockOperands, spec: BlockSpec, *, interpret: bool = False):
    """Weight gradient of the live blocks: (outputs, b, b)."""
    return by_platform(partial(_block_contract, spec=spec), partial(ragged.block_contract, spec=spec), operands)


def _block_contract(operands: BlockOperands, spec: BlockSpec):
    x_MK, dy_MN, steps, b = operands.x, operands.other, operands.steps, spec.block
    rows = x_MK.shape[0]
    tile = min(spec.tiling.rows, rows)

    def step(s, out_Bbb):
        def row_tile(i, sum_bb):
            start = jnp.minimum(i * tile, rows - tile)
            x_Rb = jax.lax.dynamic_slice(x_MK, (start, steps.a[s] * b), (tile, b))
            dy_Rb = jax.lax.dynamic_slice(dy_MN, (start, steps.b[s] * b), (tile, b))
            # The last tile is moved back over rows that are counted already.
            x_Rb = jnp.where(start + jnp.arange(tile)[:, None] >= i * tile, x_Rb, 0)
            dims = (((0,), (0,)), ((), ()))
            return sum_bb + jax.lax.dot_general(x_Rb, dy_Rb, dims, preferred_element_type=jnp.float32)

        sum_bb = jax.lax.fori_loop(0, -(-rows // tile), row_tile, zeros((b, b), jnp.float32, x_MK))
        return out_Bbb.at[steps.o[s]].set(sum_bb.astype(spec.out_dtype))

    return jax.lax.fori_loop(0, steps.count, step, zeros((spec.outputs, b, b), spec.out_dtype, x_MK))


def _slice(x, start, size):
    return jax.lax.dynamic_slice_in_dim(x, start, size)


def _take(x_TK, gather_M, start, size):
    if gather_M is None:
        return _slice(x_TK, start, size)
    return x_TK.at[_slice(gather_M, start, size)].get(mode="clip")


def _of(w_GKN, group):
    """Take one group's weight, in 4 bits through a barrier: XLA:CPU would unpack all groups before the loop."""
    return jax.lax.optimization_barrier((w_GKN, group))[0][group] if w_GKN.dtype == jnp.int4 else w_GKN[group]


def _write(out_MN, start, mine_R, value_RN):
    before_RN = _slice(out_MN, start, mine_R.shape[0])
    value_RN = jnp.where(mine_R[:, None], value_RN.astype(out_MN.dtype), before_RN)
    return jax.lax.dynamic_update_slice_in_dim(out_MN, value_RN, start, 0)


def _product(x_RK, w, scale_QN, channel_K, transpose):
    """Multiply x by one group's weight in float32; one scale a column of a quantized weight multiplies the sums."""
    sums_only = scale_QN is not None and scale_QN.shape[0] == 1 and channel_K is None
    if scale_QN is not None and not sums_only:
        w = dequantize(w[None], scale_QN[None], x_RK.dtype, None if channel_K is None else channel_K[None])[0]
    dims = (((1,), (1 if transpose else 0,)), ((), ()))
    sum_RN = jax.lax.dot_general(x_RK, w.astype(x_RK.dtype), dims, preferred_element_type=jnp.float32)
    return sum_RN * scale_QN if sums_only else sum_RN
