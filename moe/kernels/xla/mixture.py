"""A mixture of SwiGLU experts in one loop for CPUs: gather, three products, combine, and all their gradients fused.

Hidden activations and their cotangents, [M, F] each, stay in the cache, a tile at a time, where separate kernels pass
them through memory. Residuals are the gate and up activations; the backward pass recomputes everything else.

Axes: T tokens, M rows sorted by group, G groups (experts), D width, F feed-forward width, R rows of a tile.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe.kernels import checks
from moe.kernels.grouped import grouped_matmul
from moe.kernels.implementations import align, platform, tiling, zeros
from moe.kernels.spec import Combine, SwiGLU, swiglu, swiglu_gradient
from moe.kernels.xla.ops import _by_height, _slice, _write, add, over_tiles


class Mixture(NamedTuple):
    """Operands: x (T, D); gate, up (G, D, F) and down (G, F, D) of x's dtype; sizes (G,); tokens and weights (M,)."""

    x: Array
    gate: Array
    up: Array
    down: Array
    sizes: Array
    tokens: Array
    weights: Array


def mixture(
    x_TD: Float[Array, "T D"],
    gate_GDF: Float[Array, "G D F"],
    up_GDF: Float[Array, "G D F"],
    down_GFD: Float[Array, "G F D"],
    sizes_G: Int[Array, " G"],
    tokens_M: Int[Array, " M"],
    weights_M: Float[Array, " M"],
    tile: int = 0,
) -> Float[Array, "T D"]:
    """Compute dropless SwiGLU experts: sum weight times silu(x gate) * (x up) down over every token's rows.

    Products are in x's dtype, sums in float32. Differentiable in x, the kernels and the weights. Works under
    jit, vmap (a loop over calls), scan and shard_map. On GPUs two grouped products without a loop.

    Args:
      x_TD: tokens.
      gate_GDF, up_GDF, down_GFD: kernels, of x's dtype.
      sizes_G: rows of each group, in order; rows past their sum are not read.
      tokens_M: token of every row.
      weights_M: factor of every row.
      tile: rows of a tile; 0 looks up a measured number.

    Raises:
      TypeError: a dtype that the kernels do not multiply.
      ValueError: symbolic dimensions.
    """
    checks.fixed(x=x_TD, tokens=tokens_M)
    checks.multiplied(x_TD.dtype, "x")
    if platform(x_TD) == "gpu":
        # A loop over tiles waits for the host in every turn.
        multiply = partial(grouped_matmul, backend="xla", group_sizes=sizes_G)
        hidden_MF = multiply(x_TD, (gate_GDF, up_GDF), gather=tokens_M, epilogue=SwiGLU())
        return multiply(hidden_MF, down_GFD, epilogue=Combine(tokens_M, weights_M, x_TD.shape[0]))
    groups, d, f = gate_GDF.shape
    rows = tokens_M.shape[0]
    found = tiling("grouped", "xla", rows_per_group=rows / groups, k=d, n=f, dtype=x_TD.dtype)
    operands = Mixture(x_TD, gate_GDF, up_GDF, down_GFD, sizes_G, tokens_M, weights_M)
    return _mixture(min(tile or found.rows, rows), align(operands))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixture(tile, operands):
    return _looped(partial(_forward, tile=tile, save_residuals=False))(operands)[0]


def _mixture_fwd(tile, operands):
    out, *residuals = _looped(partial(_forward, tile=tile, save_residuals=True))(operands)
    return out, (operands, *residuals)


def _mixture_bwd(tile, saved, dout_TD):
    operands, *residuals = saved
    grads = _looped(partial(_backward, tile=tile))(operands, *residuals, dout_TD.astype(operands.x.dtype))
    return (Mixture(*grads[:4], None, None, grads[4]),)


_mixture.defvjp(_mixture_fwd, _mixture_bwd)


def _looped(run):
    """Jitted, and a loop over calls under vmap."""
    return jax.jit(jax.custom_batching.sequential_vmap(run))


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _pad(value: Array, tile: int) -> Array:
    return jnp.pad(value, ((0, tile - value.shape[0]), *((0, 0),) * (value.ndim - 1)))


