"""Directories and files at URLs (s3://, gs:// and the other protocols of fsspec), by local copies.

An object store has no locks, no renames and no appending, and Orbax writes to none but gs://. So nothing writes to a
URL directly: a run works in a local directory, `mirrored` brings it there from the URL and uploads what changes while
the run goes on, and `local` brings what is only read.

Single objects are replaced whole or not at all; a directory is what its manifest lists, an object written after the
others, so an upload that is killed leaves the directory as it was before, with some single files newer.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tessera.infra.errors import RemoteError, RemoteMissing, WorkdirInUse

Agreed = Callable[[bool], int]
URL = re.compile(r"[a-z][a-z0-9+.-]*::?//.+")
MANIFEST = ".mirror.json"
LOCK = re.compile(r"\.mirror-lock-(\d{8})")
SEEN = 30.0  # seconds between two signs of life in a lock
SILENT = 300.0  # seconds without one after which its holder counts as dead
SMALL = 2**23  # bytes up to which a file is read at once, since it may be appended to
# Files of a save under way, of a write under way, locks, and compiled programs.
UNFINISHED = re.compile(r"(^|/)\.|\.orbax-checkpoint-tmp|(^|/)compiled/")


def cache_dir() -> Path:
    """The user's cache directory for Tessera: in $XDG_CACHE_HOME, or ~/.cache, on macOS ~/Library/Caches."""
    default = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    return Path(os.environ.get("XDG_CACHE_HOME", "").strip() or default).expanduser() / "tessera"


def is_url(path: Path | str) -> bool:
    """Whether a path is a URL.

    Example:
      >>> is_url("s3://bucket/runs/lm"), is_url("runs/lm"), is_url("lm:tiny")
      (True, False, False)
    """
    return isinstance(path, str) and URL.fullmatch(path) is not None


def is_mirror(path: Path | str) -> bool:
    """Whether a path is that of a local directory which `mirrored` gave."""
    return bool(str(path)) and Path(path).absolute().is_relative_to((cache_dir() / "mirrors").absolute())


def local(path: Path | str) -> Path:
    """The path itself, or a local copy of what is at a URL: a file, a directory, or the matches of a pattern.

    A copy is under the user's cache directory and is made again where the object has changed. Of a pattern such as
    `s3://bucket/books/**/*.txt` the result is the same pattern over the copies.

    Raises:
      RemoteMissing: nothing is at the URL.
      RemoteError: the store refuses, or cannot be reached; or a package for this protocol is not installed.
    """
    if not is_url(path):
        return Path(path).expanduser()
    url = str(path).rstrip("/")
    place = _place("copies", url)
    with _explained(url), _one_at_a_time(place.parent):
        fixed = re.split(r"/(?=[^/]*[*?\[])", url, maxsplit=1)
        if len(fixed) == 2:  # a pattern
            fs, root = _open(fixed[0])
            paths = [found for found in fs.glob(f"{root}/{fixed[1]}") if fs.isfile(found)]
            if not paths:
                raise FileNotFoundError
            place = place.with_name("found")
            _bring(fs, root, {found[len(root) + 1 :]: fs.ukey(found) for found in paths}, place)
            return place / fixed[1]
        fs, root = _open(url)
        listed = _manifest(fs, root)
        if listed is not None:
            _bring(fs, root, listed, place)
        elif fs.isfile(root):
            _bring(fs, root.rpartition("/")[0], {root.rpartition("/")[2]: fs.ukey(root)}, place.parent)
        else:
            found = {name[len(root) + 1 :]: fs.ukey(name) for name in fs.find(root)}
            if not found:
                raise FileNotFoundError
            _bring(fs, root, found, place)
    return place


