"""Merge trained models of one shape into one: `tessera merge runs/a runs/b --output=models/soup`."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, get_args

import jax
import numpy as np
from jaxtyping import PyTree

from lottery import align
from lottery.masks import flatten
from moe.merging import Method, merge
from tessera.cli.main import PLAIN
from tessera.infra.checkpoint import CheckpointDamaged
from tessera.infra.errors import DiskFull, WorkdirInUse
from tessera.models.transformer import TransformerConfig
from tessera.serving import huggingface
from tessera.serving.load import Loaded, SourceConfig, export_directory, load

ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError, ValueError, ImportError)


def main(argv: Sequence[str] = ()) -> int:
    """Read the models, write the merged one; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tessera merge", description=PLAIN["merge"][1])
    add = parser.add_argument
    add("models", nargs="+", help="runs of the training script, Hugging Face directories, or GGUF files (.gguf)")
    add("--output", required=True, help="new Hugging Face directory to write")
    add("--method", default="mean", choices=get_args(Method), help="see moe.merging.merge")
    add("--base", default="", help="the model that all were trained from; for task, ties and dare")
    add("--weights", type=float, nargs="+", help="one per model; equal by default (1 each for task)")
    add("--density", type=float, default=0.2, help="share of entries that ties and dare leave")
    add("--scale", type=float, default=1.0, help="factor on the merged difference")
    add("--seed", type=int, default=0, help="of dare's choice, and of the alignment's starts")
    add("--align", action="store_true", help="permute units to match the first model's, for runs of other seeds")
    add("--tokenizer", default="", help="tokenizer.json; the default is the first model's own")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights")
    options = parser.parse_args(list(argv))
    try:
        loaded = [load(SourceConfig(path, tokenizer=options.tokenizer)) for path in options.models]
        base = load(SourceConfig(options.base, tokenizer=options.tokenizer)) if options.base else None
        merged = merge_models(
            loaded,
            base,
            names=options.models + [options.base] * bool(base),
            aligned=options.align,
            method=options.method,
            weights=options.weights,
            density=options.density,
            scale=options.scale,
            seed=options.seed,
        )
        made = export_directory(merged, options.output, options.dtype)
    except (*ERRORS, CheckpointDamaged, DiskFull, WorkdirInUse) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{made}: {len(loaded)} models merged by {options.method}, {options.dtype}")
    return 0


def merge_models(
    models: Sequence[Loaded],
    base: Loaded | None = None,
    *,
    names: Sequence[str],
    aligned: bool = False,
    seed: int = 0,
    **how: Any,
) -> Loaded:
    """Merge models into one with the first one's tokenizer and format.

    Args:
      models: with equal settings of the architecture.
      base: see `moe.merging.merge`.
      names: of the models, and of the base if there is one, for messages.
      aligned: permute the units of every further model to match the first one's weights.
      seed: of DARE's choice, and of the alignment's random starts.
      how: method, weights, density, scale of `moe.merging.merge`.

    Raises:
      ValueError: models of other settings or vocabularies, an alignment of a decoder that `lottery.align` does not open
        or together with a base, or see `moe.merging.merge`.
    """
    config = models[0].config
    for name, other in zip(names[1:], [*models[1:], *([base] if base else [])], strict=True):
        check_same(config, other.config, names[0], name)
    trees = [model.params for model in models]
    if aligned and base is not None:
        raise ValueError("align: models that started from one base correspond already; leave out either of the two")
    if aligned:
        trees = [trees[0], *(align_decoder(trees[0], tree, config, seed) for tree in trees[1:])]
    key = jax.random.key(seed)
    params = merge(trees, base.params if base else None, key=key, tensor_axes=_tensor_axes(config), **how)
    return models[0]._replace(params=jax.tree.map(np.asarray, params))


def check_same(one: TransformerConfig, other: TransformerConfig, one_name: str, other_name: str) -> None:
    """Check that two models have the same architecture; what only changes how they run may differ.

    Raises:
      ValueError: the first setting of config.json in which they differ.
    """
    if one == other:
        return
    here, there = huggingface.write_config(one), huggingface.write_config(other)  # with no default left open
    for name in here | there:
        if here.get(name) != there.get(name):
            differ = f"{name} is {here.get(name)!r} in {one_name} and {there.get(name)!r} in {other_name}"
            raise ValueError(f"{differ}: models of one architecture can be merged")


def align_decoder(one: PyTree, other: PyTree, config: TransformerConfig, seed: int = 0) -> PyTree:
    """Permute a decoder's residual channels, neurons and key/value heads to match another's weights.

    Raises:
      ValueError: a decoder that is not of scanned dense blocks; see `lottery.align.open_decoder`.
    """
    if not config.scan or set(config.mlps) != {"swiglu"}:
        raise ValueError(f"align: scan={config.scan}, mlp={config.mlp!r}; a decoder of scanned dense blocks is needed")
    spec = align.decoder_spec(config.layers, config.tied)
    opened = [align.open_decoder(tree) for tree in (one, other)]
    own = "/attention/(query|key)_norm/"  # gains of all heads alike
    if left := [path for path in flatten(opened[0]) if path not in spec and not re.search(own, path)]:
        raise ValueError(f"align: {left[0]} has no permutation in lottery.align.decoder_spec")
    permutations = align.match_weights(opened[0], opened[1], spec, seed=seed, restarts=1)
    return align.close_decoder(align.permute(opened[1], permutations, spec))


def _tensor_axes(config: TransformerConfig) -> Any:
    """Trailing axes of a leaf that are one tensor: without the layers of a scanned stack, and without experts."""
    stacks = {stack.name for stack in config.stacks} if config.scan else set()

    def axes(path: str, leaf: Any) -> int:
        return leaf.ndim - (path.split("/")[0] in stacks) - ("experts" in path.split("/"))

    return axes
