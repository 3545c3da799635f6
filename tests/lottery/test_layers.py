"""A layer is one block, stacked or not: everything that goes by layer gives a scanned and an unrolled model one result.

`ROWS` has every public function that looks at layers; one that is in neither `ROWS` nor `PLAIN` fails the last test.
"""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lottery
from lottery import (
    allocation,
    controls,
    criteria,
    dynamic,
    imp,
    masks,
    proximal,
    prune,
    structures,
    supermask,
    transform,
)

BLOCKS = 2
SHAPES = {"mlp/experts/up/kernel": (2, 4, 4), "norm/gain": (4,)}


def unrolled(seed):
    """Blocks of very different size of weights, so that a threshold over all blocks is no block's own."""
    draw = lambda shape: np.random.default_rng(seed + draws.pop()).normal(size=shape).astype(np.float32)  # noqa: E731
    draws = list(range(20))
    tree = {"output": {"kernel": draw((4, 4)), "bias": np.zeros(4, np.float32)}}
    for i in range(BLOCKS):
        leaves = {path: np.float32(3.0**i) * draw(shape) for path, shape in SHAPES.items()}
        tree[f"blocks_{i}"] = lottery.export.unflatten(leaves)
    return tree


def scanned(tree):
    rest = {name: leaf for name, leaf in tree.items() if not name.startswith("blocks_")}
    return rest | {"blocks": jax.tree.map(lambda *x: np.stack(x), *[tree[f"blocks_{i}"] for i in range(BLOCKS)])}


def opened(tree):
    """The unrolled form of a result, whatever it is."""
    if isinstance(tree, tuple):
        return tuple(map(opened, tree))
    if not isinstance(tree, dict) or "blocks" not in tree:
        return tree
    rest = {name: leaf for name, leaf in tree.items() if name != "blocks"}
    return rest | {f"blocks_{i}": jax.tree.map(lambda x: x[i], tree["blocks"]) for i in range(BLOCKS)}  # noqa: B023


def which(tree):
    return masks.prunable(tree)


def mask(tree, bound=1.0):
    return jax.tree.map(lambda p, w: jnp.abs(p) > bound if w else jnp.ones(p.shape, bool), tree, which(tree))


def apply_fn(params, x):
    params = opened(params)
    for i in range(BLOCKS):
        block = params[f"blocks_{i}"]
        x = x @ block["mlp"]["experts"]["up"]["kernel"][0] + x @ block["mlp"]["experts"]["up"]["kernel"][1]
    return x @ params["output"]["kernel"]


def sizes(tree):
    return prune.sizes(tree, which(tree))


def counts(tree, density=0.4, structure="unstructured"):
    units, shapes = prune.units(tree, which(tree), structure), prune.shapes(tree, which(tree), structure)
    return {
        "uniform": allocation.counts(units, allocation.Uniform(density), shapes),
        "erk": allocation.counts(units, allocation.ERK(density), shapes),
        "global": allocation.counts(units, allocation.Everywhere(density), shapes),
        "blocks": allocation.counts(units, allocation.PerPath((("^blocks_0/", 1.0),), density), shapes),
    }


def trained(make):
    """Masks and weights after four steps of a transformation that moves masks."""

    def run(tree, key):
        tx = make(tree, key)
        start = masks.apply(tree, dynamic.masks_of(tx.init(tree)))

        def step(carry, i):
            params, state = carry
            grads = jax.tree.map(lambda p: jnp.cos(p * (i + 2)), params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (start, tx.init(tree)), jnp.arange(4))
        return params, dynamic.masks_of(state)

    return run


def search(tree, key):
    """All masks of a search by layer, as trees [seeds, ...]; training is a fixed function of the weights."""

    def train_fn(starts, *, level):
        params = jax.tree.map(lambda p: p + jnp.sin(7 * p), starts.params)
        return imp.Trained(masks.apply(params, starts.masks), [{} for _ in starts.names])

    make = scanned if "blocks" in tree else lambda tree: tree
    store, rates = imp.Memory(), (("^blocks_1/", 0.3), ("^output/", 0.0))
    arms = ("ticket", "random_mask", "large_init")
    config = imp.SearchConfig(levels=2, rate=0.5, rates=rates, arms=arms)
    rows = imp.search(lambda key: jax.tree.map(jnp.asarray, make(unrolled(0))), train_fn, store, config)
    stack = store.load(2, None)[0]["masks"]
    found = [jax.tree.map(lambda x, i=i: x[i], stack) for i in range(len(arms))]
    return tuple(found), rows[-1]["layers"]


def cases(**rows):
    return {name.replace("__", "."): row for name, row in rows.items()}


