"""Every choice a search offers: criteria, structures, allocations, schedules, arms, teachers; and what it refuses."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lottery import allocation, criteria, imp, masks, prune, schedules, transfer
from lottery.imp import level_counts


def init_fn(key):
    first, second = jax.random.split(key)
    return {
        "dense0": {"kernel": jax.random.normal(first, (8, 8)), "bias": jnp.zeros(8)},
        "output": {"kernel": jax.random.normal(second, (8, 4)), "bias": jnp.zeros(4)},
    }


def apply_fn(params, x):
    return jax.nn.relu(x @ params["dense0"]["kernel"]) @ params["output"]["kernel"]


def loss_fn(params, batch):
    return jnp.mean((apply_fn(params, batch) - batch[:, :4]) ** 2)


BATCHES = jax.random.normal(jax.random.key(5), (2, 6, 8))
SCORE_INPUTS = criteria.ScoreInputs(loss_fn=loss_fn, batches=BATCHES, apply_fn=apply_fn, inputs=BATCHES[0])
SHAPES = jax.eval_shape(init_fn, jax.random.key(0))
WHICH = masks.prunable(SHAPES)
STRUCTURES = ("unstructured", "2:4", "4x2", "neuron")


def noisy(stack, seed):
    """Trained weights, told by a seed: no training is needed to test what a search does with them."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf + generator.normal(size=leaf.shape), jnp.float32), stack)


class Trainer:
    def __init__(self, movement=False):
        self.starts, self.movement = {}, movement

    def __call__(self, starts, *, level):
        self.starts[level] = starts
        params = masks.apply(noisy(starts.params, level), starts.masks)
        moved = noisy(starts.params, 100 + level) if self.movement else None
        return imp.Trained(params, [{} for _ in starts.names], {"params": starts.params}, moved)


def search(trainer=None, store=None, given=None, **settings):
    config = imp.SearchConfig(**{"seeds": (0, 7), "levels": 2, "output": "^output/"} | settings)
    trainer, store = trainer or Trainer(), store or imp.Memory()
    rows = imp.search(init_fn, trainer, store, config, score_inputs=SCORE_INPUTS, given=given)
    return config, rows, store, trainer


def arm(store, config, level, name, part="masks"):
    tree, rows = store.load(level, None)
    return jax.device_get(transfer.of_arm(tree[part], rows, name)[0])


def one(stack, i):
    return jax.tree.map(lambda leaf: leaf[i], stack)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Every value once in the default suite, all combinations among the slow tests.
CASES = tuple(itertools.product(("layer", "global", "uniform", "erk"), STRUCTURES, ("geometric", "cubic")))
QUICK = {
    ("layer", "unstructured", "cubic"),
    ("global", "2:4", "geometric"),
    ("uniform", "4x2", "cubic"),
    ("erk", "neuron", "geometric"),
}


