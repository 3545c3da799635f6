"""Export tickets: a packed mask, one bit a weight, and the surviving weights, in safetensors (`FORMAT` in the header).

Parameters of the dtypes in `DTYPES` are stored; numpy alone cannot read 8-bit floats, which `save` refuses.

A masked leaf is two tensors: `<path>` with the surviving values in the order of the flat index, and `<path>.mask`, the
mask's bits packed into bytes (numpy's packbits, first weight in the highest bit). Its shape is in the header's
metadata. A leaf without zeros in its mask is one plain tensor. The metadata hold the SHA-256 of the file, taken with 64
zeros in its place; files of the first format, which had none, are read.

`load` needs numpy and the standard library only: copy this function into any project that should read tickets.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from lottery import masks as masks_lib

__all__ = ["DTYPES", "FORMAT", "load", "save", "unflatten"]

FORMAT = "tessera-ticket-2"
DTYPES = ("float64", "float32", "float16", "bfloat16", "bool") + tuple(
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
)


def save(path: str | Path, params: PyTree, masks: PyTree, metadata: dict[str, str] | None = None) -> Path:
    """Save one ticket (not a stack) and return the path. The file appears complete or not at all.

    Args:
      path: of the file, usually ending in .safetensors.
      params: parameters of the dtypes of `DTYPES`; weights outside the mask are not stored.
      masks: bool tree like params.
      metadata: further strings for the header.

    Raises:
      ValueError: masks does not fit, a path that ends in ".mask", two leaves with one path, or a dtype that `load`
        could not read (naming the leaf).
      ImportError: the extra "export" is not installed.

    Example:
      >>> import tempfile
      >>> params, mask = {"kernel": jnp.array([1.0, 2.0])}, {"kernel": jnp.array([True, False])}
      >>> path = lottery.export.save(tempfile.mkdtemp() + "/ticket.safetensors", params, mask)
      >>> path.name
      'ticket.safetensors'
    """
    try:
        from safetensors.numpy import save as encode
    except ImportError as error:
        raise ImportError("saving tickets needs the extra `hf`: pip install 'tessera-jax[hf]'") from error
    masks_lib.check(masks, params)
    tensors: dict[str, np.ndarray] = {}
    shapes: dict[str, list[int]] = {}
    flat = masks_lib.flatten(masks)
    for name, leaf in masks_lib.flatten(params).items():
        if name.endswith(".mask"):
            raise ValueError(f"{name}: a parameter's name may not end in .mask")
        mask, values = np.asarray(flat[name]), np.asarray(leaf)
        if str(values.dtype) not in DTYPES:
            raise ValueError(f"{name} has dtype {values.dtype}; tickets hold {', '.join(DTYPES)}: convert it first")
        if mask.all():
            tensors[name] = np.asarray(values, order="C")
            continue
        tensors[name], tensors[f"{name}.mask"] = values[mask], np.packbits(mask.ravel())
        shapes[name] = list(values.shape)
    blank = "0" * 64
    header = {**(metadata or {}), "format": FORMAT, "shapes": json.dumps(shapes), "sha256": blank}
    data = encode(tensors, header)
    mark, digest = f'"sha256":"{blank}"'.encode(), hashlib.sha256(data).hexdigest()
    if data.count(mark) != 1:
        raise RuntimeError("this safetensors writes its header in another way: `load` would refuse the file")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data.replace(mark, f'"sha256":"{digest}"'.encode(), 1))
    partial.replace(path)
    return path


def load(path):
    """Load a ticket: ({path: dense array}, {path: bool mask}, metadata). numpy only; bfloat16 comes as float32.

    Raises:
      ValueError: the file is not a ticket, or is damaged; nothing larger than the file's own content is allocated.

    Example:
      >>> import tempfile
      >>> params, mask = {"kernel": jnp.array([1.0, 2.0])}, {"kernel": jnp.array([True, False])}
      >>> path = lottery.export.save(tempfile.mkdtemp() + "/ticket.safetensors", params, mask)
      >>> params, masks, metadata = lottery.export.load(path)
      >>> params["kernel"].tolist(), masks["kernel"].tolist()
      ([1.0, 0.0], [True, False])
    """
    import hashlib
    import json
    import math

    import numpy as np

    types = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?"}
    types |= {f"{sign.upper()}{8 * size}": f"<{sign}{size}" for sign in "iu" for size in (1, 2, 4, 8)}

    def need(condition, what):
        if not condition:
            raise ValueError(f"{path}: {what}")

    def is_sizes(x):
        return isinstance(x, list) and all(type(n) is int and n >= 0 for n in x)

    def is_shape(x):
        return is_sizes(x) and math.prod(max(n, 1) for n in x) < 2**56  # numpy refuses others, also of no element

    with open(path, "rb") as file:
        data = file.read()
    size = int.from_bytes(data[:8], "little")
    need(8 <= len(data) and size <= len(data) - 8, "not a safetensors file, or cut off")
    try:
        header = json.loads(data[8 : 8 + size])
        metadata = header.pop("__metadata__", {})
        kind, digest = metadata.get("format"), metadata.get("sha256")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, or not a safetensors file: its header is no JSON object") from error
    need(kind in ("tessera-ticket-1", "tessera-ticket-2"), f"format {kind!r}, not 'tessera-ticket-1' or '-2'")
    if kind != "tessera-ticket-1":
        need(isinstance(digest, str) and len(digest) == 64, "damaged: no SHA-256 in its header")
        blank = data[: 8 + size].replace(digest.encode(errors="replace"), b"0" * 64, 1) + data[8 + size :]
        need(hashlib.sha256(blank).hexdigest() == digest, "damaged, or cut off: its SHA-256 differs")
    try:
        shapes = json.loads(metadata["shapes"])
        entries = {name: (types[e["dtype"]], e["shape"], *e["data_offsets"]) for name, e in header.items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: a header that `save` does not write ({error!r})") from error
    need(isinstance(shapes, dict) and all(map(is_shape, shapes.values())), "damaged: shapes must be lists of sizes")
    tensors = {}
    for name, (dtype, shape, *offsets) in entries.items():
        need(is_shape(shape) and is_sizes(offsets) and len(offsets) == 2, f"damaged: shape or offsets of {name}")
        begin, end = (8 + size + offset for offset in offsets)
        need(end <= len(data), f"{name} is cut off")
        need(end - begin == math.prod(shape) * np.dtype(dtype).itemsize, f"damaged: {name} is not {dtype} {shape}")
        array = np.frombuffer(data[begin:end], dtype).reshape(shape)
        if header[name]["dtype"] == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = array
    params, masks = {}, {}
    for name in [name for name in tensors if not name.endswith(".mask")]:
        if name not in shapes:
            params[name], masks[name] = tensors[name], np.ones(tensors[name].shape, bool)
            continue
        count, bits = math.prod(shapes[name]), tensors.get(f"{name}.mask")
        fits = bits is not None and bits.dtype == np.uint8 and bits.shape == (-(-count // 8),)
        need(fits, f"damaged: {name}.mask does not hold {count} bits")
        mask = np.unpackbits(bits, count=count).astype(bool).reshape(shapes[name])
        need(tensors[name].shape == (mask.sum(),), f"damaged: {name} has not as many values as its mask")
        dense = np.zeros(shapes[name], tensors[name].dtype)
        dense[mask] = tensors[name]
        params[name], masks[name] = dense, mask
    return params, masks, metadata


def unflatten(flat: Mapping[str, Any]) -> dict[str, PyTree]:
    """Nest '/'-joined paths into dicts, the shape of Flax's parameters.

    Raises:
      ValueError: a path that is the beginning of another one.

    Example:
      >>> lottery.export.unflatten({"dense0/bias": np.zeros(2)})
      {'dense0': {'bias': array([0., 0.])}}
    """
    tree: dict[str, PyTree] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path}: {parent} is a leaf and a folder")
        if name in node:
            raise ValueError(f"{path} is a leaf and a folder")
        node[name] = leaf
    return tree
