"""The decoder with routed experts: tree, loss, biases moved outside the gradient, training, report; FLOPs by hand."""

import json
from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import drawn

from configs import moe_lm
from moe.experts import MixtureConfig
from moe.gate import RouterConfig
from moe.layer import MoEConfig
from moe.metrics import of_token_means, token_means
from tessera.infra.config import build
from tessera.infra.logger import load_history
from tessera.lm import lora
from tessera.loop import LoopConfig, metrics_row
from tessera.models.attention_forms import LatentConfig
from tessera.models.lm_loss import (
    at,
    expert_table,
    lm_loss,
    make_adjust,
    make_eval,
    per_layer,
    router_paths,
    training_flops,
)
from tessera.models.transformer import Decoder, TransformerConfig, param_shapes
from tessera.reports.router import BYTE_CLASSES, byte_classes, router_sections, write_specialization
from tessera.step import StepConfig, init_state, make_train_step

MOE = MoEConfig(every=2, granularity=2, router=RouterConfig("sigmoid", 4, 2), bias_rate=0.01, z=1e-3)
CONFIG = TransformerConfig(vocab_size=11, layers=4, width=16, heads=2, ff=24, mlp="routed", moe=MOE)
TOKENS = jax.random.randint(jax.random.key(5), (2, 9), 0, 11, jnp.int32)
KEY = jax.random.key(0)


def make(**changes):
    model = Decoder(replace(CONFIG, **changes))
    return model, jax.jit(model.init)(jax.random.key(1), TOKENS)["params"]


def unstacked(params):
    blocks = {
        f"blocks_{2 * unit + i}": jax.tree.map(lambda x, unit=unit: x[unit], params["blocks"][f"layer_{i}"])
        for unit in range(2)
        for i in range(2)
    }
    return {name: leaf for name, leaf in params.items() if name != "blocks"} | blocks


def test_evaluation_leaves_the_z_loss_out():
    model = Decoder(replace(CONFIG, mlp="swiglu", layers=2))
    params = drawn(model, TOKENS)
    loss_fn = lm_loss(model, z_loss=0.01)
    loss, metrics = jax.jit(loss_fn)(params, {"tokens": TOKENS}, KEY)
    found = make_eval(loss_fn)(params, {"tokens": TOKENS})
    assert found == {"loss": metrics["cross_entropy"], "accuracy": metrics["accuracy"]} and loss > found["loss"]


