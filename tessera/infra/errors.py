"""What is wrong with a setting, in one line. Imports nothing, so that `--help` and wrong flags are answered at once."""

import difflib
from collections.abc import Iterable


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
