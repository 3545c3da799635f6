"""One process at a time writes a directory: a lock that says who holds it."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from tessera.infra.checkpoint import agreed
from tessera.infra.errors import DiskFull, WorkdirInUse, disk_full

LOCK = ".lock"
SEEN = 30.0  # seconds between two signs of life in a lock
SILENT = 300.0  # seconds without one after which a process of another machine counts as dead


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
