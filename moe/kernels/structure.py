"""Block structure of a pruned weight, made once on the host from a mask, together with its transpose."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from moe.kernels.metadata import Steps


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k_B", "n_B", "forward", "transposed", "contraction"],
    meta_fields=["block", "shape"],
)
@dataclass(frozen=True)
class BlockStructure:
    """Live blocks of a (K, N) weight by output column, then by row; a pytree, to be passed to jit as an argument.

    An output column without live blocks has one step with live 0, which writes zeros.

    Fields:
      k_B, n_B: block row and block column of each live block.
      forward: steps of y = x W (a block column of x, b live block, o block column of y).
      transposed: steps of dx = dy W^T (a block column of dy, b live block, o block column of dx).
      contraction: steps of the weight gradient (a block column of x, b block column of dy, o live block).
      block: side of a block.
      shape: (K, N) of the weight.

    Example:
      >>> import numpy as np
      >>> from moe.kernels import BlockStructure, block_structure
      >>> structure = block_structure(np.eye(3, dtype=bool), 64, shape=(192, 192))
      >>> isinstance(structure, BlockStructure), structure.live, structure.grid
      (True, 3, (3, 3))
    """

    k_B: Int[Array, " B"] | np.ndarray
    n_B: Int[Array, " B"] | np.ndarray
    forward: Steps
    transposed: Steps
    contraction: Steps
    block: int
    shape: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks along K and along N; the last ones may reach past the weight."""
        return -(-self.shape[0] // self.block), -(-self.shape[1] // self.block)

    @property
    def live(self) -> int:
        """B: number of live blocks."""
        return self.k_B.shape[0]


def block_structure(mask_KN: Any, block: int = 128, *, shape: tuple[int, int] | None = None) -> BlockStructure:
    """Find the live blocks of a weight from its pruning mask.

    Args:
      mask_KN: concrete boolean (K, N) array; a block is live if any of its elements is True. With `shape`, a boolean
        (ceil(K / block), ceil(N / block)) array with one entry per block.
      block: 64 or 128.
      shape: (K, N) of the weight, if the mask is given by blocks.

    Raises:
      ValueError: a block size other than 64 or 128, or a mask of the wrong shape.
      jax.errors.TracerArrayConversionError: the mask is traced; a structure is made on the host.

    Example:
      >>> import numpy as np
      >>> from moe.kernels import block_structure
      >>> mask_KN = np.zeros((128, 128), bool)
      >>> mask_KN[70, 3] = True
      >>> structure = block_structure(mask_KN, 64)
      >>> structure.k_B.tolist(), structure.n_B.tolist()
      ([1], [0])
    """
    if block not in (64, 128):
        raise ValueError(f"block={block}: the kernels have blocks of 64 and 128")
    mask: np.ndarray = np.asarray(mask_KN, bool)
    if mask.ndim != 2 or 0 in mask.shape:
        raise ValueError(f"mask of shape {mask.shape}: a matrix with at least one element is needed")
    if shape is None:
        shape = mask.shape
        padded = np.pad(mask, [(0, -size % block) for size in shape])
        mask = np.any(padded.reshape(padded.shape[0] // block, block, -1, block), axis=(1, 3))
    elif mask.shape != (expected := tuple(-(-size // block) for size in shape)):
        raise ValueError(f"block mask of shape {mask.shape} for a weight of {shape}: {expected} is needed")
    n_B, k_B = (index.astype(np.int32) for index in np.nonzero(mask.T))
    number = np.arange(len(k_B), dtype=np.int32)
    by_row = np.lexsort((n_B, k_B)).astype(np.int32)
    return BlockStructure(
        k_B=k_B,
        n_B=n_B,
        forward=_segments(k_B, number, n_B, mask.shape[1], block),
        transposed=_segments(n_B[by_row], by_row, k_B[by_row], mask.shape[0], block),
        contraction=_segments(k_B, n_B, number, len(k_B), block),
        block=block,
        shape=(int(shape[0]), int(shape[1])),
    )


def _segments(a, b, o, outputs: int, block: int) -> Steps:
    """Sort steps by o, and add one with live 0 for every output that has none."""
    silent = np.setdiff1d(np.arange(outputs, dtype=np.int32), o)
    none = np.zeros_like(silent)
    order = np.argsort(np.concatenate([o, silent]), kind="stable")
    live = np.concatenate([np.ones_like(o), none])[order]
    begin, end = np.zeros_like(live), np.full_like(live, block)
    a, b, o = (np.concatenate(pair)[order] for pair in ((a, none), (b, none), (o, silent)))
    return Steps(a, b, o, begin, end, live, np.asarray(len(o), np.int32))  # type: ignore[arg-type]
