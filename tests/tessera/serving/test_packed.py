"""Quantized weights of Hugging Face directories, beside what the libraries that packed them compute."""

import contextlib
import json
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.inference.quantize import QuantConfig, Quantized, dequantize, is_quantized
from sharding.inference.sample import greedy
from sharding.plan import Plan
from tessera.cli.explain_serving import weights_of
from tessera.infra.errors import ConfigError
from tessera.models.transformer import Decoder
from tessera.parallel.decoder import dequantize_layer
from tessera.serving import packed
from tessera.serving.families import NotConvertible
from tessera.serving.huggingface import load_directory, read_config, save_directory
from tessera.serving.load import SourceConfig, make_engine
from tessera.serving.programs import ServeConfig, make_programs
from tessera.serving.served import serve

GOLDEN = Path(__file__).parents[2] / "golden" / "huggingface" / "quantized"
INT4 = ("gptq", "gptq-act-order", "awq", "int4", "int4-asymmetric")
INT8 = ("gptq-v2", "int8", "int8-tensor")
FLOAT8 = ("float8", "fp8")
ASYMMETRIC = ("gptq", "gptq-act-order", "awq", "int4-asymmetric", "int8-tensor")


@pytest.mark.parametrize("name", INT4 + INT8 + FLOAT8)
def test_packed_weights_are_those_of_the_library_that_packed_them(name, golden):
    case = golden("quantized")
    params, config = load_directory(GOLDEN / name)
    kernels = [leaf for leaf in jax.tree.leaves(params, is_leaf=is_quantized) if is_quantized(leaf)]
    # Attention's four and the three of the feed-forward layer, all layers of each; float8 is widened.
    assert len(kernels) == (0 if name in FLOAT8 else 7)
    for kernel in kernels:
        assert kernel.values.dtype == (jnp.int4 if name in INT4 else jnp.int8)
        assert (kernel.zeros is not None) == (name in ASYMMETRIC)
        assert (kernel.groups is not None) == (name == "gptq-act-order")
    drawn = np.concatenate([case["tokens"], case[f"{name}.greedy"]], 1)
    found = jax.jit(Decoder(config).apply)({"params": dequantize_layer(params, "float32")}, drawn)
    np.testing.assert_allclose(found[:, :12], case[name], atol=1e-4)
    assert np.array_equal(found[:, 11:-1].argmax(-1), case[f"{name}.greedy"])


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("gptq-act-order", "tp=2, ep=2"),
        *(
            pytest.param(name, axes, marks=pytest.mark.slow)
            for name in INT4 + INT8
            for axes in (
                "",
                "tp=2",
                "pp=2, tp=2",
                *(["ep=2", "tp=2, ep=2"] if name in ("awq", "gptq-act-order") else []),
            )
        ),
    ],
)
def test_packed_weights_are_served_as_they_are(name, axes, golden):
    case, steps = golden("quantized"), 5
    params, config = load_directory(GOLDEN / name)
    params, served = serve(params, config, Plan(axes))
    programs = make_programs(served, ServeConfig(slots=4, length=24, chunk=12, steps=steps, layout="stacked"))
    params = programs.place(params)
    assert any(leaf.dtype in (jnp.int4, jnp.int8) for leaf in jax.tree.leaves(params))
    prompts = np.resize(case["tokens"], (4, 12)).astype(np.int32)
    state, logits = programs.prefill(params, prompts, np.full(4, 12, np.int32))
    np.testing.assert_allclose(logits, np.resize(case[name][:, -1], (4, 64)), atol=1e-4)
    first = np.asarray(logits).argmax(-1)
    _, drawn = programs.generate(params, state, first, np.full(4, steps, np.int32), greedy(4))
    found = np.concatenate([first[None], np.asarray(drawn.tokens)]).T
    assert np.array_equal(found, np.resize(case[f"{name}.greedy"], (4, 6)))