@pytest.mark.slow
def test_every_second_block_is_routed_and_scan_changes_nothing():
    model, params = make()
    assert set(params["blocks"]["layer_0"]["mlp"]) == {"gate", "up", "down"}
    mlp = jax.tree.map(jnp.shape, params["blocks"]["layer_1"]["mlp"])
    assert mlp == {
        "router": {"kernel": (2, 16, 4), "bias": (2, 4)},
        "experts": {
            "gate": {"kernel": (2, 4, 16, 12)},
            "up": {"kernel": (2, 4, 16, 12)},
            "down": {"kernel": (2, 4, 12, 16)},
        },
    }
    flat, _ = make(scan=False)
    one, other = lm_loss(model), lm_loss(flat)
    (loss, metrics), grads = jax.jit(jax.value_and_grad(one, has_aux=True))(params, {"tokens": TOKENS}, KEY)
    run = jax.jit(jax.value_and_grad(other, has_aux=True))
    (again, same), flat_grads = run(unstacked(params), {"tokens": TOKENS}, KEY)
    assert loss == pytest.approx(float(again), rel=1e-5)
    chex.assert_trees_all_close(metrics, same, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(unstacked(grads), flat_grads, rtol=1e-3, atol=1e-5)
    assert metrics["router/load"].shape == (2, 4) and metrics["router/entropy"].shape == (2,)
    np.testing.assert_allclose(np.asarray(metrics["router/load"]).sum(1), 1, rtol=1e-6)
    assert loss == pytest.approx(float(metrics["cross_entropy"] + metrics["aux_loss"]), rel=1e-5)
    assert not at(grads, router_paths(model.config)[0])["router"]["bias"].any()

    # Biases move by the sign of the load's distance from the mean, in either layout, and nothing else moves.
    moved = make_adjust(model.config)(params, metrics)
    load = np.asarray(metrics["router/load"])
    expected = 0.01 * np.sign(load.mean(1, keepdims=True) - load)
    np.testing.assert_allclose(moved["blocks"]["layer_1"]["mlp"]["router"]["bias"], expected, atol=1e-8)
    flat_moved = make_adjust(flat.config)(unstacked(params), metrics)
    chex.assert_trees_all_equal(flat_moved, unstacked(moved))
    moved["blocks"]["layer_1"]["mlp"]["router"]["bias"] = params["blocks"]["layer_1"]["mlp"]["router"]["bias"]
    chex.assert_trees_all_equal(moved, params)

    positions = jnp.where(jnp.arange(18).reshape(2, 9) < 13, jnp.arange(9), -1)  # the last five are padding
    table = jax.jit(lambda p: expert_table(model, p, TOKENS, TOKENS % 3, 3, positions))(params)
    assert table.shape == (2, 3, 4)
    np.testing.assert_array_equal(np.asarray(table).sum(2)[0], 2 * np.bincount(np.asarray(TOKENS).ravel()[:13] % 3))


@pytest.mark.parametrize("scan", [True, False])
def test_every_routers_bias_follows_its_own_layers_load(scan):
    """Of two routed layers with opposite loads: away from the busy experts, by bias_rate a step."""
    config = replace(CONFIG, scan=scan)
    shapes = jax.eval_shape(Decoder(config).init, KEY, TOKENS)["params"]
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    load = jnp.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
    moved = make_adjust(config)(params, {"router/load": load})
    biases = [at(moved, path)["router"]["bias"] for path in router_paths(config)]
    expected = 0.01 * np.array([[-1, -1, 1, 1], [1, 1, -1, -1]])
    np.testing.assert_allclose(np.reshape(biases, (2, 4)), expected, atol=1e-8)


@pytest.mark.long
def test_the_penalty_of_relu_routers_moves_with_the_choices_of_all_layers():
    moe = MoEConfig(router=RouterConfig("relu", 4, 1, penalty=0.5, penalty_rate=1.25), balance=0.0)
    model, params = make(moe=moe, layers=2)
    _, found = jax.jit(lm_loss(model))(params, {"tokens": TOKENS}, KEY)
    path = (*router_paths(model.config)[0], "router", "penalty")
    np.testing.assert_allclose(at(params, path), 0.5)
    assert found["aux_loss"] > 0
    assert found["router/choices"].shape == (2,) and found["router/choices"].mean() > 1
    np.testing.assert_allclose(at(make_adjust(model.config)(params, found), path), 0.5 * 1.25)


def test_greedy_tokens_of_single_texts_are_the_teacher_forced_ones():
    """Decoded row by row, token by token, with a capacity in training that drops choices and none in decoding."""
    capacity = MixtureConfig(dispatch="capacity", capacity_factor=0.3)
    model = Decoder(replace(CONFIG, moe=MoEConfig(router=RouterConfig("switch", 4, 1), mixture=capacity), layers=2))
    params = drawn(model, TOKENS)
    forward = partial(jax.jit(lambda params, tokens: model.apply({"params": params}, tokens)), params)
    texts, logits = [], []
    for row in range(2):
        tokens = np.array(TOKENS[row : row + 1])
        tokens[:, 3:] = 0
        for t in range(3, 9):
            one = np.asarray(forward(tokens))[:, t - 1]  # what follows is not seen yet
            logits.append(one[0])
            tokens[:, t] = one.argmax(-1)
        texts.append(tokens[0])
    whole = np.asarray(forward(np.stack(texts)))[:, 2:-1]
    np.testing.assert_allclose(np.stack(logits).reshape(whole.shape), whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(whole.argmax(-1), np.stack(texts)[:, 3:])
    metrics = jax.jit(lm_loss(model))(params, {"tokens": TOKENS}, KEY)[1]
    assert metrics["router/drop_fraction"].min() > 0.2


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_hash_router_of_a_decoder_reads_the_tokens_ids(scan):
    model = Decoder(replace(CONFIG, moe=MoEConfig(every=2, router=RouterConfig("hash", 4, 1)), scan=scan))
    params = drawn(model, TOKENS)
    table = jax.jit(lambda p: expert_table(model, p, TOKENS, TOKENS, 11))(params)
    # Every token has one expert wherever it stands, and not all have the same.
    assert ((np.asarray(table) > 0).sum(2) <= 1).all()
    assert ((np.asarray(table).sum(1) > 0).sum(1) > 1).all()


@pytest.mark.parametrize("router", ["expert_choice", "soft"])
def test_routers_that_look_ahead_are_refused_in_a_decoder(router):
    with pytest.raises(ValueError, match=f"moe.router.name='{router}' chooses among all tokens"):
        replace(CONFIG, moe=MoEConfig(router=RouterConfig(router, 4, 2)))


@pytest.fixture(scope="module")
def trained():
    """Rows of 40 steps with loss-free balancing and an otherwise unbalanced loss."""
    model, params = make(moe=replace(MOE, every=1, balance=0.0, z=0.0), layers=2)
    tx = optax.adam(1e-2)
    step = jax.jit(make_train_step(lm_loss(model), tx, adjust=make_adjust(model.config)))
    state, rows = init_state(params, tx), []
    for i in range(40):
        state, metrics = step(state, {"tokens": TOKENS}, KEY)
        rows.append({"step": i + 1, "kind": "train"} | metrics_row(metrics))
    return model, state, rows


@pytest.mark.long
def test_training_learns_and_moves_the_biases(trained):
    _, state, rows = trained
    assert rows[-1]["cross_entropy"] < 0.5 * rows[0]["cross_entropy"]
    bias = np.asarray(state.params["blocks"]["mlp"]["router"]["bias"])
    assert np.abs(bias).max() > 0.02
    # Whole steps: the optimizer added nothing.
    np.testing.assert_allclose(bias / 0.01, np.round(bias / 0.01), atol=1e-3)


def test_the_report_shows_loads_and_specialization(trained, tmp_path):
    model, state, rows = trained
    steps, load = load_history(rows)
    assert steps.tolist() == list(range(1, 41)) and load.shape == (40, 2, 4)
    write_specialization(tmp_path, model, state.params, [{"tokens": TOKENS}] * 2, "bytes")
    first, second = router_sections(rows, tmp_path)
    counts = np.array(json.loads((tmp_path / "specialization.json").read_text())["counts"])
    assert counts.shape == (2, len(BYTE_CLASSES), 4) and counts.sum() == 2 * 2 * 2 * 16
    busiest = load[-1].max() * 4
    assert f"{busiest:.2f} times its share" in first.caption
    assert second.title == "Specialization"
    by_class, by_depth = second.content
    assert sum("mutual information" in ax.get_title(loc="left") for ax in by_class.axes) == 2
    assert [len(line.get_xdata()) for line in by_depth.axes[0].lines] == [2, 2]
    (alone,) = router_sections(rows)
    assert alone.title == first.title
    write_specialization(tmp_path / "no", model, state.params, [], "bpe")
    assert not (tmp_path / "no").exists()
    assert router_sections([{"step": 1, "kind": "train", "loss": 1.0}]) == []


def test_byte_classes():
    names = [BYTE_CLASSES[i] for i in byte_classes(np.frombuffer("aB7 \n_é".encode(), np.uint8))]
    assert names == ["lower case", "upper case", "digit", "space", "line end", "punctuation", "other", "other"]


# Of every router that chooses for each token by itself; ReLU gives tokens different numbers of choices.
ROUTED_BY = {
    "relu": RouterConfig("relu", 4, 2),
    **{name: RouterConfig(name, 4, 2) for name in ("top_k", "sigmoid", "hash", "noisy", "sparsemixer", "gshard")},
    "switch": RouterConfig("switch", 4, 1),
    "softmax_groups": RouterConfig("softmax_groups", 4, 1, groups=2, top_groups=1),
    "hierarchical": RouterConfig("hierarchical", 4, 1, groups=2, top_groups=2),
}
ACCUMULATED = [
    ("relu", {"tokens", "positions"}),
    *(pytest.param(name, {"tokens"}, marks=pytest.mark.slow) for name in ROUTED_BY),
    *(pytest.param(name, {"tokens", "positions"}, marks=pytest.mark.slow) for name in ROUTED_BY if name != "relu"),
]


@pytest.mark.long
@pytest.mark.parametrize(("name", "given"), ACCUMULATED)
def test_metrics_of_routers_from_parts_are_those_of_the_batchs_choices(name, given):
    """From the choices of all tokens, in float64; with positions the parts have 14, 6 and 15 of 16 tokens."""
    moe = MoEConfig(router=ROUTED_BY[name], mixture=MixtureConfig(dispatch="dense"), balance=0.0)
    config = replace(CONFIG, layers=2, ff=8, moe=moe)
    tokens = np.random.default_rng(3).integers(0, 11, (6, 9)).astype(np.int32)
    lengths = np.array([[8], [3], [8], [6], [3], [7]])
    batch = {
        "tokens": tokens,
        "weights": np.ones((6, 8), np.float32),
        "positions": np.tile(np.arange(8, dtype=np.int32), (6, 1)),
    }
    if "positions" in given:
        batch["positions"] = np.where(batch["positions"] < lengths, batch["positions"], -1).astype(np.int32)
        batch["weights"] = (batch["positions"] >= 0).astype(np.float32)
    model = Decoder(config)
    params = drawn(model, tokens[:, :-1])
    loss_fn, tx = lm_loss(model), optax.sgd(0.0)
    step = make_train_step(lambda params, batch, key: loss_fn(params, batch), tx, StepConfig(grad_accum_steps=3))
    _, found = jax.jit(step)(init_state(params, tx), batch, KEY)
    apply = jax.jit(lambda params, *given: model.apply({"params": params}, *given, mutable=["routings"])[1]["routings"])
    routings = per_layer(apply(params, tokens[:, :-1], batch["positions"]), "routing", config)
    live = np.asarray(batch["positions"]).ravel() >= 0
    for layer in range(2):
        experts, probs = (np.asarray(x[layer])[live] for x in (routings.experts_NK, routings.probs_NE))
        load, probs = (experts[..., None] == np.arange(4)).sum((0, 1)).astype(float), probs.astype(float)
        share = load / load.sum()
        expected = {
            "load": share,
            "choices": load.sum() / live.sum(),
            "max_violation": share.max() * 4 - 1,
            "load_entropy": -(share * np.log(np.maximum(share, 1e-30))).sum(),
            "entropy": -(probs * np.log(np.maximum(probs, 1e-30))).sum(-1).mean(),
            "confidence": probs.max(-1).mean(),
            "drop_fraction": 0.0,
        }
        assert {name for name in found if name.startswith("router/")} == {f"router/{one}" for one in expected}
        for one, value in expected.items():
            np.testing.assert_allclose(found[f"router/{one}"][layer], value, rtol=1e-5, atol=1e-6, err_msg=one)


def test_dropped_choices_of_parts_are_those_of_the_batch():
    """Two parts drop 3 of 4 and none of 12 choices: 3 of 16, where the mean of the shares is 3 of 8."""
    share = {"load": jnp.array([[1.0, 0.0], [0.25, 0.75]]), "choices": jnp.array([1.0, 3.0])}
    share |= {"drop_fraction": jnp.array([0.75, 0.0]), "entropy": jnp.zeros(2), "confidence": jnp.ones(2)}
    found = of_token_means({name: value.mean(0) for name, value in token_means(share).items()})
    assert (float(found["drop_fraction"]), float(found["choices"])) == (3 / 16, 2.0)
    assert found["load"].tolist() == [7 / 16, 9 / 16] and float(found["max_violation"]) == pytest.approx(1 / 8)


def sizes(arg):
    """The model of a config, and the number of parameters of its feed-forward layers by leaf name."""
    config = build(TransformerConfig, moe_lm.get_config(arg).model, "config.model", vocab_size=256)
    params = jax.eval_shape(Decoder(config).init, KEY, TOKENS)["params"]
    leaves = jax.tree.leaves_with_path(params["blocks"])
    return config, sum(leaf.size for path, leaf in leaves if "'mlp'" in str(path) and "router" not in str(path))


@pytest.mark.parametrize("arg", moe_lm.VARIANTS)
def test_every_config_makes_a_model(arg):
    config, total = sizes(arg)
    assert total > 0 and (config.mlp == "routed") == (not arg.startswith("dense"))


def test_two_of_eight_experts_cost_what_the_dense_layer_does():
    config, total = sizes("tiny")
    _, dense = sizes("dense_tiny")
    router = config.moe.router
    assert total * router.k == dense * router.experts


def test_layers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="layers=3 is not a multiple of moe.every=2"):
        replace(CONFIG, layers=3)
    with pytest.raises(ValueError, match="layers=4 after moe.first_k_dense_replace=1 is not a multiple of moe.every=2"):
        replace(CONFIG, moe=replace(MOE, first_k_dense_replace=1))
    with pytest.raises(ValueError, match="first_k_dense_replace=4 of layers=4: none would be routed"):
        replace(CONFIG, moe=replace(MOE, first_k_dense_replace=4))
    with pytest.raises(ValueError, match="ff=25 does not divide into granularity=2"):
        replace(CONFIG, ff=25)


def test_per_layer_reads_one_path_for_a_scan_and_several_without():
    assert router_paths(CONFIG) == [("blocks", "layer_1", "mlp")]
    assert router_paths(replace(CONFIG, scan=False)) == [("blocks_1", "mlp"), ("blocks_3", "mlp")]
    assert router_paths(replace(CONFIG, moe=replace(MOE, every=1))) == [("blocks", "mlp")]
    assert router_paths(replace(CONFIG, mlp="swiglu")) == []
    first = replace(CONFIG, moe=replace(MOE, first_k_dense_replace=2))
    assert router_paths(first) == [("blocks", "layer_1", "mlp")]
    assert router_paths(replace(first, scan=False)) == [("blocks_3", "mlp")]
    sown = {"blocks_1": {"mlp": {"x": (jnp.ones(3),)}}, "blocks_3": {"mlp": {"x": (jnp.zeros(3),)}}}
    np.testing.assert_array_equal(per_layer(sown, "x", replace(CONFIG, scan=False)), [[1, 1, 1], [0, 0, 0]])


DENSE = {"vocab_size": 50, "layers": 3, "width": 8, "heads": 4, "ff": 20}
# Of a dense decoder: four projections, three matrices of F, the output layer.
WEIGHTS = 3 * (2 * 8 * 8 + 2 * 8 * 8 + 3 * 8 * 20) + 50 * 8


@pytest.mark.parametrize(
    "changes, weights, scores",
    [
        ({}, WEIGHTS, 3 * 16),
        ({"tied": False}, WEIGHTS, 3 * 16),
        ({"kv_heads": 2, "qkv_bias": True}, WEIGHTS - 3 * 2 * 8 * 4, 3 * 16),
        ({"window": 4, "attention_pattern": "LLG"}, WEIGHTS, 4 + 4 + 16),
        (
            {"mlp": "routed", "moe": MoEConfig(router=RouterConfig("top_k", 6, 2))},
            WEIGHTS + 3 * (3 * 8 * 20 + 8 * 6),  # two experts of the width in place of one, and the router
            3 * 16,
        ),
    ],
)
def test_training_flops_are_those_by_hand(changes, weights, scores):
    config = TransformerConfig(**DENSE | changes)
    # A multiply-add is two, forward, and twice that backward; scores and weighted values of every query and key.
    assert training_flops(config, 16) == 6 * 16 * (weights + scores * 2 * 8)


def test_flops_of_adapters_and_a_teacher_by_hand():
    """Rank 2 on queries and experts' down kernels, three layers; a teacher of one layer."""
    router = RouterConfig("top_k", 6, 2)
    config = TransformerConfig(**DENSE, mlp="routed", moe=MoEConfig(router=router))
    adapters = lora.initialize(param_shapes(config), lora.LoRAConfig(2, targets="(query|down)/kernel$"), key=KEY)
    # a: 8 x 2, b: 2 x 4 heads of 2; of two of six experts a: 20 x 2, b: 2 x 8.
    added = 3 * ((8 + 8) * 2 + 2 * (20 + 8) * 2)
    weights, scores = WEIGHTS + 3 * (3 * 8 * 20 + 8 * 6), 3 * 16 * 2 * 8
    assert training_flops(config, 16, adapters) == 16 * (4 * weights + 6 * added + 6 * scores)
    teacher = TransformerConfig(**DENSE | {"layers": 1, "ff": 32})
    of_teacher = 16 * 2 * (2 * 8 * 8 + 2 * 8 * 8 + 3 * 8 * 32 + 50 * 8 + 16 * 2 * 8)
    assert training_flops(config, 16, None, teacher) == 16 * 6 * (weights + scores) + of_teacher
    assert training_flops(config, 16, adapters, teacher) == training_flops(config, 16, adapters) + of_teacher


def test_latent_attention_has_its_projections():
    latent = LatentConfig(kv_rank=6, q_rank=5, nope_dim=4, rope_dim=2, value_dim=3)
    config = TransformerConfig(**DENSE, latent=latent)
    layer = 8 * (6 + 2 + 5) + 5 * 4 * 6 + 6 * 4 * (4 + 3) + 4 * 3 * 8 + 3 * 8 * 20
    assert training_flops(config, 16) == 6 * 16 * (3 * layer + 50 * 8 + 3 * 16 * 4 * (6 + 3))


def test_mfu_is_the_share_of_the_peak_by_hand():
    loop = LoopConfig(10, tokens=16, devices=4, flops=5e6, peak=1e9)
    # Four steps of three rows in two seconds: 12 x 5 MFLOP / 2 s of 1 GFLOP/s, 96 tokens a second on 4 devices.
    expected = {"steps_per_second": 2, "tokens_per_second": 96, "tokens_per_second_per_device": 24, "mfu": 0.03}
    assert loop.speed(4, 12, 2.0) == pytest.approx(expected)
    assert set(LoopConfig(10).speed(4, 12, 2.0)) == {"steps_per_second"}
