"""A stack of tickets: against a plain loop, across stack modes, and through kills."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lottery import masks as masks_lib
from lottery.imp import Memory, SearchConfig, Starts, search
from tessera.data.images import Images, ImageSplits
from tessera.infra.artifacts import ArtifactStore
from tessera.models.registry import plain
from tessera.models.vision import LeNet, MLPConfig
from tessera.step import index_block
from tessera.tickets.train import TicketConfig, at_step, batched, evaluate, make_programs, stops, train_stack

CONFIG = TicketConfig(steps=24, batch_size=8, eval_every=8)
MODEL = LeNet(MLPConfig(hidden=(16,), classes=4))
NETWORK = plain(MODEL, jnp.zeros((1, 3, 3, 1)))
SIZE = 70


def apply(params, images):
    return MODEL.apply({"params": params}, jnp.asarray(images))


@pytest.fixture(scope="module")
def splits():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 3, 3, 1)).astype(np.float32)

    def images(n):
        labels = rng.integers(0, 4, n).astype(np.int32)
        return Images((centres[labels] + 0.3 * rng.normal(size=(n, 3, 3, 1))).astype(np.float32), labels)

    return ImageSplits(images(SIZE), images(33), images(41), 4)


@functools.cache
def masked_params(count, density):
    @jax.jit
    def draw():
        params = jax.vmap(lambda key: MODEL.init(key, jnp.zeros((1, 3, 3, 1)))["params"])(
            jax.random.split(jax.random.key(1), count)
        )
        masks = jax.tree.map(lambda p: jax.random.uniform(jax.random.key(p.size), p.shape) < density, params)
        masks = jax.tree.map(lambda m: jnp.ones_like(m) if m.ndim == 2 else m, masks)  # biases stay
        return masks_lib.apply(params, masks), masks

    return draw()


def make_starts(opt_state=None, start_step=0, density=0.5):
    names = (("ticket", 0), ("ticket", 5), ("reinit", 0))
    params, masks = masked_params(len(names), density)
    seeds = np.asarray([seed for _, seed in names], np.int32)
    return Starts(params, masks, opt_state, start_step, seeds, names)


def run(splits, config=CONFIG, starts=None, optimizer=None, **kwargs):
    programs = make_programs(splits, NETWORK, optimizer or optax.adam(0.02), config)
    return train_stack(starts or make_starts(), programs, config=config, size=SIZE, **kwargs)


def test_agrees_with_a_plain_loop_over_one_network(splits):
    """Adam under a mask, by hand: gradient times mask, update, weights times mask; evaluated in float64 numpy."""
    starts, trained = make_starts(), run(splits)
    params = jax.tree.map(lambda x: x[1], starts.params)
    masks = jax.tree.map(lambda x: x[1], starts.masks)
    tx = optax.adam(0.02)
    state = tx.init(params)
    losses = {}
    index = index_block(seed=5, start=0, steps=24, batch_size=8, size=SIZE)

    @jax.jit
    def train_step(params, state, x, y):
        gradient = jax.grad(lambda p: -jax.nn.log_softmax(apply(p, x))[jnp.arange(8), y].mean())(params)
        updates, state = tx.update(jax.tree.map(jnp.multiply, gradient, masks), state, params)
        return jax.tree.map(jnp.multiply, optax.apply_updates(params, updates), masks), state

    for step, rows in enumerate(index, start=1):
        params, state = train_step(params, state, splits.train.images[rows], splits.train.labels[rows])
        if step % 8 == 0:
            logits = np.asarray(apply(params, splits.validation.images), np.float64)
            log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            losses[step] = -log_p[np.arange(33), splits.validation.labels].mean()
    for ours, theirs in zip(jax.tree.leaves(trained.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(ours[1], theirs, rtol=1e-4, atol=1e-5)
    row = trained.rows[1]
    np.testing.assert_allclose(row["curve"]["validation_loss"], list(losses.values()), rtol=1e-4)
    assert row["early_stop_step"] == min(losses, key=losses.get)
    accuracy = np.mean(np.argmax(apply(params, splits.test.images), 1) == splits.test.labels)
    assert row["final_test_accuracy"] == pytest.approx(accuracy)


def test_map_and_vmap_train_the_same_networks(splits):
    one, two = (run(splits, TicketConfig(steps=16, batch_size=8, eval_every=8, stack=s)) for s in ("map", "vmap"))
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_pruned_weights_stay_zero_and_seeds_decide_the_order(splits):
    starts, trained = make_starts(), run(splits)
    masks_lib.check_zeros(trained.params, starts.masks)
    curves = [row["curve"]["train_loss"] for row in trained.rows]
    assert curves[0] != curves[1]


class Disk(ArtifactStore):
    """Keeps the newest save in memory; with `die_at`, the n-th save is the last thing that happens."""

    def __init__(self, die_at=0):
        self.saved, self.count, self.die_at = None, 0, die_at

    def latest(self, like, before=None):
        if self.saved is not None:
            assert jax.tree.structure(like) == jax.tree.structure(self.saved[1])
        return self.saved

    def save(self, step, tree, extra):
        self.saved = (step, jax.tree.map(np.asarray, tree), {"rows": [dict(row) for row in extra["rows"]]})
        self.count += 1
        if self.count == self.die_at:
            raise KeyboardInterrupt

    def clear(self, before=None):
        assert before == self.saved[0]


@pytest.mark.parametrize(("die_at", "rewind"), [(1, 0), (1, 8), (2, 3)])
def test_a_killed_level_goes_on_bit_for_bit(splits, die_at, rewind):
    config = TicketConfig(steps=24, batch_size=8, eval_every=8, rewind=rewind, save_seconds=0.0)
    whole = run(splits, config)
    disk = Disk(die_at)
    with pytest.raises(KeyboardInterrupt):
        run(splits, config, unfinished=disk)
    disk.die_at = 0
    again = run(splits, config, unfinished=disk)
    assert again.rows == whole.rows
    trees = [jax.tree.leaves((trained.params, trained.snapshot)) for trained in (again, whole)]
    for a, b in zip(*trees, strict=True):
        np.testing.assert_array_equal(a, b)


def test_snapshot_is_the_state_after_rewind_steps(splits):
    trained = run(splits, TicketConfig(steps=24, batch_size=8, eval_every=8, rewind=5))
    short = run(splits, TicketConfig(steps=5, batch_size=8, eval_every=8))
    for a, b in zip(jax.tree.leaves(trained.snapshot["params"]), jax.tree.leaves(short.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_rewound_state_continues_the_dense_run(splits):
    """Weights and optimizer of step 8, trained from step 8 with nothing pruned, end where the whole run ends."""
    config = TicketConfig(steps=24, batch_size=8, eval_every=8, rewind=8)
    optimizer = optax.adam(optax.linear_schedule(0.02, 0.0, 24))
    whole = run(splits, config, make_starts(density=2.0), optimizer)
    dense = make_starts(density=2.0)
    starts = Starts(whole.snapshot["params"], dense.masks, whole.snapshot["opt_state"], 8, dense.seeds, dense.names)
    rest = run(splits, config, starts, optimizer)
    for a, b in zip(jax.tree.leaves(rest.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_at_step_moves_schedules_and_leaves_adam_alone():
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(1.0, 0.0, 10)))
    state = at_step(tx.init({"w": jnp.ones(2)}), jnp.int32(7))
    kinds = (optax.ScaleByAdamState, optax.ScaleByScheduleState)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    counts = {type(node).__name__: int(node.count) for node in nodes if isinstance(node, kinds)}
    assert counts == {"ScaleByAdamState": 0, "ScaleByScheduleState": 7}


@pytest.mark.parametrize("size", [1, 7, 33, 100])
def test_evaluation_does_not_depend_on_how_the_set_is_cut(splits, size):
    params = jax.tree.map(lambda x: x[0], make_starts().params)
    loss, accuracy = evaluate(params, batched(splits.validation, size), apply)
    whole, right = evaluate(params, batched(splits.validation, 33), apply)
    np.testing.assert_allclose([loss, accuracy], [whole, right], rtol=1e-5)


def test_the_host_wakes_at_evaluations_the_rewind_point_and_the_end():
    assert stops(TicketConfig(steps=25, eval_every=10, rewind=3), 0) == [3, 10, 20, 25]
    assert stops(TicketConfig(steps=25, eval_every=10, rewind=3), 10) == [20, 25]


def test_a_loss_that_is_not_finite_names_the_network(splits):
    with pytest.raises(FloatingPointError, match=r"step 8 \(arm ticket, seed 0\)"):
        run(splits, optimizer=optax.sgd(1e30))


@pytest.mark.parametrize(
    "bad", [{"stack": "pmap"}, {"steps": 0}, {"rewind": 1000}, {"rewind": -1}, {"batch_size": 0}, {"eval_every": 0}]
)
def test_settings_that_cannot_be_run_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TicketConfig(**bad)


@pytest.mark.long
def test_a_search_trains_through_it(splits):
    config = TicketConfig(steps=8, batch_size=8, eval_every=8, rewind=4)
    optimizer = optax.adam(0.02)
    programs = make_programs(splits, NETWORK, optimizer, config)
    rows = search(
        jax.jit(lambda key: MODEL.init(key, jnp.zeros((1, 3, 3, 1)))["params"]),
        lambda starts, level: train_stack(starts, programs, config=config, size=SIZE),
        Memory(),
        SearchConfig(seeds=(0, 1), levels=2, rate=0.5, rewind=4, rewind_optimizer=True),
        opt_init=optimizer.init,
    )
    assert len(rows) == 2 + 2 * 2 * 3
    densities = {level: {row["density"] for row in rows if row["level"] == level} for level in range(3)}
    assert all(len(values) == 1 for values in densities.values())  # all arms and seeds at equal counts
    assert densities[0] == {1.0} and max(densities[2]) < max(densities[1]) < 1


def test_a_failure_in_the_test_after_the_last_step_costs_no_training(splits):
    config = TicketConfig(steps=24, batch_size=8, eval_every=24, save_seconds=0.0)
    disk = Disk(die_at=1)  # killed once the last step is saved, before the test
    with pytest.raises(KeyboardInterrupt):
        run(splits, config, unfinished=disk)
    assert disk.saved[0] == 24
    disk.die_at = 0
    assert run(splits, config, unfinished=disk).rows == run(splits, config).rows
    assert disk.count == 1
