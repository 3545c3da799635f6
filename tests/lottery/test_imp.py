"""Searches on a least-squares problem small enough to check by hand, with a pure-JAX training function."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lottery import imp, masks, transform

TX = optax.adam(0.05)
Search = functools.partial(imp.SearchConfig, output="^output/")
STEPS = 6


def init_fn(key):
    first, second = jax.random.split(key)
    return {
        "dense0": {"kernel": jax.random.normal(first, (6, 8)), "bias": jnp.zeros(8)},
        "output": {"kernel": jax.random.normal(second, (8, 3)), "bias": jnp.zeros(3)},
    }


def loss_fn(params, x, y):
    hidden = jax.nn.relu(x @ params["dense0"]["kernel"] + params["dense0"]["bias"][None])
    return jnp.mean((hidden @ params["output"]["kernel"] + params["output"]["bias"][None] - y) ** 2)


def train_one(rewind, params, mask, opt_state, seed, start_step):
    tx = transform.sparse(TX, mask)

    def step(carry, i):
        params, opt_state, snapshot = carry
        keep = lambda new, old: jnp.where(i == rewind, new, old)  # noqa: E731
        snapshot = jax.tree.map(keep, {"params": params, "opt_state": opt_state}, snapshot)
        x = jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), (16, 6))
        loss, grads = jax.value_and_grad(loss_fn)(params, x, x[:, :3])
        updates, new = tx.update(grads, opt_state, params)
        live = i >= start_step
        params, opt_state = jax.tree.map(
            lambda a, b: jnp.where(live, a, b), (optax.apply_updates(params, updates), new), (params, opt_state)
        )
        return (params, opt_state, snapshot), loss

    start = (params, opt_state, {"params": params, "opt_state": opt_state})
    (params, _, snapshot), losses = jax.lax.scan(step, start, jnp.arange(STEPS))
    return params, snapshot, losses


@functools.cache
def compiled(rewind):
    return jax.jit(jax.vmap(functools.partial(train_one, rewind), in_axes=(0, 0, 0, 0, None)))


class Trainer:
    """A training function that remembers what it was asked to train."""

    def __init__(self, rewind=0):
        self.rewind, self.starts = rewind, {}

    def __call__(self, starts, *, level):
        self.starts[level] = starts
        opt_state = jax.vmap(TX.init)(starts.params) if starts.opt_state is None else starts.opt_state
        seeds = jnp.asarray(starts.seeds)
        run = compiled(self.rewind)
        params, snapshot, losses = run(starts.params, starts.masks, opt_state, seeds, starts.start_step)
        rows = [{"final_loss": curve[-1], "curve": curve} for curve in np.asarray(losses)]
        return imp.Trained(params=params, rows=rows, snapshot=snapshot)


def run(config, store=None, trainer=None, **options):
    trainer, store = trainer or Trainer(config.rewind), store or imp.Memory()
    return imp.search(init_fn, trainer, store, config, **options), store, trainer


def part(config, tree, arm):
    n, i = len(config.seeds), config.arms.index(arm)
    return jax.tree.map(lambda x: np.asarray(x)[i * n : (i + 1) * n], tree)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for path, leaf in masks.flatten(a).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(masks.flatten(b)[path]), err_msg=path)


ALL = Search(seeds=(3, 11), levels=3, arms=tuple(arm for arm in imp.ARMS if arm != "transfer"))


@pytest.fixture(scope="module")
def everything():
    return run(ALL)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_each_level_removes_the_smallest_trained_weights_of_the_level_before(scope):
    config = Search(seeds=(0, 1), levels=3, scope=scope, arms=("ticket", "continue"))
    _, store, _ = run(config)
    for arm in config.arms:
        for level in range(1, 4):
            whole, _ = store.load(level - 1, None)
            before = jax.device_get(whole) if level == 1 else part(config, whole, arm)
            after = part(config, store.load(level, None)[0], arm)
            for s in range(2):
                kernels = [("dense0", 0.2), ("output", 0.1)]
                w = [np.abs(np.asarray(before["params"][k]["kernel"][s], np.float64)).ravel() for k, _ in kernels]
                m = [np.asarray(before["masks"][k]["kernel"][s]).ravel() for k, _ in kernels]
                new = [np.asarray(after["masks"][k]["kernel"][s]).ravel() for k, _ in kernels]
                groups = zip(w, m, new, (0.2, 0.1), strict=True)
                if scope == "global":
                    groups = [(np.concatenate(w), np.concatenate(m), np.concatenate(new), 0.2)]
                for weight, mask, got, rate in groups:
                    alive = np.flatnonzero(mask)
                    gone = alive[np.argsort(weight[alive], kind="stable")[: round(rate * alive.size)]]
                    expected = mask.copy()
                    expected[gone] = False
                    np.testing.assert_array_equal(got, expected)


@pytest.mark.long
def test_arms_start_from_the_weights_and_masks_they_are_named_for(everything):
    _, store, trainer = everything
    dense, _ = store.load(0, None)
    for level in range(1, 4):
        starts = trainer.starts[level]
        weights = {arm: part(ALL, starts.params, arm) for arm in ALL.arms}
        mask = {arm: part(ALL, starts.masks, arm) for arm in ALL.arms}
        assert_equal(weights["ticket"], masks.apply(dense["reset"], mask["ticket"]))
        assert_equal(weights["random_mask"], masks.apply(dense["reset"], mask["random_mask"]))
        assert_equal(weights["oneshot"], masks.apply(dense["reset"], mask["oneshot"]))
        assert_equal(mask["reinit"], mask["ticket"])
        assert_equal(mask["oneshot"], mask["oneshot_reinit"])
        previous = dense["params"] if level == 1 else part(ALL, store.load(level - 1, None)[0]["params"], "continue")
        assert_equal(weights["continue"], masks.apply(previous, mask["continue"]))
        for fresh in ("reinit", "random_reinit", "oneshot_reinit"):
            kept = mask[fresh]["dense0"]["kernel"]
            assert np.all(
                weights[fresh]["dense0"]["kernel"][kept] != np.asarray(dense["reset"]["dense0"]["kernel"])[kept]
            )
        assert np.any(mask["random_mask"]["dense0"]["kernel"] != mask["ticket"]["dense0"]["kernel"])
    # Fresh weights are fresh at every level, in every arm and for every seed: no two draws have a number in common.
    fresh = [arm for arm in ALL.arms if imp.ARMS[arm].weights == "fresh"]
    drawn = [part(ALL, trainer.starts[level].params, arm)["dense0"]["kernel"] for level in (1, 2, 3) for arm in fresh]
    numbers = np.concatenate([leaf[leaf != 0] for leaf in drawn])
    assert len(np.unique(numbers)) == len(numbers)
    assert_equal(part(ALL, trainer.starts[1].masks, "oneshot"), part(ALL, trainer.starts[1].masks, "ticket"))


def test_all_arms_keep_the_same_number_of_weights_in_every_layer(everything):
    rows, _, _ = everything
    assert len(rows) == 2 + 3 * 2 * len(ALL.arms)
    assert [row["arm"] for row in rows[:2]] == ["dense", "dense"]
    # 48 weights: 20% rounds to 10, 8, 6; 24 in the output layer: 10% rounds to 2, 2, 2.
    expected = {0: (48, 24), 1: (38, 22), 2: (30, 20), 3: (24, 18)}
    for row in rows:
        first, last = expected[row["level"]]
        assert row["layers"] == {"dense0/kernel": first / 48, "output/kernel": last / 24}
        assert row["alive"] == first + last and row["prunable"] == 72
        assert row["density"] == (first + last) / 72
        assert row["start_step"] == 0 and len(row["curve"]) == STEPS


def test_rows_are_json_and_survive_it_exactly(everything):
    rows, _, _ = everything
    assert json.loads(json.dumps(rows)) == rows


def test_adding_arms_or_seeds_changes_nothing_in_the_others(everything):
    rows, store, _ = everything
    config = Search(seeds=(11,), levels=3, arms=("ticket", "random_mask"))
    fewer, less, _ = run(config)
    for level in range(1, 4):
        for arm in config.arms:
            mine = part(config, less.load(level, None)[0]["masks"], arm)
            theirs = jax.tree.map(lambda x: x[1:], part(ALL, store.load(level, None)[0]["masks"], arm))
            assert_equal(mine, theirs)


class Dying:
    """A store over JSON and numpy bytes that dies in `save` of one level, before or after keeping it."""

    def __init__(self, level, after):
        self.level, self.after, self.kept = level, after, {}

    def has(self, level):
        return level in self.kept

    def load(self, level, like):
        leaves, rows = self.kept[level]
        for leaf, shape in zip(leaves, jax.tree.leaves(like), strict=True):
            assert leaf.shape == shape.shape and leaf.dtype == shape.dtype
        return jax.tree.unflatten(jax.tree.structure(like), leaves), json.loads(rows)

    def save(self, level, tree, rows):
        if level == self.level and not self.after:
            raise KeyboardInterrupt
        self.kept[level] = ([np.array(leaf) for leaf in jax.tree.leaves(tree)], json.dumps(rows))
        if level == self.level and self.after:
            raise KeyboardInterrupt


@functools.cache
def uninterrupted(rewind):
    config = Search(
        seeds=(3, 11), levels=2, rewind=rewind, rewind_optimizer=rewind > 0, arms=("ticket", "reinit", "random_mask")
    )
    return config, run(config, opt_init=TX.init)


@pytest.mark.parametrize(
    ("level", "after", "rewind"),
    [(0, False, 2), (1, False, 0), (1, True, 2), (2, True, 0)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in ((0, True, 0), (2, False, 2))],
)
def test_a_killed_search_resumes_bit_for_bit(level, after, rewind):
    config, (rows, store, _) = uninterrupted(rewind)
    options = {"opt_init": TX.init}
    dying = Dying(level, after)
    with pytest.raises(KeyboardInterrupt):
        run(config, dying, **options)
    dying.level = None
    again, _, trainer = run(config, dying, **options)
    assert again == rows
    assert sorted(trainer.starts) == list(range(level + after, 3))
    for each in range(3):
        assert_equal(dying.load(each, store.load(each, None)[0])[0], store.load(each, None)[0])


def test_rewinding_starts_from_the_snapshot_and_its_optimizer():
    config = Search(seeds=(0, 5), levels=2, rewind=2, rewind_optimizer=True, arms=("ticket", "reinit", "continue"))
    rows, store, trainer = run(config, opt_init=TX.init)
    dense, _ = store.load(0, None)
    # Two steps of Adam by hand from the initialization.
    params = jax.tree.map(lambda x: np.asarray(x)[0], trainer.starts[0].params)
    state = TX.init(params)

    @jax.jit
    def step(params, state, i):
        x = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (16, 6))
        updates, state = TX.update(jax.grad(loss_fn)(params, x, x[:, :3]), state, params)
        return optax.apply_updates(params, updates), state

    for i in range(2):
        params, state = step(params, state, i)
    for path, leaf in masks.flatten(params).items():
        np.testing.assert_allclose(masks.flatten(dense["reset"])[path][0], leaf, rtol=1e-5, atol=1e-6)
    for level in (1, 2):
        starts = trainer.starts[level]
        assert starts.start_step == 2
        ticket = part(config, starts.opt_state, "ticket")
        assert_equal(ticket[0].mu, masks.apply(dense["opt_state"][0].mu, part(config, starts.masks, "ticket")))
        assert np.all(np.asarray(starts.opt_state[0].count) == 2)
        for arm in ("reinit", "continue"):
            assert not any(np.any(leaf) for leaf in jax.tree.leaves(part(config, starts.opt_state, arm)[0].mu))
    assert {row["start_step"] for row in rows if row["level"] > 0} == {2}


@pytest.mark.parametrize(
    ("config", "trainer", "message"),
    [
        (Search(output="^head/"), None, r"SearchConfig.output '\^head/' matches no parameter.*dense0/kernel"),
        (Search(rules=(("conv", True),)), None, "conv.*dense0/bias"),
        (Search(rewind=2, rewind_optimizer=True), None, "opt_init"),
        (Search(rewind=2), lambda s, level: imp.Trained(s.params, [{}]), "snapshot.*params"),
        (Search(), lambda s, level: imp.Trained(s.params, []), "0 rows at level 0 for 1"),
        (
            Search(levels=1),
            lambda s, level: imp.Trained(jax.tree.map(jnp.ones_like, s.params), [{}] * len(s.names)),
            "dense0/kernel: 30 pruned weights are not zero",
        ),
    ],
)
def test_wrong_parts_are_refused(config, trainer, message):
    with pytest.raises(ValueError, match=message):
        run(config, trainer=trainer)


def test_the_random_score_prunes_at_random_but_repeats():
    config = Search(levels=1, score="random", arms=("ticket",))
    first, second = run(config), run(config)
    assert_equal(first[1].load(1, None)[0], second[1].load(1, None)[0])
    magnitude = run(Search(levels=1, arms=("ticket",)))
    a, b = (r[1].load(1, None)[0]["masks"]["dense0"]["kernel"] for r in (first, magnitude))
    assert np.any(np.asarray(a) != np.asarray(b)) and np.sum(a) == np.sum(b)


def test_stacks_are_ordered_by_arm_then_seed():
    config = Search(seeds=(4, 2), arms=("ticket", "reinit"))
    assert imp.level_names(config, 0) == (("dense", 4), ("dense", 2))
    for level in (1, 5):
        assert imp.level_names(config, level) == (("ticket", 4), ("ticket", 2), ("reinit", 4), ("reinit", 2))


def test_memory_is_a_store_and_keeps_what_it_is_given():
    store = imp.Memory()
    assert isinstance(store, imp.Store)
    assert not store.has(0)
    tree, rows = {"params": 1}, [{"a": 2}]
    store.save(0, tree, rows)
    assert store.has(0) and not store.has(1)
    assert store.load(0, None) == (tree, rows)


def test_a_finished_search_goes_on_to_more_levels_bit_for_bit():
    short, longer = Search(seeds=(0, 1), levels=1), Search(seeds=(0, 1), levels=3)
    rows, store, _ = run(short)
    more, _, trainer = run(longer, store)
    assert sorted(trainer.starts) == [2, 3] and more[: len(rows)] == rows
    assert more == run(longer)[0]
    with pytest.raises(ValueError, match="level 1 in the store has .* weights, the search asks for .*geometric"):
        run(Search(seeds=(0, 1), levels=3, density=0.1), store)
    with pytest.raises(ValueError, match="level 0 in the store has the arms and seeds"):
        run(Search(seeds=(1, 2), levels=3), store)


def test_tickets_are_the_masks_and_weights_that_were_trained(everything):
    rows, _, trainer = everything
    for level in range(4):
        starts = trainer.starts[level]
        for i, (arm, seed) in enumerate(starts.names):
            mask, weights = rows.ticket(seed, level, arm)
            assert_equal(mask, jax.tree.map(lambda x: x[i], starts.masks))  # noqa: B023
            assert_equal(weights, jax.tree.map(lambda x: x[i], starts.params))  # noqa: B023
    with pytest.raises(ValueError, match="no arm 'tickets' with seed 3 at level 1; levels 0 to 3, arms ticket"):
        rows.ticket(3, 1, "tickets")


@pytest.mark.parametrize(
    ("settings", "levels"),
    [
        ({"structure": "2:4", "rate": 0.5, "levels": 4, "rules": (("^dense0", False),)}, 1),
        ({"rate": 0.9, "levels": 5}, 2),
    ],
    ids=["2:4 at its floor", "one weight left in every layer"],
)
def test_a_search_with_nothing_left_to_prune_stops_with_a_word(settings, levels):
    with pytest.warns(UserWarning, match=f"nothing to prune after level {levels}: the search stops there, not at"):
        rows, store, _ = run(imp.SearchConfig(arms=("ticket",), **settings))
    assert rows.levels == levels == max(row["level"] for row in rows) and not store.has(levels + 1)
    assert all(count > 0 for count in rows[-1]["layers"].values())


def test_a_layer_that_is_emptied_is_named():
    small_output = lambda key: {**init_fn(key), "output": {"kernel": jnp.full((8, 3), 1e-6), "bias": jnp.zeros(3)}}  # noqa: E731
    train_fn = lambda starts, level: imp.Trained(starts.params, [{} for _ in starts.names])  # noqa: E731
    config = imp.SearchConfig(levels=1, rate=0.5, scope="global", arms=("ticket",))
    with pytest.warns(UserWarning, match="level 1, arm ticket, seed 0: no weight left in output/kernel"):
        imp.search(small_output, train_fn, imp.Memory(), config)


# Settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ("ticket", "tickets")}, "'tickets' is not one of ticket, continue"),
        ({"arms": ("reinit",)}, "add 'ticket'"),
        ({"arms": ()}, "not empty"),
        ({"seeds": (1, 1)}, "distinct"),
        ({"score": "size"}, "'size' is not one of magnitude, random"),
        ({"scope": "both"}, "not one of layer, global"),
        ({"rate": 1.0}, "rate"),
        ({"rewind_optimizer": True}, "rewind > 0"),
        ({"levels": -1}, "levels"),
    ],
)
def test_wrong_configurations_say_what_would_be_right(change, message):
    with pytest.raises(ValueError, match=message):
        imp.SearchConfig(**change)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"output": "^output/"}, (0.2, (("^output/", 0.1),))),
        ({"output": "^output/", "output_rate": 0.3}, (0.2, (("^output/", 0.3),))),
        ({"output": "^output/", "output_rate": 0.0}, (0.2, (("^output/", 0.0),))),
        ({"output": "^output/", "rates": (("put/", 0.05),)}, (0.2, (("put/", 0.05), ("^output/", 0.1)))),
        ({}, (0.2, ())),
    ],
)
def test_the_output_layer_is_pruned_at_half_the_rate_unless_told_otherwise(options, expected):
    scope = imp.RATE_SCOPES["layer"](imp.SearchConfig(**options), 0.2)
    assert (scope.rate, scope.overrides) == expected


def test_configurations_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        imp.SearchConfig().rate = 0.5
