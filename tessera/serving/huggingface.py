"""Hugging Face directories of the families in `FAMILIES`: config.json and safetensors, in and out.

Tensors are read and written one at a time. Hugging Face stores a projection as [outputs, inputs], one tensor per layer
(and expert); here it is [inputs, outputs] and stacked. Rotary channels are paired alike (i with i + h / 2).
"""

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import PyTree

from moe.gate import RouterConfig
from moe.layer import MoEConfig
from tessera.infra.config import build
from tessera.infra.logger import read_object, write_text
from tessera.models.attention import RopeScaling
from tessera.models.transformer import TransformerConfig, param_shapes

SHARD_BYTES = 4 * 2**30
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|\d{5}\.part")
SUMS = "crc32"  # in the metadata of an export's files: the CRC-32 of every tensor's bytes
MARK = {"written_by": "tessera"}  # in every file of an export: nothing without it is replaced or removed
STAGING = ".tessera-export"  # folder inside the directory that the files are written to before they are moved

# Our path without the layer axis -> Hugging Face's name; {l} and {e} count layers and experts.
SHARED = {
    "embed/table": "model.embed_tokens.weight",
    "final_norm/gain": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
BLOCK = {
    "attention_norm/gain": "model.layers.{l}.input_layernorm.weight",
    "mlp_norm/gain": "model.layers.{l}.post_attention_layernorm.weight",
    "attention/query/kernel": "model.layers.{l}.self_attn.q_proj.weight",
    "attention/query/bias": "model.layers.{l}.self_attn.q_proj.bias",
    "attention/key/bias": "model.layers.{l}.self_attn.k_proj.bias",
    "attention/value/bias": "model.layers.{l}.self_attn.v_proj.bias",
    "attention/query/gain": "model.layers.{l}.self_attn.q_norm.weight",
    "attention/key/gain": "model.layers.{l}.self_attn.k_norm.weight",
    "attention/query_norm/gain": "model.layers.{l}.self_attn.q_norm.weight",
    "attention/key_norm/gain": "model.layers.{l}.self_attn.k_norm.weight",
    "attention/key/kernel": "model.layers.{l}.self_attn.k_proj.weight",
    "attention/value/kernel": "model.layers.{l}.self_attn.v_proj.weight",
    "attention/output/kernel": "model.layers.{l}.self_attn.o_proj.weight",
    "mlp/gate/kernel": "model.layers.{l}.mlp.gate_proj.weight",
    "mlp/up/kernel": "model.layers.{l}.mlp.up_proj.weight",
    "mlp/down/kernel": "model.layers.{l}.mlp.down_proj.weight",
    "mlp/router/kernel": "model.layers.{l}.mlp.gate.weight",
    "mlp/experts/gate/kernel": "model.layers.{l}.mlp.experts.{e}.gate_proj.weight",
    "mlp/experts/up/kernel": "model.layers.{l}.mlp.experts.{e}.up_proj.weight",
    "mlp/experts/down/kernel": "model.layers.{l}.mlp.experts.{e}.down_proj.weight",
    "mlp/shared/gate/kernel": "model.layers.{l}.mlp.shared_expert.gate_proj.weight",
    "mlp/shared/up/kernel": "model.layers.{l}.mlp.shared_expert.up_proj.weight",
    "mlp/shared/down/kernel": "model.layers.{l}.mlp.shared_expert.down_proj.weight",
    "mlp/shared_gate/kernel": "model.layers.{l}.mlp.shared_expert_gate.weight",
}
# Families with other names.
NAMES = {
    "olmo2": {
        "attention_norm/gain": "model.layers.{l}.post_attention_layernorm.weight",
        "mlp_norm/gain": "model.layers.{l}.post_feedforward_layernorm.weight",
    },
    "mixtral": {
        "mlp/router/kernel": "model.layers.{l}.block_sparse_moe.gate.weight",
        "mlp/experts/gate/kernel": "model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight",
        "mlp/experts/up/kernel": "model.layers.{l}.block_sparse_moe.experts.{e}.w3.weight",
        "mlp/experts/down/kernel": "model.layers.{l}.block_sparse_moe.experts.{e}.w2.weight",
    },
}
# What transformers takes for an entry that config.json leaves out.
LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
MISTRAL = LLAMA | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
MIXTRAL = MISTRAL | {
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}
QWEN2 = LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
DENSE_LAYERS: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": []}  # layers without experts
QWEN2_MOE = QWEN2 | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "qkv_bias": True,
    **DENSE_LAYERS,
}
QWEN3_MOE = QWEN2 | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "moe_intermediate_size": 768,
    **DENSE_LAYERS,
}
OLMO2 = LLAMA | {"vocab_size": 50304, "rms_norm_eps": 1e-5}
OLMOE = OLMO2 | {
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
}
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "num_experts", "num_experts_per_tok"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "sliding_window"),
)
FAMILIES = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "qwen2": QWEN2,
    "qwen2_moe": QWEN2_MOE,
    "qwen3": QWEN2 | {"head_dim": 128},
    "qwen3_moe": QWEN3_MOE,
    "olmo2": OLMO2,
    "olmoe": OLMOE,
}
# Entries that change what the model computes and have no counterpart here, with the value that changes nothing.
REFUSED: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "clip_qkv": None,
    **DENSE_LAYERS,  # of families that have experts in every layer
}
READ_BY_SOME = ("sliding_window", *DENSE_LAYERS)  # refused of families whose models do not have them
# Entries of rotary scaling by kind, as fields of `RopeScaling`.
ROPE = {
    "factor": "factor",
    "original_max_position_embeddings": "original_length",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}
