"""Fits of scaling laws (approach 3), their bootstrap and intervals.

`scaling.fit` and `scaling.bootstrap` are the entry points (the names of the modules here); names are imported on first
use.
"""

from typing import Any

from scaling._lazy import load

_EXPORTS = {
    "fit": ("Fit", "FitConfig", "fit_near", "polish"),
    "bootstrap": ("Bootstrap", "interval", "refit", "resamples", "search_again"),
    "intervals": ("bootstrap_interval", "prediction_interval", "profile"),
    "derivatives": (),
    "newton": (),
    "newton_fast": (),
    "solve": (),
}
__all__ = [name for names in _EXPORTS.values() for name in names]


def __getattr__(name: str) -> Any:
    return load(__name__, _EXPORTS, name)
