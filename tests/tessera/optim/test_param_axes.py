import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from tessera.models.transformer import Decoder, TransformerConfig
from tessera.models.vision import LeNet, MLPConfig
from tessera.optim.optimizer import decayed
from tessera.optim.param_axes import clip_units, matrix_axes


def decoder_params(scan=True):
    config = TransformerConfig(vocab_size=6, layers=2, width=8, heads=2, ff=12, tied=False, scan=scan)
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 3), jnp.int32))["params"]
    leaves, treedef = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return treedef.unflatten([jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None or isinstance(x, tuple))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@pytest.mark.parametrize("scan", [True, False])
def test_decay_spares_gains_even_when_stacked(scan):
    for path, flag in by_path(decayed(decoder_params(scan))).items():
        assert flag == (not path.endswith("gain")), path


def test_decay_spares_biases():
    params = LeNet(MLPConfig((3,))).init(jax.random.key(0), jnp.zeros((1, 4)))["params"]
    assert decayed(params) == {name: {"kernel": True, "bias": False} for name in ("dense0", "output")}


def test_first_and_last_layers_are_no_matrices_of_muon():
    leaf = {"kernel": jnp.zeros((4, 4))}
    params = {"dense0": leaf, "output": leaf, "head": leaf, "embed": {"table": jnp.zeros((4, 4))}}
    assert {path for path, axes in by_path(matrix_axes(params)).items() if axes is not None} == {"dense0/kernel"}


@pytest.mark.parametrize("scan", [True, False])
def test_muon_takes_hidden_kernels_as_matrices(scan):
    found = {path: axes for path, axes in by_path(matrix_axes(decoder_params(scan))).items() if axes is not None}
    prefix = "blocks" if scan else "blocks_1"
    assert len(found) == (7 if scan else 14)
    assert found[f"{prefix}/attention/query/kernel"] == contrib.MuonDimensionNumbers((-3,), (-2, -1))
    assert found[f"{prefix}/attention/output/kernel"] == contrib.MuonDimensionNumbers((-3, -2), (-1,))
    assert found[f"{prefix}/mlp/down/kernel"] == contrib.MuonDimensionNumbers((-2,), (-1,))


def test_muon_orthogonalises_every_layer_by_itself():
    params = decoder_params()
    tx = contrib.muon(1.0, muon_weight_dimension_numbers=matrix_axes, ns_steps=10)
    updates, _ = jax.jit(lambda p: tx.update(p, tx.init(p), p))(params)
    blocks = updates["blocks"]
    for name, rows in (("query", 8), ("output", 8)):
        for layer in range(2):
            matrix = np.asarray(blocks["attention"][name]["kernel"][layer]).reshape(rows, -1)
            singular = np.linalg.svd(matrix, compute_uv=False)
            # Newton-Schulz with Jordan's coefficients brings singular values near one, not to one.
            assert (singular > 0.6).all() and (singular < 1.25).all(), (name, layer, singular)


def test_units_of_stacked_layers_are_clipped_apart():
    params = decoder_params()
    grads = jax.tree.map(lambda x: 3.0 * jnp.roll(x, 1, axis=0), params)
    tx = clip_units(0.1)
    clipped, _ = tx.update(grads, tx.init(params), params)

    def expect(path, axis):
        weights, gradient = (np.asarray(by_path(tree)[path], np.float64) for tree in (params, grads))
        limit = 0.1 * np.maximum(np.sqrt((weights**2).sum(axis, keepdims=True)), 1e-3)
        size = np.sqrt((gradient**2).sum(axis, keepdims=True))
        np.testing.assert_allclose(
            by_path(clipped)[path], gradient * np.minimum(1, limit / size), rtol=1e-5, err_msg=path
        )

    expect("blocks/attention/key/kernel", (1,))
    expect("blocks/attention/output/kernel", (1, 2))
    expect("blocks/mlp/up/kernel", (1,))
    expect("blocks/mlp_norm/gain", (1,))
    expect("embed/table", (1,))
    expect("final_norm/gain", (0,))
    assert (clipped["head"]["kernel"] == grads["head"]["kernel"]).all()


def test_unstacked_matrices_are_clipped_as_optax_does():
    params = {"dense0": {"kernel": jnp.arange(6.0).reshape(3, 2), "bias": jnp.ones(2)}}
    grads = jax.tree.map(lambda x: x + 1, params)
    ours, theirs = clip_units(0.05), optax.adaptive_grad_clip(0.05)
    jax.tree.map(
        np.testing.assert_array_equal,
        ours.update(grads, ours.init(params), params)[0],
        theirs.update(grads, theirs.init(params), params)[0],
    )


def test_vectors_do_not_decay_however_they_are_stacked():
    """A gain, bias or penalty of every layer is a matrix by its shape alone."""
    stacked = {name: jnp.zeros((4, 8)) for name in ("gain", "bias", "scale", "penalty", "kernel", "table")}
    found = decayed({"blocks": stacked, "single": {"kernel": jnp.zeros(8)}})
    assert {name for name, flag in found["blocks"].items() if flag} == {"kernel", "table"}
    assert not found["single"]["kernel"]
