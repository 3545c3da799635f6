"""GGUF files of Llama architecture, as llama.cpp runs them.

Quantized tensors (Q8_0, Q4_1 ...) are widened to float32 one at a time by the `gguf` package (extra
`hf`). llama.cpp pairs rotary channels 2 i and 2 i + 1 where Hugging Face and this project pair i and i + h / 2, so the
rows of its query and key projections are stored interleaved and are put back here.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from tessera.infra.checkpoint import short
from tessera.models.attention_forms import RopeScaling, scaled_frequencies
from tessera.models.transformer import TransformerConfig, param_shapes
from tessera.serving.families import NotConvertible
from tessera.serving.huggingface import TextFormat, assemble, some, tensor_names

# Hugging Face's name without `model.` -> the file's; {l} counts blocks.
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CONTROL = 3  # type of a special token
# llama.cpp (llama-vocab.cpp) ends a text at the tokens of these fields, and at any that is called so.
END_FIELDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
END_TEXTS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>"),
    *("<EOT>", "_<EOT>", "<end_of_utterance>"),
}
FREQUENCIES = "rope_freqs.weight"


def is_gguf(path: Path | str) -> bool:
    """Whether a path is a GGUF file by its name."""
    return Path(path).suffix == ".gguf"


def load_gguf(
    file: Path | str, place: Callable[[str, np.ndarray], Any] | None = None
) -> tuple[PyTree, TransformerConfig]:
    """Parameters float32 and model of a file; tensors are widened one at a time.

    Args:
      file: of architecture "llama" without experts.
      place: see `tessera.serving.huggingface.load_directory`.

    Raises:
      FileNotFoundError: no such file.
      NotConvertible: another architecture, rotary positions scaled in other ways than `RopeScaling`'s, or tensors
        missing, of other shapes or left over.
      ImportError: the extra `hf` is not installed.
    """
    reader = _open(file)
    with _sound(file):
        config = _config(file, reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors if tensor.name != FREQUENCIES}
    with _sound(file):
        names = {theirs: _name(theirs) for theirs in tensor_names(config)}
    if missing := sorted(set(names.values()) - tensors.keys()):
        raise NotConvertible(f"{file} has no tensor {some(missing)}")
    if rest := sorted(tensors.keys() - set(names.values())):
        raise NotConvertible(f"{file} has tensors that a Llama of its sizes lacks: {some(rest)}")

    def read(name: str) -> np.ndarray:
        tensor = tensors[names[name]]
        array = _gguf().quants.dequantize(tensor.data, tensor.tensor_type)
        heads = {"q_proj": config.heads, "k_proj": config.kv_size}.get(name.split(".")[-2], 0)
        return _halves(array, heads) if heads else array

    with _sound(file):
        shapes = jax.tree.leaves(param_shapes(config))
        if (asked := sum(math.prod(leaf.shape) for leaf in shapes)) != sum(
            int(one.n_elements) for one in tensors.values()
        ):
            raise NotConvertible(f"{file} says sizes of {asked} parameters, and its tensors have another number")
        return assemble(config, read, place), config


def read_tokenizer(file: Path | str) -> Any:
    """The `tokenizers.Tokenizer` of a file, byte-level BPE with the splits of its `tokenizer.ggml.pre`.

    Raises:
      NotConvertible: another kind of tokenizer, or a damaged file.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = _fields(file, _open(file))
    kind, split = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    # The regular expression of GPT-2 is ByteLevel's own.
    splits: dict[str, list[Any]] = {"gpt-2": [], "smollm": [pre_tokenizers.Digits(individual_digits=True)]}
    if kind != "gpt2" or split not in splits or fields.get("tokenizer.ggml.add_bos_token"):
        raise NotConvertible(
            f"{file}: tokenizer {kind!r} with splits {split!r} is not read; byte-level BPE ('gpt2') with "
            f"{', '.join(map(repr, splits))} and no token before the text is: give the model's tokenizer.json as "
            "tokenizer"
        )
    with _sound(file):
        tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
        merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        found = Tokenizer(models.BPE(vocabulary, merges))
        special = [token for token, of_type in zip(tokens, types, strict=True) if of_type == CONTROL]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    found.pre_tokenizer = pre_tokenizers.Sequence([*splits[split], byte_level])
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return found


def read_format(file: Path | str) -> TextFormat:
    """Special tokens, chat template and positions of a file."""
    fields = _fields(file, _open(file))
    begin, positions = fields.get("tokenizer.ggml.bos_token_id"), fields.get("llama.context_length", 0)
    ends, tokens = (
        {name: fields[name] for name in END_FIELDS if name in fields},
        fields.get("tokenizer.ggml.tokens", []),
    )
    if not all(type(one) is int for one in (begin or 0, *ends.values(), positions)):
        raise NotConvertible(f"{file}: token ids and llama.context_length must be whole numbers")
    if outside := [f"{name}={end}" for name, end in ends.items() if not 0 <= end < len(tokens)]:
        raise NotConvertible(f"{file}: {', '.join(outside)}: it has tokens 0 to {len(tokens) - 1}")
    named = [index for index, token in enumerate(tokens) if token in END_TEXTS]
    template = fields.get("tokenizer.chat_template", "")
    found = TextFormat(begin, tuple(dict.fromkeys([*ends.values(), *named])), template, positions)
    if not isinstance(found.template, str):
        raise NotConvertible(f"{file}: tokenizer.chat_template must be text")
    return found


