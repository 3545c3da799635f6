"""Structured sparsity: patterns by which weights are pruned together: weights, n:m, blocks, neurons, heads, experts.

A kernel is read as a stack of matrices, inputs times outputs (`Layout`), because "layer", "contracting axis" and
"neuron" mean something only then. `LAYOUTS` finds the layout of Flax's leaves by path; `EQUINOX` and `HAIKU` are tables
for those libraries' parameters, and one's own is written the same way: pass it to `masks.prunable` as `layouts`.

A layer is one member of a stack: the kernel of one block of a scanned decoder, or of one expert. `layers` names them as
a model without a stack would: `blocks/mlp/up/kernel` [L, D, F] has the layers `blocks_0/mlp/up/kernel`, ... Everything
that goes layer by layer, counts, rates, densities, random masks, goes by these names.

`parse` turns a name from a config, such as one of `STRUCTURES`, into a structure; `at` finds the one for a leaf.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

__all__ = [
    "EQUINOX",
    "HAIKU",
    "LAYOUTS",
    "Layout",
    "STRUCTURES",
    "Structure",
    "at",
    "blocks",
    "experts",
    "floor",
    "heads",
    "layers",
    "layout",
    "matrices",
    "n_of_m",
    "neurons",
    "numbered",
    "parse",
    "ratio",
    "slices",
]


@dataclass(frozen=True)
class Layout:
    """The axes of a kernel: first `batch` stacked ones, last `outputs` outputs, all between are contracted inputs.

    A dense kernel [K, N] and a convolution's [h, w, I, O] are Layout(0, 1); query kernels [D, H, h] are Layout(0, 2);
    kernels of scanned blocks have one batch axis more, those of experts another.

    Attributes:
      batch: number of stacked axes.
      outputs: number of output axes; 0 in a table of layouts means all but one input.
      parts: of the path, the names that stand for the stacked axes: "blocks" becomes "blocks_3" in the names of layers;
        an axis without such a part is numbered at the end, "kernel[3]".
      outputs_first: outputs come before the inputs, and after the channels that are contracted come the sides of a
        convolution: [O, I] and [O, I, h, w], as PyTorch and Equinox have it.

    Example:
      >>> lottery.structures.Layout(0, 1).matrices((3, 3, 8, 16))
      (1, 72, 16)
    """

    batch: int = 0
    outputs: int = 1
    parts: tuple[str, ...] = ()
    outputs_first: bool = False

    def matrices(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Read a kernel's shape as (stack, inputs, outputs).

        Raises:
          ValueError: the shape has no axis left for the inputs.
        """
        if len(shape) < self.batch + self.outputs + 1:
            raise ValueError(f"shape {shape} has too few axes for {self}: stacked, at least one input, outputs")
        shape = tuple(shape[axis] for axis in self.order(len(shape)))
        split = len(shape) - self.outputs
        parts = shape[: self.batch], shape[self.batch : split], shape[split:]
        stack, inputs, outputs = (int(np.prod(part)) for part in parts)
        return stack, inputs, outputs

    def order(self, ndim: int) -> tuple[int, ...]:
        """List the axes so that stacked ones come first, then inputs with channels last, then outputs."""
        if not self.outputs_first:
            return tuple(range(ndim))
        first = self.batch + self.outputs
        return (
            *range(self.batch),
            *range(first + 1, ndim),
            *range(first, min(first + 1, ndim)),
            *range(self.batch, first),
        )

    def fit(self, ndim: int) -> "Layout":
        """Make the layout of a leaf with that many axes."""
        batch = min(self.batch, ndim)
        return replace(self, batch=batch, outputs=self.outputs or max(ndim - batch - 1, 1))


