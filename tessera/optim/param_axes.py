"""Which axes of a parameter are inputs and outputs, read off its path, and the optimizer parts that must know.

Decay, Muon and adaptive clipping treat matrices and vectors differently, and a shape alone cannot tell them apart once
layers are stacked: [L, D] may be L gains and [L, D, F] is L matrices.
"""

import re
from typing import NamedTuple

import jax
import optax
from jaxtyping import PyTree
from optax import contrib

from sharding.rules import path_name


class Axes(NamedTuple):
    """Axes of one kernel, counted from the end so that leading stacks (layers, experts) stay batch axes."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


# First match wins, on the path with its names joined by "/".
KERNEL_AXES = (
    (r"(^|/)(query|key|value)(_up)?/kernel$", Axes((-3,), (-2, -1))),
    (r"(^|/)attention/output/kernel$", Axes((-3, -2), (-1,))),
    (r"(^|/)conv[^/]*/kernel$", Axes((-4, -3, -2), (-1,))),
    (r"(^|/)kernel$", Axes((-2,), (-1,))),
)
FIRST_AND_LAST = r"^(params/)?(embed|head|output)/"


def kernel_axes(path: tuple) -> Axes | None:
    """Input and output axes of the leaf at `path`, None for what is no kernel (tables, gains, biases)."""
    return next((axes for pattern, axes in KERNEL_AXES if re.search(pattern, path_name(path))), None)


def matrix_axes(params: PyTree) -> PyTree:
    """Muon's dimension numbers for every hidden kernel; None (AdamW) for embeddings, the last layer, gains and biases.

    A projection to heads [D, H, h] is orthogonalised as the matrix D x (H h), the one back as (H h) x D, every layer or
    expert of a stack by itself.
    """

    def dimensions(path, _):
        axes = kernel_axes(path)
        if axes is None or re.search(FIRST_AND_LAST, path_name(path)):
            return None
        return contrib.MuonDimensionNumbers(axes.inputs, axes.outputs)

    return jax.tree_util.tree_map_with_path(dimensions, params)


def clip_units(clipping: float) -> optax.GradientTransformation:
    """optax.adaptive_grad_clip over the input axes of every kernel, so that units of stacked layers are kept apart."""
    free, row = "free", (-1,)

    def label(path, leaf):
        name, axes = path_name(path), kernel_axes(path)
        if re.search(r"^(params/)?(head|output)/", name):
            return free
        # One unit: a table's row, a gain or bias vector.
        return str(axes.inputs if axes else row)

    over = {axes.inputs for _, axes in KERNEL_AXES} | {row}
    transforms = {str(axes): optax.adaptive_grad_clip(clipping, axis=axes) for axes in over}
    return optax.partition(
        {**transforms, free: optax.identity()}, lambda params: jax.tree_util.tree_map_with_path(label, params)
    )