ROPE_KINDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
}
DTYPES = ("F64", "F32", "F16", "BF16")
# Buffers that earlier versions of transformers saved; they follow from the config.
IGNORED = re.compile(r"(.+\.)?rotary_emb\.inv_freq")


class NotConvertible(ValueError):
    """A model that Hugging Face's format cannot describe, or a directory with anything that has no counterpart here."""


class ForeignFiles(FileExistsError):
    """A directory that holds files which no export has written."""


def read_settings(directory: Path | str) -> dict[str, Any]:
    """A directory's config.json with the defaults of its family for what it leaves out.

    Raises:
      FileNotFoundError: no config.json.
      NotConvertible: not one of `FAMILIES`, or with an entry that changes what the model computes and has no
        counterpart here: other biases, rotary scaling, activation or windows, quantized weights, layers
        without experts between routed ones; or sizes that are none.
      ValueError: a damaged config.json.
    """
    path = Path(directory) / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"no Hugging Face model in {directory}: config.json is missing")
    found = read_object(path)
    kind = found.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise NotConvertible(f"{path}: model_type={kind!r} has no counterpart here; {', '.join(FAMILIES)} load")
    if "num_experts" in FAMILIES[kind] and "num_local_experts" in found:  # two names of one entry
        count = found.pop("num_local_experts")
        if found.setdefault("num_experts", count) != count:
            raise NotConvertible(f"{path}: num_local_experts={count!r} and num_experts={found['num_experts']!r} differ")
    c = FAMILIES[kind] | found
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(c.get(name) or {}, dict):
            raise NotConvertible(f"{path}: {name}={c[name]!r} must be an object")
    for name, default in FAMILIES[kind].items():
        if name in SIZES and not (
            c[name] is None and (default is None or name in ("num_key_value_heads", "sliding_window"))
        ):
            _check_number(path, name, c[name], whole=True)
    rope = {"rope_type": "default"} | (c.get("rope_scaling") or {}) | (c.get("rope_parameters") or {})
    rope["rope_type"] = rope.pop("type", rope["rope_type"])
    c["rope_theta"] = rope.get("rope_theta") or c["rope_theta"]
    for name in ("rms_norm_eps", "rope_theta"):
        _check_number(path, name, c[name], whole=False)
    layers = c.get("layer_types") or []
    texts = [rope["rope_type"], *(layers if isinstance(layers, list) else [layers])]
    if wrong_type := [value for value in texts if not isinstance(value, str)]:
        raise NotConvertible(f"{path}: {wrong_type[0]!r} in rope_type or layer_types must be text")
    c["rope_parameters"] = rope
    if kind.startswith("qwen") and not c.get("use_sliding_window"):
        c["sliding_window"] = None  # the entry has no effect
    entries = c | {"partial_rotary_factor": rope.get("partial_rotary_factor", c.get("partial_rotary_factor"))}
    wrong = [
        f"{name}={entries[name]!r}"
        for name, fine in REFUSED.items()
        if entries.get(name) not in (None, fine) and not (name in READ_BY_SOME and name in FAMILIES[kind])
    ]
    known = {"rope_type", "rope_theta", "partial_rotary_factor", *ROPE_KINDS.get(rope["rope_type"], ())}
    if rope["rope_type"] not in ROPE_KINDS or any(rope[name] is not None for name in rope.keys() - known):
        wrong.append(f"rotary positions {rope}")
    if other := set(c.get("layer_types") or ()) - {"full_attention"}:
        wrong.append(f"layer_types {sorted(other)}")
    if wrong:
        raise NotConvertible(f"{path}: {', '.join(wrong)}: no counterpart here; {kind} loads without")
    return c


