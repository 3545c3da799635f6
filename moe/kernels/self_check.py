"""A check of an accelerator's kernels before their first use: a few rows of the shape against plain JAX.

It compiles and runs a product with the operands' K, N, dtypes and tile sizes and few rows and groups, once per process,
in a thread of its own, where neither a trace nor a mesh is active.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from absl import logging

from moe.kernels.spec import BlockOperands, ContractionOperands, GroupedOperands
from moe.kernels.structure import block_structure
from moe.kernels.tiling import Tiling

# Two groups, with rows past their sum, of few tokens.
SIZES, ROWS, TOKENS = (13, 8), 24, 12
# Of the largest value: products in 16 bits differ by less, misplaced rows and columns by more.
TOLERANCE = 0.02


def works(name: str, run: Any, plain: Any, tiling: Tiling, operands: Any, spec: Any) -> bool:
    """Return whether a kernel compiles for the operands' shapes and agrees with plain JAX; a warning, once, if not.

    Args:
      name: of kernel and backend, for the warning.
      run: the kernel, (operands, spec=) -> outputs.
      plain: the same in plain JAX.
      tiling: of plain JAX.
      operands: arrays, or tracers: shapes and dtypes are used.
      spec: static arguments.

    Raises:
      ValueError, TypeError: from tracing, as the kernel itself would raise: operands that it cannot have.
    """
    leaves, tree = jax.tree.flatten(operands)
    shapes = tuple((leaf.shape, np.dtype(leaf.dtype)) for leaf in leaves)
    return _works(name, run, plain, tiling, tree, shapes, spec)


@cache
def _works(name, run, plain, tiling, tree, leaves, spec) -> bool:
    shapes = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
    with ThreadPoolExecutor(1) as thread:
        error = thread.submit(_difference, run, plain, tiling, shapes, spec).result()
    if error is None:
        return True
    logging.warning("%s of %s runs as plain JAX: %s", name, [leaf[0] for leaf in leaves], error)
    return False


def _difference(run, plain, tiling, shapes, spec) -> str | None:
    """Return what is wrong with the kernel, None for nothing."""
    operands, spec = few(shapes, spec)
    traced = jax.jit(partial(run, spec=spec)).trace(operands)
    try:
        found = traced.lower().compile()(operands)
        with jax.default_matmul_precision("highest"):
            right = jax.jit(partial(plain, spec=replace(spec, tiling=tiling)))(operands)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True)
        worst = max(_error(*map(partial(np.asarray, dtype=np.float32), pair)) for pair in pairs)
    except Exception as failure:  # a compiler's errors have many types
        return f"{type(failure).__name__}: {failure}"
    return None if worst <= TOLERANCE else f"a few rows differ by {worst:.1%} of the largest value"


def _error(found, right):
    error = np.max(np.abs(found - right)) / max(np.max(np.abs(right)), 1e-30)
    return np.inf if np.isnan(error) else error


def few(shapes: Any, spec: Any) -> tuple[Any, Any]:
    """Draw operands of the same kind with few rows and groups, and the spec of their product."""
    rng = np.random.default_rng(0)

    def draw(like, *lead):
        shape = (*lead, *like.shape[len(lead) :])
        values = rng.integers(-127, 128, shape) if like.dtype == np.int8 else rng.normal(size=shape)
        return values.astype(like.dtype)

    def numbers(like, below):
        return None if like is None else rng.integers(0, below, ROWS).astype(like.dtype)

    if isinstance(shapes, BlockOperands):
        return _few_blocks(shapes, spec, draw)
    gathered = shapes.gather is not None
    x = draw(shapes.x, TOKENS if gathered else ROWS)
    # Nothing may read rows past the sum.
    x[ROWS if gathered else sum(SIZES) :] = np.nan
    sizes: Any = np.array(SIZES, shapes.sizes.dtype)
    gather: Any = numbers(shapes.gather, TOKENS)
    if isinstance(shapes, ContractionOperands):
        return ContractionOperands(x, draw(shapes.dy, ROWS), sizes, gather), spec
    w = tuple(draw(each, len(SIZES)) for each in shapes.w)
    scales = tuple(abs(draw(each, len(SIZES))) for each in shapes.scales)
    weights = None if shapes.weights is None else draw(shapes.weights, ROWS)
    operands = GroupedOperands(x, w, scales, sizes, gather, numbers(shapes.tokens, TOKENS), weights)
    return operands, replace(spec, num_tokens=TOKENS if spec.num_tokens else 0)


def _few_blocks(shapes, spec, draw):
    b, inner = spec.block, shapes.x.shape[1] // spec.block
    contract = shapes.other.ndim == 2
    outer = shapes.other.shape[1] // b if contract else spec.outputs
    rows, cols = (outer, inner) if spec.transpose else (inner, outer)
    mask = np.arange(rows)[:, None] % cols == np.arange(cols)
    structure = block_structure(mask, b, shape=(rows * b, cols * b))
    if contract:
        operands = BlockOperands(draw(shapes.x, ROWS), draw(shapes.other, ROWS), structure.contraction)
        return operands, replace(spec, outputs=structure.live)
    steps = structure.transposed if spec.transpose else structure.forward
    return BlockOperands(draw(shapes.x, ROWS), draw(shapes.other, structure.live), steps), spec
