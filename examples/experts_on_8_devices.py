"""Experts spread over eight devices: expert parallelism inside a `jax.shard_map` of your own (GShard).

Every device has two of sixteen experts and an eighth of the tokens. Tokens travel to their experts by an all-to-all and
come back by another. Outputs and gradients are those of one device, to rounding; the last lines check it.

Run: python examples/experts_on_8_devices.py (10 seconds of processor time; the devices are eight parts of your CPU)
"""

import os

# Before JAX starts, and only for a CPU; on eight GPUs or TPUs leave it out.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from moe import experts, parallel, route

WIDTH, HIDDEN, EXPERTS, TOKENS = 32, 64, 16, 256
mesh = Mesh(np.array(jax.devices()[:8]), ("ep",))
tokens = jax.random.normal(jax.random.key(0), (TOKENS, WIDTH))
params = {
    "router": jax.random.normal(jax.random.key(1), (WIDTH, EXPERTS)),
    "experts": experts.initialize(WIDTH, HIDDEN, EXPERTS, key=jax.random.key(2)),
}
where = {"router": PartitionSpec(), "experts": PartitionSpec("ep")}  # a copy everywhere; two experts each


def one_device(params, x):
    """The layer as one device computes it."""
    y, _ = experts.mixture(params["experts"], x, route.top_k(x @ params["router"], k=2))
    return y


@partial(jax.shard_map, mesh=mesh, in_specs=(where, PartitionSpec("ep")), out_specs=PartitionSpec("ep"))
def eight_devices(params, x):
    """The same layer, seen by one of the eight: its tokens, its experts, and the router over all sixteen."""
    routing = route.top_k(x @ params["router"], k=2)
    mine = partial(experts.expert_ffn, params["experts"])
    return parallel.all_to_all(x, routing, mine, "ep")


def loss(layer, params, x):
    """Something to differentiate."""
    return jnp.square(layer(params, x)).mean()


here = jax.jit(jax.value_and_grad(partial(loss, one_device)))(params, tokens)
there = jax.jit(jax.value_and_grad(partial(loss, eight_devices)))(params, tokens)
apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(a).max()), here, there)
print(f"loss on one device {here[0]:.6f}, on {mesh.size} {there[0]:.6f}")
print(f"largest relative difference of a gradient: {max(jax.tree.leaves(apart)):.1e}")
assert max(jax.tree.leaves(apart)) < 1e-5