class TextFormat(NamedTuple):
    """What a model takes for a text.

    Attributes:
      begin: token that begins it, None without one.
      ends: tokens that end it.
      template: of a chat, in Jinja; "" without one.
      positions: tokens at most; 0 for no limit.
    """

    begin: int | None = None
    ends: tuple[int, ...] = ()
    template: str = ""
    positions: int = 0


def read_format(directory: Path | str) -> TextFormat:
    """Read the special tokens, chat template and positions of a directory."""
    path, c = Path(directory), read_settings(directory)
    more = {name: _read_json(path / name) for name in ("generation_config.json", "tokenizer_config.json")}
    ends: dict[int, None] = {}
    for found in (c, more["generation_config.json"]):
        value = found.get("eos_token_id")
        ends |= dict.fromkeys(value if isinstance(value, list) else [] if value is None else [value])
    file = path / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.exists() else more["tokenizer_config.json"].get("chat_template")
    return TextFormat(
        c.get("bos_token_id"), tuple(ends), template if isinstance(template, str) else "", c["max_position_embeddings"]
    )


def _read_json(file: Path) -> dict[str, Any]:
    return read_object(file) if file.exists() else {}


def _check_number(path: Path, name: str, value: Any, *, whole: bool) -> None:
    valid = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not (valid and 0 < value < 2**31):
        kind = "whole number" if whole else "number"
        raise NotConvertible(f"{path}: {name}={value!r} must be a {kind} above 0 and below 2^31")


def read_config(directory: Path | str) -> TransformerConfig:
    """The model that a directory's config.json describes; raises what `read_settings` does."""
    try:
        return _config(read_settings(directory))
    except NotConvertible:
        raise
    except (ValueError, TypeError) as error:  # sizes that do not go together, entries of another type
        raise NotConvertible(f"{directory}/{CONFIG}: {error}") from error


def _config(c: dict[str, Any]) -> TransformerConfig:
    moe: dict[str, Any] = {}
    kind = c["model_type"]
    family = {name: c[name] for name in FAMILIES[kind]}  # what others have of config.json changes nothing
    if "num_experts" in family:
        # A softmax over the chosen experts is one over all, divided by the sum of the chosen.
        softmax = "after" if family.get("norm_topk_prob", True) else "before"
        router = RouterConfig("top_k", c["num_experts"], c["num_experts_per_tok"], softmax)
        width = family.get("moe_intermediate_size", 0)
        shared, rest = divmod(family.get("shared_expert_intermediate_size", 0), width or 1)
        if rest:
            raise NotConvertible(
                f"shared_expert_intermediate_size={c['shared_expert_intermediate_size']} is no multiple of "
                f"moe_intermediate_size={width}"
            )
        first, every = _dense_layers(family)
        layers: Any = {"first_k_dense_replace": first, "every": every}
        experts = MoEConfig(ff=width, shared=shared, shared_gate=shared > 0, router=router, **layers)
        moe = {"mlp": "routed", "moe": experts}
    return TransformerConfig(
        vocab_size=c["vocab_size"],
        layers=c["num_hidden_layers"],
        width=c["hidden_size"],
        heads=c["num_attention_heads"],
        kv_heads=c["num_key_value_heads"] or c["num_attention_heads"],
        head_dim=c["head_dim"] or c["hidden_size"] // c["num_attention_heads"],
        ff=c["intermediate_size"],
        qkv_bias=kind == "qwen2" or bool(family.get("qkv_bias")),
        qk_norm=kind in ("qwen3", "qwen3_moe", "olmo2", "olmoe"),
        qk_norm_scope="projection" if kind in ("olmo2", "olmoe") else "head",
        norm_position="post" if kind == "olmo2" else "pre",
        rope_theta=float(c["rope_theta"]),
        rope_scaling=_rope_scaling(c),
        window=family.get("sliding_window") or 0,
        norm_eps=float(c["rms_norm_eps"]),
        tied=bool(c["tie_word_embeddings"]),
        **moe,
    )


