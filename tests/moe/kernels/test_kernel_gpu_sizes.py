"""The interpreted Hopper kernels on any group sizes."""

from functools import partial

import jax
import jax.numpy as jnp
import kernel_reference as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.kernels import grouped_matmul

if jax.__version_info__ < (0, 11):
    pytest.skip(f"Mosaic GPU kernels need JAX 0.11 (Python 3.12), this is {jax.__version__}", allow_module_level=True)

ROWS, GROUPS, K, N = 150, 4, 64, 64


@jax.jit
def products(x, w, dy, sizes):
    out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, backend="gpu_interpret"), x, w)
    return out, *pull(dy)


@pytest.mark.slow
@settings(deadline=None, max_examples=12, derandomize=True)
@given(st.lists(st.integers(0, ROWS), min_size=GROUPS - 1, max_size=GROUPS - 1), st.integers(0, ROWS))
def test_any_sizes_against_float64(cuts, total):
    bounds = np.clip(np.sort(cuts), 0, total)
    sizes = np.diff(np.concatenate([[0], bounds, [total]]))
    rng = np.random.default_rng(total)
    x, w, dy = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((ROWS, K), (GROUPS, K, N), (ROWS, N)))
    wide = partial(np.asarray, dtype=np.float64)
    expected = (
        reference.grouped(wide(x), wide(w), sizes),
        reference.grouped(wide(dy), wide(w).swapaxes(1, 2), sizes),
        reference.contract(wide(x), wide(dy), sizes),
    )
    for ours, theirs in zip(products(x, w, dy, jnp.array(sizes, jnp.int32)), expected, strict=True):
        assert np.isfinite(wide(ours)).all()
        np.testing.assert_allclose(wide(ours), theirs, atol=0.006 * max(1, np.abs(theirs).max()))
