"""Runs on several hosts: joining processes (`jax.distributed`), and XLA flags for overlap of communication and compute.

Names are imported on first use.
"""

from typing import Any

from sharding._lazy import load

_EXPORTS = {"distributed": ("DistributedError", "Limits", "initialize"), "xla_flags": ()}
__all__ = [name for names in _EXPORTS.values() for name in names]


def __getattr__(name: str) -> Any:
    return load(__name__, _EXPORTS, name)
