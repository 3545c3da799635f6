"""What is done to the float32 sums of a tile before they are written: shared by every implementation."""

import jax
from jaxtyping import Array, Float


def swiglu(gate: Float[Array, "*S"], up: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """silu(gate) * up (Shazeer 2020, eq. 6)."""
    return gate * jax.nn.sigmoid(gate) * up


def swiglu_gradient(
    gate: Float[Array, "*S"], up: Float[Array, "*S"], dout: Float[Array, "*S"]
) -> tuple[Float[Array, "*S"], Float[Array, "*S"]]:
    """Cotangents of gate and up."""
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return dout * up * (sigmoid + silu * (1 - sigmoid)), dout * silu
