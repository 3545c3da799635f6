"""Every plan gives the numbers of one device: loss, metrics and the gradient of every parameter."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.layer import MoEConfig
from sharding.mesh import make_mesh
from sharding.plan import Plan
from sharding.rules import path_name, shardings
from sharding.tensor_parallel import gather_params
from tessera.models.lm_loss import lm_loss
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.parallel.decoder import ShardedDecoder, batch_sharding, make_loss

CONFIG = TransformerConfig(vocab_size=32, layers=2, width=16, heads=8, kv_heads=8, head_dim=4, ff=16)
Z_LOSS = 1e-2  # large enough to show in the gradient
BATCH = {"tokens": jax.random.randint(jax.random.key(1), (8, 17), 0, 32, jnp.int32)}

EXPERTS = MoEConfig(shared=1, balance=0.1, z=0.1)  # 8 experts, top 2
ROUTED = {"mlp": "routed", "moe": EXPERTS}
OLMO2 = {"qk_norm": True, "qk_norm_scope": "projection", "norm_position": "post"}

# Plan, options of the plan, changes of the model. The heavy rest is every pair and more triples.
PLANS = [
    ("fsdp=2, tp=2, cp=2", {"sequence": True}, {"remat": "dots", "qkv_bias": True, "qk_norm": True}),
    ("ep=4, tp=2", {}, ROUTED | OLMO2),
]
MORE_PLANS = [
    ("fsdp=8", {}, {"tied": False, "remat": "full"}),
    ("tp=2, fsdp=4", {"sequence": True}, {"kv_heads": 2}),
    ("dp=8", {}, {}),
    ("tp=8", {}, {"tied": False}),
    ("cp=4, fsdp=2", {}, {"kv_heads": 2}),
    ("cp=2, tp=2, dp=2", {"context": "all_to_all", "sequence": True}, {}),
    ("fsdp=8", {"zero": 1}, {}),
    ("ep=8", {}, {}),
    ("tp=4, dp=2", {}, {"scan": False}),
    ("tp=8", {"sequence": True}, {}),
    ("fsdp=2, tp=4", {"sequence": True}, OLMO2 | {"kv_heads": 4}),
    ("cp=8", {}, {}),
    ("cp=8", {"context": "all_to_all"}, {}),
    ("dp=4, fsdp=2", {}, {}),
    ("dcn.dp=2, dp=2, fsdp=2", {}, {}),
    ("dp=4, tp=2", {"sequence": True}, {"remat": "full"}),
    ("dp=2, cp=4", {"context": "all_to_all"}, {}),
    ("dp=2, cp=4", {}, {"scan": False, "remat": "full"}),
    ("fsdp=2, tp=4", {"zero": 1, "sequence": True}, {}),
    ("fsdp=4, cp=2", {"context": "all_to_all"}, {"remat": "full"}),
    ("tp=4, cp=2", {}, {}),
    ("tp=2, cp=4", {"sequence": True}, {"kv_heads": 4}),
    ("dp=2, fsdp=2, tp=2", {"sequence": True}, {"remat": "full"}),
    ("dp=2, fsdp=2, cp=2", {"zero": 1}, {}),
    ("dp=2, ep=2, tp=2", {}, {}),
    ("ep=2, fsdp=2, cp=2", {}, {}),
    ("dp=8", {}, ROUTED),
    ("ep=8", {}, ROUTED),
    ("tp=4, ep=2", {}, ROUTED),
    ("fsdp=8", {}, ROUTED | {"remat": "full"}),
    ("ep=2, tp=2, dp=2", {"sequence": True}, ROUTED),
    ("ep=2, cp=2, fsdp=2", {}, ROUTED | {"layers": 4, "moe": replace(EXPERTS, every=2)}),
]


def value_and_grad(loss_fn, params, batch):
    (loss, metrics), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, batch)
    return jax.device_get((loss, metrics, grads))


def make_params(config):
    return jax.jit(Decoder(config).init)(jax.random.key(0), BATCH["tokens"])["params"]


@pytest.fixture(scope="module")
def one_device():
    """Loss, metrics and gradients on one device, by what of the model changes them."""
    known = {}

    def reference(config):
        model = Decoder(config)
        if config not in known:
            known[config] = value_and_grad(lm_loss(model, Z_LOSS), make_params(config), BATCH)
        return known[config]

    return reference


def name(case):
    text, options, changes = case
    changed = {key: getattr(value, "every", value) for key, value in {**options, **changes}.items()}
    return "-".join([text.replace(" ", ""), *(f"{key}={value}" for key, value in changed.items())])


@pytest.mark.parametrize(
    "text, options, changes",
    [pytest.param(*case, id=name(case)) for case in PLANS]
    + [pytest.param(*case, id=name(case), marks=pytest.mark.slow) for case in MORE_PLANS],
)
def test_a_plan_computes_what_one_device_does(one_device, text, options, changes):
    config, plan = TransformerConfig(**{**vars(CONFIG), **changes}), Plan(text, **options)
    parts, mesh = ShardedDecoder(config, plan, Z_LOSS), make_mesh(plan)
    parts.check(8, 16)
    params = jax.device_put(make_params(config), shardings(mesh, parts.specs))
    batch = jax.device_put(BATCH, batch_sharding(parts, mesh))
    loss, metrics, grads = value_and_grad(make_loss(parts, mesh), params, batch)
    # What is recomputed changes nothing in the reference either.
    expected_loss, expected_metrics, expected = one_device(TransformerConfig(**{**vars(config), "remat": "none"}))
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert metrics.keys() == expected_metrics.keys()
    for metric, value in metrics.items():
        assert value == pytest.approx(expected_metrics[metric], abs=1e-5), metric
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max(), err_msg=path_name(path))
        assert np.abs(theirs).max() > 1e-4, path_name(path)


def test_routers_gains_and_biases_are_not_rounded_to_the_compute_type():
    """Experts are chosen in float32: the router's kernel comes as it is stored."""
    stored = {
        "attention_norm": {"gain": jnp.full((2, 8), 0.1)},
        "mlp": {"router": {"kernel": jnp.full((8, 4), 0.1)}, "up": {"kernel": jnp.full((8, 8), 0.1)}},
    }
    specs = jax.tree.map(lambda leaf: jax.sharding.PartitionSpec(), stored)
    found = gather_params(stored, specs, jnp.bfloat16, fsdp=None, vary_over=())
    types = {path_name(path): leaf.dtype.name for path, leaf in jax.tree.leaves_with_path(found)}
    assert types == {
        "attention_norm/gain": "float32",
        "mlp/router/kernel": "float32",
        "mlp/up/kernel": "bfloat16",
    }
