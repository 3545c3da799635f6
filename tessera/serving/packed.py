"""Quantized weights of Hugging Face directories, as GPTQ, AWQ, compressed-tensors and fp8 store them.

What is packed is found by the names of the tensors beside a projection, not by lists of modules, and every value is
read as it is: `kernel` makes a `Quantized` of 4 or 8 bits without rounding again; float8 is widened. O and I are
outputs and inputs of a projection, J groups of inputs that share a scale.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Int8

from sharding.inference.quantize import Quantized
from tessera.serving.families import NotConvertible

METHODS = ("gptq", "awq", "compressed-tensors", "fp8")
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
FLOAT8 = "F8_E4M3"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output of a group of eight that the k-th four bits of a word hold
WEIGHT = ".weight"


# Entries of a method, with the values that are read, where they are said.
VALID: dict[str, dict[str, tuple[Any, ...]]] = {
    "gptq": {
        "bits": (4, 8),
        "checkpoint_format": (None, "gptq", "gptq_v2"),
        "format": (None, "gptq", "gptq_v2"),
        "pack_dtype": (None, "int32"),
        "dynamic": (None, {}),
        "is_marlin_format": (None, False),
    },
    "awq": {"bits": (4,), "version": (None, "gemm", "GEMM"), "format": (None, "gemm")},
    "fp8": {"fmt": (None, "e4m3"), "scale_fmt": (None,)},
}


class Scheme(NamedTuple):
    """How the quantized weights of a directory are stored.

    Attributes:
      method: one of `METHODS`.
      zero: added to every stored zero point, the 1 that GPTQ's first format takes off.
      block: outputs and inputs that share a scale of float8; () for whole rows.
      activations: whether the model was made to have its activations quantized too.
    """

    method: str
    zero: int = 0
    block: tuple[int, ...] = ()
    activations: bool = False


class Packed(NamedTuple):
    """A projection as (values - zeros) * scales, the last two of the group of an input."""

    values_OI: Int8[np.ndarray, "O I"] | Float[np.ndarray, "O I"]
    scales_OJ: Float[np.ndarray, "O J"]
    zeros_OJ: Int8[np.ndarray, "O J"]
    groups_I: Int[np.ndarray, " I"]
    bits: int

    def widen(self) -> Float[np.ndarray, "O I"]:
        """The projection in float32."""
        values_OI = self.values_OI.astype(np.float32) - self.zeros_OJ[:, self.groups_I]
        return values_OI * self.scales_OJ[:, self.groups_I]


def scheme(entry: Any, where: str) -> Scheme | None:
    """What config.json's `quantization_config` says; None without one.

    Raises:
      NotConvertible: another method, or a layout that is not read.
    """
    if entry is None:
        return None
    if not isinstance(entry, Mapping) or entry.get("quant_method") not in METHODS:
        method = entry.get("quant_method") if isinstance(entry, Mapping) else entry
        raise NotConvertible(
            f"{where}: quantization_config with quant_method={method!r} is not read; {', '.join(METHODS)} are"
        )
    method, block = entry["quant_method"], ()
    if method == "compressed-tensors":
        wrong = _wrong_groups(entry)
    else:
        found = {"bits": entry.get("w_bit")} | dict(entry)
        wrong = {name: found[name] for name, fine in VALID[method].items() if name in found and found[name] not in fine}
    layout = entry.get("checkpoint_format") or entry.get("format")
    if method == "fp8" and (sizes := entry.get("weight_block_size")) is not None:
        if isinstance(sizes, Sequence) and len(sizes) == 2 and all(isinstance(n, int) and n > 0 for n in sizes):
            block = tuple(sizes)
        else:
            wrong["weight_block_size"] = sizes
    if wrong:
        said = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        raise NotConvertible(f"{where}: quantization_config of {method} with {said} is not read")
    groups = entry.get("config_groups", {}).values() if method == "compressed-tensors" else ()
    activations = method == "fp8" or any(group.get("input_activations") for group in groups)
    return Scheme(method, int(method == "gptq" and layout != "gptq_v2"), block, activations)


def _wrong_groups(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of compressed-tensors that are not read."""
    valid: dict[str, tuple[Any, ...]] = {
        "kv_cache_scheme": (None, {}),
        "transform_config": (None, {}),
        "format": FORMATS,
    }
    wrong = {name: entry.get(name) for name in valid if entry.get(name) not in valid[name]}
    sparsity = entry.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        wrong["sparsity_config"] = sparsity
    groups = entry.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(one, Mapping) for one in groups.values()):
        return wrong | {"config_groups": groups}
    for name, group in groups.items():
        weights = group.get("weights")
        if not isinstance(weights, Mapping):
            wrong[f"config_groups.{name}.weights"] = weights
            continue
        real = weights.get("type") == "float"
        allowed: dict[str, tuple[Any, ...]] = {"num_bits": (8,) if real else (4, 8), "type": ("int", "float")}
        allowed["strategy"] = ("tensor", "channel", "group", None)
        for key, one in allowed.items():
            if weights.get(key) not in one:
                wrong[f"config_groups.{name}.weights.{key}"] = weights.get(key)
        if group.get("format") not in (None, *FORMATS):
            wrong[f"config_groups.{name}.format"] = group["format"]
    return wrong


