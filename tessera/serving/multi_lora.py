"""Several LoRA adapters beside one base, each request served with the one it names (S-LoRA: Sheng et al. 2023).

The base is in memory once. Adapters are a tree beside its parameters, "adapters" of those that `tessera.serving.served`
takes, stacked by layer and adapter; `sharding.inference.adapters` multiplies every row by its own.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from sharding.rules import is_spec, path_name
from tessera.infra.remote import local
from tessera.lm import lora
from tessera.models.transformer import TransformerConfig
from tessera.serving.adapters import WEIGHTS, load_adapters
from tessera.serving.families import NotConvertible

ADAPTED = r"/(attention/(query|key|value|output|query_down)|mlp/(gate|up|down))/kernel$"
"""Kernels that rows can multiply by adapters of their own: not those of experts and routers."""


def named(entries: Sequence[str], base: str = "") -> dict[str, str]:
    """Read adapters written as "NAME=DIRECTORY".

    Args:
      entries: of each.
      base: name of the model, that no adapter may have.

    Raises:
      ValueError: an entry without a name or a directory, or a name given twice.

    Example:
      >>> named(["sql=adapters/sql", "poems=adapters/poems"])
      {'sql': 'adapters/sql', 'poems': 'adapters/poems'}
    """
    found: dict[str, str] = {}
    for entry in entries:
        name, _, directory = (part.strip() for part in entry.partition("="))
        if not (name and directory):
            raise ValueError(f"{entry!r}: an adapter is NAME=DIRECTORY, the name that requests use and where it is")
        if name == base or name in found:
            raise ValueError(f"{entry!r}: {found.get(name, 'the model')} has the name {name!r} too; each needs its own")
        found[name] = directory
    return found


def load_stacked(adapters: Mapping[str, str], config: TransformerConfig) -> PyTree:
    """Read adapters of `peft` for a model, and stack them in this order behind the base: `tessera.lm.lora.stack`.

    Args:
      adapters: directory of each by its name, a path or a URL.
      config: the model.

    Raises:
      NotConvertible: an adapter of kernels that rows cannot choose adapters of; and what `load_adapters` raises.
    """
    read = []
    for name, directory in adapters.items():
        one = load_adapters(local(directory), replace(config, scan=True))
        if wrong := [path for path, _ in lora.pairs(one[0]) if not re.search(ADAPTED, path)]:
            raise NotConvertible(
                f"{directory}/{WEIGHTS}: the adapter {name!r} changes {wrong[0]}; beside others only projections of "
                "attention and of dense feed-forward layers can be adapted; merge it into the base (model.adapter)"
            )
        read.append(one)
    return lora.stack(read)


def adapter_specs(adapters: PyTree, specs: PyTree) -> PyTree:
    """Partition of stacked adapters: a like the inputs of its kernel, b like the outputs; neither is split over fsdp.

    Args:
      adapters: from `tessera.lm.lora.stack`.
      specs: partition of the model's parameters.
    """
    kernels = {path_name(path): spec for path, spec in jax.tree.leaves_with_path(specs, is_leaf=is_spec)}

    def one(path: str, pair: Mapping[str, Any]) -> dict[str, PartitionSpec]:
        inputs, outputs = pair["a"].ndim - 3, pair["b"].ndim - 3
        spec = [None if entry == "fsdp" else entry for entry in kernels[path]]
        layers, *axes = spec + [None] * (1 + inputs + outputs - len(spec))
        return {
            "a": PartitionSpec(layers, None, *axes[:inputs], None),
            "b": PartitionSpec(layers, None, None, *axes[inputs:]),
        }

    return lora.nested({path: one(path, pair) for path, pair in lora.pairs(adapters)})
