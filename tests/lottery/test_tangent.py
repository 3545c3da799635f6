"""Gradient flow and tangent kernels against closed forms of a small network, in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np

from lottery import masks as masks_lib
from lottery import tangent

RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 4))
PARAMS = {"first": RNG.normal(size=(4, 6)), "second": RNG.normal(size=(6, 3))}
MASKS = {name: RNG.random(leaf.shape) < 0.6 for name, leaf in PARAMS.items()}
LIVE = {name: PARAMS[name] * MASKS[name] for name in PARAMS}
TREE = masks_lib.apply(jax.tree.map(jnp.float32, PARAMS), jax.tree.map(jnp.asarray, MASKS))
MASK_TREE = jax.tree.map(jnp.asarray, MASKS)


def apply(params, x):
    return jax.nn.relu(x @ params["first"]) @ params["second"]


def jacobian(c):
    """d output c / d alive weights of every example [N, W], by hand."""
    before = X @ LIVE["first"]
    hidden = np.maximum(before, 0)
    rows = []
    for x, h, b in zip(X, hidden, before, strict=True):
        first = np.outer(x, (b > 0) * LIVE["second"][:, c]) * MASKS["first"]
        second = np.zeros((6, 3))
        second[:, c] = h
        rows.append(np.concatenate([first.ravel(), (second * MASKS["second"]).ravel()]))
    return np.stack(rows)


def test_the_kernel_is_the_product_of_jacobians_over_alive_weights():
    expected = np.mean([jacobian(c) @ jacobian(c).T for c in range(3)], axis=0)
    found = tangent.empirical_ntk(apply, TREE, MASK_TREE, jnp.float32(X))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_gradient_flow_counts_alive_weights_only():
    loss = lambda params: apply(params, jnp.float32(X))[:, 1].sum()  # noqa: E731
    expected = np.square(jacobian(1).sum(0)).sum()
    np.testing.assert_allclose(tangent.gradient_flow(loss, TREE, MASK_TREE), expected, rtol=1e-5)


def test_the_summary_is_that_of_numpy():
    kernel = np.mean([jacobian(c) @ jacobian(c).T for c in range(3)], axis=0)
    labels = np.array([0, 1, 1, 2, 0])
    values = np.linalg.eigvalsh(kernel)
    center = np.eye(5) - 1 / 5
    a, b = center @ kernel @ center, center @ (labels[:, None] == labels).astype(float) @ center
    found = tangent.kernel_summary(jnp.float32(kernel), jnp.asarray(labels), 3)
    np.testing.assert_allclose(found.top, values[-1], rtol=1e-5)
    np.testing.assert_allclose(found.trace, values.sum(), rtol=1e-5)
    np.testing.assert_allclose(found.rank, values.sum() ** 2 / (values**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(found.alignment, (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()), rtol=1e-4)
