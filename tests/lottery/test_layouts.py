"""Other libraries' names and axes: every structure goes along the axis that is contracted, or the leaf is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lottery import criteria, imp, masks, prune, structures, supermask

DENSE = np.asarray(jax.random.normal(jax.random.key(0), (8, 6)))  # [I, O]
CONV = np.asarray(jax.random.normal(jax.random.key(1), (3, 3, 4, 8)))  # [h, w, I, O]


FLAX = {"dense": {"kernel": DENSE, "bias": np.zeros(6)}, "conv": {"kernel": CONV}, "embed": {"kernel": DENSE}}
EQUINOX = {
    "dense": {"weight": DENSE.T, "bias": np.zeros(6)},
    "conv": {"weight": CONV.transpose(3, 2, 0, 1)},
    "embed": {"weight": DENSE},
    "layer_norm": {"weight": np.ones((2, 8))},
}
HAIKU = {"net/~/dense": {"w": DENSE, "b": np.zeros(6)}, "net/~/conv": {"w": CONV}, "embed": {"w": DENSE}}
NNX = {"dense": {"kernel": {"value": DENSE}, "bias": {"value": np.zeros(6)}}, "conv": {"kernel": {"value": CONV}}}


def halved(tree, structure, layouts=()):
    """The masks of half of each leaf's units."""
    tree = jax.tree.map(jnp.asarray, tree)
    which = masks.prunable(tree, layouts=layouts)
    counts = {layer: n // 2 for layer, n in prune.units(tree, which, structure).items()}
    keep = jax.jit(lambda tree: prune.keep(criteria.magnitude(tree), masks.ones(tree), which, counts, structure))
    return masks.flatten(keep(tree))


@pytest.mark.parametrize("structure", ["2:4", "4x2", "neuron"])
def test_other_libraries_trees_get_the_masks_of_flax(structure):
    flax = halved(FLAX, structure)
    dense, conv = np.asarray(flax["dense/kernel"]), np.asarray(flax["conv/kernel"])
    if structure == "2:4":  # against NumPy: the two largest of four consecutive inputs of each output
        groups = np.abs(DENSE).reshape(2, 4, 6)
        want = groups >= np.sort(groups, axis=1)[:, 2:3]
        np.testing.assert_array_equal(dense, want.reshape(8, 6))
        # Of a convolution, four channels at one place, as NVIDIA's ASP has it.
        groups = np.abs(CONV)
        np.testing.assert_array_equal(conv, groups >= np.sort(groups, axis=2)[:, :, 2:3])
    equinox = halved(EQUINOX, structure, structures.EQUINOX)
    np.testing.assert_array_equal(equinox["dense/weight"], dense.T)
    np.testing.assert_array_equal(equinox["conv/weight"], conv.transpose(3, 2, 0, 1))
    haiku = halved(HAIKU, structure, structures.HAIKU)
    np.testing.assert_array_equal(haiku["net/~/dense/w"], dense)
    np.testing.assert_array_equal(haiku["net/~/conv/w"], conv)
    nnx = halved(NNX, structure)
    np.testing.assert_array_equal(nnx["dense/kernel/value"], dense)
    np.testing.assert_array_equal(nnx["conv/kernel/value"], conv)
    for tree, path in ((flax, "embed/kernel"), (equinox, "embed/weight"), (equinox, "layer_norm/weight")):
        assert np.all(tree[path])


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        # Flax's attention, whatever the module is called, and NNX's state of it.
        ("self_attn/query/kernel", (8, 4, 2), (1, 8, 8)),
        ("MultiHeadDotProductAttention_0/value/kernel", (8, 4, 2), (1, 8, 8)),
        ("attn/value/kernel/value", (8, 4, 2), (1, 8, 8)),
        ("self_attn/out/kernel", (4, 2, 8), (1, 8, 8)),
        # Query heads grouped by key head (`align.open_decoder`), and heads joined in one axis.
        ("blocks_0/attention/query/kernel", (8, 2, 3, 2), (1, 8, 12)),
        ("encoder/attention/self/query/kernel", (8, 6), (1, 8, 6)),
        ("blocks/attention/query/kernel", (5, 8, 4, 2), (5, 8, 8)),
        ("blocks/mlp/experts/up/kernel", (5, 3, 8, 4), (15, 8, 4)),
        ("dense_blocks/attention/query/kernel", (5, 8, 4, 2), (5, 8, 8)),
        ("params/dense_blocks/mlp/up/kernel", (5, 8, 4), (5, 8, 4)),
        ("blocks/0/up/kernel", (8, 4), (1, 8, 4)),
        ("conv/kernel", (3, 3, 8, 4), (1, 72, 4)),
    ],
)
def test_axes_that_are_contracted(path, shape, expected):
    assert structures.layout(path, shape, strict=True).matrices(shape) == expected


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("attn/qkv/kernel", (8, 3, 4, 2)),
        ("self_attention/q/kernel", (8, 4, 2)),
        ("blocks/attn/qkv/kernel", (5, 8, 3, 4, 2)),
        ("keys/kernel", (8, 4, 2)),
        ("dense/weight", (8, 6)),
        ("dense/w", (8, 6)),
    ],
)
def test_leaves_whose_axes_no_rule_knows_are_refused_and_can_be_told(path, shape):
    tree = jax.tree.map(jnp.zeros, path_tree(path, shape), is_leaf=lambda x: isinstance(x, tuple))
    which = masks.prunable(tree, ((path, True),))
    assert prune.units(tree, which) and masks.count(masks.ones(tree), which), "single weights need no axes"
    for structure in ("2:4", "neuron", "2x2", "head"):
        with pytest.raises(ValueError, match=f"{path}: which axes of shape .* layouts="):
            prune.units(tree, which, structure)
    told = masks.prunable(tree, layouts=((path, structures.Layout(outputs=0)),))
    assert prune.units(tree, told, "neuron") == {path: int(np.prod(shape[1:]))}


