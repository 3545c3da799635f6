"""Prune a trained decoder on calibration text, one block after the other, and cut out what was removed whole.

Every block sees what the pruned blocks before it compute, as in Wanda's and SparseGPT's own code. Embedding, head,
norms and routers stay dense. Axes: see `tessera.compress.statistics`.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree

from lottery import calibrated, coupled, criteria, masks, prune, structures
from lottery.allocation import spread_densities
from lottery.compact import compact_decoder
from moe import ream
from sharding.inference.quantize import Calibration
from tessera.compress.statistics import Saliency, check_gathers, gather, gather_activity, kernels, run, statistics_of
from tessera.infra.artifacts import ArtifactStore, load_extra, load_tree
from tessera.infra.checkpoint import CheckpointDamaged, CheckpointMismatch
from tessera.lm.expert_pruning import drop_experts, expert_groups, prune_experts, take_columns, with_experts
from tessera.lm.warm_start import join_blocks, split_blocks
from tessera.models.lm_loss import at, lm_loss, replaced
from tessera.models.transformer import Decoder, LayerForm, TransformerConfig

WEIGHTS = ("magnitude", "fisher", "wanda", "sparsegpt")
METHODS = {
    "expert": ("reap", "load", "ream"),
    "layer": ("influence",),
}  # of the structures that have methods of their own
UNITS = {"neuron": ("mlp", "down"), "head": ("attention", "output")}  # structure -> part of a block, outgoing kernel


@dataclass(frozen=True)
class PruneConfig:
    """How a decoder is pruned.

    Attributes:
      method: "magnitude"; "fisher", the diagonal Fisher information, which needs the gradient of the whole model;
        "wanda"; "sparsegpt", which updates the weights that stay. Of experts "reap" or "load", or "ream", which
        merges those that go into those that stay (`moe.ream`); of layers "influence" (1 - cosine of what a block reads
        and writes: ShortGPT, Men et al. 2024).
      structure: "unstructured", n:m ("2:4") or blocks ("16x16") of every kernel, whose weights become zeros; or cut
        out, for a smaller model: "neuron" (of feed-forward layers), "head" (a key/value head with its query heads),
        "expert", "layer" (whole blocks).
      density: share of the weights, or units, that stays.
      allocation: "uniform", "owl" (densities of blocks by their share of outlying Wanda scores) or "sensitivity" (by
        the change of a block's output when it alone is pruned).
      width: of the two last: half the distance between the densest and the sparsest block.
      outlier: of "owl": scores above so many times their mean are outliers.
      block: of "sparsegpt": inputs of a kernel whose mask is chosen together.
      damping: of "sparsegpt": times the mean of the Hessian's diagonal, is added to it.
      group: of "ream": experts that are merged into one, at most.
      bits: of "sparsegpt": 2 to 8 also round the weights that stay, one scale per output; 0 does not.
      dense: regular expressions over names such as blocks_0/attention/query/kernel: kernels that stay as they are.
    """

    method: Literal["magnitude", "fisher", "wanda", "sparsegpt", "reap", "load", "ream", "influence"] = "sparsegpt"
    structure: str = "unstructured"
    density: float = 0.5
    allocation: Literal["uniform", "owl", "sensitivity"] = "uniform"
    width: float = 0.08
    outlier: float = 5.0
    block: int = 128
    damping: float = 0.01
    group: int = 16
    bits: int = 0
    dense: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.structure not in (*UNITS, *METHODS):
            pattern = "unstructured" if self.structure in structures.STRUCTURES else self.structure
            try:
                structures.parse(pattern)
                known = pattern == self.structure
            except ValueError as error:
                raise ValueError(f"structure={self.structure!r}: {error}") from error
            if not known:
                raise ValueError(
                    f"structure={self.structure!r}: unstructured, n:m (2:4), 16x16, neuron, head, expert or layer"
                )
        fitting = METHODS.get(self.structure, WEIGHTS)
        if self.method not in fitting:
            raise ValueError(f"method={self.method!r} with structure={self.structure!r}: one of {', '.join(fitting)}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density}: a share above 0, at most 1")
        found = structures.ratio(self.structure)
        if found and self.density != found[0] / found[1]:
            raise ValueError(
                f"density={self.density} with structure={self.structure!r}: every group of {found[1]} keeps "
                f"{found[0]}, so density={found[0] / found[1]:g} is the only one"
            )
        if self.dense and self.structure in (*UNITS, *METHODS):
            raise ValueError(f"dense={self.dense}: with structure={self.structure!r} all blocks are cut alike")
        if self.allocation != "uniform" and (found or self.structure in METHODS):
            raise ValueError(f"allocation={self.allocation!r}: blocks pruned to {self.structure} have one density")
        if self.bits and (self.method != "sparsegpt" or self.structure in UNITS or not 2 <= self.bits <= 8):
            raise ValueError(f"bits={self.bits}: 2 to 8, for method='sparsegpt' with weights or blocks, or 0")
        if self.group < 1:
            raise ValueError(f"group={self.group}: experts that are merged into one at most, 1 or more")
        if self.block < 1 or self.damping <= 0 or self.width < 0 or self.outlier <= 0:
            raise ValueError(
                f"block={self.block} must be at least 1, damping={self.damping} and outlier={self.outlier} "
                f"above 0, width={self.width} at least 0"
            )


class PrunedDecoder(NamedTuple):
    """A pruned decoder.

    Attributes:
      params, config: the parameters and their model, smaller where units were cut out.
      rows: a mapping per layer: its name, block, weights, density and error, the squared error of its outputs over
        their squares on the calibration text; of whole experts and blocks what the method measured.
    """

    params: PyTree
    config: TransformerConfig
    rows: list[dict[str, Any]]


def check_fits(how: PruneConfig, params: Mapping[str, Any], config: TransformerConfig) -> None:
    """Raise ValueError if a decoder cannot be pruned so; nothing is computed."""
    plain = len(config.stacks) == 1 and config.scan and len(config.pattern) == 1
    if how.structure == "expert":
        keep, router = round(how.density * config.moe.router.experts), config.moe.router
        if config.mlp != "routed":
            raise ValueError("structure='expert': the model has no routed experts")
        if keep < router.k:
            raise ValueError(
                f"density={how.density} leaves {keep} of {router.experts} experts; every token chooses {router.k}"
            )
        if how.method == "ream" and keep * how.group < router.experts:
            raise ValueError(
                f"group={how.group} with density={how.density}: {keep} groups of so many hold fewer than the "
                f"{router.experts} experts; at least {-(-router.experts // keep)} is needed"
            )
        expert_groups(config), with_experts(config, keep)  # raise for routers that cannot be cut so
    if how.structure == "layer" and (not plain or len(set(config.attention_kinds)) > 1):
        raise ValueError("structure='layer': a scanned decoder whose layers are all of one kind is needed")
    if how.structure in UNITS and (not plain or config.mlp == "routed" or config.sinks or config.qkv_bias):
        raise ValueError(f"structure={how.structure!r}: a scanned dense decoder without biases and sinks is needed")
    check_gathers(config)
    shapes = {
        f"blocks_{i}/{name}": (int(np.prod(leaf.shape[:inputs])), leaf.size)
        for i, block in enumerate(split_blocks(params, config))
        for name, names, inputs, index in _layers(block)
        for leaf in (at(block, names)[index] if index else at(block, names),)
    }
    for pattern in how.dense:
        masks.match_paths(pattern, list(shapes), "dense")
    found = structures.ratio(how.structure)
    if found and how.method == "sparsegpt" and how.block % found[1]:
        raise ValueError(f"block={how.block} with structure={how.structure!r}: a multiple of {found[1]} is needed")
    for name, (inputs, size) in shapes.items():
        if how.structure in (*UNITS, *METHODS) or any(re.search(pattern, name) for pattern in how.dense):
            continue
        try:
            kernel = jax.ShapeDtypeStruct((inputs, size // inputs), jnp.float32)
            prune.units({"kernel": kernel}, {"kernel": True}, how.structure)
        except ValueError as error:
            raise ValueError(f"{name}: {str(error).removeprefix('kernel: ')}") from error


def prune_decoder(
    params: Mapping[str, Any],
    config: TransformerConfig,
    how: PruneConfig,
    tokens_NT: Int[np.ndarray, "N T"],
    *,
    store: ArtifactStore | None = None,
    done: Callable[[int], None] = lambda blocks: None,
) -> PrunedDecoder:
    """Prune a decoder.

    Args:
      params: of a decoder of `config`.
      config: the model.
      how: method, structure and density.
      tokens_NT: calibration text.
      store: where pruned blocks are kept, so that a run that was killed goes on.
      done: called with 1 after every block.

    Raises:
      ValueError: a decoder, structure or density that do not go together; statistics that are not finite; a Hessian
        that is not positive definite.
    """
    check_fits(how, params, config)
    plain, blocks = replace(config, dtype="float32", remat="none"), split_blocks(params, config)
    x_NTD = np.asarray(plain.embedded(jnp.asarray(params["embed"]["table"])[jnp.asarray(tokens_NT)]))
    if how.structure in METHODS and how.method != "ream":
        return _cut_whole(params, blocks, plain, config, how, x_NTD, tokens_NT, done)
    fisher = _fisher(params, plain, tokens_NT) if how.method == "fisher" else [None] * len(blocks)
    densities = _allocate(blocks, plain, how, fisher, x_NTD, tokens_NT)
    if how.method == "ream":
        config = with_experts(config, round(how.density * config.moe.router.experts))
    after = replace(config, dtype="float32", remat="none")
    digest = hashlib.sha256(np.ascontiguousarray(tokens_NT).tobytes()).hexdigest()
    made: list[PyTree] = []
    rows: list[dict[str, Any]] = []
    for i, block in enumerate(blocks):
        mlp, form = plain.mlps[i], plain.form(i)
        merged = how.method == "ream" and mlp == "routed"
        saved = _saved(store, i, _first_experts(block, after.moe.router.experts) if merged else block, digest)
        if saved is None:
            try:
                if merged:
                    saved = _merge_experts(block, x_NTD, tokens_NT, how, plain, form, i)
                elif how.method == "ream":
                    saved = block, []
                else:
                    seen = gather(block, x_NTD, tokens_NT, plain, mlp, form)
                    saved = prune_block(block, seen, how, plain, densities[i], i, fisher[i])
            except ValueError as error:
                raise ValueError(f"blocks_{i}: {error}") from error
            if store is not None:
                store.save(i, saved[0], {"rows": saved[1], "tokens": digest})
        made.append(saved[0])
        rows += saved[1]
        if i + 1 < len(blocks):
            x_NTD = run(saved[0], x_NTD, tokens_NT, after, mlp, form)
        done(1)
    result = join_blocks(params, made, config)
    if how.structure in UNITS:
        sizes: Any
        result, sizes = compact_decoder(result)
        config = replace(config, **sizes)
    return PrunedDecoder(result, config, rows)


def _saved(store: ArtifactStore | None, i: int, block: PyTree, digest: str) -> tuple[PyTree, list] | None:
    """Block `i` as an earlier start of the same run pruned it, on the same text."""
    if store is None or not store.path(i).exists():
        return None
    try:
        extra = load_extra(store.path(i))
        return (load_tree(store.path(i), block), extra["rows"]) if extra["tokens"] == digest else None
    except (CheckpointDamaged, CheckpointMismatch):
        return None


def _fisher(params: PyTree, config: TransformerConfig, tokens_NT: Any) -> list[PyTree]:
    """Scores of every block's weights by the diagonal Fisher information, one sequence a batch."""
    loss = lm_loss(Decoder(config))

    def nats(params: PyTree, batch: Any) -> jax.Array:
        value, metrics = loss(params, batch)  # metrics have no gradient, but for the losses of routers
        return value - metrics.get("aux_loss", 0.0)

    scores = jax.jit(partial(criteria.fisher, nats))(params, {"tokens": jnp.asarray(tokens_NT)[:, None]})
    return split_blocks(jax.tree.map(np.asarray, scores), config)


def _allocate(
    blocks: Sequence[PyTree],
    config: TransformerConfig,
    how: PruneConfig,
    fisher: Sequence[Any],
    x_NTD: Any,
    tokens: Any,
) -> tuple[float, ...]:
    """The density of every block; the dense model's activations say which blocks get more."""
    if how.allocation == "uniform":
        return (how.density,) * len(blocks)
    values = []
    for i, block in enumerate(blocks):
        mlp, form = config.mlps[i], config.form(i)
        seen = gather(block, x_NTD, tokens, config, mlp, form)
        y_NTD = run(block, x_NTD, tokens, config, mlp, form)
        if how.allocation == "owl":
            scores = [np.asarray(calibrated.wanda(w, _norm(one))).ravel() for _, w, one in _matrices(block, seen)]
            values.append(float(calibrated.outlier_ratio(jnp.asarray(np.concatenate(scores)), how.outlier)))
        else:
            pruned, _ = prune_block(block, seen, how, config, how.density, i, fisher[i])
            found = run(pruned, x_NTD, tokens, config, mlp, form)
            values.append(float(np.square(found - y_NTD).sum() / np.square(y_NTD - x_NTD).sum()))
        x_NTD = y_NTD
    sizes = [float(sum(leaf.size for _, leaf, _ in kernels(block))) for block in blocks]
    return spread_densities(values, how.density, how.width, sizes)


def _layers(block: PyTree) -> Iterator[tuple[str, tuple[str, ...], int, tuple[int, ...]]]:
    """The layers of a block: name, path of the leaf, its input axes, index in the leaf (experts are layers)."""
    for names, leaf, inputs in kernels(block):
        name = "/".join(names)
        if "experts" not in names:
            yield name, names, inputs, ()
        else:
            yield from ((name.replace("experts/", f"experts_{e}/"), names, inputs, (e,)) for e in range(leaf.shape[0]))


def _matrices(block: PyTree, seen: Mapping[str, Any]) -> Iterator[tuple[str, jax.Array, Calibration]]:
    """(name, kernel [N, M], statistics) of every layer of a block."""
    for name, names, inputs, index in _layers(block):
        found = statistics_of(seen, names)
        yield name, _matrix(at(block, names), inputs, index), _or_identity(found[index[0]] if index else found)


def _matrix(leaf: Any, inputs: int, index: tuple[int, ...]) -> jax.Array:
    one = leaf[index] if index else leaf
    return jnp.asarray(one).reshape(int(np.prod(one.shape[:inputs])), -1)


def _or_identity(one: Calibration) -> Calibration:
    """Statistics of an expert that no token chose: those that leave magnitude alone to decide."""
    return one if one.rows else one._replace(hessian=np.eye(len(one.magnitude)))


def _norm(one: Calibration) -> jax.Array:
    return jnp.asarray(np.sqrt(np.diag(one.hessian)), jnp.float32)


_sparsegpt = jax.jit(calibrated.sparsegpt, static_argnames=("pattern", "block", "damping", "bits"))
_output_error = jax.jit(calibrated.output_error)
# Counts of units are static in patterns; densities of weights are not, so that one program serves all blocks.
_keep_weights = jax.jit(calibrated.keep_best, static_argnames=("pattern", "by_output"))
_keep_pattern = jax.jit(calibrated.keep_best, static_argnames=("density", "pattern", "by_output"))


def prune_block(
    block: PyTree,
    seen: Mapping[str, Any],
    how: PruneConfig,
    config: TransformerConfig,
    density: float,
    number: int = 0,
    fisher: PyTree | None = None,
) -> tuple[PyTree, list[dict[str, Any]]]:
    """Prune one block.

    Args:
      block: its parameters.
      seen: what its kernels read, `tessera.compress.statistics.gather`.
      how: method and structure.
      config: the model.
      density: of this block.
      number: of this block.
      fisher: scores for method="fisher", like the block.

    Returns:
      The block with zeros, and its rows of `PrunedDecoder`.

    Raises:
      ValueError: a structure that does not fit a kernel; a Hessian that is not positive definite.
    """
    if how.structure in UNITS:
        return _prune_units(block, seen, how, config, density, number, fisher)
    scores = {} if fisher is None else {one[0]: _matrix(at(fisher, one[1]), *one[2:]) for one in _layers(fisher)}
    made: dict[str, np.ndarray] = {}
    rows = []
    for name, w, statistics in _matrices(block, seen):
        full, dense = f"blocks_{number}/{name}", w
        if not any(re.search(pattern, full) for pattern in how.dense):
            try:
                w = _prune_matrix(w, statistics, how, density, scores.get(name))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        rows.append(_row(full, number, dense, w, statistics))
        made[name] = np.asarray(w)
    result = block
    for names, leaf, _ in kernels(block):
        parts = [made[name] for name, path, _, _ in _layers(block) if path == names]
        result = replaced(result, names, np.stack(parts).reshape(leaf.shape))
    return result, rows


def _row(name: str, number: int, dense: Any, made: Any, one: Calibration) -> dict[str, Any]:
    error = float(_output_error(jnp.asarray(dense), jnp.asarray(made), jnp.asarray(one.hessian, jnp.float32)))
    density = float(np.mean(np.asarray(made) != 0))
    return {"layer": name, "block": number, "weights": int(made.size), "density": density, "error": error}


def _prune_matrix(w: jax.Array, one: Calibration, how: PruneConfig, density: float, scores: Any) -> jax.Array:
    hessian = jnp.asarray(one.hessian, jnp.float32)
    own = how.structure == "unstructured" or structures.ratio(how.structure)
    sparse = partial(_sparsegpt, w, hessian, block=how.block, damping=how.damping, bits=how.bits)
    if how.method == "sparsegpt" and own:
        made = sparse(density=density, pattern=how.structure).weight
    else:
        scores = {
            "magnitude": lambda: jnp.abs(w),
            "fisher": lambda: scores,
            "wanda": lambda: calibrated.wanda(w, _norm(one)),
            "sparsegpt": lambda: calibrated.obs(w, hessian, how.damping),
        }[how.method]()
        if how.structure == "unstructured":
            mask = _keep_weights(scores, density, by_output=how.method == "wanda")
        else:
            mask = _keep_pattern(scores, density=density, pattern=how.structure)
        made = sparse(mask_NM=mask).weight if how.method == "sparsegpt" else jnp.where(mask, w, 0)
    _check_finite(made, how)
    return made


def _check_finite(made: Any, how: PruneConfig) -> None:
    if not np.isfinite(made).all():
        raise ValueError(
            f"the Hessian of its inputs is not positive definite with damping={how.damping}; more damping or more "
            "calibration text is needed"
        )


def _prune_units(
    block: PyTree,
    seen: Mapping[str, Any],
    how: PruneConfig,
    config: TransformerConfig,
    density: float,
    number: int,
    fisher: PyTree | None,
) -> tuple[PyTree, list[dict[str, Any]]]:
    """Zero the weakest neurons or heads of a block in all their kernels.

    Magnitude and Fisher score a unit by the mean over its weights in all kernels; Wanda and SparseGPT by its rows of
    the outgoing kernel alone, whose inputs are lost, and SparseGPT updates the other rows of that kernel.
    """
    part, outgoing = UNITS[how.structure]
    groups = (
        coupled.decoder_neurons() if how.structure == "neuron" else coupled.decoder_heads(config.heads, config.kv_size)
    )
    names = next(names for names, _, _ in kernels(block) if names[:2] == (part, outgoing))
    statistics, leaf = statistics_of(seen, names), jnp.asarray(at(block, names))
    w, hessian = leaf.reshape(-1, leaf.shape[-1]), jnp.asarray(statistics.hessian, jnp.float32)
    if how.method in ("wanda", "sparsegpt"):
        rows = (
            calibrated.wanda(w, _norm(statistics)) if how.method == "wanda" else calibrated.obs(w, hessian, how.damping)
        )
        scores = replaced(jax.tree.map(np.zeros_like, block), names, rows.reshape(leaf.shape))
    else:
        scores = fisher if how.method == "fisher" else jax.tree.map(np.abs, block)
    stack = lambda tree: {"blocks": jax.tree.map(lambda one: jnp.asarray(one)[None], tree)}  # noqa: E731
    stacked = stack(block)
    units = coupled.unit_counts(stacked, groups)
    counts = {name: max(1, round(density * count)) for name, count in units.items()}
    which = masks.prunable(stacked)
    mask = coupled.keep_units(stack(scores), masks.ones(stacked), which, groups, counts)
    result = jax.tree.map(lambda one: np.asarray(one[0]), masks.apply(stacked, mask))["blocks"]
    if how.method == "sparsegpt":
        kept = at(mask["blocks"], names)[0].reshape(w.shape)
        made = _sparsegpt(w, hessian, mask_NM=kept, block=how.block, damping=how.damping).weight
        _check_finite(made, how)
        result = replaced(result, names, np.asarray(made).reshape(leaf.shape))
    made = jnp.asarray(at(result, names)).reshape(w.shape)
    return result, [_row(f"blocks_{number}/{'/'.join(names)}", number, w, made, statistics)]


def _cut_whole(
    params: Mapping[str, Any],
    blocks: list[PyTree],
    plain: TransformerConfig,
    config: TransformerConfig,
    how: PruneConfig,
    x_NTD: np.ndarray,
    tokens_NT: Any,
    done: Callable[[int], None],
) -> PrunedDecoder:
    """Cut whole experts or blocks out, by what the dense model does with the text."""
    rows: list[dict[str, Any]] = []
    found: list[Any] = []
    for i, block in enumerate(blocks):
        mlp, form = plain.mlps[i], plain.form(i)
        if how.structure == "expert" and mlp == "routed":
            found.append(gather(block, x_NTD, tokens_NT, plain, mlp, form)["saliency"])
        y_NTD = run(block, x_NTD, tokens_NT, plain, mlp, form)
        if how.structure == "layer":
            found.append(_influence(x_NTD, y_NTD))
        x_NTD = y_NTD
        done(1)
    if how.structure == "layer":
        keep = max(1, round(how.density * len(blocks)))
        stays = np.sort(np.argsort(-np.asarray(found), kind="stable")[:keep]).tolist()
        rows = [
            {"layer": f"blocks_{i}", "block": i, "influence": value, "density": float(i in stays)}
            for i, value in enumerate(found)
        ]
        config = replace(config, layers=keep)
        return PrunedDecoder(join_blocks(params, [blocks[i] for i in stays], config), config, rows)
    saliency: list[Saliency] = found
    scores_LE = np.stack([one.reap if how.method == "reap" else one.load for one in saliency])
    keep = round(how.density * config.moe.router.experts)
    params = jax.tree.map(jnp.asarray, params)
    mask = prune_experts(params, scores_LE, keep, config)
    routed = [i for i, mlp in enumerate(plain.mlps) if mlp == "routed"]
    for i, one, scores in zip(routed, saliency, scores_LE, strict=True):
        stays = np.sort(np.argsort(-scores, kind="stable")[:keep]).tolist()
        chosen = {"experts": ", ".join(map(str, stays)), "load": float(one.load[stays].sum() / one.load.sum())}
        density = keep / len(scores)
        rows.append({"layer": f"blocks_{i}/mlp/experts", "block": i, "density": density} | chosen)
    result, config = drop_experts(params, mask, config)
    return PrunedDecoder(result, config, rows)


def _first_experts(block: Mapping[str, Any], keep: int) -> PyTree:
    """A routed block with its first `keep` experts: of the shapes of one with as many."""
    mlp, index = block["mlp"], np.arange(keep)
    experts = jax.tree.map(lambda leaf: leaf[:keep], mlp["experts"])
    return {**block, "mlp": {**mlp, "experts": experts, "router": take_columns(mlp["router"], index)}}


def _merge_experts(
    block: Mapping[str, Any],
    x_NTD: np.ndarray,
    tokens_NT: Any,
    how: PruneConfig,
    config: TransformerConfig,
    form: LayerForm,
    number: int,
) -> tuple[PyTree, list[dict[str, Any]]]:
    """A routed block whose experts are merged into fewer, and its row."""
    experts, mlp = config.moe.router.experts, block["mlp"]
    seen = gather_activity(block, x_NTD, tokens_NT, config, form)
    similarity_EE = ream.expert_similarity(seen.outputs_ED, seen.gram_EE)
    first_E = ream.group_experts(seen.saliency.reap, similarity_EE, round(how.density * experts), how.group)
    made = ream.merge_experts(mlp["experts"], first_E, seen.saliency.reap, seen.rows_MD)
    stays = np.unique(first_E)
    groups = [" ".join(map(str, [one, *(set(np.flatnonzero(first_E == one)) - {one})])) for one in stays.tolist()]
    row = {"layer": f"blocks_{number}/mlp/experts", "block": number, "density": len(stays) / experts}
    load = seen.saliency.load
    row |= {"experts": ", ".join(groups), "load": float(load[stays].sum() / load.sum())}
    router = jax.tree.map(np.asarray, take_columns(mlp["router"], stays))
    return {**block, "mlp": {**mlp, "experts": made, "router": router}}, [row]


def _influence(x_NTD: np.ndarray, y_NTD: np.ndarray) -> float:
    """1 - the mean cosine of what a block reads and writes (Men et al. 2024, arXiv:2403.03853, equation 1)."""
    x, y = (np.asarray(one, np.float64) for one in (x_NTD, y_NTD))
    size = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    return float(1 - np.mean((x * y).sum(-1) / np.maximum(size, 1e-30)))
