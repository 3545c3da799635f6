"""tokamax backend: grouped matmuls by `tokamax.ragged_dot`, with the epilogues around it in XLA.

On GPUs its Mosaic kernels run (Hopper and Blackwell; forward only on Ampere). What they do not support runs as plain
JAX (`moe.kernels.xla.ops`), which is logged once: dtypes other than bfloat16 and float16, K or N that are not multiples
of 64, block-sparse products, and what tokamax itself refuses. On other platforms tokamax chooses among its own
implementations. Written for tokamax 0.0.17 (Python 3.12, JAX 0.11.1 or newer); it is imported at the first use.
"""

from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from moe.kernels.implementations import capability, local, vary
from moe.kernels.metadata import group_bounds
from moe.kernels.spec import ContractionOperands, ContractionSpec, GroupedOperands, GroupedSpec
from moe.kernels.xla import ops, ragged

TILINGS = ops.TILINGS  # of the products that run as plain JAX: tokamax has its own
DTYPES = ("bfloat16", "float16")
# Its Hopper kernels tile every operand in shared memory by 64 columns, and the contraction its rows too.
ALIGN = 64

# tokamax has no block-sparse products.
block_matmul, block_contract = ops.block_matmul, ops.block_contract


def load() -> Any:
    """Import tokamax.

    Raises:
      ImportError: it is not installed.
    """
    try:
        import tokamax
    except ImportError as error:
        raise ImportError(
            "backend='tokamax' needs tokamax: pip install tokamax (Python 3.12, JAX 0.11.1 or newer), or choose "
            "backend='xla'"
        ) from error
    return tokamax


def on_gpu() -> bool:
    """Whether programs run on a GPU by default."""
    return jax.default_backend() == "gpu"


def able() -> bool:
    """Whether tokamax is installed and has kernels for the default GPU (compute capability 8.0 or newer)."""
    if not on_gpu() or capability() < 8:
        return False
    try:
        load()
    except ImportError:
        return False
    return True


def grouped(operands: GroupedOperands, spec: GroupedSpec, *, interpret: bool = False):
    """Grouped matmul, see `spec.GroupedOperands` and `spec.GroupedSpec`; sums are rounded before the epilogue."""
    return _run(ragged.grouped, ops.grouped, operands, spec)


def contract(operands: ContractionOperands, spec: ContractionSpec, *, interpret: bool = False):
    """Ragged contraction: (G, K, N), zeros for empty groups."""
    return _run(ragged.contract, ops.contract, operands, spec)


def _run(kernel, plain, operands, spec):
    try:
        return kernel(operands, spec, _ragged_dot)
    except NotImplementedError as error:
        message = "tokamax: %s of %s %s runs as plain JAX: %s"
        logging.log_first_n(logging.WARNING, message, 1, plain.__name__, operands.x.dtype, operands.x.shape, error)
        return plain(operands, spec)


def _ragged_dot(x, w, sizes, axes, groups, out_dtype) -> jax.Array:
    """Multiply by `tokamax.ragged_dot_general` over the contracted axes of x and w; x's rows are ragged.

    Raises:
      NotImplementedError: no kernel of its supports the product on a GPU.
    """
    rows, options = x.shape[0], {}
    begins, ends = group_bounds(sizes, rows)
    if on_gpu():
        if x.dtype.name not in DTYPES or any(size % ALIGN for size in (x.shape[1], *w.shape[1:])):
            raise NotImplementedError(
                f"{' and '.join(DTYPES)}, and K and N that are multiples of {ALIGN}, have kernels"
            )
        options = {"implementation": "mosaic", "bypass_device_check": False}
        more = ((0, -rows % ALIGN), (0, 0))
        x, w = jnp.pad(x, more), w if groups else jnp.pad(w, more)
    dimensions = jax.lax.RaggedDotDimensionNumbers((((axes[0],), (axes[1],)), ((), ())), [0], groups)
    operands = map(local, (x, w, ends - begins))
    out = load().ragged_dot_general(*operands, dimensions, preferred_element_type=out_dtype, **options)
    return vary(out[:rows] if groups else out, sizes)
