"""Arguments of the kernels: operands (arrays), specs (static), and the epilogues SwiGLU and Combine."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from moe.kernels.metadata import Steps
from moe.kernels.tiling import Tiling


@dataclass(frozen=True)
class SwiGLU:
    """Epilogue of the up-projection: silu(x w_gate) * (x w_up) with w = (w_gate, w_up) (Shazeer 2020, eq. 6).

    Example:
      >>> import jax.numpy as jnp
      >>> from moe.kernels import SwiGLU, grouped_matmul
      >>> w = jnp.ones((1, 2, 3))
      >>> grouped_matmul(jnp.zeros((4, 2)), (w, w), jnp.array([4]), epilogue=SwiGLU()).tolist()[0]
      [0.0, 0.0, 0.0]
    """


class Combine(NamedTuple):
    """Epilogue of the down-projection: add row i of the product, times weights[i], to row tokens[i] of the output.

    Fields:
      tokens: (M,) int32, destination of each row, each in [0, num_tokens); rows past the sum of the group sizes add
        nothing.
      weights: (M,) floating, or None for ones.
      num_tokens: rows of the output.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe.kernels import Combine, grouped_matmul
      >>> combine = Combine(jnp.array([1, 0, 1]), jnp.array([1.0, 2.0, 3.0]), num_tokens=2)
      >>> grouped_matmul(jnp.ones((3, 2)), jnp.eye(2)[None], jnp.array([3]), epilogue=combine).tolist()
      [[2.0, 2.0], [4.0, 4.0]]
    """

    tokens: Int[Array, " M"]
    weights: Float[Array, " M"] | None
    num_tokens: int


def swiglu(gate: Float[Array, "*S"], up: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Compute SwiGLU, silu(gate) * up (Shazeer 2020, eq. 6), of a tile's float32 sums."""
    return gate * jax.nn.sigmoid(gate) * up


def swiglu_gradient(
    gate: Float[Array, "*S"], up: Float[Array, "*S"], dout: Float[Array, "*S"]
) -> tuple[Float[Array, "*S"], Float[Array, "*S"]]:
    """Compute the cotangents of SwiGLU's gate and up."""
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return dout * up * (sigmoid + silu * (1 - sigmoid)), dout * silu


class GroupedOperands(NamedTuple):
    """Array arguments of a grouped matmul, for every backend.

    Fields:
      x: (T, K), with T = M without a gather.
      w: one (G, K, N) array, or two for SwiGLU (gate, up); (G, N, K) where `spec.transpose`.
      scales: () or, for quantized weights, one (G, Q, N) float32 array per w, each scale for K / Q rows of w.
      sizes: (G,) int32.
      gather: (M,) int32 rows of x, or None: x is already in the order of the groups.
      tokens: (M,) int32 destinations for "combine", or None.
      weights: (M,) float32 row weights for "combine", or None for ones.
      channels: () or, for backend "xla", one (G, K) array per w that divides the rows of a quantized weight.
    """

    x: Array
    w: tuple[Array, ...]
    scales: tuple[Array, ...]
    sizes: Array
    gather: Array | None = None
    tokens: Array | None = None
    weights: Array | None = None
    channels: tuple[Array, ...] = ()

    @property
    def rows(self) -> int:
        """M: rows after the gather."""
        return (self.x if self.gather is None else self.gather).shape[0]


@dataclass(frozen=True)
class GroupedSpec:
    """Static arguments of a grouped matmul.

    Fields:
      epilogue: "none" -> (M, N); "swiglu" -> (M, N); "combine" -> (num_tokens, N).
      transpose: contract over the last axis of w (the input gradient).
      save_residuals: with "swiglu", return (out, gate, up), all (M, N), for the backward pass.
      num_tokens: rows of the output of "combine".
      deterministic: rows of "combine" that share a destination are added in a fixed order.
      out_dtype: of every output; sums are float32.
      tiling: tile sizes.
    """

    out_dtype: np.dtype
    tiling: Tiling
    epilogue: str = "none"
    transpose: bool = False
    save_residuals: bool = False
    num_tokens: int = 0
    deterministic: bool = True


class ContractionOperands(NamedTuple):
    """Array arguments of the ragged contraction, out[g] = sum over rows i of group g of x[gather[i]]^T dy[i].

    Fields:
      x: (T, K).
      dy: (M, N).
      sizes: (G,) int32.
      gather: (M,) int32 or None.
    """

    x: Array
    dy: Array
    sizes: Array
    gather: Array | None = None


@dataclass(frozen=True)
class ContractionSpec:
    """Static arguments of a ragged contraction with output (G, K, N), zeros for empty groups."""

    out_dtype: np.dtype
    tiling: Tiling


@dataclass(frozen=True)
class BlockSpec:
    """Static arguments of a block-sparse product.

    Fields:
      block: side b of a block.
      outputs: block columns of the output (matmul: (M, outputs x b)) or live blocks (gradient: (outputs, b, b)).
      transpose: each block is used transposed (the input gradient).
    """

    out_dtype: np.dtype
    tiling: Tiling
    block: int
    outputs: int
    transpose: bool = False


class BlockOperands(NamedTuple):
    """Array arguments of a block-sparse product.

    Fields:
      x: (M, K) with K padded to a multiple of the block; (M, N) for `transpose`.
      other: blocks (B, b, b) for the matmul; dy (M, N) for the weight gradient.
      steps: `BlockStructure.forward`, `.transposed` or `.contraction`, as int32 arrays on the device.
    """

    x: Array
    other: Array
    steps: Steps
