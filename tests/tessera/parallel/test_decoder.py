from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import drawn
from jax.sharding import PartitionSpec as P

from configs import moe_lm
from moe.experts import Gating, MixtureConfig
from moe.gate import RouterConfig
from moe.layer import MoEConfig
from sharding.errors import PlanError
from sharding.mesh import make_mesh
from sharding.plan import Plan
from sharding.rules import COMPUTE, path_name, resolve, shardings
from tessera.infra.config import build
from tessera.lm.run import RunConfig, under_plan
from tessera.lm.warm_start import join_blocks, split_blocks
from tessera.models.lm_loss import lm_loss, make_adjust
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.optim.optimizer import OptimizerConfig
from tessera.parallel.decoder import ShardedDecoder, check_experts, make_loss, state_shardings
from tessera.step import StepConfig, init_state, make_train_step

CONFIG = TransformerConfig(vocab_size=32, layers=2, width=16, heads=8, kv_heads=4, ff=16)


@pytest.mark.parametrize(
    "axes, options, batch_size, length, words",
    [
        (
            "dp=2, fsdp=4",
            {},
            12,
            16,
            ["batch_size=12", "dp=2 x fsdp=4", "dp=2, fsdp=3, or batch_size=16"],
        ),
        ("cp=4, dp=2", {}, 8, 12, ["length=12", "8 parts", "cp=4", "nearest valid: length=16"]),
        ("tp=4, dp=2", {"sequence": True}, 8, 30, ["length=30", "tp=4", "nearest valid: length=32"]),
        ("tp=2, cp=4", {"context": "all_to_all"}, 8, 16, ["the 3 heads", "cp=4", "nearest valid: cp=3", "'ring'"]),
        ("tp=8", {}, 8, 16, ["blocks/attention/output/kernel", "(heads) of 6", "nearest valid: tp=6"]),
        ("fsdp=6, dp=1", {}, 6, 16, ["makes 6 devices and there are 8", "nearest valid: fsdp=8, dp=1"]),
        ("tp=4", {}, 8, 16, ["tp=4 makes 4 devices and there are 8", "nearest valid: tp=8"]),
        ("pp=4, dp=2", {}, 8, 16, ["2 layers cannot be cut into 4 stages", "take at most 2 stages"]),
        ("pp=2, dp=4", {"microbatches": 3}, 16, 16, ["4 rows", "microbatches=3", "nearest valid: microbatches=2"]),
        ("pp=2, dp=4", {}, 4, 16, ["1 rows", "microbatches=2 of 2 stages", "nearest valid: batch_size=8"]),
    ],
)
def test_what_does_not_divide_is_refused_before_anything_runs(axes, options, batch_size, length, words):
    config = replace(CONFIG, heads=6, kv_heads=3, head_dim=2) if "heads" in " ".join(words) else CONFIG
    with pytest.raises(PlanError) as error:
        under_plan(RunConfig(config, Plan(axes, **options), OptimizerConfig(), StepConfig(), batch_size, length))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("zero", [1, 3])
def test_what_fsdp_splits(zero):
    plan = Plan("fsdp=8", zero=zero)
    mesh = make_mesh(plan)
    params = jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    state = jax.eval_shape(lambda p: init_state(p, optax.adam(1e-3), StepConfig(ema=0.9)), params)
    where = state_shardings(ShardedDecoder(CONFIG, plan), mesh, state)
    kernel = lambda tree: tree["blocks"]["mlp"]["up"]["kernel"].spec  # noqa: E731
    assert kernel(where.params) == (P() if zero == 1 else P(None, "fsdp"))
    adam = where.opt_state[0]
    assert {kernel(adam.mu), kernel(adam.nu), kernel(where.ema)} == {P(None, "fsdp")}
    assert adam.count.spec == where.step.spec == P()


