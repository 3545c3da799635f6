"""LoRA adapters in the directory format of `peft`: adapter_config.json and adapter_model.safetensors.

A tensor of theirs belongs to one layer's projection by its Hugging Face name; `tessera.lm.lora` stacks the layers. What
their format can say and our adapters cannot (DoRA, biases, ranks by module, experts, tensors of several projections) is
refused by name.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from lottery import structures
from tessera.infra.logger import read_object, write_text
from tessera.lm.lora import LoRAConfig, nested, pairs
from tessera.models.transformer import TransformerConfig, param_shapes
from tessera.serving.config_json import family_of
from tessera.serving.families import NotConvertible
from tessera.serving.huggingface import Tensor, safetensors_module, some, tensors_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings of theirs that would change what an adapter computes, and the values at which they do not.
PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "lora_bias": (False, None),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (None, False),
    "velora_config": (None,),
}


def save_adapters(
    directory: Path | str, adapters: PyTree, lora: LoRAConfig, config: TransformerConfig, base: str = ""
) -> Path:
    """Write adapters as a directory that `peft.PeftModel.from_pretrained` reads.

    Args:
      directory: new, or one that has an adapter of ours only.
      adapters: see `tessera.lm.lora.initialize`.
      lora: their settings.
      config: the model that they adapt.
      base: name or directory of that model, for `base_model_name_or_path`.

    Raises:
      NotConvertible: an adapter of a kernel that has no tensor of its own in the family's files (experts, joined
        projections), or of a model of no family.
      FileExistsError: the directory has files that are no adapter's.
      ImportError: the extra `hf` is not installed.
    """
    path = Path(directory)
    if path.exists() and (foreign := sorted(set(file.name for file in path.iterdir()) - {CONFIG, WEIGHTS})):
        raise FileExistsError(f"{path} has files that are no adapter's ({some(foreign)}); name a new directory")
    leaves = dict(pairs(adapters))
    tensors: dict[str, np.ndarray] = {}
    names = set()
    for tensor, _ in _projections(config):
        pair = leaves.get(tensor.parts[0])
        if pair is None:
            continue
        a, b = (np.asarray(pair[side], np.float32)[tensor.place or ...] for side in "ab")
        rank = a.shape[-1]
        _check(tensor, config)
        name = PREFIX + tensor.name.removesuffix(".weight")
        tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, rank).T)
        tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(b.reshape(rank, -1).T)
        names.add((tensor.parts[0], name.rsplit(".", 1)[-1]))
    if left := set(leaves) - {leaf for leaf, _ in names}:
        raise NotConvertible(f"{some(sorted(left))}: no projection by itself in the files of such a model")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rank_stabilized,
        "target_modules": sorted({name for _, name in names}),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    path.mkdir(parents=True, exist_ok=True)
    staged = path / f".{WEIGHTS}"
    safetensors_module().numpy.save_file(tensors, staged, metadata={"format": "pt"})
    staged.replace(path / WEIGHTS)
    write_text(path / CONFIG, json.dumps(settings, indent=2) + "\n")
    return path


def load_adapters(directory: Path | str, config: TransformerConfig) -> tuple[dict[str, Any], LoRAConfig]:
    """Read a LoRA adapter of `peft` for a model; layers that it leaves out get zeros.

    Raises:
      FileNotFoundError: no such directory, or one of its two files is missing.
      NotConvertible: settings of theirs that our adapters do not have, a tensor of another model or of another shape.
      ImportError: the extra `hf` is not installed.
    """
    path = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).exists():
            raise FileNotFoundError(f"{path} has no {name}: not a LoRA adapter of peft")
    settings = _settings(path / CONFIG)
    try:
        tensors = safetensors_module().numpy.load_file(path / WEIGHTS)
    except Exception as error:
        raise NotConvertible(f"{path / WEIGHTS}: no safetensors file ({error})") from None
    rank, found, used = settings["r"], dict[str, Any](), set[str]()
    shapes = dict(_shapes(config))
    for tensor, layout in _projections(config):
        leaf, shape = tensor.parts[0], shapes[tensor.parts[0]]
        name = PREFIX + tensor.name.removesuffix(".weight")
        both = {side: f"{name}.lora_{side.upper()}.weight" for side in "ab"}
        if not any(one in tensors for one in both.values()):
            continue
        _check(tensor, config)
        if missing := [one for one in both.values() if one not in tensors]:
            raise NotConvertible(f"{path / WEIGHTS}: {missing[0]} is missing")
        split = len(shape) - layout.outputs
        inputs, outputs = shape[layout.batch : split], shape[split:]
        wanted = {"a": (rank, int(np.prod(inputs))), "b": (int(np.prod(outputs)), rank)}
        for side, one in both.items():
            if tensors[one].shape != wanted[side]:
                there = tensors[one].shape
                raise NotConvertible(f"{path / WEIGHTS}: {one} has shape {there}; {wanted[side]} is needed")
        stack = shape[: layout.batch]
        ends = {"a": (*inputs, rank), "b": (rank, *outputs)}
        pair = found.setdefault(leaf, {side: np.zeros((*stack, *ends[side]), np.float32) for side in ends})
        for side in ends:
            pair[side][tensor.place or ...] = np.asarray(tensors[both[side]], np.float32).T.reshape(ends[side])
        used |= set(both.values())
    if left := sorted(set(tensors) - used):
        raise NotConvertible(f"{path / WEIGHTS}: {some(left)}: no projection of this model")
    if not found:
        raise NotConvertible(f"{path / WEIGHTS} has no tensor")
    targets = "^(" + "|".join(map(re.escape, sorted(found))) + ")$"
    return nested(found), LoRAConfig(rank, float(settings["lora_alpha"]), targets, bool(settings.get("use_rslora")))


def _settings(file: Path) -> dict[str, Any]:
    try:
        settings = read_object(file)
    except ValueError as error:
        raise NotConvertible(str(error)) from None
    if settings.get("peft_type") != "LORA":
        raise NotConvertible(f"{file}: peft_type={settings.get('peft_type')!r}; adapters of LORA are read")
    for name, plain in PLAIN.items():
        if name in settings and settings[name] not in plain:
            raise NotConvertible(f"{file}: {name}={settings[name]!r} is not read; only {plain[0]!r}")
    for name, kinds in (("r", int), ("lora_alpha", (int, float))):
        value = settings.get(name)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < 2**31:  # type: ignore[arg-type]
            raise NotConvertible(f"{file}: {name}={value!r} must be a positive number")
    return settings


def _shapes(config: TransformerConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    for path, leaf in jax.tree.leaves_with_path(param_shapes(config)):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape


def _projections(config: TransformerConfig) -> Iterator[tuple[Tensor, structures.Layout]]:
    """Every tensor of the model's files that is a kernel of one layer, with the layout of the leaf it is in."""
    shapes = dict(_shapes(config))
    for tensor in tensors_of(config, family_of(config)):
        leaf = tensor.parts[0]
        if leaf.endswith("/kernel") and leaf != "head/kernel":
            yield tensor, structures.layout(leaf, shapes[leaf])


def _check(tensor: Tensor, config: TransformerConfig) -> None:
    pairs = family_of(config).pairs
    own = len(tensor.parts) == 1 and tensor.layout == "rows" and len(tensor.place) <= 1
    if not own or (pairs and tensor.parts[0].endswith(pairs)):
        raise NotConvertible(f"{tensor.name} holds several of our kernels, experts or reordered channels: no adapter")
