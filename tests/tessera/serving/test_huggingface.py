import dataclasses
import functools
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe.experts import MixtureConfig
from moe.gate import RouterConfig
from moe.layer import MoEConfig
from sharding.inference.sample import greedy
from sharding.plan import Plan
from tessera.models.attention_forms import LatentConfig, RopeScaling
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.serving import config_json, huggingface
from tessera.serving.engine import Engine
from tessera.serving.families import FAMILIES, NotConvertible
from tessera.serving.huggingface import (
    ForeignFiles,
    is_directory,
    load_directory,
    read_config,
    read_format,
    save_directory,
    write_config,
)
from tessera.serving.programs import ServeConfig, make_programs
from tessera.serving.requests import Sampling
from tessera.serving.served import serve

GOLDEN = Path(__file__).parents[2] / "golden" / "huggingface"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def tensors(directory):
    import safetensors.numpy

    return {
        name: tensor
        for file in directory.glob("*.safetensors")
        for name, tensor in safetensors.numpy.load_file(file).items()
    }


MODELS = ("llama", "llama-tied", "mixtral", "llama-linear", "llama-3.1", "mistral", "qwen2", "qwen3", "olmo2")
ROUTED = ("qwen3_moe", "qwen2_moe", "qwen2_moe-normalized", "olmoe", "olmoe-normalized")
MIXED = ("qwen2_moe-dense-layers", "qwen3_moe-dense-layers")
FORMS = ("gemma2", "gemma3_text", "smollm3", "phi3", "gpt_oss", "deepseek_v2", "deepseek_v2-greedy", "deepseek_v3")


@pytest.mark.parametrize("name", MODELS + ROUTED + MIXED + FORMS)
def test_a_model_of_transformers_gives_equal_logits_and_comes_back_the_same(name, tmp_path, golden):
    theirs, case = GOLDEN / name, golden("huggingface")
    assert is_directory(theirs)
    params, config = load_directory(theirs)
    drawn = np.concatenate([case["tokens"], case[f"{name}.greedy"]], 1)
    found = jax.jit(Decoder(config).apply)({"params": params}, drawn)
    np.testing.assert_allclose(found[:, :12], case[name], atol=1e-4)
    assert np.array_equal(found[:, 11:-1].argmax(-1), case[f"{name}.greedy"])

    save_directory(tmp_path / "ours", params, config, shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    before, after = tensors(theirs), tensors(tmp_path / "ours")
    assert before.keys() == after.keys()
    for path, tensor in before.items():
        assert np.array_equal(tensor, after[path]), path
    again, same = load_directory(tmp_path / "ours")
    assert same == config and jax.tree.all(jax.tree.map(np.array_equal, again, params))
    # With this file and the same tensors transformers computes the same logits: `make golden` asserts it.
    exported = (GOLDEN / f"{name}.exported_config.json").read_text()
    assert (tmp_path / "ours" / "config.json").read_text() == exported


ROTARY = json.loads((GOLDEN / "rotary.json").read_text())


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_entries_are_found_where_transformers_finds_them(name, tmp_path, golden):
    model, entries = ROTARY[name]
    params, config = load_directory(tampered(tmp_path / "model", model, entries))
    case = golden("huggingface")
    found = jax.jit(Decoder(config).apply)({"params": params}, case["tokens"])
    np.testing.assert_allclose(found[:, -1], case["rotary"][name], atol=1e-4)


PLANS = [
    ("gemma3_text", "pp=2, tp=2"),
    pytest.param("gpt_oss", "ep=2, tp=2, cp=2", marks=pytest.mark.long),
    pytest.param("deepseek_v3", "ep=2, tp=2", marks=pytest.mark.long),
]
SLOW_PLANS = [
    *((name, axes) for name in ROUTED for axes in ("", "ep=2, tp=4", "tp=2", "ep=4", "pp=2, tp=2, ep=2")),
    *((name, axes) for name in MIXED for axes in ("", "ep=2, tp=4", "tp=2", "ep=4")),
    *((name, axes) for name in FORMS for axes in ("", "tp=2, cp=2", "tp=4")),
    ("gemma2", "dp=2, tp=4"),
    ("phi3", "pp=2, tp=2"),
    ("gpt_oss", "ep=4"),
    ("deepseek_v2", "ep=2, cp=2"),
    ("deepseek_v2-greedy", "pp=2, tp=2"),
    *(("mistral", axes) for axes in ("", "cp=8", "cp=2, tp=2", "pp=2, cp=2, tp=2")),
    *((name, axes) for name in ("qwen2", "qwen3", "olmo2", "mixtral") for axes in ("tp=4", "pp=2, tp=2")),
]


@pytest.mark.parametrize(
    ("name", "axes"),
    PLANS + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_PLANS if case not in PLANS],
)
def test_a_plan_draws_the_greedy_tokens_of_transformers(name, axes, golden):
    params, config = load_directory(GOLDEN / name)
    case, steps = golden("huggingface"), 5
    prompts = np.resize(case["tokens"], (8, 12)).astype(np.int32)
    params, served = serve(params, config, Plan(axes))
    programs = make_programs(served, ServeConfig(slots=8, length=24, chunk=12, steps=steps))
    params = programs.place(params)
    state, logits = programs.prefill(params, prompts, np.full(8, 12, np.int32))
    first = np.asarray(logits).argmax(-1)
    _, drawn = programs.generate(params, state, first, np.full(8, steps, np.int32), greedy(8))
    found = np.concatenate([first[None], np.asarray(drawn.tokens)]).T
    assert np.array_equal(found, np.resize(case[f"{name}.greedy"], (8, 6)))


