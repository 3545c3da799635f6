"""Analysis of parallel programs: collectives and FLOPs counted from jaxprs and HLO, rooflines, hardware, plan search.

Names are imported on first use.
"""

from sharding._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "collectives": ("Collective", "count_collectives", "count_products", "totals"),
        "hlo": ("compiled_collectives",),
        "hardware": ("Hardware", "find_hardware"),
        "roofline": ("Roofline", "placements", "step_roofline", "summarize"),
        "search": ("Judged", "Ranking", "plans", "rank"),
    },
)
