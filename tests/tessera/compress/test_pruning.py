"""Pruning of whole decoders on calibration text, dense and routed."""

import functools
import re
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from lottery import calibrated
from moe import ream
from moe.gate import RouterConfig
from moe.layer import MoEConfig
from tessera.compress.pruning import PruneConfig, prune_decoder
from tessera.compress.statistics import TOKENS, gather, gather_activity, kernels, run
from tessera.compress.text import CalibrationConfig, draw_windows, refuse_shared
from tessera.data.text import ByteTokenizer
from tessera.infra.artifacts import ArtifactStore
from tessera.lm.warm_start import split_blocks
from tessera.models.transformer import Attention, Block, Decoder, SwiGLU, TransformerConfig

DENSE = TransformerConfig(vocab_size=32, layers=2, width=16, heads=4, kv_heads=2, ff=32, init_scale=2.0)
ROUTED = replace(DENSE, mlp="routed", moe=MoEConfig(router=RouterConfig(experts=4, k=2)))
TEXT = np.asarray(jax.random.randint(jax.random.key(5), (8, 16), 0, 32))


@functools.cache
def drawn(config):
    made = jax.jit(Decoder(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return jax.tree.map(np.asarray, made)


def weights(config):
    """Random ones, in mappings of their own."""
    return jax.tree.map(lambda leaf: leaf, drawn(config))


def logits(params, config):
    return jax.jit(Decoder(config).apply)({"params": params}, TEXT)


def embedded(params):
    return np.asarray(params["embed"]["table"])[TEXT]


@pytest.mark.parametrize("rows", [TOKENS, 32])
def test_what_kernels_read_is_summed_over_all_parts_of_the_text(rows, monkeypatch):
    """Against what Flax's own modules are called with, in float64."""
    monkeypatch.setattr("tessera.compress.statistics.TOKENS", rows)
    params, read = weights(DENSE), {}
    block, x = split_blocks(params, DENSE)[1], embedded(params)

    def record(call, args, options, context):
        if isinstance(context.module, Attention | SwiGLU) and context.method_name == "__call__":
            read[type(context.module)] = np.asarray(args[0], np.float64).reshape(-1, 16)
        return call(*args, **options)

    with nn.intercept_methods(record):
        Block(DENSE).apply(
            {"params": jax.tree.map(jnp.asarray, block)}, jnp.asarray(x), jnp.broadcast_to(jnp.arange(16), TEXT.shape)
        )
    seen = gather(block, x, TEXT, DENSE, "swiglu", DENSE.form(1))
    mlp = {name: block["mlp"][name]["kernel"].astype(np.float64) for name in ("gate", "up")}
    gated = read[SwiGLU] @ mlp["gate"]
    hidden = gated / (1 + np.exp(-gated)) * (read[SwiGLU] @ mlp["up"])
    for name, wanted in (("query", read[Attention]), ("gate", read[SwiGLU]), ("down", hidden)):
        np.testing.assert_allclose(seen[name].hessian, wanted.T @ wanted, rtol=1e-4, atol=1e-3)
        assert seen[name].rows == TEXT.size
    out = block["attention"]["output"]["kernel"]
    added = (
        run(block, x, TEXT, DENSE, "swiglu", DENSE.form(1))
        - x
        - (hidden @ block["mlp"]["down"]["kernel"]).reshape(x.shape)
    )
    flat = out.reshape(-1, 16).astype(np.float64)
    wanted = np.square(added.astype(np.float64)).sum()
    assert np.einsum("nm,nk,km->", flat, seen["output"].hessian, flat) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (DENSE, "wanda"),
        (ROUTED, "sparsegpt"),
        pytest.param(DENSE, "sparsegpt", marks=pytest.mark.slow),
        pytest.param(ROUTED, "wanda", marks=pytest.mark.slow),
        pytest.param(ROUTED, "magnitude", marks=pytest.mark.slow),
    ],
)
def test_half_of_every_layer_goes_and_blocks_see_the_pruned_ones_before(config, method):
    params = weights(config)
    made = prune_decoder(params, config, PruneConfig(method, block=8), TEXT)
    assert {row["density"] for row in made.rows} == {0.5}
    np.testing.assert_array_equal(made.params["embed"]["table"], params["embed"]["table"])
    blocks, pruned = split_blocks(params, config), split_blocks(made.params, config)
    x = run(pruned[0], embedded(params), TEXT, config, config.mlps[0], config.form(0))
    seen = gather(blocks[1], x, TEXT, config, config.mlps[1], config.form(1))
    w, gram = jnp.asarray(blocks[1]["attention"]["query"]["kernel"].reshape(16, -1)), seen["query"].hessian
    found = np.asarray(pruned[1]["attention"]["query"]["kernel"]).reshape(16, -1)
    if method == "wanda":
        kept = calibrated.keep_best(calibrated.wanda(w, jnp.sqrt(jnp.diag(jnp.asarray(gram)))), 0.5, by_output=True)
        np.testing.assert_array_equal(found, jnp.where(kept, w, 0))
    elif method == "sparsegpt":
        np.testing.assert_allclose(
            found, calibrated.sparsegpt(w, jnp.asarray(gram, jnp.float32), block=8).weight, atol=1e-4
        )
    gap = np.asarray(w - found, np.float64)
    error = np.einsum("nm,nk,km->", gap, gram, gap) / np.einsum("nm,nk,km->", w, gram, w)
    row = next(row for row in made.rows if row["layer"] == "blocks_1/attention/query/kernel")
    assert row["error"] == pytest.approx(error, rel=1e-3) and row["weights"] == 256


