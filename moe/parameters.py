"""Linen modules that declare the parameters of a mixture-of-experts layer: kernels of experts, and those of routers.

Axes: D width, F feed-forward width.

Example:
  >>> import jax
  >>> from moe.parameters import Kernels
  >>> shapes = jax.eval_shape(Kernels(8, 16, stack=(4,)).init, jax.random.key(0))["params"]
  >>> shapes["up"]["kernel"].shape, shapes["down"]["kernel"].shape
  ((4, 8, 16), (4, 16, 8))
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from moe.activations import Activation, kernel_names
from moe.gate import RouterConfig, parameter_shapes


class Kernels(nn.Module):
    """Parameters of a (stacked) feed-forward layer: kernels [*stack, D, F] and [*stack, F, D], and biases."""

    width: int
    ff: int
    stack: tuple[int, ...] = ()
    activation: Activation = "swiglu"
    biases: bool = False
    scale: float = 1.0
    output_scale: float = 1.0

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        """Return the parameters by the names that `moe.experts` takes."""
        params: dict[str, Any] = {}
        for name in kernel_names(self.activation):
            ends = (self.ff, self.width) if name == "down" else (self.width, self.ff)
            scale = self.scale * (self.output_scale if name == "down" else 1.0)
            params |= Kernel((*self.stack, *ends), len(self.stack), scale, self.biases, name=name)(name)
        return params


class Kernel(nn.Module):
    """One stack of kernels with initial variance scale^2 / fan-in, and a zero bias."""

    shape: tuple[int, ...]
    batch_axes: int
    scale: float
    biases: bool

    @nn.compact
    def __call__(self, name: str) -> dict[str, Any]:
        """Return {name: kernel} and, with biases, {name_bias: bias}."""
        init = nn.initializers.variance_scaling(
            self.scale**2, "fan_in", "truncated_normal", batch_axis=tuple(range(self.batch_axes))
        )
        params = {name: self.param("kernel", init, self.shape, jnp.float32)}
        if self.biases:
            shape = (*self.shape[:-2], self.shape[-1])
            params[f"{name}_bias"] = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        return params


class Router(nn.Module):
    """Parameters of a router by the names of `gate.parameter_shapes`."""

    config: RouterConfig
    width: int
    scale: float = 1.0

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        """Return the parameters by name."""
        start = nn.initializers.variance_scaling(self.scale**2, "fan_in", "truncated_normal")
        penalty = nn.initializers.constant(self.config.penalty)
        inits = {"kernel": start, "inner": start, "scale": nn.initializers.ones, "penalty": penalty}
        shapes = parameter_shapes(self.config, self.width)
        return {
            name: self.param(name, inits.get(name, nn.initializers.zeros), shape, jnp.float32)
            for name, shape in shapes.items()
        }
