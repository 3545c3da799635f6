"""Analysis of parallel programs: collectives and FLOPs counted from jaxprs and HLO, rooflines, hardware, plan search.

Names are imported on first use.
"""

from typing import Any

from sharding._lazy import load

_EXPORTS = {
    "collectives": ("Collective", "count_collectives", "count_products", "totals"),
    "hlo": ("compiled_collectives",),
    "hardware": ("Hardware", "find_hardware"),
    "roofline": ("Roofline", "placements", "step_roofline", "summarize"),
    "search": ("Judged", "Ranking", "plans", "rank"),
}
__all__ = [name for names in _EXPORTS.values() for name in names]


def __getattr__(name: str) -> Any:
    return load(__name__, _EXPORTS, name)
