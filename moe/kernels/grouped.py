"""Grouped (ragged) matmul and its gradients by a custom VJP: forward, input gradient, weight gradient."""

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int

from moe.kernels import checks
from moe.kernels.implementations import align, call, choose, tiling
from moe.kernels.quantize import DTYPES, Quantized, dequantize
from moe.kernels.spec import (
    Combine,
    ContractionOperands,
    ContractionSpec,
    GroupedOperands,
    GroupedSpec,
    SwiGLU,
    swiglu_gradient,
)
from moe.kernels.tiling import Tiling

Weight = Float[Array, "G K N"] | Quantized


@dataclass(frozen=True)
class _Call:
    """Static arguments of a call; a tiling of None is looked up."""

    epilogue: str
    num_tokens: int
    out_dtype: np.dtype
    backend: str
    tiling: Tiling | None
    deterministic: bool


def grouped_matmul(
    x: Float[Array, "T K"],
    w: Weight | tuple[Weight, Weight],
    group_sizes: Int[Array, " G"],
    *,
    gather: Int[Array, " M"] | None = None,
    epilogue: SwiGLU | Combine | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    backend: str = "auto",
    tiling: Tiling | None = None,
    deterministic: bool = True,
) -> Float[Array, "R N"]:
    """Multiply consecutive groups of rows by one weight each (grouped GEMM, ragged dot): x[gather[i]] @ w[group of i].

    Products are in x's dtype, sums in float32. Rows past sum(group_sizes) are zeros (and add nothing to a Combine);
    what x, `gather`, `tokens` and `weights` have there is not used. Differentiable in x, w and the weights of Combine;
    quantized weights are for inference. Works under jit, vmap (a loop over calls), scan and shard_map; not under
    forward-mode differentiation (`jax.jvp`), nor with symbolic dimensions (`jax.export`).

    Values are checked where they are known, that is outside jit. Inside it, sizes below zero and row numbers out of
    range give unspecified rows, unless the environment variable TESSERA_CHECKIFY is set while a program is traced, and
    it is transformed by `jax.experimental.checkify.checkify`.

    Args:
      x: (T, K) bfloat16, float16 or float32; T = M without `gather`.
      w: (G, K, N) of x's dtype, or `quantize(...)` of such; for SwiGLU the pair (gate, up) of them.
      group_sizes: (G,) rows of each group, in order, 0 allowed; what goes past M in their sum is cut off.
      gather: (M,) row of x for each row of the product, in [0, T), gathered while a tile is loaded, without a permuted
        copy of x. None: row i is x[i].
      epilogue: None; SwiGLU(), out = silu(x w_gate) * (x w_up); Combine(tokens, weights, num_tokens), which adds
        weights[i] times row i to out[tokens[i]].
      out_dtype: dtype of the result, x's by default.
      backend: a name of `moe.kernels.implementations.BACKENDS`, or "auto", see `choose` there.
      tiling: tile sizes of this product and of its gradients; None looks up measured ones.
      deterministic: rows with one destination in a Combine, or in the gradient of a gathered x, are added in a fixed
        order. For backend "gpu" this is a pass after the kernel; False uses atomic additions in the kernel. TPUs and
        CPUs always add in order. XLA's scatter on a GPU does not: the gradient in x of a call with both `gather` and
        Combine uses it.

    Returns:
      (M, N), or (num_tokens, N) with Combine.

    Raises:
      ValueError: shapes that do not fit together or are symbolic, an unknown backend, or one that the platform compiled
        for cannot run; outside jit also negative sizes and row numbers out of range.
      TypeError: dtypes that do not match or that the kernels do not multiply (integer, complex, float64), or a gradient
        through quantized weights.
      ImportError: backend "tokamax" without the package.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe.kernels import grouped_matmul
      >>> x, w = jnp.ones((4, 2)), jnp.stack([jnp.eye(2), 3 * jnp.eye(2)])
      >>> grouped_matmul(x, w, jnp.array([1, 2]))[:, 0].tolist()
      [1.0, 3.0, 3.0, 0.0]
    """
    pair = w if isinstance(w, tuple) and not isinstance(w, Quantized) else (w,)
    values = tuple(each.values if isinstance(each, Quantized) else each for each in pair)
    scales = tuple(each.scales for each in pair if isinstance(each, Quantized))
    tokens, weights, count = (None, None, 0)
    if isinstance(epilogue, Combine):
        tokens, weights, count = epilogue
    channels = tuple(each.channel for each in pair if isinstance(each, Quantized) and each.channel is not None)
    operands = GroupedOperands(x, values, scales, group_sizes, gather, tokens, weights, channels)
    name = "combine" if isinstance(epilogue, Combine) else "swiglu" if isinstance(epilogue, SwiGLU) else "none"
    dtype = np.dtype(x.dtype if out_dtype is None else out_dtype)
    _check(operands, name, dtype)
    static = _Call(name, count, dtype, choose(backend, x), tiling, deterministic)
    if 0 in (*x.shape, *values[0].shape, operands.rows):
        # An empty sum is zero.
        return jnp.zeros((count if tokens is not None else operands.rows, values[0].shape[2]), dtype)
    if static.backend != "xla" and (channels or any(each.dtype == jnp.int4 for each in values)):
        logging.log_first_n(logging.WARNING, "%s: 4-bit weights and AWQ's are dequantized first", 1, static.backend)
        each = zip(values, scales, channels or (None,) * len(values), strict=True)
        w_float = tuple(dequantize(one, scale, x.dtype, channel) for one, scale, channel in each)
        operands = operands._replace(w=w_float, scales=(), channels=())
    operands = _check_values(operands, count)
    return _grouped(static, align(operands))


