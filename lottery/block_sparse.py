"""Block-sparse tickets: live blocks of pruned kernels, multiplied by the block-sparse kernel of `moe.kernels`.

A mask of 64 x 64 or 128 x 128 blocks (structure "64x64") becomes, once and on the host, a list of live blocks for each
kernel; products and both gradients then touch those only. The reference is the dense product of w * m.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from lottery import masks as masks_lib
from moe.kernels import BlockStructure, block_sparse_matmul, block_structure, to_blocks, to_dense

__all__ = ["BlockWeights", "apply_chain", "multiply", "pack", "pack_chain", "swiglu", "unpack"]


class BlockWeights(NamedTuple):
    """A block-sparse kernel. A pytree.

    Attributes:
      blocks: live blocks [B, b, b], to be trained.
      structure: their places.

    Example:
      >>> kernel, mask = jnp.ones((128, 64)), jnp.arange(128)[:, None] < jnp.full((1, 64), 64)
      >>> lottery.block_sparse.pack(kernel, mask).blocks.shape
      (1, 64, 64)
    """

    blocks: Array
    structure: BlockStructure


def pack(kernel: Float[Array, "K N"], mask: Array, block: int = 64) -> BlockWeights:
    """Pack a masked kernel into its live blocks; entries outside the mask are zeroed first.

    Raises:
      ValueError: a block side other than 64 or 128, or a mask that is no matrix.

    Example:
      >>> kernel, mask = jnp.ones((128, 64)), jnp.arange(128)[:, None] < jnp.full((1, 64), 64)
      >>> weights = lottery.block_sparse.pack(kernel, mask)
      >>> float(lottery.block_sparse.unpack(weights).sum())
      4096.0
    """
    structure = block_structure(mask, block)
    return BlockWeights(to_blocks(jnp.where(mask, kernel, 0), structure), structure)


def unpack(weights: BlockWeights) -> Float[Array, "K N"]:
    """Unpack the kernel to a matrix, zeros in dead blocks.

    Example:
      >>> kernel, mask = jnp.ones((128, 64)), jnp.arange(128)[:, None] < jnp.full((1, 64), 64)
      >>> lottery.block_sparse.unpack(lottery.block_sparse.pack(kernel, mask)).shape
      (128, 64)
    """
    return to_dense(weights.blocks, weights.structure)


def multiply(x: Float[Array, "*N K"], weights: BlockWeights) -> Float[Array, "*N M"]:
    """Multiply x by a block-sparse kernel, in x's dtype; differentiable in x and the blocks.

    Example:
      >>> kernel, mask = jnp.ones((128, 64)), jnp.arange(128)[:, None] < jnp.full((1, 64), 64)
      >>> lottery.block_sparse.multiply(jnp.ones((2, 128)), lottery.block_sparse.pack(kernel, mask))[:, 0].tolist()
      [64.0, 64.0]
    """
    flat = x.reshape(-1, x.shape[-1])
    y = block_sparse_matmul(flat, weights.blocks.astype(x.dtype), weights.structure)
    return y.reshape(*x.shape[:-1], -1)


def swiglu(x: Float[Array, "*N D"], gate: BlockWeights, up: BlockWeights, down: BlockWeights) -> Float[Array, "*N D"]:
    """Apply the decoder's feed-forward layer (SwiGLU), (silu(x gate) * (x up)) down, on block-sparse kernels.

    Example:
      >>> weights = lottery.block_sparse.pack(jnp.eye(64), jnp.ones((64, 64), bool))
      >>> lottery.block_sparse.swiglu(jnp.zeros((2, 64)), weights, weights, weights).shape
      (2, 64)
    """
    return multiply(jax.nn.silu(multiply(x, gate)) * multiply(x, up), down)


def pack_chain(
    params: Mapping[str, PyTree], masks: PyTree, layers: Sequence[str], block: int = 64
) -> dict[str, PyTree]:
    """Pack the kernels of `layers` in a chain of dense layers {kernel, bias}; the others stay dense.

    Raises:
      ValueError: masks that do not fit (naming the path), or a layer that is missing.

    Example:
      >>> params = {"dense0": {"kernel": jnp.ones((64, 64)), "bias": jnp.zeros(64)}}
      >>> packed = lottery.block_sparse.pack_chain(params, lottery.masks.ones(params), ["dense0"])
      >>> type(packed["dense0"]["kernel"]).__name__
      'BlockWeights'
    """
    masks_lib.check(masks, params)
    for name in layers:
        if name not in params:
            raise ValueError(f"pack_chain: no layer {name}; layers: {', '.join(params)}")
    packed = {name: dict(layer) for name, layer in masks_lib.apply(params, masks).items()}
    for name in layers:
        packed[name]["kernel"] = pack(params[name]["kernel"], masks[name]["kernel"], block)
    return packed


def apply_chain(
    params: Mapping[str, PyTree],
    x: Float[Array, "B ..."],
    layers: Sequence[str],
    activation: Callable[[Array], Array] = jax.nn.relu,
) -> Float[Array, "B C"]:
    """Apply a chain of dense layers, packed or not, to flattened inputs; no activation after the last of `layers`.

    Example:
      >>> params = {"dense0": {"kernel": jnp.eye(64), "bias": jnp.zeros(64)}}
      >>> packed = lottery.block_sparse.pack_chain(params, lottery.masks.ones(params), ["dense0"])
      >>> lottery.block_sparse.apply_chain(packed, jnp.ones((2, 8, 8)), ["dense0"]).shape
      (2, 64)
    """
    x = x.reshape(x.shape[0], -1)
    for i, name in enumerate(layers):
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        x = multiply(x, kernel) if isinstance(kernel, BlockWeights) else x @ kernel
        x = x + bias[None]
        x = activation(x) if i + 1 < len(layers) else x
    return x
