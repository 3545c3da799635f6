"""gpu backend: Mosaic GPU kernels for Hopper (wgmma, TMA, persistent, warp-specialized), bfloat16 and float16.

Not in the kernels, but around them (the first two are logged once):

- float32 operands, and fewer than 8 rows, run as plain JAX (`moe.kernels.xla.ops`): wgmma has no float32.
- float8_e5m2 weights, and int8 and float8_e4m3fn ones with fewer rows a scale than a step has, are dequantized first.
- A deterministic combine is a pass after the kernel, in the program that XLA compiles around it.
- K and N that are no multiples of 64, and rows that are no multiple of 8, are padded by a copy.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from absl import logging

from moe.kernels.implementations import OLDEST_MOSAIC_GPU, hopper
from moe.kernels.quantize import dequantize
from moe.kernels.spec import (
    BlockOperands,
    BlockSpec,
    ContractionOperands,
    ContractionSpec,
    GroupedOperands,
    GroupedSpec,
)
from moe.kernels.tiling import Tiling
from moe.kernels.xla import ops, ragged

# `inner` is a step of the contraction. Not tuned: chosen by counting registers, shared memory and L2 reads
# (docs/kernels.md). The weight gradients choose `cols` only, and blocks are their own columns.
TILINGS = {
    "grouped": Tiling(rows=128, inner=64, cols=256),
    "contraction": Tiling(rows=128, inner=64, cols=256),
    "block": Tiling(rows=256, inner=64, cols=128),
    "block_contraction": Tiling(rows=256, inner=64, cols=128),
}
DTYPES = ("bfloat16", "float16")
POSSIBLE = {"rows": (128, 256), "inner": (64, 128), "cols": (64, 128, 192, 256)}


def grouped(operands: GroupedOperands, spec: GroupedSpec, *, interpret: bool = False):
    """Grouped matmul, see `spec.GroupedOperands` and `spec.GroupedSpec`."""
    if not _runs("grouped", operands.x, interpret):
        return ops.grouped(operands, replace(spec, tiling=ops.TILINGS["grouped"]))
    from moe.kernels.hopper import grouped as gpu_grouped
    from moe.kernels.hopper import ring, widen

    check(spec.tiling)
    x, rows, w, scales = operands.x, operands.rows, operands.w, operands.scales
    if scales and not widen.supported(w[0].dtype, w[0].shape[1], scales[0].shape[1], spec.tiling.inner):
        logging.log_first_n(logging.WARNING, "gpu: %s weights are dequantized to %s first", 1, w[0].dtype, x.dtype)
        w = tuple(dequantize(each, scale, x.dtype) for each, scale in zip(w, scales, strict=True))
        scales = ()
    columns = w[0].shape[1 if spec.transpose else 2]
    plain = operands._replace(
        x=_pad(x, 8 if operands.gather is None else 1, 64),
        w=tuple(_pad(each, 64, 64) for each in w),
        scales=tuple(_pad(each, 1, 64) for each in scales),
    )
    combine = spec.epilogue == "combine"
    after = combine and (spec.deterministic or interpret and "additions" in ring.LACKING)
    outs = gpu_grouped.grouped(plain, replace(spec, epilogue="none") if after else spec, interpret=interpret)
    if combine and not after:
        return outs[0][:, :columns].astype(spec.out_dtype)
    outs = tuple(out[:rows, :columns] for out in outs)
    if after:
        return ragged.combine(outs[0], operands.tokens, operands.weights, spec)
    return outs if spec.save_residuals else outs[0]


def contract(operands: ContractionOperands, spec: ContractionSpec, *, interpret: bool = False):
    """Ragged contraction: (G, K, N), zeros for empty groups."""
    if not _runs("contraction", operands.x, interpret):
        return ops.contract(operands, replace(spec, tiling=ops.TILINGS["contraction"]))
    from moe.kernels.hopper import contraction

    check(spec.tiling)
    x, k, n = operands.x, operands.x.shape[1], operands.dy.shape[1]
    x = _pad(x, 8 if operands.gather is None else 1, 64)
    padded = operands._replace(x=x, dy=_pad(operands.dy, 8, 64))
    return contraction.contract(padded, spec, interpret=interpret)[:, :k, :n]


def block_matmul(operands: BlockOperands, spec: BlockSpec, *, interpret: bool = False):
    """Block-sparse matmul: (M, outputs x b)."""
    if not _runs("block", operands.x, interpret):
        return ops.block_matmul(operands, replace(spec, tiling=ops.TILINGS["block"]))
    from moe.kernels.hopper import block

    check(spec.tiling, spec.block)
    padded = operands._replace(x=_pad(operands.x, 8, 64))
    return block.block_matmul(padded, spec, interpret=interpret)[: operands.x.shape[0]]


def block_contract(operands: BlockOperands, spec: BlockSpec, *, interpret: bool = False):
    """Weight gradient of the live blocks: (outputs, b, b)."""
    if not _runs("block_contraction", operands.x, interpret):
        return ops.block_contract(operands, replace(spec, tiling=ops.TILINGS["block_contraction"]))
    from moe.kernels.hopper import block

    check(spec.tiling, spec.block)
    padded = operands._replace(x=_pad(operands.x, 8, 64), other=_pad(operands.other, 8, 64))
    return block.block_contract(padded, spec, interpret=interpret)


def check(tiling: Tiling, block: int | None = None) -> None:
    """Check tile sizes against wgmma's shapes and the registers of two warpgroups.

    Args:
      tiling: tile sizes.
      block: side of a block, where that is the number of columns.

    Raises:
      ValueError: naming the field and what is possible.
    """
    for field, values in POSSIBLE.items():
        if getattr(tiling, field) not in values and not (block and field == "cols"):
            raise ValueError(
                f"Tiling.{field}={getattr(tiling, field)} on a GPU: choose one of {', '.join(map(str, values))}"
            )
    if tiling.rows * (block or tiling.cols) > 128 * 256:
        raise ValueError(
            f"Tiling(rows={tiling.rows}, cols={tiling.cols}) on a GPU: that many float32 sums do not fit in the "
            "registers. rows x cols may be at most 128 x 256"
        )


def _runs(kernel: str, x: jax.Array, interpret: bool) -> bool:
    """Whether the kernels support x; if not, plain JAX runs, which is logged once a kernel.

    Raises:
      ValueError: a JAX too old for the kernels, or a device that is not a Hopper GPU.
    """
    if jax.__version_info__ < OLDEST_MOSAIC_GPU:
        raise ValueError(
            f"backend='gpu{'_interpret' if interpret else ''}' needs JAX 0.11 or newer (Python 3.12), this is "
            f"{jax.__version__}: use backend='auto' or 'xla' (plain JAX, runs anywhere)"
        )
    abstract, device = jax.sharding.get_abstract_mesh().abstract_device, jax.devices()[0]
    here = abstract is None or abstract.device_kind == device.device_kind
    if not interpret and here and jax.default_backend() == "gpu" and not hopper():
        raise ValueError(
            f"backend='gpu' runs on compute capability 9.0 (H100, H200), and this is {device.device_kind} with "
            f"{device.compute_capability}: use backend='auto' or 'xla' (plain JAX, runs anywhere)"
        )
    supported = x.dtype.name in DTYPES and x.shape[0] >= 8
    if not supported:
        message = "gpu: %s of %s %s runs as plain JAX: the kernels take %s and 8 rows or more"
        logging.log_first_n(logging.WARNING, message, 1, kernel, x.dtype, x.shape, " and ".join(DTYPES))
    return supported


def _pad(x: jax.Array, rows: int, cols: int) -> jax.Array:
    """Pad the last two axes with zeros to multiples."""
    extra = [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % rows), (0, -x.shape[-1] % cols)]
    return jnp.pad(x, extra) if any(after for _, after in extra) else x
