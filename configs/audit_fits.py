"""Whether fits can be trusted: simulated sweeps, races of the planner, and conventions of counting.

What: `coverage`, how often 95% intervals hold the truth over sweeps simulated from Chinchilla's law; `envelope`, the
same for approach 1; `planner`,
surfaces on which the planner races an IsoFLOP grid for the grid's interval; `conventions`, a table of runs counted
under every convention and fitted again (needs `--config.runs`); `backtest`, public tables whose larger runs are
predicted from the smaller (needs their directory as `--config.runs`); `laws`, how often the true law is picked.
Cost: in processor time, coverage of 300 sweeps with 300 resamples 530 seconds, envelope of 150 83, 100 races 72,
conventions 13, backtest 45, laws of 500 430.
Expected: docs/results/scaling_fits.md has what was measured.
Command: python scripts/benchmarks/run.py --config=audit_fits:coverage
"""

from ml_collections import ConfigDict

VARIANTS = {
    "coverage": "how often 95% intervals hold the truth",
    "envelope": "how often 95% intervals of approach 1 hold the truth",
    "planner": "the planner against an IsoFLOP grid",
    "conventions": "exponents by convention of counting",
    "hoffmann": "conventions on the runs of Hoffmann et al. (2022): 5 rows dropped, their nine budgets",
    "backtest": "larger runs of public tables predicted from the smaller",
    "laws": "how often the true law is picked among four",
}


def get_config(variant: str = "coverage") -> ConfigDict:
    """One audit."""
    if variant == "hoffmann":
        isoflops = (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21)
        return ConfigDict({"suite": "audit", "what": "conventions", "drop_highest": 5, "isoflops": isoflops})
    return ConfigDict({"suite": "audit", "what": variant})
