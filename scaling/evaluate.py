"""Evaluate a law on rows for many parameter vectors side by side, float64.

A sum of power-law terms is evaluated in numpy, where exponentials and logarithms of float64 are two and six times
faster than XLA's on a CPU and nothing is compiled. Any other law is a function in `jax.numpy`, compiled for a few
padded shapes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Factor = tuple[str, str, float]
"""(exponent, feature, sign): the factor feature ^ (sign x exponent) of a term."""
Term = tuple[str, tuple[Factor, ...]]
"""(coefficient, factors): a power-law term."""
LogLoss = Callable[[Mapping[str, Array], Mapping[str, Array]], Array]
"""(raw parameters by name [1, S], features by name [R, 1]) -> log loss [R, S]."""


class ScratchBuffers:
    """Named arrays that are allocated once and reused: fresh ones cost page faults, more than the arithmetic in them.

    Args:
      dtype: of all buffers.
    """

    def __init__(self, dtype: Any = np.float64):
        self._flat: dict[str, np.ndarray] = {}
        self._dtype = dtype

    def get(self, name: str, rows: int, count: int) -> Float[np.ndarray, "R S"]:
        """Return an uninitialized contiguous buffer [rows, count]; valid until the next call with this name."""
        if name not in self._flat or len(self._flat[name]) < rows * count:
            self._flat[name] = np.empty(rows * count, self._dtype)
        return self._flat[name][: rows * count].reshape(rows, count)


class Terms:
    """A sum of power-law terms on given rows, with log features centered at `means`.

    Args:
      terms: of the law.
      names: its parameters, in the order of phi.
      features: [R, 1] by name.
      means: of the features; zeros give phi = theta.
      dtype: of all arithmetic.
      held: raw values of coefficients and exponents that are no parameters; a term whose coefficient is held is not
        centered.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        names: Sequence[str],
        features: Mapping[str, Float[np.ndarray, "R 1"]],
        means: Mapping[str, float],
        dtype: Any = np.float64,
        held: Mapping[str, float] | None = None,
    ):
        one_R1, held = np.ones_like(next(iter(features.values()))), held or {}
        self.size = len(names)
        self.where: list[list[int]] = []
        self.dtype = np.dtype(dtype)
        design, self.fixed = [], []
        for coefficient, factors in terms:
            parts = [(coefficient, one_R1)]
            for exponent, feature, sign in factors:
                mixed = coefficient not in held and exponent not in held
                parts.append((exponent, sign * (features[feature] - (means[feature] if mixed else 0.0))))
            free = [(name, column) for name, column in parts if name not in held]
            self.where.append([names.index(name) for name, _ in free])
            design.append(np.concatenate([column for _, column in free] or [one_R1[:, :0]], 1))
            offset = [held[name] * column for name, column in parts if name in held]
            self.fixed.append(np.sum(offset, axis=0).astype(dtype) if offset else None)
        self.design = [matrix.astype(dtype) for matrix in design]
        self.pairs = [(k, n) for k in range(len(terms)) for n in range(k + 1)]
        self.entries = {
            (k, n): [(a, b) for a in range(len(self.where[k])) for b in range(len(self.where[n])) if k != n or b <= a]
            for k, n in self.pairs
        }
        meet = np.bincount(np.concatenate(self.where).astype(int), minlength=self.size)
        # (a + b)^2 <= 2 (a^2 + b^2): squares by term bound the square of the sum over terms that share an exponent.
        self.squares = [
            (matrix**2 * meet[index]).T.astype(dtype) for index, matrix in zip(self.where, design, strict=True)
        ]
        self.products = {
            (k, n): np.array([design[k][:, a] * design[n][:, b] for a, b in entries]).astype(dtype)
            for (k, n), entries in self.entries.items()
        }

    def shares(
        self, phi_PS: Float[np.ndarray, "P S"], buffers: ScratchBuffers | None = None
    ) -> tuple[Float[np.ndarray, "R S"], list[Float[np.ndarray, "R S"]]]:
        """Compute log losses and the softmax share of every term in the loss.

        Args:
          phi_PS: parameters.
          buffers: the results are in them, if given, and valid until their next use.
        """
        buffers, count = buffers or ScratchBuffers(self.dtype), phi_PS.shape[1]
        total, value = (buffers.get(name, len(self.design[0]), count) for name in ("total", "value"))
        powers = []
        for k, (index, matrix) in enumerate(zip(self.where, self.design, strict=True)):
            power = buffers.get(f"term {k}", len(matrix), count)
            fixed = self.fixed[k]
            if len(index) == 1 and fixed is None:  # the same on every row
                np.copyto(power, np.exp(phi_PS[index]))
            elif fixed is not None:
                np.exp(np.add(matrix @ phi_PS[index], fixed, out=power), out=power)
            else:
                # A column of the design times a row of phi is an outer product: BLAS sums a term's factors in one go.
                np.exp(np.matmul(matrix, phi_PS[index], out=power), out=power)
            powers.append(power)
            np.add(total, power, out=total) if k else np.copyto(total, power)
        # Somewhere a term overflows, or all of them vanish: relative to the largest term nothing does.
        far = 1 / np.finfo(self.dtype).tiny ** 0.8
        if not (1 / far < total.min() and total.max() < far):
            parts = [
                matrix @ phi_PS[index] + (0 if fixed is None else fixed)
                for index, matrix, fixed in zip(self.where, self.design, self.fixed, strict=True)
            ]
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
        """Add a pair of terms' sums over rows to a lower triangle, at the places of their parameters."""
        k, n = pair
        if not self.entries[pair]:
            return
        summed = self.products[pair] @ weighed_RS
        for row, (a, b) in zip(summed, self.entries[pair], strict=True):
            i, j = self.where[k][a], self.where[n][b]
            # A pair of different terms stands for both its orders; they meet where an exponent is shared.
            twice = 2.0 * row if i == j and k != n else row
            place = (max(i, j), min(i, j))
            total[place] = total[place] + twice if place in total else twice


