"""An experiment in pieces: each is computed once, kept on disk, and loaded when the experiment is started again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from tessera.infra.artifacts import load_tree, save_tree
from tessera.infra.logger import write_text


class Pieces:
    """Rows (JSON) and trees (checkpoints) by name under `directory`; `make` functions run only for what is missing.

    A piece must be a function of the experiment's config and of other pieces, so that a run that was killed and started
    again ends with what one run gives.
    """

    def __init__(self, directory: Path | str, say: Callable[[str], None] = lambda name: None):
        self.directory, self.say = Path(directory), say
        self.directory.mkdir(parents=True, exist_ok=True)

    def rows(self, name: str, make: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """The rows of a piece, read from `name`.json or made and written there."""
        path = self.directory / f"{name}.json"
        if not path.exists():
            self.say(name)
            write_text(path, json.dumps(make()))
        return json.loads(path.read_text(encoding="utf-8"))

    def tree(self, name: str, like: PyTree, make: Callable[[], PyTree]) -> PyTree:
        """The arrays of a piece, loaded from the folder `name` (into the shapes of `like`) or made and saved there."""
        path = self.directory / name
        if not path.is_dir():
            self.say(name)
            tree = make()
            save_tree(path, tree)
            return tree
        return jax.tree.map(jnp.asarray, load_tree(path, like))
