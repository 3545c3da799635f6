"""Activations of feed-forward layers, with and without a gate: SwiGLU, GeGLU, ReGLU, GELU, ReLU, squared ReLU.

Axes: F feed-forward width.

Example:
  >>> import jax.numpy as jnp
  >>> from moe.activations import Gating, activate
  >>> float(activate(jnp.array([9.0]), jnp.array([0.5]), "reglu", Gating(limit=7.0, offset=1.0))[0])
  4.0
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Activation = Literal["swiglu", "geglu", "reglu", "gelu", "relu", "relu2"]
ACTIVATIONS = ("swiglu", "geglu", "reglu", "gelu", "relu", "relu2")
GATED = ("swiglu", "geglu", "reglu")


@dataclass(frozen=True)
class Gating:
    """Constants of a gated activation; gpt-oss has slope 1.702, limit 7 and offset 1 (OpenAI 2025, arXiv:2508.10925).

    Attributes:
      slope: factor inside the sigmoid of SwiGLU, gate * sigmoid(slope * gate).
      limit: gate is clamped from above and up on both sides at this value; 0 does not clamp.
      offset: added to up, after the clamp.
    """

    slope: float = 1.0
    limit: float = 0.0
    offset: float = 0.0

    def __post_init__(self):
        if self.limit < 0:
            raise ValueError(f"limit={self.limit} must be positive, or 0 for none")


PLAIN = Gating()


def kernel_names(activation: Activation) -> tuple[str, ...]:
    """Return the kernels of a feed-forward layer by name."""
    return ("gate", "up", "down") if activation in GATED else ("up", "down")


def activate(
    up: Float[Array, "*N F"],
    gate: Float[Array, "*N F"] | None,
    activation: Activation = "swiglu",
    gating: Gating = PLAIN,
) -> Float[Array, "*N F"]:
    """Apply SwiGLU, silu(gate) * up, or another of `ACTIVATIONS`, in float32; the result has up's dtype."""
    functions: dict[str, Any] = {
        "swiglu": lambda x: x * jax.nn.sigmoid(gating.slope * x),
        "geglu": partial(jax.nn.gelu, approximate=False),
        "reglu": jax.nn.relu,
        "gelu": partial(jax.nn.gelu, approximate=False),
        "relu": jax.nn.relu,
        "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    }
    up32 = up.astype(jnp.float32)
    if activation not in GATED:
        return functions[activation](up32).astype(up.dtype)
    assert gate is not None
    gate32 = gate.astype(jnp.float32)
    if gating.limit:
        gate32, up32 = jnp.minimum(gate32, gating.limit), jnp.clip(up32, -gating.limit, gating.limit)
    return (functions[activation](gate32) * (up32 + gating.offset)).astype(up.dtype)