@pytest.mark.long
@pytest.mark.parametrize(
    "axes",
    ["fsdp=4, tp=2", *(pytest.param(axes, marks=pytest.mark.slow) for axes in ("dp=8", "fsdp=2, tp=2, cp=2"))],
)
def test_constraints_alone_give_the_same_numbers(axes):
    """The compiler's own choice of collectives, from where the parameters lie and the edges of the blocks."""
    mesh = make_mesh(Plan(axes))
    batch = {"tokens": jax.random.randint(jax.random.key(1), (8, 17), 0, 32, jnp.int32)}
    params = drawn(Decoder(CONFIG), batch["tokens"])
    where = shardings(mesh, ShardedDecoder(CONFIG, Plan(axes)).specs)

    def constrain(x, axes):
        spec = resolve(axes, x.shape, COMPUTE, mesh.shape)
        return jax.lax.with_sharding_constraint(x, jax.NamedSharding(mesh, spec))

    def gradient(model, params):
        loss_fn = lm_loss(model, 1e-2)
        return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, batch)

    (expected_loss, _), expected = gradient(Decoder(CONFIG), params)
    (loss, _), grads = gradient(Decoder(CONFIG, constrain=constrain), jax.device_put(params, where))
    assert float(loss) == pytest.approx(float(expected_loss), abs=1e-5)
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        atol = 1e-5 * float(jnp.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=atol, err_msg=path_name(path))


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["fsdp=4, tp=2", "pp=2, dp=4"])
def test_accumulated_gradients_under_a_plan_are_those_of_one_device(axes):
    """Parts of a batch whose gradients the training step averages, each through the plan by itself."""
    plan, tx, stepping = Plan(axes), optax.sgd(1.0), StepConfig(grad_accum_steps=2)
    batch = {"tokens": jax.random.randint(jax.random.key(1), (16, 17), 0, 32, jnp.int32)}
    model = Decoder(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0), batch["tokens"])["params"]
    init = lambda: init_state(params, tx, stepping)  # noqa: E731
    loss_fn, placement = under_plan(RunConfig(CONFIG, plan, OptimizerConfig(), stepping, 16, 16), init)
    step = jax.jit(make_train_step(loss_fn, tx, stepping), out_shardings=(placement.state, None))
    state, metrics = step(jax.device_put(init(), placement.state), placement.place(batch), jax.random.key(2))
    whole = lm_loss(model)
    expected, expected_metrics = jax.jit(make_train_step(whole, tx))(init_state(params, tx), batch, jax.random.key(2))
    assert float(metrics["loss"]) == pytest.approx(float(expected_metrics["loss"]), abs=1e-5)
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "axes, settings, words",
    [
        ("dp=8", {"router": RouterConfig("base", k=1)}, "router.name='base' \\(choose one of top_k"),
        ("pp=2", {"router": RouterConfig("noisy")}, "router.name='noisy' with pp > 1"),
        ("pp=2", {"router": RouterConfig("switch", k=1, jitter=0.1)}, "router.jitter=0.1 with pp > 1"),
        ("dp=2", {"mixture": MixtureConfig(dropout=0.1)}, "mixture.dropout=0.1: not the same numbers"),
        ("cp=2", {"balance_scope": "sequence"}, "balance_scope='sequence' with cp > 1"),
    ],
)
def test_experts_that_would_compute_something_else_are_refused(axes, settings, words):
    with pytest.raises(PlanError, match=words):
        check_experts(MoEConfig(**settings), Plan(axes))


@pytest.mark.parametrize("arg", moe_lm.VARIANTS)
@pytest.mark.parametrize("axes", ["dp=8", "ep=4, dp=2", "fsdp=4, tp=2"])
def test_every_config_of_routed_models_has_plans(arg, axes):
    config = moe_lm.get_config(arg)
    model = build(TransformerConfig, config.model, "config.model", vocab_size=256)
    ShardedDecoder(model, Plan(axes)).check(config.batch_size, config.length)


# A capacity that drops, losses of all tokens, routers with noise that is off. Plan, groups on one device, experts.
TRAINED = [
    (
        "ep=2, dp=2, tp=2",
        4,
        MoEConfig(
            router=RouterConfig("switch", 8, 1),
            mixture=MixtureConfig(dispatch="capacity", capacity_factor=0.75, groups=2, drop="probability"),
            importance=0.3,
            z=0.1,
        ),
    ),
    ("dp=4", 4, MoEConfig(router=RouterConfig("hash", 8, 2), mixture=MixtureConfig(dispatch="capacity"), z=0.1)),
    ("cp=2, dp=2", 0, MoEConfig(router=RouterConfig("noisy", 8, 2), importance=0.3, load=0.5, shared=1)),
    (
        "ep=2, tp=2, dp=2",
        0,
        MoEConfig(
            router=RouterConfig("sigmoid", 10, 3, bias=True, score="softmax", normalize=2.0),
            mixture=MixtureConfig("geglu", gating=Gating(limit=0.5, offset=1.0), weigh="input"),
            biases=True,
            identity=1,
            null=1,
            shared=1,
            shared_gate=True,
        ),
    ),
]


@pytest.mark.parametrize(
    "axes, groups, moe",
    [pytest.param(*case, marks=pytest.mark.slow, id=case[0].replace(" ", "")) for case in TRAINED],
)
def test_training_of_experts_under_a_plan_is_that_of_one_device(axes, groups, moe):
    """Loss, router metrics and gradients; a device's capacity is that of as many groups on one device."""
    key = jax.random.key(2) if groups else None  # a capacity holds in training; the noisy router is compared without
    batch = {"tokens": jax.random.randint(jax.random.key(1), (8, 17), 0, 32, jnp.int32)}
    found = []
    for mixture in (moe.mixture, replace(moe.mixture, groups=moe.mixture.groups * max(1, groups))):
        config = replace(CONFIG, layers=1, mlp="routed", moe=replace(moe, mixture=mixture))
        if not found:
            mesh = make_mesh(Plan(axes), jax.devices()[: Plan(axes).devices])
            loss_fn = make_loss(ShardedDecoder(config, Plan(axes)), mesh)
            params = jax.jit(Decoder(config).init)(jax.random.key(0), batch["tokens"])["params"]
        else:
            loss_fn = lm_loss(Decoder(config))
        found.append(jax.device_get(jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, batch, key)))
    (loss, metrics), grads = found[0]
    (expected_loss, expected_metrics), expected = found[1]
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert metrics.keys() == expected_metrics.keys() and "router/max_violation" in metrics
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert (metrics["router/drop_fraction"] > 0).all() == (moe.mixture.dispatch == "capacity")
    for (path, ours), theirs in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max(), err_msg=path_name(path))


