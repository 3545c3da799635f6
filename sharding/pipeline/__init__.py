"""Pipeline parallelism: schedules (GPipe, 1F1B, interleaved 1F1B, zero bubble) and their SPMD program.

Names are imported on first use.
"""

from typing import Any

from sharding._lazy import load

_EXPORTS = {
    "schedules": ("Schedule", "Work", "bubble", "bubble_formula", "draw", "peak_live"),
    "timelines": ("timeline", "zero_bubble"),
    "lockstep": ("lockstep_schedule",),
    "stages": ("StageLayout", "split_layers", "stack_stages", "unstack_stages"),
    "ticks": ("StageFns",),
    "run": ("PipelineConfig", "make_loss", "make_value_and_grad"),
}
__all__ = [name for names in _EXPORTS.values() for name in names]


def __getattr__(name: str) -> Any:
    return load(__name__, _EXPORTS, name)
