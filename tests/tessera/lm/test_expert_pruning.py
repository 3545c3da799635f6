"""Experts pruned by load: masks, and the smaller decoder that comes out."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lottery import masks as masks_lib
from lottery import prune
from moe.gate import RouterConfig
from moe.layer import MoEConfig
from tessera.lm.expert_pruning import drop_experts, load_scores, prune_experts
from tessera.models.lm_loss import at, replaced, router_paths
from tessera.models.transformer import Decoder, TransformerConfig

TOKENS = jax.random.randint(jax.random.key(5), (2, 8), 0, 11, jnp.int32)
MOE = MoEConfig(every=2, router=RouterConfig("sigmoid", 6, 2))
CONFIG = TransformerConfig(vocab_size=11, layers=4, width=16, heads=2, ff=24, mlp="routed", moe=MOE)
LOAD = np.array([[5.0, 0.0, 3.0, 9.0, 1.0, 4.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]])
STAY = [[0, 3, 5], [3, 4, 5]]


def params_of(config):
    return jax.jit(Decoder(config).init)(jax.random.key(1), TOKENS)["params"]


def filled(config, value):
    """Parameters that are all one number."""
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(1), TOKENS)["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(np.full(leaf.shape, value, leaf.dtype)), shapes)


@pytest.mark.long
@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_smaller_decoder_is_the_whole_one_that_never_chooses_what_was_cut(scan):
    config = replace(CONFIG, scan=scan)
    params = params_of(config)
    masks = prune_experts(params, LOAD, 3, config)
    small, smaller = drop_experts(params, masks, config)
    assert smaller.moe.router.experts == 3
    wanted = jax.eval_shape(Decoder(smaller).init, jax.random.key(1), TOKENS)["params"]
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, wanted)

    # A bias of minus infinity, so to speak: a sigmoid router then never selects.
    whole = params
    for i, path in enumerate(router_paths(config)):
        stay = np.isin(np.arange(6)[None], STAY[i]) if not scan else np.stack([np.isin(np.arange(6), s) for s in STAY])
        never = jnp.where(jnp.asarray(stay.reshape(at(params, path)["router"]["bias"].shape)), 0.0, -1e6)
        whole = replaced(whole, (*path, "router", "bias"), never)
    expected = jax.jit(Decoder(config).apply)({"params": whole}, TOKENS)
    found = jax.jit(Decoder(smaller).apply)({"params": small}, TOKENS)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_masks_are_the_lotterys():
    params = filled(CONFIG, 1)
    masks = prune_experts(params, LOAD, 3, CONFIG)
    masks_lib.check(masks, params)
    mlp = masks["blocks"]["layer_1"]["mlp"]
    for layer in range(2):
        expected = np.isin(np.arange(6), STAY[layer])
        np.testing.assert_array_equal(mlp["experts"]["gate"]["kernel"][layer].all((1, 2)), expected)
        np.testing.assert_array_equal(mlp["experts"]["down"]["kernel"][layer].any((1, 2)), expected)
        np.testing.assert_array_equal(mlp["router"]["kernel"][layer].any(0), expected)
    which = masks_lib.prunable(params, ((r"/experts/", True), (r".*", False)))
    assert masks_lib.density(masks, which) == 0.5
    # The structure "expert" of `lottery.prune` takes the same ones, leaf by leaf, from these scores.
    removals = {path: 3 for path in prune.units(params, which, "expert")}
    scores = load_scores(params, jnp.asarray(LOAD), CONFIG)
    again = prune.remove(scores, masks_lib.ones(params), which, removals, "expert")
    chex.assert_trees_all_equal(again["blocks"]["layer_1"]["mlp"]["experts"], mlp["experts"])


@pytest.mark.parametrize(
    ("load", "keep", "config", "message"),
    [
        (LOAD, 1, CONFIG, "keep=1 of 6 experts in 1 group"),
        (LOAD[:, :3], 3, CONFIG, r"load of shape \(2, 3\): \(2, 6\) is needed"),
        (LOAD, 3, replace(CONFIG, moe=replace(MOE, router=RouterConfig("hash", 6, 2))), "'hash' has no column"),
    ],
    ids=["keep", "load", "router"],
)
def test_what_cannot_be_is_refused(load, keep, config, message):
    with pytest.raises(ValueError, match=message):
        prune_experts({}, load, keep, config)


def test_layers_that_keep_different_numbers_are_refused():
    params = filled(CONFIG, 0)
    masks = prune_experts(params, LOAD, 3, CONFIG)
    up = masks["blocks"]["layer_1"]["mlp"]["experts"]["up"]["kernel"]
    path = ("blocks", "layer_1", "mlp", "experts", "up", "kernel")
    with pytest.raises(ValueError, match=r"different numbers of experts \[2, 3\]"):
        drop_experts(params, replaced(masks, path, up.at[0, 3].set(False)), CONFIG)


@pytest.mark.parametrize("scan", [True, False])
def test_every_layer_is_scored_by_its_own_load(scan):
    config = replace(CONFIG, scan=scan)
    params = filled(config, 0)
    scores = load_scores(params, jnp.asarray(LOAD), config)
    kernels = np.concatenate(
        [np.reshape(at(scores, path)["router"]["kernel"], (-1, 16, 6)) for path in router_paths(config)]
    )
    np.testing.assert_array_equal(kernels, np.repeat(LOAD[:, None], 16, axis=1))
