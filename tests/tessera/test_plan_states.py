"""What a plan does to a run's state: tickets stay tickets, masters stay float32, a shard is written once."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lottery import criteria, prune, transform
from lottery import masks as masks_lib
from moe.gate import RouterConfig
from moe.layer import MoEConfig
from sharding.plan import Plan
from tessera.infra.checkpoint import CheckpointConfig, Checkpoints
from tessera.lm.run import RunConfig, under_plan
from tessera.models.lm_loss import lm_loss
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.optim.optimizer import OptimizerConfig, make_optimizer
from tessera.step import StepConfig, init_state, make_train_step

SIZES = {"vocab_size": 32, "layers": 2, "width": 16, "heads": 4, "ff": 32}
EXPERTS = {"mlp": "routed", "moe": MoEConfig(router=RouterConfig("top_k", 4, 2))}
BATCH = {"tokens": np.asarray(jax.random.randint(jax.random.key(1), (8, 9), 0, 32, jnp.int32))}


def first_params(config):
    return jax.jit(Decoder(config).init)(jax.random.key(0), jnp.asarray(BATCH["tokens"][:, :-1]))["params"]


def ticket(params):
    """Half of every kernel, the smallest weights gone."""
    which = masks_lib.prunable(params)
    removals = prune.removal_counts(prune.sizes(params, which), prune.Layerwise(0.5))
    return prune.remove(criteria.magnitude(params), masks_lib.ones(params), which, removals)


def planned(config, axes, init, devices=8):
    """Loss and placement of a run under a plan."""
    run = RunConfig(config, Plan(axes), OptimizerConfig(), StepConfig(), batch_size=24, length=8)
    return under_plan(run, init, jax.devices()[:devices])


def train(config, axes, params, tx, steps=2):
    """The state after some steps under a plan, on the host."""
    loss, placement = planned(config, axes, lambda: init_state(params, tx))
    state = jax.device_put(init_state(params, tx), placement.state)
    step = jax.jit(make_train_step(loss, tx), out_shardings=(placement.state, None))
    for _ in range(steps):
        state, _ = step(state, placement.place(BATCH), jax.random.key(0))
    return state


@pytest.mark.long
@pytest.mark.parametrize(
    ("axes", "changes"),
    [
        ("fsdp=2, tp=2, dp=2", {}),
        pytest.param("pp=2, fsdp=4", {}, marks=pytest.mark.slow),
        pytest.param("ep=4, tp=2", EXPERTS, marks=pytest.mark.slow),
        pytest.param("cp=2, tp=2, dp=2", {}, marks=pytest.mark.slow),
    ],
)
def test_a_ticket_trains_as_on_one_device(axes, changes):
    config = TransformerConfig(**SIZES, **changes)
    params = first_params(config)
    mask = ticket(params)
    # An epsilon so large that Adam does not turn rounding into steps of full size.
    tx = transform.sparse(optax.adamw(1e-2, eps=1e-3), mask)
    found, expected = train(config, axes, params, tx), train(config, "", params, tx)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5),
        jax.device_get(found.params),
        jax.device_get(expected.params),
    )
    for tree in (found.params, found.opt_state[0].mu, found.opt_state[0].nu):
        outside = jax.tree.map(lambda leaf, keep: float(jnp.abs(jnp.where(keep, 0, leaf)).max()), tree, mask)
        assert max(jax.tree.leaves(outside)) == 0.0
    assert any(leaf.sharding.num_devices == 8 for leaf in jax.tree.leaves(found.params))


@pytest.mark.long
def test_adafactor_with_split_moments_trains_as_on_one_device():
    """Rows and columns of what is split over fsdp and tp, against one device and against the paper in float64."""
    config = TransformerConfig(**SIZES | {"vocab_size": 37, "layers": 1, "ff": 24})
    params = first_params(config)
    tx = optax.adafactor(1e-2, min_dim_size_to_factor=8)
    found, expected = (train(config, axes, params, tx, steps=1) for axes in ("fsdp=2, tp=4", ""))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        jax.device_get((found.params, found.opt_state)),
        jax.device_get((expected.params, expected.opt_state)),
    )
    loss, batch = lm_loss(Decoder(config)), jax.tree.map(jnp.asarray, BATCH)
    grads = jax.jit(jax.grad(lambda p: loss(p, batch)[0]))(params)["blocks"]["mlp"]["up"]["kernel"]
    square = np.asarray(grads, np.float64) ** 2 + 1e-30
    for name, axis, shape, part in (("v_row", 2, (1, 16), (1, 8)), ("v_col", 1, (1, 24), (1, 6))):
        moment = getattr(found.opt_state[0], name)["blocks"]["mlp"]["up"]["kernel"]
        assert (moment.shape, moment.sharding.shard_shape(shape)) == (shape, part)
        # Shazeer & Stern 2018, algorithm 2, first step; optax has means for sums.
        np.testing.assert_allclose(moment, square.mean(axis), rtol=1e-4)


@pytest.mark.long
def test_products_in_bfloat16_leave_masters_and_moments_float32():
    config = TransformerConfig(**SIZES, dtype="bfloat16")
    params = first_params(config)
    state = train(config, "fsdp=8", params, optax.adamw(1e-5), steps=1)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.opt_state[0].mu))} == {jnp.dtype("float32")}
    # Steps this small would be lost in weights of eight bits.
    moved = jax.tree.map(lambda new, old: float(jnp.mean(new != old)), state.params, params)
    assert min(moved["blocks"]["attention"]["query"]["kernel"], moved["blocks"]["mlp"]["up"]["kernel"]) > 0.9
    rounded = jnp.asarray(params["blocks"]["mlp"]["up"]["kernel"], jnp.bfloat16)
    again = jnp.asarray(state.params["blocks"]["mlp"]["up"]["kernel"], jnp.bfloat16)
    assert float(jnp.mean(rounded == again)) > 0.5


@pytest.mark.long
@pytest.mark.parametrize("axes", ["fsdp=2, tp=2, dp=2", pytest.param("pp=2, fsdp=4", marks=pytest.mark.slow)])
def test_moments_in_bfloat16_and_skipped_spikes_are_those_of_one_device(axes):
    """The noise of rounding depends on no sharding; a state with calm steps behind it skips the next one."""
    config, batch = TransformerConfig(**SIZES), BATCH
    params, stepping = first_params(config), StepConfig(skip_step_on_spikes=True, skip_step_interval=4)
    tx = make_optimizer(OptimizerConfig("adamw", lr=1e-2, state_dtype="bfloat16", options=(("eps", 1e-3),)))
    found = {}
    for plan in (axes, ""):
        loss, placement = planned(config, plan, lambda: init_state(params, tx, stepping))
        state = jax.device_put(init_state(params, tx, stepping), placement.state)
        step = jax.jit(make_train_step(loss, tx, stepping), out_shardings=(placement.state, None))
        for _ in range(2):
            state, _ = step(state, placement.place(batch), jax.random.key(0))
        calm = state.opt_state.spikes._replace(losses=jnp.ones(4), grad_norms=jnp.full(4, 1e-3))
        watched = replace(state, step=jnp.int32(9), opt_state=state.opt_state._replace(spikes=calm))
        same, metrics = step(watched, placement.place(batch), jax.random.key(0))
        assert metrics["skipped"] == 1.0
        now, before = (same.params, same.opt_state.inner), (state.params, state.opt_state.inner)
        jax.tree.map(np.testing.assert_array_equal, now, before)
        (adam, *_), *_ = state.opt_state.inner.inner
        mu = adam.mu["blocks"]["mlp"]["up"]["kernel"]
        assert mu.dtype == jnp.bfloat16 and mu.sharding.is_fully_replicated == (not plan)
        found[plan] = jax.device_get(state)
    close = lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-2, atol=2e-4)  # noqa: E731
    jax.tree.map(close, found[axes].params, found[""].params)
    jax.tree.map(close, found[axes].opt_state, found[""].opt_state)


@pytest.mark.parametrize("axes", ["fsdp=8", pytest.param("dp=8", marks=pytest.mark.slow)])
def test_a_shard_is_written_once(tmp_path, axes):
    config = TransformerConfig(**SIZES | {"width": 64, "ff": 256})
    params = first_params(config)
    tx = optax.sgd(1e-2)
    _, placement = planned(config, axes, lambda: init_state(params, tx))
    state = jax.device_put(init_state(params, tx), placement.state)
    with Checkpoints(tmp_path / "checkpoints", CheckpointConfig(asynchronous=True)) as checkpoints:
        checkpoints.save(1, state, data={})
        checkpoints.wait()
    written = sum(path.stat().st_size for path in (tmp_path / "checkpoints" / "1").rglob("d/*") if path.is_file())
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    assert 0.5 * held < written < 1.2 * held


def saved_and_restored(directory, state, placement):
    """A checkpoint of a state, read back where another plan wants it."""
    with Checkpoints(directory, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, state, data={})
        checkpoints.wait()
        shapes = jax.eval_shape(lambda: state)
        like = jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), shapes, placement.state)
        return checkpoints.restore(1, like).state


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_run_of_an_odd_vocabulary_goes_on_with_other_padding(tmp_path, tied):
    """53 tokens are 56 on four devices, 54 on three and on two: the checkpoint has 53, losses are one device's."""
    config = TransformerConfig(
        **SIZES | {"vocab_size": 53, "heads": 12, "kv_heads": 2, "width": 24, "ff": 24}, tied=tied
    )
    batch = {"tokens": np.array(jax.random.randint(jax.random.key(1), (8, 9), 0, 53, jnp.int32))}
    batch["tokens"][0, :4] = 52  # the last token is in the part that has padding
    params, tx = first_params(config), optax.adamw(1e-2, eps=1e-3)
    plans = [("fsdp=2, tp=4", 8), ("dp=2, tp=3", 6), ("pp=2, tp=2", 4)]
    under = [planned(config, axes, lambda: init_state(params, tx), devices) for axes, devices in plans]
    state, losses = jax.device_put(init_state(params, tx), under[0][1].state), []
    for i, (loss, placement) in enumerate(under):
        if i:
            before, state = state, saved_and_restored(tmp_path / str(i), state, placement)
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(before))
        assert state.params["embed"]["table"].shape == state.opt_state[0].mu["embed"]["table"].shape == (53, 24)
        step = jax.jit(make_train_step(loss, tx), out_shardings=(placement.state, None))
        for _ in range(2):
            state, metrics = step(state, placement.place(batch), jax.random.key(0))
            losses.append(float(metrics["loss"]))
    expected, wanted = init_state(params, tx), []
    one_device = jax.jit(make_train_step(lm_loss(Decoder(config)), tx))
    for _ in losses:
        expected, metrics = one_device(expected, batch, jax.random.key(0))
        wanted.append(float(metrics["loss"]))
    assert losses == pytest.approx(wanted, abs=1e-5) and wanted[-1] < wanted[0] - 0.1
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, jax.device_get(state.params), jax.device_get(expected.params))


