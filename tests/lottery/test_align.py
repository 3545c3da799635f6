"""Alignment: a shuffled network is put back, whatever the model, and nobody else's function changes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lottery import align, masks
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.models.vision import LeNet, MLPConfig

LAYERS = ("dense0", "dense1", "output")
SPEC = align.chain_spec(LAYERS)
MODEL = LeNet(MLPConfig((9, 7), classes=4))
X = jax.random.normal(jax.random.key(8), (64, 6))


def lenet(seed):
    return jax.jit(MODEL.init)(jax.random.key(seed), X)["params"]


def shuffles(tree, spec, seed=0):
    generator = np.random.default_rng(seed)
    return {name: generator.permutation(size) for name, size in align.sizes(tree, spec).items()}


def equal(a, b):
    for one, two in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_shuffled_mlp_computes_the_same_and_is_put_back_by_its_weights():
    params = lenet(0)
    shuffled = align.permute(params, shuffles(params, SPEC), SPEC)
    apply = jax.jit(lambda p: MODEL.apply({"params": p}, X))
    np.testing.assert_allclose(apply(shuffled), apply(params), atol=1e-5)
    noisy = jax.tree.map(lambda x: x + 0.01 * jax.random.normal(jax.random.key(1), x.shape), shuffled)
    found = align.match_weights(params, noisy, SPEC)
    equal(align.permute(shuffled, found, SPEC), params)
    # A mask travels with its network.
    mask = jax.tree.map(lambda x: np.abs(x) > 0.3, params)
    equal(align.permute(align.permute(mask, shuffles(params, SPEC), SPEC), found, SPEC), mask)


def test_activations_put_it_back_too():
    params = lenet(0)
    order = shuffles(params, SPEC)
    shuffled = align.permute(params, order, SPEC)

    def hidden(p):
        first = jax.nn.relu(X @ p["dense0"]["kernel"] + p["dense0"]["bias"][None])
        return {"dense0": first, "dense1": jax.nn.relu(first @ p["dense1"]["kernel"] + p["dense1"]["bias"][None])}

    found = align.match_activations(hidden(params), hidden(shuffled))
    # Units that never fire correlate with nobody and may go anywhere.
    live = {name: np.asarray(x).std(0) > 0 for name, x in hidden(params).items()}
    for name in order:
        np.testing.assert_array_equal(order[name][found[name]][live[name]], np.arange(len(order[name]))[live[name]])


def test_with_one_hidden_layer_no_permutation_is_closer():
    spec = align.chain_spec(("one", "two"), biases=False)
    draw = lambda k, s: np.asarray(jax.random.normal(jax.random.key(k), s))  # noqa: E731
    a = {"one": {"kernel": draw(0, (3, 5))}, "two": {"kernel": draw(1, (5, 2))}}
    b = {"one": {"kernel": draw(2, (3, 5))}, "two": {"kernel": draw(3, (5, 2))}}
    gap = lambda p: sum(((x - y) ** 2).sum() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(p), strict=True))  # noqa: E731
    best = min(gap(align.permute(b, {"one": np.array(p)}, spec)) for p in itertools.permutations(range(5)))
    assert gap(align.permute(b, align.match_weights(a, b, spec), spec)) == pytest.approx(best)


def test_convolutions_chain_over_their_last_two_axes():
    spec = align.chain_spec(("c0", "c1"), biases=False, axes=4)
    assert spec == {"c0/kernel": (None, None, None, "c0"), "c1/kernel": (None, None, "c0", None)}


@pytest.mark.parametrize("kv_heads", [pytest.param(4, marks=pytest.mark.slow), 2])
def test_a_shuffled_decoder_computes_the_same_and_is_put_back(kv_heads):
    config = TransformerConfig(vocab_size=29, layers=2, width=16, heads=4, kv_heads=kv_heads, ff=10, tied=False)
    tokens = jax.random.randint(jax.random.key(0), (2, 7), 0, 29)
    params = jax.jit(Decoder(config).init)(jax.random.key(1), tokens)["params"]
    opened = align.open_decoder(params)
    equal(align.close_decoder(opened), params)
    spec = align.decoder_spec(2, tied=False)
    assert align.sizes(opened, spec) == {"residual": 16} | {
        f"{name}_{i}": size for i in range(2) for name, size in (("heads", kv_heads), ("ff", 10))
    }
    assert set(spec) == set(masks.flatten(opened)), "every leaf has its axes named"
    shuffled = align.permute(opened, shuffles(opened, spec, 3), spec)
    apply = jax.jit(lambda p: Decoder(config).apply({"params": p}, tokens))
    np.testing.assert_allclose(apply(align.close_decoder(shuffled)), apply(params), atol=1e-5)
    found = align.match_weights(opened, shuffled, spec)
    equal(align.permute(shuffled, found, spec), opened)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"head/kernel": (None, None)}, "no parameter head/kernel"),
        ({"dense0/kernel": (None,)}, "dense0/kernel has shape .* names 1 axes"),
        ({"dense0/kernel": (None, "h"), "output/kernel": ("h", None)}, "output/kernel has 7 units of 'h'"),
    ],
)
def test_specs_that_do_not_fit_name_the_path(spec, message):
    with pytest.raises(ValueError, match=message):
        align.permute(lenet(0), {}, spec)


def test_different_sizes_are_refused():
    other = LeNet(MLPConfig((9, 8), classes=4)).init(jax.random.key(0), X)["params"]
    with pytest.raises(ValueError, match="differ in size"):
        align.match_weights(lenet(0), other, SPEC)
    with pytest.raises(ValueError, match="'h' of shapes"):
        align.match_activations({"h": jnp.ones((3, 2))}, {"h": jnp.ones((3, 4))})
    with pytest.raises(ValueError, match="same names"):
        align.match_activations({"h": jnp.ones((3, 2))}, {"g": jnp.ones((3, 2))})


def test_restarts_find_the_permutation_that_one_ascent_misses():
    """Networks of three hidden layers, shuffled: one ascent from the identity stops at a local optimum for some."""
    layers = ("a", "b", "c", "d")
    spec = align.chain_spec(layers, biases=False)
    recovered = {0: 0, 10: 0}
    for seed in range(12):
        generator = np.random.default_rng(seed)
        shapes = ((3, 8), (8, 8), (8, 8), (8, 2))
        tree = {name: {"kernel": generator.normal(size=shape)} for name, shape in zip(layers, shapes, strict=True)}
        moved = align.permute(tree, shuffles(tree, spec, seed), spec)
        noisy = jax.tree.map(lambda x: x + 0.3 * generator.normal(size=x.shape), moved)  # noqa: B023
        for restarts in recovered:
            found = align.permute(moved, align.match_weights(tree, noisy, spec, restarts=restarts), spec)
            same = [np.array_equal(x, y) for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True)]
            recovered[restarts] += all(same)
    assert recovered[0] < recovered[10] == 12


def test_activations_match_as_their_correlations_do():
    """Units of different means and scales: the best of all permutations by `np.corrcoef`."""
    generator = np.random.default_rng(0)
    a = generator.normal(size=(40, 5)) * [1, 5, 0.2, 1, 2] + [9, -4, 0, 3, 6]
    b = (a + generator.normal(size=a.shape))[:, [3, 0, 4, 1, 2]] * [1, 2, 0.1, 3, 1] + [-7, 5, 5, 0, 11]
    like = np.corrcoef(a.T, b.T)[:5, 5:]
    best = max(itertools.permutations(range(5)), key=lambda order: like[range(5), order].sum())
    assert align.match_activations({"h": a}, {"h": b})["h"].tolist() == list(best)


def test_twelve_blocks_come_back_in_order():
    """Sorted as text, block 10 stands before block 2."""
    config = TransformerConfig(vocab_size=5, layers=12, width=4, heads=2, ff=3)
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    numbers = itertools.count()
    params = jax.tree.map(lambda x: np.arange(x.size, dtype=x.dtype).reshape(x.shape) + 1000 * next(numbers), shapes)
    equal(align.close_decoder(align.open_decoder(params)), params)
