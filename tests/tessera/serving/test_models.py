"""Quantised decoding of whole decoders, and where served models come from."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model as tiny

from lottery import export, masks
from moe.gate import RouterConfig
from moe.layer import MoEConfig
from sharding.inference.quantize import QuantConfig, Quantized, stored_bytes
from sharding.plan import Plan
from tessera.compress.statistics import gather
from tessera.data.text import ByteTokenizer
from tessera.models.transformer import Attention, Block, Decoder, SwiGLU, TransformerConfig
from tessera.parallel.decoder import dequantize_layer
from tessera.serving.engine import generate_all
from tessera.serving.load import SourceConfig, make_engine, read_calibration, read_ticket
from tessera.serving.programs import ServeConfig, make_programs
from tessera.serving.quantized import quantise_decoder
from tessera.serving.requests import Sampling
from tessera.serving.served import serve

DENSE = TransformerConfig(vocab_size=32, layers=2, width=16, heads=4, kv_heads=2, ff=32)
ROUTED = replace(DENSE, mlp="routed", moe=MoEConfig(router=RouterConfig(experts=4, k=2)))
TEXT = np.asarray(jax.random.randint(jax.random.key(5), (8, 16), 0, 32))


def weights(config, seed=0):
    return jax.jit(Decoder(replace(config, init_scale=2.0)).init)(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))[
        "params"
    ]


def logits(params, config):
    return jax.jit(Decoder(config).apply)({"params": params}, TEXT)


@pytest.mark.slow
@pytest.mark.parametrize("config", [DENSE, ROUTED], ids=["dense", "routed"])
def test_a_decoder_with_quantised_kernels_is_near(config):
    params = weights(config)
    exact, error = logits(params, config), {}
    for bits, method, group in ((8, "rtn", 0), (4, "rtn", 4), (4, "awq", 4), (4, "gptq", 4)):
        small = quantise_decoder(params, config, QuantConfig(bits, method, group), TEXT)
        found = logits(dequantize_layer(small, "float32"), config)
        # Of the median token: a few whose two best experts are nearly tied go to another one and are far off.
        error[bits, method] = float(jnp.median(jnp.square(found - exact).mean(-1) / jnp.square(exact).mean(-1)))
        assert stored_bytes(small["blocks"]) < stored_bytes(params["blocks"]) * (0.55 if bits == 8 else 0.5)
    # Random weights leave AWQ nothing to gain (a trained model's do: docs/inference.md); that no kernel loses by it is
    # tested in tests/sharding/inference.
    assert error[8, "rtn"] < 1e-3 < error[4, "gptq"] < 0.2
    assert error[4, "rtn"] < 0.2 and error[4, "awq"] < 0.2


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_calibration_sees_what_the_kernels_of_a_block_read(norm_position):
    config = replace(DENSE, layers=1, scan=False, norm_position=norm_position)
    block, read = weights(config)["blocks_0"], {}
    block["attention_norm"]["gain"], block["mlp_norm"]["gain"] = 1.5 * jnp.ones(16), 0.5 * jnp.ones(16)
    x = jax.random.normal(jax.random.key(0), (2, 5, 16))

    def record(call, args, options, context):
        if isinstance(context.module, Attention | SwiGLU) and context.method_name == "__call__":
            read[type(context.module)] = args[0]
        return call(*args, **options)

    with nn.intercept_methods(record):
        Block(config).apply({"params": block}, x, jnp.broadcast_to(jnp.arange(5), (2, 5)))
    seen = gather(block, x, np.zeros((2, 5), np.int32), config, "swiglu", config.form(0))
    for kernel, layer in (("query", Attention), ("gate", SwiGLU)):
        np.testing.assert_allclose(seen[kernel].magnitude, np.abs(read[layer]).sum((0, 1)), rtol=1e-5)


def test_a_block_is_calibrated_on_what_the_quantised_blocks_before_it_compute(monkeypatch):
    """Kernels quantised to zeros add nothing to the stream: every block reads what the first one did."""
    seen = []

    def zeros(kernel, how, statistics):
        seen.append(statistics)
        return Quantized(np.zeros(kernel.shape, np.int8), np.ones((1, kernel.shape[1]), np.float32))

    monkeypatch.setattr("tessera.serving.quantized.quantize_matrix", zeros)
    quantise_decoder(weights(DENSE), DENSE, QuantConfig(8, "gptq"), TEXT)
    first, second = seen[:7], seen[7:]
    same = [np.allclose(a.hessian, b.hessian, rtol=1e-4) for a, b in zip(first, second, strict=True)]
    assert sum(same) >= 3, "of queries, keys and values; what else a block reads depends on its own kernels"


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["", "tp=4, dp=2"])
def test_quantised_kernels_are_served_as_they_are(axes):
    params = weights(DENSE)
    small = quantise_decoder(params, DENSE, QuantConfig(4, "awq", 4), TEXT)
    placed, served = serve(small, DENSE, Plan(axes))
    programs = make_programs(served, ServeConfig(slots=8, length=24, chunk=16, layout="stacked"))
    placed = programs.place(placed)
    assert placed["blocks"]["mlp"]["up"]["kernel"].values.dtype == jnp.int4
    _, found = programs.prefill(placed, TEXT, np.full(8, 16))
    np.testing.assert_allclose(found, logits(dequantize_layer(small, "float32"), DENSE)[:, -1], atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    ("axes", "how"),
    [
        ("", QuantConfig(4, "awq", 4)),
        *(
            pytest.param(axes, how, marks=pytest.mark.slow)
            for axes in ("", "tp=2, ep=2, dp=2")
            for how in (QuantConfig(8, "rtn", 0), QuantConfig(4, "rtn", 4), QuantConfig(4, "awq", 4))
        ),
    ],
)
def test_quantized_experts_are_widened_by_their_products_alone(axes, how):
    params = weights(ROUTED)
    small = quantise_decoder(params, ROUTED, how, TEXT)
    placed, served = serve(small, ROUTED, Plan(axes))
    programs = make_programs(served, ServeConfig(slots=8, length=24, chunk=16, layout="stacked"))
    _, found = programs.prefill(programs.place(placed), TEXT, np.full(8, 16))
    np.testing.assert_allclose(found, logits(dequantize_layer(small, "float32"), ROUTED)[:, -1], atol=1e-4)
    layer = {"mlp": {"experts": jax.tree.map(lambda leaf: leaf[0], small["blocks"]["mlp"]["experts"])}}
    run = jax.make_jaxpr(lambda layer: dequantize_layer(layer, "float32", served._stays_quantized))
    widened = [one for one in run(layer).eqns if one.outvars[0].aval.size > 4 * 32]  # not the factors per input
    assert not widened  # nothing is widened before the products


def test_calibration_text_comes_from_all_over_a_file(tmp_path):
    (tmp_path / "text").write_text("ab" * 100)
    rows = read_calibration(tmp_path / "text", ByteTokenizer(), 3, 128)
    assert rows.shape == (3, 128) and rows[:, 0].tolist() == [97, 97, 97]
    with pytest.raises(ValueError, match="200 tokens; calibration needs 201"):
        read_calibration(tmp_path / "text", ByteTokenizer(), 3, 201)
    with pytest.raises(ValueError, match="'gptq' needs calibration"):
        SourceConfig("a run", bits=4, method="gptq")


def test_a_ticket_is_served_with_zeros_outside_its_mask(tmp_path):
    params = weights(DENSE)
    which = masks.prunable(params)
    mask = jax.tree.map(
        lambda leaf, live: (
            jax.random.bernoulli(jax.random.key(1), 0.3, leaf.shape) if live else jnp.ones(leaf.shape, bool)
        ),
        params,
        which,
    )
    path = export.save(tmp_path / "ticket.safetensors", params, mask)
    found = read_ticket(path, DENSE)
    assert jax.tree.all(jax.tree.map(lambda a, b, m: np.array_equal(a, np.where(m, b, 0)), found, params, mask))
    with pytest.raises(ValueError, match="another model"):
        read_ticket(path, replace(DENSE, width=32))


@pytest.mark.long
def test_a_hugging_face_directory_is_served(tmp_path):
    pytest.importorskip("safetensors")
    from tessera.serving.huggingface import save_directory

    config = replace(tiny.CONFIG, tied=False)
    path = save_directory(tmp_path / "model", tiny.weights(config), config)
    engine, loaded = make_engine(SourceConfig(str(path)), Plan(""), tiny.SIZES)
    prompt = loaded.tokenizer.encode("hello").tolist()
    text = generate_all(engine, [prompt], [Sampling(temperature=0.0, max_tokens=5)])[0]
    whole = np.array([prompt + text.tokens])
    expected = jax.jit(Decoder(config).apply)({"params": tiny.weights(config)}, whole)[0].argmax(-1)
    assert text.tokens == expected[4:-1].tolist()
