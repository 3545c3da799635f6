"""The TPU path: Mosaic kernels over scalar-prefetched steps. Float16, which TPUs lack, is computed in float32."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe.kernels import tpu_block, tpu_contraction, tpu_grouped
from moe.kernels.spec import (
    BlockOperands,
    BlockSpec,
    ContractionOperands,
    ContractionSpec,
    GroupedOperands,
    GroupedSpec,
)
from moe.kernels.tiling import Tiling

TILINGS = {
    "grouped": Tiling(rows=256, inner=1024, cols=1024),
    # The compiler turns the weight's tile round in every step, whatever the rows (docs/kernels.md).
    "transposed": Tiling(rows=512, inner=1024, cols=1024),
    "contraction": Tiling(rows=256, inner=1024, cols=1024),
    "block": Tiling(rows=4096),
    "block_contraction": Tiling(rows=4096),
}


def grouped(operands: GroupedOperands, spec: GroupedSpec, *, interpret: bool = False):
    """See `spec.GroupedOperands` and `spec.GroupedSpec` for what goes in and comes out."""
    return _run(tpu_grouped.grouped, operands, spec, interpret)


def contract(operands: ContractionOperands, spec: ContractionSpec, *, interpret: bool = False):
    """Ragged contraction: (G, K, N), zeros for empty groups."""
    return _run(tpu_contraction.contract, operands, spec, interpret)


def block_matmul(operands: BlockOperands, spec: BlockSpec, *, interpret: bool = False):
    """Block-sparse matmul: (M, outputs x b)."""
    return _run(tpu_block.block_matmul, operands, spec, interpret)


def block_contract(operands: BlockOperands, spec: BlockSpec, *, interpret: bool = False):
    """Weight gradient of the live blocks: (outputs, b, b)."""
    return _run(tpu_block.block_contract, operands, spec, interpret)


def _run(kernel: Any, operands: Any, spec: Any, interpret: bool) -> Any:
    def widen(x):
        return x.astype(jnp.float32) if x.dtype == jnp.float16 else x

    dtype = np.dtype(np.float32) if spec.out_dtype == np.float16 else spec.out_dtype
    outs = kernel(jax.tree.map(widen, operands), replace(spec, out_dtype=dtype), interpret=interpret)
    return jax.tree.map(lambda out: out.astype(spec.out_dtype), outs)