Layouts = Sequence[tuple[str, Layout]]
# First match wins, by '/'-joined path without NNX's "/value" at the end. A folder of numbered blocks is no stack.
LAYOUTS: Layouts = (
    (r"(^|/)blocks/(?!\d+/)(.*/)?experts/(?!\d+/)", Layout(2, 1, ("blocks", "experts"))),
    (r"(^|/)experts/(?!\d+/)", Layout(1, 1, ("experts",))),
    (r"(^|/)blocks/(?!\d+/)(.*/)?(query|key|value)/kernel$", Layout(1, 0, ("blocks",))),
    (r"(^|/)blocks/(?!\d+/)", Layout(1, 1, ("blocks",))),
    (r"(^|/)dense_blocks/(?!\d+/)(.*/)?(query|key|value)/kernel$", Layout(1, 0, ("dense_blocks",))),
    (r"(^|/)dense_blocks/(?!\d+/)", Layout(1, 1, ("dense_blocks",))),
    (r"(^|/)(query|key|value)/kernel$", Layout(0, 0)),
)
# For `masks.prunable(params, layouts=...)`: Equinox and PyTorch [O, I, ...], Haiku [..., I, O].
EQUINOX: Layouts = ((r"(^|/)weight$", Layout(outputs_first=True)),)
HAIKU: Layouts = ((r"(^|/)w$", Layout()),)
# Kernels with heads that no rule of LAYOUTS knows: their inputs could be any of the axes.
_HEADS = re.compile(r"att(entio)?n|qkv|(^|/)[qkvo](_proj)?/|(^|/)(queries|keys|values|query|key|value)", re.IGNORECASE)
_KNOWN = re.compile(r"(^|/)(query|key|value|out|output)/kernel$")


@dataclass(frozen=True)
class Structure:
    """A structured-sparsity pattern (weight, n:m, block, channel, head, expert).

    Attributes:
      pool: (scores, mask) -> (unit scores float32, unit alive bool), same shape as each other, from one leaf's two
        arrays.
      expand: (keep, shape) -> bool mask of the leaf's shape, False wherever a unit does not stay.
      protects: units that `pool` scores +inf are never removed, whatever the count.
      batch: leading axes of the leaf whose indices are layers of their own; units of one layer are neighbors.

    Both functions raise ValueError for shapes the structure does not fit; callers add the path.

    Example:
      >>> columns = lottery.structures.slices([1])
      >>> scores, alive = columns.pool(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.ones((2, 2), bool))
      >>> scores.tolist(), columns.expand(scores > 2, (2, 2)).tolist()
      ([2.0, 3.0], [[False, True], [False, True]])
    """

    pool: Callable[[Array, Array], tuple[Array, Array]]
    expand: Callable[[Array, tuple[int, ...]], Array]
    protects: bool = False
    batch: int = 0


_UNSTRUCTURED = Structure(pool=lambda scores, mask: (scores, mask), expand=lambda keep, shape: keep)
Maker = Callable[[Layout], Structure]


def slices(axes: Sequence[int]) -> Structure:
    """Prune slices: one unit for every index along `axes` (not negative); the others are pooled.

    A unit scores the sum over its alive weights divided by its full size, so units of different leaves compare.

    Example:
      >>> lottery.prune.units({"kernel": jnp.zeros((2, 5, 3))}, {"kernel": True}, lottery.structures.slices([0, 1]))
      {'kernel': 10}
    """
    axes = tuple(axes)

    def pool(scores: Array, mask: Array) -> tuple[Array, Array]:
        other = tuple(axis for axis in range(mask.ndim) if axis not in axes)
        return jnp.where(mask, scores.astype(jnp.float32), 0).mean(other), mask.any(other)

    def expand(keep: Array, shape: tuple[int, ...]) -> Array:
        return jnp.broadcast_to(jnp.expand_dims(keep, tuple(a for a in range(len(shape)) if a not in axes)), shape)

    return Structure(pool, expand)


