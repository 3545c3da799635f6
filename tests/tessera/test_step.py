"""One step against optax by hand; gradient accumulation; the order of batches in memory; blocks of steps."""

import functools
from dataclasses import fields, replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.optim.optimizer import OptimizerConfig, make_optimizer
from tessera.step import (
    ROUTER_MEANS,
    StepConfig,
    TrainState,
    index_block,
    init_state,
    make_train_step,
    run_blocks,
    scan_steps,
)


def loss_fn(params, batch, key):
    prediction = batch["x"] @ params["w"] + params["b"]
    loss = jnp.mean((prediction - batch["y"]) ** 2)
    return loss, {"draw": jax.random.uniform(key), "error": jnp.sqrt(loss)}


def problem(rows=12):
    random = np.random.default_rng(0)
    batch = {"x": random.normal(size=(rows, 5)).astype(np.float32), "y": random.normal(size=rows).astype(np.float32)}
    return {"w": jnp.asarray(random.normal(size=5), jnp.float32), "b": jnp.float32(0.5)}, batch


KEY = jax.random.key(7)


assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "tx", [optax.sgd(0.1), optax.adamw(0.1), optax.chain(optax.clip_by_global_norm(0.1), optax.lion(0.1))]
)
def test_a_step_is_what_optax_does_by_hand(tx):
    params, batch = problem()
    step = jax.jit(make_train_step(loss_fn, tx))
    state, expected, opt_state = init_state(params, tx), params, tx.init(params)
    for _ in range(3):
        state, metrics = step(state, batch, KEY)
        grads = jax.grad(lambda p: loss_fn(p, batch, KEY)[0])(expected)
        updates, opt_state = tx.update(grads, opt_state, expected)
        expected = optax.apply_updates(expected, updates)
        assert_close(metrics["grad_norm"], optax.global_norm(grads))
        assert_close(metrics["update_norm"], optax.global_norm(updates))
    assert_close(state.params, expected)
    assert int(state.step) == 3 and bool(metrics["finite"]) and state.ema is None
    assert_close(metrics["error"] ** 2, metrics["loss"])


@pytest.mark.parametrize(
    ("parts", "tx"),
    [(2, optax.sgd(0.1)), (3, optax.sgd(0.1)), (12, optax.sgd(0.1))]
    + [(2, optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.02)))],
)
def test_gradient_accumulation_gives_the_update_of_the_whole_batch(parts, tx):
    params, batch = problem()
    whole, one = make_train_step(loss_fn, tx)(init_state(params, tx), batch, KEY)
    parted, two = jax.jit(make_train_step(loss_fn, tx, StepConfig(grad_accum_steps=parts)))(
        init_state(params, tx), batch, KEY
    )
    assert_close(whole.params, parted.params)
    assert_close(one["loss"], two["loss"])


def spiky(params, batch, key):
    """A loss and a gradient norm that the batch says."""
    return batch["level"].mean() + (params["w"] * batch["slope"].mean()).sum(), {}


def spikes_by_hand(losses, norms, interval, factor):
    """Which steps are above mean + factor * std (n - 1) of the last `interval` steps before, in float64."""
    found = []
    for i in range(len(losses)):
        past = slice(max(0, i - interval), i)
        over = [
            i >= interval // 2 and each[i] - np.mean(each[past]) > factor * np.std(each[past], ddof=1)
            for each in (np.asarray(losses, np.float64), np.asarray(norms, np.float64))
        ]
        found.append(any(over))
    return found


@pytest.mark.parametrize("parts", [1, 2])
def test_spikes_are_skipped_by_the_rule_and_change_nothing(parts):
    random = np.random.default_rng(3)
    config = StepConfig(
        grad_accum_steps=parts, ema=0.5, skip_step_on_spikes=True, skip_step_interval=8, skip_step_scaling_factor=3.0
    )
    tx = optax.adam(1e-3)
    step = jax.jit(make_train_step(spiky, tx, config))
    state = init_state({"w": jnp.zeros(4)}, tx, config)
    levels, slopes = 2 + 0.1 * random.normal(size=(2, 40))
    levels[[2, 20, 21]] += 5  # too early; a spike; and one beside it, which widens the deviation
    slopes[30] += 5  # of the gradient alone
    found: dict[str, list] = {"loss": [], "grad_norm": [], "skipped": []}
    for level, slope in zip(levels, slopes, strict=True):
        before = state
        state, metrics = step(state, {"level": jnp.full(2, level), "slope": jnp.full(2, slope)}, KEY)
        for name, values in found.items():
            values.append(float(metrics[name]))
        parts = [jax.tree.leaves((each.params, each.opt_state.inner, each.ema)) for each in (state, before)]
        changed = [not np.array_equal(a, b) for a, b in zip(*parts, strict=True)]
        assert any(changed) != bool(metrics["skipped"]) and (metrics["update_norm"] > 0) != bool(metrics["skipped"])
    expected = spikes_by_hand(found["loss"], found["grad_norm"], 8, 3)
    assert found["skipped"] == expected and expected[20] and expected[30] and not expected[2]
    assert float(metrics["skipped_steps"]) == sum(expected) and int(state.step) == 40


