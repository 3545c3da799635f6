"""Batch statistics taken anew, paths, sharpness and overlap rows, on a network small enough to check by hand."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import lottery_digits
from lottery import connectivity
from lottery import masks as masks_lib
from tessera.data.images import Images, ImageSplits
from tessera.infra.schema import completed
from tessera.models.convolution import batch_statistics, conv
from tessera.models.registry import STATISTICS, resnet
from tessera.models.vision import ResNetConfig
from tessera.tickets import probes
from tessera.tickets.setup import SCHEMA, make_setup


def images(count, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, count).astype(np.int32)
    return Images(generator.normal(size=(count, 4, 4, 1)).astype(np.float32), labels)


SPLITS = ImageSplits(images(40), images(10, 1), images(12, 2), 3)


def test_statistics_taken_anew_are_the_examples_own():
    x = jnp.asarray(images(24, 5).images).reshape(3, 8, 4, 4, 1)
    network = resnet(ResNetConfig(blocks=1, widths=(2,), classes=3), x[0])
    params = network.init(jax.random.key(0))
    got = probes.refreshed(network, params, (x, x))[STATISTICS]["stem_norm"]
    means, variances = zip(*(batch_statistics(conv(part, params["stem_conv"]["kernel"])) for part in x), strict=True)
    np.testing.assert_allclose(got["mean"], np.mean(means, axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got["var"], np.mean(variances, axis=0), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def setup():
    config = completed(SCHEMA, lottery_digits.get_config())
    config.model = ConfigDict({"hidden": (5,)})
    config.score_inputs = ConfigDict({"batches": 1, "batch_size": 5})
    return make_setup(config, SPLITS)


def test_paths_are_those_of_a_plain_loop(setup):
    a, b = (jax.vmap(setup.network.init)(jax.random.split(jax.random.key(i), 2)) for i in (0, 1))
    rows = probes.path_rows(setup, a, b, probes.AnalysisConfig(points=3, examples=20))
    one, two = (jax.tree.map(lambda leaf: leaf[1], tree) for tree in (a, b))
    for alpha, error in zip(rows[1]["alpha"], rows[1]["error"], strict=True):
        logits = setup.network.apply(connectivity.interpolate(one, two, alpha), jnp.asarray(SPLITS.test.images))
        wrong = np.mean(np.argmax(np.asarray(logits), 1) != SPLITS.test.labels)
        assert error == pytest.approx(float(wrong), abs=1e-6)
    errors = rows[1]["error"]
    assert rows[1]["instability"] == pytest.approx(max(errors) - (errors[0] + errors[2]) / 2, abs=1e-6)


def test_a_trained_curve_lies_lower_than_the_line_and_an_untrained_one_on_it(setup):
    a, b = (jax.vmap(setup.network.init)(jax.random.split(jax.random.key(i), 2)) for i in (0, 1))
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), a)
    still = probes.AnalysisConfig(points=5, examples=20, curve_steps=1, curve_learning_rate=1e-12)
    for row in probes.path_rows(setup, a, b, still):
        np.testing.assert_allclose(row["curve_loss"], row["loss"], rtol=1e-5)
        assert row["curve_barrier"] == pytest.approx(row["barrier"], abs=1e-6)
    moved = probes.AnalysisConfig(points=5, examples=20, curve_steps=150, curve_learning_rate=0.03)
    for row in probes.path_rows(setup, a, b, moved, part="train", masks=ones):
        assert row["curve_loss"][2] < row["loss"][2] - 0.1
        assert (row["curve_loss"][0], row["curve_loss"][4]) == pytest.approx((row["loss"][0], row["loss"][4]))


def test_sharpness_is_that_of_the_dense_hessian(setup):
    params = jax.vmap(setup.network.init)(jax.random.split(jax.random.key(2), 1))
    mask = jax.tree.map(lambda p: jax.random.uniform(jax.random.key(p.size), p.shape) < 0.5, params)
    params = masks_lib.apply(params, mask)
    config = probes.AnalysisConfig(examples=20, lanczos=25)
    (row,) = probes.sharpness_rows(setup, params, mask, config)
    x, y = (part.reshape(-1, *part.shape[2:]) for part in probes._examples(setup, 20))
    one = jax.tree.map(lambda leaf: leaf[0], params)
    flat, unravel = jax.flatten_util.ravel_pytree(one)
    keep = np.asarray(jax.flatten_util.ravel_pytree(jax.tree.map(lambda m: m[0], mask))[0])
    hessian = jax.jit(jax.hessian(lambda v: setup.loss(unravel(v), (x, y))))(flat)
    want = np.linalg.eigvalsh(np.asarray(hessian, np.float64)[keep][:, keep])[-1]
    assert row["eigenvalue"] == pytest.approx(want, rel=1e-3, abs=max(row["residual"], 1e-5))


def test_overlap_rows_cover_every_pair():
    mask = {"kernel": jnp.asarray(np.random.default_rng(0).random((3, 10, 10)) < 0.5)}
    rows = probes.overlap_rows(mask, (4, 5, 6), {"kernel": True})
    assert {(row["first"], row["second"]) for row in rows} == {(4, 5), (4, 6), (5, 6)}
    whole = [row for row in rows if row["path"] == "*"]
    assert all(0.7 < row["ratio"] < 1.3 for row in whole)
