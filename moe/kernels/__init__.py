"""Grouped (ragged) matmul of routed experts and block-sparse matmul of pruned weights, with their gradients.

Axis legend: T rows of x before the gather (tokens), M rows after it, K contraction, N output columns, G groups
(experts), S steps of the metadata, B live blocks, b side of a block, Q blocks of K that share a scale.
`docs/kernels.md` has a drawing.

Example:
  >>> import jax.numpy as jnp
  >>> from moe.kernels import SwiGLU, grouped_matmul
  >>> x_TK, gate_GKN, up_GKN = jnp.ones((5, 4)), jnp.ones((2, 4, 6)), jnp.ones((2, 4, 6))
  >>> grouped_matmul(x_TK, (gate_GKN, up_GKN), jnp.array([2, 3]), epilogue=SwiGLU()).shape
  (5, 6)
"""

from moe.kernels.block_sparse import block_sparse_matmul, to_blocks, to_dense
from moe.kernels.grouped import grouped_matmul
from moe.kernels.quantize import Quantized, quantize
from moe.kernels.spec import Combine, SwiGLU
from moe.kernels.structure import BlockStructure, block_structure

__all__ = [
    "BlockStructure",
    "Combine",
    "Quantized",
    "SwiGLU",
    "block_sparse_matmul",
    "block_structure",
    "grouped_matmul",
    "quantize",
    "to_blocks",
    "to_dense",
]