@contextlib.contextmanager
def mirrored(url: str, every: float = 15.0, process: int = 0, agreed: Agreed = int) -> Iterator[str]:
    """A local directory for a run whose directory is at a URL; any other path is given back as it is.

    The directory begins as what is at the URL. What changes is uploaded after every so many seconds and at the
    end, also of a run that fails. One run at a time has the URL: see `Lease`.

    Args:
      url: where the run's directory is.
      every: seconds between two uploads.
      process: which of the run's processes this is. Each has a directory of its own, which begins as what is at the
        URL; that of the first is uploaded.
      agreed: the first process's value on every process, see `tessera.infra.checkpoint.agreed`; called by all.

    Raises:
      WorkdirInUse: another run has it.
      RemoteError: see `local`; the local directory keeps what was not uploaded.
    """
    if not is_url(url):
        yield url
        return
    url = url.rstrip("/")
    mirror, problem = None, None
    try:
        with _explained(url):
            mirror = Mirror(url, every) if process == 0 else None
    except (RemoteError, WorkdirInUse) as error:
        problem = error
    if not agreed(problem is None):
        raise problem or RemoteError(f"{url} cannot be used; the first process says why")
    try:
        with _explained(url):
            place = _place(f"mirrors/{process}", url) if mirror is None else mirror.place
            if mirror is None:
                shutil.rmtree(place, ignore_errors=True)
                fs, root = _open(url)
                _bring(fs, root, _manifest(fs, root) or {}, place)
        agreed(True)  # all have what was there: it may change
        yield str(place)
    finally:
        if mirror is not None:
            with _explained(url, f"; what is not there is in {mirror.place}"):
                mirror.close()
            print(f"uploaded to {url}", file=sys.stderr, flush=True)
    agreed(True)  # the others stay until all is uploaded, since a run ends when one of its processes does


def upload(directory: Path, url: str, *, last: str) -> None:
    """Write a directory's files to a URL where nothing is, the file `last` after all others.

    Raises:
      FileExistsError: something is there.
      RemoteError: see `local`.
    """
    with _explained(url):
        fs, root = _open(url.rstrip("/"))
        if fs.exists(root):
            raise FileExistsError(f"{url} exists; name a new one")
        names = [str(path.relative_to(directory)) for path in sorted(directory.rglob("*")) if path.is_file()]
        for name in sorted(names, key=lambda name: name == last):
            fs.put_file(str(directory / name), f"{root}/{name}")


class Mirror:
    """A local directory and its copy at a URL, under a lease; see `mirrored`."""

    def __init__(self, url: str, every: float):
        self.every = every
        self.url, self.place = url, _place("mirrors/0", url)
        self.fs, self.root = _open(url)
        self.lease = Lease(self.fs, self.root, url)
        self._sent = _manifest(self.fs, self.root) or {}
        shutil.rmtree(self.place, ignore_errors=True)  # of a process that was killed, perhaps long ago
        _bring(self.fs, self.root, self._sent, self.place)
        self._stats: dict[str, tuple[int, int]] = {}
        self._ended = threading.Event()
        self._problem: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def push(self) -> None:
        """Upload what has changed, then the manifest, then remove what is gone."""
        self.lease.check()
        stats = self._listing()
        changed = sorted(
            (name for name, stat in stats.items() if self._stats.get(name) != stat), key=lambda name: stats[name][1]
        )
        listed = {name: self._sent[name] for name in stats if name in self._sent}
        for name in changed:
            listed[name] = self._send(name)
        if listed != self._sent:
            # Files of a directory that vanished meanwhile, or that is replaced, belong to the next upload.
            if self._listing().keys() != stats.keys():
                raise FileNotFoundError("files came and went")
            self._write(MANIFEST, json.dumps({"files": listed}).encode())
        if gone := [f"{self.root}/{name}" for name in self._sent.keys() - listed.keys()]:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm(gone)
        self._sent, self._stats = listed, stats

    def close(self) -> None:
        """Upload the rest and give the lease back; raises what went wrong."""
        self._ended.set()
        self._thread.join()
        try:
            self._try_to_push(20)
        finally:
            self.lease.close()

    def _work(self) -> None:
        seen = pushed = time.monotonic()
        while not self._ended.wait(min(1.0, self.every)):
            now = time.monotonic()
            try:
                if now - seen > SEEN:
                    seen = now
                    self.lease.show_life()
                if now - pushed > self.every:
                    pushed = now
                    self._try_to_push(3)
            except WorkdirInUse as error:  # another process has it since: what this one makes is no longer wanted
                self._ended.set()
                print(f"error: {error}", file=sys.stderr, flush=True)
                os._exit(1)
            except Exception as error:  # the network may come back; `close` raises what does not
                print(f"{self.url}: not uploaded yet ({_short(error)})", file=sys.stderr, flush=True)

    def _try_to_push(self, times: int) -> None:
        for left in reversed(range(times)):
            try:
                return self.push()
            except FileNotFoundError:  # a file was replaced or removed while it was read
                if not left:
                    raise
                time.sleep(0.1)

    def _listing(self) -> dict[str, tuple[int, int]]:
        """Size and time of every finished file by name."""
        found = {}
        for folder, _, files in os.walk(self.place):
            for file in files:
                path = os.path.join(folder, file)
                name = os.path.relpath(path, self.place)
                if not UNFINISHED.search(name):
                    stat = os.stat(path)
                    found[name] = (stat.st_size, stat.st_mtime_ns)
        return found

    def _send(self, name: str) -> str:
        path = self.place / name
        if path.stat().st_size <= SMALL:
            data = path.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            if digest != self._sent.get(name):
                self._write(name, data)
            return digest
        digest = _digest(path)
        if digest != self._sent.get(name):
            self.fs.put_file(str(path), f"{self.root}/{name}")
        return digest

    def _write(self, name: str, data: bytes) -> None:
        path = f"{self.root}/{name}"
        self.fs.pipe_file(path, data)


