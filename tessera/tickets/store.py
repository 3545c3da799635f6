"""The levels of a lottery search on disk: finished ones are artefacts, the one under way can be gone on with."""

from pathlib import Path

from absl import logging
from jaxtyping import PyTree

from lottery.levels import Row
from tessera.infra.artifacts import load_extra, load_tree, remove_tree, save_tree
from tessera.infra.checkpoint import CheckpointDamaged


class FinishedLevels:
    """Reads the finished levels `00/`, `01/`, ... of a search, which may be running: its directory is left as it is."""

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)

    def path(self, level: int) -> Path:
        """Where a finished level is kept."""
        return self.directory / f"{level:02d}"

    def has(self, level: int) -> bool:
        """Whether the level is finished."""
        return self.path(level).is_dir()

    def load(self, level: int, like: PyTree) -> tuple[PyTree, list[Row]]:
        """The tree and rows of a finished level. Raises CheckpointDamaged if its files were altered."""
        return load_tree(self.path(level), like), load_extra(self.path(level))["rows"]


class LevelStore(FinishedLevels):
    """Keeps the levels of the search that this process runs; to look at another one use `FinishedLevels`.

    Under `directory`, `00/`, `01/`, ... are finished and `03.step1200/` is level 3 as it was after step 1200. Satisfies
    `lottery.levels.Store`; `unfinished(level)` satisfies `tessera.tickets.train.Unfinished`. Every save is atomic, and
    a damaged artefact is reported with its path.
    """

    def load(self, level: int, like: PyTree) -> tuple[PyTree, list[Row]]:
        """As `FinishedLevels.load`; what a search killed while it finished the level left of it goes."""
        self.unfinished(level).clear()
        return super().load(level, like)

    def save(self, level: int, tree: PyTree, rows: list[Row]) -> None:
        """Keep a finished level and remove what was kept of it while it was under way."""
        save_tree(self.path(level), tree, {"rows": rows})
        self.unfinished(level).clear()

    def unfinished(self, level: int) -> "UnfinishedLevel":
        """The keeper of a level under way."""
        return UnfinishedLevel(self.directory, f"{level:02d}.step")


class UnfinishedLevel:
    """Keeps the newest state of a level under way; the one before is removed only when the new one is complete."""

    def __init__(self, directory: Path, prefix: str):
        self.directory, self.prefix = directory, prefix

    def _saved(self) -> list[tuple[int, Path]]:
        found = [path for path in self.directory.glob(self.prefix + "*") if path.name[len(self.prefix) :].isdigit()]
        return sorted((int(path.name[len(self.prefix) :]), path) for path in found)

    def load(self, like: PyTree) -> tuple[int, PyTree, list[dict]] | None:
        """The step, tree and rows saved last; a damaged save is reported and the one before it or nothing is used."""
        for step, path in reversed(self._saved()):
            try:
                return step, load_tree(path, like), load_extra(path)["rows"]
            except CheckpointDamaged as error:
                logging.warning("%s; it is not used", error)
        return None

    def save(self, step: int, tree: PyTree, rows: list[dict]) -> None:
        """Keep the state after `step`."""
        save_tree(self.directory / f"{self.prefix}{step}", tree, {"rows": rows})
        self.clear(before=step)

    def clear(self, before: int | None = None) -> None:
        """Remove saves older than `before` (all, if None)."""
        for step, path in self._saved():
            if before is None or step < before:
                remove_tree(path)
