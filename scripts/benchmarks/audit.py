"""Check that fits can be trusted.

coverage: sweeps simulated from Chinchilla's law, and how often 95% intervals hold the truth.
envelope: the same for approach 1, on simulated training curves.
planner: surfaces on which the planner races an IsoFLOP grid for the grid's interval.
conventions: the published runs counted under every convention, fitted again.
backtest: the runs of public tables below 1/10 and 1/30 of the largest one's FLOPs fitted, the others predicted.
laws: sweeps simulated from four laws, and how often the comparison of laws picks the true one.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from scaling.conventions import CHINCHILLA_SHAPES, effects, nearest_shapes
from scaling.coverage import CHINCHILLA_QUANTITIES, EPOCH, Tail, around, isoflop_design, simulate_coverage
from scaling.fitting.bootstrap import bootstrap
from scaling.fitting.fit import FitConfig, Objective, fit
from scaling.fitting.intervals import bootstrap_interval
from scaling.isoflop import approach_1, bootstrap_envelope, find_budgets, nearest_budgets
from scaling.isoflop import minima as isoflop_minima
from scaling.misfit import backtest, compare_laws, interval_score
from scaling.optimum import chinchilla_optimum, exponents
from scaling.planner_benchmark import benchmark_planner
from scaling.published import CHINCHILLA, find_law
from scaling.rows import Rows, make_rows
from scaling.tables import read_csv
from scripts.benchmarks.timing import Row
from tessera.infra.errors import ConfigError
from tessera.infra.schema import Schema


@dataclass(frozen=True)
class Audit:
    """What to audit and how much of it.

    Attributes:
      suite: the benchmark's name.
      cores: that the process may use; 0 is all.
      what: "coverage", "envelope", "planner", "conventions", "backtest" or "laws".
      sweeps: simulated sweeps of each kind or law, or surfaces.
      resamples: bootstrap resamples of each fit.
      runs: CSV of runs, for conventions; directory of the public tables, for backtest.
      drop_highest: rows with the highest losses to leave out, for conventions.
      isoflops: budgets the runs were made at, for conventions; empty: found from the rows.
      starts: of every fit, for laws.
    """

    suite: str = "audit"
    cores: int = 0
    what: Literal["coverage", "envelope", "planner", "conventions", "backtest", "laws"] = "coverage"
    sweeps: int = 500
    resamples: int = 400
    runs: str = ""
    drop_highest: int = 0
    isoflops: tuple[float, ...] = ()
    starts: int = 16


SCHEMA = Schema(Audit)
# (budgets, sizes, objective, tail of the noise, its standard deviation in log loss)
KINDS: tuple[tuple[int, int, Objective, Tail, float], ...] = (
    (5, 9, "normal", "normal", 0.005),
    (5, 9, "huber", "normal", 0.005),
    (5, 9, "huber", "student", 0.005),
    (9, 15, "normal", "normal", 0.01),
    (9, 15, "huber", "normal", 0.01),
)
# Sizes, runs of every size (to rising token counts), rows of a run.
CURVES = {
    "13 runs of 20 rows": (13, 1, 20),
    "40 runs of 15 rows, 10 sizes": (10, 4, 15),
    "150 rows, 15 sizes": (15, 10, 1),
}


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on the terminal, cells as they are written elsewhere: three decimals for numbers."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=160).print(table)


def coverage(config: Any) -> None:
    """Shares of sweeps whose intervals hold the truth."""
    rows = []
    for budgets, sizes, objective, tail, noise in KINDS:
        found = simulate_coverage(
            isoflop_design(EPOCH, budgets=budgets, sizes=sizes),
            CHINCHILLA,
            EPOCH,
            CHINCHILLA_QUANTITIES,
            noise=noise,
            sweeps=config.sweeps,
            resampled=config.resamples,
            config=FitConfig(objective=objective),
            tail=tail,
            profiled=("alpha", "beta"),
            misfit=True,
        )
        name = f"{budgets * sizes} runs, {tail} noise {noise:.1%}, {objective}"
        rows.append([name, *found.share.values(), *found.profiled.values(), found.new_run])
        rows[-1] += [found.discrepant_run, found.rejected]
    columns = ["sweep and fit", *CHINCHILLA_QUANTITIES, "alpha (profile)", "beta (profile)", "a new run"]
    columns += ["with discrepancy", "law rejected"]
    show(f"Share of {config.sweeps} simulated sweeps whose 95% interval holds the truth", columns, rows)


def envelopes(config: Any) -> None:
    """Shares of simulated sets of training curves whose intervals by approach 1 hold the truth.

    Every run shares its noise, which moves its curve up or down; rows alone, of one size, are read as one curve.
    """
    truth, table, theta = exponents(EPOCH)[0], [], CHINCHILLA.raw(EPOCH)[:, None]
    for name, (sizes, runs, points) in CURVES.items():
        size = np.repeat(np.geomspace(3e7, 1e10, sizes), runs * points)
        most = np.tile(np.repeat(np.geomspace(5, 300, runs) if runs > 1 else [300.0], points), sizes)
        seen = np.tile(np.geomspace(1 / 300, 1, points) if points > 1 else [1.0], sizes * runs)
        tokens, run = size * most * seen, np.repeat(np.arange(sizes * runs), points)
        design = make_rows({"params": size, "tokens": tokens, "loss": np.ones(len(size))}, "curves")
        curve = size if points == 1 else run
        mean = CHINCHILLA.predict(theta, CHINCHILLA.gather(design))[:, 0]
        largest = float(design["flops"].max())
        best = float(chinchilla_optimum(EPOCH, [largest]).params[0, 0])
        for noise in (0.001, 0.002, 0.005, 0.01):
            stream, found = np.random.default_rng(0), []
            for sweep in range(config.sweeps):
                loss = np.exp(mean + noise * stream.standard_normal(run.max() + 1)[run])
                rows = Rows({**design.columns, "loss": loss}, "curves")
                fitted = fit(rows, CHINCHILLA, FitConfig(objective="normal"), starts=around(theta))
                law, _ = approach_1(rows, curve)
                draws = bootstrap_envelope(fitted, curve, config.resamples, noise_of=run, seed=sweep)
                held = []
                for values, exact in ((draws[0], truth), (draws[1] + draws[0] * np.log(largest), np.log(best))):
                    low, high = bootstrap_interval(values[np.isfinite(values)], sizes * runs, 2)
                    held.append(low <= exact <= high)
                found.append((law.exponent, np.nanstd(draws[0]), *held))
            estimate, spread, a, n = np.array(found, float).T
            row = (f"{name}, noise {noise:.1%}", float(estimate.mean()), float(estimate.std()), float(spread.mean()))
            table.append((*row, float(a.mean()), float(n.mean())))
    columns = ("training curves", "mean a", "its deviation", "the draws'", "a held", "N* at the largest run held")
    show(f"{config.sweeps} simulated sets each, a = {truth:.4f}, 95% intervals", columns, table)


def planner(config: Any) -> None:
    """Races, summed up."""
    races = [benchmark_planner(seed) for seed in range(config.sweeps)]
    share = np.array([r.share for r in races])
    low, middle, high = (float(x) for x in np.percentile(share, [5, 50, 95]))
    error, width, grid_error, grid_width = np.array([[r.error, r.width, r.grid_error, r.grid_width] for r in races]).T
    reached = float(np.mean([r.reached for r in races]))
    rows = [
        ("surfaces on which the planner's interval became as narrow as the grid's", reached),
        ("its FLOPs over the grid's: median", middle),
        ("5th and 95th percentile", f"{low:.3f}, {high:.3f}"),
        ("largest", float(share.max())),
        ("share of surfaces at 0.5 or less", float(np.mean(share <= 0.5))),
        ("root mean square error of log N*, planner", float(np.sqrt(np.mean(error**2)))),
        ("the same, grid", float(np.sqrt(np.mean(grid_error**2)))),
        ("planner's 95% intervals that hold the truth", float(np.mean(np.abs(error) <= width))),
        ("the grid's", float(np.mean(np.abs(grid_error) <= grid_width))),
    ]
    show(f"{len(races)} simulated surfaces, noise 0.5% of loss", ("what", "value"), rows)


def conventions(config: Any) -> None:
    """Fitted exponents by convention."""
    rows = read_csv(config.runs).without_highest_losses(config.drop_highest)
    which = nearest_shapes(rows["params"], CHINCHILLA_SHAPES)
    groups = nearest_budgets(rows["flops"], config.isoflops) if config.isoflops else find_budgets(rows)[0]
    found = effects(rows, groups=groups, resampled=config.resamples)
    table = [
        (
            e.convention,
            *(e.parameters[name] for name in ("alpha", "beta", "E")),
            e.a,
            f"{e.a_interval[0]:.3f} to {e.a_interval[1]:.3f}" if e.a_interval else "not measured",
            e.a_counted,
            e.a_isoflop,
        )
        for e in found
    ]
    columns = ("convention", "alpha", "beta", "E", "a, C = 6ND", "95% interval", "a, C as counted", "a, approach 2")
    show(f"{len(rows)} runs, {len(np.unique(which))} shapes of table A9, counted and fitted again", columns, table)


# Public tables (docs/fits.md has their sources) and the law that each is fitted with.
TABLES = {
    "porian_refinedweb_tuned": "chinchilla",
    "llama3_isoflop": "chinchilla",
    "marin_comma_isoflop": "chinchilla",
    "muennighoff_data_constrained": "chinchilla",
    "frantar_t5_sparsity": "sparsity",
    "gadre_c4": "chinchilla",
}


def backtests(config: Any) -> None:
    """Score predictions of held-out runs, and count held-out IsoFLOP minima in intervals of N*.

    "before" are the bootstrap's intervals, "after" those with the discrepancy.
    """
    fitting, pooled, minima = FitConfig(starts=600), [], np.zeros(3, int)
    table: list[tuple[object, ...]] = []
    for name, law in TABLES.items():
        whole = read_csv(Path(config.runs) / f"{name}.csv")
        tests = [
            backtest(whole, find_law(law), fitting, share=share, resampled=config.resamples)
            for share in (1 / 10, 1 / 30)
        ]
        parts = []
        for how in ("plain", "interval"):
            found = [getattr(test, how) for test in tests]
            inside = np.concatenate([test.inside(one) for test, one in zip(tests, found, strict=True)])
            scores = [interval_score(one, test.held_out["loss"]) for test, one in zip(tests, found, strict=True)]
            width = np.concatenate([np.log(one[1] / one[0]) for one in found])
            parts.append((float(inside.mean()), float(np.concatenate(scores).mean()), float(np.median(width))))
            pooled.append((how, inside))
        (a, b, c), (d, e, f) = parts
        table.append((name, sum(len(test.held_out) for test in tests), a, d, f"{b:.4f}", f"{e:.4f}", f / c))
        if law == "chinchilla":
            minima += held_out_minima(whole, fitting, config.resamples)
    for how, title in (("plain", "before"), ("interval", "after")):
        every = np.concatenate([inside for one, inside in pooled if one == how])
        table.append((f"all, {title}", len(every), float(every.mean()), "", "", "", ""))
    columns = ("table", "held out", "inside, before", "after", "score, before", "after", "median width, ratio")
    show(
        "Runs above 1/10 and 1/30 of the largest one's FLOPs, predicted from those below (95% intervals)",
        columns,
        table,
    )
    rows = [("in the bootstrap's interval of N*", f"{minima[0]} of {minima[2]}")]
    rows.append(("in that of the law with its discrepancy", f"{minima[1]} of {minima[2]}"))
    show("Held-out IsoFLOP minima (parabolas)", ("what", "minima"), rows)


def held_out_minima(whole: Rows, fitting: FitConfig, resampled: int) -> np.ndarray:
    """IsoFLOP minima above the splits in intervals of N*: the bootstrap's, the law's with its discrepancy, and all."""
    groups, budgets = find_budgets(whole)
    found = np.zeros(3, int)
    # Tables that are no IsoFLOP sweeps have budgets by accident.
    if np.mean(groups >= 0) < 0.9:
        return found
    every = [m for m in isoflop_minima(whole, groups) if not m.refused]
    for share in (1 / 10, 1 / 30):
        below = whole["flops"] < share * whole["flops"].max()
        fitted = fit(whole.take(below), CHINCHILLA, fitting)
        held = [m for m in every if m.budget >= 0.99 * share * whole["flops"].max()]
        drawn = bootstrap(fitted, resampled)
        values = dict(zip(CHINCHILLA.parameters, drawn.natural_PB[:, drawn.converged_B], strict=True))
        wide = fitted.discrepancy().optima([m.budget for m in held]).params
        for m, draws in zip(held, wide, strict=True):
            plain = chinchilla_optimum(values, [m.budget]).params[0]
            here = float(chinchilla_optimum(fitted.parameters, [m.budget]).params[0, 0])
            ends = bootstrap_interval(plain[np.isfinite(plain)], len(fitted.rows), 5, 0.95, "huber", estimate=here)
            low, high = np.percentile(draws, [2.5, 97.5])
            found += ends[0] <= m.params <= ends[1], low <= m.params <= high, 1
    return found


# True laws at published values, or near them.
TRUTHS = {
    "chinchilla": {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28},
    "kaplan": {"N_c": 6.4e13, "D_c": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103},
    "data_constrained": {
        **{"A": 521.0, "B": 1488.0, "E": 1.87, "alpha": 0.3526596, "beta": 0.3526596},
        **{"R_D": 15.4, "R_N": 5.31},
    },
    "sparsity": {"a_S": 16.8, "c_S": 45.8, "B": 400.0, "c": 0.651, "b_S": 0.722, "b_N": 0.245, "b_D": 0.25},
}


def laws(config: Any) -> None:
    """Shares of simulated sweeps in which each law is picked, a line for every true one.

    60 runs over 1.5 decades of N and 2 of FLOPs, unique tokens 1/8 to 1 of the tokens, sparsity to 0.9, 1% noise.
    """
    stream, candidates, table = np.random.default_rng(0), [find_law(name) for name in TRUTHS], []
    # Sixty runs leave few optima, and a law that is not theirs flat valleys.
    fitting = FitConfig(starts=config.starts, keep=4, polish_steps=80)
    for name, truth in TRUTHS.items():
        law, picked = find_law(name), dict.fromkeys(TRUTHS, 0)
        for _ in range(config.sweeps):
            params = 10 ** stream.uniform(7.5, 9.0, 60)
            flops = 10 ** stream.uniform(18.0, 20.0, 60)
            tokens = flops / (6 * params)
            columns = {"params": params, "tokens": tokens, "sparsity": stream.choice([0.0, 0.5, 0.75, 0.9], 60)}
            columns |= {"unique_tokens": tokens * 2.0 ** -stream.uniform(0, 3, 60), "loss": np.ones(60)}
            design = make_rows(columns, "design")
            mean = law.predict(law.raw(truth)[:, None], law.gather(design))[:, 0]
            noisy = make_rows(columns | {"loss": np.exp(mean + 0.01 * stream.standard_normal(60))}, "simulated")
            picked[compare_laws(noisy, candidates, fitting)[0].law.name] += 1
        table.append((name, *(count / config.sweeps for count in picked.values())))
    show(f"Laws picked in {config.sweeps} simulated sweeps of each true law", ("truth", *TRUTHS), table)


def rows(config: Any) -> Iterator[Row]:
    """Print the audit that was asked for; the row says what it took.

    Raises:
      ConfigError: conventions or backtest without tables of runs.
    """
    if config.what in ("conventions", "backtest") and not config.runs:
        wanted = "a CSV of runs" if config.what == "conventions" else "the directory of the public tables"
        raise ConfigError(f"config.runs: the audit of {config.what} needs {wanted}")
    began, processor = time.perf_counter(), time.process_time()
    audits = {"coverage": coverage, "envelope": envelopes, "planner": planner}
    audits |= {"conventions": conventions, "backtest": backtests, "laws": laws}
    audits[config.what](config)
    seconds = time.perf_counter() - began
    yield Row(config.what, "audit", seconds, 1 / seconds, more={"processor s": time.process_time() - processor})