def _forward(o: Mixture, *, tile: int, save_residuals: bool) -> tuple[Array, ...]:
    """Compute the output, and with `save_residuals` the gate and up activations (M, F)."""
    rows, dtype = o.tokens.shape[0], o.x.dtype
    residuals = (zeros((rows, o.gate.shape[2]), dtype, o.x),) * (2 if save_residuals else 0)

    def step(group, fresh, start, end, mine_R, carry):
        del fresh
        out_TD, residuals = carry
        tokens_R = _slice(o.tokens, start, tile)
        x_RD = o.x.at[tokens_R].get(mode="clip")

        def products(height):
            gate_RF, up_RF = (_dot(x_RD[:height], w[group], (1, 0)) for w in (o.gate, o.up))
            y_RD = _dot(swiglu(gate_RF, up_RF).astype(dtype), o.down[group], (1, 0))
            more = (gate_RF.astype(dtype), up_RF.astype(dtype)) if save_residuals else ()
            return tuple(_pad(each, tile) for each in (y_RD, *more))

        y_RD, *more = _by_height(end, tile, products)
        weights_R1 = _slice(o.weights, start, tile)[:, None]
        out_TD = out_TD.at[tokens_R].add(jnp.where(mine_R[:, None], y_RD * weights_R1, 0))
        return out_TD, tuple(_write(a, start, mine_R, b) for a, b in zip(residuals, more, strict=True))

    start = (zeros(o.x.shape, jnp.float32, o.x), residuals)
    out_TD, residuals = over_tiles(o.sizes, rows, tile, step, start)
    return out_TD.astype(dtype), *residuals


def _backward(o: Mixture, gate_MF: Array, up_MF: Array, dout_TD: Array, *, tile: int) -> tuple[Array, ...]:
    """Compute the cotangents of x, gate, up, down and weights."""

    def step(group, fresh, start, end, mine_R, carry):
        dx_TD, dweights_M, kernels = carry
        place = (group, start, end, mine_R)
        dx_TD, dweights_M, products = _tile_backward(o, gate_MF, up_MF, dout_TD, tile, place, dx_TD, dweights_M)
        return dx_TD, dweights_M, tuple(add(k, group, fresh, p) for k, p in zip(kernels, products, strict=True))

    w = (o.gate, o.up, o.down)
    kernels = tuple((zeros(each.shape[1:], jnp.float32, o.x), zeros(each.shape, each.dtype, o.x)) for each in w)
    carry = (zeros(o.x.shape, jnp.float32, o.x), zeros(o.weights.shape, jnp.float32, o.x), kernels)
    dx_TD, dweights_M, kernels = over_tiles(o.sizes, o.tokens.shape[0], tile, step, carry)
    return dx_TD.astype(o.x.dtype), *(out for _, out in kernels), dweights_M.astype(o.weights.dtype)


def _tile_backward(o: Mixture, gate_MF, up_MF, dout_TD, tile: int, place, dx_TD, dweights_M):
    """Add a tile's cotangents of x and weights, and compute its part of those of gate, up and down (float32)."""
    dtype, (group, start, end, mine_R) = o.x.dtype, place
    mine_R1, tokens_R = mine_R[:, None], _slice(o.tokens, start, tile)
    # Rows of other groups may be NaN.
    x_RD, dout_RD = (jnp.where(mine_R1, a.at[tokens_R].get(mode="clip"), 0) for a in (o.x, dout_TD))
    gate_RF, up_RF = (_slice(a, start, tile) for a in (gate_MF, up_MF))
    weights_R1 = jnp.where(mine_R, _slice(o.weights, start, tile), 0)[:, None]

    def products(height):
        gate, up = (a[:height].astype(jnp.float32) for a in (gate_RF, up_RF))
        weights, x, dout = weights_R1[:height], x_RD[:height], dout_RD[:height]
        back_RF = _dot(dout, o.down[group], (1, 1))
        hidden_RF = swiglu(gate, up).astype(dtype)
        dweights_R = (back_RF * hidden_RF).sum(axis=1)
        dgate, dup = (each.astype(dtype) for each in swiglu_gradient(gate, up, back_RF * weights))
        dx_RD = _dot(dgate, o.gate[group], (1, 1)) + _dot(dup, o.up[group], (1, 1))
        weighted = (hidden_RF * weights).astype(dtype)
        kernels = (_dot(x, dgate, (0, 0)), _dot(x, dup, (0, 0)), _dot(weighted, dout, (0, 0)))
        return _pad(dx_RD, tile), _pad(dweights_R, tile), kernels

    dx_RD, dweights_R, kernels = _by_height(end, tile, products)
    dx_TD = dx_TD.at[tokens_R].add(jnp.where(mine_R1, dx_RD, 0))
    before_R = _slice(dweights_M, start, tile)
    dweights_R = jnp.where(mine_R, dweights_R, before_R)
    return dx_TD, jax.lax.dynamic_update_slice_in_dim(dweights_M, dweights_R, start, 0), kernels