def path_tree(path, leaf):
    for name in reversed(path.split("/")):
        leaf = {name: leaf}
    return leaf


def test_a_stack_of_ones_own_is_cut_into_its_layers():
    tree = {"tower": {"weight": jax.random.normal(jax.random.key(2), (3, 6, 8))}}  # [L, O, I]
    layouts = ((r"^tower/", structures.Layout(1, 1, ("tower",), outputs_first=True)),)
    which = masks.prunable(tree, layouts=layouts)
    units = prune.units(tree, which, "neuron")
    assert units == {f"tower_{i}/weight": 6 for i in range(3)}
    found = prune.keep(criteria.magnitude(tree), masks.ones(tree), which, dict.fromkeys(units, 2), "neuron")
    rows = np.abs(np.asarray(tree["tower"]["weight"])).sum(-1)
    want = rows >= np.sort(rows, axis=1)[:, -2:-1]
    np.testing.assert_array_equal(np.asarray(found["tower"]["weight"]), np.broadcast_to(want[..., None], (3, 6, 8)))
    scores = supermask.initial_scores(tree, which, key=jax.random.key(0))["tower"]["weight"]
    assert 0.9 * 8**-0.5 < float(jnp.abs(scores).max()) <= 8**-0.5, "the fan-in is 8"


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(ValueError, match="two leaves have the path a/kernel"):
        masks.flatten({"a/kernel": jnp.ones((2, 2)), "a": {"kernel": jnp.ones((2, 2))}})


def test_a_search_takes_the_layouts_of_ones_own_model():
    init_fn = lambda key: {"net": {"weight": jax.random.normal(key, (3, 8)), "bias": jnp.zeros(3)}}  # noqa: E731
    train_fn = lambda starts, level: imp.Trained(starts.params, [{} for _ in starts.names])  # noqa: E731
    config = imp.SearchConfig(levels=1, rate=0.5, structure="2:4", arms=("ticket",), layouts=structures.EQUINOX)
    rows = imp.search(init_fn, train_fn, imp.Memory(), config)
    mask, weights = rows.ticket(seed=0, level=1)
    groups = np.abs(np.asarray(rows.ticket(seed=0, level=0)[1]["net"]["weight"])).reshape(3, 2, 4)
    want = (groups >= np.sort(groups, axis=2)[..., 2:3]).reshape(3, 8)
    np.testing.assert_array_equal(mask["net"]["weight"], want)
    assert np.all((np.asarray(weights["net"]["weight"]) != 0) == want) and rows[-1]["layers"] == {"net/weight": 0.5}
