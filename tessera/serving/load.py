"""Models to serve: a run of the training script, a ticket of it, a Hugging Face directory, or a GGUF file."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from lottery import export
from sharding.inference.quantize import QuantConfig, is_quantized
from sharding.plan import Plan
from tessera.data.text import BPETokenizer, ByteTokenizer, Tokenizer
from tessera.infra.logger import read_object, write_text
from tessera.infra.remote import cache_dir, is_url, local, upload
from tessera.infra.workdir import hold, read_settings
from tessera.lm import lora
from tessera.lm.warm_start import join_blocks, read_adapted, split_blocks
from tessera.models.transformer import TransformerConfig, param_shapes
from tessera.serving import gguf, huggingface
from tessera.serving.adapters import load_adapters
from tessera.serving.engine import Engine
from tessera.serving.huggingface import TextFormat
from tessera.serving.multi_lora import load_stacked
from tessera.serving.programs import Programs, ServeConfig, make_programs
from tessera.serving.quantized import quantise_decoder
from tessera.serving.served import serve
from tessera.serving.speculative import Speculating


@dataclass(frozen=True)
class SourceConfig:
    """Where a model comes from.

    Attributes:
      dir: a run of `scripts/train.py`, a Hugging Face directory, or a GGUF file; as the files below, a path or a URL
        (s3://, gs://).
      ticket: a file of `lottery.export.save`, whose weights (zeros outside its mask) replace the run's; "" for none.
      adapter: a directory of a LoRA adapter of `peft`, merged into the weights, inside the ticket's mask; "" for none.
      tokenizer: a file in the JSON format of the `tokenizers` package; "" takes the model's own.
      dtype: "float32" or "bfloat16", of activations and kernels; "" is the model's.
      bits: 0 keeps the weights, 8 and 4 round them.
      group: inputs that share a scale; 0 is all.
      method: "rtn" (to nearest), "awq" or "gptq"; see `sharding.inference.quantize`.
      calibration: a file of text such as the model reads, for AWQ and GPTQ.
      step: of a run: which checkpoint is read; 0 is the newest.
    """

    dir: str = ""
    ticket: str = ""
    adapter: str = ""
    tokenizer: str = ""
    dtype: str = ""
    bits: int = 0
    group: int = 0
    method: str = "rtn"
    calibration: str = ""
    step: int = 0

    def __post_init__(self) -> None:
        if self.bits and self.method != "rtn" and not self.calibration:
            raise ValueError(f"method={self.method!r} needs calibration, a file of text such as the model reads")


@dataclass(frozen=True)
class DraftConfig:
    """Tokens drafted for the model to check several in a pass (speculative decoding).

    By a second, small model, see `tessera.serving.speculative`, by the model's own first layers or ticket
    (self-speculation: Zhang et al. 2023, arXiv:2309.08168), or looked up in the text (`tessera.serving.lookup`).

    Attributes:
      dir, ticket, dtype, bits, group: see `SourceConfig` (rounded to nearest). Without a `dir` the model itself drafts,
        if `ticket` or `layers` says with which part of it; what is left out is then the model's.
      layers: the draft's first layers, followed by its output layer; 0 is all.
      plan: how it is split; "same" as the large model. Slots must be split over as many devices.
      tokens: drafted per round.
      lookup: prompt lookup decoding: longest n-gram at the end of a text that is looked up in it, to draft what
        followed it before; 0 is off. Greedy requests without penalties, a logit bias or a grammar are drafted for,
        others go on a token at a time.
    """

    dir: str = ""
    ticket: str = ""
    layers: int = 0
    dtype: str = ""
    bits: int = 0
    group: int = 0
    plan: str = "same"
    tokens: int = 4
    lookup: int = 0

    def __post_init__(self) -> None:
        if self.lookup < 0 or self.layers < 0 or self.tokens < 1:
            raise ValueError(
                f"lookup={self.lookup} and layers={self.layers} must be at least 0, tokens={self.tokens} at least 1"
            )
        if self.lookup and self.model:
            raise ValueError(
                f"lookup={self.lookup} and dir={self.dir!r}, ticket={self.ticket!r}, layers={self.layers}: the text or "
                "one of the two models drafts; leave the other out"
            )

    @property
    def model(self) -> bool:
        """Whether a model drafts, a second one or the model itself."""
        return bool(self.dir or self.ticket or self.layers)


class Loaded(NamedTuple):
    """Parameters (numpy), the model they are of, its tokenizer, and what it takes for a text."""

    params: PyTree
    config: TransformerConfig
    tokenizer: Tokenizer
    format: TextFormat = TextFormat()

    @property
    def begin(self) -> int:
        """The token that a text follows: the model's beginning or end of text, else that between texts in training."""
        if self.format.begin is not None:
            return self.format.begin
        return next(iter(self.format.ends), int(self.tokenizer.encode("\0")[0]))


def load(source: SourceConfig) -> Loaded:
    """Read a model.

    Raises:
      FileNotFoundError: no run, checkpoint, model or tokenizer is there.
      CheckpointDamaged: the checkpoint cannot be read.
      ValueError: a ticket of another model; a directory of another architecture.
    """
    path = local(source.dir)
    text = TextFormat()
    if source.step and (gguf.is_gguf(path) or huggingface.is_directory(path)):
        raise ValueError(f"step={source.step}: {source.dir} is one model; only a run has checkpoints to choose from")
    if gguf.is_gguf(path):
        (params, config), text = gguf.load_gguf(path), gguf.read_format(path)
    elif huggingface.is_directory(path):
        (params, config), text = huggingface.load_directory(path), huggingface.read_format(path)
    else:
        params, config = _read_run(path, source.step)
    if source.ticket:
        params = read_ticket(local(source.ticket), config)
    if source.adapter:
        alive = jax.tree.map(lambda leaf: leaf != 0, params) if source.ticket else None
        adapters, settings = load_adapters(local(source.adapter), config)
        params = jax.tree.map(np.asarray, lora.apply(params, adapters, settings, alive))
    tokenizer = BPETokenizer.load(local(source.tokenizer)) if source.tokenizer else own_tokenizer(path, config)
    own = tokenizer.own_size if isinstance(tokenizer, BPETokenizer) else tokenizer.vocab_size
    if own > config.vocab_size:
        raise ValueError(f"the tokenizer has {own} tokens, the model {config.vocab_size}: not made for each other")
    if isinstance(tokenizer, BPETokenizer):  # files often name a token for padding that no model has
        tokenizer.limit = config.vocab_size
    return Loaded(params, config, tokenizer, text)


def read_architecture(source: SourceConfig) -> TransformerConfig:
    """Read what model is where, for a Hugging Face directory from its config.json alone; raises what `load` does."""
    path = local(source.dir)
    if gguf.is_gguf(path):
        return gguf.load_gguf(path)[1]
    return huggingface.read_config(path) if huggingface.is_directory(path) else _read_run(path, source.step)[1]


def export_directory(loaded: Loaded, directory: Path | str, dtype: str = "float32") -> Path | str:
    """Write a model with its tokenizer, special tokens and chat template as a Hugging Face directory.

    Args:
      loaded: a model, see `load`.
      directory: new, a path or a URL; it appears when everything in it is written, at a URL config.json last.
      dtype: "float32" or "bfloat16", of the weights.

    Raises:
      FileExistsError: the directory exists.
      WorkdirInUse: another process exports to it.
      NotConvertible: a model of none of `families.FAMILIES`.
      ImportError: the extra `hf` is not installed.
    """
    if is_url(directory):
        with tempfile.TemporaryDirectory() as folder:
            export_directory(loaded, Path(folder) / "model", dtype)
            upload(Path(folder) / "model", str(directory), last="config.json")
        return directory
    target = Path(directory)
    if target.exists():
        raise FileExistsError(f"{target} exists; name a new directory to export to")
    text = loaded.format
    tokens: dict[str, Any] = {} if text.begin is None else {"bos_token_id": text.begin}
    if text.ends:
        tokens["eos_token_id"] = text.ends[0] if len(text.ends) == 1 else list(text.ends)
    more = {"max_position_embeddings": text.positions} if text.positions else {}
    work = target.with_name(f".{target.name}.exporting")
    staging = work / target.name
    with hold(work):
        shutil.rmtree(staging, ignore_errors=True)  # of an export that was killed
        try:
            huggingface.save_directory(staging, loaded.params, loaded.config, dtype, **(tokens | more))
            tokenizer = loaded.tokenizer if isinstance(loaded.tokenizer, BPETokenizer) else BPETokenizer.of_bytes()
            tokenizer.save(staging / "tokenizer.json")
            names = {"bos_token": text.begin, "eos_token": text.ends[0] if text.ends else None}
            named = {name: tokenizer.name_of(token) for name, token in names.items() if token is not None}
            settings: dict[str, Any] = named if text.special is None else dict(text.special)
            settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
            settings |= {"chat_template": text.template} if text.template else {}
            write_text(staging / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
            write_text(staging / "generation_config.json", json.dumps(tokens, indent=2) + "\n")
            os.rename(staging, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def read_ticket(path: Path | str, config: TransformerConfig) -> PyTree:
    """A ticket's weights, zeros where its mask is False.

    Raises:
      ValueError: it is no ticket, or one of another model.
    """
    flat, masks, _ = export.load(path)
    params = export.unflatten({name: np.where(masks[name], leaf, 0).astype(np.float32) for name, leaf in flat.items()})
    params = params.get("params", params)
    wanted = {name: leaf.shape for name, leaf in _flat(param_shapes(config)).items()}
    found = {name: leaf.shape for name, leaf in _flat(params).items()}
    wrong = [name for name in wanted | found if wanted.get(name) != found.get(name)]
    if wrong:
        name = wrong[0]
        raise ValueError(f"{path}: a ticket of another model; {name} is {found.get(name)}, not {wanted.get(name)}")
    return params


def read_calibration(path: Path | str, tokenizer: Tokenizer, rows: int = 32, length: int = 128) -> np.ndarray:
    """Tokens int32 [rows, length] from places spread evenly over a file of text.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it has fewer than `length` tokens, or is not UTF-8 text.
    """
    try:
        tokens = tokenizer.encode(local(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if len(tokens) < length:
        raise ValueError(f"{path} has {len(tokens)} tokens; calibration needs {length}")
    starts = np.linspace(0, len(tokens) - length, rows).astype(int)
    return np.stack([tokens[start : start + length] for start in starts]).astype(np.int32)


def own_tokenizer(path: Path, config: TransformerConfig) -> Tokenizer:
    """The tokenizer of a run (bytes, or the BPE it trained, in the cache directory) or of a directory.

    Raises:
      FileNotFoundError: the BPE is not where the run left it, or a directory has no tokenizer.json.
      ValueError: a file is damaged.
    """
    if gguf.is_gguf(path):
        return BPETokenizer(gguf.read_tokenizer(path))
    if (path / "tokenizer.json").exists():
        return BPETokenizer.load(path / "tokenizer.json")
    settings = read_object(path / "config.json")
    data: Any = settings.get("data") or {}
    if not isinstance(data, dict):
        raise ValueError(f"{path}/config.json: data={data!r} must be a group of settings")
    if data.get("tokenizer") == "bpe":
        name = f"bpe-{data.get('vocab_size')}-{str(settings.get('data_sha256'))[:32]}.json"
        saved = cache_dir() / "tokenizers" / name
        if not saved.exists():
            raise FileNotFoundError(f"the run's tokenizer {saved} is gone; give its file as tokenizer")
        return BPETokenizer.load(saved)
    if data.get("tokenizer") == "ids":
        raise FileNotFoundError(f"{path} was trained on ids without a tokenizer; give one as tokenizer")
    if data or config.vocab_size == ByteTokenizer.vocab_size:
        return ByteTokenizer()
    raise FileNotFoundError(f"{path} has no tokenizer.json; give one as tokenizer")


def make_engine(
    source: SourceConfig,
    plan: Plan,
    sizes: ServeConfig,
    queue: int = 64,
    draft: DraftConfig = DraftConfig(),
    prefix_cache: int = 0,
    adapters: Mapping[str, str] | None = None,
) -> tuple[Engine, Loaded]:
    """Load a model and make the engine that serves it; also returns what was loaded, without its weights.

    Args:
      source: the model, the base of the adapters.
      plan: how it is split.
      sizes: of the programs.
      queue, prefix_cache: see `Engine`.
      draft: what drafts for it, without adapters.
      adapters: directories of LoRA adapters of `peft` by the names that requests choose them by (`Sampling.adapter`).

    Raises:
      PlanError: the plan does not fit the model, the sizes or the devices; a draft that does not fit the model.
      ValueError: texts longer than the model's positions; adapters beside a ticket.
      and what `load` and `multi_lora.load_stacked` raise.
    """
    if adapters and source.ticket:
        raise ValueError(
            f"adapters {list(adapters)} beside ticket={source.ticket!r}: what they add would fill its zeros; merge one "
            "into it (adapter)"
        )
    loaded = load(source)
    _check_length(loaded, source, sizes)
    stacked = load_stacked(adapters, loaded.config) if adapters else None
    programs, params = _programs(loaded, source, plan, sizes, stacked)
    ends, options = loaded.format.ends, dict[str, Any](adapters=tuple(adapters or ()))
    if not draft.model:
        options |= {"lookup": draft.lookup, "drafted": draft.tokens}
        return Engine(programs, programs.place(params), queue, ends, prefix_cache, **options), loaded._replace(
            params=None
        )
    own: Any = {name: getattr(draft, name) for name in ("dir", "ticket", "dtype", "bits", "group")}
    if draft.dir:
        small = SourceConfig(tokenizer=source.tokenizer, **own)
    else:
        small = replace(source, **{name: value for name, value in own.items() if value})
    split = plan if draft.plan == "same" else Plan(draft.plan)
    drafted = load(small) if draft.dir or draft.ticket else loaded
    if draft.layers:
        first, smaller = first_layers(drafted.params, drafted.config, draft.layers)
        drafted = drafted._replace(params=first, config=smaller)
    _check_length(drafted, small, sizes)
    drafting, draft_params = _programs(drafted, small, split, replace(sizes, groups=0))
    both = Speculating(programs, drafting, draft.tokens)
    engine = Engine(both, both.place(params, draft_params), queue, ends, prefix_cache, **options)
    return engine, loaded._replace(params=None)


def first_layers(params: PyTree, config: TransformerConfig, layers: int) -> tuple[PyTree, TransformerConfig]:
    """A decoder's first layers, followed by its last norm and its output layer.

    Raises:
      ValueError: as many layers as it has, or more; a number that its groups of layers do not divide.
    """
    if not 0 < layers < config.layers:
        raise ValueError(f"layers={layers}: the model has {config.layers}; 1 to {config.layers - 1} of them can draft")
    smaller = replace(config, layers=layers)
    return join_blocks(params, split_blocks(params, config)[:layers], smaller), smaller


def _check_length(loaded: Loaded, source: SourceConfig, sizes: ServeConfig) -> None:
    """Refuse texts longer than a model's positions: beyond them it was not trained."""
    most = loaded.format.positions
    if most and sizes.length > most:
        raise ValueError(f"length={sizes.length}: {source.dir} has max_position_embeddings={most}")


def _programs(
    loaded: Loaded, source: SourceConfig, plan: Plan, sizes: ServeConfig, adapters: PyTree = None
) -> tuple[Programs, PyTree]:
    params = loaded.params
    if source.bits and any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))):
        raise ValueError(f"bits={source.bits}: the weights of {source.dir} are quantized already; leave bits=0")
    if source.bits:
        text = read_calibration(source.calibration, loaded.tokenizer) if source.method != "rtn" else None
        params = quantise_decoder(params, loaded.config, QuantConfig(source.bits, source.method, source.group), text)
    if adapters is not None:
        params = {**params, "adapters": adapters}
    params, served = serve(params, loaded.config, plan, source.dtype)
    return make_programs(served, sizes), params


def _flat(tree: PyTree, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    found: dict[str, Any] = {}
    for name, branch in tree.items():
        found |= _flat(branch, f"{prefix}/{name}" if prefix else name)
    return found


def _read_run(path: Path, step: int) -> tuple[PyTree, TransformerConfig]:
    """Parameters and model of a run; adapters are merged into the Hugging Face directory that they started from."""
    settings = read_settings(path)
    base = settings.get("start", {}).get("dir", "") if settings.get("lora", {}).get("rank") else ""
    return read_adapted(path, load(SourceConfig(base)).params if base else None, step)
