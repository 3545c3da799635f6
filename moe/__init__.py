"""Mixture of experts: routers, token dispatch, expert layers, expert parallelism, and the kernels below them.

Example:
  >>> import jax, jax.numpy as jnp
  >>> import moe
  >>> layer = moe.MoE(moe.MoEConfig(router=moe.RouterConfig(experts=4, k=2)), width=8, ff=16)
  >>> x_BTD = jnp.ones((2, 3, 8))
  >>> params = jax.jit(layer.init)(jax.random.key(0), x_BTD)
  >>> jax.jit(layer.apply)(params, x_BTD).shape
  (2, 3, 8)

The layer in functions, which need no Flax:

  >>> x_ND, router_DE = jnp.ones((6, 8)), jnp.ones((8, 4))
  >>> routing = moe.route.top_k(x_ND @ router_DE, k=2)
  >>> experts = moe.experts.initialize(8, 16, 4, key=jax.random.key(1))
  >>> y_ND, _ = moe.experts.mixture(experts, x_ND, routing)
  >>> loss = moe.losses.load_balance(routing)

Axis legend: B batch, T tokens of a sequence, N tokens (B T flattened), D model width, F feed-forward width of an
expert, E experts, K choices of a token, R rows sorted by expert (at most N K), C places of an expert, G groups of
tokens, P slots of an expert or devices of an axis, L layers. The kernels have their own legend, in moe/kernels.
"""

from moe import (
    dispatch,
    experts,
    gate,
    kernels,
    layer,
    losses,
    merging,
    metrics,
    parallel,
    ream,
    route,
    routing,
    specialization,
    upcycle,
)
from moe.experts import MixtureConfig
from moe.gate import RouterConfig
from moe.layer import MoE, MoEConfig
from moe.routing import Routing

__all__ = [
    "MixtureConfig",
    "MoE",
    "MoEConfig",
    "RouterConfig",
    "Routing",
    "dispatch",
    "experts",
    "gate",
    "kernels",
    "layer",
    "losses",
    "merging",
    "metrics",
    "parallel",
    "ream",
    "route",
    "routing",
    "specialization",
    "upcycle",
]