def _check(operands: GroupedOperands, epilogue: str, out_dtype: np.dtype) -> None:
    x, w = operands.x, operands.w
    if x.ndim != 2 or operands.sizes.ndim != 1:
        raise ValueError(f"x of shape {x.shape} and group_sizes of {operands.sizes.shape}: (T, K) and (G,) are needed")
    checks.fixed(x=x, group_sizes=operands.sizes, gather=x if operands.gather is None else operands.gather)
    checks.multiplied(x.dtype, "x")
    checks.multiplied(out_dtype, "out_dtype")
    integers = {"group_sizes": operands.sizes, "gather": operands.gather, "Combine.tokens": operands.tokens}
    for name, array in integers.items():
        if array is not None:
            checks.numbers(array, name)
    if operands.weights is not None:
        checks.multiplied(operands.weights.dtype, "Combine.weights")
    if len(w) != (2 if epilogue == "swiglu" else 1):
        raise ValueError(f"{len(w)} weight(s) for epilogue {epilogue!r}: SwiGLU takes the pair (gate, up), others one")
    groups = operands.sizes.shape[0]
    for each in w:
        if each.ndim != 3 or each.shape != (groups, x.shape[1], w[0].shape[2]):
            raise ValueError(
                f"weight of shape {each.shape} with x of {x.shape} and {groups} group sizes: "
                f"({groups}, {x.shape[1]}, N) is needed"
            )
    for scales, each in zip(operands.scales, w, strict=False):
        shares = scales.shape[1] if scales.ndim == 3 else 0
        if shares < 1 or each.shape[1] % shares or scales.shape != (groups, shares, each.shape[2]):
            raise ValueError(
                f"scales of shape {scales.shape} for a weight of {each.shape}: (G, Q, N), Q dividing K, is needed"
            )
    for channel in operands.channels:
        if channel.shape != w[0].shape[:2]:
            raise ValueError(
                f"Quantized.channel of shape {channel.shape} for a weight of {w[0].shape}: (G, K) is needed"
            )
    if operands.channels and len(operands.channels) != len(w):
        raise TypeError("one of (gate, up) has Quantized.channel and the other has not: both or none")
    if operands.scales and len(operands.scales) != len(w):
        raise TypeError("one of (gate, up) is quantized and the other is not: quantize both or none")
    if operands.scales and any(each.dtype.name not in DTYPES for each in w):
        raise TypeError(f"Quantized.values of {w[0].dtype}: choose one of {', '.join(DTYPES)}")
    if not operands.scales and any(each.dtype != x.dtype for each in w):
        raise TypeError(f"x is {x.dtype} and w is {w[0].dtype}: cast one to the other, or quantize w")
    for name, array in (("tokens", operands.tokens), ("weights", operands.weights)):
        if array is not None and array.shape != (operands.rows,):
            raise ValueError(
                f"Combine.{name} of shape {array.shape}: one entry for each of the {operands.rows} rows is needed"
            )


def _check_values(operands: GroupedOperands, num_tokens: int) -> GroupedOperands:
    """Check sizes and row numbers, and set the weights of rows past the sum of the sizes to zero: they may be NaN."""
    checks.sizes(operands.sizes)
    if operands.gather is not None:
        checks.within(operands.gather, operands.x.shape[0], operands.sizes, "gather")
    if operands.tokens is not None:
        checks.within(operands.tokens, num_tokens, operands.sizes, "Combine.tokens")
    if operands.weights is None:
        return operands
    return operands._replace(weights=jnp.where(checks.live(operands.rows, operands.sizes), operands.weights, 0))


