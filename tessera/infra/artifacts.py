"""Pytrees as directories that are whole or absent, with checksums that are compared when they are read.

Orbax writes the arrays. What it does not notice is a file that changed after it was written (a flipped byte restores as
another number), so a description with checksums of the arrays, computed on device, lies beside them.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from tessera.infra.checksums import checksums, name_of, signature


class CheckpointDamaged(RuntimeError):
    """A checkpoint that is truncated, altered or unreadable."""


class CheckpointMismatch(ValueError):
    """A sound checkpoint of another model or optimizer."""


def save_tree(path: Path | str, tree: PyTree, extra: Mapping[str, Any] | None = None) -> None:
    """Write one pytree as the directory `path`, which is absent or complete at any moment.

    What stood there is replaced. `extra` are JSON-able values, read back by `load_extra`.
    """
    path = Path(path).absolute()
    fresh, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
    barrier("tessera:save_tree")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(fresh, args=save_args(tree, {"extra": dict(extra or {})}), force=True)
    if jax.process_index() == 0:
        if path.exists():
            os.replace(path, old)
        os.replace(fresh, path)
        shutil.rmtree(old, ignore_errors=True)
    barrier("tessera:save_tree:done")


def load_tree(path: Path | str, like: PyTree) -> PyTree:
    """Read what `save_tree` wrote, into the structure, dtypes and shardings of `like` (arrays or ShapeDtypeStructs).

    Raises:
      FileNotFoundError: nothing is there.
      CheckpointDamaged: it is truncated or altered.
      CheckpointMismatch: it holds other arrays than `like`.
    """
    with _reader(path) as read:
        return read_state(read, abstract(like), read_meta(read, str(path)), str(path))


def load_extra(path: Path | str) -> dict[str, Any]:
    """Read the `extra` values that `save_tree` wrote; same errors as `load_tree`."""
    with _reader(path) as read:
        return read_meta(read, str(path))["extra"]


class _reader:
    """Opens an artefact of `save_tree` and gives the function that reads items of it."""

    def __init__(self, path: Path | str):
        self.path = Path(path).absolute()
        if not self.path.exists():
            raise FileNotFoundError(f"nothing saved at {self.path}")

    def __enter__(self) -> Any:
        self._checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        return lambda args: self._checkpointer.restore(self.path, args=args)

    def __exit__(self, *_: Any) -> None:
        self._checkpointer.close()


def abstract(tree: PyTree) -> PyTree:
    """Shapes, dtypes and shardings of a pytree without its arrays (NumPy arrays stay, and restore as NumPy)."""

    def leaf(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x

    return jax.tree.map(leaf, tree)


def barrier(name: str) -> None:
    """Wait until every process is here, if there are several; `name` must be the same on all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


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
    wrong = [path for path in found if found[path] != meta["arrays"][path]]
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
        """Remove the states of steps below `before` (all, if None)."""
        for step in self.steps():
            if before is None or step < before:
                shutil.rmtree(self.path(step), ignore_errors=True)
