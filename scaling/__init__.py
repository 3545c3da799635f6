"""Compute-optimal scaling: FLOP counts, scaling laws, fits with their uncertainty, IsoFLOP sweeps, experiment design.

Everything is a pure function of rows; one row is one finished training run (parameters, tokens, FLOPs, loss).

Example:
  >>> import scaling
  >>> truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
  >>> rows = scaling.isoflop_design(truth, budgets=5, sizes=7, noise=0.002)  # or scaling.read_csv("runs.csv")
  >>> law = scaling.find_law("chinchilla")
  >>> fitted = scaling.fit(rows, law, starts=law.starts()[:, ::50])
  >>> best = scaling.compute_optimal(law, fitted.theta[:, None], [1e21])
  >>> bool(1e9 < best.params[0, 0] < 4e9)
  True

Axis legend: R rows (runs), P parameters of a law, S fits solved side by side (always the minor axis), K distinct end
points of a fit (or training curves), B bootstrap resamples, C budgets, E points of an envelope, T entries of a
lower triangle.

Units: tokens and parameters are counts, FLOPs are floating-point operations of a training run (a multiply-add is two),
losses are nats per token. Fits run in float64 whatever JAX's default is.

Names are imported on first use.
"""

from scaling._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "rows": ("RowError", "Rows", "make_rows"),
        "tables": ("read_csv", "read_rows"),
        "laws": ("Law", "custom_law", "power_law", "restrict", "tie"),
        "published": ("find_law",),
        "fitting.fit": ("Fit", "FitConfig", "fit", "fit_near"),
        "fitting.bootstrap": ("Bootstrap", "bootstrap"),
        "fitting.intervals": ("bootstrap_interval", "prediction_interval", "profile"),
        "isoflop": ("PowerLaw", "approach_1", "approach_2", "find_budgets", "group_budgets"),
        "optimum": ("chinchilla_optimum", "compute_optimal", "growth", "inference_optimum", "off_optimum"),
        "flops": ("Shape", "appendix_f", "exact_matmuls", "parameters"),
        "doctor": ("Finding", "examine", "undetermined"),
        "plausible": ("examine_rows",),
        "misfit": ("backtest", "compare_laws", "lack_of_fit"),
        "planner": ("acquire_runs", "half_width", "next_run"),
        "batch": ("critical_batch", "fit_rule", "fit_surface"),
        "coverage": ("isoflop_design",),
        "conventions": (),
        "evaluate": (),
        "fitting": (),
        "mup": (),
        "planner_benchmark": (),
        "sweeps": (),
    },
)