def _dense_layers(family: dict[str, Any]) -> tuple[int, int]:
    """`MoEConfig.first_k_dense_replace` and `every` of a family's layers without experts.

    Raises:
      NotConvertible: other layers than the first ones and all but every n-th.
    """
    step, dense = family.get("decoder_sparse_step", 1), family.get("mlp_only_layers") or []
    whole = isinstance(dense, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in dense)
    if not whole or isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise NotConvertible(f"config.json: decoder_sparse_step={step!r}, mlp_only_layers={dense!r}: numbers of layers")
    # Of the layers that would have experts, every step-th, those that have none.
    without = sorted({one for one in dense if (one + 1) % step == 0 and 0 <= one < family["num_hidden_layers"]})
    if without != [step * (i + 1) - 1 for i in range(len(without))]:
        raise NotConvertible(
            f"config.json: mlp_only_layers={dense!r} with decoder_sparse_step={step}: only the first layers can be "
            "dense besides all but every n-th"
        )
    return step * len(without), step


def _rope_scaling(c: dict[str, Any]) -> RopeScaling:
    rope = c["rope_parameters"]
    if rope["rope_type"] == "default":
        return RopeScaling()
    found = {ROPE[name]: rope[name] for name in ROPE_KINDS[rope["rope_type"]] if rope.get(name) is not None}
    if rope["rope_type"] in ("llama3", "yarn"):
        found.setdefault("original_length", c["max_position_embeddings"])
    return build(RopeScaling, {"kind": rope["rope_type"], **found}, "config.json: rope_parameters")