def _spec(static: _Call, operands: GroupedOperands, **changes) -> GroupedSpec:
    transpose = changes.get("transpose", False)
    groups, k, n = operands.w[0].shape
    tiles = static.tiling or tiling(
        "grouped",
        static.backend,
        rows_per_group=operands.rows / groups,
        k=n if transpose else k,
        n=k if transpose else n,
        dtype=operands.x.dtype,
        transpose=transpose,
    )
    spec = GroupedSpec(static.out_dtype, tiles, static.epilogue, num_tokens=static.num_tokens)
    changes["deterministic"] = static.deterministic
    return dataclasses.replace(spec, **changes)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(static: _Call, operands: GroupedOperands):
    return call("grouped", static.backend, operands, _spec(static, operands))


def _forward(static, operands):
    if operands.scales:
        raise TypeError("no gradient through quantized weights: they are for inference")
    if static.epilogue != "swiglu":
        return _grouped(static, operands), (operands, None)
    out, gate, up = call("grouped", static.backend, operands, _spec(static, operands, save_residuals=True))
    return out, (operands, (gate, up))


def _backward(static, saved, dout):
    operands, activations = saved
    if static.epilogue == "swiglu":
        to_float = partial(jnp.asarray, dtype=jnp.float32)
        dys = swiglu_gradient(*map(to_float, activations), to_float(dout))
        dys = tuple(dy.astype(operands.x.dtype) for dy in dys)
        dweights, dx = None, sum(_dx(static, operands, w, dy) for w, dy in zip(operands.w, dys, strict=True))
    elif static.epilogue == "combine":
        dys, dx, dweights = _combine_backward(static, operands, dout.astype(operands.x.dtype))
    else:
        dys, dweights = (dout.astype(operands.x.dtype),), None
        dx = _dx(static, operands, operands.w[0], dys[0])
    dw = tuple(_dw(static, operands, w, dy) for w, dy in zip(operands.w, dys, strict=True))
    return (GroupedOperands(dx, dw, (), None, None, None, dweights),)


_grouped.defvjp(_forward, _backward)


def _dx(static, operands, w, dy):
    """Compute the input gradient dy w^T, without a transposed copy of w; for a gathered x by a combine."""
    back = GroupedOperands(dy, (w,), (), operands.sizes, tokens=operands.gather)
    gathered = operands.gather is not None
    changes = {
        "out_dtype": operands.x.dtype,
        "transpose": True,
        "epilogue": "combine" if gathered else "none",
        "num_tokens": operands.x.shape[0] if gathered else 0,
    }
    return call("grouped", static.backend, back, _spec(static, back, **changes))


def _dw(static, operands, w, dy):
    """Compute the weight gradient, the ragged contraction of x and dy."""
    tiles = static.tiling or tiling(
        "contraction",
        static.backend,
        rows_per_group=dy.shape[0] / w.shape[0],
        k=w.shape[1],
        n=w.shape[2],
        dtype=dy.dtype,
    )
    back = ContractionOperands(operands.x, dy, operands.sizes, operands.gather)
    return call("contract", static.backend, back, ContractionSpec(w.dtype, tiles))


def _combine_backward(static, operands, dout):
    """Compute the cotangents of the rows of the product, of x and of the weights.

    With u = dout[tokens] w^T: dx_i = weights_i u_i, and d weights_i = <dout[tokens_i], x_i w> = <u_i, x_i>, so that the
    rows of the forward product are no residuals.
    """
    back = GroupedOperands(dout, operands.w, (), operands.sizes, gather=operands.tokens)
    changes = {"out_dtype": operands.x.dtype, "transpose": True, "epilogue": "none", "num_tokens": 0}
    dx_MK = call("grouped", static.backend, back, _spec(static, back, **changes))
    dy_MN, dweights_M = dout[operands.tokens], None
    if operands.weights is not None:
        x_MK = operands.x if operands.gather is None else operands.x[operands.gather]
        # Rows past the sum may be NaN; their weights are constants, whose cotangents are not used.
        dweights_M = jnp.sum(dx_MK * x_MK, axis=1, dtype=jnp.float32).astype(operands.weights.dtype)
        dx_MK, dy_MN = (v * operands.weights[:, None].astype(v.dtype) for v in (dx_MK, dy_MN))
    if operands.gather is not None:
        dx_MK = jnp.zeros_like(operands.x).at[operands.gather].add(dx_MK)
    return (dy_MN,), dx_MK, dweights_M
