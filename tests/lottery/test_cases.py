"""One table: every criterion x allocation x structure x schedule, on one small network."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lottery import allocation, criteria, masks, prune, schedules, transform

LAYERS = ("dense0", "dense1", "output")


def make_params(key, sizes=(8, 16, 8, 4)):
    keys = jax.random.split(key, len(sizes))
    return {
        name: {"kernel": jax.random.normal(k, (i, o)) * i**-0.5, "bias": jnp.full(o, 0.1)}
        for name, k, i, o in zip(LAYERS, keys, sizes, sizes[1:], strict=False)
    }


def apply_fn(params, x):
    for name in LAYERS[:-1]:
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x @ params["output"]["kernel"] + params["output"]["bias"][None]


def loss_fn(params, batch):
    return jnp.mean((apply_fn(params, batch) - batch[:, :4]) ** 2)


PARAMS = make_params(jax.random.key(0))
INITIAL = make_params(jax.random.key(1))
WHICH = masks.prunable(PARAMS)
BATCHES = jax.random.normal(jax.random.key(2), (3, 6, 8))
SHAPES = {path: leaf.shape for path, leaf in masks.flatten(PARAMS).items()}
FINAL = 0.4

ALLOCATIONS = {
    "global": allocation.Everywhere,
    "uniform": allocation.Uniform,
    "erk": allocation.ERK,
    "per path": lambda density: allocation.PerPath((("^output/", (1 + density) / 2),), density),
}
STRUCTURES = {"unstructured": 1, "2:4": 1, "4x2": 8, "neuron": None}
SCHEDULES = {
    "one-shot": schedules.one_shot(FINAL),
    "geometric": schedules.geometric(0.25, 3),
    "cubic": schedules.cubic(FINAL, 3),
}


@functools.cache
def scored(criterion):
    opt = criteria.track_movement()
    _, state = opt.update(jax.grad(loss_fn)(PARAMS, BATCHES[0]), opt.init(PARAMS), PARAMS)
    score_inputs = criteria.ScoreInputs(
        key=jax.random.key(3),
        initial=INITIAL,
        loss_fn=loss_fn,
        batches=BATCHES,
        apply_fn=apply_fn,
        inputs=BATCHES[0],
        opt_state=state,
    )
    return jax.jit(lambda p: criteria.score(criterion, p, score_inputs))(PARAMS)


@functools.cache
def keeper(structure):
    return jax.jit(lambda scores, mask, counts: prune.keep(scores, mask, WHICH, counts, structure))


@functools.cache
def trainer():
    """Three steps of Adam by scan, with the masks as arguments: (params, state, gradient through the mask)."""

    def run(mask):
        tx = transform.sparse(optax.adamw(1e-2, weight_decay=0.1), mask)
        params = masks.apply(PARAMS, mask)

        def step(carry, batch):
            params, state = carry
            updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), BATCHES)
        gradient = jax.grad(lambda p: loss_fn(masks.apply(p, mask), BATCHES[0]))(PARAMS)
        return params, state, gradient

    return jax.jit(run)


def unit_count(mask, structure):
    """Live units, counted by NumPy."""
    mask = np.asarray(mask)
    if structure == "neuron":
        return int(mask.any(0).sum())
    if structure == "4x2":
        k, n = mask.shape
        return int(mask.reshape(k // 4, 4, n // 2, 2).any((1, 3)).sum())
    return int(mask.sum())


def cases():
    """All combinations; by default every criterion, structure and schedule with one scope: all pairs of any two."""
    tables = (criteria.CRITERIA, ALLOCATIONS, STRUCTURES, SCHEDULES)
    for places in itertools.product(*(range(len(table)) for table in tables)):
        case = [[*table][place] for table, place in zip(tables, places, strict=True)]
        criterion, scope, structure, schedule = places
        quick = scope == (criterion + structure + schedule) % len(ALLOCATIONS)
        yield pytest.param(*case, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("criterion", "scope", "structure", "schedule"), cases())
def test_exact_density_constant_masks_and_zeros_outside(criterion, scope, structure, schedule):
    scores, mask = scored(criterion), masks.ones(PARAMS)
    units = prune.units(PARAMS, WHICH, structure)
    for density in schedules.densities(SCHEDULES[schedule]):
        counts = allocation.counts(units, ALLOCATIONS[scope](density), SHAPES)
        new = keeper(structure)(scores, mask, counts)
        live = {path: unit_count(leaf, structure) for path, leaf in masks.flatten(new).items() if path in units}
        groups = {prune.EVERYTHING: sum(live.values())} if scope == "global" else live
        sizes = {prune.EVERYTHING: sum(units.values())} if scope == "global" else units
        least = {group: size // 2 if structure == "2:4" else 0 for group, size in sizes.items()}
        assert groups == {group: max(count, least[group]) for group, count in counts.items()}
        for before, after in zip(jax.tree.leaves(mask), jax.tree.leaves(new), strict=True):
            assert not np.any(np.asarray(after) & ~np.asarray(before)), "nothing comes back"
        mask = new
    for path, leaf in masks.flatten(mask).items():
        if path not in units:
            assert np.all(leaf), "biases are never pruned"
        elif structure == "2:4":
            assert np.asarray(leaf).reshape(-1, 4, leaf.shape[1]).sum(1).min() >= 2
        elif structure != "unstructured":
            assert np.asarray(leaf).sum() == live[path] * (STRUCTURES[structure] or leaf.shape[0])
    params, state, gradient = trainer()(mask)
    for tree in (params, gradient, state[0].mu, state[0].nu):
        for leaf, keep in zip(jax.tree.leaves(tree), jax.tree.leaves(mask), strict=True):
            assert np.all(np.isfinite(leaf)) and not np.any(np.asarray(leaf)[~np.asarray(keep)])


@pytest.mark.parametrize("structure", ["2:4", "4x2"])
def test_a_stack_and_a_mesh_of_eight_devices_give_the_masks_of_one_network(structure):
    names = list(criteria.CRITERIA)[:8]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *[scored(name) for name in names])
    full = jax.tree.map(lambda x: jnp.ones(x.shape, bool), stack)
    counts = allocation.counts(prune.units(PARAMS, WHICH, structure), allocation.ERK(0.6), SHAPES)
    together = jax.jit(jax.vmap(lambda s, m: prune.keep(s, m, WHICH, counts, structure)))
    plain = together(stack, full)
    mesh = Mesh(np.array(jax.devices()), ("stack",))
    spread = jax.device_put((stack, full), NamedSharding(mesh, PartitionSpec("stack")))
    across = together(*spread)
    assert len(across["dense0"]["kernel"].sharding.device_set) == 8
    for i, name in enumerate(names):
        alone = keeper(structure)(scored(name), masks.ones(PARAMS), counts)
        for one, two, three in zip(*map(jax.tree.leaves, (alone, plain, across)), strict=True):
            np.testing.assert_array_equal(one, two[i])
            np.testing.assert_array_equal(one, three[i])


@functools.cache
def stacked_keeper(structure):
    return jax.jit(jax.vmap(lambda s, m, counts: prune.keep(s, m, WHICH, counts, structure), in_axes=(0, 0, None)))


@functools.cache
def stacked_trainer():
    return jax.jit(jax.vmap(trainer()))


@pytest.mark.slow
@pytest.mark.parametrize(("scope", "structure", "schedule"), itertools.product(ALLOCATIONS, STRUCTURES, SCHEDULES))
def test_every_case_composes_with_vmap_and_a_mesh_of_eight_devices(scope, structure, schedule):
    """Masks and three training steps of a stack over criteria, whole and spread over the devices, as one by one."""
    names = [*criteria.CRITERIA][:8] if schedule == "geometric" else [*criteria.CRITERIA][-8:]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *[scored(name) for name in names])
    full = jax.tree.map(lambda x: jnp.ones(x.shape, bool), stack)
    density = schedules.densities(SCHEDULES[schedule])[-1]
    counts = allocation.counts(prune.units(PARAMS, WHICH, structure), ALLOCATIONS[scope](density), SHAPES)
    mesh = Mesh(np.array(jax.devices()), ("stack",))
    plain = stacked_keeper(structure)(stack, full, counts)
    spread = jax.device_put((stack, full), NamedSharding(mesh, PartitionSpec("stack")))
    across = stacked_keeper(structure)(*spread, counts)
    assert len(across["dense0"]["kernel"].sharding.device_set) == 8
    trained, _, gradient = stacked_trainer()(across)
    for i, name in enumerate(names):
        alone = keeper(structure)(scored(name), masks.ones(PARAMS), counts)
        for one, two, three in zip(*map(jax.tree.leaves, (alone, plain, across)), strict=True):
            np.testing.assert_array_equal(one, two[i])
            np.testing.assert_array_equal(one, three[i])
        params, _, grads = trainer()(alone)
        for got, want in ((trained, params), (gradient, grads)):
            for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(one[i], two, rtol=1e-4, atol=1e-5)


def test_one_network_spread_over_eight_devices_is_pruned_the_same():
    mesh = Mesh(np.array(jax.devices()), ("model",))
    spread = jax.tree.map(
        lambda x: jax.device_put(
            x, NamedSharding(mesh, PartitionSpec("model") if x.shape[0] % 8 == 0 else PartitionSpec())
        ),
        scored("snip"),
    )
    counts = {prune.EVERYTHING: 100}
    alone = keeper("unstructured")(scored("snip"), masks.ones(PARAMS), counts)
    for one, two in zip(
        jax.tree.leaves(alone), jax.tree.leaves(keeper("unstructured")(spread, masks.ones(PARAMS), counts)), strict=True
    ):
        np.testing.assert_array_equal(one, two)


def test_at_its_density_every_group_holds_exactly_n_of_m_the_largest():
    kernel = jax.random.normal(jax.random.key(5), (16, 6))
    params = {"kernel": kernel}
    which = {"kernel": True}
    for n, m in ((2, 4), (1, 4), (4, 8), (3, 16)):
        out = prune.keep({"kernel": jnp.abs(kernel)}, masks.ones(params), which, {"*": round(96 * n / m)}, f"{n}:{m}")
        got, weights = np.asarray(out["kernel"]), np.abs(np.asarray(kernel))
        for start, column in itertools.product(range(0, 16, m), range(6)):
            group = slice(start, start + m)
            assert set(np.flatnonzero(got[group, column])) == set(np.argsort(weights[group, column])[m - n :])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prune.units(PARAMS, WHICH, "3:2"), "3:2 sparsity is impossible"),
        (lambda: prune.units(PARAMS, WHICH, "2:16"), "dense0/kernel: 2:16 needs a multiple of 16 inputs, not 8"),
        (lambda: prune.units(PARAMS, WHICH, "4x3"), "dense0/kernel: blocks of 4 x 3 do not divide a 8 x 16"),
        (lambda: prune.keep(PARAMS, masks.ones(PARAMS), WHICH, {"*": 1}, "5x2"), "dense0/kernel: blocks of 5 x 2"),
        (
            lambda: prune.keep(PARAMS, masks.ones(PARAMS["dense0"]), WHICH, {"*": 1}),
            "no mask for parameter dense0/bias",
        ),
        (lambda: prune.units(PARAMS, WHICH, "head"), "dense0/kernel: a kernel of 2 axes.*no axis of heads"),
        (lambda: prune.units(PARAMS, WHICH, "expert"), "dense0/kernel: .*no axis of experts"),
        (lambda: prune.units(PARAMS, WHICH, "triangle"), "'triangle' is not one of unstructured.*16x16"),
        (lambda: allocation.Everywhere(1.5), "Everywhere.density is 1.5"),
        (lambda: allocation.Uniform(-0.1), "Uniform.density is -0.1"),
        (lambda: allocation.ERK(2.0), "ERK.density is 2"),
        (lambda: allocation.PerPath((("x", 3.0),)), "PerPath.densities 'x' is 3.0"),
        (
            lambda: allocation.counts({"a": 1}, allocation.PerPath((("^b", 0.5),)), {"a": (1,)}),
            r"'\^b' matches no parameter",
        ),
        (lambda: criteria.score("size", PARAMS), "'size' is not one of magnitude"),
        (lambda: criteria.score("snip", PARAMS), r"needs ScoreInputs\(loss_fn, batches\)"),
    ],
)
def test_impossible_requests_name_what_and_where(call, message):
    with pytest.raises(ValueError, match=message):
        call()
