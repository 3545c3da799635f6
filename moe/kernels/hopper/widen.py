"""Int8 and fp8 weights on Hopper, widened a step at a time: device memory is read at a byte an element.

wgmma multiplies operands of one dtype only. So the loading warpgroup fetches a step of the quantized weight and its
scales, the multiplying warpgroups each widen a part of it into a second buffer of the slot, meet, and multiply from
there.
The slot protects that buffer too: nobody writes to it before the ring says that all have done with it.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from moe.kernels.hopper.ring import ALIGN, Tile

# Columns of a weight come in tiles of 64, also where an element is a byte.
COLUMNS = 64
# What registers widen. float8_e5m2 is widened before the kernel.
DTYPES = ("int8", "float8_e4m3fn")


def supported(dtype: Any, k: int, shares: int, step: int) -> bool:
    """Whether the kernel takes such a weight: a step of K may not meet two shares of it, each with its own scale."""
    return jnp.dtype(dtype).name in DTYPES and (shares == 1 or k // shares % step == 0)


def tiles(step: int, cols: int, dtype: Any, wide: Any) -> list[Tile]:
    """Parts of a slot: the weight as it comes, its scales, and the weight as it is multiplied."""
    narrow = plgpu.TilingTransform((ALIGN, COLUMNS)), plgpu.SwizzleTransform(COLUMNS)
    return [
        Tile((step, cols), dtype, layout=narrow),
        Tile((cols,), jnp.float32, layout=()),
        Tile((step, cols), wide, copies=0),
    ]


def load(w: Any, scales: Any, at: tuple, step: int, parts: Any, barrier: Any) -> None:
    """Fetch a step of a weight and the scales it has.

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
    """Scale the weights of a step and round them to the dtype that is multiplied.

    The multiplying warpgroups take turns, 64 columns each (registers are dealt out to 64 rows or more).

    Args:
      weights: parts of the slot of each, as `tiles` has them.
      consumers: multiplying warpgroups.

    Returns:
      The wide buffer of each, complete once all warpgroups have met.
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
