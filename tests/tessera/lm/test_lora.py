"""Low-rank adapters: what they add, where masks and quantized kernels stand, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.layer import MoEConfig
from sharding.inference.quantize import QuantConfig, dequantize, quantize_matrix
from tessera.lm import lora
from tessera.models.transformer import Decoder, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=32, layers=2, width=16, heads=4, kv_heads=2, ff=24, mlp="routed", moe=MoEConfig(ff=8, every=2)
)
LORA = lora.LoRAConfig(rank=3, alpha=6.0)
TOKENS = jnp.arange(12)[None]


@pytest.fixture(scope="module")
def params():
    return jax.jit(Decoder(CONFIG).init)(jax.random.key(0), TOKENS)["params"]


def random_like(tree):
    leaves, treedef = jax.tree.flatten(tree)
    stream = np.random.default_rng(7)
    return treedef.unflatten([jnp.asarray(stream.standard_normal(x.shape), jnp.float32) for x in leaves])


@pytest.mark.long
def test_every_kernel_gets_its_own_product_and_nothing_else_changes(params):
    apply = jax.jit(lambda adapters: lora.apply(params, adapters, LORA))
    adapters = jax.jit(lambda key: lora.initialize(params, LORA, key=key))(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, apply(adapters), params)
    adapters = random_like(adapters)
    got = jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), apply(adapters), params)
    first, second = got["blocks"]["layer_0"], got["blocks"]["layer_1"]
    at = adapters["blocks"]
    pair = at["layer_0"]["attention"]["query"]["kernel"]  # [1, D, H, h]
    wanted = 2.0 * np.einsum("ldr,lrhk->ldhk", pair["a"], pair["b"])
    np.testing.assert_allclose(first["attention"]["query"]["kernel"], wanted, rtol=1e-4, atol=1e-4)
    pair = at["layer_0"]["attention"]["output"]["kernel"]  # [1, H, h, D]
    wanted = 2.0 * np.einsum("lhkr,lrd->lhkd", pair["a"], pair["b"])
    np.testing.assert_allclose(first["attention"]["output"]["kernel"], wanted, rtol=1e-4, atol=1e-4)
    pair = at["layer_1"]["mlp"]["experts"]["down"]["kernel"]  # [1, E, F, D]
    wanted = 2.0 * np.einsum("lefr,lerd->lefd", pair["a"], pair["b"])
    np.testing.assert_allclose(second["mlp"]["experts"]["down"]["kernel"], wanted, rtol=1e-4, atol=1e-4)
    for leaf in (first["mlp_norm"]["gain"], second["mlp"]["router"]["kernel"], got["embed"]["table"]):
        assert not leaf.any()


def test_sizes_scales_and_the_spread_of_a(params):
    adapters = lora.initialize(params, LORA, key=jax.random.key(1))
    query = adapters["blocks"]["layer_0"]["attention"]["query"]["kernel"]
    assert query["a"].shape == (1, 16, 3) and query["b"].shape == (1, 3, 4, 4) and not query["b"].any()
    assert 0.2 < np.abs(query["a"]).max() <= 0.25  # uniform within 1 / sqrt(16)
    pairs = [query["a"], adapters["blocks"]["layer_1"]["attention"]["query"]["kernel"]["a"]]
    assert np.abs(pairs[0] - pairs[1]).max() > 0.1
    # Attention 16 -> 16, 8, 8, 16 and feed-forward 16 -> 24 -> 16; 8 experts of 16 -> 8.
    attention, dense, experts = (16 + 16) * 2 + (16 + 8) * 2, (16 + 24) * 3, 8 * (16 + 8) * 3
    assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) == 3 * (2 * attention + dense + experts)
    assert lora.LoRAConfig(rank=4, alpha=6.0).scale == 1.5
    assert lora.LoRAConfig(rank=4, alpha=6.0, rank_stabilized=True).scale == 3.0


def test_what_is_added_stays_inside_a_mask_and_is_exact_on_a_quantized_kernel():
    kernel = jax.random.normal(jax.random.key(0), (8, 6))
    alive = jax.random.bernoulli(jax.random.key(1), 0.5, kernel.shape)
    config = lora.LoRAConfig(rank=2, alpha=2.0, targets="kernel")
    params = {"up": {"kernel": jnp.where(alive, kernel, 0)}}
    adapters = random_like(lora.initialize(params, config, key=jax.random.key(2)))
    pair = adapters["up"]["kernel"]
    got = lora.apply(params, adapters, config, {"up": {"kernel": alive}})["up"]["kernel"]
    np.testing.assert_allclose(got, np.where(alive, kernel + pair["a"] @ pair["b"], 0), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda x: lora.apply(params, x, config, {"up": {"kernel": alive}})["up"]["kernel"].sum())(
        adapters
    )
    np.testing.assert_allclose(gradient["up"]["kernel"]["a"], alive @ pair["b"].T, rtol=1e-5, atol=1e-5)
    rounded = quantize_matrix(np.asarray(kernel), QuantConfig(bits=4))
    got = lora.apply({"up": {"kernel": rounded}}, adapters, config)["up"]["kernel"]
    np.testing.assert_allclose(got, dequantize(rounded) + pair["a"] @ pair["b"], rtol=1e-5, atol=1e-6)
    assert lora.initialize({"up": {"kernel": rounded}}, config, key=jax.random.key(2))["up"]["kernel"]["a"].shape == (
        8,
        2,
    )


def test_a_masters_dtype_stays():
    params = {"up": {"kernel": jnp.ones((4, 4), jnp.bfloat16)}}
    config = lora.LoRAConfig(rank=1, targets="kernel")
    adapters = lora.initialize(params, config, key=jax.random.key(0))
    assert lora.apply(params, adapters, config)["up"]["kernel"].dtype == jnp.bfloat16


PAIR = {"kernel": {"a": jnp.ones((4, 1)), "b": jnp.ones((1, 4))}}


def start(params, **settings):
    return lora.initialize(params, lora.LoRAConfig(**settings), key=jax.random.key(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: start(p), "rank=0 has no adapters"),
        (lambda p: start(p, rank=-1), "rank=-1 must not be negative"),
        (lambda p: start(p, targets="("), "no regular expression"),
        (lambda p: start(p, rank=1, targets="q_proj"), "fits none of the kernels: blocks/"),
        (lambda p: start(p, rank=9), "rank=9 of blocks/layer_0/attention/key/kernel, 16 inputs and 8"),
        (lambda p: lora.apply(p, {"head": PAIR}, LORA), "changes head/kernel, which"),
        (
            lambda p: lora.apply({"up": {"kernel": jnp.ones((4, 5))}}, {"up": PAIR}, LORA),
            r"needs \(4, 1\) and \(1, 5\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(params, make, message):
    with pytest.raises(ValueError, match=message):
        make(params)
