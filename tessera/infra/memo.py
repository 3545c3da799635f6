"""Memoization on disk: parts of an experiment are computed once and loaded when it is started again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from tessera.infra.artifacts import load_tree, save_tree
from tessera.infra.logger import write_text


class Memo:
    """Rows (JSON) and trees (artifacts) by name under `directory`; `make` functions run only for what is missing.

    A result must be a function of the experiment's config and of other results, so that a run that was killed and
    started again ends with what one run gives.
    """

    def __init__(self, directory: Path | str, say: Callable[[str], None] = lambda name: None):
        self.directory, self.say = Path(directory), say
        self.directory.mkdir(parents=True, exist_ok=True)

    def rows(self, name: str, make: Callable[..., list[dict[str, Any]]], *arguments: Any) -> list[dict[str, Any]]:
        """The rows called `name`, read from `name`.json or made by make(*arguments) and written there.

        Raises:
          ValueError: the file is damaged.
        """
        path = self.directory / f"{name}.json"
        if not path.exists():
            self.say(name)
            write_text(path, json.dumps(make(*arguments)))
        try:
            found = json.loads(path.read_bytes().decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it to have it computed again") from error
        if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
            raise ValueError(f"{path} is damaged: a list of objects is needed; delete it to have it computed again")
        return found

    def tree(self, name: str, like: PyTree, make: Callable[..., PyTree], *arguments: Any) -> PyTree:
        """The arrays called `name`, loaded from that folder (into the shapes of `like`) or made and saved there."""
        path = self.directory / name
        if not path.is_dir():
            self.say(name)
            tree = make(*arguments)
            save_tree(path, tree)
            return tree
        return jax.tree.map(jnp.asarray, load_tree(path, like))
