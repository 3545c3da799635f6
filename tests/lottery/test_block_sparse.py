"""Block tickets on the block-sparse kernel, with dense products of masked weights as the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lottery import block_sparse, criteria, masks, prune, transform
from tessera.models.transformer import Decoder, TransformerConfig, swiglu
from tessera.models.vision import LeNet, MLPConfig

LAYERS = ("dense0", "dense1", "output")


def kept(params, which, counts, structure):
    return jax.jit(lambda p: prune.keep(criteria.magnitude(p), masks.ones(p), which, counts, structure))(params)


def ticket(structure="64x64", keep=0.6):
    model = LeNet(MLPConfig((128, 64)))
    x = jax.random.normal(jax.random.key(1), (6, 192))
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    rng = np.random.default_rng(2)
    biases = {name: jnp.float32(0.1 * rng.normal(size=layer["bias"].shape)) for name, layer in params.items()}
    params = {name: {**layer, "bias": biases[name]} for name, layer in params.items()}
    which = masks.prunable(params, (("output/kernel", False),))
    units = prune.units(params, which, structure)
    counts = {path: max(round(keep * n), 1) for path, n in units.items()}
    mask = kept(params, which, counts, structure)
    return model, masks.apply(params, mask), mask, x


@pytest.mark.long
def test_a_block_ticket_of_lenet_computes_and_learns_what_the_masked_network_does():
    model, params, mask, x = ticket()
    packed = block_sparse.pack_chain(params, mask, LAYERS[:2])
    assert packed["dense0"]["kernel"].structure.live == int(np.asarray(mask["dense0"]["kernel"]).sum()) // 64**2
    run = jax.jit(lambda params: model.apply({"params": params}, x))
    logits = np.asarray(run(params))
    without = run({**params, "dense0": jax.tree.map(jnp.zeros_like, params["dense0"])})
    # Blocks of one layer that meet none of the next would leave a constant; logits have both signs.
    assert np.abs(logits - without).max() > 0.1 and logits.min() < 0 < logits.max()
    chain = jax.jit(lambda packed: block_sparse.apply_chain(packed, x, LAYERS))
    np.testing.assert_allclose(chain(packed), logits, rtol=1e-5, atol=1e-6)

    def blocks_only(packed, blocks):
        new = {
            name: {**packed[name], "kernel": packed[name]["kernel"]._replace(blocks=blocks[name])} for name in blocks
        }
        return {**packed, **new}

    def sparse_loss(blocks):
        return jnp.square(block_sparse.apply_chain(blocks_only(packed, blocks), x, LAYERS)).mean()

    def dense_loss(params):
        return jnp.square(model.apply({"params": masks.apply(params, mask)}, x)).mean()

    blocks = {name: packed[name]["kernel"].blocks for name in LAYERS[:2]}
    got, want = jax.jit(jax.grad(sparse_loss))(blocks), jax.jit(jax.grad(dense_loss))(params)
    for name in blocks:
        back = block_sparse.unpack(packed[name]["kernel"]._replace(blocks=got[name]))
        np.testing.assert_allclose(back, want[name]["kernel"], rtol=1e-4, atol=1e-6)
    # One step of any optimizer on the blocks is the step under the mask.
    tx = transform.sparse(optax.adam(0.1), mask)
    updates, _ = jax.jit(tx.update)(want, tx.init(params), params)
    block_updates, _ = jax.jit(optax.adam(0.1).update)(got, optax.adam(0.1).init(blocks))
    after = optax.apply_updates(blocks, block_updates)
    back = block_sparse.unpack(packed["dense0"]["kernel"]._replace(blocks=after["dense0"]))
    want_after = optax.apply_updates(params, updates)["dense0"]["kernel"]
    settled = np.abs(np.asarray(want["dense0"]["kernel"])) > 1e-7  # where Adam's division is well conditioned
    np.testing.assert_allclose(np.asarray(back)[settled], np.asarray(want_after)[settled], rtol=1e-3, atol=1e-3)


def test_the_decoders_feed_forward_layer_runs_on_its_block_ticket():
    config = TransformerConfig(vocab_size=11, layers=2, width=64, heads=2, ff=128)
    params = jax.jit(Decoder(config).init)(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))["params"]
    mlp = {name: leaf["kernel"] for name, leaf in params["blocks"]["mlp"].items()}
    which = masks.prunable(params, (("attention/", False),))
    counts = {path: round(0.5 * n) for path, n in prune.units(params, which, "64x64").items()}
    mask = jax.device_get(kept(params, which, counts, "64x64"))["blocks"]["mlp"]
    mlp = jax.device_get(mlp)
    x = jax.random.normal(jax.random.key(1), (2, 5, 64))
    for layer in range(2):
        given = {name: (kernel[layer], mask[name]["kernel"][layer]) for name, kernel in mlp.items()}
        packed = {name: block_sparse.pack(*map(jnp.asarray, pair)) for name, pair in given.items()}

        dense = {name: np.where(live, kernel, 0) for name, (kernel, live) in given.items()}
        found, expected = jax.jit(lambda x, a, b: (block_sparse.swiglu(x, **a), swiglu(x, **b)))(x, packed, dense)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_named():
    _, params, mask, _ = ticket()
    with pytest.raises(ValueError, match="no layer dense7"):
        block_sparse.pack_chain(params, mask, ("dense7",))
    with pytest.raises(ValueError, match="block=32"):
        block_sparse.pack_chain(params, mask, LAYERS[:2], block=32)


def test_pruned_weights_of_a_live_block_stay_pruned():
    generator = np.random.default_rng(0)
    kernel, mask = generator.normal(size=(128, 64)), generator.random((128, 64)) < 0.5
    packed = block_sparse.pack(jnp.asarray(kernel, jnp.float32), jnp.asarray(mask))
    np.testing.assert_array_equal(block_sparse.unpack(packed), np.where(mask, kernel.astype(np.float32), 0))
