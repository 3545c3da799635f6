"""Starting a run from the weights of another: the same model, its upcycled twin, its experts merged, or fewer of them.

`convert` turns the parameters of a decoder into those of another one that differs in its feed-forward layers alone:
a dense layer becomes experts (sparse upcycling), experts become a dense layer (merging), block by block. Where a run
has more experts than are wanted, those it used least are cut out first (`tessera.lm.expert_pruning`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Key, PyTree
from ml_collections import ConfigDict

from lottery.controls import shuffle_masks
from lottery.masks import apply, prunable, support
from moe.gate import parameter_shapes
from moe.layer import MoEConfig
from moe.upcycle import Method, merge, upcycle
from tessera.infra.checkpoint import CheckpointReader
from tessera.infra.config import build
from tessera.infra.logger import METRICS, load_history, read_rows
from tessera.infra.remote import local
from tessera.infra.workdir import read_settings
from tessera.lm import lora
from tessera.lm.expert_pruning import drop_experts, prune_experts
from tessera.models.transformer import Decoder, Stack, TransformerConfig


@dataclass(frozen=True)
class StartConfig:
    """Which weights a run starts from; the optimizer starts afresh.

    Attributes:
      workdir: a run of `scripts/train.py`; "" starts from random weights. Of a run with more experts than this one the
        busiest of every layer stay.
      step: of `workdir`: which checkpoint is read; 0 is the newest.
      dir: a Hugging Face directory to go on from in place of a run: the model is the directory's, whatever else
        `config.model` says, and the tokenizer too where `config.data.tokenizer` is "bytes".
      keep_zeros: kernels' weights that are zero at the start, as in a pruned model, stay zero.
      mask: a Hugging Face directory of the same model, pruned: weights of `dir` that are zero there start at zero and
        stay so (a ticket: its mask on other weights, such as those of an earlier checkpoint).
      shuffle_mask: the zeros of `mask` at random places of the same layer, drawn by `config.seed`: a random mask of
        equal densities.
      random_weights: random initial weights in the architecture of `dir` in place of its own.
      router_scale: upcycling: standard deviation of the new routers' kernels.
      noise: upcycling: noise on the experts over the spread of their kernel, so that they differ; 0 keeps the outputs.
      method: merging: "mean", "task", "slerp", "ties" or "dare", see `moe.upcycle.merge`.
      density, scale: merging by "ties" and "dare" (scale also by "task").
      base: merging by "task", "ties" and "dare": the dense run that was upcycled.
    """

    workdir: str = ""
    step: int = 0
    dir: str = ""
    keep_zeros: bool = False
    mask: str = ""
    shuffle_mask: bool = False
    random_weights: bool = False
    router_scale: float = 0.02
    noise: float = 0.0
    method: Method = "mean"
    density: float = 0.2
    scale: float = 1.0
    base: str = ""


class Pretrained(NamedTuple):
    """A model to go on from and a teacher, each as parameters (numpy, None for none) and model; a tokenizer's file."""

    params: PyTree
    model: TransformerConfig | None
    tokenizer: str = ""
    teacher: PyTree = None
    teacher_model: TransformerConfig | None = None


def with_pretrained(c: ConfigDict, pretrained: Pretrained) -> ConfigDict:
    """Settings of a run with the architecture, and the tokenizer, of a model to go on from.

    How it runs (dtype, remat) stays as `c` says; unchanged where there is no such model.
    """
    if pretrained.model is None:
        return c
    c = ConfigDict(c.to_dict())
    own = {name: c.model[name] for name in ("dtype", "remat")}
    c.model = ConfigDict(
        {name: value for name, value in asdict(pretrained.model).items() if name != "vocab_size"} | own
    )
    if pretrained.tokenizer and c.data.tokenizer == "bytes":
        c.data.tokenizer = pretrained.tokenizer
    return c


def masked_params(
    params: PyTree, config: TransformerConfig, start: StartConfig, pruned: PyTree = None, *, key: Key[Array, ""]
) -> PyTree:
    """Weights of a directory, or random ones in their place, with the zeros of a pruned model.

    Args:
      params: of the directory.
      config: its model.
      start: `random_weights` and `shuffle_mask` say what stays of them.
      pruned: parameters of the same model, whose zeros are the mask; None for none.
      key: for random weights and places.

    Raises:
      ValueError: `pruned` is another model; its shapes are named.
    """
    init_key, mask_key = jax.random.split(key)
    if start.random_weights:
        params = jax.jit(Decoder(config).init)(init_key, jnp.zeros((1, 1), jnp.int32))["params"]
    if pruned is not None:
        _check(pruned, config)
        mask = support(jax.tree.map(jnp.asarray, pruned))
        mask = shuffle_masks(mask, prunable(pruned), key=mask_key) if start.shuffle_mask else mask
        params = apply(params, mask)
    return jax.tree.map(np.asarray, params)