def test_methods_that_know_the_text_lose_less_of_what_layers_compute_on_it():
    """In queries, keys and values of the first block: all have the same statistics, of inputs that are correlated."""
    params, lost = weights(DENSE), {}
    mix = np.random.default_rng(0).normal(size=(16, 16)) * np.geomspace(1, 0.05, 16)[:, None]
    params["embed"]["table"] = (params["embed"]["table"] @ mix * np.geomspace(0.2, 2, 16)[None]).astype(np.float32)
    for method in ("magnitude", "wanda", "sparsegpt"):
        rows = prune_decoder(params, DENSE, PruneConfig(method, block=16), TEXT).rows
        read = [f"blocks_0/attention/{name}/kernel" for name in ("query", "key", "value")]
        lost[method] = np.mean([row["error"] for row in rows if row["layer"] in read])
    assert lost["sparsegpt"] < lost["wanda"] < lost["magnitude"]


def test_fisher_is_the_squared_gradient_of_each_sequence():
    """Against gradients taken one by one, of a loss written out here."""
    params = jax.tree.map(jnp.asarray, weights(DENSE))

    def loss(kernel, tokens):
        inner = {**params["blocks"]["mlp"], "up": {"kernel": kernel}}
        changed = {**params, "blocks": {**params["blocks"], "mlp": inner}}
        logits = jax.nn.log_softmax(Decoder(DENSE).apply({"params": changed}, tokens[None, :-1]))[0]
        return -jnp.take_along_axis(logits, tokens[1:, None], 1).mean()

    kernel = params["blocks"]["mlp"]["up"]["kernel"]
    gradient = jax.jit(jax.grad(loss))
    gradients = np.stack([np.asarray(gradient(kernel, one)) for one in TEXT])
    score = calibrated.fisher(kernel[1], jnp.asarray(np.square(gradients[:, 1]).mean(0)))
    made = prune_decoder(params, DENSE, PruneConfig("fisher"), TEXT)
    kept = np.asarray(made.params["blocks"]["mlp"]["up"]["kernel"])[1] != 0
    assert np.mean(kept == (score > np.median(score))) > 0.99


@pytest.mark.parametrize(
    ("how", "check"),
    [
        (PruneConfig("wanda", "2:4"), lambda w: (w.reshape(-1, 4, w.shape[-1]) != 0).sum(1) == 2),
        (PruneConfig("sparsegpt", "2:4", block=8, bits=4), lambda w: (w.reshape(-1, 4, w.shape[-1]) != 0).sum(1) <= 2),
        (PruneConfig("sparsegpt", "4x8", density=0.25), lambda w: _tiles(w).all((1, 3)) == _tiles(w).any((1, 3))),
    ],
    ids=["wanda-2:4", "sparsegpt-2:4-4bit", "blocks"],
)
def test_patterns_hold_in_every_kernel(how, check):
    made = prune_decoder(weights(DENSE), DENSE, how, TEXT)
    for block in split_blocks(made.params, DENSE):
        for _, leaf, inputs in kernels(block):
            w = np.asarray(leaf).reshape(int(np.prod(leaf.shape[:inputs])), -1)
            assert check(w).all()
            if how.bits:
                assert max(len(np.unique(column)) for column in w.T) <= 16


