"""Blocks of steps against a plain loop, and what the host does between them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tessera.scan_steps import run_blocks, scan_steps
from tessera.step import init_state, make_train_step

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
