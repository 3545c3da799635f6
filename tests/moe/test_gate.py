"""Settings of a router that reach it, and magnitudes that its formulas state."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import gate, route

N, D, E = 16, 6, 8
X = jax.random.normal(jax.random.key(0), (N, D))
KEY = jax.random.key(1)

SETTINGS = {
    "top_k": {"softmax": "before", "scale": 2.5, "k": 3, "bias": True},
    "switch": {"jitter": 0.5, "bias": True},
    "noisy": {"k": 3},
    "hierarchical": {"top_groups": 1},
    "sigmoid": {"top_groups": 1, "normalize": 2.0, "scale": 2.5, "score": "sqrt_softplus"},
    "softmax_groups": {"top_groups": 1, "scale": 2.5},
    "sparsemixer": {"jitter": 0.9},
    "expert_choice": {"capacity_factor": 1.0},
    "hash": {"seed": 1},
    "uniform": {"skew": 1.0},
}


@cache
def weights(config):
    shapes = gate.parameter_shapes(config, D)
    own = {key: np.random.default_rng(len(key)).normal(size=shape) for key, shape in shapes.items()}
    own = {key: jnp.asarray(leaf, jnp.float32) for key, leaf in own.items()}
    found = jax.jit(lambda p: gate.gate(p, X, config, key=KEY, tokens_N=jnp.arange(N)))(own)
    hot = np.zeros((N, E + 1))
    np.put_along_axis(hot, np.asarray(found.experts_NK), np.asarray(found.weights_NK), 1)
    return hot[:, :E]


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, fields in SETTINGS.items() for field in fields])
def test_no_setting_of_a_router_is_ignored(name, field):
    grouped = {"groups": 4, "top_groups": 2} if field == "top_groups" or name == "hierarchical" else {}
    base = gate.RouterConfig(name, experts=E, k=1 if name == "switch" else 2, **grouped)
    changed = replace(base, **{field: SETTINGS[name][field]})
    before, after = weights(base), weights(changed)
    assert np.abs(after - before).max() > 1e-3
    if field == "scale":
        np.testing.assert_allclose(after, 2.5 * before, rtol=1e-5)


def test_jitter_has_mean_one_and_both_sides():
    noise = np.asarray(route.jitter(jnp.ones((1000, 50)), 0.1, key=KEY), np.float64)
    # Uniform on [0.9, 1.1]: standard deviation 0.2 / sqrt 12, of the mean of 50,000 draws 2.6e-4.
    assert noise.mean() == pytest.approx(1, abs=1e-3) and noise.std() == pytest.approx(0.2 / 12**0.5, rel=0.02)
    assert 0.9 <= noise.min() < 0.901 and 1.099 < noise.max() <= 1.1


def test_biases_of_stacked_layers_move_by_their_own_loads():
    load = np.array([[4.0, 1.0, 1.0], [30.0, 20.0, 10.0]])
    expected = 0.1 * np.sign(load.mean(1, keepdims=True) - load)
    np.testing.assert_allclose(route.update_bias(jnp.zeros((2, 3)), jnp.asarray(load), 0.1), expected)
    penalty = route.update_penalty(jnp.ones(3), jnp.array([3.0, 2.0, 1.0]), 2, 1.5)
    np.testing.assert_allclose(penalty, [1.5, 1.0, 1 / 1.5], rtol=1e-6)


@pytest.mark.parametrize("route_one", [route.sinkhorn, lambda x, k: route.base(x)], ids=["sinkhorn", "base"])
def test_the_weight_of_a_balanced_choice_is_its_own_logits_sigmoid(route_one):
    """Lewis et al. (2021), section 3.2; Clark et al. (2022), section 3.2.1: balance decides where, logits how much."""
    x = jax.random.normal(jax.random.key(2), (12, 4)) + jnp.array([[3.0, 0, 0, 0]])

    def weights(x):
        routing = route_one(x, 1)
        return routing.weights_NK[:, 0].sum(), routing

    (_, routing), gradient = jax.jit(jax.value_and_grad(weights, has_aux=True))(x)
    chosen, logits = np.asarray(routing.experts_NK[:, 0]), np.asarray(x, np.float64)
    assert (chosen != logits.argmax(1)).any()
    sigmoid = 1 / (1 + np.exp(-logits[np.arange(12), chosen]))
    np.testing.assert_allclose(routing.weights_NK[:, 0], sigmoid, rtol=1e-5)
    np.testing.assert_allclose(gradient, np.eye(4)[chosen] * (sigmoid * (1 - sigmoid))[:, None], rtol=1e-4, atol=1e-7)
