"""GGUF files: weights against the Hugging Face directory they come from, tokens against the `tokenizers` package."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from sharding.plan import Plan
from tessera.cli import export_hf
from tessera.data.text import BPETokenizer
from tessera.serving.families import NotConvertible
from tessera.serving.gguf import load_gguf, read_format, read_tokenizer
from tessera.serving.huggingface import TextFormat, load_directory, read_config
from tessera.serving.load import SourceConfig, export_directory, load, make_engine
from tessera.serving.programs import ServeConfig

gguf = pytest.importorskip("gguf")
GOLDEN = Path(__file__).parents[2] / "golden" / "huggingface"
SENTENCES = [
    "It's 1984: the clocks  struck thirteen.\n\n\tÉté, naïve 12345",
    "def f(x):\n    return x  # ünïcode",
    "a b c",
]
PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def permute(weights, heads):
    """What llama.cpp's convert_hf_to_gguf does to query and key projections."""
    return weights.reshape(heads, 2, weights.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weights.shape)


def trained(vocab=300):
    """A tokenizer trained by the `tokenizers` package: its vocabulary and merges, and the object."""
    found = BPETokenizer.train(SENTENCES * 3, vocab)
    return json.loads(found._inner.to_str())["model"], found


def write(path, name, kind="F32", architecture="llama", drop=(), fields=(), tokens=True, wide=None, divisors=None):
    """A GGUF file of a golden Hugging Face directory; `wide` has down projections of 256 neurons, packed.

    `divisors` are those of the rotary frequencies.
    """
    import safetensors.numpy

    c = json.loads((GOLDEN / name / "config.json").read_text()) | (
        {"intermediate_size": 256} if wide is not None else {}
    )
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_key_length(c["head_dim"])
    writer.add_value_length(c["head_dim"])
    writer.add_rope_dimension_count(c["head_dim"])
    writer.add_rope_freq_base(c["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    vocabulary = ["<|end|>", "<|go|>", "t", "1", *(f"t{i}" for i in range(c["vocab_size"] - 4))]
    merges, types = ["t 1"], [3, 3] + [1] * (c["vocab_size"] - 2)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(vocabulary)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        writer.add_eos_token_id(0)
    for key, value in dict(fields).items():
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds[type(value)](key, value)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(divisors, np.float32))
    quantization = gguf.GGMLQuantizationType[kind]
    for theirs, weights in safetensors.numpy.load_file(GOLDEN / name / "model.safetensors").items():
        layer = theirs.split(".")[2] if "layers" in theirs else ""
        inner = theirs.removesuffix(".weight").removeprefix(f"model.layers.{layer}.")
        ours = (f"blk.{layer}." if layer else "") + PARTS[inner] + ".weight"
        heads = {"attn_q": c["num_attention_heads"], "attn_k": c["num_key_value_heads"]}.get(PARTS[inner])
        weights = permute(weights, heads) if heads else weights
        if ours in drop:
            continue
        if wide is not None and inner.startswith("mlp."):
            weights = np.ones((256, c["hidden_size"]), np.float32)
            if inner == "mlp.down_proj":
                writer.add_tensor(ours, wide[int(layer)], raw_dtype=quantization)
                continue
            writer.add_tensor(ours, weights)
            continue
        if kind == "F32" or wide is not None or weights.ndim == 1 or weights.shape[-1] % 32:
            writer.add_tensor(ours, weights)
        else:
            writer.add_tensor(ours, gguf.quants.quantize(weights, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_file_holds_the_model_it_was_made_from(name, tmp_path):
    wanted, config = load_directory(GOLDEN / name)
    params, found = load_gguf(write(tmp_path / "model.gguf", name))
    assert found == config
    for path, leaf in _flat(wanted).items():
        np.testing.assert_array_equal(_flat(params)[path], leaf, err_msg=path)


def q4_k(block):
    """256 weights of 144 bytes: d, dmin, eight 6-bit scales and minima, 4-bit values (llama.cpp, ggml-quants)."""
    d, dmin = block[:4].view(np.float16).astype(np.float64)
    packed, quants, out = block[4:16].astype(int), block[16:].astype(int), []
    for j in range(8):
        if j < 4:
            scale, least = packed[j] & 63, packed[j + 4] & 63
        else:
            scale = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4)
            least = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4)
        part = quants[32 * (j // 2) : 32 * (j // 2) + 32]
        out.append(d * scale * (part >> 4 if j % 2 else part & 15) - dmin * least)
    return np.concatenate(out)


def q6_k(block):
    """256 weights of a block of 210 bytes: low 4 bits, high 2 bits, sixteen int8 scales, d (llama.cpp, ggml-quants)."""
    low, high, scales = block[:128].astype(int), block[128:192].astype(int), block[192:208].view(np.int8).astype(int)
    d, out = float(block[208:].view(np.float16)[0]), np.zeros(256)
    for n in range(2):
        for i in range(32):
            ql, qh, at = low[64 * n + i], high[32 * n + i], 8 * n + i // 16
            other = low[64 * n + 32 + i]
            values = (ql & 15, other & 15, ql >> 4, other >> 4)
            for k, value in enumerate(values):
                q = (value | ((qh >> 2 * k & 3) << 4)) - 32
                out[128 * n + 32 * k + i] = d * scales[at + 2 * k] * q
    return out


@pytest.mark.parametrize(("kind", "size", "decode"), [("Q4_K", 144, q4_k), ("Q6_K", 210, q6_k)])
def test_blocks_of_256_weights_are_widened(kind, size, decode, tmp_path):
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 32, size), np.uint8)
    scale = np.array([0.01, 0.02] if kind == "Q4_K" else [0.01], np.float16).view(np.uint8)
    where = slice(0, 4) if kind == "Q4_K" else slice(208, 210)
    blocks[..., where] = scale
    params, config = load_gguf(write(tmp_path / "model.gguf", "llama", kind, wide=blocks))
    assert config.ff == 256
    wanted = np.stack([np.stack([decode(row) for row in layer]) for layer in blocks])  # [L, D, F]
    np.testing.assert_allclose(params["blocks"]["mlp"]["down"]["kernel"], wanted.swapaxes(1, 2), rtol=1e-3, atol=1e-6)


# Steps over the largest weight; half of one is the error, for Q4_0, which has one level less on one side, a whole one.
@pytest.mark.parametrize(("kind", "step"), [("F16", 2**-10), ("Q8_0", 1 / 127), ("Q4_0", 2 / 8), ("Q4_1", 2 / 15)])
def test_quantized_tensors_are_widened(kind, step, tmp_path):
    wanted, _ = load_directory(GOLDEN / "llama")
    params, _ = load_gguf(write(tmp_path / "model.gguf", "llama", kind))
    for path, leaf in _flat(wanted).items():
        found = _flat(params)[path]
        exact = path.endswith("gain") or "down" in path  # rows of 48 have no blocks of 32
        error = np.abs(found - leaf).max()
        assert error == 0 if exact else 0 < error <= 0.51 * step * np.abs(leaf).max(), path


REFUSED = {
    "another architecture": ({"architecture": "gemma2"}, "'gemma2'"),
    "experts": ({"fields": {"llama.expert_count": 4}}, "expert_count=4"),
    "positions of LongRoPE": ({"fields": {"llama.rope.scaling.type": "longrope"}}, "rope.scaling.type=longrope"),
    "a shrunk context": ({"fields": {"llama.rope.scaling.factor": 0.5}}, "rope.scaling.factor=0.5"),
    "scaled queries": ({"fields": {"llama.rope.scaling.attn_factor": 1.5}}, "rope.scaling.attn_factor=1.5"),
    "divided frequencies": ({"divisors": [1, 1, 1, 1, 1, 2, 3, 4]}, r"rope_freqs\.weight .* no counterpart"),
    "divisors of other channels": ({"divisors": [1.0] * 4}, r"rope_freqs\.weight .* no counterpart"),
    "divided and scaled": (
        {"divisors": [1.0] * 8, "fields": {"llama.rope.scaling.factor": 4.0}},
        r"rope_freqs\.weight .* with scaling 'linear'",
    ),
    "attention to what follows": ({"fields": {"llama.attention.causal": False}}, "attention.causal=False"),
    "a missing tensor": ({"drop": ("blk.1.attn_q.weight",)}, r"no tensor blk\.1\.attn_q\.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_counterpart_is_refused(name, tmp_path):
    options, message = REFUSED[name]
    with pytest.raises(NotConvertible, match=message):
        load_gguf(write(tmp_path / "model.gguf", "llama", **options))


def llama3_divisors(factor, theta=5e4, size=16):
    """What llama.cpp's convert_hf_to_gguf writes for Llama 3.1 and later: length 8192, turns from 1 to 4."""
    found = []
    for i in range(0, size, 2):
        wavelength = 2 * np.pi * theta ** (i / size)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        within = 1 / ((1 - smooth) / factor + smooth)
        found.append(1 if wavelength < 8192 / 4 else factor if wavelength > 8192 else within)
    assert sum(1 < one < factor for one in found) == 1
    return found


YARN = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
# Fields and divisors of a file, and the entries of Hugging Face that mean the same (llama.cpp, `load_hparams`).
SCALED = {
    "a factor without a kind": ({"llama.rope.scaling.factor": 4.0}, None, {"rope_type": "linear", "factor": 4.0}),
    "a factor by its old name": ({"llama.rope.scale_linear": 4.0}, None, {"rope_type": "linear", "factor": 4.0}),
    "a factor of nothing": ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None, {}),
    "no factor": ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.0}, None, {}),
    "YaRN": (
        YARN | {"llama.rope.scaling.original_context_length": 16},
        None,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ),
    "YaRN of the whole context": (YARN, None, {"rope_type": "yarn", "factor": 4.0}),
    **{
        f"Llama 3, factor {factor}": (
            {},
            llama3_divisors(factor),
            {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            | {"original_max_position_embeddings": 8192},
        )
        for factor in (8.0, 32.0)
    },
    "divisors of 1": ({}, [1.0] * 8, {}),
}


@pytest.mark.parametrize("name", SCALED)
def test_scaled_positions_are_those_of_llama_cpp(name, tmp_path):
    fields, divisors, entries = SCALED[name]
    _, found = load_gguf(write(tmp_path / "model.gguf", "llama", fields=fields, divisors=divisors))
    c = json.loads((GOLDEN / "llama" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(c | {"rope_parameters": c["rope_parameters"] | entries}))
    assert found == read_config(tmp_path) and (found.rope_scaling.kind == "none") == (not entries)


def test_texts_end_where_llama_cpp_ends_them(tmp_path):
    """llama-vocab.cpp: at the tokens of three fields and at those of certain texts."""
    ends = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 3}
    assert read_format(write(tmp_path / "a.gguf", "llama", fields=ends)).ends == (0, 5, 3)
    model, _ = trained()
    assert read_format(tokenizer_file(tmp_path / "b.gguf", model)).ends == (len(model["vocab"]),)  # <|end|>
    outside = write(tmp_path / "c.gguf", "llama", fields={"tokenizer.ggml.eot_token_id": 64})
    with pytest.raises(NotConvertible, match=r"eot_token_id=64: it has tokens 0 to 63"):
        read_format(outside)


def test_a_file_that_is_none_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.gguf"):
        load_gguf(tmp_path / "nothing.gguf")
    (tmp_path / "text.gguf").write_text("hello, this is no model at all")
    with pytest.raises(NotConvertible, match=r"text\.gguf is no GGUF file"):
        load_gguf(tmp_path / "text.gguf")


def tokenizer_file(path, model, split="gpt-2", kind="gpt2", begins=False):
    writer = gguf.GGUFWriter(path, "llama")
    vocabulary = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(split)
    writer.add_add_bos_token(begins)
    writer.add_token_list([*vocabulary, "<|end|>"])
    writer.add_token_types([1] * len(vocabulary) + [3])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_tokenizer_comes_with_its_splits_and_special_tokens(tmp_path):
    pytest.importorskip("tokenizers")
    model, wanted = trained()
    found = BPETokenizer(read_tokenizer(tokenizer_file(tmp_path / "a.gguf", model)))
    for text in SENTENCES:
        assert found.encode(text).tolist() == wanted.encode(text).tolist() and found.decode(found.encode(text)) == text
    end = len(model["vocab"])
    assert found.encode("a b<|end|>c").tolist().count(end) == 1 and found.decode(np.asarray([end])) == ""
    digits = BPETokenizer(read_tokenizer(tokenizer_file(tmp_path / "b.gguf", model, "smollm")))
    assert len(digits.encode("12345")) == 5 > len(found.encode("12345"))
    begins = tokenizer_file(tmp_path / "d.gguf", model, begins=True)
    with pytest.raises(NotConvertible, match="no token before the text"):
        read_tokenizer(begins)
    with pytest.raises(NotConvertible, match="tokenizer 'llama' .*tokenizer.json"):
        read_tokenizer(tokenizer_file(tmp_path / "c.gguf", model, kind="llama"))


def test_texts_longer_than_the_positions_are_refused(tmp_path):
    pytest.importorskip("tokenizers")
    source = SourceConfig(str(write(tmp_path / "model.gguf", "llama-tied")))
    with pytest.raises(ValueError, match=r"length=65: .*model\.gguf has max_position_embeddings=64"):
        make_engine(source, Plan(), ServeConfig(length=65))


def test_a_file_becomes_a_directory_at_once(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tokenizers")
    file = write(tmp_path / "model.gguf", "llama", fields={"tokenizer.chat_template": "{{ messages }}"})
    assert export_hf.main([str(file), str(tmp_path / "model")]) == 0
    direct, exported = load(SourceConfig(str(file))), load(SourceConfig(str(tmp_path / "model")))
    assert direct.format == TextFormat(None, (0,), "{{ messages }}", 64)
    assert exported.format == direct.format._replace(special={"eos_token": direct.tokenizer.name_of(0)})
    assert direct.config == exported.config and direct.tokenizer.vocab_size == exported.tokenizer.vocab_size == 64
    wanted = _flat(load_directory(GOLDEN / "llama")[0])
    for loaded in (direct, exported):
        assert all(np.array_equal(leaf, wanted[path]) for path, leaf in _flat(loaded.params).items())
    capsys.readouterr()
    assert export_hf.main([str(file), str(tmp_path / "model")]) == 1
    assert capsys.readouterr().err.startswith("error: ") and len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr("tessera.serving.load.write_text", lambda *_: 1 / 0)
    leftover = tmp_path / ".again.exporting" / "again"  # of an export that was killed
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ZeroDivisionError):
        export_directory(direct, tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.gguf"]


@pytest.mark.parametrize("text", SENTENCES)
def test_the_tokenizer_of_a_byte_run_travels_with_it(text, tmp_path):
    pytest.importorskip("tokenizers")
    BPETokenizer.of_bytes().save(tmp_path / "tokenizer.json")
    found = BPETokenizer.load(tmp_path / "tokenizer.json")
    assert found.encode(text).tolist() == list(text.encode()) and found.decode(found.encode(text)) == text


def _flat(tree, prefix=""):
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {path: leaf for name, branch in tree.items() for path, leaf in _flat(branch, f"{prefix}/{name}").items()}


def test_an_array_longer_than_its_file_is_refused_and_not_listed(tmp_path):
    """The length of an array of 32-bit numbers says 2^60, in a file of some kilobytes."""
    file = write(tmp_path / "text.gguf", "llama")
    data, key = bytearray(file.read_bytes()), b"tokenizer.ggml.token_type"
    at = data.index(key) + len(key) + 8  # the types of the value and of its elements
    assert int.from_bytes(data[at : at + 8], "little") == 64
    data[at : at + 8] = (2**60).to_bytes(8, "little")
    file.write_bytes(data)
    begun = time.process_time()
    with pytest.raises(NotConvertible, match=r"text\.gguf is no GGUF file, or damaged .*ends in the middle"):
        load_gguf(file)
    assert time.process_time() - begun < 5
