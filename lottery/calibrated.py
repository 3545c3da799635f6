"""Pruning of a trained kernel from statistics of its inputs: Wanda, SparseGPT (OBS), Fisher, OWL's and REAP's measures.

Functions of one kernel [N inputs, M outputs] and of arrays that sum over calibration rows x: `norm` [N], the norms of
the inputs, and `hessian` [N, N], any positive multiple of the sum of x x^T. All run under jit, and under vmap for a
stack of layers or experts. `lottery.structures.matrices` makes kernels with more axes matrices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lottery import allocation, prune, structures

__all__ = [
    "Pruned",
    "fisher",
    "inverse_factor",
    "keep_best",
    "obs",
    "outlier_ratio",
    "output_error",
    "reap",
    "sparsegpt",
    "wanda",
]


class Pruned(NamedTuple):
    """A kernel pruned with an update of the weights that stay.

    Attributes:
      weight: float32 [N, M], exactly zero where the mask is False.
      mask: bool [N, M].
      scale: float32 [M], with `bits` of `sparsegpt`: weight / scale are whole numbers; else None.

    Example:
      >>> pruned = lottery.calibrated.sparsegpt(jnp.array([[1.0], [3.0]]), jnp.eye(2), 0.5)
      >>> pruned.weight.ravel().tolist(), pruned.scale
      ([0.0, 3.0], None)
    """

    weight: Array
    mask: Array
    scale: Array | None = None


def wanda(w_NM: Float[Array, "N M"], norm_N: Float[Array, " N"]) -> Float[Array, "N M"]:
    """Score weights by Wanda, |w| times the norm of its input (Sun et al. 2023, arXiv:2306.11695, equation 1).

    The paper compares the weights of one output: `keep_best` with `by_output`.

    Example:
      >>> lottery.calibrated.wanda(jnp.array([[-2.0], [3.0]]), jnp.array([2.0, 1.0])).tolist()
      [[4.0], [3.0]]
    """
    return jnp.abs(w_NM).astype(jnp.float32) * norm_N.astype(jnp.float32)[:, None]


def fisher(w_NM: Float[Array, "N M"], squares_NM: Float[Array, "N M"]) -> Float[Array, "N M"]:
    """Score weights by the diagonal of the Fisher information, w^2 / 2 times the mean squared gradient.

    Theis et al. 2018 (arXiv:1801.05787), equation 9; `lottery.criteria.fisher` also takes the gradients.

    Example:
      >>> lottery.calibrated.fisher(jnp.array([[2.0]]), jnp.array([[3.0]])).tolist()
      [[6.0]]
    """
    return 0.5 * jnp.square(w_NM.astype(jnp.float32)) * squares_NM.astype(jnp.float32)


def obs(w_NM: Float[Array, "N M"], hessian_NN: Float[Array, "N N"], damping: float = 0.01) -> Float[Array, "N M"]:
    """Score weights by optimal brain surgeon, w^2 / (2 [H^-1]_nn): what removing it alone costs at best.

    Hassibi & Stork 1993, equation 5; the other weights of the output are thought to be updated.

    Args:
      w_NM: the kernel.
      hessian_NN: see the module.
      damping: see `inverse_factor`.

    Example:
      >>> lottery.calibrated.obs(jnp.array([[2.0], [1.0]]), jnp.diag(jnp.array([1.0, 4.0])), 0.0).tolist()
      [[2.0], [2.0]]
    """
    inverse_N = jnp.square(inverse_factor(hessian_NN, damping)).sum(0)
    return 0.5 * jnp.square(w_NM.astype(jnp.float32)) / inverse_N[:, None]


def inverse_factor(hessian_NN: Float[Array, "N N"], damping: float = 0.01) -> Float[Array, "N N"]:
    """Compute the upper Cholesky factor U of a damped inverse Hessian, H^-1 = U^T U, float32.

    Args:
      hessian_NN: see the module. Inputs that were always zero have a zero on the diagonal, in place of which 1 stands.
      damping: times the mean of the diagonal, is added to the diagonal (Frantar & Alistarh 2023, section 4, setup).

    Returns:
      The factor; not a number where the damped Hessian is not positive definite.

    Example:
      >>> lottery.calibrated.inverse_factor(jnp.diag(jnp.array([4.0, 1.0])), 0.0).tolist()
      [[0.5, 0.0], [0.0, 1.0]]
    """
    diagonal_N = jnp.diag(hessian_NN)
    diagonal_N = jnp.where(diagonal_N == 0, 1.0, diagonal_N)
    identity_NN = jnp.eye(len(hessian_NN), dtype=jnp.float32)
    damped_NN = jnp.where(identity_NN > 0, diagonal_N + damping * diagonal_N.mean(), hessian_NN).astype(jnp.float32)
    lower_NN = jnp.linalg.cholesky(damped_NN)
    inverse_NN = jax.scipy.linalg.cho_solve((lower_NN, True), identity_NN)
    return jnp.linalg.cholesky(inverse_NN).T


def keep_best(
    scores_NM: Float[Array, "N M"], density: float | Array, pattern: str = "unstructured", by_output: bool = False
) -> Bool[Array, "N M"]:
    """Mask a kernel: the fraction `density` of its weights, or of its blocks, stays, those with the highest scores.

    Args:
      scores_NM: of the weights.
      density: 0 to 1, counts are rounded; for n:m it must be n / m.
      pattern: "unstructured", n:m ("2:4", along the inputs) or blocks ("16x16", inputs x outputs).
      by_output: the same number of weights stays in every output; n:m does so anyway.

    Raises:
      ValueError: a density that n:m does not have, a pattern that does not divide the kernel, or another one.

    Example:
      >>> scores = jnp.array([[1.0, 5.0], [2.0, 6.0]])
      >>> lottery.calibrated.keep_best(scores, 0.5).tolist()
      [[False, True], [False, True]]
      >>> lottery.calibrated.keep_best(scores, 0.5, by_output=True).tolist()
      [[False, False], [True, True]]
    """
    inputs, outputs = scores_NM.shape
    _check_density(density, pattern)
    if pattern == "unstructured":
        drop = lambda scores: prune.drop_lowest(scores, jnp.ones(scores.shape, bool), _gone(density, scores.size))  # noqa: E731
        return jax.vmap(drop, 1, 1)(scores_NM) if by_output else drop(scores_NM.ravel()).reshape(inputs, outputs)
    if not (structures.ratio(pattern) or "x" in pattern):
        raise ValueError(f"pattern {pattern!r} of one kernel: unstructured, n:m (2:4) or a block (16x16)")
    scores, which = {"kernel": scores_NM}, {"kernel": True}
    units = prune.units(scores, which, pattern)
    counts = allocation.counts(units, allocation.Uniform(float(density)), {})
    return prune.keep(scores, {"kernel": jnp.ones(scores_NM.shape, bool)}, which, counts, pattern)["kernel"]


def _check_density(density: float | Array, pattern: str) -> None:
    if isinstance(density, jax.core.Tracer):
        return
    value = float(density)
    if not 0 <= value <= 1:
        raise ValueError(f"density={density}: a fraction of the weights, 0 to 1, is needed")
    found = structures.ratio(pattern)
    if found and abs(value - found[0] / found[1]) > 1e-6:
        raise ValueError(
            f"density={density} with {pattern}: every group of {found[1]} keeps {found[0]}, so the density is "
            f"{found[0] / found[1]:g}"
        )


def _gone(density: float | Array, size: int | Array) -> Array:
    """How many of so many units go, int32 []."""
    return jnp.asarray(size - jnp.round(jnp.asarray(density, jnp.float32) * size), jnp.int32)


def sparsegpt(
    w_NM: Float[Array, "N M"],
    hessian_NN: Float[Array, "N N"],
    density: float | Array = 0.5,
    *,
    pattern: str = "unstructured",
    mask_NM: Bool[Array, "N M"] | None = None,
    block: int = 128,
    damping: float = 0.01,
    bits: int = 0,
) -> Pruned:
    """Prune a kernel by SparseGPT: input by input, each error is compensated in the later inputs of the same output.

    Frantar & Alistarh 2023 (arXiv:2301.00774), algorithm 1 and, with `bits`, section 3.5: sparse and quantized in one
    pass. The inverse Hessian's Cholesky factor is computed once, inputs go in blocks; the mask of a block is chosen
    when it is reached, from the weights as they are then, over all its outputs. (The authors' code prunes one weight
    more of every block than the density says.)

    Args:
      w_NM: the kernel.
      hessian_NN: see the module; weights of inputs that were always zero go.
      density: of the mask, 0 to 1; rounded in every block of inputs.
      pattern: "unstructured" or n:m ("2:4", along the inputs).
      mask_NM: a mask chosen before, of any structure, in place of `density` and `pattern`: only the update is made.
      block: inputs that share a mask's threshold.
      damping: see `inverse_factor`.
      bits: 0 leaves the weights that stay as they are, 2 to 8 round them to a grid of one scale per output.

    Raises:
      ValueError: n:m that does not divide the inputs or the block, or does not have this density; another pattern.

    Example:
      >>> w, x = jnp.array([[1.0], [1.0], [3.0], [2.0]]), jnp.array([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
      >>> pruned = lottery.calibrated.sparsegpt(w, x.T @ x, 0.5, pattern="1:2", damping=1e-3)
      >>> pruned.mask.ravel().tolist(), jnp.round(pruned.weight.ravel(), 2).tolist()
      ([False, True, False, True], [0.0, 2.0, 0.0, 5.0])
    """
    inputs, outputs = w_NM.shape
    pair = structures.ratio(pattern) if mask_NM is None else None
    if mask_NM is None:
        _check_density(density, pattern)
        if not pair and pattern != "unstructured":
            raise ValueError(f"pattern {pattern!r} of sparsegpt: unstructured or n:m; for others choose mask_NM first")
    if pair and (inputs % pair[1] or block % pair[1]):
        raise ValueError(f"{pattern} needs multiples of {pair[1]}, not {inputs} inputs in blocks of {block}")
    top = 2 ** (bits - 1) if bits else 0
    scale_M = jnp.maximum(2 * jnp.abs(w_NM).max(0), 1e-12) / (2 * top - 1) if bits else None
    dead_N = jnp.diag(hessian_NN) == 0
    padded = -(-inputs // block) * block
    more = padded - inputs
    w_PM = jnp.pad(jnp.where(dead_N[:, None], 0, w_NM).astype(jnp.float32), ((0, more), (0, 0)))
    upper_PP = jnp.eye(padded).at[:inputs, :inputs].set(inverse_factor(hessian_NN, damping))
    given_PM = None if mask_NM is None else jnp.pad(mask_NM, ((0, more), (0, 0)))

    def prune_block(w_PM: Array, start: Array) -> tuple[Array, tuple[Array, Array]]:
        rows = lambda x: jax.lax.dynamic_slice_in_dim(x, start, block)  # noqa: E731
        w_BM, upper_BP = rows(w_PM), rows(upper_PP)
        upper_BB = jax.lax.dynamic_slice_in_dim(upper_BP, start, block, 1)
        price_B1 = jnp.square(jnp.diag(upper_BB))[:, None]
        if given_PM is not None:
            mask_BM = rows(given_PM)
        elif pair:
            mask_BM = jnp.ones(w_BM.shape, bool)
        else:
            real_BM = jnp.broadcast_to((start + jnp.arange(block) < inputs)[:, None], w_BM.shape)
            scores = jnp.square(w_BM) / price_B1
            gone = _gone(density, jnp.minimum(block, inputs - start) * outputs)
            mask_BM = prune.drop_lowest(scores.ravel(), real_BM.ravel(), gone).reshape(w_BM.shape)

        def choose(i: Array, w_BM: Array, mask_BM: Array) -> Array:
            n, m = pair or (1, 1)
            part = lambda x: jax.lax.dynamic_slice_in_dim(x, i, m)  # noqa: E731
            order = jnp.argsort(jnp.square(part(w_BM)) / part(price_B1), axis=0)
            return jax.lax.dynamic_update_slice_in_dim(mask_BM, jnp.argsort(order, axis=0) >= m - n, i, 0)

        def prune_input(i: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            w_BM, mask_BM, made_BM, error_BM = state
            if pair:
                mask_BM = jax.lax.cond(i % pair[1] == 0, choose, lambda i, w, mask: mask, i, w_BM, mask_BM)
            made_M = jnp.where(mask_BM[i], w_BM[i], 0)
            if scale_M is not None:
                made_M = scale_M * jnp.clip(jnp.round(made_M / scale_M), -top, top - 1)
            error_M = (w_BM[i] - made_M) / upper_BB[i, i]
            # Left of its diagonal the factor is zero: inputs that are done stay as they are.
            w_BM = w_BM - upper_BB[i][:, None] * error_M[None]
            return w_BM, mask_BM, made_BM.at[i].set(made_M), error_BM.at[i].set(error_M)

        zeros = jnp.zeros_like(w_BM)
        _, mask_BM, made_BM, error_BM = jax.lax.fori_loop(0, block, prune_input, (w_BM, mask_BM, zeros, zeros))
        later_BP = jnp.where((jnp.arange(padded) >= start + block)[None], upper_BP, 0)
        return w_PM - jnp.matmul(later_BP.T, error_BM, precision="highest"), (made_BM, mask_BM)

    _, (made, mask) = jax.lax.scan(prune_block, w_PM, jnp.arange(0, padded, block))
    made_NM, mask_NM = (x.reshape(padded, outputs)[:inputs] for x in (made, mask))
    return Pruned(made_NM, mask_NM & ~dead_N[:, None], scale_M)


def output_error(
    w_NM: Float[Array, "N M"], made_NM: Float[Array, "N M"], hessian_NN: Float[Array, "N N"]
) -> Float[Array, ""]:
    """Compute the squared error of a kernel's outputs on the calibration rows over the squares of the outputs.

    Example:
      >>> w, made = jnp.array([[3.0], [4.0]]), jnp.array([[0.0], [4.0]])
      >>> round(float(lottery.calibrated.output_error(w, made, jnp.eye(2))), 2)
      0.36
    """
    square = lambda x_NM: jnp.sum(x_NM * jnp.matmul(hessian_NN, x_NM, precision="highest"))  # noqa: E731
    whole = square(w_NM)
    return jnp.where(whole > 0, square(w_NM - made_NM) / jnp.where(whole > 0, whole, 1), 0.0)


def outlier_ratio(scores: Float[Array, "*N"], factor: float = 5.0) -> Float[Array, ""]:
    """Compute OWL's outlier ratio: the share of scores above `factor` times their mean (Yin et al. 2024, equation 2).

    Example:
      >>> float(lottery.calibrated.outlier_ratio(jnp.array([1.0, 1.0, 1.0, 20.0]), factor=3.0))
      0.25
    """
    return jnp.mean(scores > factor * jnp.mean(scores))


def reap(
    weights_TK: Float[Array, "T K"], experts_TK: Int[Array, "T K"], norms_TK: Float[Array, "T K"], experts: int
) -> Float[Array, " E"]:
    """Score experts by REAP: mean of gate times output norm over the tokens that chose it (Lasby et al. 2025).

    arXiv:2510.13999, equation 9. An expert that no token chose scores 0.

    Args:
      weights_TK: of the K experts of each token.
      experts_TK: their numbers; E for a choice that was dropped.
      norms_TK: of what they put out, before the weight.
      experts: E.

    Example:
      >>> weights, norms = jnp.array([[0.5], [1.0]]), jnp.array([[2.0], [3.0]])
      >>> lottery.calibrated.reap(weights, jnp.array([[1], [1]]), norms, 2).tolist()
      [0.0, 2.0]
    """
    chosen_TKE = experts_TK[..., None] == jnp.arange(experts)[None, None]
    total_E = jnp.sum(jnp.where(chosen_TKE, (weights_TK * norms_TK)[..., None], 0), (0, 1))
    return total_E / jnp.maximum(chosen_TKE.sum((0, 1)), 1)
