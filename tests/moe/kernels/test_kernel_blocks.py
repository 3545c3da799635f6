from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from moe.kernels import block_sparse_matmul, block_structure, to_blocks, to_dense

M = 37
sparse = jax.jit(partial(block_sparse_matmul, backend="xla"))


def case(block, density, dtype="float32", shape=None):
    rng = np.random.default_rng(0)
    shape = shape or (2 * block + 5, 3 * block - 7)
    mask = rng.random((3, 3)) < density
    structure = block_structure(mask, block, shape=shape)
    dense = jnp.array(rng.normal(size=shape) / np.sqrt(shape[0]), dtype)
    x, dy = (jnp.array(rng.normal(size=(M, size)), dtype) for size in shape)
    elements = np.repeat(np.repeat(mask, block, 0), block, 1)[: shape[0], : shape[1]]
    return x, dy, to_blocks(dense, structure), structure, np.where(elements, np.asarray(dense, np.float64), 0), elements


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(
    ("density", "dtype", "tolerance"),
    [(0.0, "float32", 1e-6), (0.4, "float32", 1e-5), (1.0, "float32", 1e-5), (0.4, "bfloat16", 0.03)],
)
def test_product_and_gradients_against_float64(block, density, dtype, tolerance):
    x, dy, blocks, structure, w, elements = case(block, density, dtype)
    np.testing.assert_array_equal(np.asarray(to_dense(blocks, structure), np.float64), w)
    y, pull = jax.vjp(lambda x, blocks: sparse(x, blocks, structure), x, blocks)
    dx, dblocks = pull(dy)
    x64, dy64 = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    dw = np.where(elements, x64.T @ dy64, 0)
    for ours, theirs in ((y, x64 @ w), (dx, dy64 @ w.T), (to_dense(dblocks, structure), dw)):
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, atol=4 * tolerance, rtol=tolerance)
    # What reaches past the weight has no gradient.
    np.testing.assert_array_equal(to_blocks(to_dense(dblocks, structure), structure), dblocks)


def test_gradients_against_finite_differences():
    x, _, blocks, structure, _, _ = case(64, 0.4)
    check_grads(lambda x, b: sparse(x, b, structure), (x, blocks), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_only_live_blocks_take_part():
    x, _, blocks, structure, _, _ = case(64, 0.4)
    program = str(jax.make_jaxpr(jax.grad(lambda x, b: sparse(x, b, structure).sum(), (0, 1)))(x, blocks))
    assert "f32[64,64]" in program
    assert "f32[192,192]" not in program and "f32[133,185]" not in program


def test_a_stack_of_weights_and_structures_as_arguments():
    x, _, blocks, structure, w, _ = case(64, 0.4)
    stacked = jax.vmap(lambda b: sparse(x, b, structure))(jnp.stack([blocks, 2 * blocks]))
    np.testing.assert_allclose(stacked[0], x @ w, atol=1e-4)
    np.testing.assert_allclose(stacked[1], 2 * stacked[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("x", "change", "error", "message"),
    [
        ((5, 7), 1, ValueError, "are needed"),
        ((5, 133), 2, ValueError, "are needed"),
        ((5, 133), 1, TypeError, "cast one"),
    ],
)
def test_what_does_not_fit_is_refused(x, change, error, message):
    _, _, blocks, structure, _, _ = case(64, 0.4)
    blocks = blocks.astype(jnp.bfloat16) if error is TypeError else jnp.repeat(blocks, change, 0)
    with pytest.raises(error, match=message):
        block_sparse_matmul(jnp.ones(x), blocks, structure)
