"""Config files: found by name, read, and described without being run.

A config is a Python file with `get_config(variant=...)` that returns an `ml_collections.ConfigDict` of what differs
from the defaults, `VARIANTS` (name -> sentence) of what may stand behind the colon, and a docstring with What, Cost,
Expected and Command.
"""

import ast
import importlib
import importlib.util
import re
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tessera.infra.errors import ConfigError, no_such

PACKAGE = Path(__file__).parent.parent
# An installed package has its configs inside, a checkout beside.
CONFIGS = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"


class Described(NamedTuple):
    """A config file: its name, the first line of its docstring, its variants, and the script that its command names."""

    name: str
    title: str
    variants: dict[str, str]
    script: str


def described(directory: Path = CONFIGS) -> list[Described]:
    """Every config of a directory, read off its source."""
    return [describe(path) for path in sorted(directory.glob("*.py")) if not path.name.startswith("_")]


def describe(path: Path) -> Described:
    """One config file, read off its source."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    text = ast.get_docstring(tree) or ""
    command = re.search(r"Command:.*?scripts/((?:benchmarks/)?\w+)\.py", text, re.DOTALL)
    variants: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id == "VARIANTS" and node.value is not None:
                variants = ast.literal_eval(node.value)
    return Described(path.stem, text.partition("\n")[0], variants, command[1] if command else "")


def load_config(text: str, scripts: tuple[str, ...] = ()) -> tuple[dict[str, Any], str]:
    """The settings of `NAME[:VARIANT]`, and its name for a directory ("lm-tiny").

    Args:
      text: a name ("lm:tiny", found from anywhere) or a file ("configs/lm.py:tiny", "mine/exam.py").
      scripts: scripts whose configs are taken; () takes any.

    Raises:
      ConfigError: no such file or variant, a config of another script, or one that fails.
    """
    file, colon, variant = text.partition(":")
    path = _find(file, text)
    ours = path.resolve().parent == CONFIGS.resolve()
    try:
        about = describe(path)
    except (SyntaxError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"--config={text}: {path} is not Python: {type(error).__name__}: {error}") from error
    if ours and scripts and about.script and about.script not in scripts:
        raise ConfigError(f"--config={text}: this config is for scripts/{about.script}.py, not for this script")
    if colon and about.variants and variant not in about.variants:
        raise ConfigError(no_such(f"--config={text}", "variant", variant, [v for v in about.variants if v]))
    if colon and ours and not about.variants:
        raise ConfigError(f"--config={text}: {path.name} has no variants; leave out ':{variant}'")
    module = _import(path, ours)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config={text}: {path} has no function get_config")
    try:
        config = module.get_config(variant) if colon else module.get_config()
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--config={text}: {error}") from error
    if not isinstance(config, Mapping) and not hasattr(config, "to_dict"):
        raise ConfigError(f"--config={text}: get_config gave {type(config).__name__}, not an ml_collections.ConfigDict")
    name = path.stem + (f"-{variant}" if variant else "")
    plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return plain, "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


def _find(file: str, text: str) -> Path:
    path = Path(file)
    for candidate in (path, path.with_suffix(".py")):
        if candidate.is_file():
            return candidate
    if path.parent in (Path("."), Path("configs")):
        named = CONFIGS / f"{path.stem}.py"
        if named.is_file():
            return named
    known = [one.stem for one in sorted(CONFIGS.glob("*.py")) if not one.name.startswith("_")]
    raise ConfigError(no_such(f"--config={text}", "config", path.stem, known))


def _import(path: Path, ours: bool) -> types.ModuleType:
    """A config's module. Ours belong to the package `tessera.configs`, which others may import, in a checkout too."""
    if "tessera.configs" not in sys.modules:
        package = types.ModuleType("tessera.configs")
        package.__path__ = [str(CONFIGS)]
        sys.modules["tessera.configs"] = package
    if ours:
        return importlib.import_module(f"tessera.configs.{path.stem}")
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config={path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"--config={path}: {type(error).__name__}: {error}") from error
    return module
