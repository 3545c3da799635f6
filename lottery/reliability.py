"""Reliability of a classifier: calibration, corrupted images, adversarial examples.

Calibration is the expected calibration error (Guo et al. 2017, arXiv:1706.04599, equation 3). Attacks are the fast
gradient sign method (Goodfellow et al. 2015, arXiv:1412.6572, section 4) and projected gradient descent (Madry et al.
2018, arXiv:1706.06083, section 2.1) in the maximum norm. Images are float32 [N, H, W, C] in [0, 1].
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

__all__ = ["blur", "calibration_error", "fgsm", "noise", "occlude", "pgd", "shift"]

Images = Float[Array, "N H W C"]


def calibration_error(logits: Float[Array, "N C"], labels: Int[Array, " N"], *, bins: int = 15) -> Float[Array, ""]:
    """Compute the expected calibration error (ECE), float32 [] in [0, 1].

    Predictions are sorted by confidence into equal bins ((k - 1) / bins, k / bins]; the error is the mean over
    predictions of |accuracy - mean confidence| of their bin.

    Example:
      >>> logits = jnp.log(jnp.array([[0.8, 0.2], [0.8, 0.2], [0.7, 0.3]]))
      >>> round(float(lottery.reliability.calibration_error(logits, jnp.array([0, 1, 0]), bins=4)), 4)
      0.3
    """
    probability = jax.nn.softmax(logits.astype(jnp.float32))
    confidence, right = probability.max(-1), probability.argmax(-1) == labels
    place = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
    difference = jnp.zeros(bins).at[place].add(right - confidence)
    return jnp.abs(difference).sum() / len(labels)


def noise(x: Images, std: float, *, key: Key[Array, ""]) -> Images:
    """Add Gaussian noise, cut off at 0 and 1.

    Example:
      >>> x = jnp.full((1, 2, 2, 1), 0.5)
      >>> bool(jnp.all(lottery.reliability.noise(x, 0.0, key=jax.random.key(0)) == x))
      True
    """
    return jnp.clip(x + std * jax.random.normal(key, x.shape), 0, 1)


def blur(x: Images, sigma: float) -> Images:
    """Blur with a Gaussian of width `sigma` pixels, cut off at 3 sigma; beyond the border is 0.

    Example:
      >>> x = jnp.zeros((1, 5, 5, 1)).at[0, 2, 2, 0].set(1.0)
      >>> round(float(lottery.reliability.blur(x, 0.5).max()), 4)
      0.6187
    """
    radius = max(int(3 * sigma + 0.5), 1)
    weight = jnp.exp(-0.5 * (jnp.arange(-radius, radius + 1) / max(sigma, 1e-6)) ** 2)
    weight = weight / weight.sum()
    for axis in (1, 2):
        wide = jnp.pad(x, [(radius, radius) if i == axis else (0, 0) for i in range(x.ndim)])
        parts = [jax.lax.slice_in_dim(wide, i, i + x.shape[axis], axis=axis) for i in range(2 * radius + 1)]
        x = sum((w * part for w, part in zip(weight, parts, strict=True)), jnp.zeros_like(x))
    return x


def shift(x: Images, rows: int, columns: int) -> Images:
    """Shift down by `rows` and right by `columns` pixels (negative: up, left); what comes in is 0.

    Example:
      >>> lottery.reliability.shift(jnp.arange(4.0).reshape(1, 2, 2, 1), 1, 0)[0, :, :, 0].tolist()
      [[0.0, 0.0], [0.0, 1.0]]
    """
    for axis, by in ((1, rows), (2, columns)):
        at = jnp.arange(x.shape[axis]) - by
        inside = (at >= 0) & (at < x.shape[axis])
        moved = jnp.take(x, jnp.clip(at, 0, x.shape[axis] - 1), axis=axis)
        x = jnp.where(jnp.expand_dims(inside, [i for i in range(x.ndim) if i != axis]), moved, 0)
    return x


def occlude(x: Images, size: int, *, key: Key[Array, ""]) -> Images:
    """Set a square of `size` pixels at a random place of each image to 0; it lies inside the image.

    Example:
      >>> float(lottery.reliability.occlude(jnp.ones((3, 6, 6, 1)), 2, key=jax.random.key(0)).sum())
      96.0
    """
    (n, height, width, _), (one, two) = x.shape, jax.random.split(key)
    top = jax.random.randint(one, (n, 1), 0, max(height - size, 0) + 1)
    left = jax.random.randint(two, (n, 1), 0, max(width - size, 0) + 1)
    inside = lambda start, length: (jnp.arange(length)[None] >= start) & (jnp.arange(length)[None] < start + size)  # noqa: E731
    hidden = inside(top, height)[:, :, None] & inside(left, width)[:, None, :]
    return jnp.where(hidden[..., None], 0, x)


def fgsm(loss_fn: Callable[[Images], Array], x: Images, radius: float) -> Images:
    """Attack by the fast gradient sign method: one step of `radius` along the sign of the gradient, inside [0, 1].

    Args:
      loss_fn: images -> loss, a sum over images so that none weakens the gradient of another.
      x: images.
      radius: of the maximum norm.

    Example:
      >>> x = jnp.array([0.5, 0.95]).reshape(1, 1, 2, 1)
      >>> lottery.reliability.fgsm(lambda x: jnp.sum(3 * x), x, 0.25).ravel().tolist()
      [0.75, 1.0]
    """
    return jnp.clip(x + radius * jnp.sign(jax.grad(loss_fn)(x)), 0, 1)


def pgd(
    loss_fn: Callable[[Images], Array], x: Images, radius: float, *, steps: int = 20, key: Key[Array, ""]
) -> Images:
    """Attack by projected gradient descent in the maximum norm, from a random start, inside [0, 1].

    Steps are 2.5 * radius / steps long, so that the far side of the ball can be reached.

    Args:
      loss_fn: images -> loss, a sum over images.
      x: images.
      radius: of the maximum norm.
      steps: gradients.
      key: of the start, uniform in the ball.

    Example:
      >>> x = jnp.full((1, 1, 2, 1), 0.5)
      >>> attacked = lottery.reliability.pgd(lambda x: jnp.sum(x), x, 0.25, steps=5, key=jax.random.key(0))
      >>> attacked.ravel().tolist()
      [0.75, 0.75]
    """
    low, high = jnp.maximum(x - radius, 0), jnp.minimum(x + radius, 1)

    def step(_: Any, now: Array) -> Array:
        return jnp.clip(now + 2.5 * radius / steps * jnp.sign(jax.grad(loss_fn)(now)), low, high)

    start = jnp.clip(x + radius * jax.random.uniform(key, x.shape, minval=-1.0), low, high)
    return jax.lax.fori_loop(0, steps, step, start)