@pytest.mark.parametrize("name", ["sgd", "muon", "sam", "sophia", "schedule_free", "adafactor"])
def test_every_optimizer_stays_where_it_was_in_a_skipped_step(name):
    config, tx = StepConfig(skip_step_on_spikes=True, skip_step_interval=4), make_optimizer(OptimizerConfig(name))
    params, batch = {"a": {"kernel": jnp.ones((5, 3))}}, {"x": jnp.ones((2, 5))}
    loss = lambda params, batch, key: (jnp.square(batch["x"] @ params["a"]["kernel"]).mean(), {})  # noqa: E731
    step = jax.jit(make_train_step(loss, tx, config))
    state = init_state(params, tx, config)
    state, _ = step(state, batch, KEY)
    calm = state.opt_state.spikes._replace(losses=jnp.full(4, 1e-3), grad_norms=jnp.full(4, 1e-3))
    watched = state.opt_state._replace(spikes=calm)
    skipped, metrics = step(replace(state, step=jnp.int32(9), opt_state=watched), batch, KEY)
    assert metrics["skipped"] == 1 and int(skipped.step) == 10
    chex.assert_trees_all_equal((skipped.params, skipped.opt_state.inner), (state.params, state.opt_state.inner))


def test_a_state_without_the_new_options_is_what_it_was():
    """Checkpoints are read back by this structure: another field of the state would make old ones unreadable."""
    assert [field.name for field in fields(TrainState)] == ["step", "params", "opt_state", "ema", "frozen"]
    assert isinstance(init_state({"w": jnp.ones(2)}, optax.sgd(0.1)).opt_state, tuple)


def test_parts_of_a_batch_draw_noise_of_their_own():
    """The mean of 12 uniform draws has a deviation of 1 / 12; of one draw, used 12 times, of 1 / sqrt(12)."""
    params, batch = problem()
    step = make_train_step(loss_fn, optax.sgd(0.1), StepConfig(grad_accum_steps=12))
    state = init_state(params, optax.sgd(0.1))
    means = jax.jit(jax.vmap(lambda key: step(state, batch, key)[1]["draw"]))(jax.random.split(KEY, 400))
    assert np.std(means) == pytest.approx(1 / 12, rel=0.2) and np.mean(means) == pytest.approx(0.5, abs=0.02)


def test_what_follows_from_the_routers_load_is_of_the_whole_batch():
    """Two parts, each at one expert alone, are a balanced batch."""
    batch = {"load": jnp.array([[1.0, 0.0], [0.0, 1.0]] * 3)}

    def routed(params, batch, key):
        load = batch["load"].mean(0)[None]
        others = {f"router/{name}": jnp.ones(1) for name in ROUTER_MEANS if name != "load"}
        return params["w"].sum(), others | {"router/load": load, "router/max_violation": 2 * load.max(-1) - 1}

    step = make_train_step(routed, optax.sgd(0.1), StepConfig(grad_accum_steps=2))
    _, metrics = jax.jit(step)(init_state({"w": jnp.ones(1)}, optax.sgd(0.1)), batch, KEY)
    np.testing.assert_allclose(metrics["router/load"], [[0.5, 0.5]])
    np.testing.assert_allclose(metrics["router/max_violation"], [0.0], atol=1e-6)
    np.testing.assert_allclose(metrics["router/load_entropy"], [np.log(2)], rtol=1e-6)


def test_a_batch_that_does_not_divide():
    params, batch = problem()
    with pytest.raises(ValueError, match="12 does not divide into grad_accum_steps=5"):
        make_train_step(loss_fn, optax.sgd(0.1), StepConfig(grad_accum_steps=5))(
            init_state(params, optax.sgd(0.1)), batch, KEY
        )


