"""Export tickets: a packed mask, one bit a weight, and the surviving weights, in safetensors (`FORMAT` in the header).

Parameters of the dtypes in `DTYPES` are stored; numpy alone cannot read 8-bit floats, which `save` refuses.

A masked leaf is two tensors: `<path>` with the surviving values in the order of the flat index, and `<path>.mask`, the
mask's bits packed into bytes (numpy's packbits, first weight in the highest bit). Its shape is in the header's
metadata. A leaf without zeros in its mask is one plain tensor.

`load` needs numpy and the standard library only: copy this function into any project that should read tickets.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from lottery import masks as masks_lib

__all__ = ["DTYPES", "FORMAT", "load", "save", "unflatten"]

FORMAT = "tessera-ticket-1"
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
        from safetensors.numpy import save_file
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
            tensors[name] = np.ascontiguousarray(values)
            continue
        tensors[name], tensors[f"{name}.mask"] = values[mask], np.packbits(mask.ravel())
        shapes[name] = list(values.shape)
    header = {**(metadata or {}), "format": FORMAT, "shapes": json.dumps(shapes)}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, header)
    partial.replace(path)
    return path


def load(path):
    """Load a ticket: ({path: dense array}, {path: bool mask}, metadata). numpy only; bfloat16 comes as float32.

    Raises:
      ValueError: the file is not a ticket.

    Example:
      >>> import tempfile
      >>> params, mask = {"kernel": jnp.array([1.0, 2.0])}, {"kernel": jnp.array([True, False])}
      >>> path = lottery.export.save(tempfile.mkdtemp() + "/ticket.safetensors", params, mask)
      >>> params, masks, metadata = lottery.export.load(path)
      >>> params["kernel"].tolist(), masks["kernel"].tolist()
      ([1.0, 0.0], [True, False])
    """
    import json

    import numpy as np

    types = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?"}
    types |= {f"{sign.upper()}{8 * size}": f"<{sign}{size}" for sign in "iu" for size in (1, 2, 4, 8)}
    with open(path, "rb") as file:
        data = file.read()
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError(f"{path}: not a safetensors file, or cut off")
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    if metadata.get("format") != "tessera-ticket-1":
        raise ValueError(f"{path}: format {metadata.get('format')!r}, not 'tessera-ticket-1'")
    shapes = json.loads(metadata["shapes"])
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        if end > len(data):
            raise ValueError(f"{path}: {name} is cut off")
        array = np.frombuffer(data[begin:end], types[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = array
    params, masks = {}, {}
    for name in [name for name in tensors if not name.endswith(".mask")]:
        if name not in shapes:
            params[name], masks[name] = tensors[name], np.ones(tensors[name].shape, bool)
            continue
        count = int(np.prod(shapes[name]))
        mask = np.unpackbits(tensors[f"{name}.mask"], count=count).astype(bool).reshape(shapes[name])
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
