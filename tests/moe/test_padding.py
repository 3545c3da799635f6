"""Padding counts nowhere: what a masked batch gives is what its live rows give alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import gate, losses, metrics, route

N, E = 9, 4
MASK = np.arange(N) % 3 != 1
LIVE = np.flatnonzero(MASK)
# Finite garbage, too: a NaN would be noticed anywhere.
X = jnp.asarray(np.where(MASK[:, None], 1.0, 7.0) * np.random.default_rng(0).normal(size=(N, E)), jnp.float32)
ROUTERS = {
    "top_k": lambda x, mask: route.top_k(x, 2, mask),
    "switch": lambda x, mask: route.switch(x, mask),
    "noisy": lambda x, mask: route.noisy_top_k(x, x / 2, 2, mask),
    "sigmoid": lambda x, mask: route.sigmoid_top_k(x, 2, mask),
    "sinkhorn": lambda x, mask: route.sinkhorn(x, 2, mask),
    "relu": lambda x, mask: route.relu(x, mask),
    "soft": lambda x, mask: route.soft(jnp.stack([x, -x], -1), mask),
    "uniform": lambda x, mask: route.uniform(x, 2, mask),
    "expert_choice": lambda x, mask: route.expert_choice(x, 5, mask, places=jnp.int32(3)),
}


def measured(routing, placed):
    found = metrics.summary(routing, placed) | {"importance": metrics.importance(routing)}
    found |= {"z": losses.z_loss(routing), "balance": losses.load_balance(routing)}
    return found | ({} if routing.load_NE is None else {"load loss": losses.load_loss(routing)})


@pytest.mark.parametrize("name", ROUTERS)
def test_routing_metrics_and_losses_are_those_of_the_live_rows(name):
    placed = jnp.asarray(np.random.default_rng(1).random((N, E)) < 0.6)

    @jax.jit
    def run(x, mask, placed):
        routing = ROUTERS[name](x, mask)
        return routing, measured(routing, placed[:, : routing.k])

    masked, found = run(X, jnp.asarray(MASK), placed)
    alone, expected = run(X[LIVE], None, placed[LIVE])
    np.testing.assert_array_equal(masked.experts_NK[LIVE], alone.experts_NK)
    np.testing.assert_allclose(masked.weights_NK[LIVE], alone.weights_NK, rtol=1e-5, atol=1e-7)
    for key, value in found.items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-5, atol=1e-6, err_msg=key)
    if masked.slots is not None:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[LIVE], b, rtol=1e-5), masked.slots, alone.slots)
        assert not any(np.asarray(leaf)[~MASK].any() for leaf in jax.tree.leaves(masked.slots))


def test_experts_that_choose_have_the_places_of_the_live_tokens():
    config = gate.RouterConfig("expert_choice", experts=E, capacity_factor=2.0)
    routing = gate.gate({"kernel": jnp.eye(E)}, X, config, jnp.asarray(MASK))
    # Two times 6 live tokens over 4 experts; with padding there would be 4 places.
    np.testing.assert_array_equal(metrics.load(routing), np.full(E, 3))


def test_soft_moe_of_padding_alone_is_zeros():
    def weights(logits_NEP):
        slots = route.soft(logits_NEP, jnp.zeros(4, bool)).slots
        return (jnp.sin(slots.dispatch_NEP) + slots.combine_NEP).sum(), slots

    gradient, slots = jax.jit(jax.grad(weights, has_aux=True))(jnp.arange(24.0).reshape(4, 2, 3))
    assert np.isfinite(slots.dispatch_NEP).all() and not slots.combine_NEP.any() and not gradient.any()