def test_each_step_draws_another_key_and_the_same_again():
    params, batch = problem()
    tx = optax.sgd(0.0)
    step = jax.jit(make_train_step(loss_fn, tx))
    state, first = step(init_state(params, tx), batch, KEY)
    _, second = step(state, batch, KEY)
    assert first["draw"] != second["draw"]
    np.testing.assert_array_equal(step(init_state(params, tx), batch, KEY)[1]["draw"], first["draw"])


@pytest.mark.parametrize("parts", [1, 3])
def test_sam_sees_the_gradient_at_the_disturbed_parameters(parts):
    params, batch = problem()
    rho, lr = 0.1, 0.05
    tx = make_optimizer(OptimizerConfig("sam", lr=lr, options=(("base", "sgd"), ("rho", rho))))
    step = jax.jit(make_train_step(loss_fn, tx, StepConfig(grad_accum_steps=parts)))
    state, _ = step(init_state(params, tx), batch, KEY)

    def gradient(params):
        return jax.grad(lambda p: loss_fn(p, batch, KEY)[0])(params)

    grads = gradient(params)
    norm = optax.global_norm(grads)
    disturbed = jax.tree.map(lambda p, g: p + rho * g / norm, params, grads)  # Foret et al. 2021, equation 2
    assert_close(state.params, jax.tree.map(lambda p, g: p - lr * g, params, gradient(disturbed)))


def test_moving_average():
    params, batch = problem()
    tx = optax.sgd(0.1)
    step = jax.jit(make_train_step(loss_fn, tx, StepConfig(ema=0.9)), donate_argnums=0)
    state = init_state(params, tx, StepConfig(ema=0.9))
    expected = np.array(params["w"], np.float64)
    for _ in range(4):
        state, _ = step(state, batch, KEY)
        expected = 0.9 * expected + 0.1 * np.array(state.params["w"], np.float64)
    np.testing.assert_allclose(state.ema["w"], expected, rtol=1e-5)


