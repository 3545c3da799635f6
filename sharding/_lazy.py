"""Package exports that are imported on first use (PEP 562), so that importing one module stays cheap."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any


def load(package: str, exports: Mapping[str, Sequence[str]], name: str) -> Any:
    """Import an exported name or a submodule of a package; the body of its `__getattr__`.

    Args:
      package: name of the package.
      exports: submodule -> names it exports.
      name: to find.

    Raises:
      AttributeError: no such name.
    """
    for module, names in exports.items():
        if name in names:
            return getattr(importlib.import_module(f"{package}.{module}"), name)
    if name in exports:
        return importlib.import_module(f"{package}.{name}")
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
