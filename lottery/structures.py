"""Structures: what is pruned as a whole. A unit is a weight, a block, a neuron, an attention head or an expert.

A kernel is read as a stack of matrices, inputs times outputs (`Layout`), because "contracting axis" and "neuron" mean
something only then. `parse` turns a name from a config into a structure; `at` finds the one for a leaf.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


@dataclass(frozen=True)
class Layout:
    """The axes of a kernel: first `batch` stacked ones, last `outputs` outputs, all between are contracted inputs.

    A dense kernel [K, N] and a convolution's [h, w, I, O] are Layout(0, 1); query kernels [D, H, h] are Layout(0, 2);
    kernels of scanned blocks have one batch axis more, those of experts another.
    """

    batch: int = 0
    outputs: int = 1

    def matrices(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(stack, inputs, outputs) of a kernel's shape.

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
    """What is removed as a whole.

    pool(scores, mask) -> (unit scores float32, unit alive bool), same shape as each other, from one leaf's two arrays.
    expand(keep, shape) -> bool mask of the leaf's shape, False wherever a unit is not kept.
    protects: units that `pool` scores +inf are never removed, whatever the quota.

    Both raise ValueError for shapes the structure does not fit; callers add the path.
    """

    pool: Callable[[Array, Array], tuple[Array, Array]]
    expand: Callable[[Array, tuple[int, ...]], Array]
    protects: bool = False


UNSTRUCTURED = Structure(pool=lambda scores, mask: (scores, mask), expand=lambda keep, shape: keep)
Maker = Callable[[Layout], Structure]


def slices(axes: Sequence[int]) -> Structure:
    """One unit for every index along `axes` (not negative); the others are pooled. A unit scores its alive mean sum.

    The score is the sum over alive weights divided by the unit's full size, so units of different leaves compare.
    """
    axes = tuple(axes)

    def pool(scores: Array, mask: Array) -> tuple[Array, Array]:
        other = tuple(axis for axis in range(mask.ndim) if axis not in axes)
        return jnp.where(mask, scores.astype(jnp.float32), 0).mean(other), mask.any(other)

    def expand(keep: Array, shape: tuple[int, ...]) -> Array:
        return jnp.broadcast_to(jnp.expand_dims(keep, tuple(a for a in range(len(shape)) if a not in axes)), shape)

    return Structure(pool, expand)


def blocks(rows: int, columns: int, layout: Layout = Layout()) -> Structure:
    """Units are rows x columns tiles of every inputs x outputs matrix: what a block-sparse kernel can skip.

    Raises:
      ValueError: sides below 1; from pool, matrices they do not divide.
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
    """n of every m consecutive inputs of an output stay (Mishra et al. 2021, arXiv:2104.08378, for 2:4).

    Units are single weights, removed in rounds: first the lowest of every group, then the second lowest, until n are
    left, which are never removed. At density n / m every group holds exactly n, whatever the scope.

    Raises:
      ValueError: not 1 <= n <= m; from pool, a number of inputs that m does not divide.
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
    """Units are the output columns: the weights into one neuron, or one output channel of a convolution."""

    def of(ndim: int) -> Structure:
        return slices((*range(layout.batch), *range(ndim - layout.outputs, ndim)))

    return _by_rank(of, layout)


def heads(layout: Layout = Layout()) -> Structure:
    """Units are attention heads: axis H of query, key and value kernels [..., D, H, h] and of output's [..., H, h, D].

    Raises:
      ValueError: from pool, a kernel without an axis of heads.
    """

    def of(ndim: int) -> Structure:
        inputs = ndim - layout.batch - layout.outputs
        if layout.outputs != 2 and inputs != 2:
            raise ValueError(f"a kernel of {ndim} axes with {layout} has no axis of heads")
        return slices((*range(layout.batch), ndim - 2 if layout.outputs == 2 else layout.batch))

    return _by_rank(of, layout)


def experts(layout: Layout = Layout(1, 1)) -> Structure:
    """Units are experts: the last of the stacked axes.

    Raises:
      ValueError: the layout has no stacked axis.
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
    """The structure of a name: one of STRUCTURES, "2:4" (any n:m) or "16x16" (blocks, rows x columns).

    Raises:
      ValueError: any other name, or an impossible n:m or block.
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
    """The layout of the leaf at a path: the first rule that matches, else Layout()."""
    return next((found for pattern, found in layouts if re.search(pattern, path)), Layout())


def at(path: str, structure: str | Structure, layouts: Sequence[tuple[str, Layout]] = LAYOUTS) -> Structure:
    """The structure to use for the leaf at a path; a name is made to fit the leaf's layout.

    Raises:
      ValueError: an unknown name, or a structure that needs an axis the layout lacks (naming the path).
    """
    if isinstance(structure, Structure):
        return structure
    maker = parse(structure)
    try:
        return maker(layout(path, layouts))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
