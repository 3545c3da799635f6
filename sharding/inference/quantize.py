"""Weight quantization to 8 or 4 bits: round to nearest (RTN), AWQ and GPTQ, the latter two with calibration data.

A kernel is a matrix [I, O] here, its inputs split into groups of consecutive ones with one scale per output. Values are
symmetric: -7..7 in 4 bits, -127..127 in 8. Runs on the host in numpy, once before serving.
Axes: see `sharding.inference`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int8

METHODS = ("rtn", "awq", "gptq")
DAMPING = 0.01  # of the mean diagonal, added to a Hessian before it is inverted (Frantar et al. 2022, section 3.3)
GRID = 20  # exponents tried by AWQ (Lin et al. 2023, section 3.2)


@dataclass(frozen=True)
class QuantConfig:
    """Options of weight quantization.

    Attributes:
      bits: 8 or 4.
      method: "rtn" (to nearest), "awq" (Lin et al. 2023) or "gptq" (Frantar et al. 2022).
      group: inputs that share a scale; 0 is all of them.

    Example:
      >>> from sharding.inference import QuantConfig
      >>> QuantConfig(bits=4, method="gptq", group=32).largest
      7
    """

    bits: int = 8
    method: str = "rtn"
    group: int = 0

    def __post_init__(self) -> None:
        if self.bits not in (8, 4):
            raise ValueError(f"bits={self.bits}: choose 8 or 4")
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}: choose one of {', '.join(METHODS)}")
        if self.group < 0:
            raise ValueError(f"group={self.group} must be a size, or 0 for one scale per output")

    @property
    def largest(self) -> int:
        """Largest value."""
        return 2 ** (self.bits - 1) - 1


class Quantized(NamedTuple):
    """A kernel as (values - zeros) * scales / channel: values int8 or int4 in the kernel's shape.

    `scales` float32 of the same rank, its input axes divided by the group size; `channel` float32, one factor per input
    (AWQ) with size 1 in the other axes, or None; `zeros` int8 in the shape of the scales (asymmetric quantization), or
    None. Where groups are not of consecutive inputs (GPTQ's activation order) `groups` int32 has the group of every
    input, without the output axes, and the input axes of scales and zeros are one, of groups.

    Example:
      >>> import numpy as np
      >>> from sharding.inference import QuantConfig, quantize_matrix
      >>> kernel = quantize_matrix(np.eye(8), QuantConfig(bits=8))
      >>> kernel.values.dtype.name, kernel.scales.shape
      ('int8', (1, 8))
    """

    values: Any
    scales: Any
    channel: Any = None
    zeros: Any = None
    groups: Any = None


class Calibration(NamedTuple):
    """Statistics of a layer's inputs on calibration text: sums of x x^T [I, I] and |x| [I], number of rows."""

    hessian: Float64[np.ndarray, "I I"]
    magnitude: Float64[np.ndarray, " I"]
    rows: int


def observe(x_MI: Any) -> Calibration:
    """Compute statistics of calibration inputs, float64.

    Example:
      >>> import numpy as np
      >>> from sharding.inference import observe
      >>> observe(np.ones((10, 3))).magnitude.tolist()
      [10.0, 10.0, 10.0]
    """
    x_MI = np.asarray(x_MI, np.float64)
    return Calibration(x_MI.T @ x_MI, np.abs(x_MI).sum(0), x_MI.shape[0])


def dequantize(kernel: Quantized, dtype: Any = jnp.float32) -> Float[Array, "..."]:
    """Dequantize a kernel to a float dtype; XLA may fuse this into the matrix product.

    Example:
      >>> import numpy as np
      >>> from sharding.inference import QuantConfig, dequantize, quantize_matrix
      >>> w = np.linspace(-1, 1, 32).reshape(8, 4)
      >>> bool(np.abs(dequantize(quantize_matrix(w, QuantConfig(bits=8))) - w).max() < 0.01)
      True
    """
    values, scales = jnp.asarray(kernel.values), jnp.asarray(kernel.scales)
    zeros = None if kernel.zeros is None else jnp.asarray(kernel.zeros).astype(jnp.float32)
    if kernel.groups is not None:
        scales = _spread(scales, kernel.groups, values.shape)
        zeros = None if zeros is None else _spread(zeros, kernel.groups, values.shape)
    # Every axis as (groups, members): of size (1, all) for one scale, (all, 1) for a scale each.
    split = [(s, v // s) for v, s in zip(values.shape, scales.shape, strict=True)]
    grouped = values.reshape([size for pair in split for size in pair]).astype(jnp.float32)
    spread = [size for s, _ in split for size in (s, 1)]
    grouped = grouped if zeros is None else grouped - zeros.reshape(spread)
    result = (grouped * scales.reshape(spread)).reshape(values.shape)
    return (result if kernel.channel is None else result / kernel.channel).astype(dtype)


def _spread(of_groups: jax.Array, groups: Any, shape: tuple[int, ...]) -> jax.Array:
    """Values of groups [*stack, J, *outputs] for every input, from its group [*stack, *inputs]: of a kernel's shape."""
    groups = jnp.asarray(groups)
    stack = of_groups.ndim - 1 - (len(shape) - groups.ndim)
    front, J = shape[:stack], of_groups.shape[stack]
    flat = jnp.take_along_axis(of_groups.reshape(*front, J, -1), groups.reshape(*front, -1, 1), axis=-2)
    return flat.reshape(shape)


def round_to_nearest(
    w_IO: Float[np.ndarray, "I O"], config: QuantConfig
) -> tuple[Int8[np.ndarray, "I O"], Float[np.ndarray, "J O"]]:
    """Round to nearest (RTN): values, and scales [I / group, O] of each group's largest magnitude."""
    inputs, outputs = w_IO.shape
    group = config.group or inputs
    cut_JgO = np.asarray(w_IO, np.float64).reshape(inputs // group, group, outputs)
    scales_JO = np.maximum(np.abs(cut_JgO).max(1), 1e-12) / config.largest
    values_JgO = np.clip(np.round(cut_JgO / scales_JO[:, None]), -config.largest, config.largest)
    return values_JgO.reshape(inputs, outputs).astype(np.int8), scales_JO


def expand(scales_JO: Float[np.ndarray, "J O"], inputs: int) -> Float[np.ndarray, "I O"]:
    """Repeat scales of groups for their inputs."""
    return np.repeat(scales_JO, inputs // scales_JO.shape[0], axis=0)


def gptq(
    w_IO: Float[np.ndarray, "I O"], seen: Calibration, config: QuantConfig
) -> tuple[Int8[np.ndarray, "I O"], Float[np.ndarray, "J O"]]:
    """Quantize by GPTQ: round input by input and compensate the error in the later ones (Frantar et al. 2022, alg. 1).

    The inverse Hessian's Cholesky factor is computed once; a group's scales are set at its first input.

    Args:
      w_IO: the kernel.
      seen: statistics of the inputs; inputs that are always zero are rounded to nearest.
      config: bits and group.

    Returns:
      Values, and scales [I / group, O].
    """
    inputs = w_IO.shape[0]
    group = config.group or inputs
    w_IO = np.array(w_IO, np.float64)
    hessian_II = 2 * seen.hessian.copy()
    dead_I = np.diag(hessian_II) == 0
    hessian_II[dead_I, dead_I] = 1
    hessian_II[np.diag_indices(inputs)] += DAMPING * np.diag(hessian_II).mean()
    factor_II = np.linalg.cholesky(np.linalg.inv(hessian_II)).T  # upper
    values_IO, scales = np.zeros(w_IO.shape, np.int8), []
    for i in range(inputs):
        if i % group == 0:
            scales.append(np.maximum(np.abs(w_IO[i : i + group]).max(0), 1e-12) / config.largest)
        value_O = np.clip(np.round(w_IO[i] / scales[-1]), -config.largest, config.largest)
        values_IO[i] = value_O
        error_O = (w_IO[i] - value_O * scales[-1]) / factor_II[i, i]
        w_IO[i + 1 :] -= np.outer(factor_II[i, i + 1 :], error_O)
    return values_IO, np.stack(scales)


def awq(
    w_IO: Float[np.ndarray, "I O"], seen: Calibration, config: QuantConfig
) -> tuple[Int8[np.ndarray, "I O"], Float[np.ndarray, "J O"], Float[np.ndarray, " I"]]:
    """Quantize by AWQ: scale inputs by a power of their mean magnitude before rounding (Lin et al. 2023, eq. 4 and 5).

    The factor of input i is (mean |x_i|) ** a, a from a grid over [0, 1]; a = 0 is round to nearest, so the error on
    the calibration text is never larger.

    Returns:
      Values, scales [I / group, O], and the factor of every input, by which dequantization divides.
    """
    mean_I = np.maximum(seen.magnitude / max(seen.rows, 1), 1e-8)
    best = None
    for a in np.linspace(0, 1, GRID, endpoint=False):
        channel_I = mean_I**a
        channel_I = channel_I / np.sqrt(channel_I.max() * channel_I.min())
        values, scales = round_to_nearest(w_IO * channel_I[:, None], config)
        found = values * expand(scales, len(mean_I)) / channel_I[:, None]
        lost = output_error(w_IO, found, seen)
        if best is None or lost < best[0]:
            best = lost, values, scales, channel_I
    assert best is not None
    return best[1], best[2], best[3]


def output_error(w_IO: np.ndarray, found_IO: np.ndarray, seen: Calibration) -> float:
    """Compute the squared error of the layer's outputs, summed over calibration rows."""
    gap_IO = np.asarray(w_IO, np.float64) - found_IO
    return float(np.einsum("io,ij,jo->", gap_IO, seen.hessian, gap_IO, optimize=True))


def quantize_matrix(w_IO: Any, config: QuantConfig, seen: Calibration | None = None) -> Quantized:
    """Quantize one kernel [I, O] by RTN, AWQ or GPTQ.

    Args:
      w_IO: the kernel.
      config: options; the group must divide I.
      seen: statistics for AWQ and GPTQ; a layer without inputs (an expert that no token chose) is rounded to nearest.

    Raises:
      ValueError: the group does not divide the inputs.

    Example:
      >>> import numpy as np
      >>> from sharding.inference import QuantConfig, observe, quantize_matrix
      >>> rng = np.random.default_rng(0)
      >>> w, inputs = rng.normal(size=(16, 4)), rng.normal(size=(64, 16))
      >>> quantize_matrix(w, QuantConfig(4, "gptq", group=8), observe(inputs)).scales.shape
      (2, 4)
    """
    w_IO = np.asarray(w_IO, np.float64)
    if config.group and w_IO.shape[0] % config.group:
        raise ValueError(f"group={config.group} does not divide the {w_IO.shape[0]} inputs of a kernel")
    channel = None
    if config.method == "rtn" or seen is None or not seen.rows:
        values, scales = round_to_nearest(w_IO, config)
        channel = np.ones(w_IO.shape[0]) if config.method == "awq" else None
    elif config.method == "gptq":
        values, scales = gptq(w_IO, seen, config)
    else:
        values, scales, channel = awq(w_IO, seen, config)
    dtype = jnp.int4 if config.bits == 4 else jnp.int8
    factor = None if channel is None else np.asarray(channel[:, None], np.float32)
    return Quantized(np.asarray(values).astype(dtype), np.asarray(scales, np.float32), factor)


def is_quantized(node: Any) -> bool:
    """Whether a node of a parameter tree is a quantized kernel."""
    return isinstance(node, Quantized)


def stored_bytes(params: Any) -> float:
    """Count the bytes of a tree of parameters, two 4-bit values to a byte."""
    sizes = (leaf.size * (0.5 if leaf.dtype == jnp.int4 else leaf.dtype.itemsize) for leaf in jax.tree.leaves(params))
    return float(sum(sizes))
