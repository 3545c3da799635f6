"""The decoder through a pipeline: under every plan with stages, the numbers of one device."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn

from moe.experts import MixtureConfig
from moe.gate import RouterConfig
from moe.layer import MoEConfig
from sharding.errors import PlanError
from sharding.mesh import make_mesh
from sharding.pipeline.stages import StageLayout
from sharding.plan import Plan
from sharding.rules import path_name, shardings
from tessera.models.attention_forms import LatentConfig
from tessera.models.lm_loss import lm_loss
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.parallel import pipelined_decoder
from tessera.parallel.decoder import ShardedDecoder, batch_sharding

CONFIG = TransformerConfig(vocab_size=32, layers=4, width=16, heads=4, kv_heads=2, ff=16)
Z_LOSS = 1e-2  # large enough to show in the gradient
BATCH = {"tokens": jax.random.randint(jax.random.key(1), (8, 17), 0, 32, jnp.int32)}

# A loss of balance over the whole batch is no mean over microbatches, one over sequences is.
EXPERTS = MoEConfig(balance=0.1, balance_scope="sequence", z=0.1)
ROUTED = {"mlp": "routed", "moe": EXPERTS}
FIRST_DENSE = {"mlp": "routed", "moe": replace(EXPERTS, first_k_dense_replace=1, ff=8)}

FORMS = {
    "window": 5,
    "sinks": True,
    "qkv_bias": True,
    "output_bias": True,
    "attention_softcap": 2.0,
    "norm_position": "both",
    "gain_offset": 1.0,
    "embed_scale": 4.0,
    "logit_softcap": 5.0,
    "local_rope_theta": 50.0,
}
LATENT = {"kv_heads": 0, "latent": LatentConfig(8, 6, 4, 4, 6)}

# Plan, options of the plan, changes of the model.
PLANS = [
    ("pp=2, tp=2, dp=2", {"sequence": True}, {"layers": 2, "attention_pattern": "LN", **FORMS}),
]
LONG = [
    ("pp=3, fsdp=2", {}, {"layers": 4, "width": 24, "window": 3, "attention_pattern": "LN"}),
]
MORE_PLANS = [
    ("pp=3, fsdp=2", {}, {"layers": 7, "width": 24, "window": 3, "attention_pattern": "LNG"}),
    ("pp=2, tp=2, dp=2", {"schedule": "zb_h1", "sequence": True}, {"layers": 3, "attention_pattern": "LN", **FORMS}),
    ("pp=2, fsdp=2", {"schedule": "zb_h1", "microbatches": 4}, {"layers": 4, "tied": False, "remat": "full"}),
    ("pp=4, fsdp=2", {"schedule": "zb_h1"}, {"layers": 5, "remat": "dots"}),
    ("pp=2, tp=2, ep=2", {"schedule": "zb_h1", "sequence": True}, ROUTED | {"layers": 4}),
    ("pp=2, cp=2, dp=2", {"schedule": "zb_h1"}, {"remat": "full"}),
    ("pp=2, tp=2, dp=2", {"schedule": "dualpipev"}, {"layers": 7, "remat": "full"}),
    ("pp=2, fsdp=2, ep=2", {"schedule": "dualpipev"}, ROUTED | {"layers": 5, "tied": False}),
    ("pp=2, ep=2", {"schedule": "dualpipev", "microbatches": 4}, FIRST_DENSE | {"layers": 5, "remat": "full"}),
    ("pp=3", {}, {"layers": 7, "tied": False, "remat": "full"}),
    ("pp=5", {"microbatches": 6}, {"layers": 12}),
    ("pp=3, tp=2", {"sequence": True}, {"layers": 5, "window": 3, "attention_pattern": "LNG"}),
    ("pp=6", {}, {"layers": 7, "tied": False}),
    ("pp=7", {}, {"layers": 12}),
    ("pp=3, ep=2", {"microbatches": 3}, ROUTED | {"layers": 7, "width": 24}),
    ("pp=3, dp=2", {"schedule": "interleaved", "virtual": 2}, ROUTED | {"layers": 7}),
    ("pp=2, fsdp=2", {"microbatches": 4}, {"layers": 3, "tied": False}),
    ("pp=8", {}, {"layers": 11, "window": 3, "attention_pattern": "LNG"}),
    ("pp=4, dp=2", {"schedule": "gpipe"}, {"tied": False}),
    ("pp=2, fsdp=4", {"schedule": "interleaved", "virtual": 2}, {"remat": "full"}),
    ("pp=2, fsdp=2, tp=2", {"zero": 1, "sequence": True}, {"remat": "dots"}),
    ("pp=2, fsdp=2, tp=2", {"microbatches": 4}, {"layers": 5, "remat": "full"}),
    ("pp=4, tp=2", {}, {"tied": False}),
    ("pp=4, cp=2", {}, {"attention_pattern": "LG", **FORMS}),
    ("pp=2, cp=2, tp=2", {"context": "all_to_all"}, {"heads": 8, "kv_heads": 4, **FORMS}),
    ("pp=2, cp=2, tp=2", {}, LATENT),
    ("pp=2, fsdp=2, cp=2", {}, {"layers": 3}),
    ("pp=2, cp=2, dp=2", {"context": "all_to_all", "microbatches": 4}, {}),
    ("pp=2, ep=2, dp=2", {"microbatches": 2}, {"tied": False}),
    ("pp=2, cp=2, tp=2", {"sequence": True, "schedule": "interleaved", "virtual": 2}, {"window": 5}),
    ("pp=2, ep=2, dp=2", {"microbatches": 2}, ROUTED),
    ("pp=2, tp=2, ep=2", {"sequence": True}, ROUTED | {"layers": 4, "moe": replace(EXPERTS, every=2)}),
    ("pp=2, fsdp=2", {"schedule": "gpipe"}, ROUTED | {"layers": 3, "remat": "full"}),
    ("pp=2, tp=2, ep=2", {"sequence": True}, FIRST_DENSE | {"layers": 4}),
    ("pp=2, fsdp=2", {"schedule": "interleaved", "virtual": 2}, FIRST_DENSE | {"layers": 6, "remat": "full"}),
]


def name(case):
    text, options, changes = case
    changed = {key: getattr(value, "every", value) for key, value in {**options, **changes}.items() if key not in FORMS}
    changed |= {"latent": True} if "latent" in changes else {}
    return "-".join([text.replace(" ", ""), *(f"{key}={value}" for key, value in changed.items())])


def make(text, options, changes):
    """(parts, mesh, parameters, one device's loss function)."""
    config, plan = TransformerConfig(**{**vars(CONFIG), **changes}), Plan(text, **options)
    model = Decoder(config)
    params = drawn(model, BATCH["tokens"])
    loss_fn = lm_loss(model, Z_LOSS)
    return ShardedDecoder(config, plan, Z_LOSS), make_mesh(plan, jax.devices()[: plan.devices]), params, loss_fn


def value_and_grad(loss_fn, params, batch):
    return jax.device_get(jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, batch))


