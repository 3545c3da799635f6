"""Products of few rows with a kernel on a CPU, as decoding has them: the kernel's layout, and what is multiplied how.

XLA's products on CPUs copy the right-hand operand into blocks first (packing). With a handful of rows that copy is
most of the time, so the kernel is the left-hand operand here, transposed once when it is placed. An int8 kernel is
multiplied in int8, every row's inputs quantized on the fly (Dettmers et al. 2022, section 3.1, vector-wise).

Axes: R rows, I inputs, O outputs.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sharding.inference.kv_cache import quantize_vectors
from sharding.inference.quantize import QuantConfig, Quantized, dequantize, quantize_matrix

MANY = 32
"""Rows from which on packing pays for itself."""


class RowKernel(NamedTuple):
    """A kernel transposed to values [O, I]: float, or int8 with a float32 scale [O] per output, else None.

    Example:
      >>> import jax.numpy as jnp
      >>> from sharding.inference import lay_out_rows
      >>> kernel = lay_out_rows(jnp.ones((2, 3, 4)), inputs=1)
      >>> kernel.values.shape, kernel.scales
      ((12, 2), None)
    """

    values: Any
    scales: Any = None


def lay_out_rows(kernel: Any, inputs: int) -> RowKernel:
    """Transpose a kernel whose first `inputs` axes are contracted; a `Quantized` one becomes int8, a scale per output.

    Symmetric int8 with one scale per output keeps its values. What is quantized otherwise (4 bits, groups, zeros, AWQ's
    channels) is rounded once more, to 1/254 of an output's largest weight at most.

    Example:
      >>> import numpy as np
      >>> from sharding.inference import QuantConfig, lay_out_rows, quantize_matrix
      >>> lay_out_rows(quantize_matrix(np.eye(8), QuantConfig(4)), inputs=1).values.dtype.name
      'int8'
    """
    if not isinstance(kernel, Quantized):
        kernel = jnp.asarray(kernel)
        return RowKernel(kernel.reshape(math.prod(kernel.shape[:inputs]), -1).T)
    shape = kernel.values.shape
    size = math.prod(shape[:inputs])
    plain = kernel.channel is None and kernel.zeros is None and kernel.groups is None
    if not (plain and kernel.values.dtype == jnp.int8 and math.prod(kernel.scales.shape[:inputs]) == 1):
        kernel = quantize_matrix(np.asarray(dequantize(kernel)).reshape(size, -1), QuantConfig(8))
    values_OI = jnp.asarray(kernel.values).reshape(size, -1).T
    return RowKernel(values_OI, jnp.asarray(kernel.scales, jnp.float32).reshape(-1))


def row_product(x_RI: Float[Array, "R I"], kernel: RowKernel) -> Float[Array, "R O"]:
    """Multiply rows with a kernel, in float32 sums; the dtype is float32.

    Args:
      x_RI: inputs, float.
      kernel: from `lay_out_rows`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sharding.inference import lay_out_rows, row_product
      >>> row_product(jnp.ones((1, 2)), lay_out_rows(jnp.ones((2, 3)), inputs=1)).tolist()
      [[2.0, 2.0, 2.0]]
    """
    rows = x_RI.shape[0]
    exact = kernel.scales is None
    if rows == 1 and kernel.values.dtype != jnp.float32:  # XLA has a loop of scalars for one row of these
        return row_product(jnp.concatenate([x_RI, x_RI]), kernel)[:1]
    over = (((1,), (1,)), ((), ()))
    if exact and kernel.values.dtype == jnp.float32 and rows < MANY:
        y_OR = jax.lax.dot_general(kernel.values, x_RI.astype(jnp.float32), over)
        # Without the barrier XLA turns the product around, to save transposing this small result.
        return jax.lax.optimization_barrier(y_OR).T
    if exact:
        x_RI = x_RI.astype(kernel.values.dtype)
        return jax.lax.dot_general(x_RI, kernel.values, over, preferred_element_type=jnp.float32)
    q_RI, scale_R = quantize_vectors(x_RI)
    y_RO = jax.lax.dot_general(q_RI, kernel.values, over, preferred_element_type=jnp.int32)
    return y_RO.astype(jnp.float32) * scale_R[:, None] * kernel.scales[None]


class Projection(ABC):
    """What stands in the place of the kernel [*inputs, *outputs] of a layer: `projection(x)` is the product.

    A leaf of the tree that Flax is given, with the shape that it expects.
    """

    shape: tuple[int, ...]

    def astype(self, dtype: Any) -> "Projection":
        """The same: the product has the dtype of its input."""
        return self

    @abstractmethod
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Multiply x [*N, *inputs] to [*N, *outputs], in the dtype of x."""

    def __rmatmul__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The product, written x @ projection."""
        return self(x)


class RowProjection(Projection):
    """A `RowKernel` in the place of a kernel of `shape`, whose first axes are `inputs`."""

    def __init__(self, kernel: RowKernel, shape: tuple[int, ...], inputs: int):
        self.kernel, self.shape, self.inputs = kernel, shape, inputs

    @property
    def scales(self) -> Any:
        """Those of the kernel."""
        return self.kernel.scales

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Multiply by the kernel."""
        front = x.shape[: x.ndim - self.inputs]
        y_RO = row_product(x.reshape(math.prod(front), -1), self.kernel)
        return y_RO.reshape(*front, *self.shape[self.inputs :]).astype(x.dtype)


Kernel = Float[Array, "..."] | Projection
"""Of a layer: an array, or what stands for it in decoding."""
