import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lottery import masks


def leaf(*shape):
    return jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape) + 1


MLP = {"dense0": {"kernel": leaf(4, 5), "bias": leaf(5)}, "output": {"kernel": leaf(5, 3), "bias": leaf(3)}}
DECODER = {
    "embed": {"table": leaf(7, 4), "kernel": leaf(7, 4)},
    "blocks": {"attention": {"query": {"kernel": leaf(2, 4, 2, 2)}}, "attention_norm": {"gain": leaf(2, 4)}},
    "head": {"kernel": leaf(4, 7)},
}


def chosen(params, rules=()):
    return [path for path, keep in masks.flatten(masks.prunable(params, rules)).items() if keep]


@pytest.mark.parametrize(
    ("params", "rules", "expected"),
    [
        (MLP, (), ["dense0/kernel", "output/kernel"]),
        (MLP, (("^output/", False),), ["dense0/kernel"]),
        (MLP, (("bias$", True),), ["dense0/bias", "dense0/kernel", "output/bias", "output/kernel"]),
        (MLP, (("output/kernel", True), ("^(dense0|output)/", False)), ["output/kernel"]),
        (DECODER, (), ["blocks/attention/query/kernel"]),
        (DECODER, (("^head/", True),), ["blocks/attention/query/kernel", "head/kernel"]),
        (DECODER, (("^embed/table$", True),), ["blocks/attention/query/kernel", "embed/table"]),
    ],
)
def test_prunable(params, rules, expected):
    assert chosen(params, rules) == expected
    shapes = jax.eval_shape(lambda: params)
    assert masks.prunable(shapes, rules) == masks.prunable(params, rules)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("^conv", True),), r"'\^conv' matches no parameter.*dense0/bias, dense0/kernel"),
        (((".", False),), "no parameter is prunable"),
    ],
)
def test_rules_that_do_nothing_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        masks.prunable(MLP, rules)


def test_count_and_density_are_of_prunable_leaves_only():
    mask = masks.ones(MLP)
    mask["dense0"]["kernel"] = mask["dense0"]["kernel"].at[0].set(False)
    which = masks.prunable(MLP)
    assert {k: int(v) for k, v in masks.count(mask, which).items()} == {"dense0/kernel": 15, "output/kernel": 15}
    assert float(masks.density(mask, which)) == pytest.approx(30 / 35)
    stack = jax.tree.map(lambda x: jnp.stack([x, jnp.ones_like(x)]), mask)
    np.testing.assert_allclose(jax.jit(jax.vmap(lambda m: masks.density(m, which)))(stack), [30 / 35, 1.0])


def test_apply_gives_exact_zeros_even_where_the_weight_is_not_finite():
    params = {"kernel": jnp.array([[jnp.nan, -1.0], [jnp.inf, 2.0]], jnp.bfloat16)}
    out = masks.apply(params, {"kernel": jnp.array([[False, False], [False, True]])})["kernel"]
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out, np.float32), [[0, 0], [0, 2]])
    assert not np.any(np.signbit(np.asarray(out, np.float32)))


def test_check_names_the_path():
    which = masks.prunable(MLP)
    good = masks.ones(MLP)
    masks.check(good, MLP, which)
    cases = {
        "no mask for parameter output/bias": good | {"output": {"kernel": good["output"]["kernel"]}},
        "extra/kernel is not a parameter": good | {"extra": {"kernel": jnp.ones(1, bool)}},
        r"output/kernel has shape \(3, 5\), the parameter has \(5, 3\)": good
        | {"output": good["output"] | {"kernel": jnp.ones((3, 5), bool)}},
        "output/bias has dtype float32": good | {"output": good["output"] | {"bias": jnp.ones(3)}},
        "output/bias is not prunable": good | {"output": good["output"] | {"bias": jnp.zeros(3, bool)}},
    }
    for message, bad in cases.items():
        with pytest.raises(ValueError, match=message):
            masks.check(bad, MLP, which)


def test_check_zeros_counts_the_weights_that_are_not():
    mask = masks.ones(MLP)
    mask["output"]["kernel"] = mask["output"]["kernel"].at[0].set(False)
    with pytest.raises(ValueError, match="output/kernel: 3 pruned weights are not zero"):
        masks.check_zeros(MLP, mask)
    with pytest.raises(ValueError, match="output/kernel: 3 pruned weights are not zero"):
        masks.check_zeros(jax.tree.map(jnp.negative, MLP), mask)
    masks.check_zeros(masks.apply(MLP, mask), mask)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), density=st.floats(0, 1))
def test_random_like_keeps_every_count(seed, density):
    key, other = jax.random.split(jax.random.key(seed))
    mask = {"a": {"kernel": jax.random.uniform(key, (9, 7)) < density}, "bias": jnp.ones(4, bool)}
    shuffled = masks.random_like(mask, key=other)
    chex.assert_trees_all_equal_shapes_and_dtypes(mask, shuffled)
    assert int(jnp.sum(shuffled["a"]["kernel"])) == int(jnp.sum(mask["a"]["kernel"]))
    assert bool(jnp.all(shuffled["bias"]))
    # A leaf's draw does not depend on which other leaves there are.
    alone = masks.random_like({"a": mask["a"]}, key=other)
    chex.assert_trees_all_equal(alone["a"], shuffled["a"])


def test_random_like_is_uniform_over_places_and_differs_between_layers():
    mask = {"a": jnp.arange(40).reshape(5, 8) < 10, "b": jnp.arange(40).reshape(5, 8) < 10}
    draws = jax.jit(jax.vmap(lambda k: masks.random_like(mask, key=k)))(jax.random.split(jax.random.key(0), 2000))
    # Each place is kept with probability 1/4; the standard error over 2000 draws is 0.0097.
    np.testing.assert_allclose(np.mean(draws["a"], 0), 0.25, atol=0.05)
    assert np.mean(np.asarray(draws["a"]) & np.asarray(draws["b"])) == pytest.approx(1 / 16, abs=0.01)


def test_distance_is_the_fraction_that_differs():
    a = masks.ones(MLP)
    b = masks.ones(MLP)
    b["dense0"]["kernel"] = b["dense0"]["kernel"].at[0].set(False)
    assert float(masks.distance(a, b)) == pytest.approx(5 / 43)
    assert float(masks.distance(a, b, masks.prunable(MLP))) == pytest.approx(5 / 35)
    assert float(masks.distance(a, a)) == 0
