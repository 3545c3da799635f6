"""Find the files of a data set on disk, or download them once with their checksums verified."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from tessera.infra.errors import RemoteMissing
from tessera.infra.remote import cache_dir, is_url, local


@dataclass(frozen=True)
class Remote:
    """One file of a data set.

    Attributes:
      filename: its name on disk.
      urls: addresses to try in this order; all serve the same bytes.
      checksum: hash of those bytes, as "sha256:<hex>" or "md5:<hex>".
      instead: what may stand in its place on disk, in words for the error message.
    """

    filename: str
    urls: tuple[str, ...]
    checksum: str
    instead: str = ""


class DataUnavailable(FileNotFoundError):
    """Files of a data set are neither on disk nor downloadable; the message lists them and says where to put them."""


def home(directory: str, name: str) -> Path:
    """Directory where data set `name` is kept under `directory`; "" and a URL mean the user's cache directory."""
    root = Path(directory).expanduser() if directory and not is_url(directory) else cache_dir()
    return root if root.name == name else root / name


def find(filename: str, directory: str, *, name: str) -> Path | None:
    """Path of `filename` in `directory/name` or in `directory` itself, whichever has it first; None if neither does."""
    # The named directory goes first: MNIST and Fashion-MNIST use the same file names.
    if is_url(directory):
        for place in (f"{directory}/{name}", directory):
            with contextlib.suppress(RemoteMissing):
                return local(f"{place}/{filename}")
    own = home(directory, name)
    candidates = [own / filename]
    candidates += [Path(directory).expanduser() / filename] if directory and not is_url(directory) else []
    return next((path for path in candidates if path.is_file()), None)


def fetch(remotes: Sequence[Remote], directory: str, *, name: str) -> list[Path]:
    """Paths of the files of data set `name`, in the order of `remotes`; absent ones are downloaded first.

    Files already on disk are used as they are, whatever their checksum: they may be a variant supplied on purpose.
    A download lands in `home(directory, name)` and only under its final name once its checksum has been verified.

    Raises:
      DataUnavailable: at the first file that no URL yields, naming every file that is still missing.
      ImportError: a file is missing, and so is the extra `data` that downloads it.
    """
    place = home(directory, name)
    was_there = place.exists()
    paths = {remote: find(remote.filename, directory, name=name) for remote in remotes}
    missing = [remote for remote, path in paths.items() if path is None]
    for position, remote in enumerate(missing):
        failures = []
        for url in remote.urls:
            try:
                paths[remote] = _download(url, remote, place)
                break
            except (OSError, ValueError) as error:  # no connection, HTTP error, full disk; or a wrong checksum
                failures.append(f"{url}: {str(error) or type(error).__name__}")
        else:
            if not was_there:
                with contextlib.suppress(OSError):  # a file that came before the one that did not stays
                    place.rmdir()
            raise DataUnavailable(_explain(missing[position:], failures, directory, name))
    return [path for path in paths.values() if path is not None]


def _explain(missing: Sequence[Remote], failures: Sequence[str], directory: str, name: str) -> str:
    lines = [f"data set {name!r} lacks {len(missing)} file(s), and downloading failed:"]
    lines += [f"  tried {failure}" for failure in failures]
    lines += [f"Get them on a machine with a connection and put them in {home(directory, name)}:"]
    for remote in missing:
        lines += [f"  {remote.filename}  from  {' or '.join(remote.urls)}"]
        lines += [f"    (or {remote.instead})"] if remote.instead else []
    lines += ["If they are somewhere else already, name that directory with --config.data.dir=DIRECTORY"]
    return "\n".join(lines)


def _download(url: str, remote: Remote, directory: Path) -> Path:
    pooch = _pooch(remote.filename, directory)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        path = pooch.retrieve(
            url,
            known_hash=remote.checksum,
            fname=remote.filename,
            path=directory,
            downloader=pooch.HTTPDownloader(progressbar=_Bar(progress, remote.filename), chunk_size=1 << 16),
        )
    return Path(path)


def _pooch(filename: str, directory: Path) -> Any:
    try:
        import pooch
    except ImportError as error:
        raise ImportError(
            f"{filename} is not in {directory}, and downloads need the extra `data`: pip install 'tessera-jax[data]'"
        ) from error
    return pooch


class _Bar:
    """What pooch asks of a progress bar (`total`, `update`, `reset`, `close`), drawn by rich."""

    def __init__(self, progress: Progress, description: str):
        self._progress, self._description = progress, description
        self._task: Any = None  # drawn once the server has answered

    @property
    def total(self) -> float | None:
        return self._progress.tasks[0].total if self._progress.tasks else None

    @total.setter
    def total(self, size: int) -> None:
        if self._task is None:
            self._task = self._progress.add_task(self._description)
        self._progress.update(self._task, total=size)

    def update(self, size: int) -> None:
        self._progress.advance(self._task, size)

    def reset(self) -> None:
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        self._progress.stop()