def write_config(config: TransformerConfig, **more: Any) -> dict[str, Any]:
    """What config.json says of a model; `more` is added.

    Raises:
      NotConvertible: a model of none of the `FAMILIES`.
    """
    kind, moe, router = _family(config), config.moe, config.moe.router
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling.kind != "none":
        fields = {name: getattr(scaling, ROPE[name]) for name in ROPE_KINDS[scaling.kind]}
        rope |= {"rope_type": scaling.kind} | {name: value for name, value in fields.items() if value}
    values = {
        "architectures": ["".join(part.capitalize() for part in kind.split("_")) + "ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_size,
        "head_dim": config.head_size,
        "intermediate_size": config.ff_size,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
    } | ({"sliding_window": config.window or None} if "sliding_window" in FAMILIES[kind] else {})
    if config.mlp == "routed":
        width, known = moe.width_of(config.ff_size), FAMILIES[kind]
        count = "num_local_experts" if kind == "mixtral" else "num_experts"
        values |= {count: router.experts, "num_experts_per_tok": router.k}
        found: dict[str, Any] = {
            "norm_topk_prob": router.softmax == "after",
            "moe_intermediate_size": width,
            "shared_expert_intermediate_size": moe.shared * width,
            "qkv_bias": config.qkv_bias,
        }
        if len(set(config.mlps)) > 1:
            found |= {"decoder_sparse_step": moe.every, "mlp_only_layers": list(range(config.first_dense))}
        values |= {name: value for name, value in found.items() if name in known}
        if "moe_intermediate_size" not in known:
            values["intermediate_size"] = width
    elif kind == "llama":
        values |= {"attention_bias": False, "mlp_bias": False}
    return values | more


def _family(config: TransformerConfig) -> str:
    """The key of `FAMILIES` whose models are built like this one."""
    moe, router = config.moe, config.moe.router
    if config.window and (config.qkv_bias or config.qk_norm or config.norm_position == "post"):
        raise NotConvertible(f"window={config.window}: of the families only Mistral and Mixtral have one")
    if len(set(config.attention_kinds)) > 1 or "N" in config.attention_kinds:
        raise NotConvertible(f"attention_pattern={config.attention_pattern!r}: all layers of a family are alike")
    whole = config.qk_norm and config.qk_norm_scope == "projection"
    if config.qkv_bias and config.qk_norm:
        raise NotConvertible("no family has qkv_bias together with qk_norm")
    if config.norm_position == "post" or (whole and config.mlp != "routed"):
        if not (config.norm_position == "post" and whole and config.mlp != "routed"):
            raise NotConvertible(
                "OLMo-2 has norm_position='post' and, without routed experts, qk_norm over the 'projection'; no family "
                "has one without the other"
            )
        return "olmo2"
    if config.mlp != "routed":
        if config.window and not (config.qkv_bias or config.qk_norm):
            return "mistral"
        return "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"
    plain = replace(moe, shared=0, shared_gate=False).plain and moe.mixture.dispatch != "capacity"
    if not (plain and router.name == "top_k" and router.scale == 1 and not router.bias):
        raise NotConvertible(
            "Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE have SwiGLU experts, of the router top_k, without biases or "
            "capacity; this model's moe differs"
        )
    if moe.shared and moe.shared_gate and not config.qk_norm:
        return "qwen2_moe"
    if moe.shared:
        raise NotConvertible("of the routed families only Qwen2-MoE has shared experts, with shared_gate, no qk_norm")
    if whole and config.head_size * config.heads != config.width:
        raise NotConvertible(
            f"OLMoE has heads of width / heads channels, not head_dim={config.head_size} of width={config.width}"
        )
    if config.qkv_bias or (router.softmax == "before" and not config.qk_norm):
        raise NotConvertible(
            "Mixtral has no qkv_bias and weighs by a softmax over the chosen experts (softmax='after'); of the routed "
            "families only Qwen2-MoE has biases, only Qwen2-MoE, Qwen3-MoE and OLMoE softmax='before'"
        )
    kind = "olmoe" if whole else "qwen3_moe" if config.qk_norm else "mixtral"
    if kind != "qwen3_moe" and len(set(config.mlps)) > 1:
        raise NotConvertible(f"{kind} has experts in every layer; only Qwen2-MoE and Qwen3-MoE have dense ones besides")
    return kind


def load_directory(
    directory: Path | str, place: Callable[[str, np.ndarray], Any] | None = None
) -> tuple[PyTree, TransformerConfig]:
    """Parameters float32 and model of a directory; tensors are read one at a time, a stack is filled as they come.

    Args:
      directory: config.json and *.safetensors.
      place: (path, array) -> what the tree holds, to put every finished leaf where it belongs; default numpy.

    Raises:
      FileNotFoundError: no config or no safetensors.
      NotConvertible: another architecture; tensors missing, of other shapes, quantized, damaged, or that no parameter
        asks for.
      ImportError: the extra `hf` is not installed.
    """
    config = read_config(directory)
    tensors = _open(Path(directory))
    _check_names(Path(directory), tensors, config)
    return assemble(config, _reader(Path(directory), tensors), place), config


def _bytes(tensor: np.ndarray) -> memoryview:
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data


def _reader(directory: Path, tensors: dict[str, Any]) -> Callable[[str], np.ndarray]:
    """Reads a tensor by name and compares it with the CRC-32 that `save_directory` wrote, where there is one."""
    sums: dict[int, Any] = {}

    def read(name: str) -> np.ndarray:
        file, tensor = tensors[name], tensors[name].get_tensor(name)
        if id(file) not in sums:
            sums[id(file)] = read_sums(file)
        if sums[id(file)].get(name, found := zlib.crc32(_bytes(tensor))) != found:
            raise NotConvertible(f"{directory} is damaged: the checksum of {name} differs from the one written with it")
        return tensor

    def read_sums(file: Any) -> dict[str, int]:
        try:
            found = json.loads((file.metadata() or {}).get(SUMS, "{}"))
            return {str(name): int(value) for name, value in found.items()}
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise NotConvertible(f"{directory} is damaged: {SUMS} of a file are no numbers by tensor") from error

    return read


def assemble(
    config: TransformerConfig,
    read: Callable[[str], np.ndarray],
    place: Callable[[str, np.ndarray], Any] | None = None,
) -> PyTree:
    """Parameters float32 of a scanned decoder from tensors in Hugging Face's names and layout, read one at a time.

    Raises:
      NotConvertible: a tensor of another shape.
    """
    tree: dict[str, Any] = {}
    for path, shape in _leaves(config):
        array = np.empty(shape, np.float32)
        for index, name in _names(path, config):
            array[index] = _inward(read(name), array[index].shape, path, name)
        _set(tree, path, array if place is None else place(path, array))
    return tree


def tensor_names(config: TransformerConfig) -> set[str]:
    """Hugging Face's names of all tensors of a model."""
    return {name for path, _ in _leaves(config) for _, name in _names(path, config)}


def save_directory(
    directory: Path | str,
    params: PyTree,
    config: TransformerConfig,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    **more: Any,
) -> Path:
    """Write a decoder as a Hugging Face directory; it loads as the old model, the new one, or (killed) as none.

    Only files that an export has written are replaced or removed, those of an export by an earlier version not.

    Args:
      directory: new, empty, or of an earlier export, which is replaced.
      params: of a scanned decoder of `config`; a leaf is fetched from its devices when its turn comes.
      config: the model.
      dtype: "float32" or "bfloat16".
      shard_bytes: most bytes of a file (a single larger tensor gets its own).
      more: further entries of config.json.

    Raises:
      ForeignFiles: the directory holds anything else; nothing in it is touched.
      NotConvertible: a model of none of the `FAMILIES`.
      ImportError: the extra `hf` is not installed.
    """
    save_file = _safetensors().numpy.save_file
    kind = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]
    settings = write_config(config, dtype=dtype, **more) | MARK
    path = Path(directory)
    _refuse_foreign(path)
    staging = path / STAGING
    _clear_staging(staging)  # a killed export left it
    staging.mkdir(parents=True)
    files: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        if held:
            sums = json.dumps({name: zlib.crc32(_bytes(tensor)) for name, tensor in held.items()})
            save_file(held, staging / f"{len(files):05}.part", {"format": "pt", SUMS: sums} | MARK)
            files.append(list(held))
            held.clear()

    try:
        for name, tensor in _outward(params, config, kind):
            if held and sum(x.nbytes for x in held.values()) + tensor.nbytes > shard_bytes:
                flush()
            held[name] = tensor
            total += tensor.nbytes
        flush()
        where: dict[str, str] = {}
        for i, names in enumerate(files):
            file = "model.safetensors" if len(files) == 1 else f"model-{i + 1:05}-of-{len(files):05}.safetensors"
            os.replace(staging / f"{i:05}.part", staging / file)
            where |= dict.fromkeys(names, file)
        if len(files) > 1:
            index = {"metadata": {"total_size": total} | MARK, "weight_map": where}
            write_text(staging / INDEX, json.dumps(index, indent=2))
        write_text(staging / CONFIG, json.dumps(settings, indent=2) + "\n")
        _refuse_foreign(path)  # writing took a while
        _move_in(staging, path)
    finally:
        _clear_staging(staging)
    return path