def words(numbers, bits, axis, order=range(8)):
    """Whole numbers [R, C] packed along an axis as the formats say: number n from bit n * bits on, low bits first."""
    numbers = np.asarray(numbers)
    if axis == 0:
        return words(numbers.T, bits, 1).T
    packed_RC = np.zeros((numbers.shape[0], -(-numbers.shape[1] * bits // 32)), np.int64)
    for (row, column), number in np.ndenumerate(numbers):
        group, place = divmod(column, 8)
        at = (8 * group + list(order).index(place)) * bits
        packed_RC[row, at // 32] |= int(number) << at % 32
    return packed_RC.astype(np.uint32).view(np.int32)


@pytest.mark.long
@given(st.data())
def test_every_layout_is_unpacked_to_the_published_formula(data):
    layout = data.draw(st.sampled_from(["gptq", "gptq_v2", "awq", "compressed-tensors"]))
    bits = data.draw(st.sampled_from([4] if layout == "awq" else [4, 8]))
    heads, size = data.draw(st.sampled_from([(1, 8), (3, 8)]))
    inputs, outputs = heads * size, 16  # few shapes, and never as many outputs as inputs: each is compiled
    group = data.draw(st.sampled_from([n for n in (4, 8, 24) if inputs % n == 0]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    limit, J = 2**bits, inputs // group
    signed = layout == "compressed-tensors"
    q_OI = rng.integers(0, limit, (outputs, inputs))
    z_OJ = rng.integers(int(layout == "gptq"), limit, (outputs, J))
    s_OJ = rng.uniform(0.01, 1, (outputs, J)).astype(np.float16)
    group_I = np.arange(inputs) // group
    if ordered := layout != "awq" and data.draw(st.booleans()):
        group_I = rng.permutation(group_I)
    wanted = (q_OI - z_OJ[:, group_I]) * s_OJ.astype(np.float64)[:, group_I]

    files = {"a.g_idx": group_I.astype(np.int32)} if ordered else {}
    if signed:  # as numbers from -limit / 2 on, to which limit / 2 is added again when packed
        files = {f"a.weight_{name[2:]}": one for name, one in files.items()} | {
            "a.weight_packed": words(q_OI, bits, 1),
            "a.weight_scale": s_OJ,
            "a.weight_shape": np.array([outputs, inputs]),
            "a.weight_zero_point": words(z_OJ, bits, 0),
        }
    elif layout == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)  # of a group of eight outputs in a word
        files |= {"a.qweight": words(q_OI.T, 4, 1, order), "a.qzeros": words(z_OJ.T, 4, 1, order), "a.scales": s_OJ.T}
    else:
        stored = z_OJ - (layout == "gptq")
        files |= {"a.qweight": words(q_OI.T, bits, 0), "a.qzeros": words(stored.T, bits, 1), "a.scales": s_OJ.T}

    entry = {"quant_method": layout.removesuffix("_v2"), "bits": bits, "checkpoint_format": layout}
    if layout == "awq":
        entry.pop("checkpoint_format")
    weights = {"num_bits": bits, "type": "int", "strategy": "group"}
    entry |= {"format": "pack-quantized", "config_groups": {"group_0": {"weights": weights}}} if signed else {}
    how = packed.scheme(entry, "config.json")
    kinds = {name: (array.shape, "I32" if array.dtype == np.int32 else "F16") for name, array in files.items()}
    module = packed.find(how, kinds, files.__getitem__, "here")["a.weight"]
    assert module.shape == (outputs, inputs) and set(module.parts.values()) == set(files)
    found = packed.read(how, module, files.__getitem__)
    np.testing.assert_allclose(found.widen(), wanted, rtol=1e-6)
    made = packed.kernel([found, found], (heads, size, outputs), 2, lambda array: array)
    both = dequantize(made)  # of attention's output, [H, h, D]
    assert both.shape == (2, heads, size, outputs)
    np.testing.assert_allclose(both[1].reshape(inputs, outputs).T, wanted, rtol=1e-5, atol=1e-6)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["float", "int", "gptq", "group", "dense", "ab", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "weights", "format"]), inner),
    max_leaves=5,
)
ENTRIES = ["bits", "checkpoint_format", "version", "format", "config_groups", "sparsity_config", "weight_block_size"]


@given(st.sampled_from(packed.METHODS), st.dictionaries(st.sampled_from([*ENTRIES, "fmt", "dynamic"]), JSON), JSON)
def test_any_entry_of_quantization_is_read_or_refused(method, entries, anything):
    for entry in ({"quant_method": method} | entries, anything, {"quant_method": anything}):
        with contextlib.suppress(NotConvertible):
            assert packed.scheme(entry, "config.json") is None or entry["quant_method"] == method


@given(st.data())
def test_any_damage_to_the_tensors_of_a_projection_is_refused(data):
    """Or changes numbers and no shapes: what is read goes together."""
    name = data.draw(st.sampled_from(["gptq-act-order", "awq", "int4-asymmetric", "int8-tensor"]))
    how = packed.scheme(json.loads((GOLDEN / name / "config.json").read_text())["quantization_config"], "config.json")
    stem = "model.layers.0.self_attn.q_proj."
    files = {key: one for key, one in whole(name).items() if key.startswith(stem)}
    kinds = {np.dtype(np.int32): "I32", np.dtype(np.int8): "I8", np.dtype(np.int64): "I64"}
    key = data.draw(st.sampled_from(sorted(files)))
    damage = data.draw(
        st.sampled_from(
            [
                *(
                    lambda x: x[:-1],
                    lambda x: x.reshape(-1),
                    lambda x: x.reshape(-1)[:0],
                    lambda x: x.T,
                    lambda x: x[None],
                ),
                *(lambda x, kind=kind: x.astype(kind) for kind in (np.int8, np.int64, np.float32, bool)),
                *(lambda x: -x, lambda x: np.zeros((), x.dtype), lambda x: np.full_like(x, 100)),
            ]
        )
    )
    with np.errstate(all="ignore"):
        files[key] = damage(files[key])
    with contextlib.suppress(NotConvertible):
        shapes = {one: (array.shape, kinds.get(array.dtype, "F32")) for one, array in files.items()}
        for module in packed.find(how, shapes, files.__getitem__, "here").values():
            assert packed.read(how, module, files.__getitem__).widen().shape == module.shape


@cache
def whole(name):
    from safetensors.numpy import load_file

    return load_file(GOLDEN / name / "model.safetensors")


def tampered(directory, name, entries, change=None):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(GOLDEN / name, directory)
    settings = json.loads((directory / "config.json").read_text())
    settings["quantization_config"] |= entries
    (directory / "config.json").write_text(json.dumps(settings))
    if change:
        found = load_file(directory / "model.safetensors")
        change(found)
        save_file(found, directory / "model.safetensors", {"format": "pt"})
    return directory


PROJECTION = "model.layers.1.mlp.down_proj"


def cut(part):
    return lambda found: found.update({f"{PROJECTION}.{part}": found[f"{PROJECTION}.{part}"][:-1]})


def without(part):
    return lambda found: found.pop(f"{PROJECTION}.{part}")


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}}
UNREADABLE = {
    "another method": ("gptq", {"quant_method": "bitsandbytes"}, None, "quant_method='bitsandbytes' is not read; gptq"),
    "three bits": ("gptq", {"bits": 3}, None, "gptq with bits=3 is not read"),
    "bits of some projections": ("gptq", {"dynamic": {"-:.*down": {}}}, None, "with dynamic="),
    "Marlin": ("gptq", {"checkpoint_format": "marlin"}, None, "checkpoint_format='marlin'"),
    "another kernel's AWQ": ("awq", {"version": "gemv"}, None, "awq with version='gemv' is not read"),
    "sparse": ("int4", {"format": "marlin-24"}, None, "format='marlin-24'"),
    "NVFP4": ("int4", {"format": "nvfp4-pack-quantized"}, None, "format='nvfp4-pack-quantized'"),
    "a quantized cache": ("int4", {"kv_cache_scheme": {"num_bits": 8}}, None, "kv_cache_scheme="),
    "rotations": ("int4", {"transform_config": {"config_groups": {"R1": {}}}}, None, "transform_config="),
    "groups of nothing": ("int4", {"config_groups": {"group_0": {"weights": None}}}, None, "group_0.weights=None"),
    "five bits": (
        "int4",
        {"config_groups": {"group_0": GROUP | {"weights": GROUP["weights"] | {"num_bits": 5}}}},
        None,
        r"group_0.weights.num_bits=5",
    ),
    "other float8": ("fp8", {"fmt": "e5m2"}, None, "fp8 with fmt='e5m2'"),
    "blocks that are none": ("fp8", {"weight_block_size": [0, 16]}, None, r"weight_block_size=\[0, 16\]"),
    "no scales": ("gptq", {}, without("scales"), r"down_proj\.qweight without .*down_proj\.scales"),
    "no scales of rows": ("int8", {}, without("weight_scale"), r"down_proj\.weight without .*down_proj\.weight_scale"),
    "a group too few": ("gptq", {}, cut("scales"), r"down_proj\.weight has shape \(32, 24\)"),
    "an input too few": ("gptq", {}, cut("g_idx"), r"do not go together: .*g_idx \[31\]"),
    "a row of words too few": ("gptq", {}, cut("qweight"), r"down_proj\.weight has shape \(32, 24\)"),
    "scales of other outputs": ("int8", {}, cut("weight_scale"), r"down_proj\.weight: .*do not go together"),
    "a group that is none": (
        "gptq",
        {},
        lambda found: found[f"{PROJECTION}.g_idx"].__setitem__(3, 4),
        "do not go together",
    ),
    "no quantized tensors of that method": (
        "gptq",
        {"quant_method": "awq", "version": "gemm"},
        None,
        r"k_proj\.weight has shape \(256, 4\)",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_layouts_that_are_not_read_are_refused_by_name(name, tmp_path):
    model, entries, change, message = UNREADABLE[name]
    tampered(tmp_path / "model", model, entries, change)
    with pytest.raises(NotConvertible, match=message):
        load_directory(tmp_path / "model")


def test_what_quantizes_activations_reads_as_its_weights_alone(tmp_path, caplog):
    """w8a8: scales of activations change nothing here, which is said."""
    activations = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}}
    made = tampered(
        tmp_path / "model",
        "int8",
        {"config_groups": groups},
        lambda found: found.update({f"{PROJECTION}.input_scale": np.ones(1, np.float32)}),
    )
    params, config = load_directory(made)
    assert "activations are not quantized here" in caplog.text
    plain, _ = load_directory(GOLDEN / "int8")
    assert jax.tree.all(jax.tree.map(np.array_equal, params, plain)) and config == read_config(GOLDEN / "int8")


