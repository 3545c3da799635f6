"""Cholesky solution of many small systems side by side, written out element by element."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

Pair = tuple[int, int]


def cholesky_solve(
    matrix: Mapping[Pair, Float[Array | np.ndarray, "S"]], right_PS: Float[Array | np.ndarray, "P S"], xp: Any = jnp
) -> tuple[Float[Array | np.ndarray, "P S"], Bool[Array | np.ndarray, "S"]]:
    """Solve S symmetric systems of P unknowns; `matrix[i, j]` for i >= j; `xp` is the arrays' numpy.

    Returns:
      The solutions, and whether each matrix was positive definite (if not, its solution means nothing).
    """
    size = right_PS.shape[0]
    columns = [xp.stack([matrix[i, j] for i in range(j, size)]) for j in range(size)]
    fine = xp.ones(right_PS.shape[1], bool)
    below: list[Any] = []
    inverse: list[Any] = []
    half: list[Any] = []
    rest = right_PS
    # Column by column: few operations on several rows, where single elements would be many on one.
    for k in range(size):
        pivot = columns[k][:1]
        fine &= pivot[0] > 0
        inverse.append(1.0 / xp.sqrt(xp.where(pivot > 0, pivot, 1.0)))
        below.append(columns[k][1:] * inverse[k])
        half.append(rest[:1] * inverse[k])
        rest = rest[1:] - below[k] * half[k]
        for j in range(k + 1, size):
            columns[j] = columns[j] - below[k][j - k - 1 :] * below[k][j - k - 1 : j - k]
    for k in reversed(range(size)):
        half[k] = half[k] * inverse[k]
        for j in range(k):
            half[j] = half[j] - below[j][k - j - 1 : k - j] * half[k]
    return xp.concatenate(half), fine
