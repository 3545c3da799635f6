"""Runs on several hosts: joining processes (`jax.distributed`), and XLA flags for overlap of communication and compute.

Names are imported on first use.
"""

from sharding._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__, {"distributed": ("DistributedError", "Limits", "initialize"), "xla_flags": ()}
)
