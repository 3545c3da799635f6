"""The plain path at tiles large enough to be multiplied in several heights, against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.kernels.spec import ContractionOperands, ContractionSpec, GroupedOperands, GroupedSpec
from moe.kernels.tiling import Tiling
from moe.kernels.xla import mixture, ops

R, K, N, G, TILE = 300, 24, 16, 6, 128
FLOAT = np.dtype("float32")
RNG = np.random.default_rng(0)
X, W, DY = (RNG.normal(size=shape).astype(np.float32) for shape in ((R, K), (G, K, N), (R, N)))


@jax.jit
def both(x, dy, sizes):
    made = ops.grouped(GroupedOperands(x, (jnp.asarray(W),), (), sizes), GroupedSpec(FLOAT, Tiling(rows=TILE)))
    return made, ops.contract(ContractionOperands(x, dy, sizes), ContractionSpec(FLOAT, Tiling(rows=TILE)))


def test_heights_cover_the_tile():
    assert ops._heights(TILE) == (48, 128)
    assert ops._heights(48) == (18, 48) and ops._heights(40) == (40,)


@pytest.mark.parametrize(
    "sizes",
    [
        [50] * 6,
        [0, 0, 300, 0, 0, 0],
        [1, 2, 3, 4, 5, 6],
        [0] * 6,
        [129, 0, 127, 1, 0, 40],
        [10, 10, 10, 10, 10, 250],
        [295, 1, 1, 1, 1, 1],  # the last tiles would reach past the end
        [0, 0, 0, 0, 0, 300],
        [300, 5, 0, 0, 0, 0],  # more than there are rows
    ],
    ids=str,
)
def test_every_height_gives_the_groups_own_product(sizes):
    groups = np.repeat(np.arange(G), sizes)[:R]
    live = len(groups)
    x, dy = X.copy(), DY.copy()
    x[live:], dy[live:] = np.nan, np.nan  # rows past the sum are not looked at
    made, gradient = both(x, dy, jnp.array(sizes, jnp.int32))
    expected = np.zeros((R, N))
    expected[:live] = np.einsum("rk,rkn->rn", X[:live].astype(float), W[groups].astype(float))
    np.testing.assert_allclose(made, expected, atol=2e-5)
    wanted = np.zeros((G, K, N))
    np.add.at(wanted, groups, np.einsum("rk,rn->rkn", X[:live].astype(float), DY[:live].astype(float)))
    np.testing.assert_allclose(gradient, wanted, atol=1e-4)


def plain_mixture(x, gate, up, down, groups, tokens, weights):
    """The same by a product per row."""
    hidden = jax.nn.silu(jnp.einsum("md,mdf->mf", x[tokens], gate[groups]))
    hidden *= jnp.einsum("md,mdf->mf", x[tokens], up[groups])
    rows = jnp.einsum("mf,mfd->md", hidden, down[groups]) * weights[:, None]
    return jnp.zeros_like(x).at[tokens].add(rows)


@pytest.mark.parametrize("sizes", [[50, 0, 13, 1], [0, 0, 64, 0], [0, 0, 0, 0], [10, 20, 20, 14]], ids=str)
def test_a_mixture_in_one_loop_and_its_gradients(sizes):
    """Groups of several tiles, of none, and rows past the sum whose tokens are NaN."""
    t, m, d, f = 20, 64, 6, 10
    rng = np.random.default_rng(1)
    x, gate, up, down = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((t, d), (4, d, f), (4, d, f), (4, f, d))
    )
    live = sum(sizes)
    tokens = jnp.asarray(np.where(np.arange(m) < live, rng.integers(0, t - 1, m), t - 1), jnp.int32)
    weights, cotangent = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in (m, (t, d)))
    groups = np.repeat(np.arange(4), sizes)

    def ours(x, gate, up, down, weights):
        x = x.at[t - 1].set(jnp.nan)
        y = mixture.mixture(x, gate, up, down, jnp.array(sizes, jnp.int32), tokens, weights, 16)
        return (y * cotangent).sum()

    def theirs(x, gate, up, down, weights):
        return (plain_mixture(x, gate, up, down, groups, tokens[:live], weights[:live]) * cotangent).sum()

    args = (x, gate, up, down, weights)
    found, expected = (jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4)))(*args) for loss in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4), found, expected)
