import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from moe.gate import RouterConfig
from moe.layer import MoEConfig
from sharding.errors import PlanError
from sharding.mesh import make_mesh
from sharding.plan import Plan
from sharding.rules import COMPUTE, path_name, resolve, shardings
from tessera.lm.run import RunConfig, under_plan
from tessera.models.lm_loss import lm_loss, make_adjust
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.optim.optimizer import OptimizerConfig
from tessera.parallel.decoder import ShardedDecoder, check_experts, state_shardings
from tessera.step import StepConfig, init_state, make_train_step

CONFIG = TransformerConfig(vocab_size=32, layers=2, width=16, heads=8, kv_heads=4, ff=16)


@pytest.mark.parametrize(
    "axes, options, batch_size, length, words",
    [
        ("dp=2, fsdp=4", {}, 12, 16, ["batch_size=12", "dp=2 x fsdp=4", "nearest valid size of both: 6"]),
        ("cp=4, dp=2", {}, 8, 12, ["length=12", "8 parts", "cp=4", "nearest valid: 16"]),
        ("tp=4, dp=2", {"sequence": True}, 8, 30, ["length=30", "tp=4", "nearest valid: 32"]),
        ("cp=8", {"context": "all_to_all"}, 8, 16, ["4 key/value heads", "cp=8", "nearest valid: cp=4", "'ring'"]),
        ("tp=8", {}, 8, 16, ["blocks/attention/key/kernel", "kv_heads", "nearest valid size: 4"]),
        ("tp=4", {}, 8, 16, ["tp=4 makes 4 devices and there are 8", "nearest valid: tp=8"]),
        ("pp=4, dp=2", {}, 8, 16, ["dimension 0 (layers) of 2 does not divide by pp=4", "nearest valid size: 2"]),
        ("pp=2, dp=4", {"microbatches": 3}, 16, 16, ["4 rows", "microbatches=3", "nearest valid: microbatches=2"]),
        ("pp=2, dp=4", {}, 4, 16, ["1 rows", "microbatches=2 of 2 stages", "nearest valid: batch_size=8"]),
    ],
)
def test_what_does_not_divide_is_refused_before_anything_runs(axes, options, batch_size, length, words):
    with pytest.raises(PlanError) as error:
        under_plan(RunConfig(CONFIG, Plan(axes, **options), OptimizerConfig(), StepConfig(), batch_size, length))
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


@pytest.mark.parametrize(
    "axes",
    ["fsdp=4, tp=2", *(pytest.param(axes, marks=pytest.mark.slow) for axes in ("dp=8", "fsdp=2, tp=2, cp=2"))],
)
def test_constraints_alone_give_the_same_numbers(axes):
    """The compiler's own choice of collectives, from where the parameters lie and the edges of the blocks."""
    mesh = make_mesh(Plan(axes))
    batch = {"tokens": jax.random.randint(jax.random.key(1), (8, 17), 0, 32, jnp.int32)}
    params = jax.jit(Decoder(CONFIG).init)(jax.random.key(0), batch["tokens"])["params"]
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
        ("dp=8", {"router": RouterConfig("noisy")}, "router.name='noisy' \\(choose one of top_k"),
        ("dp=8", {"importance": 0.1}, "importance=0.1"),
        ("pp=2", {}, "balance_scope='batch' with pp > 1"),
        ("cp=2", {"balance_scope": "sequence"}, "balance_scope='sequence' with cp > 1"),
        ("tp=2", {"biases": True}, "biases with tp > 1"),
    ],
)
def test_experts_that_would_compute_something_else_are_refused(axes, settings, words):
    with pytest.raises(PlanError, match=words):
        check_experts(MoEConfig(**settings), Plan(axes))


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
