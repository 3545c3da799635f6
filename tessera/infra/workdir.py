"""A run's directory: the config, the versions, the code and the command that made it."""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from sharding.multihost.xla_flags import VARIABLES
from tessera.infra.logger import write_text

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


# What may lie in a directory before a run makes it its own: records of a start that was killed, and a job's log.
HARMLESS = re.compile(r"\..*|versions\.json|run\.json|.*\.(log|out|err|txt)")


class WorkdirMismatch(ValueError):
    """A directory made by a run with another config, or by no run at all."""


def prepare(workdir: Path | str, config: Mapping[str, Any] | ConfigDict, *, name: str = "run") -> Path:
    """Make or check the directory of a run.

    Writes `config.json` (every setting, resolved), `versions.json` (Python and packages) and `run.json` (seed, git
    revision, command line, devices). A directory that has a `config.json` is a run to continue: its settings must be
    the same. A directory without one must hold nothing that the run could overwrite or remove.

    Args:
      workdir: the directory; "" stands for `runs/<name>-<first 8 hex digits of the config's SHA-256>`.
      config: the resolved settings.
      name: the config's name, for the default directory.

    Raises:
      WorkdirMismatch: the directory was made with other settings, each is named with both values; or it has no
        config.json and holds other files.
    """
    settings = resolve(config)
    path = Path(workdir) if str(workdir) else Path("runs") / f"{name}-{config_hash(settings)[:8]}"
    found = path / "config.json"
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    foreign = [name for name in names if not HARMLESS.fullmatch(name)]
    if foreign and found.name not in names:
        raise WorkdirMismatch(
            f"{path} has no config.json, so no run made it, but it holds {', '.join(foreign[:10])}; use a new or empty "
            "--workdir"
        )
    if found.exists():
        check_same(json.loads(found.read_text(encoding="utf-8")), settings, path)
    if jax.process_index() == 0:
        path.mkdir(parents=True, exist_ok=True)
        if not found.exists():
            seed = settings.get("seed")
            _write_json(path / "versions.json", versions())
            _write_json(path / "run.json", {"name": name, "seed": seed, **revision(), **_surroundings()})
            _write_json(found, settings)  # last: a directory with a config is a complete one
    return path


def resolve(config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """Plain JSON values of a config (references followed, tuples as lists)."""
    plain = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    return json.loads(json.dumps(plain, sort_keys=True, default=str))


def config_hash(settings: Mapping[str, Any]) -> str:
    """SHA-256 of resolved settings, hex."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def check_same(old: Mapping[str, Any], new: Mapping[str, Any], path: Path) -> None:
    """Raise `WorkdirMismatch` unless both settings are equal."""
    before, now = flatten(old), flatten(new)
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
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "processes": jax.process_count(),
        "compiler_flags": {name: os.environ[name] for name in VARIABLES.values() if name in os.environ},
    }


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")