# tree, key -> a tree like the parameters, a dict by layer, or a tuple of those.
ROWS = cases(
    masks__prunable=lambda t, k: jax.tree.map(lambda p, w: jnp.full(p.shape, bool(w)), t, which(t)),
    masks__map_layers=lambda t, k: masks.map_layers(lambda key, x: x.mean() + jax.random.uniform(key), t, key=k),
    masks__count=lambda t, k: masks.count(mask(t), which(t)),
    masks__density=lambda t, k: masks.density(mask(t), which(t)),
    masks__distance=lambda t, k: masks.distance(mask(t), mask(t, 2.0), which(t)),
    masks__random_like=lambda t, k: masks.random_like(mask(t), key=k),
    prune__shapes=lambda t, k: jax.tree.map(jnp.asarray, prune.shapes(t, which(t))),
    prune__sizes=lambda t, k: sizes(t),
    prune__units=lambda t, k: tuple(prune.units(t, which(t), s) for s in ("unstructured", "2:4", "2x2", "neuron")),
    prune__alive_units=lambda t, k: tuple(prune.alive_units(mask(t, 4.0), which(t), s) for s in ("2x2", "neuron")),
    prune__pool_sizes=lambda t, k: prune.pool_sizes(sizes(t), prune.Layerwise(0.3)),
    prune__removal_counts=lambda t, k: prune.removal_counts(sizes(t), prune.Layerwise(0.3, (("^blocks_0/", 0.1),))),
    prune__remove=lambda t, k: prune.remove(
        criteria.magnitude(t), mask(t, 0.1), which(t), prune.removal_counts(sizes(t), prune.Layerwise(0.3))
    ),
    prune__keep=lambda t, k: tuple(
        prune.keep(criteria.magnitude(t), masks.ones(t), which(t), counts(t, 0.5, structure)[how], structure)
        for how, structure in (("uniform", "unstructured"), ("erk", "2:4"), ("global", "neuron"))
    ),
    prune__iterate=lambda t, k: prune.iterate(
        criteria.magnitude, t, masks.ones(t), which(t), [counts(t, 0.7)["blocks"], counts(t)["blocks"]]
    ),
    allocation__counts=lambda t, k: tuple(counts(t).values()),
    allocation__erk_densities=lambda t, k: allocation.erk_densities(
        sizes(t), prune.shapes(t, which(t)), allocation.ERK(0.4)
    ),
    controls__shuffle_masks=lambda t, k: controls.shuffle_masks(mask(t), key=k),
    controls__magnitude_at_init=lambda t, k: controls.magnitude_at_init(t, mask(t), which(t)),
    controls__overlap=lambda t, k: {
        layer: jnp.array([found.shared, found.expected, found.deviation])
        for layer, found in controls.overlap(mask(t), mask(t, 2.0), which(t)).items()
    },
    criteria__random=lambda t, k: criteria.random(t, key=k),
    criteria__synflow=lambda t, k: criteria.synflow(apply_fn, t, jnp.ones((1, 4))),
    dynamic__rewire=lambda t, k: dynamic.rewire(t, criteria.random(t, key=k), mask(t), which(t), 0.4),
    dynamic__dynamic=trained(
        lambda t, k: dynamic.dynamic(
            optax.sgd(0.1), mask(t), which(t), dynamic.DynamicConfig("random", 2, 4, 0.5), key=k
        )
    ),
    dynamic__gradual=trained(
        lambda t, k: dynamic.gradual(optax.sgd(0.1), which(t), dynamic.GradualConfig(0.3, 0, 3, every=1))
    ),
    dynamic__straight_through=trained(
        lambda t, k: dynamic.straight_through(optax.sgd(0.1), which(t), counts(t)["uniform"], ramp=2)
    ),
    proximal__l1=lambda t, k: proximal.l1(0.3, which(t))(t, 0.5),
    proximal__group_lasso=lambda t, k: tuple(
        proximal.group_lasso(0.2, structure, which(t))(t, 0.5) for structure in ("neuron", "2x2")
    ),
    proximal__nuclear=lambda t, k: proximal.nuclear(0.5, which(t))(t, 0.5),
    supermask__initial_scores=lambda t, k: supermask.initial_scores(t, key=k),
    supermask__signed_constant=lambda t, k: supermask.signed_constant(t, which(t)),
    supermask__popup=lambda t, k: supermask.popup(t, criteria.random(t, key=k), which(t), counts(t)["uniform"]),
    supermask__popup_masks=lambda t, k: supermask.popup_masks(criteria.random(t, key=k), which(t), counts(t)["erk"]),
    supermask__ablate_weights=lambda t, k: tuple(
        supermask.ablate_weights(t, mask(t), which(t), one, key=k) for one in ("shuffle", "constant")
    ),
    imp__search=search,
)
HOST = {"controls.overlap", "imp.search"}  # not under jit
# They compile many programs, of the parts that the other rows test.
SLOW = {name for name in ROWS if name.startswith("dynamic.")} | {"imp.search", "prune.iterate"}
SLOW |= {f"supermask.{name}" for name in ("popup", "popup_masks", "ablate_weights")}
# Functions of single weights, of one array, of states or of names: no layer is looked at.
PLAIN = {
    *(
        f"masks.{name}"
        for name in ("apply", "check", "check_zeros", "flatten", "match_paths", "ones", "path_name", "support")
    ),
    *("prune.drop_lowest", "allocation.spread_densities", "controls.same_sign", "transform.map_moments"),
    *("transform.keep_zeros", "transform.mask_state", "transform.sparse", "proximal.proximal"),
    *(f"criteria.{name}" for name in criteria.__all__ if name not in ("random", "synflow")),
    *(f"dynamic.{name}" for name in ("cubic_density", "early_bird", "masks_of", "observe")),
    *(
        "supermask.shuffle_alive",
        "imp.initial_weights",
        "imp.level_counts",
        "imp.level_like",
        "imp.level_names",
        "imp.search_keys",
    ),
}


