"""A scaling law fitted to a table of runs, with intervals and a doctor's opinion.

What: Hoffmann et al. (2022), approach 3: E + A / N^alpha + B / D^beta by Huber loss on log loss from 4500 starts, and a
bootstrap over runs; `config.approach = 2` fits IsoFLOP minima instead, 1 the envelope of training curves (rows of a run
share a label in a column `run`; without one, rows of equal size are read as one curve). `config.runs` is a CSV with
loss and any two of params, tokens, flops.
Cost: 240 runs and 4000 resamples take 4 seconds of one core, the report a few more.
Expected: on the runs of their figure 4 (Besiroglu et al. 2024), the 5 highest losses dropped: A 477.83, B 2143.4,
E 1.8172, alpha .34731, beta .36717, and 17.9 tokens per parameter at 5.88e23 FLOPs.
Command: python scripts/fit_scaling.py --config=configs/chinchilla_fit.py --config.runs=RUNS.csv --workdir=runs/fit
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """One fit."""
    config = ConfigDict()
    config.drop_highest = 5
    # FLOPs: what to train with, and the budgets the runs were made at (empty: found from gaps between them).
    config.budgets = (1e21, 5.88e23, 1e25)
    config.isoflops = (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21)
    # Tokens that will be served: adds the model of the first budget's loss that is cheapest to train and serve.
    config.inference_tokens = (1e12,)
    return config
