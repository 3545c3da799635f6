"""Objective, gradient and curvature of the Huber loss of a law, for many parameter vectors side by side.

Two ways to the same numbers. Any law can be differentiated by JAX. A sum of power-law terms has a closed form: with
p_k the share of term k in the loss and z_k its row of (1, +-features), the slopes are p_k z_k, and every sum over rows
is a product of a fixed matrix with weights. That needs six arrays of rows x fits where differentiating needs thirty,
and runs in numpy: nothing to compile, and exponentials and logarithms of float64 that are two and six times faster than
XLA's on a CPU.

Writing psi for Huber's derivative, there are two curvatures, as lower triangles:

- IRLS: J' diag(w psi(r) / r) J, which majorises, so its step descends from anywhere; its diagonal damps both;
- Newton: J' diag(w [|r| <= delta]) J + sum_r w psi(r) Hessian(log L), exact, so the end is reached quadratically.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# A factor of a term: feature ^ (sign x exponent); a term: coefficient x its factors.
Factor = tuple[str, str, float]
Term = tuple[str, tuple[Factor, ...]]
Evaluate = Callable[[Any, Any], "Point"]


class Point(NamedTuple):
    """At S vectors of parameters: objective [S], gradient [P, S], a curvature's triangle [T, S], IRLS diagonal [P, S].

    Where terms share an exponent the diagonal is a bound from above: it only damps.
    """

    objective: Any
    gradient: Any
    curvature: Any
    diagonal: Any


class Weights(NamedTuple):
    """Huber's parts [R, S] times the rows' weights: loss, psi, and the two curvatures by residual."""

    loss: Any
    pull: Any
    inside: Any
    irls: Any


def lower(size: int) -> list[tuple[int, int]]:
    """Indices of a lower triangle in the order curvatures are stacked in."""
    return [(i, j) for i in range(size) for j in range(i + 1)]


def _weigh(residual_RS: Any, weights_RS: Any, delta: Any, xp: Any) -> Weights:
    """With c = clip(r), Huber's loss is c (r - c / 2), and psi / r is min(1, delta / |r|)."""
    large = xp.abs(residual_RS)
    clipped = xp.clip(residual_RS, -delta, delta)
    pull = weights_RS * clipped
    return Weights(
        loss=pull * (residual_RS - 0.5 * clipped),
        pull=pull,
        inside=weights_RS * (large <= delta),
        irls=weights_RS * (delta / xp.maximum(large, delta)),
    )


def by_autodiff(predict: Callable[..., Array], target_R1: Array, delta: Array, *, newton: bool) -> Evaluate:
    """Curvature of any law; `predict` takes P arrays [1, S] and gives log losses [R, S].

    The curvature is Newton's, or without `newton` that of IRLS, at a third of the cost.
    """

    def evaluate(phi_PS: Array, weights_RS: Array) -> Point:
        size, count = phi_PS.shape
        columns = tuple(phi_PS[i : i + 1] for i in range(size))
        basis = [tuple(jnp.full((1, count), float(i == j)) for j in range(size)) for i in range(size)]
        value_RS, push = jax.linearize(predict, *columns)
        slopes = [push(*direction) for direction in basis]
        parts = _weigh(value_RS - target_R1, weights_RS, delta, jnp)
        objective = jnp.sum(parts.loss, 0)
        gradient = jnp.stack([jnp.sum(slope * parts.pull, 0) for slope in slopes])
        diagonal = jnp.stack([jnp.sum(slope * slope * parts.irls, 0) for slope in slopes])
        if not newton:
            irls = [jnp.sum(slopes[i] * slopes[j] * parts.irls, 0) for i, j in lower(size)]
            return Point(objective, gradient, jnp.stack(irls), diagonal)

        def pulled(*q: Array) -> tuple[Array, ...]:
            _, back = jax.vjp(predict, *q)
            return back(parts.pull)

        _, push_twice = jax.linearize(pulled, *columns)
        bends = [push_twice(*direction) for direction in basis]
        exact = [jnp.sum(slopes[i] * slopes[j] * parts.inside, 0) + bends[i][j][0] for i, j in lower(size)]
        return Point(objective, gradient, jnp.stack(exact), diagonal)

    return evaluate


