"""Quantized weights of Hugging Face directories, beside what the libraries that packed them compute."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.inference.quantize import Quantized, dequantize, is_quantized
from sharding.inference.sample import greedy
from sharding.plan import Plan
from tessera.models.transformer import Decoder
from tessera.parallel.decoder import dequantize_layer
from tessera.serving import packed
from tessera.serving.families import NotConvertible
from tessera.serving.huggingface import load_directory, read_config, save_directory
from tessera.serving.load import SourceConfig, make_engine
from tessera.serving.programs import ServeConfig, make_programs
from tessera.serving.served import serve

GOLDEN = Path(__file__).parents[2] / "golden" / "huggingface" / "quantized"
BITS = {
    "gptq": 4,
    "gptq-act-order": 4,
    "gptq-v2": 8,
    "awq": 4,
    "int4": 4,
    "int4-asymmetric": 4,
    "int8": 8,
    "int8-tensor": 8,
}
ASYMMETRIC = ("gptq", "gptq-act-order", "awq", "int4-asymmetric", "int8-tensor")


@pytest.mark.parametrize("name", BITS)
def test_packed_weights_are_those_of_the_library_that_packed_them(name, golden):
    case = golden("quantized")
    params, config = load_directory(GOLDEN / name)
    kernels = [leaf for leaf in jax.tree.leaves(params, is_leaf=is_quantized) if is_quantized(leaf)]
    assert len(kernels) == 7  # attention's four and the three of the feed-forward layer, all layers of each
    for kernel in kernels:
        assert kernel.values.dtype == (jnp.int4 if BITS[name] == 4 else jnp.int8)
        assert (kernel.zeros is not None) == (name in ASYMMETRIC)
        assert (kernel.groups is not None) == (name == "gptq-act-order")
    drawn = np.concatenate([case["tokens"], case[f"{name}.greedy"]], 1)
    found = jax.jit(Decoder(config).apply)({"params": dequantize_layer(params, "float32")}, drawn)
    np.testing.assert_allclose(found[:, :12], case[name], atol=1e-4)
    assert np.array_equal(found[:, 11:-1].argmax(-1), case[f"{name}.greedy"])


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("gptq", ""),
        ("gptq-act-order", "tp=2, ep=2"),
        *(
            pytest.param(name, axes, marks=pytest.mark.slow)
            for name in BITS
            for axes in ("", "tp=2", "pp=2, tp=2", *(["ep=2", "tp=2, ep=2"] if name in ("awq", "gptq-act-order") else []))
        ),
    ],
)
def test_packed_weights_are_served_as_they_are(name, axes, golden):
    case, steps = golden("quantized"), 5
    params, config = load_directory(GOLDEN / name)
    params, served = serve(params, config, Plan(axes))
    programs = make_programs(served, ServeConfig(slots=4, length=24, chunk=12, steps=steps))
    params = programs.place(params)
    assert any(leaf.dtype in (jnp.int4, jnp.int8) for leaf in jax.tree.leaves(params))
    prompts = np.resize(case["tokens"], (4, 12)).astype(np.int32)
    state, logits = programs.prefill(params, prompts, np.full(4, 12, np.int32))
    np.testing.assert_allclose(logits, np.resize(case[name][:, -1], (4, 64)), atol=1e-4)
    first = np.asarray(logits).argmax(-1)
    _, drawn = programs.generate(params, state, first, np.full(4, steps, np.int32), greedy(4))
    found = np.concatenate([first[None], np.asarray(drawn.tokens)]).T
    assert np.array_equal(found, np.resize(case[f"{name}.greedy"], (4, 6)))
