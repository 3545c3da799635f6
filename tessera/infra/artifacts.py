"""Pytrees by name on disk: each a directory that is whole or absent, checked when it is read.

The format, checksums included, is that of `tessera.infra.checkpoint`.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from jaxtyping import PyTree

from tessera.infra.checkpoint import (
    CheckpointDamaged,
    abstract,
    barrier,
    open_item,
    read_meta,
    read_state,
    refuse_foreign,
    save_args,
)


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
