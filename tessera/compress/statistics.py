"""What the kernels of a decoder's block read on calibration text: for pruning and for quantization, one gatherer.

Memory is one block's: text goes through a block some rows at a time, and what is left of it are sums. Axes: N rows of
text, T tokens, M tokens of all rows, D width, F feed-forward width, H heads, h head dimension, E experts, K choices.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree
from scipy.special import expit

from moe.gate import gate
from sharding.attention import AttentionForm
from sharding.inference.quantize import Calibration, observe
from tessera.models.transformer import MLPS, Block, LayerForm, TransformerConfig, attention, project_qkv
from tessera.optim.param_axes import kernel_axes

TOKENS = 4096  # tokens that go through a block at once


class Saliency(NamedTuple):
    """What the experts of a layer were chosen for, summed over tokens: choices [E], gate times output norm [E]."""

    load: np.ndarray
    norm: np.ndarray

    @property
    def reap(self) -> np.ndarray:
        """Mean of gate times output norm over the tokens that chose an expert, see `lottery.calibrated.reap`."""
        return self.norm / np.maximum(self.load, 1)


class ExpertActivity(NamedTuple):
    """What `moe.ream` takes of the experts of a layer.

    Attributes:
      saliency: see there.
      outputs_ED: sum over tokens of router probability times output, of every expert on every token.
      gram_EE: the router's logits times themselves, summed over tokens.
      rows_MD: the first tokens as the layer reads them.
    """

    saliency: Saliency
    outputs_ED: np.ndarray
    gram_EE: np.ndarray
    rows_MD: np.ndarray


def check_gathers(config: TransformerConfig) -> None:
    """Raise ValueError for a decoder whose blocks `gather` has no statistics of."""
    if config.latent.kv_rank:
        raise ValueError("latent attention: statistics of its kernels' inputs are not gathered")
    if "routed" in config.mlps and not replace(config.moe, shared=0, shared_gate=False).plain:
        raise ValueError("statistics of experts are gathered if they are SwiGLU without biases")


def kernels(block: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any, int]]:
    """The prunable and quantizable kernels of one block: (names of the path, leaf, number of its input axes).

    These are the projections of attention and the feed-forward kernels, dense or of experts [E, ...].
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(block):
        names = tuple(str(entry.key) for entry in path)
        if names[-1] == "kernel" and "router" not in names and names[0] in ("attention", "mlp"):
            axes = kernel_axes(path)
            assert axes is not None
            yield names, leaf, len(axes.inputs)


