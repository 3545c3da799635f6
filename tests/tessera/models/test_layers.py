import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.models.transformer import attention, from_heads, rms_norm, rope, swiglu, to_heads


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_close(ours, theirs, tolerance=2e-6):
    np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(theirs), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_rms_norm_is_torchs(shape, golden):
    case = golden("layers")["rms_norm"]["x".join(map(str, shape))]
    assert case["x"].shape == shape
    assert_close(rms_norm(jnp.asarray(case["x"]), jnp.asarray(case["gain"]), 1e-5), case["y"])


def test_rms_norm_of_bfloat16_takes_its_statistics_in_float32():
    x = jnp.asarray(normal(4, 512), jnp.bfloat16)
    ours = rms_norm(x, jnp.ones(512))
    exact = np.asarray(x, np.float64)
    exact /= np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    assert ours.dtype == jnp.bfloat16
    # One rounding to bfloat16 at the end and no more: half a unit in the last of 8 bits.
    np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=2**-8)


def test_rms_norm_keeps_zero():
    assert (rms_norm(jnp.zeros((2, 4)), jnp.ones(4)) == 0).all()


def complex_rope(x, positions, theta):
    """The same rotation as a complex product in float64."""
    half = x.shape[-1] // 2
    z = x[..., :half].astype(np.float64) + 1j * x[..., half:]
    angle = positions[..., None, None] * theta ** (-np.arange(half) / half)
    z = z * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], -1)


def test_rope_is_a_complex_rotation():
    x = normal(2, 5, 3, 8)
    positions = np.array([[0, 1, 2, 3, 4], [7, 7, 100, 3, 0]], np.int32)
    assert_close(rope(jnp.asarray(x), jnp.asarray(positions), 100.0), complex_rope(x, positions, 100.0), 2e-5)


@settings(deadline=None, max_examples=15)
@given(shift=st.integers(0, 500), first=st.integers(0, 50), second=st.integers(0, 50))
def test_rope_scores_depend_on_distance_alone(shift, first, second):
    x = jnp.asarray(normal(1, 2, 1, 8))

    def score(a, b):
        turned = rope(x, jnp.array([[a, b]], jnp.int32), 1e3)
        return float((turned[0, 0, 0] * turned[0, 1, 0]).sum())

    assert score(first, second) == pytest.approx(score(first + shift, second + shift), abs=5e-4)


def test_rope_keeps_lengths_and_leaves_position_zero_alone():
    x = jnp.asarray(normal(1, 6, 2, 4))
    turned = rope(x, jnp.arange(6, dtype=jnp.int32)[None])
    assert_close(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1))
    assert_close(turned[:, 0], x[:, 0])


def test_rope_refuses_an_odd_head():
    with pytest.raises(ValueError, match="even, not 3"):
        rope(jnp.zeros((1, 2, 1, 3)), jnp.zeros((1, 2), jnp.int32))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_torchs(causal, kv_heads, golden):
    case = golden("layers")["attention"][f"{'causal' if causal else 'full'}-{kv_heads}"]
    assert case["k"].shape[2] == kv_heads
    assert_close(attention(*(jnp.asarray(case[name]) for name in "qkv"), causal=causal), case["out"])


def test_attention_gradients_are_torchs(golden):
    case = golden("layers")["attention_gradients"]
    arrays = [jnp.asarray(case[name]) for name in "qkv"]
    ours = jax.grad(lambda q, k, v: (attention(q, k, v) ** 2).sum(), argnums=(0, 1, 2))(*arrays)
    for mine, name in zip(ours, "qkv", strict=True):
        assert_close(mine, case[f"d{name}"], 1e-5)


def test_attention_mask_hides_keys():
    q, k, v = (jnp.asarray(normal(1, 4, 2, 4, seed=i)) for i in range(3))
    mask = jnp.array([True, True, False, True])[None, None, None]
    hidden = attention(q, k, v, causal=False, mask=jnp.broadcast_to(mask, (1, 1, 4, 4)))
    kept = jnp.array([0, 1, 3])
    assert_close(hidden, attention(q, k[:, kept], v[:, kept], causal=False))


def test_attention_refuses_uneven_groups():
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        attention(jnp.zeros((1, 2, 3, 4)), jnp.zeros((1, 2, 2, 4)), jnp.zeros((1, 2, 2, 4)))


def test_projections_are_matrix_products_on_flattened_heads():
    x, kernel = normal(2, 3, 6), normal(6, 4, 5, seed=1)
    assert_close(to_heads(jnp.asarray(x), jnp.asarray(kernel)), (x @ kernel.reshape(6, 20)).reshape(2, 3, 4, 5), 1e-5)
    y, back = normal(2, 3, 4, 5), normal(4, 5, 6, seed=2)
    assert_close(from_heads(jnp.asarray(y), jnp.asarray(back)), y.reshape(2, 3, 20) @ back.reshape(20, 6), 1e-5)


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
def test_swiglu_is_torchs(shape, golden):
    case = golden("layers")["swiglu"]["x".join(map(str, shape))]
    assert case["x"].shape == shape
    assert_close(swiglu(*(jnp.asarray(case[name]) for name in ("x", "gate", "up", "down"))), case["y"], 1e-5)


def test_swiglu_computes_in_the_dtype_of_its_input():
    x = jnp.ones((2, 4), jnp.bfloat16)
    assert swiglu(x, jnp.ones((4, 3)), jnp.ones((4, 3)), jnp.ones((3, 4))).dtype == jnp.bfloat16
