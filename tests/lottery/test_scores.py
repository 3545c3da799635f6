import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lottery import scores

PARAMS = {"a": {"kernel": jnp.array([[-2.0, 0.5], [0.0, -0.0]], jnp.bfloat16)}, "b": jnp.array([3.0, -3.0])}


def test_magnitude():
    out = scores.magnitude(PARAMS)
    np.testing.assert_array_equal(out["a"]["kernel"], [[2, 0.5], [0, 0]])
    np.testing.assert_array_equal(out["b"], [3, 3])
    assert not np.any(np.signbit(out["a"]["kernel"]))


@pytest.mark.parametrize("name", list(scores.SCORES))
def test_every_score_is_a_float32_tree_like_the_parameters_under_jit_and_vmap(name):
    score = scores.SCORES[name]
    out = score(PARAMS, key=jax.random.key(0))
    chex.assert_trees_all_equal_shapes(out, PARAMS)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(out))
    chex.assert_trees_all_equal(out, score(PARAMS, key=jax.random.key(0)))
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS)
    keys = jnp.stack([jax.random.key(0), jax.random.key(1)])
    both = jax.jit(jax.vmap(lambda p, k: score(p, key=k)))(stack, keys)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[0], both), out)


def test_random_scores_do_not_depend_on_the_weights_or_on_other_leaves():
    key = jax.random.key(3)
    out = scores.random(PARAMS, key=key)
    chex.assert_trees_all_equal(out, scores.random(jax.tree.map(jnp.zeros_like, PARAMS), key=key))
    chex.assert_trees_all_equal(out["b"], scores.random({"b": PARAMS["b"]}, key=key)["b"])
    big = scores.random({"x": jnp.zeros(10_000), "y": jnp.zeros(10_000)}, key=key)
    assert float(jnp.mean(big["x"])) == pytest.approx(0.5, abs=0.02)
    assert abs(np.corrcoef(big["x"], big["y"])[0, 1]) < 0.05
