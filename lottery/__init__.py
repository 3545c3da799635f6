"""Lottery tickets: finding, checking and running sparse subnetworks. Masks are pytrees of bool arrays.

Modules are imported when they are used: `import lottery` alone loads nothing else, and `moe.kernels` is loaded with
`lottery.block_sparse` only. Each module's `__all__` is its public API; examples in docstrings assume

    import jax, jax.numpy as jnp, numpy as np, optax, lottery

Axis legend: S stack of tickets (seeds x arms), N inputs of a layer, M outputs, K surviving weights,
L layers of a stack, U units of a layer (neurons, heads), P points on a path, C eigenvalues.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lottery import (
        align,
        allocation,
        block_sparse,
        calibrated,
        compact,
        compact_channels,
        connectivity,
        controls,
        counting,
        coupled,
        criteria,
        dynamic,
        export,
        gates,
        imp,
        masks,
        proximal,
        prune,
        reliability,
        schedules,
        sharpness,
        strong,
        structures,
        summary,
        supermask,
        tangent,
        transfer,
        transform,
    )

__all__ = [
    "align",
    "allocation",
    "block_sparse",
    "calibrated",
    "compact",
    "compact_channels",
    "connectivity",
    "controls",
    "counting",
    "coupled",
    "criteria",
    "dynamic",
    "export",
    "gates",
    "imp",
    "masks",
    "proximal",
    "prune",
    "reliability",
    "schedules",
    "sharpness",
    "strong",
    "structures",
    "summary",
    "supermask",
    "tangent",
    "transfer",
    "transform",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"lottery.{name}")
    raise AttributeError(f"module 'lottery' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
