"""Structured sparsity: patterns by which weights are pruned together: weights, n:m, blocks, neurons, heads, experts.

A kernel is read as a stack of matrices, inputs times outputs (`Layout`, found by path in `LAYOUTS`), because
"contracting axis" and "neuron" mean something only then. `parse` turns a name from a config, such as one of
`STRUCTURES`, into a structure; `at` finds the one for a leaf. `UNSTRUCTURED` prunes single weights.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

__all__ = [
    "LAYOUTS",
    "Layout",
    "STRUCTURES",
    "Structure",
    "UNSTRUCTURED",
    "at",
    "blocks",
    "experts",
    "heads",
    "layout",
    "n_of_m",
    "neurons",
    "parse",
    "slices",
]


@dataclass(frozen=True)
class Layout:
    """The axes of a kernel: first `batch` stacked ones, last `outputs` outputs, all between are contracted inputs.

    A dense kernel [K, N] and a convolution's [h, w, I, O] are Layout(0, 1); query kernels [D, H, h] are Layout(0, 2);
    kernels of scanned blocks have one batch axis more, those of experts another.

    Attributes:
      batch: number of stacked axes.
      outputs: number of output axes.

    Example:
      >>> lottery.structures.Layout(0, 1).matrices((3, 3, 8, 16))
      (1, 72, 16)
    """

    batch: int = 0
    outputs: int = 1

    def matrices(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Read a kernel's shape as (stack, inputs, outputs).

        Raises:
          ValueError: the shape has no axis left for the inputs.
        """
        if len(shape) < self.batch + self.outputs + 1:
            raise ValueError(f"shape {shape} has too few axes for {self}: stacked, at least one input, outputs")
        split = len(shape) - self.outputs
        parts = shape[: self.batch], shape[self.batch : split], shape[split:]
        stack, inputs, outputs = (int(np.prod(part)) for part in parts)
        return stack, inputs, outputs


# First match wins, by '/'-joined path; everything else is Layout().
LAYOUTS: tuple[tuple[str, Layout], ...] = (
    (r"(^|/)blocks/(.*/)?experts/", Layout(2, 1)),
    (r"(^|/)experts/", Layout(1, 1)),
    (r"(^|/)blocks/(.*/)?attention/(query|key|value)/kernel$", Layout(1, 2)),
    (r"(^|/)blocks/", Layout(1, 1)),
    (r"(^|/)attention/(query|key|value)/kernel$", Layout(0, 2)),
)


@dataclass(frozen=True)
class Structure:
    """A structured-sparsity pattern (weight, n:m, block, channel, head, expert).

    Attributes:
      pool: (scores, mask) -> (unit scores float32, unit alive bool), same shape as each other, from one leaf's two
        arrays.
      expand: (keep, shape) -> bool mask of the leaf's shape, False wherever a unit does not stay.
      protects: units that `pool` scores +inf are never removed, whatever the count.

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


UNSTRUCTURED = Structure(pool=lambda scores, mask: (scores, mask), expand=lambda keep, shape: keep)
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
    """Prune experts: units are indices of the last of the stacked axes.

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
    "unstructured": lambda layout: UNSTRUCTURED,
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
    if found := re.fullmatch(r"(\d+):(\d+)", name):
        n, m = int(found[1]), int(found[2])
        n_of_m(n, m)
        return lambda layout: n_of_m(n, m, layout)
    if found := re.fullmatch(r"(\d+)x(\d+)", name):
        rows, columns = int(found[1]), int(found[2])
        blocks(rows, columns)
        return lambda layout: blocks(rows, columns, layout)
    raise ValueError(f"structure {name!r} is not one of {', '.join(STRUCTURES)}, n:m (2:4) or a block (16x16)")


def layout(path: str, layouts: Sequence[tuple[str, Layout]] = LAYOUTS) -> Layout:
    """Find the layout of the leaf at a path: the first rule that matches, else Layout().

    Example:
      >>> lottery.structures.layout("blocks/attention/query/kernel")
      Layout(batch=1, outputs=2)
    """
    return next((found for pattern, found in layouts if re.search(pattern, path)), Layout())


def at(path: str, structure: str | Structure, layouts: Sequence[tuple[str, Layout]] = LAYOUTS) -> Structure:
    """Find the structure for the leaf at a path; a name is made to fit the leaf's layout.

    Raises:
      ValueError: an unknown name, or a structure that needs an axis the layout lacks (naming the path).

    Example:
      >>> lottery.structures.at("dense0/kernel", "expert")
      Traceback (most recent call last):
      ValueError: dense0/kernel: a kernel with Layout(batch=0, outputs=1) has no axis of experts
    """
    if isinstance(structure, Structure):
        return structure
    maker = parse(structure)
    try:
        return maker(layout(path, layouts))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