@pytest.mark.parametrize(
    ("scope", "structure", "schedule"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_scopes_structures_and_schedules_keep_what_they_say(scope, structure, schedule):
    settings = {"scope": scope, "structure": structure, "schedule": schedule, "arms": ("ticket", "random_mask")}
    config, _, store, _ = search(density=0.5, rate=0.3, **settings)
    rates = schedules.cubic(0.5, 2) if schedule == "cubic" else schedules.geometric(1 - 0.5**0.5, 2)
    units = prune.units(SHAPES, WHICH, structure)
    before = masks.ones(one(arm(store, config, 0, "dense"), 0))
    count = jax.jit(lambda mask: prune.alive_units(mask, WHICH, structure))
    for level, density in enumerate(schedules.densities(rates), start=1):
        for name in settings["arms"]:
            mask = one(arm(store, config, level, name), 0)
            alive = {path: int(n) for path, n in count(mask).items()}
            if scope == "uniform":
                assert alive == {path: round(density * n) for path, n in units.items()}
            elif scope == "global":
                assert sum(alive.values()) == round(density * sum(units.values()))
            elif scope == "erk":
                shapes = {path: leaf.shape for path, leaf in masks.flatten(SHAPES).items()}
                wanted = allocation.counts(units, allocation.ERK(density), shapes)
                least = {path: n // 2 if structure == "2:4" else 0 for path, n in units.items()}
                assert alive == {path: max(n, least[path]) for path, n in wanted.items()}
            if structure == "2:4":
                groups = np.asarray(mask["dense0"]["kernel"]).reshape(2, 4, 8).sum(1)
                assert groups.min() >= 2
            if name == "ticket":
                smaller = jax.tree.map(lambda new, old: not np.any(np.asarray(new) & ~np.asarray(old)), mask, before)
                assert all(jax.tree.leaves(smaller)), "nothing comes back"
                before = mask


# One of each kind of input; `test_cases.py` has every criterion in all its parts.
INPUTS = ("random", "magnitude_increase", "movement", "snip", "synflow")


@pytest.mark.parametrize(
    "score",
    [score if score in INPUTS else pytest.param(score, marks=pytest.mark.slow) for score in criteria.CRITERIA],
)
def test_criteria_score_the_trained_weights_of_the_level_before(score):
    config, _, store, _ = search(Trainer(score == "movement"), score=score, scope="uniform", arms=("ticket",))
    counts = level_counts(config, prune.sizes(SHAPES, WHICH), {})
    stacked = jax.device_get(imp.initial_weights(init_fn, config))

    @jax.jit
    def kept(tree, key, initial, count):
        more = {"opt_state": criteria.MovementState(tree["movement"])} if score == "movement" else {}
        full = criteria.ScoreInputs(
            key=key, initial=initial, loss_fn=loss_fn, batches=BATCHES, apply_fn=apply_fn, inputs=BATCHES[0], **more
        )
        return prune.keep(criteria.score(score, tree["params"], full), tree["masks"], WHICH, count)

    for level, i in itertools.product((1, 2), (0, 1)):
        tree, _ = jax.device_get(store.load(level - 1, None))
        parts = {name: one(tree[name], i) for name in ("params", "masks", "movement") if name in tree}
        want = kept(parts, imp.search_keys(config, level, "ticket")[i], one(stacked, i), counts[level - 1])
        assert_same(one(arm(store, config, level, "ticket"), i), want)


@pytest.mark.long
def test_arms_get_the_masks_and_weights_they_are_named_for():
    given = {level: jax.tree.map(lambda leaf: jnp.ones((2, *leaf.shape), bool), SHAPES) for level in (1, 2)}
    names = tuple(imp.ARMS)
    config, _, store, trainer = search(given=given.get, arms=names, score="synflow", rounds=3, rewind=4)
    initial = jax.device_get(imp.initial_weights(init_fn, config))
    dense = jax.device_get(store.load(0, None)[0])
    count = jax.jit(lambda mask: masks.count(mask, WHICH))
    largest = jax.jit(lambda params, counts: prune.keep(criteria.magnitude(params), masks.ones(params), WHICH, counts))
    for level in (1, 2):
        mask = {name: arm(store, config, level, name) for name in names}
        starts = trainer.starts[level]
        rows = [{"arm": a, "seed": s} for a, s in starts.names]
        weights = {name: transfer.of_arm(starts.params, rows, name)[0] for name in names}
        assert_same(mask["strategy2"], mask["continue"])
        assert_same(mask["same_sign"], mask["ticket"])
        assert_same(mask["other_seed"], jax.tree.map(lambda m: m[::-1], mask["ticket"]))
        assert_same(mask["transfer"], given[level])
        assert_same(weights["strategy2"], masks.apply(dense["reset"], mask["continue"]))
        for path, leaf in masks.flatten(weights["same_sign"]).items():
            if path.endswith("kernel"):
                signs = np.sign(masks.flatten(initial)[path]) * np.asarray(masks.flatten(mask["ticket"])[path])
                np.testing.assert_array_equal(np.sign(leaf), signs)
        for i in range(2):
            counts = count(one(mask["ticket"], i))
            assert_same(one(mask["large_init"], i), largest(one(initial, i), counts))
            final = level_counts(config, prune.sizes(SHAPES, WHICH), {})[level - 1]
            assert {path: int(n) for path, n in count(one(mask["at_init"], i)).items()} == final
        late = dict(zip(starts.names, starts.late, strict=True))
        assert {name for (name, _), value in late.items() if value} == {"finetune"}


@pytest.mark.parametrize("teacher", ["dense", "previous"])
def test_teachers_are_the_networks_they_are_named_for(teacher):
    config, _, store, trainer = search(teacher=teacher, arms=("ticket", "reinit"))
    assert trainer.starts[0].teachers is None
    for level in (1, 2):
        rows = [{"arm": a, "seed": s} for a, s in trainer.starts[level].names]
        for name in config.arms:
            got = transfer.of_arm(trainer.starts[level].teachers, rows, name)[0]
            before = 0 if teacher == "dense" or level == 1 else level - 1
            assert_same(got, arm(store, config, before, "dense" if before == 0 else name, "params"))


def test_masks_are_fitted_to_other_widths_and_seeds():
    mask = {"kernel": jnp.asarray([[True, False], [False, True]])}
    wide = transfer.resize(mask, {"kernel": jnp.zeros((4, 3))})
    np.testing.assert_array_equal(wide["kernel"], [[1, 0, 1], [0, 1, 0], [1, 0, 1], [0, 1, 0]])
    assert_same(transfer.resize(wide, mask), mask)
    stack = {"kernel": jnp.stack([jnp.zeros(2, bool), jnp.ones(2, bool)])}
    got = transfer.by_seed((stack, (3, 5)), (5, 3, 9))["kernel"]
    np.testing.assert_array_equal(got[:, 0], [True, False, False])
    # One place on, in turn: of 5 that of 3, of 3 that of 5, and of the third, which is not there, the fourth's.
    got = transfer.by_seed((stack, (3, 5)), (5, 3, 9), shift=1)["kernel"]
    np.testing.assert_array_equal(got[:, 0], [False, True, True])
    with pytest.raises(ValueError, match="kernel has shape"):
        transfer.resize(mask, {"kernel": jnp.zeros(4)})
    with pytest.raises(ValueError, match="bias is in only one"):
        transfer.resize(mask, {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)})


WRONG = [
    ({"structure": "3:2"}, "SearchConfig.structure: 3:2 sparsity is impossible"),
    ({"structure": "2:3"}, "dense0/kernel: 2:3 needs a multiple of 3"),
    ({"structure": "3x3"}, "dense0/kernel: blocks of 3 x 3 do not divide"),
    ({"structure": "head"}, "dense0/kernel: .*no axis of heads"),
    ({"density": 1.5}, "SearchConfig.density is 1.5"),
    ({"schedule": "one_shot"}, "'one_shot' has one level"),
    ({"rules": (("nothing", True),)}, "rule 'nothing' matches no parameter"),
    ({"rates": (("dense7", 0.1),)}, "SearchConfig.rates 'dense7' matches no parameter"),
    ({"rates": (("dense0", 0.1),), "scope": "erk"}, "SearchConfig.rates need scope 'layer'"),
    ({"score": "size"}, "SearchConfig.score: 'size' is not one of magnitude"),
    ({"arms": ("ticket", "strategy2")}, "strategy2 needs the mask of continue"),
    ({"arms": ("transfer",)}, "'transfer' needs `given`"),
    ({"rounds": 0}, "SearchConfig.rounds is 0"),
    ({"teacher": "nobody"}, "SearchConfig.teacher: 'nobody'"),
    ({"score": "movement"}, "score 'movement' needs Trained.movement"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_searches_that_cannot_be_run_say_why(settings, message):
    with pytest.raises(ValueError, match=message):
        search(**settings)


def test_missing_evidence_and_masks_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"score 'snip' needs score_inputs: ScoreInputs\(loss_fn, batches\)"):
        imp.search(init_fn, Trainer(), imp.Memory(), imp.SearchConfig(score="snip"))
    wrong = jax.tree.map(lambda leaf: jnp.ones((2, *leaf.shape[:-1], 9), bool), SHAPES)
    with pytest.raises(ValueError, match="given masks of level 1: masks: dense0/bias has shape"):
        search(given=lambda level: wrong, arms=("transfer",))
