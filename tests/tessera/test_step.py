"""One step against optax by hand, gradient accumulation against the whole batch, SAM's gradient, the moving average."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tessera.optim.optimizer import OptimizerConfig, make_optimizer
from tessera.step import StepConfig, init_state, make_train_step


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


def test_what_follows_from_the_routers_load_is_of_the_whole_batch():
    """Two parts, each at one expert alone, are a balanced batch."""
    batch = {"load": jnp.array([[1.0, 0.0], [0.0, 1.0]] * 3)}

    def routed(params, batch, key):
        load = batch["load"].mean(0)[None]
        return params["w"].sum(), {"router/load": load, "router/max_violation": 2 * load.max(-1) - 1}

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