def blocks(rows: int, columns: int, layout: Layout = Layout()) -> Structure:
    """Prune blocks: units are rows x columns tiles of every inputs x outputs matrix, for block-sparse kernels.

    Raises:
      ValueError: sides below 1; from pool, matrices they do not divide.

    Example:
      >>> lottery.prune.units({"kernel": jnp.zeros((8, 4))}, {"kernel": True}, lottery.structures.blocks(4, 4))
      {'kernel': 2}
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"blocks of {rows} x {columns}: both sides must be at least 1")

    def pool(scores: Array, mask: Array) -> tuple[Array, Array]:
        stack, k, n = layout.matrices(mask.shape)
        if k % rows or n % columns:
            raise ValueError(f"blocks of {rows} x {columns} do not divide a {k} x {n} matrix (shape {mask.shape})")
        tiles = (stack, k // rows, rows, n // columns, columns)
        alive = mask.reshape(tiles)
        weighted = jnp.where(alive, scores.astype(jnp.float32).reshape(tiles), 0)
        return weighted.mean((2, 4)), alive.any((2, 4))

    def expand(keep: Array, shape: tuple[int, ...]) -> Array:
        return jnp.repeat(jnp.repeat(keep, rows, axis=1), columns, axis=2).reshape(shape)

    return Structure(pool, expand)


def n_of_m(n: int, m: int, layout: Layout = Layout()) -> Structure:
    """Prune to n:m sparsity: n of every m consecutive inputs of an output stay (Mishra et al. 2021, arXiv:2104.08378).

    Units are single weights, removed in rounds: first the lowest of every group, then the second lowest, until n are
    left, which are never removed. At density n / m every group holds exactly n, whatever the scope.

    Raises:
      ValueError: not 1 <= n <= m; from pool, a number of inputs that m does not divide.

    Example:
      >>> scores = {"kernel": jnp.array([[1.0], [4.0], [3.0], [2.0]])}
      >>> mask = lottery.prune.keep(scores, lottery.masks.ones(scores), {"kernel": True}, {"*": 2}, "2:4")
      >>> mask["kernel"].ravel().tolist()
      [False, True, True, False]
    """
    if not 1 <= n <= m:
        raise ValueError(f"{n}:{m} sparsity is impossible: 1 <= n <= m is needed")

    def pool(scores: Array, mask: Array) -> tuple[Array, Array]:
        stack, k, outputs = layout.matrices(mask.shape)
        if k % m:
            raise ValueError(f"{n}:{m} needs a multiple of {m} inputs, not {k} (shape {mask.shape})")
        groups = (stack, k // m, m, outputs)
        score, alive = scores.astype(jnp.float32).reshape(groups), mask.reshape(groups)
        order = jnp.lexsort((score, alive), axis=2)
        rank = jnp.argsort(order, axis=2)
        # The order within a round is the score's own, squeezed below 1; what is not a number goes last.
        within = jnp.nan_to_num(0.45 * (1 + score / (1 + jnp.abs(score))), nan=0.9)
        return jnp.where(rank >= m - n, jnp.inf, rank + within), alive

    return Structure(pool, lambda keep, shape: keep.reshape(shape), protects=True)


def neurons(layout: Layout = Layout()) -> Structure:
    """Prune neurons: units are the output columns, the weights into one neuron or one output channel of a convolution.

    Example:
      >>> lottery.prune.units({"kernel": jnp.zeros((3, 3, 8, 16))}, {"kernel": True}, lottery.structures.neurons())
      {'kernel': 16}
    """

    def of(ndim: int) -> Structure:
        return slices((*range(layout.batch), *range(ndim - layout.outputs, ndim)))

    return _by_rank(of, layout)


def heads(layout: Layout = Layout()) -> Structure:
    """Prune attention heads: axis H of query, key and value kernels [..., D, H, h] and of output's [..., H, h, D].

    Raises:
      ValueError: from pool, a kernel without an axis of heads.

    Example:
      >>> structure = lottery.structures.heads(lottery.structures.Layout(0, 2))
      >>> lottery.prune.units({"kernel": jnp.zeros((16, 4, 8))}, {"kernel": True}, structure)
      {'kernel': 4}
    """

    def of(ndim: int) -> Structure:
        inputs = ndim - layout.batch - layout.outputs
        if layout.outputs != 2 and inputs != 2:
            raise ValueError(f"a kernel of {ndim} axes with {layout} has no axis of heads")
        return slices((*range(layout.batch), ndim - 2 if layout.outputs == 2 else layout.batch))

    return _by_rank(of, layout)


def experts(layout: Layout = Layout(1, 1)) -> Structure:
    """Prune experts: units are indices of the last of the stacked axes; the others are those of layers.

    Raises:
      ValueError: the layout has no stacked axis.

    Example:
      >>> lottery.prune.units({"kernel": jnp.zeros((6, 8, 4))}, {"kernel": True}, lottery.structures.experts())
      {'kernel': 6}
    """
    if not layout.batch:
        raise ValueError(f"a kernel with {layout} has no axis of experts")
    return slices(range(layout.batch))


def _by_rank(of: Callable[[int], Structure], layout: Layout) -> Structure:
    def pool(scores: Array, mask: Array) -> tuple[Array, Array]:
        layout.matrices(mask.shape)
        return of(mask.ndim).pool(scores, mask)

    return Structure(pool, lambda keep, shape: of(len(shape)).expand(keep, shape))


STRUCTURES: dict[str, Maker] = {
    "unstructured": lambda layout: _UNSTRUCTURED,
    "neuron": neurons,
    "channel": neurons,
    "head": heads,
    "expert": experts,
}


def parse(name: str) -> Maker:
    """Parse the name of a structure: one of STRUCTURES, "2:4" (any n:m) or "16x16" (blocks, rows x columns).

    Returns:
      A function from a `Layout` to the `Structure`.

    Raises:
      ValueError: any other name, or an impossible n:m or block.

    Example:
      >>> lottery.structures.parse("3:2")
      Traceback (most recent call last):
      ValueError: 3:2 sparsity is impossible: 1 <= n <= m is needed
    """
    if name in STRUCTURES:
        return STRUCTURES[name]
    if pair := ratio(name):
        n, m = pair
        n_of_m(n, m)
        return lambda layout: n_of_m(n, m, layout)
    if found := re.fullmatch(r"(\d+)x(\d+)", name):
        rows, columns = int(found[1]), int(found[2])
        blocks(rows, columns)
        return lambda layout: blocks(rows, columns, layout)
    raise ValueError(f"structure {name!r} is not one of {', '.join(STRUCTURES)}, n:m (2:4) or a block (16x16)")


def floor(name: str) -> float:
    """Find the smallest density that a structure can reach: n / m for n:m, 0 for the others.

    Example:
      >>> lottery.structures.floor("2:4"), lottery.structures.floor("neuron")
      (0.5, 0.0)
    """
    parse(name)
    found = ratio(name)
    return found[0] / found[1] if found else 0.0


def ratio(name: str) -> tuple[int, int] | None:
    """Read n and m off the name of n:m sparsity; None for another structure.

    Example:
      >>> lottery.structures.ratio("2:4"), lottery.structures.ratio("neuron")
      ((2, 4), None)
    """
    found = re.fullmatch(r"(\d+):(\d+)", name)
    return (int(found[1]), int(found[2])) if found else None


def layout(path: str, shape: Sequence[int], chosen: bool | Layout = True, strict: bool = False) -> Layout:
    """Find the layout of a leaf: the one that `masks.prunable` chose, else the first of `LAYOUTS` that matches.

    Args:
      path: '/'-joined.
      shape: of the leaf.
      chosen: the leaf of `masks.prunable`.
      strict: refuse leaves whose axes no rule knows; else they are read as Layout().

    Raises:
      ValueError: with `strict`, a leaf that is not called kernel, or one with axes of heads, that no rule knows.

    Example:
      >>> lottery.structures.layout("blocks/attention/query/kernel", (2, 16, 4, 4))
      Layout(batch=1, outputs=2, parts=('blocks',), outputs_first=False)
    """
    if isinstance(chosen, Layout):
        return chosen.fit(len(shape))
    name = path.removesuffix("/value")
    found = next((rule for pattern, rule in LAYOUTS if re.search(pattern, name)), None)
    fitted = (found or Layout()).fit(len(shape))
    unknown = len(shape) - fitted.batch > 2 and _HEADS.search(name) and not _KNOWN.search(name)
    if strict and (unknown or not (found or name.split("/")[-1] == "kernel")):
        raise ValueError(
            f"which axes of shape {tuple(shape)} are inputs is not known; say so by masks.prunable(params, "
            "layouts=((pattern, structures.Layout(...)),)), or use structures.EQUINOX or HAIKU"
        )
    return fitted


def matrices(leaf: Array, layout: Layout) -> Array:
    """Read a kernel as a stack of matrices [stack, inputs, outputs].

    Example:
      >>> lottery.structures.matrices(jnp.zeros((16, 8, 3, 3)), lottery.structures.EQUINOX[0][1]).shape
      (1, 72, 16)
    """
    return leaf.transpose(layout.order(leaf.ndim)).reshape(layout.matrices(leaf.shape))


def at(path: str, shape: Sequence[int], structure: str | Structure, chosen: bool | Layout = True) -> Structure:
    """Find the structure for a leaf; a name is made to fit the leaf's layout.

    Args:
      path: '/'-joined.
      shape: of the leaf.
      structure: a name for `parse`, or a structure, which is used as it is.
      chosen: the leaf of `masks.prunable`.

    Raises:
      ValueError: an unknown name, a structure that needs an axis the layout lacks, or a leaf whose axes no rule knows
        (naming the path).

    Example:
      >>> lottery.structures.at("dense0/kernel", (4, 3), "expert")
      Traceback (most recent call last):
      ValueError: dense0/kernel: a kernel of shape (4, 3) has no axis of experts
    """
    if isinstance(structure, Structure):
        return structure
    maker = parse(structure)
    try:
        found = layout(path, shape, chosen, strict=structure != "unstructured")
        if structure == "expert" and not found.batch:
            raise ValueError(f"a kernel of shape {tuple(shape)} has no axis of experts")
        made = maker(replace(found, outputs_first=False))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if found.outputs_first and structure != "unstructured":
        made = _reordered(made, found.order(len(shape)))
    return replace(made, batch=found.batch - (structure == "expert"))


def _reordered(structure: Structure, order: tuple[int, ...]) -> Structure:
    """The structure of a leaf whose axes have to be brought into order first."""

    def expand(keep: Array, shape: tuple[int, ...]) -> Array:
        return structure.expand(keep, tuple(shape[axis] for axis in order)).transpose(np.argsort(order))

    return replace(structure, pool=lambda s, m: structure.pool(s.transpose(order), m.transpose(order)), expand=expand)


def layers(
    path: str, shape: Sequence[int], chosen: bool | Layout = True, structure: str | Structure = "unstructured"
) -> tuple[str, ...]:
    """Name the layers that a leaf stacks, in order; a leaf without stacked axes is one layer, named by its path.

    Experts are layers of their own, except where whole experts are the units.

    Args:
      path: '/'-joined.
      shape: of the leaf, of one network.
      chosen: the leaf of `masks.prunable`.
      structure: a name for `parse`, or a structure.

    Example:
      >>> lottery.structures.layers("blocks/mlp/up/kernel", (2, 16, 64))
      ('blocks_0/mlp/up/kernel', 'blocks_1/mlp/up/kernel')
      >>> lottery.structures.layers("tower/kernel", (2, 16, 64), lottery.structures.Layout(batch=1))
      ('tower/kernel[0]', 'tower/kernel[1]')
    """
    batch = at(path, shape, structure, chosen).batch
    return numbered(path, tuple(shape[:batch]), layout(path, shape, chosen).parts[:batch])


@functools.cache
def numbered(path: str, stack: tuple[int, ...], parts: tuple[str, ...]) -> tuple[str, ...]:
    """Number a path for every index of a stack, behind its parts of these names, else at its end.

    Example:
      >>> lottery.structures.numbered("blocks/mlp", (2,), ("blocks",))
      ('blocks_0/mlp', 'blocks_1/mlp')
    """
    stacked = [part for part in parts if re.search(rf"(^|/){part}/", path)]
    names = []
    for index in np.ndindex(*stack):
        name = path
        for part, i in zip(stacked, index, strict=False):
            name = re.sub(rf"(^|/){part}/", rf"\g<1>{part}_{i}/", name, count=1)
        rest = ",".join(map(str, index[len(stacked) :]))
        names.append(f"{name}[{rest}]" if rest else name)
    return tuple(names)


def refuse_biases(attention: Mapping[str, PyTree], what: str) -> None:
    """Raise ValueError if queries, keys or values have more than a kernel, which the functions on heads leave alone."""
    for leaf, called in (("bias", "biases"), ("gain", "gains of a norm over all heads")):
        if found := [name for name in ("query", "key", "value") if leaf in attention[name]]:
            raise ValueError(f"blocks/attention has {called} on {', '.join(found)}; heads with {called} are not {what}")
