import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling.fitting.derivatives import lower
from scaling.fitting.newton import cholesky_solve


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
def test_cholesky_against_numpys_solver(xp):
    rng = np.random.default_rng(0)
    half = rng.normal(size=(6, 5, 7))
    full = np.einsum("ris,rjs->ijs", half, half)
    right = rng.normal(size=(5, 7))
    full[:, :, 3] *= -1.0
    with jax.enable_x64(True):
        matrix = {(i, j): xp.asarray(full[i, j]) for i, j in lower(5)}
        found, fine = cholesky_solve(matrix, xp.asarray(right), xp)
    np.testing.assert_array_equal(fine, np.arange(7) != 3)
    for s in np.flatnonzero(np.arange(7) != 3):
        np.testing.assert_allclose(found[:, s], np.linalg.solve(full[:, :, s], right[:, s]), rtol=1e-9)