def _config(file: Path | str, reader: Any) -> TransformerConfig:
    fields = _fields(file, reader)
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise NotConvertible(f"{file}: architecture {architecture!r} has no counterpart here; 'llama' loads")
    c = {key.removeprefix("llama."): value for key, value in fields.items() if key.startswith("llama.")}
    if large := [f"{name}={value}" for name, value in c.items() if isinstance(value, int) and value >= 2**31]:
        raise NotConvertible(f"{file}: {', '.join(large)}: no model has such sizes")
    if c["block_count"] > len(reader.tensors):
        raise NotConvertible(f"{file} has {len(reader.tensors)} tensors: too few for {c['block_count']} blocks")
    heads, width = c["attention.head_count"], c["embedding_length"]
    size = c.get("attention.key_length", width // heads)
    kind, factor = c.get("rope.scaling.type", "linear"), _scaling_factor(c)
    wrong = {
        "expert_count": c.get("expert_count"),
        "attention.causal": not c.get("attention.causal", True),
        "rope.scaling.type": kind not in ("none", "linear", "yarn"),
        "rope.scaling.factor": factor < 1,
        "rope.scale_linear": factor < 1,
        "rope.scaling.attn_factor": c.get("rope.scaling.attn_factor", 1.0) != 1,
        "rope.dimension_count": c.get("rope.dimension_count", size) != size,
        "attention.value_length": c.get("attention.value_length", size) != size,
    }
    if refused := [f"{name}={c[name]}" for name, bad in wrong.items() if bad and name in c]:
        raise NotConvertible(f"{file}: {', '.join(refused)}: no counterpart here")
    theta, scaling = float(c.get("rope.freq_base", 1e4)), RopeScaling()
    if kind != "none" and factor != 1:
        length = c.get("rope.scaling.original_context_length", c["context_length"]) if kind == "yarn" else 0
        scaling = RopeScaling(kind, factor, length)
    for tensor in reader.tensors:
        if tensor.name == FREQUENCIES:
            divisors = _gguf().quants.dequantize(tensor.data, tensor.tensor_type)
            scaling = _scaling_of(divisors, size, theta, scaling)
    return TransformerConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        layers=c["block_count"],
        width=width,
        heads=heads,
        kv_heads=c.get("attention.head_count_kv", heads),
        head_dim=size,
        ff=c["feed_forward_length"],
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_decimal(c["attention.layer_norm_rms_epsilon"]),
        tied=all(tensor.name != "output.weight" for tensor in reader.tensors),
    )


def _scaling_factor(c: dict[str, Any]) -> float:
    """As llama.cpp reads it: the old name counts where the new one is absent, and 0 is 1."""
    return _decimal(c.get("rope.scaling.factor", c.get("rope.scale_linear", 0.0))) or 1.0


def _scaling_of(divisors: np.ndarray, size: int, theta: float, also: RopeScaling) -> RopeScaling:
    """The scaling whose frequencies are the plain ones over `divisors`, which a Llama 3.1 or later has as a tensor.

    Raises:
      NotConvertible: divisors of another model, or a factor beside them.
    """
    # The file says neither lengths nor turns: they are those of all Llama 3 models, or the divisors differ.
    largest = float(divisors.max())
    found = RopeScaling("llama3", largest, 8192) if largest > 1 else RopeScaling()
    plain = RopeScaling("linear")
    ours = scaled_frequencies(size, theta, plain) / scaled_frequencies(size, theta, found if largest > 1 else plain)
    if also != RopeScaling() or divisors.shape != ours.shape or not np.allclose(divisors, ours, rtol=1e-4):
        raise NotConvertible(
            f"{FREQUENCIES} {divisors.tolist()[:8]} with scaling {also.kind!r}: no counterpart here; Llama 3's of 8192 "
            f"tokens alone are {np.round(ours, 4).tolist()[:8]}"
        )
    return found


def _decimal(number: float) -> float:
    """A number stored as float32, in which 1e-5 comes back as 9.999999747378752e-06."""
    return float(np.format_float_positional(np.float32(number)))


def _name(theirs: str) -> str:
    """The file's name of one of Hugging Face's tensors."""
    if theirs in NAMES:
        return NAMES[theirs]
    layer, inner = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", theirs).groups()  # type: ignore[union-attr]
    return f"blk.{layer}.{NAMES[inner]}.weight"


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection [heads * h, inputs], channels 2 i and 2 i + 1 of every head to i and i + h / 2."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def _open(file: Path | str) -> Any:
    if not Path(file).is_file():
        raise FileNotFoundError(f"no GGUF file {file}")
    reader: Any = _gguf().GGUFReader

    class Bounded(reader):
        """The package's reader gives less than was asked for past the end, and so reads arrays of any stated length."""

        def _get(self, offset: Any, dtype: Any, count: Any = 1, *rest: Any, **more: Any) -> Any:
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it ends in the middle of a value")
            return super()._get(offset, dtype, count, *rest, **more)

    with _sound(file):
        return Bounded(file)


def _fields(file: Path | str, reader: Any) -> dict[str, Any]:
    with _sound(file):
        return {name: field.contents() for name, field in reader.fields.items()}


@contextlib.contextmanager
def _sound(file: Path | str) -> Iterator[None]:
    """What goes wrong inside is a damaged file: the package checks hardly anything of what it reads."""
    try:
        yield
    except NotConvertible as error:
        if str(file) in str(error):
            raise
        raise NotConvertible(f"{file}: {error}") from error
    except Exception as error:  # of many kinds
        raise NotConvertible(f"{file} is no GGUF file, or damaged ({short(error)})") from error


def _gguf() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise ImportError("GGUF files need the extra `hf`: pip install 'tessera-jax[hf]'") from error
    return gguf
