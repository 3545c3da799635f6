"""A scaling law fitted to a table of runs: Chinchilla's (Hoffmann et al. 2022), with intervals and the next budget.

Your table needs three columns: parameters, tokens, and the final loss of each run. The one made here is simulated from
constants that were fitted to Chinchilla's own runs (Besiroglu et al. 2024), so that the right answer is known.

Run: python examples/law_for_a_csv.py (about 3 seconds of processor time)
"""

import csv
import tempfile
from pathlib import Path

import numpy as np

import scaling

E, A, B, ALPHA, BETA = 1.817, 482.0, 2085.4, 0.3478, 0.3658
noise = np.random.default_rng(0)
path = Path(tempfile.mkdtemp()) / "runs.csv"
with path.open("w", newline="") as file:
    table = csv.writer(file)
    table.writerow(["parameters", "tokens", "final_loss"])
    for flops in (1e18, 1e19, 1e20, 1e21):
        for per_parameter in np.geomspace(2, 200, 9):
            params = (flops / (6 * per_parameter)) ** 0.5
            tokens = flops / (6 * params)
            loss = E + A / params**ALPHA + B / tokens**BETA
            table.writerow([f"{params:.6g}", f"{tokens:.6g}", f"{loss * np.exp(noise.normal(0, 0.003)):.5f}"])

rows = scaling.read_csv(path, {"params": "parameters", "loss": "final_loss"})  # our name: the file's
for finding in scaling.examine_rows(rows):  # tokens in billions, losses in bits, doubled rows, ...
    print(finding)

law = scaling.find_law("chinchilla")
fitted = scaling.fit(rows, law)
print(fitted.summary())
assert fitted.converged and not fitted.undetermined  # ask before you believe

budget = 5.76e23  # Chinchilla's own
boot = scaling.bootstrap(fitted, 200)
best = scaling.compute_optimal(law, boot.theta_PB, [budget]).params[0]
low, high = np.quantile(best, [0.025, 0.975])
true = scaling.chinchilla_optimum({"E": E, "A": A, "B": B, "alpha": ALPHA, "beta": BETA}, [budget]).params.item()
print(
    f"best size for {budget:.3g} FLOPs: {low / 1e9:.0f} to {high / 1e9:.0f} billion parameters (true: {true / 1e9:.0f})"
)
assert low < true < high
