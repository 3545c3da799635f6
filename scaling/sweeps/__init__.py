"""Sweeps: tables of training runs, carried out on one machine, SLURM or Ray, resumable, planned or adaptive.

How a run is trained is a function (`scaling.sweeps.store.TrainFn`). Names are imported on first use.
"""

from scaling._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "plan": ("Family", "PlanConfig", "PlannedRun", "Readout", "Rule", "plan_runs"),
        "store": ("Store",),
        "sweep": ("RunFailed", "SweepConfig", "run_sweep"),
        "executors": ("ExecutorConfig", "make_executor"),
        "adaptive": ("PlannerConfig", "choose_runs", "first_table"),
    },
)
