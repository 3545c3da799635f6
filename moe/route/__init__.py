"""Routers (gating functions) as pure functions `logits -> moe.routing.Routing`.

Example:
  >>> import jax.numpy as jnp
  >>> from moe import route
  >>> x_ND, router_DE = jnp.ones((4, 8)), jnp.ones((8, 3))
  >>> route.top_k(x_ND @ router_DE, k=2).experts_NK.shape
  (4, 2)
"""

from moe.route.balanced import auction, balance, base, sinkhorn
from moe.route.biased import limit_groups, sigmoid_top_k, update_bias
from moe.route.choice import expert_choice, soft
from moe.route.fixed import hash_tokens, replay, uniform
from moe.route.noisy import hierarchical, noisy_top_k, smooth_load, sparsemixer
from moe.route.relu import relu, update_penalty
from moe.route.softmax import gshard, jitter, switch, top_k

__all__ = [
    "auction",
    "balance",
    "base",
    "expert_choice",
    "gshard",
    "hash_tokens",
    "hierarchical",
    "jitter",
    "limit_groups",
    "noisy_top_k",
    "relu",
    "replay",
    "sigmoid_top_k",
    "sinkhorn",
    "smooth_load",
    "soft",
    "sparsemixer",
    "switch",
    "top_k",
    "uniform",
    "update_bias",
    "update_penalty",
]