def test_noise_scale_metrics_follow_numpy():
    params, batch = problem()
    tx = optax.sgd(0.1)
    step = make_train_step(loss_fn, tx, StepConfig(grad_accum_steps=4, noise_scale=True))
    _, metrics = step(init_state(params, tx), batch, KEY)

    def squared(rows):
        grads = jax.grad(lambda p: loss_fn(p, {k: v[rows] for k, v in batch.items()}, KEY)[0])(params)
        return float(optax.global_norm(grads)) ** 2

    small, big = np.mean([squared(np.arange(i, 12, 4)) for i in range(4)]), squared(np.arange(12))
    np.testing.assert_allclose(metrics["noise_signal"], (12 * big - 3 * small) / 9, rtol=1e-4)
    np.testing.assert_allclose(metrics["noise_trace"], (small - big) / (1 / 3 - 1 / 12), rtol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_finite_flag(value):
    params, batch = problem()
    batch["y"][3] = value
    _, metrics = make_train_step(loss_fn, optax.sgd(0.1))(init_state(params, optax.sgd(0.1)), batch, KEY)
    assert not bool(metrics["finite"])


BAD = [
    ({"grad_accum_steps": 0}, "grad_accum_steps"),
    ({"ema": 1.0}, "ema"),
    ({"noise_scale": True}, "grad_accum_steps to 2"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_bad_config(settings, message):
    with pytest.raises(ValueError, match=message):
        StepConfig(**settings)


# index_block


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 50),
    batch_size=st.integers(1, 70),
    cuts=st.lists(st.integers(0, 12), max_size=6),
    start=st.integers(0, 20),
)
def test_blocks_agree_however_they_are_cut(seed, size, batch_size, cuts, start):
    steps = sum(cuts)
    common = {"seed": seed, "batch_size": batch_size, "size": size}
    whole = index_block(start=0, steps=start + steps, **common)
    assert whole.dtype == np.int32 and whole.shape == (start + steps, batch_size)
    position = start
    for cut in cuts:
        block = index_block(start=position, steps=cut, **common)
        np.testing.assert_array_equal(block, whole[position : position + cut])
        position += cut


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 50), batch_size=st.integers(1, 20), epochs=st.integers(1, 4))
def test_every_epoch_holds_every_example_once(seed, size, batch_size, epochs):
    steps = -(-size * epochs // batch_size)
    stream = index_block(seed=seed, start=0, steps=steps, batch_size=batch_size, size=size).ravel()
    for epoch in range(epochs):
        assert sorted(stream[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))


def test_order_is_pinned():
    """A change of these numbers would silently change every resumed run."""
    block = index_block(seed=0, start=1, steps=2, batch_size=5, size=7)
    assert block.tolist() == [[2, 1, 1, 4, 5], [6, 3, 2, 0, 4]]


def test_epochs_and_seeds_differ():
    orders = {
        tuple(index_block(seed=seed, start=epoch, steps=1, batch_size=50, size=50)[0].tolist())
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16


def test_first_place_is_uniform():
    """Chi-square over which of 10 examples comes first, 2000 seeds; 9 degrees of freedom, p = 1e-4 at 33.7."""
    first = [index_block(seed=seed, start=0, steps=1, batch_size=1, size=10)[0, 0] for seed in range(2000)]
    counts = np.bincount(first, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 33.7


@pytest.mark.parametrize("wrong", [{"start": -1}, {"steps": -1}, {"batch_size": 0}, {"size": 0}])
def test_index_block_errors(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name}=.* must be at least"):
        index_block(**{"seed": 0, "start": 0, "steps": 1, "batch_size": 1, "size": 1, **wrong})


# scan_steps and run_blocks

DATA = jnp.asarray(np.random.default_rng(0).normal(size=(20, 3)), jnp.float32)
INDEX = np.random.default_rng(1).integers(0, 20, (7, 4)).astype(np.int32)
STEP = make_train_step(lambda params, batch, key: (jnp.mean((batch @ params["w"] - 1) ** 2), {}), optax.adam(0.1))


def step(state, index_B):
    state, metrics = STEP(state, DATA[index_B], jax.random.key(0))
    return state, metrics["loss"]


def test_a_block_is_its_steps_one_after_the_other_whole_or_in_part():
    state, losses = init_state({"w": jnp.zeros(3)}, optax.adam(0.1)), []
    for row in INDEX[:5]:
        state, loss = jax.jit(step)(state, row)
        losses.append(float(loss))
    first = init_state({"w": jnp.zeros(3)}, optax.adam(0.1))
    whole, mean = jax.jit(lambda s, index: scan_steps(step, s, index))(first, INDEX[:5])
    part, same = jax.jit(lambda s, index, count: scan_steps(step, s, index, count))(first, INDEX, np.int32(5))
    for got in (whole, part):
        assert int(got.step) == 5
        np.testing.assert_allclose(got.params["w"], state.params["w"], rtol=1e-6)
    assert float(mean) == pytest.approx(np.mean(losses), rel=1e-6) and float(same) == pytest.approx(
        float(mean), rel=1e-6
    )


def test_blocks_of_every_length_and_state_are_one_program():
    block = jax.jit(chex.assert_max_traces(lambda s, index, count: scan_steps(step, s, index, count), n=1))
    state = init_state({"w": jnp.zeros(3)}, optax.adam(0.1))
    for count in (1, 7, 3):
        state, _ = block(state, INDEX, np.int32(count))
    assert int(state.step) == 11


def count_up(state, start, stop):
    assert state == start
    return stop, {"loss": jnp.asarray([1.0, 2.0 if stop < 9 else jnp.nan])}


def test_the_host_is_told_of_every_block_and_saves_between_them():
    rows, saves = [], []
    after = lambda step, state, row: rows.append(row)  # noqa: E731
    save = lambda step, state: saves.append((step, state))  # noqa: E731
    assert run_blocks(count_up, 2, [4, 6, 8], start=2, after=after, save=save, save_seconds=0.0) == (8, 8)
    assert rows == [{"step": step, "loss": [1.0, 2.0]} for step in (4, 6, 8)]
    assert saves == [(4, 4), (6, 6), (8, 8)]
    run_blocks(count_up, 2, [4, 6, 8], start=2, save=save)
    assert len(saves) == 3, "so soon nothing is saved again"
    assert run_blocks(count_up, 3, [], start=3) == (3, 3)
    assert run_blocks(count_up, 0, [4, 6, 8], after=lambda step, *_: step >= 6) == (6, 6)


def test_a_loss_that_is_not_finite_names_measurement_step_and_network():
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 9 \(seed 5\): a lower learning rate"):
        run_blocks(count_up, 0, [4, 9], names=["seed 3", "seed 5"])
