from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from tessera.models import transformer
from tessera.models.attention_forms import LatentConfig
from tessera.models.transformer import (
    Decoder,
    TransformerConfig,
    attention,
    from_heads,
    rms_norm,
    rope_frequencies,
    rotate,
    swiglu,
    to_heads,
)

jitted = jax.jit(attention, static_argnames="causal")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_close(ours, theirs, tolerance=2e-6):
    np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(theirs), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_rms_norm_is_torchs(shape, golden):
    case = golden("layers")["rms_norm"]["x".join(map(str, shape))]
    assert case["x"].shape == shape
    norm = jax.jit(rms_norm, static_argnums=2)
    assert_close(norm(jnp.asarray(case["x"]), jnp.asarray(case["gain"]), 1e-5), case["y"])


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
    assert_close(
        rotate(jnp.asarray(x), jnp.asarray(positions), rope_frequencies(8, 100.0)),
        complex_rope(x, positions, 100.0),
        2e-5,
    )


@settings(deadline=None, max_examples=15)
@given(shift=st.integers(0, 500), first=st.integers(0, 50), second=st.integers(0, 50))
def test_rope_scores_depend_on_distance_alone(shift, first, second):
    x = jnp.asarray(normal(1, 2, 1, 8))

    def score(a, b):
        turned = rotate(x, jnp.array([[a, b]], jnp.int32), rope_frequencies(8, 1e3))
        return float((turned[0, 0, 0] * turned[0, 1, 0]).sum())

    assert score(first, second) == pytest.approx(score(first + shift, second + shift), abs=5e-4)


def test_rope_keeps_lengths_and_leaves_position_zero_alone():
    x = jnp.asarray(normal(1, 6, 2, 4))
    positions = jnp.arange(6, dtype=jnp.int32)[None]
    turned = rotate(x, positions, rope_frequencies(4, 1e4))
    # YaRN's factor on part of the channels: that of the rotated ones by themselves, and the others stay.
    part, alone = (rotate(y, positions, rope_frequencies(4, 1e4)[:1], 1.3) for y in (x, x[..., :2]))
    np.testing.assert_allclose(part[..., :2], alone, rtol=1e-6)
    np.testing.assert_array_equal(part[..., 2:], x[..., 2:])
    np.testing.assert_allclose(jnp.linalg.norm(alone, axis=-1), 1.3 * jnp.linalg.norm(x[..., :2], axis=-1), rtol=1e-5)
    assert_close(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1))
    assert_close(turned[:, 0], x[:, 0])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_torchs(causal, kv_heads, golden):
    case = golden("layers")["attention"][f"{'causal' if causal else 'full'}-{kv_heads}"]
    assert case["k"].shape[2] == kv_heads
    assert_close(jitted(*(jnp.asarray(case[name]) for name in "qkv"), causal=causal), case["out"])


def test_attention_gradients_are_torchs(golden):
    case = golden("layers")["attention_gradients"]
    arrays = [jnp.asarray(case[name]) for name in "qkv"]
    ours = jax.jit(jax.grad(lambda q, k, v: (attention(q, k, v) ** 2).sum(), argnums=(0, 1, 2)))(*arrays)
    for mine, name in zip(ours, "qkv", strict=True):
        assert_close(mine, case[f"d{name}"], 1e-5)


def test_attention_mask_hides_keys():
    q, k, v = (jnp.asarray(normal(1, 4, 2, 4, seed=i)) for i in range(3))
    mask = jnp.array([True, True, False, True])[None, None, None]
    hidden = jitted(q, k, v, causal=False, mask=jnp.broadcast_to(mask, (1, 1, 4, 4)))
    kept = jnp.array([0, 1, 3])
    assert_close(hidden, jitted(q, k[:, kept], v[:, kept], causal=False))


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


