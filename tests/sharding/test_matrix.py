"""Every plan gives the numbers of one device: loss, metrics and the gradient of every parameter."""

import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe.experts import MixtureConfig
from moe.gate import RouterConfig
from moe.layer import MoEConfig
from sharding.mesh import make_mesh
from sharding.plan import Plan
from sharding.rules import path_name, shardings
from sharding.tensor_parallel import gather_params
from tessera.models.lm_loss import lm_loss
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.parallel.decoder import ShardedDecoder, batch_sharding
from tessera.parallel.pipelined_decoder import make_loss
from tessera.step import StepConfig, init_state, make_train_step

CONFIG = TransformerConfig(vocab_size=32, layers=2, width=16, heads=8, kv_heads=8, head_dim=4, ff=16)
Z_LOSS = 1e-2  # large enough to show in the gradient
TOKENS = jax.random.randint(jax.random.key(1), (12, 17), 0, 32, jnp.int32)

EXPERTS = MoEConfig(shared=1, balance=0.1, z=0.1)  # 8 experts, top 2
ROUTED = {"mlp": "routed", "moe": EXPERTS}
OLMO2 = {"qk_norm": True, "qk_norm_scope": "projection", "norm_position": "post"}

# Plan, options of the plan, changes of the model. The heavy rest is every pair and more triples.
PLANS = [
    ("fsdp=2, tp=2, cp=2", {"sequence": True}, {"remat": "dots", "qkv_bias": True, "qk_norm": True}),
]
LONG = [("ep=4, tp=2", {}, ROUTED | OLMO2)]
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

# Sizes that the devices do not divide: a vocabulary of 37, tp above the key/value heads, odd numbers of devices; and
# losses of the whole batch where it goes through the model in parts. A fourth entry: parts of gradient accumulation.
ODD = {"vocab_size": 37, "heads": 6, "kv_heads": 2, "ff": 18}
DENSELY = MixtureConfig(dispatch="dense")  # compiles in a fraction of the time
WHOLE = {"mlp": "routed", "moe": MoEConfig(balance=0.3, router=RouterConfig("top_k", 4, 2), mixture=DENSELY), "ff": 12}
PARTS = replace(WHOLE["moe"], importance=0.2, z=0.1)
# Tokens with different numbers of choices, so that devices and parts have different numbers of them.
RELU = WHOLE | {"moe": replace(PARTS, router=RouterConfig("relu", 4, 2, penalty=0.1))}
UNEVEN = [
    ("fsdp=2, tp=4", {"sequence": True}, {"vocab_size": 37, "kv_heads": 2, "tied": False, "layers": 1}),
]
LONG += [("pp=2, tp=2", {}, WHOLE | {"vocab_size": 37, "kv_heads": 1})]
MORE_UNEVEN = [
    ("tp=3", {}, ODD),
    ("tp=3, fsdp=2", {}, ODD | {"kv_heads": 3, "width": 18, "tied": False}),
    ("fsdp=2, tp=3", {"zero": 1}, ODD | OLMO2 | {"kv_heads": 2, "qkv_bias": True}),
    ("tp=5", {}, ODD | {"heads": 5, "kv_heads": 1, "ff": 15}),
    ("fsdp=5", {}, ODD | {"width": 20}),
    ("tp=6", {}, ODD | {"heads": 12, "kv_heads": 4}),
    ("dp=3, tp=2", {}, ODD | {"kv_heads": 1, "remat": "full"}),
    ("tp=7", {}, ODD | {"heads": 7, "kv_heads": 1, "ff": 14, "width": 14}),
    ("dp=7", {}, ODD),
    ("tp=2, cp=2", {"context": "all_to_all"}, ODD | {"heads": 4, "kv_heads": 2}),
    ("pp=2, tp=3", {"microbatches": 4}, ODD),
    ("ep=2, tp=4", {}, WHOLE | {"vocab_size": 37, "kv_heads": 2}),
    ("pp=2, dp=2", {"microbatches": 4}, WHOLE | {"moe": PARTS}),
    ("pp=2, fsdp=2", {"schedule": "interleaved", "virtual": 2}, WHOLE | {"layers": 4, "moe": PARTS}),
    ("pp=2", {}, WHOLE | {"layers": 3, "moe": replace(PARTS, first_k_dense_replace=1)}),
    ("", {}, WHOLE | {"moe": PARTS}, 2),
    ("", {}, WHOLE | {"scan": False, "layers": 4, "moe": replace(PARTS, every=2)}, 3),
    ("dp=2", {}, WHOLE | {"moe": PARTS}, 2),
    ("fsdp=2, cp=2", {}, WHOLE | {"moe": replace(PARTS, router=RouterConfig("sigmoid", 4, 2, bias=True))}, 2),
    ("ep=2, dp=2", {}, WHOLE | {"scan": False, "moe": replace(PARTS, every=2)}, 2),
    ("pp=2, dp=2", {}, WHOLE | {"moe": replace(PARTS, balance_scope="sequence")}, 2),
    ("", {}, RELU, 2),
    ("ep=2, cp=2, tp=2", {}, RELU),
    ("pp=2, dp=2", {"microbatches": 4}, RELU),
    ("dp=2, tp=2", {}, RELU, 2),
]
TWELVE = [
    ("fsdp=2, tp=6", {}, ODD | {"heads": 12, "kv_heads": 4, "tied": False}),
    ("tp=12", {"sequence": False}, ODD | {"heads": 12, "kv_heads": 3, "ff": 12, "width": 24}),
    ("pp=2, dp=2, tp=3", {}, ODD),
    ("dp=3, fsdp=4", {}, ODD),
]