def starting_params(start: StartConfig, config: TransformerConfig, *, key: Key[Array, ""]) -> PyTree:
    """Parameters for a model from the run that `start` names.

    Args:
      start: where from, and how.
      config: the model to be trained.
      key: for new routers, noise and DARE.

    Raises:
      ValueError: models that differ in more than their feed-forward layers, or see `convert`.
      FileNotFoundError: no run, or no checkpoint, is there.
      CheckpointDamaged: the newest checkpoint cannot be read.
    """
    params, source = read_model(start.workdir, start.step)
    if "routed" in source.pattern and "routed" in config.pattern:
        keep = config.moe.router.experts
        if keep < source.moe.router.experts:
            masks = prune_experts(params, recorded_load(start.workdir), keep, source)
            params, source = drop_experts(params, masks, source)
    base = None
    if start.base:
        dense, dense_config = read_model(start.base)
        if "routed" in dense_config.pattern:
            raise ValueError(f"base={start.base}: a run with routed layers; the dense run that was upcycled is needed")
        base = dense, dense_config
    return convert(params, source, config, start, base=base, key=key)


def read_model(workdir: Path | str, step: int = 0) -> tuple[PyTree, TransformerConfig]:
    """Parameters (numpy) and model of a run of `scripts/train.py`, of one step or the newest (0); it may be training.

    Raises:
      FileNotFoundError: no run, or no checkpoint, is there.
      CheckpointDamaged: the checkpoint cannot be read.
      ValueError: a run of another kind, or settings of no model.
    """
    path = local(workdir)
    settings = read_settings(path)
    if settings.get("lora", {}).get("rank"):
        raise ValueError(
            f"{path} is a run of adapters, not of a whole model: write it by `tessera export-hf {path} DIR`, name DIR"
        )
    state = CheckpointReader(path / "checkpoints").restore_at(step).state
    try:
        params = jax.tree.map(np.asarray, state["params"])
        vocabulary, model = params["embed"]["table"].shape[0], settings["model"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no run of a language model: it has no {error}") from error
    return params, build(TransformerConfig, model, f"{path}/config.json: model", vocab_size=vocabulary)


def read_adapted(workdir: Path | str, base: PyTree = None, step: int = 0) -> tuple[PyTree, TransformerConfig]:
    """Parameters (numpy) and model of a run, adapters merged into the model that it started from.

    Args:
      workdir: a run of `scripts/train.py`.
      base: parameters of the directory that it started from (`settings["start"]["dir"]`), where it did.
      step: of the checkpoint; 0 is the newest.

    Raises:
      As `read_model`, and for adapters what `starting_params` raises.
    """
    path = local(workdir)
    settings = read_settings(path)
    if not settings.get("lora", {}).get("rank"):
        return read_model(path, step)
    where, start = f"{path}/config.json", build(StartConfig, settings["start"], f"{path}/config.json: start")
    if base is None:
        _, source = read_adapted(start.workdir, step=start.step)
        model = build(TransformerConfig, settings["model"], f"{where}: model", vocab_size=source.vocab_size)
        base = starting_params(start, model, key=jax.random.split(jax.random.key(settings["seed"]))[0])
    else:
        size = base["embed"]["table"].shape[0]
        model = build(TransformerConfig, settings["model"], f"{where}: model", vocab_size=size)
    config = build(lora.LoRAConfig, settings["lora"], f"{where}: lora")
    state = CheckpointReader(path / "checkpoints").restore_at(step).state
    adapters = jax.tree.map(jnp.asarray, state["params"])
    params = lora.apply(base, adapters, config, support(base) if start.keep_zeros else None)
    return jax.tree.map(np.asarray, params), model


def recorded_load(workdir: Path | str) -> np.ndarray:
    """Mean share [L, E] of the choices that every expert of a run got, over the last tenth of its logged steps.

    Raises:
      ValueError: the run logged no loads.
    """
    steps, load_SLE = load_history(read_rows(local(workdir) / METRICS))
    if not len(steps):
        raise ValueError(f"{workdir}/{METRICS} has no row with router/load to prune experts by")
    return load_SLE[-max(1, len(steps) // 10) :].mean(0)


def split_blocks(params: Mapping[str, Any], config: TransformerConfig) -> list[PyTree]:
    """The parameters of every block by itself, in order of depth, scanned or not."""
    if not config.scan:
        return [params[stack.name] for stack in config.stacks]

    def one(stack: Stack, i: int) -> PyTree:
        period = len(stack.pattern)
        unit = jax.tree.map(lambda leaf: leaf[i // period], params[stack.name])
        return unit if period == 1 else unit[f"layer_{i % period}"]

    return [one(stack, i) for stack in config.stacks for i in range(stack.layers)]


def join_blocks(params: Mapping[str, Any], blocks: list[PyTree], config: TransformerConfig) -> dict[str, PyTree]:
    """`split_blocks` undone: the tree of `config` with these blocks, and what else `params` has (embedding, norms)."""
    rest = {name: leaf for name, leaf in params.items() if not name.startswith(("blocks", "dense_blocks"))}
    if not config.scan:
        return rest | {stack.name: block for stack, block in zip(config.stacks, blocks, strict=True)}

    def joined(stack: Stack) -> PyTree:
        mine, period = blocks[stack.start : stack.start + stack.layers], len(stack.pattern)
        each = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *mine[i::period]) for i in range(period)]
        return each[0] if period == 1 else {f"layer_{i}": one for i, one in enumerate(each)}

    return rest | {stack.name: joined(stack) for stack in config.stacks}


def convert(
    params: Mapping[str, Any],
    source: TransformerConfig,
    target: TransformerConfig,
    start: StartConfig = StartConfig(),
    *,
    base: tuple[Mapping[str, Any], TransformerConfig] | None = None,
    key: Key[Array, ""],
) -> PyTree:
    """Parameters of `source` as those of `target`, which may have experts where `source` is dense or the reverse.

    Args:
      params: of a decoder of `source`.
      source, target: models that differ in `mlp`, `moe`, `scan` and what changes no weights.
      start: how layers are upcycled and merged.
      base: parameters and model of the dense decoder that was upcycled, for differences from it.
      key: for new routers, noise and DARE.

    Raises:
      ValueError: shapes that do not fit (named), shared experts, other activations, or a number of experts that would
        have to change.
    """
    blocks = split_blocks(params, source)
    dense: list[PyTree] = split_blocks(*base) if base else [None] * len(blocks)
    kinds = [c.mlps for c in (source, target)]
    if len(kinds[0]) != len(kinds[1]):
        raise ValueError(f"{source.layers} layers there, {target.layers} here: only feed-forward layers can change")
    made = []
    for i, (block, before, now) in enumerate(zip(blocks, *kinds, strict=True)):
        one = jax.random.fold_in(key, i)
        mlp = block["mlp"]
        if (before, now) == ("swiglu", "routed"):
            mlp = _upcycled(mlp, target, start, key=one)
        elif (before, now) == ("routed", "swiglu"):
            if not source.moe.plain:
                raise ValueError(
                    "only plain SwiGLU experts (no shared experts, biases, ...) can be merged into a dense layer"
                )
            start_from = dense[i]["mlp"] if dense[i] is not None else None
            mlp = merge(mlp, start_from, method=start.method, density=start.density, scale=start.scale, key=one)
        made.append({**block, "mlp": mlp})
    result = join_blocks(params, made, target)
    _check(result, target)
    return result


def _upcycled(
    dense: Mapping[str, Any], target: TransformerConfig, start: StartConfig, *, key: Key[Array, ""]
) -> PyTree:
    moe = target.moe
    if not moe.plain:
        raise ValueError("a dense SwiGLU layer can only become plain SwiGLU experts (no shared experts, biases, ...)")
    if not keeps_outputs(moe):
        logging.log_first_n(
            logging.WARNING, "%s's weights do not sum to one: outputs change at first", 1, moe.router.name
        )
    mlp = upcycle(dense, moe.router.experts, noise=start.noise, key=key)
    router = {}
    for i, (name, shape) in enumerate(parameter_shapes(moe.router, target.width).items()):
        fresh = start.router_scale * jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32)
        router[name] = fresh if name in ("kernel", "inner") else jnp.zeros(shape, jnp.float32)
    return {"experts": mlp["experts"]} | ({"router": router} if router else {})


def keeps_outputs(moe: MoEConfig) -> bool:
    """Whether weights sum to one, so that equal experts compute what one of them does."""
    router = moe.router
    if router.name in ("top_k", "sigmoid"):
        return router.scale == 1 and (router.name == "sigmoid" or router.softmax == "after")
    return router.name in ("gshard", "noisy", "hierarchical", "hash", "uniform")


def _check(params: PyTree, config: TransformerConfig) -> None:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    wanted = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]
    there, here = (_shapes(tree) for tree in (params, wanted))
    wrong = [path for path in there | here if there.get(path) != here.get(path)]
    if wrong:
        shown = "; ".join(f"{path}: {there.get(path)} there, {here.get(path)} needed" for path in wrong[:3])
        raise ValueError(f"the other model's weights do not fit ({len(wrong)} differ): {shown}")


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