def _tiles(w):
    return (w != 0).reshape(w.shape[0] // 4, 4, w.shape[1] // 8, 8)


@pytest.mark.parametrize(
    ("structure", "method"),
    [
        ("neuron", "sparsegpt"),
        ("head", "magnitude"),
        *(pytest.param("neuron", method, marks=pytest.mark.slow) for method in ("magnitude", "wanda", "fisher")),
        *(pytest.param("head", method, marks=pytest.mark.slow) for method in ("sparsegpt", "wanda")),
    ],
)
def test_neurons_and_heads_are_cut_out_of_a_smaller_model(structure, method):
    params = weights(DENSE)
    made = prune_decoder(params, DENSE, PruneConfig(method, structure), TEXT)
    sizes = (made.config.ff, made.config.heads, made.config.kv_size)
    assert sizes == ((16, 4, 2) if structure == "neuron" else (32, 2, 1))
    assert made.config.head_size == DENSE.head_size
    wanted = jax.eval_shape(Decoder(made.config).init, jax.random.key(0), TEXT)["params"]
    assert jax.tree.map(jnp.shape, made.params) == jax.tree.map(jnp.shape, wanted)
    assert np.isfinite(logits(made.params, made.config)).all() and len(made.rows) == 2


def test_experts_and_layers_that_do_least_are_cut():
    params = weights(ROUTED)
    made = prune_decoder(params, ROUTED, PruneConfig("reap", "expert"), TEXT)
    assert made.config.moe.router.experts == 2 and made.params["blocks"]["mlp"]["router"]["kernel"].shape == (2, 16, 2)
    x, form = embedded(params), ROUTED.form(0)
    block = split_blocks(params, ROUTED)[0]
    seen = gather(block, x, TEXT, ROUTED, "routed", form)
    assert seen["saliency"].load.sum() == 2 * TEXT.size
    # Of one token's experts, by hand: a routed layer's output is the sum of gate times output.
    best = np.sort(np.argsort(-seen["saliency"].reap)[:2])
    np.testing.assert_array_equal(
        made.params["blocks"]["mlp"]["experts"]["up"]["kernel"][0], block["mlp"]["experts"]["up"]["kernel"][best]
    )
    assert made.rows[0]["experts"] == ", ".join(map(str, best))
    deep = replace(DENSE, layers=3)
    params = weights(deep)
    params["blocks"]["attention"]["output"]["kernel"] = params["blocks"]["attention"]["output"]["kernel"].copy()
    params["blocks"]["mlp"]["down"]["kernel"] = params["blocks"]["mlp"]["down"]["kernel"].copy()
    for layer in (params["blocks"]["attention"]["output"], params["blocks"]["mlp"]["down"]):
        layer["kernel"][1] = 0  # the second block adds nothing: without it the model is the same
    made = prune_decoder(params, deep, PruneConfig("influence", "layer", density=0.66), TEXT)
    assert made.config.layers == 2 and [row["density"] for row in made.rows] == [1.0, 0.0, 1.0]
    np.testing.assert_allclose(logits(made.params, made.config), logits(params, deep), atol=1e-5)


def test_similar_experts_are_merged_block_after_block(tmp_path):
    params, how, store = weights(ROUTED), PruneConfig("ream", "expert", group=3), ArtifactStore(tmp_path)
    made = prune_decoder(params, ROUTED, how, TEXT, store=store)
    assert logits(made.params, made.config).shape == (*TEXT.shape, 32) and made.config.moe.router.experts == 2
    x_NTD, form = embedded(params), ROUTED.form(0)
    for i, block in enumerate(split_blocks(params, ROUTED)):
        seen = gather_activity(block, x_NTD, TEXT, ROUTED, form, rows=50)
        experts = {name: np.asarray(leaf["kernel"], np.float64) for name, leaf in block["mlp"]["experts"].items()}
        y_MD = gather_activity(block, x_NTD, TEXT, ROUTED, form).rows_MD.astype(np.float64)
        logits_ME = y_MD @ block["mlp"]["router"]["kernel"]
        probs_ME = scipy.special.softmax(logits_ME, axis=1)
        for e in range(4):
            gated = y_MD @ experts["gate"][e]
            out_MD = (gated * scipy.special.expit(gated) * (y_MD @ experts["up"][e])) @ experts["down"][e]
            np.testing.assert_allclose(seen.outputs_ED[e], probs_ME[:, e] @ out_MD, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(seen.gram_EE, logits_ME.T @ logits_ME, rtol=1e-3)
        assert len(seen.rows_MD) == 50 and len(y_MD) == TEXT.size
        similar = ream.expert_similarity(seen.outputs_ED, seen.gram_EE)
        first_E = ream.group_experts(seen.saliency.reap, similar, 2, 3)
        merged = ream.merge_experts(block["mlp"]["experts"], first_E, seen.saliency.reap, y_MD)
        got = jax.tree.map(lambda leaf: leaf[i], made.params["blocks"]["mlp"])  # noqa: B023
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got["experts"], merged)
        stays = np.unique(first_E)
        np.testing.assert_array_equal(got["router"]["kernel"], block["mlp"]["router"]["kernel"][:, stays])
        assert [int(one.split()[0]) for one in made.rows[i]["experts"].split(", ")] == stays.tolist()
        # The next block reads what the merged one writes.
        x_NTD = run(split_blocks(made.params, made.config)[i], x_NTD, TEXT, made.config, "routed", form)
    again = prune_decoder(params, ROUTED, how, TEXT, store=store)
    assert again.rows == made.rows
    jax.tree.map(np.testing.assert_array_equal, again.params, made.params)


@pytest.mark.parametrize("allocation", ["owl", "sensitivity"])
def test_blocks_that_need_more_weights_get_more_and_the_mean_is_what_was_asked(allocation):
    params = weights(DENSE)
    how = PruneConfig("wanda", allocation=allocation, width=0.2, outlier=2.0)
    made = prune_decoder(params, DENSE, how, TEXT)
    densities = [np.mean([row["density"] for row in made.rows if row["block"] == i]) for i in range(2)]
    assert np.mean(densities) == pytest.approx(0.5, abs=0.03) and np.ptp(densities) > 0.3


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    params, how, store = (
        weights(DENSE),
        PruneConfig("sparsegpt", block=8, dense=("blocks_1/mlp",)),
        ArtifactStore(tmp_path),
    )
    whole = prune_decoder(params, DENSE, how, TEXT)
    assert [row["density"] for row in whole.rows[-3:]] == [1.0] * 3

    def kill(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_decoder(params, DENSE, how, TEXT, store=store, done=kill)
    assert store.steps() == [0]
    again = prune_decoder(params, DENSE, how, TEXT, store=store)
    assert again.rows == whole.rows
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)
    other = prune_decoder(params, DENSE, how, TEXT[::-1], store=store)  # another text: nothing of before is used
    assert other.rows != whole.rows


def test_an_expert_without_tokens_is_pruned_by_magnitude():
    router = RouterConfig("sigmoid", experts=4, k=2)  # whose bias can keep an expert from being chosen
    config = replace(ROUTED, layers=1, moe=MoEConfig(router=router))
    params = weights(config)
    params["blocks"]["mlp"]["router"]["bias"] = np.array([[0.0, 0.0, 0.0, -1e6]], np.float32)
    made = prune_decoder(params, config, PruneConfig("wanda"), TEXT)
    before, after = (one["blocks"]["mlp"]["experts"]["up"]["kernel"][0, 3] for one in (params, made.params))
    stays = calibrated.keep_best(jnp.abs(jnp.asarray(before)), 0.5, by_output=True)
    np.testing.assert_array_equal(after, np.where(stays, before, 0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PruneConfig("wanda", "2:4", density=0.4), "every group of 4 keeps 2, so density=0.5 is the only one"),
        (lambda: PruneConfig("wanda", density=0.0), "density=0.0: a share above 0"),
        (lambda: PruneConfig("wanda", "expert"), "one of reap, load, ream"),
        (lambda: PruneConfig("ream", "expert", group=0), "group=0: experts that are merged into one"),
        (
            lambda: prune_decoder(weights(ROUTED), ROUTED, PruneConfig("ream", "expert", group=1), TEXT),
            "group=1 with density=0.5: 2 groups of so many hold fewer than the 4 experts; at least 2",
        ),
        (lambda: PruneConfig("wanda", "channel"), "unstructured, n:m"),
        (lambda: PruneConfig("wanda", "3:2"), "3:2 sparsity is impossible"),
        (lambda: PruneConfig("wanda", bits=4), "for method='sparsegpt'"),
        (lambda: PruneConfig("wanda", "2:4", allocation="owl"), "blocks pruned to 2:4 have one density"),
        (lambda: prune_decoder(weights(DENSE), DENSE, PruneConfig("reap", "expert"), TEXT), "no routed experts"),
        (
            lambda: prune_decoder(weights(ROUTED), ROUTED, PruneConfig("reap", "expert", density=0.25), TEXT),
            "leaves 1 of 4 experts; every token chooses 2",
        ),
        (lambda: prune_decoder(weights(ROUTED), ROUTED, PruneConfig("wanda", "head"), TEXT), "scanned dense decoder"),
        (
            lambda: prune_decoder(weights(DENSE), DENSE, PruneConfig("wanda", "5x5"), TEXT),
            "blocks_0/attention/key/kernel: blocks of 5 x 5 do not divide a 16 x 8 matrix",
        ),
        (
            lambda: prune_decoder(weights(DENSE), DENSE, PruneConfig("sparsegpt", "2:4", block=6), TEXT),
            "block=6 with structure='2:4': a multiple of 4",
        ),
        (
            lambda: prune_decoder(weights(ROUTED), ROUTED, PruneConfig("wanda", "1:5", density=0.2), TEXT),
            "blocks_0/attention/key/kernel: 1:5 needs a multiple of 5 inputs, not 16",
        ),
        (
            lambda: prune_decoder(weights(DENSE), DENSE, PruneConfig("wanda", dense=("block_0",)), TEXT),
            "dense 'block_0' matches no parameter",
        ),
    ],
)
def test_what_does_not_go_together_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_inputs_that_are_not_finite_are_named():
    params = weights(DENSE)
    params["blocks"]["mlp"]["up"]["kernel"] = params["blocks"]["mlp"]["up"]["kernel"].copy()
    params["blocks"]["mlp"]["up"]["kernel"][1, 0, 0] = np.nan
    with pytest.raises(ValueError, match="blocks_1: down: its inputs on the calibration text are not finite"):
        prune_decoder(params, DENSE, PruneConfig("sparsegpt"), TEXT)


