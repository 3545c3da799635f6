"""Dequantization of int8 and fp8 weights in the Hopper kernel, a step at a time in SMEM.

wgmma multiplies operands of one dtype only. So the producer loads a step of the quantized weight and its scales; the
consumer warpgroups each dequantize a part of it into a second buffer of the slot, synchronize, and multiply from there.
The slot's barriers protect that buffer too.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.kernels.hopper.ring import ALIGN, Tile

# Columns of an SMEM tile, also of elements of one byte.
COLUMNS = 64
# Dtypes with a register conversion; float8_e5m2 is dequantized before the kernel.
DTYPES = ("int8", "float8_e4m3fn")


def supported(dtype: Any, k: int, shares: int, step: int) -> bool:
    """Whether the kernel dequantizes such a weight: a step of K must lie within one block of scales."""
    return jnp.dtype(dtype).name in DTYPES and (shares == 1 or k // shares % step == 0)


def tiles(step: int, cols: int, dtype: Any, wide: Any) -> list[Tile]:
    """Return the tiles of a slot: the quantized weight, its scales, and the dequantized weight."""
    narrow = plgpu.TilingTransform((ALIGN, COLUMNS)), plgpu.SwizzleTransform(COLUMNS)
    return [
        Tile((step, cols), dtype, layout=narrow),
        Tile((cols,), jnp.float32, layout=()),
        Tile((step, cols), wide, copies=0),
    ]


def load(w: Any, scales: Any, at: tuple, step: int, parts: Any, barrier: Any) -> None:
    """Load a step of a weight and its scales.

    Args:
      w: (G, K, N) quantized.
      scales: (G, Q, N) float32.
      at: group, first of K, first of N.
      step: rows of K.
      parts: of the slot, as `tiles` has them.
      barrier: counts the arrivals.
    """
    group, inner, col = at
    across = pl.ds(col, parts[0].shape[1])
    share = lax.div(inner, jnp.int32(-(-w.shape[1] // scales.shape[1])))
    plgpu.copy_gmem_to_smem(w.at[group, pl.ds(inner, step), across], parts[0], barrier)
    plgpu.copy_gmem_to_smem(scales.at[group, share, across], parts[1], barrier)


def widen(weights: Sequence[Any], consumers: int) -> list[Any]:
    """Dequantize the weights of a step into the dtype of the product.

    The consumer warpgroups alternate, 64 columns each (register layouts have 64 rows or more).

    Args:
      weights: parts of the slot of each, as `tiles` has them.
      consumers: consumer warpgroups.

    Returns:
      The dequantized buffer of each, complete after a barrier of all consumers.
    """
    turn = 0
    for narrow, scales, wide in weights:
        for col in range(0, narrow.shape[1], COLUMNS):

            @pl.when(lax.axis_index("wg") == turn % consumers)
            def _columns(narrow=narrow, scales=scales, wide=wide, col=col):
                here = pl.ds(col, COLUMNS)
                values = plgpu.layout_cast(narrow[:, here].astype(jnp.float32), plgpu.Layout.WGMMA)
                wide[:, here] = (values * lax.broadcast_in_dim(scales[here], values.shape, (1,))).astype(wide.dtype)
                plgpu.commit_smem()

            turn += 1
    return [wide for _, _, wide in weights]
