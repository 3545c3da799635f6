"""What is wrong, in one line. Imports nothing of ours, so that `--help` and wrong flags are answered at once."""

import difflib
import errno
from collections.abc import Iterable, Iterator


class ConfigError(ValueError):
    """A setting that does not exist, is missing or has the wrong type."""


def unknown(path: str, key: str, known: Iterable[str]) -> str:
    """Message for a key that is not among the known ones, with the nearest as a suggestion.

    Example:
      >>> unknown("config.model.widht", "widht", ["width", "layers"])
      "config.model.widht: no such setting; did you mean 'width'? Settings here: layers, width"
    """
    names = sorted(known)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{path}: no such setting{hint} Settings here: {', '.join(names) or 'none'}"


def no_such(path: str, kind: str, name: str, known: Iterable[str]) -> str:
    """Message for a name of some kind that is not among the known ones.

    Example:
      >>> no_such("--config=ml:tiny", "config", "ml", ["lm", "pods"])
      "--config=ml:tiny: no such config; did you mean 'lm'? There are: lm, pods"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{path}: no such {kind}; {hint}There are: {', '.join(names) or 'none'}"


class WorkdirInUse(RuntimeError):
    """Another process writes the directory."""


class RemoteError(OSError):
    """What is at a URL cannot be read or written."""


class RemoteMissing(RemoteError, FileNotFoundError):
    """Nothing is at a URL."""


class DiskFull(OSError):
    """No space is left where a run writes; what was saved before is whole."""


def disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is a full disk or quota, told by the system or by Orbax.

    Example:
      >>> disk_full(OSError(errno.ENOSPC, "no space")), disk_full(ValueError("RESOURCE_EXHAUSTED: out of memory"))
      (True, False)
    """
    return any(
        isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(one)
        for one in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and all that it came from."""
    seen, waiting = set[int](), [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
