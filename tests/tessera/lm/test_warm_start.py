"""A decoder's weights as those of another: upcycled into experts and merged back."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.gate import RouterConfig
from moe.layer import MoEConfig
from tessera.lm.warm_start import StartConfig, convert, join_blocks, keeps_outputs, read_model, split_blocks
from tessera.models.lm_loss import lm_loss
from tessera.models.transformer import Decoder, TransformerConfig

DENSE = TransformerConfig(vocab_size=11, layers=2, width=16, heads=2, ff=24)
TOKENS = jax.random.randint(jax.random.key(5), (2, 8), 0, 11, jnp.int32)
KEY = jax.random.key(3)


def params_of(config):
    return jax.jit(Decoder(config).init)(jax.random.key(1), TOKENS)["params"]


def logits(config, params):
    return jax.jit(Decoder(config).apply)({"params": params}, TOKENS)


TOP_2 = RouterConfig("top_k", 4, 2)


def routed(every=1, router=TOP_2, **changes):
    return replace(DENSE, mlp="routed", moe=MoEConfig(every=every, router=router), **changes)


CASES = {
    "top_k": routed(),
    "every second, sigmoid": routed(2, RouterConfig("sigmoid", 3, 2)),
    "not scanned, hash": routed(1, RouterConfig("hash", 4, 2), scan=False),
    "hierarchical": routed(1, RouterConfig("hierarchical", 4, 1, groups=2, top_groups=2)),
}


@pytest.fixture(scope="module")
def dense():
    params = params_of(DENSE)
    return params, logits(DENSE, params)


@pytest.mark.parametrize(
    "name", [name if name in ("top_k",) else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_an_upcycled_decoder_computes_what_the_dense_one_did_and_learns_on(name, dense):
    params, expected = dense
    target = CASES[name]
    assert keeps_outputs(target.moe)
    made = convert(params, DENSE, target, key=KEY)
    np.testing.assert_allclose(logits(target, made), expected, rtol=1e-5, atol=1e-5)
    loss = lm_loss(Decoder(target))
    grads = jax.jit(jax.grad(lambda p: loss(p, {"tokens": TOKENS}, KEY)[0]))(made)
    experts = [block["mlp"]["experts"] for block in split_blocks(grads, target) if "experts" in block["mlp"]]
    assert all(jnp.abs(leaf).max() > 0 for one in experts for leaf in jax.tree.leaves(one))


@pytest.mark.parametrize("method", ["mean", "slerp", "ties", "dare"])
def test_merging_what_was_upcycled_gives_the_dense_decoder_back(method, dense):
    target = CASES["every second, sigmoid"]
    made = convert(dense[0], DENSE, target, key=KEY)
    start = StartConfig(method=method)
    back = convert(made, target, DENSE, start, base=(dense[0], DENSE), key=KEY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), back, dense[0])


def test_noise_tells_experts_apart(dense):
    made = convert(dense[0], DENSE, CASES["top_k"], StartConfig(noise=0.1), key=KEY)
    up = made["blocks"]["mlp"]["experts"]["up"]["kernel"]
    assert jnp.abs(up[:, 0] - up[:, 1]).max() > 0
    assert jnp.abs(made["blocks"]["mlp"]["router"]["kernel"]).max() > 0


@pytest.mark.parametrize("scan", [True, False])
def test_blocks_are_split_and_joined_by_either_layout(scan):
    config = routed(2, scan=scan)
    params = params_of(config)
    blocks = split_blocks(params, config)
    assert ["experts" in block["mlp"] for block in blocks] == [False, True]
    jax.tree.map(np.testing.assert_array_equal, join_blocks(params, blocks, config), params)


@pytest.mark.parametrize(
    ("target", "start", "message"),
    [
        (replace(routed(), layers=4), StartConfig(), "2 layers there, 4 here"),
        (replace(routed(), ff=32), StartConfig(), "experts/down/kernel: .* there, .* needed"),
        (replace(routed(), moe=MoEConfig(shared=1)), StartConfig(), "without shared experts"),
    ],
    ids=["layers", "width", "shared"],
)
def test_what_does_not_fit_is_refused(target, start, message, dense):
    with pytest.raises(ValueError, match=message):
        convert(dense[0], DENSE, target, start, key=KEY)


def test_other_counts_of_experts_are_refused():
    made = jax.tree.map(jnp.zeros_like, params_of(routed()))
    other = routed(1, RouterConfig("top_k", 8, 2))
    with pytest.raises(ValueError, match=r"\(2, 4, 16, 24\) there, \(2, 8, 16, 24\) needed"):
        convert(made, routed(), other, key=KEY)


def test_a_directory_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        read_model(tmp_path)