def _move_in(staging: Path, path: Path) -> None:
    """Replace an earlier export; without its config.json, gone first and written last, the directory is no model."""
    for name in (CONFIG, INDEX, *sorted(file.name for file in path.iterdir() if WEIGHTS.fullmatch(file.name))):
        (path / name).unlink(missing_ok=True)
    for name in (*sorted(file.name for file in staging.iterdir() if WEIGHTS.fullmatch(file.name)), INDEX, CONFIG):
        if (staging / name).exists():
            os.replace(staging / name, path / name)


def _refuse_foreign(path: Path) -> None:
    """Raise ForeignFiles if a directory holds anything but an export."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ForeignFiles(f"{path} is a file; name a new or empty directory to export to")
    foreign = sorted(
        file.name for file in path.iterdir() if not (_is_staging(file) if file.name == STAGING else _is_exported(file))
    )
    if foreign:
        raise ForeignFiles(
            f"{path} holds files that no export has written: {some(foreign, 10)}; export to a new or empty directory, "
            "or move these files away first"
        )


def _is_exported(file: Path) -> bool:
    """Whether an export has written a file: by its name and by the mark inside."""
    if file.is_symlink() or not file.is_file():
        return False
    try:
        if file.name in (CONFIG, INDEX):
            found = json.loads(file.read_text(encoding="utf-8"))
            return MARK.items() <= (found if file.name == CONFIG else found["metadata"]).items()
        if WEIGHTS.fullmatch(file.name):
            with _safetensors().safe_open(file, framework="numpy") as tensors:
                return MARK.items() <= (tensors.metadata() or {}).items()
    except Exception as error:  # what cannot be read is not known to be an export's
        if isinstance(error, ImportError):
            raise
    return False


def _is_staging(folder: Path) -> bool:
    """Whether a folder is that of an export under way, or killed: by its name and those of its files."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return all(
        file.is_file() and re.fullmatch(rf"{WEIGHTS.pattern}|\.?({CONFIG}|{INDEX})(\.\d+)?", file.name)
        for file in folder.iterdir()
    )