SMALL = {"vocab_size": 11, "layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "ff": 24}
TOKENS = jax.random.randint(jax.random.key(5), (2, 7), 0, 11, jnp.int32)


@cache
def make(**changes):
    model = Decoder(TransformerConfig(**SMALL | changes))
    return model, drawn(model, TOKENS)


def shapes(**changes):
    return jax.eval_shape(Decoder(TransformerConfig(**SMALL | changes)).init, jax.random.key(0), TOKENS)["params"]


@cache
def forward(model):
    return jax.jit(lambda *args: model.apply({"params": args[0]}, *args[1:]))


def logits(model, params, tokens=TOKENS, positions=None):
    return forward(model)(params, tokens, positions)


def unstacked(params, layers=2):
    blocks = {f"blocks_{i}": jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(layers)}
    return {name: leaf for name, leaf in params.items() if name != "blocks"} | blocks


DECODERS = {
    "default": {},
    "untied": {"tied": False, "head_dim": 6, "rope_theta": 50.0},
    "multi-query": {"kv_heads": 1},
}


@pytest.mark.parametrize("name", DECODERS)
def test_logits_are_torchs(name, golden):
    case = golden("decoders")
    theirs = jax.tree.map(jnp.asarray, case[name]["params"])
    assert jax.tree.map(jnp.shape, theirs) == jax.tree.map(jnp.shape, shapes(**DECODERS[name]))
    ours = logits(Decoder(TransformerConfig(**SMALL | DECODERS[name])), theirs, jnp.asarray(case["tokens"]))
    np.testing.assert_allclose(ours, case[name]["logits"], rtol=1e-4, atol=2e-5)


def test_parameters_are_plain_nested_dicts_of_the_documented_shapes():
    params = shapes(tied=False)
    assert jax.tree.map(jnp.shape, params) == {
        "embed": {"table": (11, 16)},
        "blocks": {
            "attention_norm": {"gain": (2, 16)},
            "attention": {
                "query": {"kernel": (2, 16, 4, 4)},
                "key": {"kernel": (2, 16, 2, 4)},
                "value": {"kernel": (2, 16, 2, 4)},
                "output": {"kernel": (2, 4, 4, 16)},
            },
            "mlp_norm": {"gain": (2, 16)},
            "mlp": {"gate": {"kernel": (2, 16, 24)}, "up": {"kernel": (2, 16, 24)}, "down": {"kernel": (2, 24, 16)}},
        },
        "final_norm": {"gain": (16,)},
        "head": {"kernel": (16, 11)},
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}


def test_initial_scales():
    model = Decoder(TransformerConfig(vocab_size=512, layers=8, width=128, heads=4, init_scale=0.5))
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
    attention, mlp = params["blocks"]["attention"], params["blocks"]["mlp"]
    residual = 1 / np.sqrt(16)
    for leaf, fan_in, scale in (
        (params["embed"]["table"], 128, 1),
        (attention["query"]["kernel"], 128, 1),
        (attention["value"]["kernel"], 128, 1),
        (attention["output"]["kernel"], 128, residual),
        (mlp["up"]["kernel"], 128, 1),
        (mlp["down"]["kernel"], model.config.ff_size, residual),
    ):
        assert leaf.std() == pytest.approx(0.5 * scale / np.sqrt(fan_in), rel=0.03)
    first, second = attention["query"]["kernel"][:2]
    assert jnp.abs(first - second).max() > 0  # every layer draws its own


def test_the_first_loss_is_close_to_log_v():
    model = Decoder(TransformerConfig(vocab_size=256, layers=1, width=64, heads=4))
    tokens = jax.random.randint(jax.random.key(0), (4, 32), 0, 256, jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    log_p = log_softmax(np.asarray(logits(model, params, tokens)), -1)[:, :-1]
    loss = -np.take_along_axis(log_p, np.asarray(tokens)[:, 1:, None], -1).mean()
    assert loss == pytest.approx(np.log(256), abs=0.7)


def test_a_token_sees_no_later_token():
    model, params = make()
    changed = TOKENS.at[:, 4:].set((TOKENS[:, 4:] + 1) % 11)
    before, after = logits(model, params), logits(model, params, changed)
    np.testing.assert_allclose(before[:, :4], after[:, :4], atol=1e-6)
    assert (jnp.abs(before[:, 4:] - after[:, 4:]).max(axis=-1) > 1e-3).all()


def test_only_distances_between_positions_matter():
    model, params = make()
    positions = jnp.broadcast_to(jnp.arange(7, dtype=jnp.int32)[None], (2, 7))
    found = np.asarray(logits(model, params))
    np.testing.assert_allclose(found, logits(model, params, TOKENS, positions), atol=1e-6)
    np.testing.assert_allclose(found, logits(model, params, TOKENS, positions + 40), atol=2e-5)
    assert np.abs(found - logits(model, params, TOKENS, positions * 3)).max() > 1e-3


@cache
def gradients(model):
    def loss(params):
        out = model.apply({"params": params}, TOKENS)
        return jnp.square(out).mean(), out

    return jax.jit(jax.grad(loss, has_aux=True))


def gradient(model, params):
    return gradients(model)(params)[0]


def test_unrolled_blocks_compute_what_the_scan_does():
    model, params = make(window=3, attention_pattern="LN")
    flat = Decoder(TransformerConfig(**SMALL, window=3, attention_pattern="LN", scan=False))
    (grads, out), (flat_grads, flat_out) = gradients(model)(params), gradients(flat)(unstacked(params))
    np.testing.assert_allclose(out, flat_out, rtol=1e-5, atol=1e-6)
    grads = unstacked(jax.device_get(grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, flat_grads)


@pytest.mark.parametrize(("scan", "remat"), [(True, "full"), (False, "dots")])
def test_remat_changes_memory_and_not_gradients(remat, scan):
    model, params = make(scan=scan)
    again = Decoder(TransformerConfig(**SMALL, remat=remat, scan=scan))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        gradient(model, params),
        gradient(again, params),
    )


def saved_products(remat):
    """Matrix products in the gradient's program, the scan's body counted once."""
    model, params = Decoder(TransformerConfig(**SMALL, remat=remat)), shapes()
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: model.apply({"params": p}, TOKENS).sum()))(params)
    return str(jaxpr).count("dot_general[")