def test_a_hessian_that_cannot_be_inverted_is_said():
    """All tokens alike: one direction of inputs, and next to no damping."""
    params = weights(DENSE)
    params["embed"]["table"] = np.ones_like(params["embed"]["table"]) * np.arange(1, 17, dtype=np.float32)
    with pytest.raises(ValueError, match="blocks_0: attention/key/kernel: the Hessian .* not positive definite"):
        prune_decoder(params, DENSE, PruneConfig("sparsegpt", damping=1e-12, block=8), TEXT)


def test_calibration_windows_are_whole_and_differ_and_short_text_is_refused():
    documents = {"one": ["x" * 5, "abcdefgh" * 9], "two": ["12345678" * 4]}
    config = CalibrationConfig(("one", "two"), sequences=6, length=16)
    windows = draw_windows(documents, ByteTokenizer(), config)
    assert windows.shape == (6, 16) and windows.dtype == np.int32
    texts = [ByteTokenizer().decode(row) for row in windows]
    assert all(any(text in document for document in (*documents["one"], *documents["two"])) for text in texts)
    np.testing.assert_array_equal(windows, draw_windows(documents, ByteTokenizer(), config))
    with pytest.raises(ValueError, match="has 6 windows of 16 tokens in its documents, and 7 are needed"):
        draw_windows(documents, ByteTokenizer(), replace(config, sequences=7))


def test_text_that_is_evaluated_is_no_calibration_text():
    refuse_shared({"one": ["a", "", "b"]}, {"two": ["c", ""]})
    with pytest.raises(
        ValueError, match=re.escape("two has a document of the calibration text one, which begins with 'b'")
    ):
        refuse_shared({"one": ["a", "b"]}, {"two": ["c", "b"]})
