"""Products of rows with a kernel and, each, with a LoRA adapter of its own: many adapters of one base in one batch.

The kernel is multiplied once for all rows, and every row's two small matrices are gathered beside it (Punica: Chen et
al. 2023, arXiv:2310.18547; S-LoRA: Sheng et al. 2023, arXiv:2311.03285). So no row sees the adapter of another.

Axes: N rows, T tokens of a row, A adapters, R rank, I inputs, O outputs.
"""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sharding.inference.few_rows import Kernel, Projection


class AdaptedProjection(Projection):
    """A kernel with adapters, in its place: row n of x [N, T, *inputs] is multiplied by kernel + a[i] b[i], i its own.

    Args:
      kernel: [*inputs, *outputs], or what stands for it; the product with it is rounded to the dtype of x.
      a: [A, *inputs, R]; the products with a and b are float32.
      b: [A, R, *outputs], what scales a b folded in.
      adapter_N: of each row.

    Example:
      >>> import jax.numpy as jnp
      >>> from sharding.inference import AdaptedProjection
      >>> a, b = jnp.ones((2, 3, 1)), jnp.array([[[0.0, 0.0]], [[1.0, 2.0]]])  # the first adds nothing
      >>> (jnp.ones((2, 1, 3)) @ AdaptedProjection(jnp.zeros((3, 2)), a, b, jnp.array([0, 1]))).tolist()
      [[[0.0, 0.0]], [[3.0, 6.0]]]
    """

    def __init__(
        self, kernel: Kernel, a: Float[Array, "A *I R"], b: Float[Array, "A R *O"], adapter_N: Int[Array, " N"]
    ):
        self.kernel, self.a, self.b, self.adapter_N, self.shape = kernel, a, b, adapter_N, kernel.shape

    def __call__(self, x: Float[Array, "N T *I"]) -> Float[Array, "N T *O"]:
        """Multiply every row by the kernel and by its adapter."""
        kernel: Any = self.kernel
        inputs, (n, t), rank = self.a.ndim - 2, x.shape[:2], self.a.shape[-1]
        y = kernel(x) if isinstance(kernel, Projection) else jnp.tensordot(x, kernel.astype(x.dtype), inputs)
        x_NTI = x.reshape(n, t, -1).astype(jnp.float32)
        a_NIR = self.a[self.adapter_N].reshape(n, -1, rank)
        b_NRO = self.b[self.adapter_N].reshape(n, rank, math.prod(self.shape[inputs:]))
        added = (x_NTI @ a_NIR) @ b_NRO
        return (y.astype(jnp.float32) + added.reshape(y.shape)).astype(x.dtype)