@pytest.mark.parametrize(
    "text, options, changes",
    [pytest.param(*case, id=name(case)) for case in PLANS]
    + [pytest.param(*case, id=name(case), marks=pytest.mark.long) for case in LONG]
    + [pytest.param(*case, id=name(case), marks=pytest.mark.slow) for case in MORE_PLANS],
)
def test_a_plan_with_stages_computes_what_one_device_does(text, options, changes):
    parts, mesh, params, loss_fn = make(text, options, changes)
    placed = jax.device_put(params, shardings(mesh, parts.specs))
    rows = parts.plan.data * parts.plan.microbatch_count
    batch = {"tokens": BATCH["tokens"][: BATCH["tokens"].shape[0] // rows * rows]}
    parts.check(len(batch["tokens"]), 16)
    there = jax.device_put(batch, batch_sharding(parts, mesh))
    (loss, metrics), grads = value_and_grad(pipelined_decoder.make_loss(parts, mesh), placed, there)
    (expected_loss, expected_metrics), expected = value_and_grad(loss_fn, params, batch)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert metrics.keys() == expected_metrics.keys()
    for metric, value in metrics.items():
        assert value == pytest.approx(expected_metrics[metric], abs=1e-5), metric
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * scale, err_msg=path_name(path))
        assert scale > 1e-4, path_name(path)


@pytest.mark.long
def test_metrics_of_routers_on_uneven_stages_are_those_of_the_layers():
    """Three routed layers on two stages, of which one has a layer of padding; the loss alone."""
    parts, mesh, params, loss_fn = make("pp=2", {"microbatches": 2}, ROUTED | {"layers": 3})
    _, found = jax.device_get(jax.jit(pipelined_decoder.make_loss(parts, mesh))(params, BATCH))
    _, expected = jax.device_get(jax.jit(loss_fn)(params, BATCH))
    chex.assert_trees_all_close(found, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixture", "training"),
    [(MixtureConfig(dispatch="capacity", capacity_factor=0.75), True), (MixtureConfig(slack=1.0), False)],
    ids=["capacity", "slack"],
)
def test_a_capacity_or_a_bounded_buffer_drops_in_training_alone(mixture, training):
    """A capacity is that of a device's microbatch: a group of one device. Without a key nothing is dropped."""
    moe = replace(EXPERTS, router=RouterConfig("top_k", 4, 2), mixture=mixture)
    parts, mesh, params, _ = make("pp=2, ep=2", {"microbatches": 2}, ROUTED | {"layers": 2, "moe": moe})
    placed = jax.device_put(params, shardings(mesh, parts.specs))
    loss_fn = pipelined_decoder.make_loss(parts, mesh)
    one_device = lm_loss(Decoder(replace(parts.config, moe=replace(moe, mixture=replace(mixture, groups=4)))), Z_LOSS)
    key = jax.random.key(3) if training else None
    found, expected = (
        jax.device_get(jax.jit(jax.value_and_grad(run, has_aux=True))(weights, BATCH, key))
        for run, weights in ((loss_fn, placed), (one_device, params))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
    assert (found[0][1]["router/drop_fraction"] > 0).all() == training
    if not training:
        _, metrics = jax.jit(loss_fn)(placed, BATCH, jax.random.key(3))
        assert (metrics["router/drop_fraction"] > 0).all()


@pytest.mark.slow
def test_a_layout_of_ones_own():
    parts, mesh, params, loss_fn = make("pp=2, fsdp=2", {"microbatches": 2}, {"layers": 3})
    ours = pipelined_decoder.make_loss(parts, mesh, StageLayout((1, 2), 2))
    found, expected = (value_and_grad(run, params, BATCH) for run in (ours, loss_fn))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_loss_alone_and_its_scaled_gradient():
    parts, mesh, params, loss_fn = make("pp=2", {"schedule": "interleaved", "virtual": 2}, {"layers": 5})
    ours = pipelined_decoder.make_loss(parts, mesh)
    (loss, metrics), grads = value_and_grad(ours, params, BATCH)
    _, expected = value_and_grad(loss_fn, params, BATCH)
    chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-6)
    alone, alone_metrics = jax.device_get(jax.jit(ours)(params, BATCH))
    assert alone == pytest.approx(loss, abs=1e-6)
    assert alone_metrics["accuracy"] == pytest.approx(metrics["accuracy"], abs=1e-6)
    doubled = jax.jit(jax.grad(lambda p: 2 * ours(p, BATCH)[0]))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 2 * b, rtol=1e-6, atol=1e-8), doubled, grads)


REFUSED = {
    "loop": ({"scan": False}, {}, None, "set scan=True"),
    "layout": ({}, {}, StageLayout((2, 1), 2), "layout has 3 layers, the model 4"),
    "stages": ({}, {"microbatches": 3}, StageLayout((2, 1, 1), 3), "3 stages, but mesh axis 'pp' has 2 devices"),
    "groups": ({}, {"schedule": "interleaved", "virtual": 2, "microbatches": 3}, None, "take 2 or 4 microbatches"),
    "layers": ({"layers": 1}, {}, None, "1 layers cannot be cut into 2 stages"),
}


@pytest.mark.parametrize("changes, options, layout, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_pipelined_is_refused_with_the_numbers(changes, options, layout, message):
    config, plan = TransformerConfig(**{**vars(CONFIG), **changes}), Plan("pp=2", **options)
    with pytest.raises(PlanError, match=message):
        pipelined_decoder.make_loss(ShardedDecoder(config, plan), make_mesh(plan, jax.devices()[:2]), layout)
