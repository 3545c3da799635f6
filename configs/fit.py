"""A scaling law fitted to a table of runs, with intervals and a doctor's opinion.

What: Hoffmann et al. (2022), approach 3: E + A / N^alpha + B / D^beta by Huber loss on log loss from 4500 starts, and a
bootstrap over runs; `config.approach = 2` fits IsoFLOP minima instead, 1 the envelope of training curves (rows of a run
share a label in a column `run`; without one, rows of equal size are read as one curve). `config.runs` is a table with
loss and any two of params, tokens, flops; `config.columns.params=NAME` names a column of the table,
`config.units.params=1e6` is the unit of its bare numbers. Nothing is dropped; budgets are found from the rows; what is
planned for is 1, 10 and 100 times the largest run. `hoffmann` is the replication of their fit.
Cost: 240 runs and 4000 resamples take 6 seconds of one core, the report a few more.
Expected: the variant `hoffmann` on the runs of their figure 4 (Besiroglu et al. 2024): A 477.83, B 2143.4, E 1.8172,
alpha .34731, beta .36717, and 17.9 tokens per parameter at 5.88e23 FLOPs.
Command: python scripts/fit_scaling.py --config=fit --config.runs=RUNS.csv --workdir=runs/fit
"""

from ml_collections import ConfigDict

VARIANTS = {
    "neutral": "nothing dropped, budgets found from the rows, targets relative to the largest run",
    "hoffmann": "the replication of Hoffmann et al. (2022): 5 rows dropped, their nine budgets",
}


def get_config(variant: str = "neutral") -> ConfigDict:
    """One fit."""
    config = ConfigDict()
    if variant == "hoffmann":
        config.drop_highest = 5
        # As published: intervals of the bootstrap alone, no other law.
        config.misfit, config.laws = False, ()
        # FLOPs: what to train with, and the budgets the runs were made at.
        config.budgets = (1e21, 5.88e23, 1e25)
        config.isoflops = (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21)
        # Tokens that will be served: adds the model of the first budget's loss that is cheapest to train and serve.
        config.inference_tokens = (1e12,)
    return config