def test_windows_of_qwen_without_a_list_of_layers_are_in_the_last_ones(tmp_path):
    """transformers' Qwen2Config: a layer has the window if its index is at least max_window_layers."""
    settings = json.loads((GOLDEN / "qwen2" / "config.json").read_text())
    del settings["layer_types"]
    for first, letters in ((0, "LLLLL"), (2, "GGLLL"), (4, "GGGGL")):
        changed = settings | {"num_hidden_layers": 5, "max_window_layers": first, "use_sliding_window": True}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        assert "".join(read_config(tmp_path).attention_kinds) == letters
    (tmp_path / "config.json").write_text(json.dumps(changed | {"max_window_layers": 5}))
    assert read_config(tmp_path).window == 0


@pytest.mark.long
@pytest.mark.parametrize(
    "cache_dtype", ["float32", *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("bfloat16", "int8"))]
)
def test_latent_attention_caches_latents_and_no_keys_and_values(cache_dtype, golden):
    params, config = load_directory(GOLDEN / "deepseek_v3")
    params, served = serve(params, config, Plan(""))
    programs = make_programs(served, ServeConfig(slots=2, length=24, chunk=12, cache_dtype=cache_dtype))
    latent, per = config.latent, {"float32": 4, "bfloat16": 2, "int8": 1}[cache_dtype]
    scales = 4 * (cache_dtype == "int8")
    a_token = config.layers * ((latent.kv_rank + latent.rope_dim) * per + scales)  # of all heads together
    state = programs.start()
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache)) == 2 * 24 * a_token + 2 * 4
    assert programs.cache_config.bytes == 2 * 24 * a_token
    # A slot that begins with another's latents goes on as the one that has read them.
    engine, case = Engine(programs, programs.place(params), prefix_cache=4), golden("huggingface")
    prompt, wanted = case["tokens"][0].tolist(), case["deepseek_v3.greedy"][0].tolist()
    sampling = Sampling(temperature=0.0, max_tokens=6)
    first = engine.submit(prompt, sampling)
    engine.run()
    second = engine.submit([*prompt[:-1], 3], sampling), engine.submit(prompt, sampling)
    engine.run()
    assert engine.counts["prefix_tokens"] >= 2 * (len(prompt) - 1)
    assert first.tokens == second[1].tokens
    assert cache_dtype != "float32" or first.tokens == wanted


