"""LeNet-300-100, the fully connected network of the lottery ticket paper, with any hidden sizes."""

from dataclasses import dataclass

import flax.linen as nn
from jaxtyping import Array, Float


@dataclass(frozen=True)
class MLPConfig:
    """Sizes of a `LeNet`.

    Attributes:
      hidden: units of the hidden layers, first to last.
      classes: number of logits.
    """

    hidden: tuple[int, ...] = (300, 100)
    classes: int = 10

    def __post_init__(self):
        if any(size < 1 for size in self.hidden) or self.classes < 1:
            raise ValueError(f"hidden={self.hidden} and classes={self.classes} must all be at least 1")


class LeNet(nn.Module):
    """A ReLU network on flattened images (LeCun et al. 1998; Frankle & Carbin 2019, section 2 and appendix G).

    Kernels are Gaussian Glorot: normal, not truncated, with variance 2 / (fan_in + fan_out). Biases start at zero.
    Parameters: dense0/{kernel [X, hidden0], bias}, dense1/..., output/{kernel, bias}, all float32.
    """

    config: MLPConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B ..."]) -> Float[Array, "B C"]:
        """Map images [B, H, W, C] or features [B, X] to logits [B, classes] in float32."""
        # Not `glorot_normal`, which is truncated.
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")
        x = x.reshape(x.shape[0], -1)
        for i, size in enumerate(self.config.hidden):
            x = nn.relu(nn.Dense(size, kernel_init=init, name=f"dense{i}")(x))
        return nn.Dense(self.config.classes, kernel_init=init, name="output")(x)
