"""The gradient noise scale: the batch size beyond which more examples per step bring little.

McCandlish, Kaplan, Amodei et al. 2018, "An Empirical Model of Large-Batch Training", appendix A.1.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class NoiseScale(NamedTuple):
    """Estimates of |G|^2 (`signal`), tr(Sigma) over examples (`noise`), both unbiased, and their ratio B_simple.

    The ratio of two noisy estimates is biased: average `signal` and `noise` over steps before dividing them.
    """

    signal: Float[Array, "..."]
    noise: Float[Array, "..."]
    ratio: Float[Array, "..."]


def noise_scale(
    small_squared: Float[Array, "..."], big_squared: Float[Array, "..."], small: int, big: int
) -> NoiseScale:
    """Noise scale from squared gradient norms at two batch sizes, equations A.2 to A.4.

    E|G_B|^2 = |G|^2 + tr(Sigma)/B, so two batch sizes give both unknowns.

    Args:
      small_squared: |G_small|^2, the squared norm of the gradient of a batch of `small` examples (a mean over several
        such batches lowers its variance).
      big_squared: |G_big|^2 for a batch of `big` examples.
      small: examples in a small batch.
      big: examples in a big batch.

    Raises:
      ValueError: `big` is not above `small`, or `small` is not positive.
    """
    if not 0 < small < big:
        raise ValueError(f"two batch sizes 0 < small < big are needed, got small={small} and big={big}")
    signal = (big * big_squared - small * small_squared) / (big - small)
    noise = (small_squared - big_squared) / (1 / small - 1 / big)
    return NoiseScale(signal, noise, noise / jnp.where(signal == 0, jnp.nan, signal))