@pytest.mark.long
def test_a_run_on_uneven_stages_goes_on_under_another_plan(tmp_path):
    """Seven layers on three stages, saved, then on two stages with ZeRO-3: the steps and the state of one device."""
    config = TransformerConfig(**SIZES | {"layers": 7, "width": 24, "vocab_size": 48, "ff": 36})
    batch = {"tokens": np.concatenate([BATCH["tokens"], BATCH["tokens"][:4, ::-1]])}
    params, tx = first_params(config), optax.adamw(1e-2, eps=1e-3)
    state = init_state(params, tx)
    plans = ("pp=3", 3), ("pp=2, fsdp=2", 4)
    before, there = (planned(config, axes, lambda: state, devices) for axes, devices in plans)
    kernel = lambda tree: tree["blocks"]["mlp"]["up"]["kernel"]  # noqa: E731
    for (loss, placement), stages in ((before, 3), (there, 4)):
        state = jax.device_put(state, placement.state)
        # A third (a quarter) of the layers' bytes on a device, of parameters and of moments.
        for tree in (state.params, state.opt_state[0].mu):
            assert kernel(tree).addressable_shards[0].data.size * stages == kernel(tree).size == 7 * 24 * 36
        step = jax.jit(make_train_step(loss, tx), out_shardings=(placement.state, None))
        state, _ = step(state, placement.place(batch), jax.random.key(0))
        state = saved_and_restored(tmp_path / str(stages), state, there[1])
    expected = init_state(params, tx)
    one_device = jax.jit(make_train_step(lm_loss(Decoder(config)), tx))
    for _ in range(2):
        expected, _ = one_device(expected, batch, jax.random.key(0))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, jax.device_get(state.params), jax.device_get(expected.params))
