import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import experts
from moe.gate import RouterConfig
from moe.layer import MoE, MoEConfig
from moe.upcycle import merge, upcycle

D, F, E = 6, 10, 4
DENSE = {name: {"kernel": leaf} for name, leaf in experts.initialize(D, F, 0, key=jax.random.key(0)).items()}
X = jax.random.normal(jax.random.key(1), (2, 5, D))


def test_an_upcycled_layer_computes_what_the_dense_one_did():
    routed = upcycle(DENSE, E, key=jax.random.key(2))
    y = jax.jit(MoE(MoEConfig(router=RouterConfig("top_k", E, 2)), D, F).apply)({"params": routed}, X)
    np.testing.assert_allclose(y, experts.dense({k: v["kernel"] for k, v in DENSE.items()}, X), rtol=1e-5, atol=1e-6)
    assert routed["router"]["kernel"].shape == (D, E) and jnp.abs(routed["router"]["kernel"]).max() > 0


def test_stacked_layers_and_noise():
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), DENSE)
    routed = upcycle(stacked, E, key=jax.random.key(2))
    assert routed["experts"]["up"]["kernel"].shape == (3, E, D, F) and routed["router"]["kernel"].shape == (3, D, E)
    np.testing.assert_array_equal(routed["experts"]["up"]["kernel"][1, 2], stacked["up"]["kernel"][1])
    noisy = upcycle(DENSE, E, key=jax.random.key(2), noise=0.1)["experts"]["up"]["kernel"]
    spread = (noisy - DENSE["up"]["kernel"][None]).std() / DENSE["up"]["kernel"].std()
    assert spread == pytest.approx(0.1, rel=0.15) and jnp.abs(noisy[0] - noisy[1]).max() > 0
    experts_of = upcycle(DENSE, E, key=jax.random.key(2), noise=0.1)["experts"]
    drawn = [np.asarray(experts_of[name]["kernel"] - DENSE[name]["kernel"][None]).ravel() for name in ("gate", "up")]
    assert abs(np.corrcoef(*drawn)[0, 1]) < 0.2  # each kernel has noise of its own


@pytest.mark.parametrize("method", ["mean", "slerp", "ties", "dare"])
def test_merging_copies_gives_the_dense_layer_back(method):
    stacked = jax.tree.map(lambda x: jnp.stack([x, -2 * x]), DENSE)
    routed = upcycle(stacked, E, key=jax.random.key(2))
    merged = merge(routed, stacked, method=method, key=jax.random.key(3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), merged, stacked)


def test_mean_by_load():
    routed = {"experts": {"up": {"kernel": jnp.arange(8.0).reshape(2, 2, 2)}}}
    np.testing.assert_allclose(merge(routed, weights=jnp.array([3.0, 1.0]))["up"]["kernel"], [[1, 2], [3, 4]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: merge(r, method="ties"), "pass base="),
        (lambda r: merge(r, DENSE, method="dare"), "pass key="),
        (lambda r: merge(r, weights=jnp.ones(3)), "weights of the 4 experts"),
        (lambda r: merge(r, DENSE, method="ties", density=0.0), "density=0.0"),
        (lambda r: upcycle(r, 2, key=jax.random.key(0)), "up and down kernels; this has"),
        (lambda r: upcycle(DENSE, 0, key=jax.random.key(0)), "experts=0"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(upcycle(DENSE, E, key=jax.random.key(2)))
