"""tpu backend: Mosaic kernels over scalar-prefetched steps; float16, which TPUs lack, is computed in float32."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe.kernels.spec import (
    BlockOperands,
    BlockSpec,
    ContractionOperands,
    ContractionSpec,
    GroupedOperands,
    GroupedSpec,
)
from moe.kernels.tiling import Tiling
from moe.kernels.tpu import block, contraction
from moe.kernels.tpu import grouped as tpu_grouped

TILINGS = {
    "grouped": Tiling(rows=256, inner=1024, cols=1024),
    "contraction": Tiling(rows=256, inner=1024, cols=1024),
    "block": Tiling(rows=4096),
    "block_contraction": Tiling(rows=4096),
}


def default_tiling(kernel: str, rows_per_group: float | int, transpose: bool) -> Tiling:
    """Choose tile sizes where none are measured, by bytes and the compiler's listings (docs/kernels.md).

    A weight's tile is read (and transposed, for the input gradient) in every step, so taller row tiles share it better;
    but every group also multiplies up to a tile of other rows, at most a quarter of its own here.
    """
    tiling = TILINGS[kernel]
    if kernel != "grouped":
        return tiling
    rows = 2 * tiling.rows if transpose else tiling.rows
    while rows < 1024 and 4 * 2 * rows <= rows_per_group:
        rows *= 2
    return replace(tiling, rows=rows)


def grouped(operands: GroupedOperands, spec: GroupedSpec, *, interpret: bool = False):
    """Grouped matmul, see `spec.GroupedOperands` and `spec.GroupedSpec`."""
    return _run(tpu_grouped.grouped, operands, spec, interpret)


def contract(operands: ContractionOperands, spec: ContractionSpec, *, interpret: bool = False):
    """Ragged contraction: (G, K, N), zeros for empty groups."""
    return _run(contraction.contract, operands, spec, interpret)


def block_matmul(operands: BlockOperands, spec: BlockSpec, *, interpret: bool = False):
    """Block-sparse matmul: (M, outputs x b)."""
    return _run(block.block_matmul, operands, spec, interpret)


def block_contract(operands: BlockOperands, spec: BlockSpec, *, interpret: bool = False):
    """Weight gradient of the live blocks: (outputs, b, b)."""
    return _run(block.block_contract, operands, spec, interpret)


def _run(kernel: Any, operands: Any, spec: Any, interpret: bool) -> Any:
    def widen(x):
        return x.astype(jnp.float32) if x.dtype == jnp.float16 else x

    dtype = np.dtype(np.float32) if spec.out_dtype == np.float16 else spec.out_dtype
    outs = kernel(jax.tree.map(widen, operands), replace(spec, out_dtype=dtype), interpret=interpret)
    return jax.tree.map(lambda out: out.astype(spec.out_dtype), outs)
