"""Fits of Chinchilla's law beside scipy's L-BFGS-B: the grid of 4500 starts, and bootstrap resamples.

What: approach 3 of Hoffmann et al. (2022) by the batched solver, and by scipy with the analytic gradient in numpy, in
fits per second on one core. `--config.runs` takes a CSV of runs; without one, 245 are made from the published law.
`hoffmann` is for the runs of their figure 4: 5 rows dropped, as Besiroglu et al. (2024) do.
Cost: under a minute of one core.
Expected: docs/results/scaling_fits.md has what was measured: a resample about 100 times as fast as one scipy start.
Command: python scripts/benchmarks/run.py --config=bench_fits
"""

from ml_collections import ConfigDict

VARIANTS = {"neutral": "nothing dropped", "hoffmann": "the 5 rows of the highest losses dropped"}


def get_config(variant: str = "neutral") -> ConfigDict:
    """One benchmark."""
    return ConfigDict({"suite": "fits", "drop_highest": 5 * (variant == "hoffmann")})
