"""Permutation alignment: hidden units of one network reordered to match another's, leaving its function as it is.

Weight matching and activation matching after Ainsworth et al. 2023 (Git Re-Basin, arXiv:2209.04836), sections 3.1 and
3.2. A spec says which axis of which leaf a permutation reorders: path -> the name of the permutation of each axis, None
for an axis that stays. Assignments are solved by scipy on the host.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, PyTree

from lottery.masks import flatten
from lottery.structures import refuse_biases

__all__ = [
    "chain_spec",
    "close_decoder",
    "decoder_spec",
    "match_activations",
    "match_weights",
    "open_decoder",
    "permute",
    "sizes",
]


# Path -> the name of the permutation of each axis, None for an axis that stays.
Spec = Mapping[str, tuple[str | None, ...]]
Permutations = dict[str, np.ndarray]


def chain_spec(layers: Sequence[str], biases: bool = True, axes: int = 2) -> dict[str, tuple[str | None, ...]]:
    """Make the spec of a chain of dense (axes=2) or convolutional (axes=4) layers: one permutation per hidden layer.

    Args:
      layers: names from first to last, ("dense0", "dense1", "output"); inputs and outputs of the network stay.
      biases: whether the layers have them.
      axes: of the kernels, whose last two are inputs and outputs.

    Example:
      >>> lottery.align.chain_spec(("dense0", "output"), biases=False)
      {'dense0/kernel': (None, 'dense0'), 'output/kernel': ('dense0', None)}
    """
    spec: dict[str, tuple[str | None, ...]] = {}
    names: list[str | None] = [None, *layers[:-1], None]
    for layer, before, after in zip(layers, names, names[1:], strict=False):
        spec[f"{layer}/kernel"] = (*(None,) * (axes - 2), before, after)
        if biases:
            spec[f"{layer}/bias"] = (after,)
    return spec


def decoder_spec(layers: int, tied: bool = True) -> dict[str, tuple[str | None, ...]]:
    """Make the spec of a decoder opened by `open_decoder`: residual stream, neurons and key/value heads of each layer.

    The order of query heads that share a key head, and rotations inside heads, are further symmetries not used here.

    Args:
      layers: of the decoder.
      tied: whether the head is the embedding's transpose.

    Example:
      >>> lottery.align.decoder_spec(1)["blocks_0/mlp/down/kernel"]
      ('ff_0', 'residual')
    """
    r = "residual"
    spec: dict[str, tuple[str | None, ...]] = {"embed/table": (None, r), "final_norm/gain": (r,)}
    for i in range(layers):
        at, heads, ff = f"blocks_{i}", f"heads_{i}", f"ff_{i}"
        spec |= {f"{at}/{norm}_norm/gain": (r,) for norm in ("attention", "mlp")}
        spec |= {f"{at}/attention/{name}/kernel": (r, heads, None) for name in ("key", "value")}
        spec[f"{at}/attention/query/kernel"] = (r, heads, None, None)
        spec[f"{at}/attention/output/kernel"] = (heads, None, None, r)
        spec |= {f"{at}/mlp/{name}/kernel": (r, ff) for name in ("gate", "up")}
        spec[f"{at}/mlp/down/kernel"] = (ff, r)
    return spec if tied else spec | {"head/kernel": (r, None)}


def open_decoder(tree: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Unstack a scanned decoder's tree (params or masks): a subtree per layer, query heads grouped by key head.

    blocks/... [L, ...] become blocks_0/..., blocks_1/...; attention/query [D, H, h] becomes [D, K, H / K, h] and
    attention/output [H, h, D] becomes [K, H / K, h, D]. `close_decoder` is the inverse.

    Example:
      >>> shapes = {"query": (1, 8, 4, 2), "key": (1, 8, 2, 2), "value": (1, 8, 2, 2), "output": (1, 4, 2, 8)}
      >>> tree = {"blocks": {"attention": {name: {"kernel": np.zeros(shape)} for name, shape in shapes.items()}}}
      >>> lottery.align.open_decoder(tree)["blocks_0"]["attention"]["query"]["kernel"].shape
      (8, 2, 2, 2)
    """
    stacked = tree["blocks"]
    layers, width, groups, dim = stacked["attention"]["key"]["kernel"].shape
    refuse_biases(stacked["attention"], "aligned")
    opened = {name: leaf for name, leaf in tree.items() if name != "blocks"}
    for i in range(layers):
        block = jax.tree.map(lambda x: x[i], stacked)  # noqa: B023
        attention = dict(block["attention"])
        attention["query"] = {"kernel": attention["query"]["kernel"].reshape(width, groups, -1, dim)}
        attention["output"] = {"kernel": attention["output"]["kernel"].reshape(groups, -1, dim, width)}
        opened[f"blocks_{i}"] = {**block, "attention": attention}
    return opened


