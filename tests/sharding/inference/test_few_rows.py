"""Products of few rows, and attention over the live part of a cache, against numpy and the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding.attention import AttentionForm
from sharding.inference.attention import cached_attention
from sharding.inference.few_rows import MANY, RowProjection, lay_out_rows, row_product
from sharding.inference.kv_cache import Blocks, Past
from sharding.inference.quantize import QuantConfig, dequantize, quantize_matrix

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("rows", [1, 2, 5, MANY, MANY + 1])
def test_float_rows_are_multiplied_as_by_numpy(rows):
    x, w = RNG.normal(size=(rows, 24)).astype(np.float32), RNG.normal(size=(24, 40)).astype(np.float32)
    found = jax.jit(row_product)(x, lay_out_rows(w, 1))
    np.testing.assert_allclose(found, x.astype(np.float64) @ w, atol=1e-5)
    half = jax.jit(row_product)(x, lay_out_rows(w.astype(jnp.bfloat16), 1))
    np.testing.assert_allclose(found, half, atol=0.2)
    assert half.dtype == jnp.float32


def test_a_projection_contracts_the_last_axes_of_its_input():
    x, w = RNG.normal(size=(2, 3, 4, 8)).astype(np.float32), RNG.normal(size=(4, 8, 5)).astype(np.float32)
    projection = RowProjection(lay_out_rows(w, 2), w.shape, 2)
    np.testing.assert_allclose(projection(jnp.asarray(x)), np.einsum("btkh,khd->btd", x, w), atol=1e-5)
    heads = RowProjection(lay_out_rows(w.reshape(32, 5)[:, :4], 1), (32, 2, 2), 1)
    wanted = np.einsum("bti,ihk->bthk", x.reshape(2, 3, 32), w.reshape(32, 5)[:, :4].reshape(32, 2, 2))
    np.testing.assert_allclose(heads(jnp.asarray(x).reshape(2, 3, 32)), wanted, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, MANY + 1])
def test_int8_rows_are_rounded_each_by_its_largest_input(rows):
    x = (RNG.normal(size=(rows, 24)) * np.logspace(-3, 3, rows)[:, None]).astype(np.float32)
    kernel = quantize_matrix(RNG.normal(size=(24, 40)), QuantConfig(8))
    scale = np.abs(x).max(1, keepdims=True) / np.float32(127)
    wanted = (np.round(x / scale) @ kernel.values.astype(np.float64)) * scale * kernel.scales
    np.testing.assert_allclose(jax.jit(row_product)(x, lay_out_rows(kernel, 1)), wanted, rtol=2e-5)


def test_other_quantized_kernels_are_rounded_once_more():
    kernel = quantize_matrix(RNG.normal(size=(32, 6)), QuantConfig(4, group=8))
    laid = lay_out_rows(kernel, 1)
    weights = np.asarray(dequantize(kernel))
    gap = np.abs(laid.values * laid.scales[:, None] - weights.T)
    assert laid.values.dtype == jnp.int8 and 0 < gap.max()
    assert (gap.max(1) <= np.abs(weights).max(0) / 254 * 1.001).all()


@pytest.mark.parametrize("window", [None, 5])
def test_blocks_of_the_live_part_give_the_attention_over_the_whole(window):
    """A length that no block divides, rows of different ends, one of them empty; what is past an end is not finite."""
    n, t, k, s, h = 4, 2, 2, 21, 4
    q, new = RNG.normal(size=(n, t, 2 * k, h)), RNG.normal(size=(2, n, t, k, h))
    cached, starts = RNG.normal(size=(2, n, k, s, h)), jnp.array([0, 3, 16, 17])
    q, new, cached = (jnp.asarray(x, jnp.float32) for x in (q, new, cached))
    form = AttentionForm(window=window)
    past = Past(*cached, None, None)
    read = lambda first: Past(*(jax.lax.dynamic_slice_in_dim(x, first, 8, 2) for x in cached), None, None)  # noqa: E731
    whole = cached_attention(q, *new, past, starts, form=form)
    found = jax.jit(lambda starts: cached_attention(q, *new, Blocks(read, 8, s), starts, form=form))(starts)
    np.testing.assert_allclose(found, whole, atol=1e-6)
    alone = jax.jit(lambda starts: cached_attention(q, *new, Blocks(read, 8, s), starts, form=form))(
        starts * jnp.array([1, 1, 0, 0])
    )
    np.testing.assert_array_equal(alone[:2], found[:2])
