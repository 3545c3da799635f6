"""A run's directory: the config, the versions, the code and the command that made it, and who writes it."""

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from sharding.multihost.xla_flags import VARIABLES
from tessera.infra.checkpoint import agreed
from tessera.infra.errors import DiskFull, WorkdirInUse, disk_full
from tessera.infra.logger import read_object, write_text
from tessera.infra.remote import cache_dir, local

PACKAGES = (
    "tessera-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "scipy",
    "ml-collections",
)


FINISHED = "finished.json"  # what a command writes last
# Of the files of a workdir; 0.1 wrote none.
FORMAT = 2
LOCK = ".lock"
SEEN = 30.0  # seconds between two signs of life in a lock
SILENT = 300.0  # seconds without one after which a process of another machine counts as dead
# What may lie in a directory before a run makes it its own: records of a start that was killed, and a job's log.
HARMLESS = re.compile(r"\..*|versions\.json|run\.json|.*\.(log|out|err|txt)")


class WorkdirMismatch(ValueError):
    """A directory made by a run with another config, by no run at all, or by a version that wrote other files."""


def prepare(
    workdir: Path | str,
    config: Mapping[str, Any] | ConfigDict,
    *,
    name: str = "run",
    defaults: Mapping[str, Any] | None = None,
    grows: Sequence[str] = (),
) -> Path:
    """Make or check the directory of a run.

    Writes `config.json` (every setting, resolved), `versions.json` (Python and packages) and `run.json` (seed, git
    revision, command line, devices). A directory that has a `config.json` is a run to continue: its settings must be
    the same. A directory without one must hold nothing that the run could overwrite or remove.

    Args:
      workdir: the directory; "" stands for `runs/<name>-<first 8 hex digits of a SHA-256>` of the settings that differ
        from their defaults.
      config: the resolved settings.
      name: the config's name, for the default directory.
      defaults: default of every setting that has one, by dotted path. A setting that a directory does not have, since
        it was added later, means its default.
      grows: numbers, by dotted path, that may be larger than the directory has them; it then gets the larger ones.

    Raises:
      WorkdirMismatch: the directory was made with other settings, each is named with both values; or it has no
        config.json and holds other files; or it cannot be written.
      WorkdirInUse: another process writes it, see `hold`, which a command calls again for as long as it writes.
    """
    settings, known = resolve(config), resolve(defaults or {})
    path = locate(workdir, settings, name=name, defaults=known)
    try:
        _prepare(path, settings, name, known, grows)
    except OSError as error:
        if disk_full(error):
            raise
        why = error.strerror or error
        raise WorkdirMismatch(f"--workdir={path}: {why}; a directory that can be written is needed") from error
    return path


def _prepare(path: Path, settings: dict[str, Any], name: str, known: dict[str, Any], grows: Sequence[str]) -> None:
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    found = path / "config.json"
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    foreign = [name for name in names if not HARMLESS.fullmatch(name)]
    if foreign and found.name not in names:
        raise WorkdirMismatch(
            f"{path} has no config.json, so no run made it, but it holds {', '.join(foreign[:10])}; use a new or empty "
            "--workdir"
        )
    more: dict[str, Any] = {}
    if found.exists():
        old, new = read_settings(path), flatten(settings)
        more = {key: new[key] for key in grows if flatten(old).get(key, new[key]) < new[key]}
        check_same(flatten(old) | more, settings, path, known)
    with hold(path):
        if more and jax.process_index() == 0:
            _write_json(found, settings)
        if jax.process_index() == 0 and not found.exists():
            made = {"format": FORMAT, "name": name, "seed": settings.get("seed"), **revision(), **_surroundings()}
            _write_json(path / "versions.json", versions())
            _write_json(path / "run.json", made)
            _write_json(found, settings)  # last: a directory with a config is a complete one


def was_finished(path: Path, key: str) -> bool:
    """Whether `mark_finished` was called with this key and the report is still there."""
    try:
        found = read_object(path / FINISHED)
    except (FileNotFoundError, ValueError):
        return False
    return found.get("settings") == key and (path / "report.html").exists()


def mark_finished(path: Path, key: str) -> None:
    """Note that a run came to its end; `key` is a hash of all that decides what it gives."""
    if jax.process_index() == 0:
        _write_json(path / FINISHED, {"settings": key})


