"""Sharpness of a minimum: the Hessian's largest eigenvalues by Lanczos, and sharpness as SAM measures it.

With masks, everything happens in the space of the weights that are alive.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from lottery import masks as masks_lib

__all__ = ["LanczosConfig", "hvp", "sharpness", "top_eigenvalues"]

Loss = Callable[[PyTree], Array]


def hvp(loss_fn: Loss, params: PyTree, vector: PyTree) -> PyTree:
    """Multiply the Hessian by a vector, forward over reverse (Hessian-vector product); loss_fn(params) -> [].

    Example:
      >>> loss_fn = lambda params: jnp.sum(params["kernel"] ** 3)
      >>> lottery.sharpness.hvp(loss_fn, {"kernel": jnp.array([1.0, 2.0])}, {"kernel": jnp.ones(2)})["kernel"].tolist()
      [6.0, 12.0]
    """
    return jax.jvp(jax.grad(loss_fn), (params,), (vector,))[1]


@dataclass(frozen=True)
class LanczosConfig:
    """How many steps Lanczos takes, and how many eigenvalues it returns.

    Attributes:
      steps: Hessian products; more give more and better eigenvalues.
      count: eigenvalues to return.

    Example:
      >>> lottery.sharpness.LanczosConfig(steps=20)
      LanczosConfig(steps=20, count=1)
    """

    steps: int = 30
    count: int = 1

    def __post_init__(self):
        if not 1 <= self.count <= self.steps:
            raise ValueError(f"{self}: 1 <= count <= steps is needed")


def top_eigenvalues(
    loss_fn: Loss, params: PyTree, masks: PyTree | None = None, config: LanczosConfig = LanczosConfig(), *, key: Array
) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
    """Compute the algebraically largest eigenvalues of the Hessian, highest first, with residual norms |H v - l v|.

    Lanczos with full reorthogonalization from a random vector (Golub & Van Loan, section 10.1). A residual bounds the
    distance to the nearest eigenvalue: report it with the value. Runs under jit.

    Args:
      loss_fn: params -> [] float32.
      params: where.
      masks: only weights that are alive move; None for all.
      config: number of Hessian products and of eigenvalues.
      key: of the first vector.

    Example:
      >>> loss_fn = lambda params: jnp.sum(jnp.array([1.0, 3.0]) * params["kernel"] ** 2)
      >>> params, config = {"kernel": jnp.ones(2)}, lottery.sharpness.LanczosConfig(steps=2)
      >>> values, _ = lottery.sharpness.top_eigenvalues(loss_fn, params, None, config, key=jax.random.key(0))
      >>> round(float(values[0]), 4)
      6.0
    """
    flat, unravel = ravel_pytree(params)
    keep = jnp.ones(flat.shape, jnp.bool_) if masks is None else ravel_pytree(masks)[0]

    def multiply(v: Array) -> Array:
        return jnp.where(keep, ravel_pytree(hvp(loss_fn, params, unravel(v)))[0], 0)

    start = jnp.where(keep, jax.random.normal(key, flat.shape, flat.dtype), 0)
    basis = jnp.zeros((config.steps, flat.size), flat.dtype)

    def step(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
        basis, v = carry
        basis = basis.at[i].set(v)
        w = multiply(v)
        diagonal = v @ w
        # Twice is enough (Parlett): once leaves rounding errors along the largest eigenvectors.
        for _ in range(2):
            w = w - basis.T @ (basis @ w)
        norm = jnp.linalg.norm(w)
        # Krylov space exhausted (invariant subspace): pad with zeros, which are told apart below.
        tiny = 1e-6 * (jnp.abs(diagonal) + jnp.finfo(flat.dtype).tiny)
        next_v = jnp.where(norm > tiny, w / jnp.maximum(norm, jnp.finfo(flat.dtype).tiny), 0)
        return (basis, next_v), (diagonal, jnp.where(norm > tiny, norm, 0), jnp.any(v != 0))

    carry = (basis, start / jnp.linalg.norm(start))
    _, (diagonal, off, live) = jax.lax.scan(step, carry, jnp.arange(config.steps))
    # Rows of no vector get an eigenvalue below all others (Gershgorin).
    below = -jnp.sum(jnp.abs(diagonal)) - 2 * jnp.sum(off) - 1
    diagonal = jnp.where(live, diagonal, below)
    tridiagonal = jnp.diag(diagonal) + jnp.diag(off[:-1], 1) + jnp.diag(off[:-1], -1)
    values, vectors = jnp.linalg.eigh(tridiagonal)
    return values[::-1][: config.count], (jnp.abs(off[-1] * vectors[-1]))[::-1][: config.count]


def sharpness(loss_fn: Loss, params: PyTree, masks: PyTree | None = None, rho: float = 0.05) -> Float[Array, ""]:
    """Measure SAM's sharpness, loss(w + rho g / |g|) - loss(w) (Foret et al. 2021, arXiv:2010.01412, equation 2).

    The first-order worst case within the distance rho; not negative at a point that training found, but it can be.

    Args:
      loss_fn: params -> [] float32.
      params: where.
      masks: only weights that are alive move; None for all.
      rho: distance.

    Example:
      >>> loss_fn = lambda params: jnp.sum(params["kernel"] ** 2)
      >>> float(lottery.sharpness.sharpness(loss_fn, {"kernel": jnp.array([3.0, 4.0])}, rho=5.0))
      75.0
    """
    loss, gradient = jax.value_and_grad(loss_fn)(params)
    if masks is not None:
        gradient = masks_lib.apply(gradient, masks)
    norm = optax.global_norm(gradient)
    scale = jnp.where(norm > 0, rho / jnp.where(norm > 0, norm, 1), 0)
    moved = jax.tree.map(lambda p, g: (p + scale * g).astype(p.dtype), params, gradient)
    return loss_fn(moved) - loss
