"""Block-sparse matmul: the product with a block-pruned weight and its gradients, over live blocks only."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe.kernels import checks
from moe.kernels.implementations import align, call, choose, tiling
from moe.kernels.metadata import Steps
from moe.kernels.spec import BlockOperands, BlockSpec
from moe.kernels.structure import BlockStructure
from moe.kernels.tiling import Tiling


@dataclass(frozen=True)
class _Call:
    block: int
    grid: tuple[int, int]
    backend: str
    tiling: Tiling | None


def block_sparse_matmul(
    x: Float[Array, "M K"],
    blocks: Float[Array, "B b b"],
    structure: BlockStructure,
    *,
    backend: str = "auto",
    tiling: Tiling | None = None,
) -> Float[Array, "M N"]:
    """Multiply by a block-sparse weight: x @ to_dense(blocks, structure).

    Products are in x's dtype, sums in float32. Differentiable in x and blocks; the gradients are computed on live
    blocks only. Where K or N is not a multiple of the block, the last blocks reach past the weight: entries there are
    ignored in the product and their gradient is zero.

    Args:
      x: (M, K) bfloat16, float16 or float32.
      blocks: (B, b, b) live blocks of x's dtype, in the order of `structure.k_B`, `structure.n_B` (see `to_blocks`).
      structure: from `block_structure`.
      backend, tiling: as for `grouped_matmul`.

    Raises:
      ValueError: shapes that do not fit together, an unknown backend, or one that the platform compiled for cannot
        run.
      TypeError: x and blocks of different dtypes, or of one that the kernels do not multiply.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe.kernels import block_sparse_matmul, block_structure, to_blocks
      >>> w_KN = jnp.zeros((128, 64)).at[:64].set(1.0)
      >>> structure = block_structure(w_KN != 0, 64)
      >>> float(block_sparse_matmul(jnp.ones((2, 128)), to_blocks(w_KN, structure), structure)[0, 0])
      64.0
    """
    (k, n), b = structure.shape, structure.block
    if x.shape[1] != k or blocks.shape != (structure.live, b, b):
        raise ValueError(
            f"x of {x.shape} and blocks of {blocks.shape} for a weight of {structure.shape} with {structure.live} live "
            f"blocks: ({x.shape[0]}, {k}) and {(structure.live, b, b)} are needed"
        )
    checks.fixed(x=x)
    checks.multiplied(x.dtype, "x")
    if x.dtype != blocks.dtype:
        raise TypeError(f"x is {x.dtype} and blocks are {blocks.dtype}: cast one to the other")
    if structure.live == 0 or x.shape[0] == 0:
        return jnp.zeros((x.shape[0], n), x.dtype)
    static = _Call(b, structure.grid, choose(backend, x), tiling)
    x = jnp.pad(x, [(0, 0), (0, -k % b)])
    steps = jax.tree.map(jnp.asarray, (structure.forward, structure.transposed, structure.contraction))
    return _block_sparse(static, *align((x, blocks, steps)))[:, :n]


def to_blocks(w_KN: Float[Array, "K N"], structure: BlockStructure) -> Float[Array, "B b b"]:
    """Cut the live blocks out of a dense weight; zeros where a block reaches past it.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe.kernels import block_structure, to_blocks
      >>> w_KN = jnp.zeros((128, 64)).at[:64].set(1.0)
      >>> to_blocks(w_KN, block_structure(w_KN != 0, 64)).shape
      (1, 64, 64)
    """
    b, (rows, cols) = structure.block, structure.grid
    w = jnp.pad(w_KN, [(0, rows * b - w_KN.shape[0]), (0, cols * b - w_KN.shape[1])])
    return w.reshape(rows, b, cols, b).swapaxes(1, 2)[structure.k_B, structure.n_B]


def to_dense(blocks: Float[Array, "B b b"], structure: BlockStructure) -> Float[Array, "K N"]:
    """Expand live blocks to a dense weight with zeros in the pruned blocks.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe.kernels import block_structure, to_blocks, to_dense
      >>> w_KN = jnp.zeros((128, 64)).at[:64].set(1.0)
      >>> structure = block_structure(w_KN != 0, 64)
      >>> bool((to_dense(to_blocks(w_KN, structure), structure) == w_KN).all())
      True
    """
    b, (rows, cols) = structure.block, structure.grid
    w = jnp.zeros((rows, cols, b, b), blocks.dtype).at[structure.k_B, structure.n_B].set(blocks)
    return w.swapaxes(1, 2).reshape(rows * b, cols * b)[: structure.shape[0], : structure.shape[1]]


def _tiles(static: _Call, kernel: str, x: jax.Array, k: int, n: int) -> Tiling:
    return static.tiling or tiling(kernel, static.backend, rows_per_group=float(x.shape[0]), k=k, n=n, dtype=x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block_sparse(static: _Call, x: jax.Array, blocks: jax.Array, steps: tuple[Steps, Steps, Steps]):
    return _product(static, x, blocks, steps[0], transpose=False)


def _product(static, x, blocks, steps, *, transpose):
    rows, cols = static.grid[::-1] if transpose else static.grid
    tiles = _tiles(static, "block", x, rows * static.block, cols * static.block)
    spec = BlockSpec(np.dtype(x.dtype), tiles, static.block, cols, transpose)
    return call("block_matmul", static.backend, BlockOperands(x, blocks, steps), spec)


def _forward(static, x, blocks, steps):
    return _block_sparse(static, x, blocks, steps), (x, blocks, steps)


def _backward(static, saved, dy):
    x, blocks, steps = saved
    dx = _product(static, dy, blocks, steps[1], transpose=True)
    tiles = _tiles(static, "block_contraction", x, x.shape[1], dy.shape[1])
    spec = BlockSpec(np.dtype(blocks.dtype), tiles, static.block, blocks.shape[0])
    dblocks = call("block_contract", static.backend, BlockOperands(x, dy, steps[2]), spec)
    return dx, dblocks, None


_block_sparse.defvjp(_forward, _backward)
