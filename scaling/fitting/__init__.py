"""Fits of scaling laws (approach 3), their bootstrap and intervals.

`scaling.fit` and `scaling.bootstrap` are the entry points (the names of the modules here); names are imported on first
use.
"""

from scaling._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "fit": ("Fit", "FitConfig", "fit_near", "polish"),
        "bootstrap": ("Bootstrap", "interval", "refit", "resamples", "search_again"),
        "intervals": ("bootstrap_interval", "prediction_interval", "profile"),
        "derivatives": (),
        "determined": (),
        "discrepancy": ("estimate_discrepancy",),
        "newton": (),
        "newton_fast": (),
        "solve": (),
    },
)