@functools.cache
def compiled(name):
    run = lambda tree, seed: ROWS[name](tree, jax.random.key(seed))  # noqa: E731
    return run if name in HOST else jax.jit(run)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in ROWS])
def test_scan_and_no_scan_give_the_same(name):
    @settings(max_examples=1 if name in HOST else 4, derandomize=True)
    @given(seed=st.integers(0, 2**31 - 1))
    def check(seed):
        tree = unrolled(seed)
        flat, stacked = compiled(name)(tree, seed), compiled(name)(scanned(tree), seed)
        stacked = opened(stacked)
        assert jax.tree.structure(stacked) == jax.tree.structure(flat)
        for path, leaf in masks.flatten(flat).items():
            exact = leaf.dtype in (bool, np.int32) if hasattr(leaf, "dtype") else True
            (np.testing.assert_array_equal if exact else np.testing.assert_allclose)(
                masks.flatten(stacked)[path], leaf, **({} if exact else {"rtol": 1e-6}), err_msg=path
            )

    check()


def test_every_public_function_has_its_row():
    modules = (masks, prune, allocation, controls, criteria, dynamic, proximal, supermask, transform, imp)
    public = {
        f"{module.__name__.split('.')[1]}.{name}"
        for module in modules
        for name in module.__all__
        if inspect.isfunction(inspect.unwrap(getattr(module, name)))
    }
    plain = {name for name in PLAIN if not re.search(r"[A-Z]", name)}
    assert public == set(ROWS) | plain and not set(ROWS) & plain


def test_every_block_of_a_stack_has_its_own_density():
    """Uniform(.5) of blocks whose weights differ threefold: each has half, where one threshold leaves 20% and 80%."""
    scale = jnp.array([1.0, 3.0, 9.0])[:, None, None]
    tree = {"blocks": {"up": {"kernel": scale * jax.random.normal(jax.random.key(0), (3, 8, 8))}}}

    @jax.jit
    def count(tree):
        found = prune.keep(criteria.magnitude(tree), masks.ones(tree), which(tree), counts(tree, 0.5)["uniform"])
        shuffled = controls.shuffle_masks(mask(tree), key=jax.random.key(1))
        return [masks.count(m, which(tree)) for m in (found, mask(tree), shuffled)]

    half, uneven, shuffled = jax.device_get(count(tree))
    assert half == {f"blocks_{i}/up/kernel": 32 for i in range(3)}
    assert shuffled == uneven and len({int(n) for n in uneven.values()}) == 3


def test_independent_masks_of_uneven_blocks_overlap_by_chance():
    tree = {"blocks": {"up": {"kernel": jnp.zeros((3, 64, 64))}}}
    density = jnp.array([0.9, 0.5, 0.1])[:, None, None]
    draw = lambda seed: jax.random.uniform(jax.random.key(seed), (3, 64, 64)) < density  # noqa: E731
    a, b = ({"blocks": {"up": {"kernel": draw(seed)}}} for seed in (0, 1))
    assert abs(controls.overlap(a, b, which(tree))["*"].z) < 4


def test_names_of_layers():
    assert structures.layers("blocks/mlp/experts/up/kernel", (1, 2, 4, 4)) == (
        "blocks_0/mlp/experts_0/up/kernel",
        "blocks_0/mlp/experts_1/up/kernel",
    )
    assert structures.layers("blocks/mlp/experts/up/kernel", (2, 3, 4, 4), structure="expert") == (
        "blocks_0/mlp/experts/up/kernel",
        "blocks_1/mlp/experts/up/kernel",
    )
    # Numbered folders, as lists of modules have them, are no stack.
    assert structures.layers("blocks/0/up/kernel", (4, 8)) == ("blocks/0/up/kernel",)
