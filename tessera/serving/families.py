"""Families of Hugging Face models as tables: entries of config.json, names and layout of tensors, what is refused.

A family (`Family`) is what transformers takes for entries that its config.json leaves out, the fields of
`TransformerConfig` that all its models have, and the tensors that are called or stored otherwise than Llama's.
`tessera.serving.config_json` reads and writes entries by these tables, `tessera.serving.huggingface` tensors.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class NotConvertible(ValueError):
    """A model that Hugging Face's format cannot describe, or a directory with anything that has no counterpart here."""


class Stored(NamedTuple):
    """Where Hugging Face has the leaf of one layer (and expert).

    Attributes:
      name: of the tensor; {l} and {e} count layers and experts.
      parts: paths of the leaves that make up the tensor together, in order; () for this one alone.
      layout: "rows", a projection as [outputs, inputs], parts one after the other; "heads", the same with the parts of
        every head together; "plain", as here; "turns", as here, channels of the parts taking turns (gpt-oss).
    """

    name: str
    parts: tuple[str, ...] = ()
    layout: str = "rows"


class Family(NamedTuple):
    """One family of models.

    Attributes:
      defaults: entries of config.json that are read and written, with what transformers takes for one left out.
      fields: of `TransformerConfig`, nested, that all models of the family have.
      names: leaves without the layer axis that are stored otherwise than `BLOCK` says.
      pairs: leaves whose rotary channels 2 i and 2 i + 1 are a pair; here i and i + r / 2 are.
      letters: of `TransformerConfig.attention_pattern` where config.json has no list of layers, "" for all alike.
      architecture: class of transformers without its end, where `model_type` does not say it.
    """

    defaults: Mapping[str, Any]
    fields: Mapping[str, Any] = {}
    names: Mapping[str, str | Stored] = {}
    pairs: tuple[str, ...] = ()
    letters: str = ""
    architecture: str = ""


L = "model.layers.{l}."
SHARED = {
    "embed/table": "model.embed_tokens.weight",
    "final_norm/gain": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
EXPERTS = L + "mlp.experts.{e}."
BLOCK: dict[str, str | Stored] = {
    "attention_norm/gain": L + "input_layernorm.weight",
    "mlp_norm/gain": L + "post_attention_layernorm.weight",
    **{
        f"attention/{ours}/{leaf}": f"{L}self_attn.{theirs}_proj.{name}"
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o"))
        for leaf, name in (("kernel", "weight"), ("bias", "bias"))
    },
    "attention/output_bias/bias": L + "self_attn.o_proj.bias",
    "attention/sinks/logit": L + "self_attn.sinks",
    "attention/query/gain": L + "self_attn.q_norm.weight",
    "attention/key/gain": L + "self_attn.k_norm.weight",
    "attention/query_norm/gain": L + "self_attn.q_norm.weight",
    "attention/key_norm/gain": L + "self_attn.k_norm.weight",
    **{f"mlp/{name}/kernel": f"{L}mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
    "mlp/router/kernel": L + "mlp.gate.weight",
    **{f"mlp/experts/{name}/kernel": f"{EXPERTS}{name}_proj.weight" for name in ("gate", "up", "down")},
    **{f"mlp/shared/{name}/kernel": f"{L}mlp.shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")},
    "mlp/shared_gate/kernel": L + "mlp.shared_expert_gate.weight",
}
MIXTRAL_EXPERTS = L + "block_sparse_moe.experts.{e}."
MIXTRAL_NAMES: dict[str, str | Stored] = {
    "mlp/router/kernel": L + "block_sparse_moe.gate.weight",
    "mlp/experts/gate/kernel": MIXTRAL_EXPERTS + "w1.weight",
    "mlp/experts/up/kernel": MIXTRAL_EXPERTS + "w3.weight",
    "mlp/experts/down/kernel": MIXTRAL_EXPERTS + "w2.weight",
}
POST_NORMS: dict[str, str | Stored] = {
    "attention_norm/gain": L + "post_attention_layernorm.weight",
    "mlp_norm/gain": L + "post_feedforward_layernorm.weight",
}
GEMMA_NORMS: dict[str, str | Stored] = {
    "attention_post_norm/gain": L + "post_attention_layernorm.weight",
    "mlp_norm/gain": L + "pre_feedforward_layernorm.weight",
    "mlp_post_norm/gain": L + "post_feedforward_layernorm.weight",
}


def together(name: str, layout: str, *parts: str) -> dict[str, str | Stored]:
    """Leaves that are one tensor."""
    return dict.fromkeys(parts, Stored(name, parts, layout))


PHI3_NAMES = together(
    L + "self_attn.qkv_proj.weight", "rows", *(f"attention/{name}/kernel" for name in ("query", "key", "value"))
) | together(L + "mlp.gate_up_proj.weight", "rows", "mlp/gate/kernel", "mlp/up/kernel")
GPT_OSS_NAMES = {
    "mlp/router/kernel": L + "mlp.router.weight",
    "mlp/router/logit_bias": L + "mlp.router.bias",
    **together(L + "mlp.experts.gate_up_proj", "turns", "mlp/experts/gate/kernel", "mlp/experts/up/kernel"),
    **together(L + "mlp.experts.gate_up_proj_bias", "turns", "mlp/experts/gate/bias", "mlp/experts/up/bias"),
    "mlp/experts/down/kernel": Stored(L + "mlp.experts.down_proj", layout="plain"),
    "mlp/experts/down/bias": Stored(L + "mlp.experts.down_proj_bias", layout="plain"),
}
DEEPSEEK_NAMES = {
    "attention/query_down/kernel": L + "self_attn.q_a_proj.weight",
    "attention/query_down_norm/gain": L + "self_attn.q_a_layernorm.weight",
    "attention/query_up/kernel": L + "self_attn.q_b_proj.weight",
    **together(
        L + "self_attn.kv_a_proj_with_mqa.weight", "rows", "attention/latent_down/kernel", "attention/key_rope/kernel"
    ),
    "attention/latent_norm/gain": L + "self_attn.kv_a_layernorm.weight",
    **together(L + "self_attn.kv_b_proj.weight", "heads", "attention/key_up/kernel", "attention/value_up/kernel"),
    "mlp/router/bias": L + "mlp.gate.e_score_correction_bias",
    **{f"mlp/shared/{name}/kernel": f"{L}mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")},
}
DEEPSEEK_PAIRS = ("attention/query/kernel", "attention/query_up/kernel", "attention/key_rope/kernel")