def close_decoder(tree: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Stack the tree that `open_decoder` unstacked.

    Example:
      >>> shapes = {"query": (1, 8, 4, 2), "key": (1, 8, 2, 2), "value": (1, 8, 2, 2), "output": (1, 4, 2, 8)}
      >>> tree = {"blocks": {"attention": {name: {"kernel": np.zeros(shape)} for name, shape in shapes.items()}}}
      >>> closed = lottery.align.close_decoder(lottery.align.open_decoder(tree))
      >>> closed["blocks"]["attention"]["output"]["kernel"].shape
      (1, 4, 2, 8)
    """
    names = sorted((name for name in tree if name.startswith("blocks_")), key=lambda name: int(name[7:]))
    closed = []
    for name in names:
        block = dict(tree[name])
        attention = dict(block["attention"])
        query, output = attention["query"]["kernel"], attention["output"]["kernel"]
        attention["query"] = {"kernel": query.reshape(query.shape[0], -1, query.shape[-1])}
        attention["output"] = {"kernel": output.reshape(-1, *output.shape[-2:])}
        closed.append({**block, "attention": attention})
    rest = {name: leaf for name, leaf in tree.items() if name not in names}
    return {**rest, "blocks": jax.tree.map(lambda *x: np.stack([np.asarray(leaf) for leaf in x]), *closed)}


def sizes(tree: PyTree, spec: Spec) -> dict[str, int]:
    """Find the length of every permutation of a spec.

    Raises:
      ValueError: a path of the spec that the tree lacks, a wrong number of axes, or sizes that disagree (naming the
        path).

    Example:
      >>> spec = lottery.align.chain_spec(("dense0", "output"), biases=False)
      >>> lottery.align.sizes({"dense0": {"kernel": np.zeros((4, 3))}, "output": {"kernel": np.zeros((3, 2))}}, spec)
      {'dense0': 3}
    """
    leaves, found = flatten(tree), dict[str, int]()
    for path, axes in spec.items():
        if path not in leaves:
            raise ValueError(f"align: no parameter {path}; parameters: {', '.join(leaves)}")
        shape = leaves[path].shape
        if len(shape) != len(axes):
            raise ValueError(f"align: {path} has shape {shape}, the spec names {len(axes)} axes: {axes}")
        for name, size in zip(axes, shape, strict=True):
            if name is not None and found.setdefault(name, size) != size:
                raise ValueError(f"align: {path} has {size} units of {name!r}, other parameters have {found[name]}")
    return found


def permute(tree: PyTree, permutations: Mapping[str, Any], spec: Spec) -> PyTree:
    """Permute the units of a tree (params, masks, moments): new unit i is old unit `permutations[name][i]`.

    Leaves that the spec does not name stay. Params permuted so compute the same function.

    Example:
      >>> spec = lottery.align.chain_spec(("dense0", "output"), biases=False)
      >>> tree = {"dense0": {"kernel": np.array([[1, 2]])}, "output": {"kernel": np.array([[3], [4]])}}
      >>> moved = lottery.align.permute(tree, {"dense0": [1, 0]}, spec)
      >>> moved["dense0"]["kernel"].tolist(), moved["output"]["kernel"].tolist()
      ([[2, 1]], [[4], [3]])
    """
    sizes(tree, spec)

    def moved(path: str, leaf: Any) -> Any:
        for axis, name in enumerate(spec.get(path, ())):
            if name is not None and name in permutations:
                leaf = leaf.take(np.asarray(permutations[name]), axis=axis)
        return leaf

    leaves = {path: moved(path, leaf) for path, leaf in flatten(tree).items()}
    return jax.tree.unflatten(jax.tree.structure(tree), list(leaves.values()))


def match_weights(
    a: PyTree, b: PyTree, spec: Spec, rounds: int = 100, seed: int = 0, restarts: int = 10
) -> Permutations:
    """Match weights: permutations that bring b's weights closest to a's (Ainsworth et al. 2023, algorithm 1).

    By coordinate descent: one permutation after the other is set to the best for the others as they are, in random
    order, until a whole round improves none; a local optimum. So it begins several times, from the identity and from
    random permutations, and the one with the largest inner product of a and the permuted b is returned. Use as
    `permute(b, match_weights(a, b, spec), spec)`.

    Args:
      a: params.
      b: params.
      spec: `chain_spec`, `decoder_spec` or one written by hand.
      rounds: at most, of every start.
      seed: of the order and of the starts.
      restarts: random starts after the identity; each costs as much as the first.

    Example:
      >>> spec = lottery.align.chain_spec(("dense0", "output"), biases=False)
      >>> a = {"dense0": {"kernel": np.array([[1.0, 2.0]])}, "output": {"kernel": np.array([[3.0], [4.0]])}}
      >>> b = lottery.align.permute(a, {"dense0": [1, 0]}, spec)
      >>> lottery.align.match_weights(a, b, spec)["dense0"].tolist()
      [1, 0]
    """
    lengths = sizes(a, spec)
    if lengths != sizes(b, spec):
        raise ValueError(f"align: the networks differ in size: {lengths} and {sizes(b, spec)}")
    left = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(a).items() if path in spec}
    right = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(b).items() if path in spec}
    generator = np.random.default_rng(seed)
    best, found = -np.inf, dict[str, np.ndarray]()
    for start in range(restarts + 1):
        permutations = {
            name: generator.permutation(length) if start else np.arange(length) for name, length in lengths.items()
        }
        _ascend(left, right, permutations, spec, rounds, generator)
        moved = {path: _moved(right[path], permutations, axes) for path, axes in spec.items()}
        value = sum(float(np.vdot(left[path], moved[path])) for path in spec)
        if value > best + 1e-9 * abs(value):
            best, found = value, permutations
    return found


def _ascend(left, right, permutations: Permutations, spec: Spec, rounds: int, generator: np.random.Generator) -> None:
    """Improve the permutations one after the other, in place, until none can be."""
    for _ in range(rounds):
        improved = False
        for name in generator.permutation(sorted(permutations)):
            gain = _similarity(left, right, permutations, spec, name)
            order = _assign(gain)
            now = gain[np.arange(len(order)), permutations[name]].sum()
            if gain[np.arange(len(order)), order].sum() > now + 1e-9 * (1 + abs(now)):
                permutations[name], improved = order, True
        if not improved:
            return


def _moved(leaf: np.ndarray, permutations: Permutations, axes: tuple[str | None, ...], but: str = "") -> np.ndarray:
    """A leaf with its axes permuted, those of one permutation left."""
    for axis, name in enumerate(axes):
        if name is not None and name != but:
            leaf = leaf.take(permutations[name], axis=axis)
    return leaf


def _assign(gain: np.ndarray) -> np.ndarray:
    """The column for each row that maximizes the total gain [n, n]."""
    from scipy.optimize import linear_sum_assignment  # slow to import

    return linear_sum_assignment(gain, maximize=True)[1]


def _similarity(left, right, permutations, spec, name) -> np.ndarray:
    """[n, n]: inner product of a's unit i with b's unit j over all leaves, the other permutations applied to b."""
    total: Any = 0.0
    for path, axes in spec.items():
        if name not in axes:
            continue
        leaf = _moved(right[path], permutations, axes, but=name)
        one, two = (
            np.moveaxis(x, axes.index(name), 0).reshape(x.shape[axes.index(name)], -1) for x in (left[path], leaf)
        )
        total = total + one @ two.T
    return total


def match_activations(a: Mapping[str, Float[Any, "N _"]], b: Mapping[str, Float[Any, "N _"]]) -> Permutations:
    """Match activations: permutations of b's units that correlate best with a's (Ainsworth et al. 2023, section 3.1).

    Also Li et al. 2016 (arXiv:1511.07543).

    Args:
      a: by permutation name, activations [N inputs, units]. Units that never vary correlate with none.
      b: on the same inputs.

    Raises:
      ValueError: other names, or shapes that differ.

    Example:
      >>> a = {"dense0": np.array([[0.0, 1.0], [1.0, 0.5], [2.0, 3.0]])}
      >>> lottery.align.match_activations(a, {"dense0": a["dense0"][:, ::-1]})["dense0"].tolist()
      [1, 0]
    """
    found = {}
    if set(a) != set(b):
        raise ValueError(f"align: activations of {sorted(a)} and of {sorted(b)}: the same names are needed")
    for name in a:
        one, two = (np.asarray(x, np.float64) for x in (a[name], b[name]))
        if one.shape != two.shape:
            raise ValueError(f"align: activations {name!r} of shapes {one.shape} and {two.shape}")
        one, two = (x - x.mean(0) for x in (one, two))
        one, two = (x / np.maximum(np.linalg.norm(x, axis=0), 1e-30) for x in (one, two))
        found[name] = _assign(one.T @ two)
    return found
