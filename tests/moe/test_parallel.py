"""Experts on several devices give what one device gives, outputs and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moe import dispatch, experts, parallel, route

N, D, F, E = 32, 6, 8, 8
PARAMS = experts.initialize(D, F, E, key=jax.random.key(2))
X = jax.random.normal(jax.random.key(3), (N, D))
LOGITS = 2 * jax.random.normal(jax.random.key(4), (N, E))
MASK = jnp.arange(N) % 7 != 5
COTANGENT = jnp.cos(jnp.arange(N * D).reshape(N, D))
SPECS = {"gate": P("ep", None, "tp"), "up": P("ep", None, "tp"), "down": P("ep", "tp", None)}
ROUTINGS = {
    "top_k": lambda x, mask: route.top_k(x, 2, mask),
    "all_to_one": lambda x, mask: route.switch(x + 40 * (jnp.arange(E) == 5)[None], mask),
    "k_is_e": lambda x, mask: route.top_k(x, E, mask),
}


def fake_ragged(rows, buffer, starts, sizes, there, received, axis):
    """What `jax.lax.ragged_all_to_all` does, by gathering everything, for CPUs."""
    me, r = jax.lax.axis_index(axis), rows.shape[0]
    rows, starts, sizes, there = (jax.lax.all_gather(x, axis) for x in (rows, starts, sizes, there))
    place = there[:, me, None] + jnp.arange(r)[None]  # [sender, row of its block]
    live = jnp.arange(r)[None] < sizes[:, me, None]
    source = jnp.minimum(starts[:, me, None] + jnp.arange(r)[None], r - 1)
    values = jnp.take_along_axis(rows, source[:, :, None], axis=1)
    out = buffer.at[jnp.where(live, place, buffer.shape[0])].set(values, mode="drop")
    # Where the sizes announced and sent differ, nothing is right.
    return jnp.where((sizes[:, me] == received).all(), out, jnp.nan)


def on_mesh(shape, way, exchange, name):
    """(params, x, logits) -> (outputs, gradients) on a mesh of dp x ep x tp devices."""
    mesh = Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), ("dp", "ep", "tp"))
    tokens = P(("dp", "ep"))
    send = partial(parallel.all_to_all, exchange=exchange) if way == "all_to_all" else parallel.all_gather

    @partial(jax.shard_map, mesh=mesh, in_specs=(SPECS, tokens, tokens, tokens), out_specs=tokens)
    def forward(params, x, logits, mask):
        run = parallel.tensor_parallel(partial(experts.expert_ffn, params), "tp")
        return send(x, ROUTINGS[name](logits, mask), run, "ep")

    return lambda p, x, logits: (forward(p, x, logits, MASK) * COTANGENT).sum(), forward


def one_device(name):
    def forward(params, x, logits, mask):
        return experts.mixture(params, x, ROUTINGS[name](logits, mask))[0]

    return lambda p, x, logits: (forward(p, x, logits, MASK) * COTANGENT).sum(), forward


@pytest.mark.parametrize(
    ("shape", "way", "exchange", "name"),
    [
        ((1, 8, 1), "all_to_all", "padded", "top_k"),
        ((1, 4, 1), "all_to_all", "ragged", "top_k"),
        ((2, 2, 2), "all_to_all", "padded", "all_to_one"),
        ((2, 2, 2), "all_gather", "", "top_k"),
        pytest.param((1, 8, 1), "all_gather", "", "top_k", marks=pytest.mark.slow),
        pytest.param((1, 4, 1), "all_to_all", "ragged", "all_to_one", marks=pytest.mark.slow),
        pytest.param((1, 4, 2), "all_to_all", "padded", "k_is_e", marks=pytest.mark.slow),
        pytest.param((2, 2, 2), "all_gather", "", "all_to_one", marks=pytest.mark.slow),
        pytest.param((4, 2, 1), "all_gather", "", "k_is_e", marks=pytest.mark.slow),
    ],
)
def test_outputs_and_gradients_are_one_devices(shape, way, exchange, name, monkeypatch):
    if exchange == "ragged":  # XLA has none for CPUs
        monkeypatch.setattr(parallel, "exchange_rows", fake_ragged)
    ours, forward = on_mesh(shape, way, exchange, name)
    theirs, plain = one_device(name)
    args = (PARAMS, X, LOGITS)
    np.testing.assert_allclose(jax.jit(forward)(*args, MASK), jax.jit(plain)(*args, MASK), rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        jax.jit(jax.grad(ours, argnums=(0, 1, 2)))(*args),
        jax.jit(jax.grad(theirs, argnums=(0, 1, 2)))(*args),
    )


def test_the_ragged_exchange_lowers_for_tpus():
    _, forward = on_mesh((1, 4, 1), "all_to_all", "ragged", "top_k")
    lowered = jax.jit(forward).trace(PARAMS, X, LOGITS, MASK).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("ragged_all_to_all") >= 2


def test_experts_that_do_not_divide_are_refused():
    mesh = Mesh(np.array(jax.devices()[:3]), ("ep",))

    @partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    def forward(x):
        return parallel.all_to_all(x, route.top_k(LOGITS, 2), dispatch.gather, "ep")

    with pytest.raises(ValueError, match="8 experts do not divide among the 3 devices of axis 'ep'"):
        forward(X)