def test_what_has_no_counterpart_is_refused(tmp_path):
    pytest.importorskip("safetensors")
    base = {"model_type": "llama", **SIZES, "rms_norm_eps": 1e-6}
    for wrong in ({"mlp_bias": True}, {"model_type": "gpt2"}, {"rope_scaling": {"rope_type": "longrope"}}):
        (tmp_path / "config.json").write_text(json.dumps(base | wrong))
        with pytest.raises(NotConvertible, match=next(iter(wrong)).split("_scaling")[0]):
            read_config(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_config(tmp_path / "nothing")
    config = TransformerConfig(vocab_size=8, layers=2, width=8, heads=2, ff=8)
    params = jax.jit(Decoder(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    made = save_directory(tmp_path / "small", params, config, "bfloat16")
    loaded, same = load_directory(made)
    assert same.tied and same.layers == 2
    half = jax.tree.map(lambda leaf: np.asarray(leaf.astype(jnp.bfloat16), np.float32), params)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, half))
    (made / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load_directory(made)


def tampered(directory, name, entries=(), change=None):
    """A copy of a golden model with entries of its config.json (None: left out) and its tensors changed."""
    from safetensors.numpy import save_file

    shutil.copytree(GOLDEN / name, directory)
    settings = json.loads((directory / "config.json").read_text())
    for key, value in dict(entries).items():
        settings.pop(key, None)
        if value is not ABSENT:
            settings[key] = value
    (directory / "config.json").write_text(json.dumps(settings))
    if change:
        found = tensors(directory)
        change(found)
        save_file(found, directory / "model.safetensors", {"format": "pt"})
    return directory


ABSENT = object()
DOWN, GATE = "model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.gate_proj"


def add(name, like, dtype=np.float32):
    return lambda found: found.update({name: np.ones(found[like].shape, dtype)})


def turn(found):
    found[DOWN] = np.ascontiguousarray(found[DOWN].T)


def replace(name, make):
    return lambda found: found.update({name: make(found[name])})


# What is wrong: model, entries of config.json, change of the tensors, the message.
UNREADABLE = {
    "a bias nobody asks for": ("llama", {}, add(f"{GATE}.bias", "model.norm.weight"), r"gate_proj\.bias"),
    "QK-norm": ("llama", {}, add("model.layers.0.self_attn.q_norm.weight", "model.norm.weight"), "q_norm"),
    "scales": ("llama", {}, add(f"{GATE}.weight_scale", "model.norm.weight"), "weight_scale"),
    "fewer layers in the config": ("llama", {"num_hidden_layers": 1}, None, r"9 tensors .*model\.layers\.1"),
    "more layers in the config": ("llama", {"num_hidden_layers": 3}, None, r"no tensor model\.layers\.2.* and 4 more"),
    "fewer experts in the config": ("mixtral", {"num_local_experts": 2}, None, r"gate\.weight has shape \(4, 32\)"),
    "another head beside tied tables": (
        "llama-tied",
        {},
        add("lm_head.weight", "model.embed_tokens.weight"),
        "lm_head.weight differs from model.embed_tokens.weight",
    ),
    "a transposed tensor": (
        "llama",
        {},
        turn,
        r"down_proj.weight has shape \(48, 32\); .* \(32, 48\)",
    ),
    "int8": ("llama", {}, replace(DOWN, lambda x: x.astype(np.int8)), r"quantized weights: .*down_proj\.weight \(I8\)"),
    "float8": (
        "llama",
        {},
        replace(DOWN, lambda x: x.astype(ml_dtypes.float8_e4m3fn)),
        r"\(F8_E4M3\)",
    ),
    "quantization": ("llama", {"quantization_config": {"quant_method": "gptq"}}, None, "quantization_config"),
    "part of the channels": ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, None, "partial_rotary"),
    "a window of no tokens": (
        "mistral",
        {"sliding_window": 0},
        None,
        "sliding_window=0 must be",
    ),
    "windows of no size": (
        "qwen3",
        {"layer_types": ["full_attention", "sliding_attention"]},
        None,
        r"layer_types \['sliding_attention'\] without sliding_window",
    ),
    "chunks in some layers": (
        "gemma2",
        {"layer_types": ["chunked_attention", "full_attention", "sliding_attention"]},
        None,
        "chunked_attention",
    ),
    "types of some layers": ("gemma2", {"layer_types": ["full_attention"]}, None, "1 entries for num_hidden_layers=3"),
    "another activation of Gemma": ("gemma2", {"hidden_activation": "gelu"}, None, "hidden_activation='gelu'"),
    "attention to what follows": (
        "gemma3_text",
        {"use_bidirectional_attention": True},
        None,
        "bidirectional_attention",
    ),
    "a soft-cap that transformers ignores": (
        "gemma3_text",
        {"attn_logit_softcapping": 2.0},
        None,
        "attn_logit_softcap",
    ),
    "scaled local layers": (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        None,
        "rope_parameters of sliding_attention",
    ),
    "LongRoPE": ("phi3", {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0]}}, None, "longrope"),
    "4-bit experts": (
        "gpt_oss",
        {"quantization_config": {"quant_method": "mxfp4"}},
        None,
        "quantization.*mxfp4",
    ),
    "no sinks": (
        "gpt_oss",
        {},
        lambda found: found.pop("model.layers.1.self_attn.sinks"),
        r"no tensor model\.layers\.1\.self_attn\.sinks",
    ),
    "rotary halves of DeepSeek": ("deepseek_v3", {"rope_interleave": False}, None, "rope_interleave=False"),
    "biases of latents": ("deepseek_v3", {"attention_bias": True}, None, "attention_bias=True"),
    "another choice of experts": ("deepseek_v2", {"topk_method": "noaux_tc"}, None, "topk_method='noaux_tc'"),
    "a latent of another width": (
        "deepseek_v2",
        {"kv_lora_rank": 12},
        None,
        r"kv_b_proj.* has shape \(44, 10\); .*\(44, 12\)",
    ),
    "an entry of scaling": ("qwen3", {"rope_parameters": {"rope_type": "yarn", "mscal": 2.0}}, None, "'mscal': 2.0"),
    "another scaling": ("llama", {"rope_parameters": {"rope_type": "longrope"}}, None, "longrope"),
    "scaling without a factor": ("llama", {"rope_parameters": {"rope_type": "linear"}}, None, "'linear' need factor"),
    "YaRN without a factor": ("llama", {"rope_parameters": {"rope_type": "yarn"}}, None, "'yarn' need factor"),
    "Llama 3's scaling in part": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
        None,
        "'llama3' need low_freq_factor, high_freq_factor",
    ),
    "scaling of Phi-3": ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, None, "'linear'"),
    "one set of positions for two": (
        "gemma3_text",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        None,
        "gemma3_text has full_attention and sliding_attention",
    ),
    "tied by null": ("gemma2", {"tie_word_embeddings": None}, None, "tie_word_embeddings=None must be true or false"),
    "biases by text": ("qwen3", {"attention_bias": "false"}, None, "attention_bias='false' must be true or false"),
    "scores of another kind": ("deepseek_v3", {"scoring_func": "softmax"}, None, "scoring_func='softmax'"),
    "scores of V3 in V2": ("deepseek_v2", {"scoring_func": "sigmoid"}, None, "scoring_func='sigmoid'"),
    "a choice without groups": ("deepseek_v3", {"topk_method": "greedy"}, None, "topk_method='greedy'"),
    "experts in every second layer": ("deepseek_v3", {"moe_layer_freq": 2}, None, "moe_layer_freq=2"),
    "a window of Llama": ("llama", {"sliding_window": 16}, None, "sliding_window=16"),
    "another activation": ("llama", {"hidden_act": "gelu"}, None, "hidden_act='gelu'"),
    "experts of another activation": ("olmoe", {"hidden_act": "gelu"}, None, "hidden_act='gelu'"),
    "clipped queries": ("olmoe", {"clip_qkv": 8.0}, None, "clip_qkv=8.0"),
    "a window of OLMoE": ("olmoe", {"sliding_window": 4}, None, "sliding_window=4"),
    "a window of Qwen": (
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": 4},
        None,
        "sliding_window=4, use_sliding_window=True",
    ),
    "biases of Qwen3-MoE missing": ("qwen3_moe", {"attention_bias": True}, None, r"no tensor .*k_proj\.bias"),
    "a dense layer after a routed one": ("qwen3_moe", {"mlp_only_layers": [1]}, None, r"mlp_only_layers=\[1\] with"),
    "no layer with experts": ("qwen3_moe", {"mlp_only_layers": [0, 1]}, None, "first_k_dense_replace=2 of layers=2"),
    "dense layers at the end": (
        "qwen2_moe",
        {"decoder_sparse_step": 3},
        None,
        "layers=2 is not a multiple of .*every=3",
    ),
    "steps of no layer": ("qwen2_moe", {"decoder_sparse_step": 0}, None, "decoder_sparse_step=0.*: numbers of layers"),
    "dense layers of OLMoE": ("olmoe", {"mlp_only_layers": [0]}, None, r"mlp_only_layers=\[0\]"),
    "two numbers of experts": ("qwen3_moe", {"num_experts": 8}, None, "num_local_experts=4 and num_experts=8 differ"),
    "no experts": ("qwen2_moe", {"num_experts": 0}, None, "num_experts=0 must be a whole number above 0"),
    "more choices than experts": ("olmoe", {"num_experts_per_tok": 5}, None, "5"),
    "another width of experts": ("qwen2_moe", {"moe_intermediate_size": 12}, None, r"config.json asks for \(16, 12\)"),
    "a broken shared expert": (
        "qwen2_moe",
        {"shared_expert_intermediate_size": 20},
        None,
        "shared_expert_intermediate_size=20 is no multiple of moe_intermediate_size=8",
    ),
    "biases left over": ("qwen2_moe", {"qkv_bias": False}, None, r"6 tensors .*self_attn\.k_proj\.bias"),
    "biases missing": ("qwen2_moe-normalized", {"qkv_bias": True}, None, r"no tensor .*self_attn\.k_proj\.bias"),
    "norms of heads": (
        "olmoe",
        {"model_type": "qwen3_moe", "moe_intermediate_size": 8},
        None,
        r"k_norm.* has shape \(8,\); .* asks for \(4,\)",
    ),
    "a dense layer in the file": (
        "qwen3_moe",
        {},
        lambda found: [found.pop(name) for name in list(found) if "layers.1.mlp.experts" in name],
        r"no tensor model\.layers\.1\.mlp\.experts\.0\.down_proj\.weight.* and 7 more",
    ),
    "an expert missing": (
        "olmoe",
        {},
        lambda found: found.pop("model.layers.0.mlp.experts.3.up_proj.weight"),
        r"no tensor model\.layers\.0\.mlp\.experts\.3\.up_proj\.weight",
    ),
    "a shared expert nobody asks for": (
        "olmoe",
        {},
        add("model.layers.0.mlp.shared_expert.up_proj.weight", "model.norm.weight"),
        "shared_expert",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_would_load_as_another_model_is_refused_by_name(name, tmp_path):
    pytest.importorskip("safetensors")
    model, entries, change, message = UNREADABLE[name]
    with pytest.raises(NotConvertible, match=message):
        load_directory(tampered(tmp_path / "model", model, entries, change))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("end", [-1, 64, [2, 64]])
def test_a_text_ends_at_a_token_of_the_vocabulary(file, end, tmp_path):
    made = tampered(tmp_path / "model", "llama")
    settings = json.loads((made / file).read_text()) if (made / file).exists() else {}
    (made / file).write_text(json.dumps(settings | {"eos_token_id": 63}))
    assert 63 in read_format(made).ends
    (made / file).write_text(json.dumps(settings | {"eos_token_id": end}))
    with pytest.raises(NotConvertible, match=rf"{file}: eos_token_id=(-1|64): .* 64 has tokens 0 to 63"):
        read_format(made)


def test_what_follows_from_the_config_may_lie_beside_the_weights(tmp_path):
    pytest.importorskip("safetensors")

    def change(found):
        found["lm_head.weight"] = found["model.embed_tokens.weight"].copy()
        found["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    params, config = load_directory(tampered(tmp_path / "model", "llama-tied", {}, change))
    plain, _ = load_directory(GOLDEN / "llama-tied")
    assert config.tied and same(params, plain)


def test_other_safetensors_in_the_directory_are_not_read(tmp_path):
    pytest.importorskip("safetensors")
    from safetensors.numpy import save_file

    made = tampered(tmp_path / "model", "llama", {})
    wanted, _ = load_directory(made)
    save_file({name: 0 * tensor for name, tensor in tensors(made).items()}, made / "zeros.safetensors")
    assert same(load_directory(made)[0], wanted)
    (made / "model.safetensors").rename(made / "a.safetensors")
    with pytest.raises(NotConvertible, match=r"a\.safetensors, zeros\.safetensors and neither"):
        load_directory(made)
    index = {"weight_map": dict.fromkeys(tensors(GOLDEN / "llama"), "a.safetensors")}
    (made / huggingface.INDEX).write_text(json.dumps(index))
    assert same(load_directory(made)[0], wanted)
    (made / "a.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names 'a\.safetensors': no such file"):
        load_directory(made)


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_a_config_leaves_out_is_its_familys_default(kind):
    defaults = json.loads((GOLDEN / "defaults.json").read_text())[kind]
    said = {"model_type": kind} | ({"num_experts_per_tok": 2} if kind == "deepseek_v2" else {})
    empty, full = (config_json.settings(found, kind) for found in (said, defaults | said))
    assert config_json.read(empty, kind) == config_json.read(full, kind)
    for name in ("max_position_embeddings", "rms_norm_eps", "vocab_size"):
        assert empty[name] == full[name]


# Models of no family: changes of a routed model, the message.
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv_bias": True, "qk_norm": True}, "output_bias=False"),
        (
            {"mlp": "swiglu", "qk_norm": True, "qk_norm_scope": "projection"},
            "qwen3, differs in qk_norm_scope=",
        ),
        ({"mlp": "swiglu", "norm_position": "post"}, "norm_position='post'"),
        ({"qk_norm": True, "qk_norm_scope": "projection", "norm_position": "post"}, "norm_position='post'"),
        ({"qk_norm": True, "qk_norm_scope": "projection", "sinks": True}, "olmoe, differs in sinks=True"),
        ({"moe": {"shared": 1}}, "moe.shared=1"),
        ({"moe": {"shared": 1, "shared_gate": True}, "qk_norm": True}, "qk_norm=True"),
        ({"moe": {"biases": True}}, "moe.biases=True"),
        ({"moe": {"every": 2}}, "qwen3_moe, differs in qk_norm=False"),
        ({"moe": {"router": RouterConfig(experts=4, scale=2.0)}}, "mixtral, differs in moe.router.scale=2.0"),
        ({"moe": {"mixture": MixtureConfig(dispatch="capacity")}}, "moe.mixture.dispatch='capacity'"),
        ({"mlp": "swiglu", "window": 3, "attention_pattern": "LN"}, "attention_pattern='LN'"),
        ({"mlp": "geglu_tanh", "norm_position": "both"}, "mlp='geglu_tanh', norm_position='both'"),
    ],
    ids=str,
)
def test_a_model_of_no_family_is_not_exported(changes, message):
    moe = MoEConfig(**{"router": RouterConfig(experts=4)} | changes.get("moe", {}))
    with pytest.raises(NotConvertible, match=message):
        write_config(dataclasses.replace(SMALL, **{"mlp": "routed"} | changes | {"moe": moe}))


