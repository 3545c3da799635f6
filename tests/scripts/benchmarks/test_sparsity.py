"""That contestants compute what they stand for, and floors by hand."""

import jax
import numpy as np
import pytest

from scripts.benchmarks import sparsity


def test_every_contestant_is_the_layer_of_its_masked_weights():
    config = sparsity.SparsityBenchmark(d=128, ff=256, densities=(0.25,), blocks=(64,))
    keys = jax.random.split(jax.random.key(0), 3)
    x, w1, w2 = (jax.random.normal(k, s) for k, s in zip(keys, ((4, 128), (128, 256), (256, 128)), strict=True))
    dense = lambda a, b: np.maximum(np.asarray(x) @ a, 0) @ b  # noqa: E731
    whole = (np.asarray(w1), np.asarray(w2))
    found = sparsity.layers(config, w1, w2)
    want = {"neurons cut, 25%": dense(whole[0][:, :64], whole[1][:64]), sparsity.DENSE: dense(*whole)}
    for name, block in (("unstructured mask, w * m, 25%", 1), ("blocks of 64, 25%", 64)):
        masks = [sparsity.mask_of(w.shape, 0.25, block, seed) for seed, w in enumerate(whole)]
        assert all(mask.mean() == 0.25 for mask in masks)
        want[name] = dense(*(w * mask for w, mask in zip(whole, masks, strict=True)))
    assert set(want) | {"2:4 mask, w * m, 50%"} == set(found)
    for name, result in want.items():
        layer, *weights = found[name]
        np.testing.assert_allclose(layer(x, *weights), result, atol=2e-3)
        if "%" in name and "cut" not in name:
            value, (_, gradients) = sparsity._train(layer, x, *weights)()
            assert float(value) == pytest.approx(np.sum(result**2), rel=1e-4) and len(gradients) == 2
    masks = [sparsity.mask_of(w.shape, 0.25, seed=seed) for seed, w in enumerate(whole)]
    listed = sparsity._csr(x, w1, w2, 0.25)()
    np.testing.assert_allclose(listed.T, dense(whole[0] * masks[0], whole[1] * masks[1]), atol=2e-3)


def test_floors_are_flops_of_many_rows_and_bytes_of_few():
    many = {row.name: row for row in sparsity.counted("H200", 16384, 4096, 14336)}
    flops = 4 * 16384 * 4096 * 14336
    assert (
        many["dense"].seconds == pytest.approx(flops / 989.5e12, rel=0.01) and many["dense"].more["bound by"] == "FLOPs"
    )
    assert many["unstructured mask, w * m, 10%"].ratio[0] == 1
    assert many["2:4 by sparse tensor cores, 50%"].ratio[0] == pytest.approx(2)
    few = {row.name: row for row in sparsity.counted("v5p", 1, 4096, 14336)}
    assert few["dense"].more["bound by"] == "bytes" and "2:4 by sparse tensor cores, 50%" not in few
    assert few["blocks of 128, 10%"].ratio[0] == pytest.approx(10, rel=0.01)