LLAMA: dict[str, Any] = {
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
BIASED = {"attention_bias": False}
NO_PADDING = {"pad_token_id": None}  # transformers' default is a token that smaller vocabularies lack
MISTRAL = LLAMA | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
MIXTRAL = MISTRAL | {
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}
QWEN2 = LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
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
QWEN3_MOE = (
    QWEN2
    | BIASED
    | {
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
)
OLMO2 = LLAMA | BIASED | {"vocab_size": 50304, "rms_norm_eps": 1e-5}
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
SMOLLM3 = (
    LLAMA
    | BIASED
    | {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        **NO_PADDING,
    }
)
PHI3 = LLAMA | {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "partial_rotary_factor": 1.0,
    **NO_PADDING,
}
GEMMA2 = (
    {name: value for name, value in LLAMA.items() if name != "hidden_act"}
    | BIASED
    | {
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "layer_types": None,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
)
GEMMA3 = {name: value for name, value in GEMMA2.items() if name != "attn_logit_softcapping"} | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window_pattern": 6,
    "final_logit_softcapping": None,
}
GPT_OSS = LLAMA | {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "attention_bias": True,
    "sliding_window": 128,
    "layer_types": None,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}
LATENT = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
NO_HEADS = {name: value for name, value in LLAMA.items() if name != "head_dim"}
DEEPSEEK_V2 = (
    NO_HEADS
    | LATENT
    | {
        "vocab_size": 102400,
        "n_routed_experts": 64,
        "num_experts_per_tok": None,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1407,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        "n_group": None,
        "topk_group": None,
    }
)
DEEPSEEK_V3 = (
    NO_HEADS
    | LATENT
    | {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "max_position_embeddings": 4096,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 2048,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 1,
    }
)
QK_NORM = {"qk_norm": True}
WHOLE_QK_NORM = {"qk_norm": True, "qk_norm_scope": "projection"}
GEMMA = {"norm_position": "both", "gain_offset": 1.0, "mlp": "geglu_tanh"}
ROUTED = {"mlp": "routed"}
GPT_OSS_FIELDS = {
    "sinks": True,
    "mlp": "routed",
    "moe": {"biases": True, "router": {"bias": True}, "mixture": {"gating": {"offset": 1.0}}},
}
SIGMOID = {"mlp": "routed", "moe": {"router": {"name": "sigmoid"}}}
# Of two families that describe a model the first is written.
FAMILIES = {
    "llama": Family(LLAMA | BIASED),
    "mistral": Family(MISTRAL),
    "mixtral": Family(MIXTRAL, ROUTED, MIXTRAL_NAMES),
    "qwen2": Family(QWEN2 | WINDOWS, {"qkv_bias": True}),
    "qwen2_moe": Family(QWEN2_MOE, ROUTED),
    "qwen3": Family(QWEN2 | BIASED | WINDOWS | {"head_dim": 128}, QK_NORM),
    "qwen3_moe": Family(QWEN3_MOE, QK_NORM | ROUTED),
    "olmo2": Family(OLMO2, WHOLE_QK_NORM | {"norm_position": "post"}, POST_NORMS),
    "olmoe": Family(OLMOE, WHOLE_QK_NORM | ROUTED),
    "smollm3": Family(SMOLLM3, architecture="SmolLM3"),
    "phi3": Family(PHI3, {}, PHI3_NAMES),
    "gemma2": Family(GEMMA2, GEMMA, GEMMA_NORMS, letters="LG"),
    "gemma3_text": Family(GEMMA3, GEMMA | QK_NORM, GEMMA_NORMS, letters="LLLLLG", architecture="Gemma3"),
    "gpt_oss": Family(GPT_OSS, GPT_OSS_FIELDS, GPT_OSS_NAMES, letters="LG"),
    "deepseek_v2": Family(DEEPSEEK_V2, ROUTED, DEEPSEEK_NAMES, DEEPSEEK_PAIRS),
    "deepseek_v3": Family(DEEPSEEK_V3, SIGMOID, DEEPSEEK_NAMES, DEEPSEEK_PAIRS),
}
# Entries of config.json and the field that says the same; null is the field's 0.
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "ff",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied",
    "qkv_bias": "qkv_bias",
    "sliding_window": "window",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "logit_softcap",
    "rope_local_base_freq": "local_rope_theta",
    "q_lora_rank": "latent.q_rank",
    "kv_lora_rank": "latent.kv_rank",
    "qk_nope_head_dim": "latent.nope_dim",
    "qk_rope_head_dim": "latent.rope_dim",
    "v_head_dim": "latent.value_dim",
    "num_experts": "moe.router.experts",
    "num_local_experts": "moe.router.experts",
    "n_routed_experts": "moe.router.experts",
    "num_experts_per_tok": "moe.router.k",
    "moe_intermediate_size": "moe.ff",
    "n_shared_experts": "moe.shared",
    "first_k_dense_replace": "moe.first_k_dense_replace",
    "routed_scaling_factor": "moe.router.scale",
    "n_group": "moe.router.groups",
    "topk_group": "moe.router.top_groups",
    "swiglu_alpha": "moe.mixture.gating.slope",
    "swiglu_limit": "moe.mixture.gating.limit",
}
# Whole numbers and other numbers above 0; some may be null, those of `ZERO` 0.
WHOLE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "num_experts", "num_local_experts"),
    *("num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size", "sliding_window"),
    *("n_routed_experts", "n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "q_lora_rank"),
    *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "sliding_window_pattern"),
    *("no_rope_layer_interval", "max_window_layers", "query_pre_attn_scalar"),
)
NUMBERS = (
    *("rms_norm_eps", "rope_theta", "rope_local_base_freq", "attn_logit_softcapping", "final_logit_softcapping"),
    *("routed_scaling_factor", "swiglu_alpha", "swiglu_limit", "partial_rotary_factor"),
)
ZERO = ("first_k_dense_replace", "max_window_layers", "num_nextn_predict_layers")
NULL = (
    *("num_key_value_heads", "sliding_window", "q_lora_rank", "attn_logit_softcapping", "final_logit_softcapping"),
    "norm_topk_prob",
)
# Entries that change what the model computes and have no counterpart here, with the value that changes nothing; those
# of a family's own defaults are read.
REFUSED: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "clip_qkv": None,
    "use_bidirectional_attention": False,
    "attn_logit_softcapping": None,
    "rope_interleave": True,
    "moe_layer_freq": 1,
    **DENSE_LAYERS,
}
# The same by family: how it scores and chooses experts, which transformers takes for granted.
SCORES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"scoring_func": "softmax"},
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
}
# Entries of rotary scaling by kind, as fields of `RopeScaling`.
ROPE = {
    "factor": "factor",
    "original_max_position_embeddings": "original_length",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "truncate": "truncate",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
ROPE_KINDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate"),
        *("mscale", "mscale_all_dim"),
    ),
}
# Those without a default.
ROPE_REQUIRED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
LETTERS = {"sliding_attention": "L", "full_attention": "G"}


def stored(path: str, family: Family) -> Stored:
    """Where a leaf of a block, without its stack and layer axis, is stored."""
    found = family.names.get(path) or BLOCK[path]
    return found if isinstance(found, Stored) else Stored(found)
