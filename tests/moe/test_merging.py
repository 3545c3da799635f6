import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.merging import dare, merge, slerp, ties


def test_slerp_of_two_vectors_is_the_closed_form():
    # A quarter circle cut in three: sin 60 of the first and sin 30 of the second.
    stack = jnp.array([[[1.0, 0.0]], [[0.0, 4.0]]])
    found = slerp(stack, jnp.array([2 / 3, 1 / 3]))
    np.testing.assert_allclose(found, [[np.sin(np.pi / 3), 4 * np.sin(np.pi / 6)]], rtol=1e-5)
    # Layers in front are interpolated by themselves, parallel vectors linearly.
    layers = jnp.stack([jnp.stack([stack[0], stack[0]]), jnp.stack([stack[1], 3 * stack[0]])])
    both = slerp(layers, jnp.array([2 / 3, 1 / 3]))
    np.testing.assert_allclose(both[0], found, rtol=1e-5)
    np.testing.assert_allclose(both[1], [[5 / 3, 0.0]], rtol=1e-5)


def test_ties_by_hand():
    # Half of the entries remain: (-3, 0, 0, 4), (2, -3, 0, 0), (0, -1, 0, 2). Sums (-1, -4, 0, 6) elect (-, -, 0, +).
    deltas = jnp.array([[-3.0, 1.0, 0.5, 4.0], [2.0, -3.0, 0.5, 1.0], [0.5, -1.0, 0.5, 2.0]])[:, None]
    np.testing.assert_allclose(ties(deltas, 0.5), [[-3.0, -2.0, 0.0, 3.0]])


@pytest.mark.parametrize("density", [0.5, 0.2])
def test_ties_is_pefts(density, golden):
    case = golden("merging")["ties"][f"{density:g}"]
    np.testing.assert_allclose(ties(jnp.asarray(case["deltas"]), density), case["merged"], rtol=1e-5, atol=1e-6)


def test_dare_keeps_a_share_and_the_mean():
    deltas = jnp.ones((3, 100, 100))
    found = np.asarray(dare(deltas, 0.25, key=jax.random.key(0)))
    assert set(np.unique(found)) == {0.0, 4.0}
    assert found.mean() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_differences_merge_as_mergekits(method, golden):
    case = golden("merging")["mergekit"]
    ours = merge(
        [{"kernel": jnp.asarray(one)} for one in case["models"]],
        {"kernel": jnp.asarray(case["base"])},
        method=method.removesuffix("_arithmetic"),
        weights=case[method]["weights"],
        density=0.37,
        scale=0.7,
    )
    np.testing.assert_allclose(ours["kernel"], case[method]["merged"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["0", "1"])
def test_slerp_is_mergekits(case, golden):
    one = golden("merging")["mergekit"]["slerp"][case]  # the second: opposite directions
    trees = [{"kernel": jnp.asarray(kernel)} for kernel in one["stack"]]
    np.testing.assert_allclose(
        merge(trees, method="slerp", weights=[0.7, 0.3])["kernel"], one["merged"], rtol=1e-5, atol=1e-6
    )


def test_layers_of_a_stack_are_merged_each_by_itself_and_trees_leaf_by_leaf():
    key = jax.random.key(0)
    trees = [
        {"blocks": jax.random.normal(jax.random.fold_in(key, i), (3, 4, 5)), "gain": jnp.full(4, float(i)), "step": i}
        for i in range(3)
    ]
    trees = [jax.tree.map(jnp.asarray, tree) for tree in trees]
    for method in ("slerp", "ties"):
        whole = merge(trees, trees[0], method=method, density=0.3, tensor_axes=lambda path, leaf: min(leaf.ndim, 2))
        for layer in range(3):
            apart = [jax.tree.map(lambda x: x[layer] if x.ndim == 3 else x, tree) for tree in trees]  # noqa: B023
            one = merge(apart, apart[0], method=method, density=0.3)
            np.testing.assert_allclose(whole["blocks"][layer], one["blocks"], rtol=1e-6, atol=1e-6)
        assert whole["step"] == 0 and whole["step"].dtype == trees[0]["step"].dtype


@pytest.mark.parametrize("method", ["task", "ties", "dare"])
def test_the_merged_difference_is_scaled(method):
    trees = [{"kernel": jax.random.normal(jax.random.key(i), (3, 4))} for i in range(3)]
    once, half = (
        merge(trees[1:], trees[0], method=method, scale=scale, key=jax.random.key(9))["kernel"] for scale in (1.0, 0.5)
    )
    np.testing.assert_allclose(half, (trees[0]["kernel"] + once) / 2, rtol=1e-5, atol=1e-6)
    assert np.abs(once - trees[0]["kernel"]).max() > 0.1


def test_a_task_taken_away_and_added_again_gives_the_model_back():
    base, tuned = ({"kernel": jax.random.normal(jax.random.key(i), (3, 4)).astype(jnp.bfloat16)} for i in (1, 2))
    without = merge([tuned], base, method="task", weights=[-1.0])
    np.testing.assert_allclose(
        np.float32(without["kernel"]), np.float32(2 * base["kernel"] - tuned["kernel"]), rtol=2e-2, atol=2e-2
    )
    again = merge([tuned], base, method="task")
    assert again["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(again["kernel"], tuned["kernel"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda a, b: merge([a]), "1 models; mean needs at least 2"),
        (lambda a, b: merge([a, b]), r"kernel: \(2, 2\) in the first model, \(2, 3\) in model 1; 1 leaves differ"),
        (lambda a, b: merge([a, a], {"bias": a["kernel"]}, method="ties"), "nothing in the base; 2 leaves differ"),
        (lambda a, b: merge([a, a], method="task"), "pass base="),
        (lambda a, b: merge([a, a], weights=[1.0, -1.0]), "none negative"),
        (lambda a, b: merge([a, a], a, method="task", weights=[1.0, float("nan")]), "must be 2 numbers"),
    ],
)
def test_models_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make({"kernel": jnp.ones((2, 2))}, {"kernel": jnp.ones((2, 3))})