def test_remat_recomputes_products_only_when_full():
    assert saved_products("full") > saved_products("none")
    # Attention's two batched products are recomputed under "dots", the seven projections are not.
    assert saved_products("none") < saved_products("dots") < saved_products("full")


def test_bfloat16_is_near_float32_with_float32_logits_and_gradients():
    model, params = make()
    half = Decoder(TransformerConfig(**SMALL, dtype="bfloat16"))
    (grads, ours), exact = gradients(half)(params), np.asarray(logits(model, params))
    assert ours.dtype == jnp.float32
    assert 1e-5 < jnp.abs(ours - exact).max() < 0.05 * jnp.abs(exact).max()
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {np.dtype("float32")}


def test_tied_embeddings_are_one_parameter():
    tied, free = shapes(), shapes(tied=False)
    assert "head" not in tied and jax.tree.leaves(free["head"])[0].size == 11 * 16


class Constant(nn.Module):
    """A stand-in feed-forward layer that reports something."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x):
        self.sow("intermediates", "load", jnp.abs(x).mean())
        return x * self.param("bias", nn.initializers.ones, ())


@pytest.mark.parametrize("remat", ["none", "full"])
def test_another_feed_forward_layer_fits_in_and_reports_by_layer(monkeypatch, remat):
    monkeypatch.setitem(transformer.MLPS, "constant", Constant)
    model, params = make(mlp="constant", remat=remat)
    assert params["blocks"]["mlp"]["bias"].shape == (2,)
    _, sown = jax.jit(lambda p: model.apply({"params": p}, TOKENS, mutable=["intermediates"]))(params)
    (load,) = sown["intermediates"]["blocks"]["mlp"]["load"]
    assert load.shape == (2,) and (load > 0).all()


def test_default_sizes():
    config = TransformerConfig(vocab_size=256, layers=1, width=768, heads=12)
    assert (config.head_size, config.kv_size, config.ff_size) == (64, 12, 2048)
    assert TransformerConfig(vocab_size=2, layers=1, width=100, heads=5).ff_size == 320


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 4, "kv_heads": 3}, "heads=4 is not a multiple of kv_heads=3"),
        ({"width": 18}, "width=18 is not a multiple of heads=4"),
        ({"width": 12}, "head_dim=3 is odd"),
        ({"head_dim": 5}, "head_dim=5 is odd"),
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"attention_pattern": "LX", "window": 4}, "attention_pattern='LX': letters L"),
        ({"attention_pattern": "GN", "window": 4}, "window=4 with attention_pattern='GN'"),
        ({"attention_pattern": "L"}, "window=0 with attention_pattern='L'"),
        ({"rotary_dim": 6}, "rotary_dim=6 must be even and at most head_dim=4"),
        ({"kv_heads": 0, "latent": LatentConfig(8), "qk_norm": True}, "latent attention has no qk_norm=True"),
        ({"latent": LatentConfig(8)}, "kv_heads=2 of heads=4: latent attention"),
        ({"ff": -1}, "ff=-1 must be positive"),
        ({"rope_theta": 0.0}, "rope_theta=0.0"),
        ({"dtype": "float16"}, "dtype='float16': choose one of float32, bfloat16"),
        ({"remat": "some"}, "remat='some': choose none, full, dots"),
        ({"mlp": "gelu"}, "mlp='gelu': choose one of swiglu"),
    ],
)
def test_bad_sizes_are_refused_with_their_numbers(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**SMALL | changes)


def test_queries_keys_and_values_have_their_biases():
    """Of inputs that are zero biases are all there is, at position 0 as they are."""
    config = TransformerConfig(vocab_size=5, layers=1, width=8, heads=4, kv_heads=2, qkv_bias=True)
    heads = {"query": 4, "key": 2, "value": 2}
    params = {
        name: {"kernel": jnp.ones((8, count, 2)), "bias": jnp.arange(2.0 * count).reshape(count, 2) + count}
        for name, count in heads.items()
    }
    found = transformer.project_qkv(params, jnp.zeros((1, 1, 8)), jnp.zeros((1, 1), jnp.int32), config, config.form(0))
    for (name, layer), vector in zip(params.items(), found, strict=True):
        np.testing.assert_array_equal(vector[0, 0], layer["bias"], err_msg=name)


@pytest.mark.parametrize("scope", ["head", "projection"])
def test_the_norms_of_queries_and_keys_have_the_models_epsilon(scope):
    config = TransformerConfig(
        vocab_size=5, layers=1, width=8, heads=4, kv_heads=2, qk_norm=True, qk_norm_scope=scope, norm_eps=3.0
    )
    x, params = normal(1, 1, 8, seed=9), {}
    for seed, (name, count) in enumerate({"query": 4, "key": 2, "value": 2}.items()):
        params[name] = {"kernel": normal(8, count, 2, seed=seed), "gain": np.ones((count, 2), np.float32)}
        params[f"{name}_norm"] = {"gain": np.ones(2, np.float32)}
    found = transformer.project_qkv(
        jax.tree.map(jnp.asarray, params), jnp.asarray(x), jnp.zeros((1, 1), jnp.int32), config, config.form(0)
    )
    for name, vectors in zip(("query", "key"), found, strict=False):
        y = np.einsum("d,dhk->hk", x[0, 0], params[name]["kernel"])
        mean = np.square(y).mean(-1, keepdims=True) if scope == "head" else np.square(y).mean()
        assert_close(vectors[0, 0], y / np.sqrt(mean + 3.0))
