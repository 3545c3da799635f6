"""Pipeline parallelism: schedules (GPipe, 1F1B, interleaved 1F1B, zero bubble, DualPipeV) and their SPMD program.

Names are imported on first use.
"""

from sharding._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "schedules": ("Schedule", "Work", "bubble", "bubble_formula", "draw", "peak_live", "place"),
        "timelines": ("timeline", "zero_bubble"),
        "lockstep": ("lockstep_schedule",),
        "stages": ("StageLayout", "split_layers", "stack_stages", "store_across", "unstack_stages"),
        "split": ("SplitLayer", "split_layer"),
        "ticks": ("StageFns",),
        "run": ("PipelineConfig", "make_loss", "make_value_and_grad"),
    },
)
