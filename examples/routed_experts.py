"""Routed experts in a training loop of your own: a router, a dispatch and a balance loss, all plain functions.

The task is to learn a table by heart: 512 random keys and their random values, more than the dense layer can hold. The
routed layer has eight experts of half the width and sends every token through two of them, so it multiplies as much as
the dense layer, holds four times as many numbers, and ends with a lower error.

Run: python examples/routed_experts.py (about 8 seconds of processor time, most of it compiling)
"""

import jax
import jax.numpy as jnp
import optax

from moe import experts, losses, metrics, route

WIDTH, HIDDEN, EXPERTS, STEPS = 16, 32, 8, 300
keys, values = jax.random.normal(jax.random.key(0), (2, 512, WIDTH))


def dense(params, x):
    """One feed-forward layer (SwiGLU) for all tokens."""
    return experts.dense(params, x), 0.0


def routed(params, x):
    """Two of eight experts for every token, and the loss that keeps all in use (Fedus et al. 2021)."""
    routing = route.top_k(x @ params["router"], k=2)
    y, _ = experts.mixture(params["experts"], x, routing)
    return y, 0.01 * losses.load_balance(routing)


def train(layer, params):
    """Minimize the squared error by Adam; return the parameters and the error."""
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-2, STEPS))

    def objective(params):
        y, extra = layer(params, keys)
        error = jnp.square(y - values).mean()
        return error + extra, error

    def step(state, _):
        params, moments = state
        gradients, error = jax.grad(objective, has_aux=True)(params)
        updates, moments = optimizer.update(gradients, moments)
        return (optax.apply_updates(params, updates), moments), error

    (params, _), errors = jax.lax.scan(step, (params, optimizer.init(params)), length=STEPS)
    return params, errors[-1]


one, two, three = jax.random.split(jax.random.key(1), 3)
dense_params = experts.initialize(WIDTH, HIDDEN, experts=0, key=one)
_, dense_error = jax.jit(lambda params: train(dense, params))(dense_params)

routed_params = {
    "router": jax.random.normal(two, (WIDTH, EXPERTS)) / WIDTH**0.5,
    "experts": experts.initialize(WIDTH, HIDDEN // 2, EXPERTS, key=three),
}
routed_params, routed_error = jax.jit(lambda params: train(routed, params))(routed_params)

load = metrics.load(route.top_k(keys @ routed_params["router"], k=2))
print(f"squared error: dense {dense_error:.3f}, routed {routed_error:.3f}, at as many multiplications a token")
print("each expert's share of the choices:", " ".join(f"{share:.0%}" for share in load / load.sum()))
assert routed_error < 0.7 * dense_error
assert load.min() > 0  # nobody idles