class Lease:
    """The right to write at a URL: the object `.mirror-lock-<number>` of the largest number, created if absent.

    Its holder writes the time into it every `SEEN` seconds. A lock that does not change for `SILENT` seconds, or whose
    process is known to have died here, is succeeded by one of the next number, which only one process can create.

    Raises:
      WorkdirInUse: another process has it.
    """

    def __init__(self, fs: Any, root: str, url: str):
        self.fs, self.root, self.url, self.id = fs, root, url, uuid.uuid4().hex
        self.number, holder = self._newest()
        while holder and not holder.get("released"):
            if _died_here(holder):
                break
            said = f"{url} is in use by pid {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
            if holder.get("host") == _host():
                raise WorkdirInUse(said)
            print(f"{said}; waiting whether it is alive", file=sys.stderr, flush=True)
            self.number, holder = self._silent(self.number, holder, said)
        self.number += 1
        self._mine = {"id": self.id, "host": _host(), "pid": os.getpid(), "since": _now()}
        try:
            self.fs.pipe_file(self._path(self.number), self._text(), mode="create")
        except FileExistsError:
            raise WorkdirInUse(f"{url} is in use since this moment by another process") from None
        except Exception as error:  # what S3 says to a second writer, in the words of its client
            if not self.fs.exists(self._path(self.number)):
                raise
            raise WorkdirInUse(f"{url} is in use since this moment by another process") from error
        self.check()
        for number in self._numbers():
            if number < self.number:
                self.fs.rm(self._path(number))

    def check(self) -> None:
        """Raise WorkdirInUse if another process has succeeded this one."""
        number, holder = self._newest()
        if number != self.number or holder.get("id") != self.id:
            raise WorkdirInUse(
                f"{self.url} is in use by pid {holder.get('pid')} on {holder.get('host')}, which found this process "
                "silent"
            )

    def show_life(self) -> None:
        """Write the time."""
        self.check()
        self.fs.pipe_file(self._path(self.number), self._text())

    def close(self) -> None:
        """Give it back."""
        with contextlib.suppress(WorkdirInUse):
            self.check()
            self.fs.pipe_file(self._path(self.number), self._text(released=True))

    def _silent(self, number: int, holder: dict[str, Any], said: str) -> tuple[int, dict[str, Any]]:
        """The lock and its holder after `SILENT` seconds without a sign of life; raises at the first sign."""
        until = time.monotonic() + SILENT
        while time.monotonic() < until:
            time.sleep(min(5.0, SILENT / 10))
            now = self._newest()
            if now != (number, holder):
                if now[1].get("released"):
                    return now
                raise WorkdirInUse(said)
        return number, {}

    def _newest(self) -> tuple[int, dict[str, Any]]:
        number = max(self._numbers(), default=0)
        try:
            found = json.loads(self.fs.cat_file(self._path(number))) if number else {}
        except FileNotFoundError:
            return self._newest()
        except ValueError:
            found = {"pid": "unknown"}
        return number, found if isinstance(found, dict) else {}

    def _numbers(self) -> list[int]:
        self.fs.invalidate_cache()
        try:
            names = [found.rpartition("/")[2] for found in self.fs.ls(self.root, detail=False)]
        except FileNotFoundError:
            return []
        return [int(match[1]) for name in names if (match := LOCK.fullmatch(name))]

    def _path(self, number: int) -> str:
        return f"{self.root}/.mirror-lock-{number:08}"

    def _text(self, **more: Any) -> bytes:
        return json.dumps(self._mine | {"seen": time.time()} | more).encode()


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path there."""
    import fsspec

    if url.startswith(("file:", "local:")):  # files there are not replaced in one step, as objects are
        raise RemoteError(f"{url}: write a local path without {url.partition('://')[0]}://")
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise RemoteError(f"{url} needs the extra `urls`: pip install 'tessera-jax[urls]' ({error})") from error
    except ValueError as error:
        raise RemoteError(f"{url}: {error}; s3://, gs:// and the other protocols of fsspec are known") from error
    return fs, root.rstrip("/")


def _manifest(fs: Any, root: str) -> dict[str, str] | None:
    """SHA-256 of every file of a mirrored directory by name, None where there is none."""
    fs.invalidate_cache()
    try:
        listed = json.loads(fs.cat_file(f"{root}/{MANIFEST}"))["files"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise RemoteError(f"{root}/{MANIFEST} is damaged ({error}); it is written anew if you delete it") from error
    for name in listed:
        # What is listed is written below a local directory, wherever the manifest came from.
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise RemoteError(f"{root}/{MANIFEST} lists {name!r}, which lies outside its directory")
    return {name: str(digest) for name, digest in listed.items()}


def _bring(fs: Any, root: str, files: dict[str, str], place: Path) -> None:
    """Make the files of a local directory those of a remote one; `files` has what tells an object from its successor.

    What the local files were made of is in a file beside the directory.
    """
    place.mkdir(parents=True, exist_ok=True)
    note = place.with_name(f"{place.name}.json")
    try:
        have = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        have = {}
    note.unlink(missing_ok=True)
    for path in list(place.rglob("*")):
        if path.is_file() and str(path.relative_to(place)) not in files:
            path.unlink()
    for name, key in files.items():
        path = place / name
        if have.get(name) == str(key) and path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            fs.get_file(f"{root}/{name}", str(temporary))
        except FileNotFoundError:
            if not UNFINISHED.search(name):
                print(f"{root}/{name} is missing", file=sys.stderr, flush=True)
            continue
        os.replace(temporary, path)
    note.write_text(json.dumps({name: str(key) for name, key in files.items()}), encoding="utf-8")


@contextlib.contextmanager
def _one_at_a_time(place: Path) -> Iterator[None]:
    """Wait for the processes of this machine that bring the same: each removes the files that it does not know."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f"{place.name}.lock").open("a") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _place(kind: str, url: str) -> Path:
    """Local directory of a URL; its last part is the URL's, since a run is called by it."""
    return cache_dir() / kind / hashlib.sha256(url.encode()).hexdigest()[:16] / (url.rpartition("/")[2] or "root")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _explained(url: str, more: str = "") -> Iterator[None]:
    """Errors of a store's client as one line with the URL."""
    try:
        yield
    except (RemoteError, WorkdirInUse, FileExistsError):
        raise
    except FileNotFoundError as error:
        why = f" ({_short(error)})" if str(error) else ""  # such as a bucket that does not exist
        raise RemoteMissing(f"nothing is at {url}{why}{more}") from error
    except Exception as error:  # each client has its own kinds
        raise RemoteError(f"{url}: {_short(error)}{more}") from error


def _short(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line[:300]}"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S%z")


def _host() -> str:
    """This machine since it was started, and this container of it: process ids of others mean nothing here."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]]
        parts += [os.readlink("/proc/self/ns/pid").strip("pid:[]")]
    return "/".join(parts)


def _died_here(holder: dict[str, Any]) -> bool:
    pid = holder.get("pid")
    return holder.get("host") == _host() and isinstance(pid, int) and not os.path.exists(f"/proc/{pid}")