def value_and_grad(loss_fn, params, batch):
    (loss, metrics), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, batch)
    return jax.device_get((loss, metrics, grads))


def make_params(config):
    return jax.jit(Decoder(config).init)(jax.random.key(0), TOKENS[:1, :4])["params"]


@pytest.fixture(scope="module")
def one_device():
    return references()


def references():
    """Loss, metrics and gradients on one device, by what of the model changes them."""
    known = {}

    def reference(config, rows):
        if (config, rows) not in known:
            batch = {"tokens": TOKENS[:rows]}
            known[config, rows] = value_and_grad(lm_loss(Decoder(config), Z_LOSS), make_params(config), batch)
        return known[config, rows]

    return reference


def name(case):
    text, options, changes, *_ = case
    say = lambda value: f"{value.router.name}/{value.every}" if isinstance(value, MoEConfig) else value  # noqa: E731
    changed = {key: say(value) for key, value in {**options, **changes}.items()}
    return "-".join([text.replace(" ", ""), *(f"{key}={value}" for key, value in changed.items())])


def of_a_plan(text, options, changes, parts=1):
    """Config, rows of the batch, and loss, metrics and gradients under a plan, of parts averaged by the step."""
    config, plan = TransformerConfig(**{**vars(CONFIG), **changes}), Plan(text, **options)
    shards = plan.data * parts * (plan.microbatch_count if plan.size("pp") > 1 else 1)
    rows = shards * max(1, 8 // shards)
    decoder, mesh = ShardedDecoder(config, plan, Z_LOSS), make_mesh(plan, jax.devices()[: plan.devices])
    decoder.check(rows // parts, 16)
    params = jax.device_put(make_params(config), shardings(mesh, decoder.specs))
    batch = jax.device_put({"tokens": TOKENS[:rows]}, batch_sharding(decoder, mesh))
    loss_fn = make_loss(decoder, mesh) if text else lm_loss(Decoder(config), Z_LOSS)
    if parts == 1:
        return config, rows, value_and_grad(loss_fn, params, batch)
    tx = optax.sgd(1.0)
    step = jax.jit(make_train_step(loss_fn, tx, StepConfig(grad_accum_steps=parts)))
    state, metrics = jax.device_get(step(init_state(params, tx), batch, jax.random.key(0)))
    grads = jax.tree.map(lambda a, b: np.asarray(a) - b, params, state.params)
    loss = metrics.pop("loss")
    return config, rows, (loss, {name: metrics[name] for name in metrics if name not in OF_THE_STEP}, grads)


OF_THE_STEP = ("finite", "grad_norm", "update_norm")


def check(one_device, text, options, changes, parts=1):
    config, rows, (loss, metrics, grads) = of_a_plan(text, options, changes, parts)
    # What is recomputed, and how tokens come to their experts, changes nothing in the reference either.
    config = replace(config, remat="none", moe=replace(config.moe, mixture=DENSELY))
    expected_loss, expected_metrics, expected = one_device(config, rows)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert metrics.keys() == expected_metrics.keys()
    for metric, value in metrics.items():
        assert value == pytest.approx(expected_metrics[metric], abs=1e-5), metric
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        if path[-1].key in ("penalty",) or path_name(path).endswith("router/bias"):
            continue  # moved outside the gradient
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max(), err_msg=path_name(path))
        assert np.abs(theirs).max() > 1e-4, path_name(path)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name(case)) for case in PLANS + UNEVEN]
    + [pytest.param(case, id=name(case), marks=pytest.mark.long) for case in LONG]
    + [pytest.param(case, id=name(case), marks=pytest.mark.slow) for case in MORE_PLANS + MORE_UNEVEN],
)
def test_a_plan_computes_what_one_device_does(one_device, case):
    check(one_device, *case)


@pytest.mark.slow
def test_twelve_devices_compute_what_one_does():
    """In a process of its own: this one has eight."""
    code = f"""
import jax
jax.config.update("jax_num_cpu_devices", 12)
import runpy
here = runpy.run_path({__file__!r})
for case in here["TWELVE"]:
    here["check"](here["references"](), *case)
    print("equal:", case[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.count("equal:") == len(TWELVE), done.stdout + done.stderr[-2000:]


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