def test_plans_of_quantized_files_are_explained_with_the_bits_that_are_said():
    with pytest.raises(ConfigError, match=r"weights are quantized; say how .*--config\.model\.bits=4"):
        weights_of(SourceConfig(str(GOLDEN / "awq")))
    assert weights_of(SourceConfig(str(GOLDEN / "awq"), bits=4, group=16)) == QuantConfig(4, group=16)
    assert weights_of(SourceConfig(str(GOLDEN.parent / "llama"))) is None


def test_quantized_weights_are_not_rounded_again_nor_exported(tmp_path, monkeypatch):
    monkeypatch.setattr("tessera.serving.load.own_tokenizer", lambda *_: SimpleNamespace(vocab_size=64))
    with pytest.raises(ValueError, match="bits=4: the weights of .* are quantized already"):
        make_engine(SourceConfig(str(GOLDEN / "int4"), bits=4), Plan(""), ServeConfig(slots=2, length=16, chunk=8))
    params, config = load_directory(GOLDEN / "int4")
    with pytest.raises(NotConvertible, match="unquantised"):
        save_directory(tmp_path / "again", params, config)
    whole = dequantize_layer(params, "float32")
    again, _ = load_directory(save_directory(tmp_path / "whole", whole, config))
    assert jax.tree.all(jax.tree.map(np.array_equal, again, jax.tree.map(np.asarray, whole)))
    assert isinstance(params["blocks"]["mlp"]["up"]["kernel"], Quantized)
