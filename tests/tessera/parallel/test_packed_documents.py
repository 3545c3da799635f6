"""Documents packed into rows give the loss and the gradient of documents one by one, under every plan, in chunks."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.gate import RouterConfig
from moe.layer import MoEConfig
from sharding.mesh import make_mesh
from sharding.plan import Plan
from sharding.rules import path_name, shardings
from tessera.models.attention_forms import LatentConfig
from tessera.models.lm_loss import lm_loss, make_eval
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.parallel.decoder import ShardedDecoder, batch_sharding
from tessera.parallel.pipelined_decoder import make_loss
from tessera.step import StepConfig, init_state, make_train_step

LENGTH, ROWS = 16, 8
CONFIG = TransformerConfig(
    vocab_size=32, layers=2, width=16, heads=4, kv_heads=2, ff=16, window=5, attention_pattern="LG"
)
FORMS = {"sinks": True, "attention_softcap": 2.0}
LATENT = {"kv_heads": 0, "latent": LatentConfig(8, 6, 4, 4, 6), "window": 0, "attention_pattern": "GN"}
EXPERTS = MoEConfig(router=RouterConfig("top_k", 4, 2), balance_scope="sequence", balance=0.1, z=0.1)
ROUTED = {"mlp": "routed", "moe": EXPERTS}
# Documents of one token, of a whole row, and others; the last rows have padding, and the seventh is padding alone.
LENGTHS = [[17], [1, 1, 15], [5, 12], [9, 1, 3, 4], [2] * 8 + [1], [8, 6], [], [3]]


def documents(lengths, seed=0):
    """Tokens and weights of documents by row: some count half, some nothing, the first token of none is a target."""
    rng = np.random.default_rng(seed)
    return [[(rng.integers(1, 32, n), rng.choice([0.0, 0.5, 1.0, 1.0], n)) for n in row] for row in lengths]


def packed(rows, length=LENGTH):
    """A batch as the loss takes it, written here from its definition."""
    tokens, weights = np.zeros((len(rows), length + 1), np.int32), np.zeros((len(rows), length + 1), np.float32)
    positions = np.full((len(rows), length + 1), -1, np.int32)
    for i, row in enumerate(rows):
        at = 0
        for text, weight in row:
            mine = slice(at, at + len(text))
            tokens[i, mine], positions[i, mine], weights[i, mine] = text, np.arange(len(text)), weight
            weights[i, at] = 0
            at += len(text)
    return {"tokens": tokens, "positions": positions[:, :-1], "weights": weights[:, 1:]}


def one_by_one(model, rows, size):
    """The loss as a function of parameters, a document a row, without packing: sum(w nll) / sum(w)."""
    texts = [one for row in rows for one in row]
    tokens, weights = np.zeros((size, LENGTH + 1), np.int32), np.zeros((size, LENGTH + 1), np.float32)
    for i, (text, weight) in enumerate(texts):
        tokens[i, : len(text)], weights[i, 1 : len(text)] = text, weight[1:]

    def loss(params, tokens, weights):
        logits = model.apply({"params": params}, tokens[:, :-1])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        total = weights[:, 1:].sum()
        return (nll * weights[:, 1:]).sum() / jnp.where(total > 0, total, 1)

    return loss, tokens, weights


def initialized(config):
    return drawn(Decoder(config), jnp.zeros((1, LENGTH), jnp.int32))


@cache
def expectation(config):
    """Parameters, and the loss and gradient of the documents of `LENGTHS` one by one."""
    params = initialized(config)
    alone, *arrays = one_by_one(Decoder(config), documents(LENGTHS), 32)
    return params, jax.device_get(jax.jit(jax.value_and_grad(alone))(params, *arrays))


def assert_equal(found, expected):
    (loss, grads), (expected_loss, expected_grads) = jax.device_get((found, expected))
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * scale, err_msg=path_name(path))


# Of one model, whose documents one by one are one program.
CASES = [
    ("", {}, FORMS),
    ("cp=2, tp=2, dp=2", {}, FORMS),
    ("pp=2, cp=2", {"context": "all_to_all"}, FORMS),
]
MORE_CASES = [
    ("", {}, {}),
    ("pp=2, cp=2", {"context": "all_to_all"}, {}),
    ("dp=2", {}, {}),
    ("tp=2", {"sequence": True}, {}),
    ("cp=2", {}, {}),
    ("cp=4", {}, FORMS),
    ("cp=2", {"context": "all_to_all"}, FORMS),
    ("pp=2", {"microbatches": 4}, {}),
    ("fsdp=2", {}, {"remat": "full"}),
    ("dp=2, fsdp=2", {}, {}),
    ("dp=2, tp=2", {"sequence": True}, {}),
    ("dp=2, cp=2", {}, {}),
    ("dp=2, pp=2", {"microbatches": 2}, {}),
    ("fsdp=2, cp=2", {"context": "all_to_all"}, {"remat": "full"}),
    ("fsdp=2, pp=2", {"microbatches": 4}, {}),
    ("tp=2, cp=2", {"context": "all_to_all"}, {"kv_heads": 4}),
    ("tp=2, pp=2", {"sequence": True}, {}),
    ("cp=2, pp=2", {}, FORMS),
    ("pp=2, cp=2, tp=2", {"sequence": True, "schedule": "interleaved", "virtual": 2}, {"layers": 4}),
    ("", {}, {"scan": False}),
    ("", {}, LATENT),
    ("cp=2, tp=2", {}, LATENT),
]


@pytest.mark.parametrize(
    ("axes", "options", "changes"), CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CASES]
)
def test_packed_documents_are_documents_one_by_one(axes, options, changes):
    config, batch = replace(CONFIG, **changes), packed(documents(LENGTHS))
    (params, expected), loss_fn = expectation(config), lm_loss(Decoder(config), loss_chunk_size=5)
    if axes:
        loss_fn, params, batch = under(axes, options, config, params, batch)
    (loss, metrics), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, batch)
    assert_equal((loss, grads), expected)
    assert metrics["cross_entropy"] == pytest.approx(float(loss), abs=1e-6)
    # Inputs without a document: of rows with 14 and 3 tokens and of the row with none.
    assert metrics["padding"] == pytest.approx((2 + 16 + 13) / (ROWS * LENGTH))


def under(axes, options, config, params, batch):
    """The loss under a plan, and parameters and batch on its devices."""
    plan = Plan(axes, **options)
    decoder, mesh = ShardedDecoder(config, plan, loss_chunk_size=7), make_mesh(plan, jax.devices()[: plan.devices])
    decoder.check(ROWS, LENGTH)
    if not options.get("virtual"):
        params = jax.device_put(params, shardings(mesh, decoder.specs))
    return make_loss(decoder, mesh), params, jax.device_put(batch, batch_sharding(decoder, mesh))


@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.lists(st.integers(1, 17), max_size=9), min_size=4, max_size=4), seed=st.integers(0, 99))
def test_any_lengths(one_device, lengths, seed):
    fitting = [[n for n, end in zip(row, np.cumsum(row), strict=True) if end <= LENGTH + 1] for row in lengths]
    rows = documents(fitting, seed)
    found, alone, params, model = one_device
    (loss, metrics), grads = found(params, packed(rows))
    _, *arrays = one_by_one(model, rows, 40)
    assert_equal((loss, grads), alone(params, *arrays))
    assert np.isfinite(metrics["accuracy"])


@pytest.fixture(scope="module")
def one_device():
    model = Decoder(CONFIG)
    alone = one_by_one(model, [], 1)[0]
    grad = jax.value_and_grad
    return jax.jit(grad(lm_loss(model), has_aux=True)), jax.jit(grad(alone)), initialized(CONFIG), model


def test_a_batch_without_weight_has_no_loss_and_no_gradient(one_device):
    (loss, metrics), grads = one_device[0](one_device[2], packed(documents([[], [], [], []])))
    assert loss == 0 and all(np.isfinite(value) for value in jax.tree.leaves(metrics))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))


@pytest.mark.long
@pytest.mark.parametrize(
    ("axes", "options", "changes"),
    [
        ("ep=2, dp=2", {}, {}),
        pytest.param("ep=2, tp=2", {"sequence": True}, {}, marks=pytest.mark.slow),
        pytest.param("pp=2, dp=2", {"microbatches": 2}, {}, marks=pytest.mark.slow),
        pytest.param("cp=2, ep=2", {}, {"balance_scope": "batch"}, marks=pytest.mark.slow),
    ],
)
def test_no_expert_gets_padding(axes, options, changes):
    """Cross-entropy is that of documents one by one; under plans losses, loads and other metrics are one device's.

    A row of padding alone would be a microbatch that weighs as much as others in the losses of routers.
    """
    config = replace(CONFIG, mlp="routed", moe=replace(EXPERTS, **changes), window=0, attention_pattern="G")
    rows = documents([row or [4] for row in LENGTHS])
    # Of the initial values, under which routers' z-losses of parts are near each other.
    params = jax.jit(Decoder(config).init)(jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32))["params"]
    batch = packed(rows)
    expected = jax.jit(jax.value_and_grad(lm_loss(Decoder(config)), has_aux=True))(params, batch)
    alone, *arrays = one_by_one(Decoder(config), rows, 32)
    assert expected[0][1]["cross_entropy"] == pytest.approx(float(jax.jit(alone)(params, *arrays)), abs=1e-5)
    # Every token that is no padding has two choices.
    np.testing.assert_allclose(expected[0][1]["router/choices"], 2, rtol=1e-6)
    loss_fn, placed, batch = under(axes, options, config, params, batch)
    found = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(placed, batch)
    if "pp" in axes:  # the mean of z-losses over microbatches with unequal padding is near that over tokens
        assert found[0][0] == pytest.approx(float(expected[0][0]), rel=1e-3)
        loads = "router/load"
        np.testing.assert_allclose(found[0][1][loads], expected[0][1][loads], atol=1e-6)
        return
    assert_equal((found[0][0], found[1]), (expected[0][0], expected[1]))
    for name, value in expected[0][1].items():
        np.testing.assert_allclose(found[0][1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.long
def test_gradient_accumulation_and_evaluation_weigh_targets_not_parts(one_device):
    """Rows i and i + 2 are a part, of very different weights."""
    _, _, params, model = one_device
    batch, tx = packed(documents([[17], [], [17], [3]])), optax.sgd(1.0)
    loss_fn = lm_loss(model)
    whole, parts = (
        jax.jit(make_train_step(loss_fn, tx, StepConfig(grad_accum_steps=n)))(
            init_state(params, tx), batch, jax.random.key(0)
        )
        for n in (1, 2)
    )
    assert_equal((parts[1]["loss"], parts[0].params), (whole[1]["loss"], whole[0].params))
    found = make_eval(loss_fn)(params, batch)
    assert found["weight"] == batch["weights"].sum()
    assert found["loss"] == pytest.approx(float(whole[1]["loss"]), abs=1e-6)
