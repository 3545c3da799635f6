"""Sweeps: tables of training runs, carried out on one machine, SLURM or Ray, resumable, planned or adaptive.

How a run is trained is a function (`scaling.sweeps.store.TrainFn`). Names are imported on first use.
"""

from typing import Any

from scaling._lazy import load

_EXPORTS = {
    "plan": ("Family", "PlanConfig", "PlannedRun", "Readout", "Rule", "plan_runs"),
    "store": ("Store",),
    "sweep": ("RunFailed", "SweepConfig", "run_sweep"),
    "executors": ("ExecutorConfig", "make_executor"),
    "adaptive": ("PlannerConfig", "choose_runs", "first_table"),
}
__all__ = [name for names in _EXPORTS.values() for name in names]


def __getattr__(name: str) -> Any:
    return load(__name__, _EXPORTS, name)