class Terms:
    """A sum of power-law terms on given rows, its raw coefficients taken at the means of the log features.

    Args:
      terms: of the law.
      names: its parameters, in the order of phi.
      features: [R, 1] by name.
      means: of the features; zeros give phi = theta.
      dtype: everything is computed in.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        names: Sequence[str],
        features: Mapping[str, Float[np.ndarray, "R 1"]],
        means: Mapping[str, float],
        dtype: Any = np.float64,
    ):
        one_R1 = np.ones_like(next(iter(features.values())))
        self.size = len(names)
        self.where = [[names.index(c)] + [names.index(exponent) for exponent, _, _ in factors] for c, factors in terms]
        self.dtype = np.dtype(dtype)
        design = [
            np.concatenate([one_R1] + [sign * (features[f] - means[f]) for _, f, sign in factors], 1)
            for _, factors in terms
        ]
        self.design = [matrix.astype(dtype) for matrix in design]
        self.pairs = [(k, n) for k in range(len(terms)) for n in range(k + 1)]
        self.entries = {
            (k, n): [(a, b) for a in range(len(self.where[k])) for b in range(len(self.where[n])) if k != n or b <= a]
            for k, n in self.pairs
        }
        meet = np.bincount(np.concatenate(self.where), minlength=self.size)
        # (a + b)^2 <= 2 (a^2 + b^2): squares by term stand for the square of what terms sharing an exponent add up to.
        self.squares = [
            (matrix**2 * meet[index]).T.astype(dtype) for index, matrix in zip(self.where, design, strict=True)
        ]
        self.products = {
            (k, n): np.stack([design[k][:, a] * design[n][:, b] for a, b in entries]).astype(dtype)
            for (k, n), entries in self.entries.items()
        }

    def shares(
        self, phi_PS: Float[np.ndarray, "P S"], room: "Room | None" = None
    ) -> tuple[Float[np.ndarray, "R S"], list[Float[np.ndarray, "R S"]]]:
        """Log losses, and every term's share of the loss; in `room`, if given, until its next use."""
        room, count = room or Room(self.dtype), phi_PS.shape[1]
        total, value = (room.take(name, len(self.design[0]), count) for name in ("total", "value"))
        powers = []
        for k, (index, matrix) in enumerate(zip(self.where, self.design, strict=True)):
            power = room.take(f"term {k}", len(matrix), count)
            if len(index) == 1:  # the same on every row
                np.copyto(power, np.exp(phi_PS[index]))
            else:
                # A column of the design times a row of phi is an outer product: BLAS sums a term's factors in one go.
                np.exp(np.matmul(matrix, phi_PS[index], out=power), out=power)
            powers.append(power)
            np.add(total, power, out=total) if k else np.copyto(total, power)
        # Somewhere a term overflows, or all of them vanish: relative to the largest term nothing does.
        far = 1 / np.finfo(self.dtype).tiny ** 0.8
        if not (1 / far < total.min() and total.max() < far):
            parts = [matrix @ phi_PS[index] for index, matrix in zip(self.where, self.design, strict=True)]
            top = np.maximum.reduce(parts)
            powers = [np.exp(part - top) for part in parts]
            total = sum(powers[1:], powers[0])
            value = top + np.log(total)
        else:
            np.log(total, out=value)
        np.divide(1.0, total, out=total)
        for power in powers:
            power *= total
        return value, powers

    def gather(
        self, pair: tuple[int, int], weighed_RS: Float[np.ndarray, "R S"], total: dict[tuple[int, int], Any]
    ) -> None:
        """Add the sums over rows of a pair of terms to a lower triangle, where their parameters meet."""
        k, n = pair
        summed = self.products[pair] @ weighed_RS
        for row, (a, b) in zip(summed, self.entries[pair], strict=True):
            i, j = self.where[k][a], self.where[n][b]
            # A pair of different terms stands for both its orders; they meet where an exponent is shared.
            twice = 2.0 * row if i == j and k != n else row
            place = (max(i, j), min(i, j))
            total[place] = total[place] + twice if place in total else twice


class Room:
    """Arrays that are used again: a fresh one of this size costs its page faults, more than what is computed in it."""

    def __init__(self, dtype: Any = np.float64):
        self._flat: dict[str, np.ndarray] = {}
        self._dtype = dtype

    def take(self, name: str, rows: int, count: int) -> Float[np.ndarray, "R S"]:
        """A contiguous [rows, count] under a name, with whatever was in it."""
        if name not in self._flat or len(self._flat[name]) < rows * count:
            self._flat[name] = np.empty(rows * count, self._dtype)
        return self._flat[name][: rows * count].reshape(rows, count)


def by_terms(
    terms: Terms, target_R1: Float[np.ndarray, "R 1"], delta: float, *, newton: bool
) -> Callable[[np.ndarray, np.ndarray], Point]:
    """Curvature of a sum of power-law terms, in numpy; see `by_autodiff`."""
    room, target = Room(terms.dtype), target_R1.astype(terms.dtype)

    def evaluate(phi_PS: np.ndarray, weights_RS: np.ndarray) -> Point:
        rows, count = len(target_R1), phi_PS.shape[1]
        residual, share = terms.shares(phi_PS, room)
        # Few arrays, each used for several things: together they stay in the cache.
        clipped, pull, product = (room.take(name, rows, count) for name in ("total", "pull", "product"))
        residual -= target
        np.clip(residual, -delta, delta, out=clipped)
        np.multiply(weights_RS, clipped, out=pull)
        # Huber's loss is c (r - c / 2) with c = clip(r), and psi / r is min(1, delta / |r|).
        objective = np.einsum("rs,rs->s", pull, residual) - 0.5 * np.einsum("rs,rs->s", pull, clipped)
        inside = clipped == residual
        irls = np.abs(residual, out=residual)
        np.maximum(irls, delta, out=irls)
        np.divide(delta, irls, out=irls)
        irls *= weights_RS
        if newton:
            weight = np.multiply(weights_RS, inside, out=clipped)
            weight -= pull
        else:
            weight = irls
        gradient, diagonal = np.zeros_like(phi_PS), np.zeros_like(phi_PS)
        curvature: dict[tuple[int, int], Any] = {}
        for k, index in enumerate(terms.where):
            summed = terms.design[k].T @ np.multiply(pull, share[k], out=product)
            if newton:
                terms.gather((k, k), product, curvature)
            np.multiply(share[k], share[k], out=product)
            product *= irls
            squared = terms.squares[k] @ product
            for row, i in enumerate(index):
                gradient[i] += summed[row]
                diagonal[i] += squared[row]
            weighed = np.multiply(weight, share[k], out=room.take("weighed", rows, count))
            for n in range(k + 1):
                terms.gather((k, n), np.multiply(weighed, share[n], out=product), curvature)
        return Point(objective, gradient, np.stack([curvature[place] for place in lower(terms.size)]), diagonal)

    return evaluate