def statistics_of(seen: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """Of what `gather` returned, the `Calibration` of one kernel, a list of them for experts; None without any."""
    found = seen.get(names[1], seen)
    return found.get(names[-2]) if isinstance(found, Mapping) else found


@partial(jax.jit, static_argnums=(0, 1))
def run_block(
    config: TransformerConfig, mlp: str, block: PyTree, x_NTD: Array, tokens_NT: Array, form: LayerForm
) -> Array:
    """One block's output [N, T, D] on its input."""
    return Block(config, mlp=mlp).apply({"params": block}, x_NTD, _positions(x_NTD), tokens_NT, form)[0]


def _positions(x_NTD: Array) -> Array:
    return jnp.broadcast_to(jnp.arange(x_NTD.shape[1], dtype=jnp.int32)[None], x_NTD.shape[:2])


def run(block: PyTree, x_NTD: Any, tokens_NT: Any, config: TransformerConfig, mlp: str, form: LayerForm) -> np.ndarray:
    """`run_block` some rows at a time, to the host."""
    parts = [run_block(config, mlp, block, x, tokens, form) for x, tokens in _rows(x_NTD, tokens_NT)]
    return np.concatenate([np.asarray(part) for part in parts])


def _rows(x_NTD: Any, tokens_NT: Any) -> Iterator[tuple[Any, Any]]:
    """Equal parts of the rows with at most `TOKENS` tokens, but one row at least."""
    count, length = x_NTD.shape[:2]
    rows = next(n for n in range(max(1, min(count, TOKENS // length)), 0, -1) if count % n == 0)
    for start in range(0, count, rows):
        yield x_NTD[start : start + rows], jnp.asarray(tokens_NT[start : start + rows])


def gather(
    block: Mapping[str, Any],
    x_NTD: Any,
    tokens_NT: Any,
    config: TransformerConfig,
    mlp: str,
    form: LayerForm,
) -> dict[str, Any]:
    """Sum up what every kernel of a block reads.

    Args:
      block: parameters of one block.
      x_NTD: what the block reads, the residual stream.
      tokens_NT: the tokens, for hash routing.
      config: the decoder, float32 and without remat.
      mlp: the block's feed-forward layer, a key of `tessera.models.transformer.MLPS`.
      form: of its attention.

    Returns:
      `Calibration` by name of the kernel; of routed experts "experts": by name a list of one per expert, and
      "saliency", a `Saliency`; "shared": by name.

    Raises:
      ValueError: an input that is not finite; see `check_gathers`.
    """
    check_gathers(config)
    total: dict[str, Any] = {}
    for x, tokens in _rows(x_NTD, tokens_NT):
        read = _inputs(config, mlp, block, x, tokens, form)
        found: dict[str, Any] = {name: _observe(read[name]) for name in ("attention", "output", "mlp")}
        if mlp == "routed":
            found |= _observe_experts(block["mlp"], read["mlp"], read["experts"], read["weights"])
        else:
            found["down"] = _observe(read["down"])
        if "shared" in read:
            found["shared"] = _observe(read["shared"])
        total = jax.tree.map(np.add, total, found) if total else found
    inner, outer = total.pop("attention"), total.pop("mlp")
    seen = {"query": inner, "key": inner, "value": inner, "output": total["output"]}
    if mlp == "routed":
        seen |= {name: total[name] for name in ("experts", "saliency")}
        if "shared" in total:
            seen["shared"] = {"gate": outer, "up": outer, "down": total["shared"]}
    else:
        seen |= {"gate": outer, "up": outer, "down": total["down"]}
    for name, one in seen.items():
        for each in jax.tree.leaves(one):
            if not np.isfinite(each).all():
                raise ValueError(f"{name}: its inputs on the calibration text are not finite")
    return seen


def gather_activity(
    block: Mapping[str, Any],
    x_NTD: Any,
    tokens_NT: Any,
    config: TransformerConfig,
    form: LayerForm,
    rows: int = TOKENS,
) -> ExpertActivity:
    """Run every expert of a routed block on every token; arguments as of `gather`, and tokens of `rows_MD`.

    Raises:
      ValueError: what comes out is not finite.
    """
    check_gathers(config)
    sums: Any = None
    kept: list[np.ndarray] = []
    for x, tokens in _rows(x_NTD, tokens_NT):
        read = _inputs(config, "routed", block, x, tokens, form)
        found = (
            _observe_experts(block["mlp"], read["mlp"], read["experts"], read["weights"])["saliency"],
            *(np.asarray(one, np.float64) for one in _answers(block["mlp"]["experts"], *(read[n] for n in _READ))),
        )
        sums = found if sums is None else jax.tree.map(np.add, sums, found)
        kept.append(np.asarray(read["mlp"])[: max(0, rows - sum(map(len, kept)))])
    saliency, outputs_ED, gram_EE = sums
    activity = ExpertActivity(saliency, outputs_ED, gram_EE, np.concatenate(kept))
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(activity)):
        raise ValueError("experts: what they compute on the calibration text is not finite")
    return activity


_READ = ("mlp", "logits", "probs")


@jax.jit
def _answers(
    experts: PyTree, y_MD: Float[Array, "M D"], logits_ME: Float[Array, "M E"], probs_ME: Float[Array, "M E"]
) -> tuple[Array, Array]:
    """Sums over tokens of probability times output [E, D], one expert after the other, and of logits squared [E, E]."""

    def one(parts: tuple[PyTree, Array]) -> Array:
        expert, probs_M = parts
        hidden_MF = jax.nn.silu(y_MD @ expert["gate"]["kernel"]) * (y_MD @ expert["up"]["kernel"])
        return (probs_M @ hidden_MF) @ expert["down"]["kernel"]

    return jax.lax.map(one, (experts, probs_ME.T)), jnp.matmul(logits_ME.T, logits_ME, precision="highest")


@partial(jax.jit, static_argnums=(0, 1))
def _inputs(
    config: TransformerConfig, mlp: str, block: PyTree, x_NTD: Array, tokens_NT: Array, form: LayerForm
) -> dict[str, Array]:
    """What the kernels of a block read, [M, inputs]: of attention, its output, the feed-forward layer and its parts."""
    a, c = block["attention"], config

    def norm(name: str, x: Array, position: str) -> Array:
        here, both = c.norm_position == position, c.norm_position == "both"
        suffix = "_post_norm" if both and position == "post" else "_norm"
        return c.norm(x, block[f"{name}{suffix}"]["gain"]) if here or both else x

    y_NTD = norm("attention", x_NTD, "pre")
    sinks_H = a["sinks"]["logit"] if c.sinks else None
    how = AttentionForm(form.window, sinks_H, c.score_scale, c.attention_softcap)
    mixed_NTHh = attention(*project_qkv(a, y_NTD, _positions(x_NTD), c, form), how)
    found = {"attention": y_NTD, "output": mixed_NTHh.reshape(*x_NTD.shape[:2], -1)}
    added_NTD = jnp.einsum("nthk,hkd->ntd", mixed_NTHh, a["output"]["kernel"])
    if c.output_bias:
        added_NTD += a["output_bias"]["bias"][None, None]
    found["mlp"] = norm("mlp", x_NTD + norm("attention", added_NTD, "post"), "pre")
    activation = getattr(MLPS[mlp], "keywords", {}).get("activation", jax.nn.silu)

    def hidden(layer: PyTree) -> Array:
        return activation(found["mlp"] @ layer["gate"]["kernel"]) * (found["mlp"] @ layer["up"]["kernel"])

    if mlp != "routed":
        found["down"] = hidden(block["mlp"])
    else:
        if "shared" in block["mlp"]:
            found["shared"] = hidden(block["mlp"]["shared"])
        y_MD = found["mlp"].reshape(-1, c.width)
        routing = gate(block["mlp"].get("router", {}), y_MD, c.moe.router, tokens_N=tokens_NT.reshape(-1))
        found |= {"experts": routing.experts_NK, "weights": routing.weights_NK}
        found |= {"logits": routing.logits_NE, "probs": routing.probs_NE}
    return {name: x.reshape(-1, x.shape[-1]) for name, x in found.items()}


@jax.jit
def _sums(x_MI: Float[Array, "M I"]) -> tuple[Array, Array]:
    return jnp.matmul(x_MI.T, x_MI, precision="highest"), jnp.abs(x_MI).sum(0)


def _observe(x_MI: Array) -> Calibration:
    """Sums of one part of the text; the parts are added in float64."""
    hessian_II, magnitude_I = (np.asarray(one, np.float64) for one in _sums(x_MI))
    return Calibration(hessian_II, magnitude_I, x_MI.shape[0])


def _observe_experts(mlp: Mapping[str, Any], y_MD: Array, experts_MK: Array, weights_MK: Array) -> dict[str, Any]:
    """Of every expert on the tokens that chose it; on the host, since these are of any number."""
    rows_MD, chosen_MK, gates_MK = (np.asarray(x) for x in (y_MD, experts_MK, weights_MK))
    stacked = {name: np.asarray(mlp["experts"][name]["kernel"]) for name in ("gate", "up", "down")}
    each, load, norm = [], [], []
    for e in range(len(stacked["up"])):
        picked_MK = chosen_MK == e
        rows = np.flatnonzero(picked_MK.any(1))
        y = rows_MD[rows]
        gated = y @ stacked["gate"][e]
        hidden = gated * expit(gated) * (y @ stacked["up"][e])
        outer = observe(y)
        each.append({"gate": outer, "up": outer, "down": observe(hidden)})
        gate_M = np.where(picked_MK, gates_MK, 0).sum(1)[rows]
        load.append(float(len(rows)))
        norm.append(float(gate_M @ np.linalg.norm(hidden @ stacked["down"][e], axis=1)))
    experts = {name: [one[name] for one in each] for name in ("gate", "up", "down")}
    return {"experts": experts, "saliency": Saliency(np.array(load), np.array(norm))}