def compiled_dir() -> Path:
    """Directory of compiled programs in the user's cache, one for every version of JAX and kind of processor.

    A program compiled for a processor of another kind may not run, and home directories are shared by machines.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    features = "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    kind = hashlib.sha256(f"{platform.machine()}{features}".encode()).hexdigest()[:8]
    return cache_dir() / f"jax-{jax.__version__}-{kind}"


def locate(
    workdir: Path | str, config: Mapping[str, Any] | ConfigDict, *, name: str, defaults: Mapping[str, Any] | None = None
) -> Path:
    """The directory that `prepare` makes or checks; same arguments."""
    if str(workdir):
        return Path(workdir)
    return Path("runs") / f"{name}-{config_hash(differing(resolve(config), resolve(defaults or {})))[:8]}"


def resolve(config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """Plain JSON values of a config (references followed, tuples as lists)."""
    plain = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    return json.loads(json.dumps(plain, sort_keys=True, default=str))


def config_hash(settings: Mapping[str, Any]) -> str:
    """SHA-256 of resolved settings, hex."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def read_settings(workdir: Path | str) -> dict[str, Any]:
    """The settings of a run, from its `config.json`.

    Raises:
      FileNotFoundError: no run is there.
      WorkdirMismatch: it was made by a version that wrote other files, or a file of it is damaged.
    """
    path = local(workdir)
    try:
        settings, run = read_object(path / "config.json"), path / "run.json"
        made = read_object(run) if run.exists() else {}
    except FileNotFoundError:
        raise FileNotFoundError(f"no run in {path}: config.json is missing") from None
    except ValueError as error:
        raise WorkdirMismatch(str(error)) from error
    if made.get("format") != FORMAT:
        raise WorkdirMismatch(
            f"{path} was made by another version of Tessera (files of format {made.get('format', 1)}, not {FORMAT}): "
            "use another --workdir, or that version"
        )
    return settings


def differing(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, by dotted path, that are not their default."""
    return {key: value for key, value in flatten(settings).items() if key not in defaults or defaults[key] != value}


def check_same(
    old: Mapping[str, Any], new: Mapping[str, Any], path: Path, defaults: Mapping[str, Any] | None = None
) -> None:
    """Raise `WorkdirMismatch` unless both settings are equal, a missing one being its default."""
    defaults = defaults or {}
    before, now = flatten(old), flatten(new)
    before = {key: value for key, value in defaults.items() if key in now and key not in before} | before
    lines = [
        f"  {key}: {before.get(key, 'absent')!r} there, {now.get(key, 'absent')!r} now"
        for key in sorted(before | now)
        if key not in before or key not in now or before[key] != now[key]
    ]
    if lines:
        raise WorkdirMismatch(
            f"{path} belongs to a run with other settings; use another --workdir or the same settings:\n"
            + "\n".join(lines)
        )


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers ("absent" where not installed)."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def revision() -> dict[str, Any]:
    """Git revision of this code and whether it was changed since; "unknown" outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        return {
            "revision": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return {"revision": "unknown", "changed": None}


def _surroundings() -> dict[str, Any]:
    devices = jax.devices()
    return {
        "began": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "processor": _processor(),
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "processes": jax.process_count(),
        "compiler_flags": {name: os.environ[name] for name in VARIABLES.values() if name in os.environ},
    }


def _processor() -> str:
    """Kind and number of the machine's processors."""
    with contextlib.suppress(OSError):
        if named := re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M):
            return f"{named[1]}, {os.cpu_count()} processors"
    return f"{platform.machine()}, {os.cpu_count()} processors"


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def hold(directory: Path | str) -> Iterator[None]:
    """Be the only process that writes a directory, which is made if it is missing.

    The lock is `.lock` in it, with host, process id and time of its holder. The system releases the lock of a process
    of this machine that died; the lock of another machine counts as stale when it has shown no sign of life for
    `SILENT` seconds. The first process of a run on several hosts holds it for all.

    Raises:
      WorkdirInUse: another process has it; raised in all processes of the run.
      DiskFull: what was done inside found no space.
    """
    path = Path(directory)
    file, problem = None, ""
    if jax.process_index() == 0:
        path.mkdir(parents=True, exist_ok=True)
        file, problem = _acquire(path / LOCK)
    try:
        if not agreed(not problem, all_of=True):
            raise WorkdirInUse(problem or f"{path} is in use; the first process says by whom")
        done = threading.Event()
        if file is not None:
            threading.Thread(target=_show_life, args=(file, done), name="lock", daemon=True).start()
        try:
            yield
        except Exception as error:
            if not disk_full(error):
                raise
            raise DiskFull(f"the disk of {path} is full; free space and run the same command again") from error
        finally:
            done.set()
    finally:
        if file is not None:
            if not problem:  # it is ours; the file stays, as another process may just have opened it
                with contextlib.suppress(OSError):
                    file.truncate(0)
            file.close()


def _acquire(path: Path) -> tuple[Any, str]:
    """The lock's open file, and why it is not ours ("" if it is)."""
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return file, _in_use(path, _read(file))
    except OSError:  # a file system without locks: who holds it is all that is known
        pass
    holder = _read(file)
    if holder and holder.get("host") != socket.gethostname():
        silent = time.time() - os.stat(path).st_mtime
        if silent < SILENT:
            return file, f"{_in_use(path, holder)}, and last seen {silent:.0f} s ago; after {SILENT:.0f} s it is dead"
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S%z")}
    file.truncate(0)
    file.write(json.dumps(mine))
    file.flush()
    return file, ""


def _read(file: Any) -> dict[str, Any]:
    file.seek(0)
    try:
        found = json.loads(file.read())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _in_use(path: Path, holder: dict[str, Any]) -> str:
    pid, host, since = (holder.get(name, "unknown") for name in ("pid", "host", "since"))
    return f"{path.parent} is in use by pid {pid} on {host} since {since}"


def _show_life(file: Any, done: threading.Event) -> None:
    while not done.wait(SEEN):
        with contextlib.suppress(OSError, ValueError):
            os.utime(file.fileno())