def _clear_staging(folder: Path) -> None:
    if folder.exists() and _is_staging(folder):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def _leaves(config: TransformerConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    for path, leaf in jax.tree.leaves_with_path(param_shapes(config)):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape


def _names(path: str, config: TransformerConfig) -> Iterator[tuple[tuple[int, ...], str]]:
    """(index into our array, Hugging Face's name) of every tensor that makes up a leaf."""
    if path in SHARED:
        yield (), SHARED[path]
        return
    part, _, path = path.partition("/")
    (stack,) = (stack for stack in config.stacks if stack.name == part)
    inside = 0
    if len(stack.pattern) > 1:
        name, _, path = path.partition("/")
        inside = int(name.removeprefix("layer_"))
    pattern = NAMES.get(_family(config), {}).get(path) or BLOCK[path]
    for unit in range(stack.units):
        layer = stack.start + unit * len(stack.pattern) + inside
        if "{e}" not in pattern:
            yield (unit,), pattern.format(l=layer)
            continue
        for expert in range(config.moe.router.experts):
            yield (unit, expert), pattern.format(l=layer, e=expert)


def _inward(tensor: np.ndarray, shape: tuple[int, ...], path: str, name: str) -> np.ndarray:
    _check_shape(name, tensor.shape, path, shape)
    return np.asarray(tensor.T if path.endswith("kernel") else tensor, np.float32).reshape(shape)


def _check_shape(name: str, found: tuple[int, ...], path: str, shape: tuple[int, ...]) -> None:
    if found != (stored := _stored_shape(path, shape)):
        raise NotConvertible(f"{name} has shape {found}; config.json asks for {stored}")


def _stored_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape on disk, [outputs, inputs] for a projection, of one layer's leaf."""
    if path.endswith(("bias", "gain")):
        return (int(np.prod(shape)),)
    if not path.endswith("kernel"):
        return shape
    outputs = shape[-1] if path.endswith("output/kernel") else int(np.prod(shape[1:]))
    return outputs, int(np.prod(shape)) // outputs


def _outward(params: PyTree, config: TransformerConfig, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(params)
    }
    for path, shape in _leaves(config):
        leaf = leaves.get(path)
        if leaf is None or tuple(leaf.shape) != shape:
            raise NotConvertible(f"{path} should have shape {shape}; export takes scanned blocks, unquantised")
        for index, name in _names(path, config):
            array = np.asarray(jnp.asarray(leaf[index] if index else leaf, jnp.float32))
            stored = _stored_shape(path, array.shape)
            array = array.reshape(stored[::-1]).T if path.endswith("kernel") else array.reshape(stored)
            yield name, np.ascontiguousarray(array.astype(dtype))


def _open(directory: Path) -> dict[str, Any]:
    """Tensor name -> open file: of the index, else model.safetensors, else the only file there is."""
    safe_open = _safetensors().safe_open
    files = sorted(file.name for file in directory.glob("*.safetensors"))
    where: Any = read_object(directory / INDEX).get("weight_map") if (directory / INDEX).exists() else {}
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise NotConvertible(f"{directory / INDEX} is damaged: weight_map must name a file for every tensor")
    if where:
        files = sorted(set(where.values()))
    elif "model.safetensors" in files:
        files = ["model.safetensors"]
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {directory}")
    if len(files) > 1 and not where:
        raise NotConvertible(
            f"{directory} has {', '.join(files)} and neither model.safetensors nor {INDEX}: which are the model's?"
        )
    if missing := [name for name in files if not (directory / name).exists()]:
        raise FileNotFoundError(f"{directory / INDEX} names {', '.join(missing)}: not there")
    handles = {}
    for name in files:
        try:
            handles[name] = safe_open(directory / name, framework="numpy")
        except OSError:
            raise
        except Exception as error:  # safetensors' own kind
            raise NotConvertible(f"{directory / name} is damaged: {error}") from error
    if not where:
        return {name: handle for handle in handles.values() for name in handle.keys()}
    inside = {file: set(handle.keys()) for file, handle in handles.items()}
    if wrong := [f"{name} in {file}" for name, file in where.items() if name not in inside[file]]:
        raise NotConvertible(f"{directory / INDEX} names {some(wrong)}: not there")
    return {name: handles[file] for name, file in where.items()}


def _check_names(directory: Path, tensors: dict[str, Any], config: TransformerConfig) -> None:
    """Refuse tensors that are missing, of another shape, quantized or asked for by no parameter; none is read."""
    try:
        leaves = list(_leaves(config))
    except (OverflowError, TypeError, ValueError) as error:
        raise NotConvertible(f"{directory}: no model has the sizes of its config.json ({error})") from error
    wanted: set[str] = set()
    missing: list[str] = []
    for path, shape in leaves:
        for index, name in _names(path, config):
            if name in tensors:
                wanted.add(name)
                found = tuple(tensors[name].get_slice(name).get_shape())
                _check_shape(f"{directory}: {name}", found, path, shape[len(index) :])
            else:
                missing.append(name)
            if len(missing) > 1000:  # a config.json of any number of layers
                break
    if missing:
        raise NotConvertible(f"{directory} has no tensor {some(sorted(missing))}")
    kinds = {name: tensors[name].get_slice(name).get_dtype() for name in sorted(wanted)}
    if quantized := [f"{name} ({kind})" for name, kind in kinds.items() if kind not in DTYPES]:
        raise NotConvertible(f"{directory} has quantized weights: {some(quantized)}; {', '.join(DTYPES)} load")
    rest = {name for name in tensors.keys() - wanted if not IGNORED.fullmatch(name)}
    table, head = SHARED["embed/table"], SHARED["head/kernel"]
    if config.tied and head in rest:
        if not np.array_equal(tensors[head].get_tensor(head), tensors[table].get_tensor(table)):
            raise NotConvertible(
                f"{directory}: {head} differs from {table}, but config.json says tie_word_embeddings; with false the "
                "head is read, without the tensor the table is used"
            )
        rest.remove(head)
    if rest:
        raise NotConvertible(
            f"{directory} has {len(rest)} tensors that a model of its config.json lacks: {some(sorted(rest))}"
        )


def some(names: list[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = value


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("Hugging Face directories need the extra `hf`: pip install 'tessera-jax[hf]'") from error
    return safetensors


def is_directory(path: Path | str) -> bool:
    """Whether a directory looks like Hugging Face's rather than a run's."""
    file = Path(path) / CONFIG
    return file.exists() and "model_type" in read_object(file)