@partial(jax.jit, static_argnames=("log_loss", "names"))
def _predict(theta_PS: Array, features: Mapping[str, Array], *, log_loss: LogLoss, names: tuple[str, ...]) -> Array:
    return log_loss({name: theta_PS[i : i + 1] for i, name in enumerate(names)}, features)


def chunks(x: np.ndarray, size: int) -> list[np.ndarray]:
    """Split the last axis into chunks of `size`, the last one padded with its last column: one shape, one program."""
    padding = np.repeat(x[..., -1:], -x.shape[-1] % size, -1)
    padded_x = np.concatenate([x, padding], -1)
    return [np.ascontiguousarray(chunk) for chunk in np.split(padded_x, padded_x.shape[-1] // size, axis=-1)]


def padded(rows: int) -> int:
    """Number of rows after padding: few different ones, so few compiled programs when rows come one by one."""
    return 16 if rows <= 16 else 32 if rows <= 32 else -(-rows // 64) * 64


def pad_rows(x: np.ndarray, *, repeat: bool) -> np.ndarray:
    """Pad the first axis to `padded` rows, repeating the last row (or with zeros)."""
    missing = padded(len(x)) - len(x)
    return np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), mode="edge" if repeat else "constant")


def predict(
    theta_PS: Float[np.ndarray, "P S"],
    features: Mapping[str, Float[np.ndarray, "R 1"]],
    log_loss: LogLoss,
    names: tuple[str, ...],
    terms: tuple[Term, ...] = (),
    held: Mapping[str, float] | None = None,
) -> Float[np.ndarray, "R S"]:
    """Predict log losses of rows under raw parameters, float64.

    Args:
      theta_PS: raw parameters.
      features: by name.
      log_loss: the law.
      names: of its parameters, in the order of theta.
      terms: its power-law terms, if it is a sum of them and nothing else.
      held: raw values in them that are no parameters.
    """
    theta_PS = np.asarray(theta_PS, np.float64)
    if terms:
        with np.errstate(all="ignore"):
            return Terms(terms, names, features, dict.fromkeys(features, 0.0), held=held).shares(theta_PS)[0]
    rows = len(next(iter(features.values())))
    with jax.enable_x64(True):
        inputs = {name: jnp.asarray(pad_rows(np.asarray(x, np.float64), repeat=True)) for name, x in features.items()}
        out = [np.asarray(_predict(chunk, inputs, log_loss=log_loss, names=names)) for chunk in chunks(theta_PS, 32)]
    return np.concatenate(out, 1)[:rows, : theta_PS.shape[1]]
