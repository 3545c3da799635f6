"""Pytrees as directories that are whole or absent, with checksums that are compared when they are read.

Orbax writes the arrays. What it does not notice is a file that changed after it was written (a flipped byte restores as
another number), so a description with checksums of the arrays, computed on device, lies beside them.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from jaxtyping import PyTree

ENTRIES = {"state", "meta", "metrics", "_CHECKPOINT_METADATA", "commit_success.txt"}  # of a saved directory


class CheckpointDamaged(RuntimeError):
    """A checkpoint that is truncated, altered or unreadable."""


class CheckpointMismatch(ValueError):
    """A sound checkpoint of another model or optimizer."""


class NotOurs(FileExistsError):
    """Something that would be removed or replaced and was not written by this code."""


def save_tree(path: Path | str, tree: PyTree, extra: Mapping[str, Any] | None = None) -> None:
    """Write one pytree as the directory `path`, which is absent or complete at any moment.

    An artefact that stood there is replaced. `extra` are JSON-able values, read back by `load_extra`.

    Raises:
      NotOurs: what stands there is no artefact; it is left as it is.
    """
    path = Path(path).absolute()
    fresh, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        refuse_foreign(path)
        for leftover in (fresh, old):
            remove_tree(leftover)
    barrier("tessera:save_tree")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(fresh, args=save_args(tree, {"extra": dict(extra or {})}), force=True)
    if jax.process_index() == 0:
        if path.exists():
            os.replace(path, old)
        os.replace(fresh, path)
        remove_tree(old)
    barrier("tessera:save_tree:done")


def remove_tree(path: Path) -> None:
    """Remove what `save_tree` wrote, if it is there.

    Raises:
      NotOurs: it is something else; it is left as it is.
    """
    refuse_foreign(path)
    shutil.rmtree(path, ignore_errors=True)


def refuse_foreign(path: Path) -> None:
    """Raise NotOurs if something stands at `path` that is not, judged by its entries, a directory of this module."""
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise NotOurs(f"{path} is not a directory that a run saved; move it away, or use another directory")
    foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in ENTRIES)
    if foreign:
        raise NotOurs(
            f"{path} stands where a run saves and holds what no run wrote: {', '.join(foreign[:10])}; move it away, "
            "or use another directory"
        )


def load_tree(path: Path | str, like: PyTree) -> PyTree:
    """Read what `save_tree` wrote, into the structure, dtypes and shardings of `like` (arrays or ShapeDtypeStructs).

    Raises:
      FileNotFoundError: nothing is there.
      CheckpointDamaged: it is truncated or altered.
      CheckpointMismatch: it holds other arrays than `like`.
    """
    read = _reader(path)
    return read_state(read, abstract(like), read_meta(read, str(path)), str(path))


def load_extra(path: Path | str) -> dict[str, Any]:
    """Read the `extra` values that `save_tree` wrote; same errors as `load_tree`."""
    return read_meta(_reader(path), str(path))["extra"]


def _reader(path: Path | str) -> Callable[[Any], Any]:
    """The function that reads items of an artefact of `save_tree`."""
    path = Path(path).absolute()
    if not path.exists():
        raise FileNotFoundError(f"nothing saved at {path}")
    return partial(open_item, path)


def open_item(path: Path, args: Any) -> Any:
    """Read items of a directory that Orbax wrote, and leave the directory as it is."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(path, args=args)


