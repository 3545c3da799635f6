"""Gradients of a network in the space of its alive weights: gradient flow and the empirical neural tangent kernel.

Two of the quantities by which sparse networks have been said to train well or badly: gradient flow (Evci et al. 2022,
arXiv:2010.03533) and the spectrum of the neural tangent kernel (Jacot et al. 2018, arXiv:1806.07572; of pruned networks
Liu & Zenke 2020, arXiv:2006.16146).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from lottery import masks as masks_lib

__all__ = ["Kernel", "empirical_ntk", "gradient_flow", "kernel_summary"]


def gradient_flow(loss_fn: Callable[[PyTree], Array], params: PyTree, masks: PyTree) -> Float[Array, ""]:
    """Compute the gradient flow: the squared norm of the loss's gradient over the alive weights, float32 [].

    Under gradient descent with a small step the loss falls by the step size times it.

    Args:
      loss_fn: parameters -> loss [].
      params: weights, zero outside the masks.
      masks: bool, like the parameters.

    Example:
      >>> params, mask = {"kernel": jnp.array([1.0, 2.0])}, {"kernel": jnp.array([True, False])}
      >>> lottery.tangent.gradient_flow(lambda p: jnp.sum(3 * p["kernel"]), params, mask).item()
      9.0
    """
    alive = masks_lib.apply(jax.grad(loss_fn)(params), masks)
    return sum((jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(alive)), jnp.zeros(()))


def empirical_ntk(
    apply_fn: Callable[[PyTree, Array], Float[Array, "N C"]], params: PyTree, masks: PyTree, x: Float[Array, "N ..."]
) -> Float[Array, "N N"]:
    """Compute the empirical neural tangent kernel of examples, the mean over outputs, float32 [N, N].

    Entry (i, j) is the mean over outputs c of <d f_c(x_i) / d w, d f_c(x_j) / d w>, over the alive weights w. One
    output at a time: N gradients are in memory.

    Args:
      apply_fn: (parameters, inputs [N, ...]) -> outputs [N, C]; examples do not meet in it.
      params: weights, zero outside the masks.
      masks: bool, like the parameters.
      x: examples.

    Example:
      >>> apply_fn = lambda params, x: x @ params["kernel"]
      >>> params, mask = {"kernel": jnp.ones((2, 3))}, {"kernel": jnp.array([[True] * 3, [False] * 3])}
      >>> lottery.tangent.empirical_ntk(apply_fn, params, mask, jnp.array([[1.0, 5.0], [2.0, 7.0]])).tolist()
      [[1.0, 2.0], [2.0, 4.0]]
    """
    outputs = jax.eval_shape(apply_fn, params, x).shape[-1]

    def one(c: Array) -> Array:
        gradient = jax.grad(lambda p, example: apply_fn(p, example[None])[0, c])
        each = jax.vmap(lambda example: masks_lib.apply(gradient(params, example), masks))(x)
        flat = [leaf.reshape(len(x), -1).astype(jnp.float32) for leaf in jax.tree.leaves(each)]
        return sum((leaf @ leaf.T for leaf in flat), jnp.zeros((len(x), len(x))))

    return jax.lax.map(one, jnp.arange(outputs)).mean(0)


class Kernel(NamedTuple):
    """What a kernel over N examples says of training.

    Attributes:
      top: largest eigenvalue: the direction that is learned fastest.
      trace: sum of the eigenvalues.
      rank: effective rank, trace^2 / sum of squares of the eigenvalues: directions that are learned at a like speed.
      alignment: centered kernel alignment with the labels (Cortes et al. 2012, JMLR 13), in [-1, 1].

    Example:
      >>> kernel = lottery.tangent.kernel_summary(jnp.diag(jnp.array([3.0, 1.0])), jnp.array([0, 1]), 2)
      >>> [round(float(value), 4) for value in kernel]
      [3.0, 4.0, 1.6, 1.0]
    """

    top: Array
    trace: Array
    rank: Array
    alignment: Array


def kernel_summary(kernel_NN: Float[Array, "N N"], labels: Int[Array, " N"], classes: int) -> Kernel:
    """Compute the top eigenvalue, trace, effective rank and label alignment of a kernel, each float32 [].

    Example:
      >>> kernel = lottery.tangent.kernel_summary(jnp.eye(4), jnp.array([0, 0, 1, 1]), 2)
      >>> round(float(kernel.top), 4), float(kernel.rank)
      (1.0, 4.0)
    """
    same_NN = jax.nn.one_hot(labels, classes) @ jax.nn.one_hot(labels, classes).T
    center = lambda k: k - k.mean(0)[None] - k.mean(1)[:, None] + k.mean()[None, None]  # noqa: E731
    a, b = center(kernel_NN), center(same_NN)
    alignment = jnp.sum(a * b) / jnp.sqrt(jnp.sum(a * a) * jnp.sum(b * b))
    trace = jnp.trace(kernel_NN)
    return Kernel(jnp.linalg.eigvalsh(kernel_NN)[-1], trace, trace**2 / jnp.sum(kernel_NN**2), alignment)