# Entries as published files have them, without the lists and names of transformers 5, and fields of the model.
OLD_FILES = {
    "gemma-3-1b": (
        {"model_type": "gemma3_text", "num_hidden_layers": 26, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
        | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 512, "sliding_window_pattern": 6},
        {"attention_pattern": "LLLLLG", "window": 512, "rope_theta": 1e6, "local_rope_theta": 1e4}
        | {"rope_scaling": RopeScaling("linear", 8.0), "query_pre_attn_scalar": 256, "embed_scale": 48.0},
    ),
    "gemma-2-2b": (
        {"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 224},
        {
            "attention_pattern": "LG",
            "window": 4096,
            "attention_softcap": 50.0,
            "logit_softcap": 30.0,
            "mlp": "geglu_tanh",
        },
    ),
    "SmolLM3": ({"model_type": "smollm3", "rope_scaling": None}, {"attention_pattern": "GGGN", "window": 0}),
    "gpt-oss-20b": (
        {"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32}
        | {"rope_scaling": {"rope_type": "yarn", "factor": 32.0, "truncate": False}, "max_position_embeddings": 4096},
        {"attention_pattern": "LG", "rope_scaling": RopeScaling("yarn", 32.0, 4096, truncate=False), "sinks": True},
    ),
    "DeepSeek-V2-Lite": (
        {"model_type": "deepseek_v2", "q_lora_rank": None, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 6}
        | {"rope_scaling": {"type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707}},
        {
            "latent": LatentConfig(512),
            "rope_scaling": RopeScaling("yarn", 40.0, 2048, mscale=0.707, mscale_all_dim=0.707),
        },
    ),
}


@pytest.mark.parametrize("name", OLD_FILES)
def test_entries_of_older_files_mean_what_they_meant(name, tmp_path):
    entries, fields = OLD_FILES[name]
    (tmp_path / "config.json").write_text(json.dumps(entries))
    found = read_config(tmp_path)
    assert {field: getattr(found, field) for field in fields} == fields


def test_fused_tensors_are_read_of_a_model_that_another_family_could_have(tmp_path):
    """A Phi-3 whose channels are all rotated is a Mistral but for its tensors, as which it is written."""
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    params, config = load_directory(tampered(tmp_path / "model", "phi3", rope))
    made = save_directory(tmp_path / "ours", params, config)
    assert json.loads((made / "config.json").read_text())["model_type"] == "mistral"
    again, found = load_directory(made)
    assert found == config and same(again, params)


def test_layers_that_predict_further_tokens_are_left_unread(tmp_path):
    extra = add("model.layers.3.eh_proj.weight", "model.norm.weight")
    one = tampered(tmp_path / "model", "deepseek_v3", {"num_nextn_predict_layers": 1}, extra)
    assert same(load_directory(one)[0], load_directory(GOLDEN / "deepseek_v3")[0])
    with pytest.raises(NotConvertible, match=r"eh_proj"):
        load_directory(tampered(tmp_path / "none", "deepseek_v3", {"num_nextn_predict_layers": 0}, extra))


def test_rotary_scaling_by_its_old_name(tmp_path):
    old = {"rope_parameters": ABSENT, "rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 5e5}
    config = read_config(tampered(tmp_path / "model", "llama", old))
    assert config.rope_scaling == RopeScaling("linear", 2.0) and config.rope_theta == 5e5


def test_a_mistral_that_says_nothing_has_a_window_of_4096(tmp_path):
    assert read_config(tampered(tmp_path / "model", "mistral", {"sliding_window": ABSENT})).window == 4096
    assert read_config(tampered(tmp_path / "none", "mistral", {"sliding_window": None})).window == 0


def test_a_mixtral_without_key_value_heads_has_eight(tmp_path):
    made = tampered(tmp_path / "model", "mixtral", {"num_key_value_heads": ABSENT, "num_attention_heads": 16})
    assert read_config(made).kv_size == 8


SMALL = TransformerConfig(vocab_size=8, layers=2, width=8, heads=2, ff=8)


@functools.cache
def small(seed):
    return jax.jit(Decoder(SMALL).init)(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"]


def contents(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}


def same(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_a_directory_with_other_files_is_refused_and_left_as_it_is(tmp_path):
    pytest.importorskip("safetensors")
    from safetensors.numpy import save_file

    notes, theirs, link = tmp_path / "notes", tmp_path / "theirs", tmp_path / "link"
    for folder in (notes, theirs, link):
        folder.mkdir()
    (notes / "thesis.tex").write_text("years of work")
    (notes / "photos").mkdir()
    (theirs / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"x": np.zeros(3, np.float32)}, theirs / "model.safetensors", {"format": "pt"})
    (link / "config.json").symlink_to(theirs / "config.json")
    for folder, named in ((notes, "photos, thesis.tex"), (theirs, "config.json, model.safetensors"), (link, "config")):
        before = contents(folder)
        with pytest.raises(ForeignFiles, match=f"{folder.name} holds .*{named}.*new or empty directory"):
            save_directory(folder, small(0), SMALL)
        assert contents(folder) == before
    assert (notes / "photos").is_dir() and sorted(x.name for x in tmp_path.iterdir()) == ["link", "notes", "theirs"]
    beside = tmp_path / ".model.new"  # the name of no file beside the directory is taken either
    beside.mkdir()
    (beside / "thesis.tex").write_text("years of work")
    made = save_directory(tmp_path / "model", small(0), SMALL)
    assert contents(beside)
    (made / "tokenizer.json").write_text("{}")
    before = contents(made)
    with pytest.raises(ForeignFiles, match=r"holds .*: tokenizer\.json;"):
        save_directory(made, small(1), SMALL)
    assert contents(made) == before
    with pytest.raises(ForeignFiles, match="is a file"):
        save_directory(made / "tokenizer.json", small(1), SMALL)


@pytest.mark.parametrize("sizes", [(2**20, 500), (500, 2**20)], ids=["one-then-many", "many-then-one"])
def test_an_export_replaces_an_earlier_one_and_a_kill_never_leaves_a_mix(sizes, tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    old, new = small(0), small(1)
    made = save_directory(tmp_path / "model", old, SMALL, shard_bytes=sizes[0])
    replace, unlink, seen = os.replace, type(made).unlink, []

    def killed_at(number):
        calls = iter(range(1000))

        def dies(call):
            def wrapped(*args, **options):
                if next(calls) == number:
                    raise KeyboardInterrupt
                return call(*args, **options)

            return wrapped

        return dies

    for number in range(100):
        with monkeypatch.context() as patch:
            dies = killed_at(number)
            patch.setattr(os, "replace", dies(replace))
            patch.setattr(type(made), "unlink", dies(unlink))
            # A killed process does not tidy up: only the first call, before anything is written, does something.
            tidy = iter([huggingface._clear_staging])
            patch.setattr(huggingface, "_clear_staging", lambda x, tidy=tidy: next(tidy, lambda x: None)(x))
            try:
                save_directory(made, new, SMALL, shard_bytes=sizes[1])
                break
            except KeyboardInterrupt:
                pass
        try:
            found = load_directory(made)[0]
            seen.append("old" if same(found, old) else "new" if same(found, new) else "mix")
        except FileNotFoundError:
            seen.append("none")
        save_directory(made, old, SMALL, shard_bytes=sizes[0])  # the next export mends it
        assert same(load_directory(made)[0], old) and not (made / huggingface.STAGING).exists()
    assert set(seen) == {"old", "none"} and len(seen) > 10
    save_directory(made, new, SMALL, shard_bytes=sizes[1])
    assert same(load_directory(made)[0], new)
    assert (len(list(made.glob("*.safetensors"))) > 1) == (sizes[1] == 500)


def test_an_export_that_fails_leaves_the_earlier_one(tmp_path):
    pytest.importorskip("safetensors")
    made = save_directory(tmp_path / "model", small(0), SMALL)
    before = contents(made)
    with pytest.raises(NotConvertible):
        save_directory(made, {**small(1), "final_norm": {}}, SMALL, shard_bytes=100)
    assert contents(made) == before and sorted(x.name for x in made.iterdir()) == sorted(before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_flipped_bit_in_a_weight_of_an_export_is_seen(dtype, tmp_path):
    pytest.importorskip("safetensors")
    made = save_directory(tmp_path / "model", small(0), SMALL, dtype, shard_bytes=500)
    for path in made.glob("*.safetensors"):
        whole = path.read_bytes()
        begin = 8 + int.from_bytes(whole[:8], "little")
        for place in range(begin, len(whole), 97):
            damaged = bytearray(whole)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(NotConvertible, match=r"is damaged: the checksum of [a-z_]+\.[a-z_.0-9]+ differs"):
                load_directory(made)
        path.write_bytes(whole)
    assert load_directory(made)[0]