def abstract(tree: PyTree) -> PyTree:
    """Shapes, dtypes and shardings of a pytree without its arrays (NumPy arrays stay, and restore as NumPy)."""

    def leaf(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x

    return jax.tree.map(leaf, tree)


def barrier(name: str) -> None:
    """Wait until every process is here, if there are several; `name` must be the same on all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agreed(value: int | bool, *, all_of: bool = False) -> int:
    """One value for all processes: the first one's, or with `all_of` whether it is true on every one."""
    if jax.process_count() == 1:
        return int(value)
    if all_of:
        return int(np.all(multihost_utils.process_allgather(np.int32(value))))
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def save_args(state: PyTree, meta: dict[str, Any]) -> ocp.args.Composite:
    """What Orbax is to write: the arrays of `state`, and `meta` with their checksums, itself under a checksum."""
    text = json.dumps(meta | {"arrays": checksums(state)})
    sealed = {"text": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(sealed))


def read_meta(read: Any, name: str) -> dict[str, Any]:
    """What `save_args` wrote as meta; `read` restores items, `name` is for messages. Raises CheckpointDamaged."""
    try:
        sealed = read(ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        text = sealed["text"]
        sound = hashlib.sha256(text.encode()).hexdigest() == sealed["sha256"]
    except Exception as error:  # Orbax raises many kinds for files it cannot read
        raise CheckpointDamaged(f"{name} is damaged: its description cannot be read ({short(error)})") from error
    if not sound:
        raise CheckpointDamaged(f"{name} is damaged: the checksum of its description differs")
    return json.loads(text)


def read_state(read: Any, like: PyTree, meta: dict[str, Any], name: str) -> PyTree:
    """The arrays, checked against their description; `like` None takes them as they come.

    Raises:
      CheckpointDamaged: they cannot be read or are not those of the description.
      CheckpointMismatch: `like` has other paths, shapes or dtypes.
    """
    wanted = (
        None if like is None else {name_of(path): signature(x) for path, x in jax.tree_util.tree_leaves_with_path(like)}
    )
    saved = {path: (dtype, shape) for path, (dtype, shape, _, _) in meta["arrays"].items()}
    if wanted is not None and wanted != saved:
        paths = [path for path in saved | wanted if saved.get(path) != wanted.get(path)]
        shown = "; ".join(
            f"{path}: saved {_show(saved.get(path))}, wanted {_show(wanted.get(path))}" for path in paths[:5]
        )
        raise CheckpointMismatch(f"{name} holds other arrays than this run ({len(paths)} differ): {shown}")
    try:
        state = read(ocp.args.Composite(state=ocp.args.StandardRestore(like))).state
    except Exception as error:
        raise CheckpointDamaged(f"{name} is damaged: its arrays cannot be read ({short(error)})") from error
    found = checksums(state)
    wrong = [path for path in found | meta["arrays"] if found.get(path) != meta["arrays"].get(path)]
    if wrong:
        raise CheckpointDamaged(f"{name} is damaged: checksums differ for {', '.join(wrong[:5])}")
    return state


def _show(signature: tuple[str, list[int]] | None) -> str:
    return "nothing" if signature is None else f"{signature[0]}{signature[1]}"


def short(error: Exception) -> str:
    """Kind and first line of an error."""
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line[:160]}"


class ArtifactStore:
    """States of one thing under way, each an artifact `<prefix><step>` of `save_tree` in one directory.

    A run that was killed goes on from `latest`, which passes over a damaged save.
    """

    def __init__(self, directory: Path | str, prefix: str = ""):
        self.directory, self.prefix = Path(directory), prefix

    def steps(self) -> list[int]:
        """Steps of the states saved, ascending."""
        names = (path.name.removeprefix(self.prefix) for path in self.directory.glob(self.prefix + "*"))
        return sorted(int(name) for name in names if name.isdigit())

    def path(self, step: int) -> Path:
        """The directory of the state after `step`."""
        return self.directory / f"{self.prefix}{step}"

    def save(self, step: int, tree: PyTree, extra: Mapping[str, Any] | None = None) -> None:
        """Write the state after `step` and JSON-able values beside it."""
        save_tree(self.path(step), tree, extra)

    def latest(self, like: PyTree, before: int | None = None) -> tuple[int, PyTree, dict[str, Any]] | None:
        """(step, tree, extra) of the newest sound state, at or before a step; None if there is none.

        Damaged states are reported in the log.

        Raises:
          CheckpointMismatch: it holds other arrays than `like`.
        """
        for step in reversed(self.steps()):
            if before is None or step <= before:
                try:
                    return step, load_tree(self.path(step), like), load_extra(self.path(step))
                except CheckpointDamaged as error:
                    logging.warning("%s; it is not used", error)
        return None

    def clear(self, before: int | None = None) -> None:
        """Remove the states of steps below `before` (all, if None); NotOurs as of `remove_tree`."""
        for step in self.steps():
            if before is None or step < before:
                remove_tree(self.path(step))


def checksums(tree: PyTree) -> dict[str, list]:
    """Dtype, shape and two 32-bit checksums of each leaf, by path.

    The checksums are integer sums modulo 2^32 of the array's words, plain and weighted by position, so they are equal
    under every sharding and device, and any single altered word changes the first. They are computed where the array
    lives.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {name_of(path): leaf for path, leaf in leaves}
    on_device = {name: leaf for name, leaf in arrays.items() if isinstance(leaf, jax.Array)}
    sums = jax.device_get(_device_sums(on_device))
    sums |= {name: _sums(_words_numpy(np.asarray(leaf)), np) for name, leaf in arrays.items() if name not in on_device}
    return {name: [*signature(leaf), int(sums[name][0]), int(sums[name][1])] for name, leaf in arrays.items()}


def name_of(path: tuple) -> str:
    """A leaf's path as JAX's tree functions give it, as one string: "params/embed/table"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def signature(leaf: Any) -> tuple[str, list[int]]:
    """Dtype and shape of an array, a scalar or a `jax.ShapeDtypeStruct`, as JSON values."""
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return str(leaf.dtype), list(leaf.shape)


@jax.jit
def _device_sums(arrays: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    return {name: _sums(_words_jax(array), jnp) for name, array in arrays.items()}


def _sums(words: Any, xp: Any) -> tuple[Any, Any]:
    weights = xp.ones((1,) * words.ndim, np.uint32)
    for axis, size in enumerate(words.shape):
        shape = [1] * words.ndim
        shape[axis] = size
        # Even multipliers far apart: neighbours on any axis get different weights, and every weight is odd.
        multiplier = np.uint32((0x9E3779B2 + 0x3C6EF372 * axis) & 0xFFFFFFFE)
        weights = weights + xp.arange(size, dtype=np.uint32).reshape(shape) * multiplier
    words = words.astype(np.uint32)
    return xp.sum(words, dtype=np.uint32), xp.sum(words * weights, dtype=np.uint32)


def _words_numpy(x: np.ndarray) -> np.ndarray:
    if x.dtype == bool:
        return x.astype(np.uint8)[..., None]
    if _bits(x.dtype) < 8:
        return x.astype(np.int32).astype(np.uint32)[..., None]
    x = np.ascontiguousarray(x).reshape(x.shape)
    return x[..., None].view(f"u{min(x.dtype.itemsize, 4)}")


def _words_jax(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == bool:
        return x.astype(np.uint8)[..., None]
    if jnp.issubdtype(x.dtype, np.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
        words = jax.lax.bitcast_convert_type(x, np.uint32)
        return words.reshape(*x.shape[:-1], -1)
    bits = _bits(x.dtype)
    if bits < 8:
        return x.astype(np.int32).astype(np.uint32)[..., None]
    words = jax.lax.bitcast_convert_type(x, {8: np.uint8, 16: np.uint16}.get(bits, np.uint32))
    return words if bits > 32 else words[..., None]


def _bits(dtype: Any) -> int:
    """Width of an element: 4 for int4, which NumPy stores in a byte."""
    if jnp.issubdtype(dtype, np.integer):
        return jnp.iinfo(dtype).bits
    return jnp.finfo(dtype).bits if jnp.issubdtype(dtype, np.floating) else np.dtype(dtype).itemsize * 8