FIRST_DENSE = MoEConfig(router=RouterConfig("top_k", 8, 2), first_k_dense_replace=1, ff=8, z=0.1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("axes", "scan"),
    [
        ("ep=2, tp=2, dp=2", True),
        *(
            pytest.param(axes, scan, marks=pytest.mark.slow)
            for axes in ("dp=8", "fsdp=2, ep=4")
            for scan in (True, False)
        ),
        pytest.param("", False, marks=pytest.mark.slow),
    ],
)
def test_first_dense_layers_are_those_of_one_scanned_device(axes, scan):
    batch = {"tokens": jax.random.randint(jax.random.key(1), (8, 17), 0, 32, jnp.int32)}
    stacked = replace(CONFIG, layers=3, mlp="routed", moe=FIRST_DENSE)
    config = replace(stacked, scan=scan, remat="1 full; 2 none")
    params = drawn(Decoder(stacked), batch["tokens"])
    assert params["dense_blocks"]["mlp"]["up"]["kernel"].shape == (1, 16, 16)
    assert params["blocks"]["mlp"]["experts"]["up"]["kernel"].shape == (2, 8, 16, 8)
    mine = join_blocks(params, split_blocks(params, stacked), config)
    sharded = make_loss(ShardedDecoder(config, Plan(axes)), make_mesh(Plan(axes))) if axes else lm_loss(Decoder(config))
    ours, expected = (
        jax.device_get(jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(weights, batch))
        for loss_fn, weights in ((sharded, mine), (lm_loss(Decoder(stacked)), params))
    )
    gradients = join_blocks(expected[1], split_blocks(expected[1], stacked), config)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)  # noqa: E731
    jax.tree.map(close, ours, (expected[0], gradients))
    assert ours[0][1]["router/load"].shape == (2, 8)


@pytest.mark.slow
def test_noise_under_a_plan_is_drawn_in_training_alone_and_anew_by_every_device():
    moe = MoEConfig(router=RouterConfig("switch", 8, 1, jitter=0.5), balance=0.0)
    config = replace(CONFIG, layers=1, mlp="routed", moe=moe)
    row = jax.random.randint(jax.random.key(1), (1, 17), 0, 32, jnp.int32)
    params = jax.jit(Decoder(config).init)(jax.random.key(0), row)["params"]
    loads = {}
    for axes in ("dp=4, tp=2", "dp=1"):
        plan = Plan(axes)
        loss_fn = jax.jit(make_loss(ShardedDecoder(config, plan), make_mesh(plan, jax.devices()[: plan.devices])))
        for key in (None, 0, 1):
            rng = None if key is None else jax.random.key(key)
            found = loss_fn(params, {"tokens": jnp.tile(row, (4, 1))}, rng)[1]["router/load"]
            loads[axes, key] = np.asarray(found) * 4 * 16
    np.testing.assert_allclose(loads["dp=4, tp=2", None], loads["dp=1", None], atol=1e-3)
    assert np.abs(loads["dp=4, tp=2", 0] - loads["dp=4, tp=2", 1]).max() > 0.5
    # The four rows are one text: with the same noise on every device all loads would be multiples of four.
    assert (np.round(loads["dp=4, tp=2", 0]) % 4).any()
    assert not (np.round(loads["dp=4, tp=2", None]) % 4).any()


@pytest.mark.slow
def test_biases_of_balanced_routers_move_as_on_one_device():
    moe = MoEConfig(router=RouterConfig("sigmoid", 8, 2), bias_rate=0.01)
    config = TransformerConfig(**{**vars(CONFIG), "mlp": "routed", "moe": moe})
    params = jax.jit(Decoder(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    batch, tx = {"tokens": jax.random.randint(jax.random.key(1), (8, 17), 0, 32, jnp.int32)}, optax.sgd(1e-2)
    losses = {"": lm_loss(Decoder(config)), "ep=4, dp=2": None}
    losses["ep=4, dp=2"], _ = under_plan(RunConfig(config, Plan("ep=4, dp=2"), OptimizerConfig(), StepConfig(), 8, 16))
    found = {}
    for name, loss_fn in losses.items():
        step = jax.jit(make_train_step(loss_fn, tx, adjust=make_adjust(config)))
        state, metrics = step(init_state(params, tx), batch, jax.random.key(2))
        found[name] = np.asarray(state.params["blocks"]["mlp"]["router"]["bias"])
        assert metrics["router/load"].shape == (2, 8)
    np.testing.assert_array_equal(found["ep=4, dp=2"], found[""])
    assert np.abs(found[""]).max() == pytest.approx(0.01)