class Module(NamedTuple):
    """A quantized projection of the files.

    Attributes:
      parts: last part of a tensor's name -> the whole name.
      shape: of the projection, (O, I).
      float8: whether its values are float8, not whole numbers.
    """

    parts: Mapping[str, str]
    shape: tuple[int, int]
    float8: bool = False


# The tensors of a quantized projection: those that it must have, and may have besides. Scales of inputs are of
# activations, which are not quantized here.
PARTS = {
    "qweight": (("qzeros", "scales"), ("g_idx",)),
    "weight_packed": (("weight_scale", "weight_shape"), ("weight_zero_point", "weight_g_idx", "input_scale")),
    "weight": (("weight_scale",), ("weight_zero_point", "weight_g_idx", "input_scale", "input_zero_point")),
    "fp8": (("weight_scale_inv",), ("activation_scale",)),
}


def find(
    how: Scheme,
    tensors: Mapping[str, tuple[tuple[int, ...], str]],
    get: Callable[[str], np.ndarray],
    where: str,
) -> dict[str, Module]:
    """The quantized projections among tensors, by the name that their weight has unquantized.

    Args:
      how: from `scheme`.
      tensors: name -> shape and safetensors' name of the dtype.
      get: name -> tensor, of which shapes are read.
      where: for messages.

    Raises:
      NotConvertible: tensors of a projection that are missing, or of shapes and dtypes that do not go together.
    """
    found: dict[str, Module] = {}
    for name, (shape, dtype) in tensors.items():
        stem, _, last = name.rpartition(".")
        packed = last == {"gptq": "qweight", "awq": "qweight", "compressed-tensors": "weight_packed"}.get(how.method)
        plain = {"fp8": (FLOAT8,), "compressed-tensors": ("I8", FLOAT8)}.get(how.method, ())
        if not packed and not (last == "weight" and dtype in plain):
            continue
        must, may = PARTS["fp8" if how.method == "fp8" else last]
        parts = {part: f"{stem}.{part}" for part in (last, *must, *may) if f"{stem}.{part}" in tensors}
        if missing := [f"{stem}.{part}" for part in must if part not in parts]:
            raise NotConvertible(f"{where}: {name} without {', '.join(missing)}")
        if len(shape) != 2 or (packed and dtype != "I32"):
            raise NotConvertible(f"{where}: {name} {dtype}{list(shape)} is no matrix of a quantized projection")
        size = (int(shape[0]), int(shape[1]))
        if last == "qweight" and how.method == "awq":
            size = (8 * size[1], size[0])
        elif last == "qweight":  # as many values to a word as its zero points have
            zeros, scales = (math.prod(tensors[parts[part]][0]) for part in ("qzeros", "scales"))
            size = (size[1], size[0] * (scales // max(zeros, 1)))
        elif last == "weight_packed":
            said = np.asarray(get(parts["weight_shape"])).reshape(-1).tolist()
            if len(said) != 2:
                raise NotConvertible(f"{where}: {parts['weight_shape']} has {len(said)} sizes, not two")
            size = (int(said[0]), int(said[1]))
        found[stem + WEIGHT] = Module(parts, size, dtype == FLOAT8)
    return found


def read(how: Scheme, module: Module, get: Callable[[str], np.ndarray]) -> Packed:
    """One quantized projection.

    Raises:
      NotConvertible: tensors whose shapes do not go together, bits that are not read, groups that are none.
    """
    tensors = {part: np.asarray(get(name)) for part, name in module.parts.items()}
    name = next(iter(module.parts.values()))
    try:
        found = _read(how, tensors)
        outputs, inputs = found.values_OI.shape
        J = found.scales_OJ.shape[1]
        fits = found.scales_OJ.shape == found.zeros_OJ.shape == (outputs, J) and found.groups_I.shape == (inputs,)
        fits = fits and found.groups_I.dtype.kind in "iu" and (outputs, inputs) == module.shape
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise NotConvertible(f"{name}: the tensors of this quantized projection do not go together: {error}") from error
    if not fits or found.groups_I.min(initial=0) < 0 or found.groups_I.max(initial=0) >= J:
        shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in tensors.items())
        raise NotConvertible(f"{name}: the tensors of this quantized projection do not go together: {shapes}")
    return found


def _read(how: Scheme, tensors: Mapping[str, np.ndarray]) -> Packed:
    if how.method in ("gptq", "awq"):
        words, scales_JO = tensors["qweight"], tensors["scales"].astype(np.float32)
        outputs = scales_JO.shape[1]
        bits = 32 * tensors["qzeros"].shape[1] // outputs
        _check_bits(bits)
        if how.method == "awq":
            values_IO, zeros_JO = (_unpack(one, bits, 1, AWQ_ORDER) for one in (words, tensors["qzeros"]))
        else:
            values_IO, zeros_JO = _unpack(words, bits, 0), _unpack(tensors["qzeros"], bits, 1) + how.zero
        inputs, half = values_IO.shape[0], 2 ** (bits - 1)
        groups_I = tensors.get("g_idx", _in_order(inputs, scales_JO.shape[0]))
        zeros_OJ = (zeros_JO.T - half).astype(np.int8)
        return Packed((values_IO.T - half).astype(np.int8), scales_JO.T, zeros_OJ, groups_I, bits)
    if how.method == "fp8":
        return _read_blocks(how, tensors["weight"].astype(np.float32), tensors["weight_scale_inv"].astype(np.float32))
    scales_OJ = tensors["weight_scale"].astype(np.float32)
    zeros = tensors.get("weight_zero_point")
    if zeros is not None and zeros.dtype.kind not in "iu":
        raise ValueError("zero points are whole numbers")
    if "weight_packed" in tensors:
        outputs, inputs = (int(size) for size in tensors["weight_shape"].reshape(-1))
        bits = 32 * tensors["weight_packed"].shape[1] // inputs
        _check_bits(bits)
        half = 2 ** (bits - 1)
        values_OI = (_unpack(tensors["weight_packed"], bits, 1)[:, :inputs] - half).astype(np.int8)
        if zeros is not None:
            zeros = _unpack(zeros, bits, 0)[:outputs] - half
    else:
        values_OI, bits = tensors["weight"], 8
        values_OI = values_OI if values_OI.dtype == np.int8 else values_OI.astype(np.float32)
        outputs, inputs = values_OI.shape
    if scales_OJ.size == 1:  # of the whole tensor
        scales_OJ = np.full((outputs, 1), scales_OJ.reshape(()), np.float32)
        zeros = None if zeros is None else np.full((outputs, 1), zeros.reshape(()))
    scales_OJ = scales_OJ.reshape(outputs, -1)
    zeros_OJ = np.zeros(scales_OJ.shape, np.int8) if zeros is None else zeros.reshape(outputs, -1).astype(np.int8)
    groups_I = tensors.get("weight_g_idx", _in_order(inputs, scales_OJ.shape[1]))
    return Packed(values_OI, scales_OJ, zeros_OJ, groups_I, bits)


def _read_blocks(how: Scheme, values_OI: np.ndarray, scales: np.ndarray) -> Packed:
    """Float8 with a scale for every block of outputs and inputs, or one for all."""
    outputs, inputs = values_OI.shape
    rows, columns = how.block or (outputs, inputs)
    scales_OJ = np.repeat(scales.reshape(-(-outputs // rows), -(-inputs // columns)), rows, axis=0)[:outputs]
    return Packed(values_OI, scales_OJ, np.zeros(scales_OJ.shape, np.int8), np.arange(inputs) // columns, 8)


def _check_bits(bits: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"{bits} bits a value; 4 and 8 are read")


def _in_order(inputs: int, groups: int) -> np.ndarray:
    if inputs % groups:
        raise ValueError(f"{groups} groups of {inputs} inputs")
    return np.arange(inputs) // (inputs // groups)


def _unpack(words: np.ndarray, bits: int, axis: int, order: Sequence[int] | None = None) -> np.ndarray:
    """Whole numbers of `bits` from words of 32, the lowest first, along an axis; int16.

    Args:
      words: int32 [R, C].
      bits: of a number.
      axis: 0 or 1.
      order: place of the k-th number among those of its word; default k.
    """
    if words.dtype != np.int32 or words.ndim != 2:
        raise ValueError(f"packed numbers are int32 in a matrix, not {words.dtype}{list(words.shape)}")
    parts = np.ascontiguousarray(words).view(np.uint32)[..., None] >> np.arange(0, 32, bits, dtype=np.uint32) & (
        2**bits - 1
    )
    parts = parts.astype(np.int16)
    if order is not None:
        parts = parts[..., np.argsort(order)]
    if axis == 1:
        return parts.reshape(len(words), -1)
    return parts.transpose(0, 2, 1).reshape(-1, words.shape[1])


def rows(found: Packed, first: int, last: int) -> Packed:
    """Some outputs of a projection."""
    cut = slice(first, last)
    return found._replace(values_OI=found.values_OI[cut], scales_OJ=found.scales_OJ[cut], zeros_OJ=found.zeros_OJ[cut])


def kernel(
    members: Sequence[Packed], shape: tuple[int, ...], inputs: int, arrange: Callable[[np.ndarray], np.ndarray]
) -> Quantized | None:
    """Projections of equal shape as one `Quantized` [N, *shape]; None where their bits or groups differ.

    Args:
      members: N projections.
      shape: of a kernel, its input axes first.
      inputs: number of its input axes.
      arrange: order of the outputs, along the last axis.
    """
    into, out = shape[:inputs], shape[inputs:]
    J = members[0].scales_OJ.shape[1]
    if any(one.bits != members[0].bits or one.scales_OJ.shape[1] != J for one in members):
        return None
    ordered = math.prod(into) % J == 0 and all(
        np.array_equal(one.groups_I, _in_order(math.prod(into), J)) for one in members
    )

    def stack(arrays: Sequence[np.ndarray], front: tuple[int, ...], dtype: Any) -> np.ndarray:
        found = [arrange(np.ascontiguousarray(array.T).reshape(*front, *out)).astype(dtype) for array in arrays]
        return np.stack(found)

    groups = None
    if ordered:  # a group spans no two rows of the last input axis: those of several are repeated
        group = math.gcd(math.prod(into) // J, into[-1])
        front = (1,) * inputs if J == 1 else (*into[:-1], into[-1] // group)
        chosen = [one.groups_I[::group] if J > 1 else one.groups_I[:1] for one in members]
    else:
        front, chosen = (J,), [np.arange(J)] * len(members)
        groups = np.stack([one.groups_I.reshape(into).astype(np.int32) for one in members])
    of_groups = list(zip(members, chosen, strict=True))
    zeros = None
    if any(one.zeros_OJ.any() for one in members):
        zeros = stack([one.zeros_OJ[:, which] for one, which in of_groups], front, np.int8)
    values = stack([one.values_OI for one in members], into, jnp.int4 if members[0].bits == 4 else np.int8)
    scales = stack([one.scales_OJ[:, which] for one, which in of_groups], front, np.float32)
    return Quantized(values, scales, None, zeros, groups)
