"""Fit runs by one of the three approaches of Hoffmann et al. 2022, and write the result: `fit.json` and the report."""

import importlib.util
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from scaling import doctor, isoflop, misfit
from scaling.fitting.bootstrap import Bootstrap, bootstrap, refit, resamples
from scaling.fitting.determined import undetermined_rows
from scaling.fitting.discrepancy import Discrepancy
from scaling.fitting.fit import Fit, FitConfig, fit
from scaling.fitting.intervals import bootstrap_interval, prediction_interval
from scaling.laws import Law, restrict, tie
from scaling.optimum import Optimum, chinchilla_optimum, compute_optimal, inference_optimum, off_optimum
from scaling.planner import suggest
from scaling.plausible import examine_rows
from scaling.published import CHINCHILLA, find_law
from scaling.rows import PER_PARAMETER_AND_TOKEN, RowError, Rows, counted, make_rows
from scaling.tables import read_rows
from tessera.infra.logger import Progress, write_text
from tessera.infra.remote import local
from tessera.reports import scaling as figures
from tessera.reports.html import Section, Table, table_of
from tessera.reports.style import pick
from tessera.sweeps.fit_page import FitPage

# Digitized or rounded sizes of one model differ by less than this; neighboring models by more.
SAME_SIZE = 0.02
# Multiples of the best size whose cost is told.
OTHER_SIZES = (0.25, 0.5, 2.0, 4.0)
# Shares of the largest run's FLOPs below which a backtest fits.
BACKTESTS = (1 / 10, 1 / 30)
# Of the approaches that are only compared with.
COMPARED_RESAMPLES, COMPARED_STARTS = 300, 500
# Rows x resamples from which on a fit shows its progress: some ten seconds.
LONG = 2_000_000


@dataclass(frozen=True)
class ScalingConfig:
    """What to fit.

    Attributes:
      runs: the table of runs: CSV (or with tabs or semicolons), JSON lines or Parquet.
      columns: the file's name of a column by ours, such as params: parameter_count.
      units: factors of a column's numbers that have no unit of their own, such as params: 1e6; they go before
        a unit at the end of a name in `columns`, as in "weights (M)".
      law: name of a published law, or FILE.py:NAME for a `scaling.Law` of your own; for approach 3.
      hold: values at which parameters of the law are held, by name.
      tie: parameters of the law that are tied to another, such as beta: alpha.
      approach: 1 envelope, 2 IsoFLOP minima, 3 parametric.
      drop_highest: rows with the highest losses that are left out.
      fit: of approach 3.
      resamples: bootstrap resamples; 0 for none.
      cluster: column whose values are resampled as wholes; "" for single rows.
      level: of the intervals.
      seed: of the resamples.
      budgets: FLOPs to plan for; empty: see beyond.
      beyond: budgets to plan for, as multiples of the largest run's FLOPs, where `budgets` is empty.
      isoflops: the budgets the runs were made at; empty: found from a column `budget` or from gaps in their FLOPs.
      curve: of approach 2.
      nearest: sizes of a budget that approach 2 uses, those nearest to the lowest loss; 0 for all.
      within: largest ratio of a size that approach 2 uses to that of the lowest loss; 0 for all.
      at: values of the law's further columns at which optima are computed, by name; their medians where not given.
      misfit: whether intervals allow for a discrepancy of the law (approach 3), a new run's always, those of optima
        where the law is rejected, and whether large runs are predicted from small ones.
      laws: published laws that the fitted one is compared with by held-out error (approach 3); empty for none.
      vocabulary: number of tokens, to find losses that no model has; 0 if it is not known.
      inference_tokens: tokens that will be served; for each, the model that reaches the first budget's loss with the
        fewest FLOPs of training and serving together (approach 3).
    """

    runs: str
    columns: tuple[tuple[str, str], ...] = ()
    units: tuple[tuple[str, float], ...] = ()
    law: str = "chinchilla"
    hold: tuple[tuple[str, float], ...] = ()
    tie: tuple[tuple[str, str], ...] = ()
    approach: Literal[1, 2, 3] = 3
    drop_highest: int = 0
    fit: FitConfig = FitConfig()
    resamples: int = 4000
    cluster: str = ""
    level: float = 0.95
    seed: int = 42
    budgets: tuple[float, ...] = ()
    beyond: tuple[float, ...] = (1.0, 10.0, 100.0)
    isoflops: tuple[float, ...] = ()
    curve: Literal["parabola", "akima"] = "parabola"
    nearest: int = 0
    within: float = 0.0
    at: tuple[tuple[str, float], ...] = ()
    misfit: bool = True
    laws: tuple[str, ...] = ("chinchilla", "kaplan")
    vocabulary: int = 0
    inference_tokens: tuple[float, ...] = ()

    def __post_init__(self):
        if not self.runs:
            raise ValueError("runs is empty: give a table of runs with --config.runs=FILE")
        for name in ("budgets", "beyond", "isoflops"):
            if not all(0 < value < math.inf for value in getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)}: positive finite numbers are wanted")
        for name in ("hold", "at"):
            if not all(math.isfinite(value) for _, value in getattr(self, name)):
                raise ValueError(f"{name} {dict(getattr(self, name))}: finite numbers are wanted")
        if not all(0 < value < math.inf for _, value in self.units):
            raise ValueError(f"units {dict(self.units)}: positive finite factors are wanted, such as params: 1e6")
        if not (self.budgets or self.beyond):
            raise ValueError("budgets and beyond are empty: at least one budget to plan for is needed")
        if not 0 < self.level < 1:
            raise ValueError(f"level {self.level} must be between 0 and 1")
        if self.nearest and self.nearest < 4:
            raise ValueError(f"nearest {self.nearest}: a parabola needs at least 4 sizes; 0 uses all")
        if self.resamples and self.resamples < 2:
            raise ValueError(f"resamples {self.resamples}: an interval needs at least 2, and some hundreds; 0 for none")
        if self.seed < 0 or self.vocabulary < 0:
            raise ValueError(f"seed {self.seed}, vocabulary {self.vocabulary}: neither can be negative")
        if self.within and not self.within > 1:
            raise ValueError(f"within {self.within}: a ratio of sizes above 1; 0 uses all")
        if not all(0 <= tokens < math.inf for tokens in self.inference_tokens):
            raise ValueError(f"inference_tokens {self.inference_tokens}: finite counts, of 0 or more, are wanted")


def load_runs(config: ScalingConfig) -> Rows:
    """Read the table of runs; errors as of `scaling.read_rows`."""
    return read_rows(local(config.runs), dict(config.columns), dict(config.units))


def law_of(config: ScalingConfig) -> Law:
    """The law to fit, with what is tied and held.

    Raises:
      ValueError: no such law, file, or parameter.
    """
    return _law_of(config.law, config.tie, config.hold)


@lru_cache(maxsize=8)  # one object a law: laws without a closed form are compiled
def _law_of(law_name: str, ties: tuple[tuple[str, str], ...], holds: tuple[tuple[str, float], ...]) -> Law:
    file, colon, name = law_name.rpartition(":")
    if colon and file.endswith(".py"):
        spec = importlib.util.spec_from_file_location("_own_laws", file)
        if spec is None or spec.loader is None or not Path(file).is_file():
            raise ValueError(f"law {law_name!r}: no file {file}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        law = getattr(module, name, None)
        if not isinstance(law, Law):
            there = [key for key, value in vars(module).items() if isinstance(value, Law)]
            raise ValueError(f"law {law_name!r}: {file} has no scaling.Law {name}; it has {', '.join(there) or 'none'}")
    else:
        law = find_law(law_name)
    law = tie(law, **dict(ties)) if ties else law
    return restrict(law, **dict(holds)) if holds else law


def planned_for(rows: Rows, config: ScalingConfig) -> ScalingConfig:
    """The settings with budgets to plan for: those given, or multiples of the largest run."""
    largest = float(rows["flops"].max())
    return config if config.budgets else replace(config, budgets=tuple(largest * times for times in config.beyond))


def groups_of(rows: Rows, config: ScalingConfig) -> tuple[np.ndarray, list[float]]:
    """Budget number of every row (-1: none), and the budgets."""
    if config.isoflops:
        return isoflop.nearest_budgets(rows["flops"], config.isoflops), list(config.isoflops)
    return isoflop.find_budgets(rows)


def curve_options(config: ScalingConfig, how: str = "") -> dict[str, Any]:
    """Options of `scaling.isoflop.minimum`."""
    return {"how": how or config.curve, "nearest": config.nearest, "within": config.within}


def clusters_of(rows: Rows, config: ScalingConfig) -> np.ndarray | None:
    """The labels of the rows that are resampled together; None for single rows.

    Raises:
      RowError: there is no such column.
    """
    if config.cluster and config.cluster not in rows.columns:
        what = f"the column is missing, which config.cluster names; there are {', '.join(rows.columns)}"
        raise RowError([(0, config.cluster, what)], rows.source)
    return rows[config.cluster] if config.cluster else None


def run_parametric(rows: Rows, config: ScalingConfig, whole: Rows, bar: Progress | None = None) -> FitPage:
    """Approach 3: a parametric loss; `bar` is advanced by its stages."""
    bar = bar or Progress(0, active=False)
    config = planned_for(rows, config)
    law, clusters = law_of(config), clusters_of(rows, config)
    fitted = fit(rows, law, config.fit)
    reason = doctor.undetermined(fitted)
    at = held_at(fitted, config)
    bar.advance(1, now="resamples")
    # Resamples of rows that determine nothing wander along valleys.
    boot = None
    if config.resamples and not undetermined_rows(rows, law):
        with Progress(config.resamples, "resamples", parent=bar) as drawn:
            boot = bootstrap(fitted, config.resamples, seed=config.seed, clusters=clusters, watch=drawn.advance)
    bar.advance(1, now="optima and doctor")
    result = describe_fit(fitted, boot, config, whole, reason)
    own, (groups, budgets) = [], groups_of(rows, config)
    if {"log_params", "log_tokens"} <= set(law.features):
        if budgets and (groups >= 0).any():
            caption = (
                "Runs at one budget (dots) and the fitted law there (lines); diamonds are the law's minima. Every "
                "curve should pass through its points and turn where they do."
            )
            curves = partial(figures.isoflop_figure, rows, groups, budgets, fitted=fitted, at=at)
            own.append(Section("IsoFLOP curves", curves, caption + rows_outside(groups)))
        if not reason:
            caption = "Contours of equal loss by the fitted law, the runs, and the sizes that are best at each budget."
            caption += " Contours and frontier are of the law alone, which is rejected." if result["rejected"] else ""
            own.append(Section("Loss surface", partial(figures.surface_figure, fitted, config.budgets, at=at), caption))
    caption = "How far each run's loss lies from the fitted law; without a pattern the law misses nothing."
    own.append(Section("Residuals", partial(figures.residual_figure, fitted), caption))
    bar.advance(1, now="backtests and other laws")
    if not reason:
        own += misfit_sections(rows, law, config, result)
    if boot is not None and len(law.parameters) > 1:
        target = max(config.budgets)
        names = ("alpha", "beta") if {"alpha", "beta"} <= set(law.parameters) else law.parameters[:2]
        draws = np.full(1, np.nan) if reason else optima(fitted, converged_draws(fitted, boot), (target,), at).params[0]
        picture = partial(figures.bootstrap_figure, fitted, boot, (names[0], names[1]), np.log(draws), target)
        caption = "The fit to every resample, as if the law held." if result["rejected"] else ""
        own.append(Section("Bootstrap", picture, caption))
    return FitPage(result, [], own)


def misfit_sections(rows: Rows, law: Law, config: ScalingConfig, result: dict[str, Any]) -> list[Section]:
    """Add the backtest and the comparison of laws to a result; their sections."""
    sections, tests, refused = [], [], []
    # A coarser grid finds the same optima of fewer runs.
    few = min(config.fit.starts or COMPARED_STARTS, COMPARED_STARTS)
    quick = replace(config.fit, starts=few, keep=min(config.fit.keep, 8))
    for share in BACKTESTS if config.misfit else ():
        try:
            tests.append(misfit.backtest(rows, law, quick, share=share, level=config.level))
        except ValueError as error:
            refused.append(str(error).removeprefix(f"{rows.source}: "))
    if config.misfit:
        result["doctor"].append(misfit.examine_backtests(tests, config.level, refused)._asdict())
    result["backtest"] = [
        {
            **{"share": one.share, "rows": one.rows, "held_out": len(one.held_out)},
            **{"inside": float(one.inside().mean()), "bias": one.bias},
            "score": float(misfit.interval_score(one.interval, one.held_out["loss"], config.level).mean()),
        }
        for one in tests
    ]
    if tests:
        columns = {"fitted below, of the largest run": "share", "runs": "rows", "runs predicted": "held_out"}
        columns |= {
            "inside their interval": "inside",
            "mean log observed / predicted": "bias",
            "interval score": "score",
        }
        caption = (
            "The law fitted to small runs only, and the larger ones predicted: dots are observed losses over predicted "
            f"ones, bars the {config.level:.0%} intervals."
        )
        picture = partial(figures.backtest_figure, tests)
        sections.append(Section("Backtest", [picture, table_of(result["backtest"], columns)], caption))
    result["laws"] = []
    if config.laws:
        others = [find_law(name) for name in config.laws if name != law.name]
        others += [tie(law, beta="alpha")] if {"alpha", "beta"} <= set(law.parameters) & law.nonnegative else []
        usable = [one for one in others if len(rows) > len(one.parameters) and columns_of(one) <= set(rows.columns)]
        found = misfit.compare_laws(rows, [law, *usable], quick)
        best = max(found, key=lambda one: one.held_out.sum())
        for i, one in enumerate(found):
            row = {"law": one.law.name, "parameters": len(one.law.parameters), "held_out_error": one.error}
            row |= {"log_likelihood": one.log_likelihood, "bic": one.bic, "chosen": i == 0}
            row["held_out_density"] = float(one.held_out.sum())
            row["density_below_best"], row["density_error"] = misfit.density_gained(best, one)
            result["laws"].append(row)
        result["doctor"].append(misfit.examine_laws(found, law)._asdict())
        shown: dict[str, Any] = {
            "law": "law",
            "parameters": "parameters",
            "rms error of rows left out": "held_out_error",
            "their log density": "held_out_density",
            "below the best": lambda row: f"{row['density_below_best']:.1f} ± {row['density_error']:.1f}",
        }
        shown |= {"log likelihood": "log_likelihood", "BIC": "bic"}
        shown["verdict"] = lambda row: "chosen" if row["chosen"] else ""
        caption = (
            "Fitted by least squares of log loss. Chosen: the law of fewest parameters whose log density of rows left "
            "out, one at a time, is below the best by no more than the standard error of the difference."
        )
        sections.append(Section("Other laws", table_of(result["laws"], shown), caption))
    return sections


def columns_of(law: Law) -> set[str]:
    """Columns that a law reads."""
    needed = set(law.features) - law.optional
    return {"sparsity" if name == "log_density" else name.removeprefix("log_") for name in needed}


def run_isoflop(rows: Rows, config: ScalingConfig, whole: Rows) -> FitPage:
    """Approach 2: a power law through the minima of IsoFLOP curves.

    Raises:
      ValueError: fewer than two budgets have a minimum.
    """
    config = planned_for(rows, config)
    groups, budgets = groups_of(rows, config)
    options = curve_options(config)
    try:
        law, found = isoflop.approach_2(rows, groups, **options)
    except ValueError as error:
        out = int((groups < 0).sum())
        where = "given" if config.isoflops else f"found from the FLOPs of {counted(len(rows), 'row')}, {out} at none"
        text = f"{rows.source}: {error}. Budgets {where}: {len(budgets)}"
        if out or len(budgets) < 2:
            text += "; name those the runs were made at with --config.isoflops=(6e18, 1e19, ...)"
        raise ValueError(text) from error
    draws = np.zeros((2, 0))
    if config.resamples:
        counts = min(config.resamples, 1000), len(rows)
        drawn = resamples(*counts, seed=config.seed, clusters=clusters_of(rows, config))
        draws = isoflop.bootstrap_exponent(rows, groups, drawn, **options)
    moved = ""
    if len(whole) > len(rows):
        try:
            every, _ = isoflop.approach_2(whole, groups_of(whole, config)[0], **options)
            moved = f"the exponent of N* at {every.exponent:.3f} instead of {law.exponent:.3f}"
        except ValueError:
            moved = "no power law"
    findings = [
        *examine_rows(whole, config.vocabulary),
        doctor.outside_budgets(groups, rows),
        doctor.left_out(rows, whole, moved),
        *doctor.examine_minima(law, found, draws, max(config.budgets)),
    ]
    result = describe_powers(law, draws, config, len(rows), findings)
    result |= {"approach": 2, "rows": len(rows), "minima": [m._asdict() for m in found]}
    columns = {"budget (FLOPs)": "budget", "runs": "runs", "N*": "params"} | {
        k: k for k in ("loss", "depth", "scatter")
    }
    columns = {key: name for key, name in columns.items() if config.curve == "parabola" or key != "scatter"}
    table = table_of(result["minima"], columns | {"verdict": lambda row: row["refused"] or "used"})
    refused = sum(bool(m.refused) for m in found)
    lead = f"Approach 2 ({config.curve}): {law.points} of {len(found)} budgets have a minimum; {refused} are refused."
    lines = ", their parabolas (lines, dotted where refused)" if config.curve == "parabola" else ""
    caption = f"Runs (dots){lines} and minima (diamonds)." + rows_outside(groups)
    pictures = [partial(figures.powers_figure, law, found)]
    own = [
        Section("IsoFLOP curves", partial(figures.isoflop_figure, rows, groups, budgets, minima=found), caption),
        Section("Minima", [*pictures, table], "The minima (diamonds) by budget and the power law through them (line)."),
    ]
    return FitPage(result, [lead], own)


def rows_outside(groups: np.ndarray) -> str:
    """A sentence for a caption where rows are at no budget."""
    out = int((groups < 0).sum())
    return f" {out} of {len(groups)} rows are at none of the budgets and not shown." if out else ""


def curve_labels(rows: Rows) -> tuple[np.ndarray, np.ndarray, bool]:
    """The curve and the run of every row, and whether a column `run` says so; else rows of one size are a curve."""
    if "run" in rows.columns:
        return rows["run"], rows["run"], True
    return isoflop.group_budgets(rows["params"], gap=SAME_SIZE), np.arange(len(rows)), False


def envelope_draws(rows: Rows, config: ScalingConfig, count: int) -> np.ndarray:
    """Draws [2, B] of approach 1; none where Chinchilla's law, from which they are simulated, has no fit."""
    curves, runs, _ = curve_labels(rows)
    if not count or len(rows) <= len(CHINCHILLA.parameters):
        return np.full((2, count), np.nan)
    squares = FitConfig(objective="normal", starts=COMPARED_STARTS, keep=8)
    return isoflop.bootstrap_envelope(fit(rows, CHINCHILLA, squares), curves, count, noise_of=runs, seed=config.seed)


def without_bias(line: isoflop.PowerLaw, draws: np.ndarray, rows: Rows) -> isoflop.PowerLaw:
    """The power law in the middle of the draws of approach 1, which are moved by its bias; `line` without draws."""
    if not np.isfinite(draws[0]).any():
        return line
    middle = float(np.log(rows["flops"]).mean())
    exponent, height = (float(np.nanmedian(values)) for values in (draws[0], draws[1] + draws[0] * middle))
    return line._replace(exponent=exponent, intercept=height - exponent * middle)


def run_envelope(rows: Rows, config: ScalingConfig, whole: Rows) -> FitPage:
    """Approach 1: the envelope of training curves; without a column `run`, runs of one size are read as one curve.

    Raises:
      ValueError: the envelope has fewer than two sizes.
    """
    config = planned_for(rows, config)
    labels, _, named = curve_labels(rows)
    curves = isoflop.training_curves(rows, labels)
    law, envelope = isoflop.envelope(curves)
    draws = envelope_draws(rows, config, min(config.resamples, 1000))
    runs = len(curves.params)
    moved = ""
    if len(whole) > len(rows):
        try:
            every, _ = isoflop.approach_1(whole, curve_labels(whole)[0])
            moved = f"the exponent of N* at {every.exponent:.3f} instead of {law.exponent:.3f}"
        except ValueError:
            moved = "no power law"
    findings = [
        *examine_rows(whole, config.vocabulary),
        doctor.left_out(rows, whole, moved),
        *doctor.examine_envelope(envelope, curves, draws, max(config.budgets), named=named),
    ]
    best = without_bias(law, draws, rows)
    result = describe_powers(best, draws, config, runs, findings) | {"approach": 1, "rows": len(rows)}
    result["envelope"] = law.exponent
    table = Table(("FLOPs", "parameters of the lowest curve", "loss"), pick(envelope.tolist(), 20))
    lead = (
        f"Approach 1: {runs} training curves, the lowest of them at {len(envelope)} FLOP counts. Their sizes grow as "
    )
    lead += f"C^{law.exponent:.3f}" + (f", C^{best.exponent:.3f} without bias." if best is not law else ".")
    own = [Section("Envelope", [partial(figures.envelope_figure, curves, envelope, law), table])]
    return FitPage(result, [lead], own)


def compare_approaches(rows: Rows, config: ScalingConfig, result: dict[str, Any]) -> None:
    """Add the exponents of N* by all approaches to a result, and the finding where they disagree.

    Approaches 2 and 3 get the same resamples, so that the interval of their difference is that of paired draws; a
    rejected law has those of its discrepancy instead, which are paired with nothing. Approach 1 is compared where a
    column `run` says what the curves are: single final losses have no envelope.
    """
    config, named = planned_for(rows, config), curve_labels(rows)[2]
    count, (groups, _) = min(config.resamples, COMPARED_RESAMPLES), groups_of(rows, config)
    drawn = resamples(max(count, 1), len(rows), seed=config.seed, clusters=clusters_of(rows, config))[:, :count]
    law, fitted, reason = law_of(config), None, ""
    if {"log_params", "log_tokens"} <= set(law.features) and len(rows) >= len(law.parameters):
        few = min(config.fit.starts or COMPARED_STARTS, COMPARED_STARTS)
        fitted = fit(rows, law, replace(config.fit, starts=few))
        reason = doctor.undetermined(fitted)
    bent = bool(fitted and not reason and config.misfit and count and misfit.lack_of_fit(fitted).rejected)

    def minima(how: str) -> tuple[float, np.ndarray]:
        options = curve_options(config, how)
        found, _ = isoflop.approach_2(rows, groups, **options)
        return found.exponent, isoflop.bootstrap_exponent(rows, groups, drawn, **options)[0]

    def envelope() -> tuple[float, np.ndarray]:
        line, _ = isoflop.approach_1(rows, curve_labels(rows)[0])
        simulated = envelope_draws(rows, config, count)
        return without_bias(line, simulated, rows).exponent, simulated[0]

    def parametric() -> tuple[float, np.ndarray]:
        if fitted is None or reason:
            raise ValueError(f"undetermined: {reason}" if reason else f"{law.name} has no N* here")
        if bent:
            slopes = bent_growth(fitted.discrepancy(), config, held_at(fitted, config))
            return float(np.nanmedian(slopes)), slopes
        slope = float(growth_of(fitted, fitted.theta[:, None], config)[0])
        if not count:
            return slope, np.zeros(0)
        boot = refit(fitted, drawn)
        return slope, np.where(boot.converged_B, growth_of(fitted, boot.theta_PB, config), np.nan)

    own = {1: "1, envelope", 2: f"2, {config.curve}", 3: f"3, {config.law}"}[result["approach"]]
    ways: dict[str, Callable[[], tuple[float, np.ndarray]]] = {"1, envelope": envelope}
    ways |= {f"2, {how}": partial(minima, how) for how in ("parabola", "akima")}
    ways[f"3, {config.law}"] = parametric
    table: list[dict[str, Any]] = []
    draws: dict[str, np.ndarray] = {}
    for name, way in ways.items():
        try:
            value, draws[name] = way()
        except ValueError as error:
            table.append({"approach": name, "a": None, "interval": None, "refused": str(error)})
            continue
        if name == f"3, {config.law}" and fitted is not None:
            estimate, objective = (None, "normal") if bent else (value, config.fit.objective)
            interval = edges(draws[name], len(rows), len(law.parameters), config.level, objective, estimate)
        else:
            interval = edges(draws[name], len(rows), 2, config.level, "normal")
        if name == own and "exponents" in result:
            value, interval = (result["exponents"]["a"].get(key) for key in ("value", "interval"))
        refused = "" if np.isfinite(value) else "no best size"
        if name == "1, envelope" and not named:
            draws.pop(name)
            refused = "not compared: no column `run`, sizes read as curves"
        table.append({"approach": name, "a": value, "interval": interval, "refused": refused})
    result["approaches"] = table
    found = {
        f"approach {row['approach']}": (row["a"], *row["interval"])
        for row in table
        if row["approach"] in draws and row["interval"]
    }
    paired = {
        (f"approach {one}", f"approach {other}"): edges(draws[one] - draws[other], len(rows), 2, config.level, "normal")
        for one, other in itertools.combinations(draws, 2)
        if one != "1, envelope" and not (bent and other == f"3, {config.law}")
    }
    under: dict[str, tuple[float, float, float]] = {}
    for how in ("parabola", "akima") if fitted is not None and not reason and count else ():
        value = next(row["a"] for row in table if row["approach"] == f"2, {how}")
        options = curve_options(config, how)
        if value is None or fitted is None:
            continue
        simulated = doctor.minima_under_law(fitted, groups, draws=count, **options)
        if len(simulated) > 0.5 * count:
            tail = 50 * (1 - config.level)
            under[f"approach 2, {how}"] = (value, *np.percentile(simulated, [tail, 100 - tail]).tolist())
    result["doctor"].append(doctor.disagreement(found, paired, under)._asdict())


def optima(fitted: Fit, theta_PS: np.ndarray, budgets: Sequence[float], at: Mapping[str, float]) -> Optimum:
    """N*, D* and loss at budgets; in closed form for Chinchilla's law, further columns held at `at`."""
    if fitted.law is CHINCHILLA:
        return chinchilla_optimum(fitted.law.by_name(theta_PS), budgets)
    return compute_optimal(fitted.law, theta_PS, budgets, at=at)


def held_at(fitted: Fit, config: ScalingConfig) -> dict[str, float]:
    """Values of the law's further columns at which optima are computed: `config.at`, else their medians.

    Raises:
      ValueError: `config.at` names a column that the law does not have.
    """
    found = {name: float(np.median(values)) for name, values in doctor.others(fitted).items()}
    unknown = sorted(set(dict(config.at)) - set(found))
    if unknown:
        columns = f"its further columns are {', '.join(found)}" if found else "it has no further column"
        raise ValueError(f"config.at names {unknown[0]!r}, which {fitted.law.name} does not use here; {columns}")
    return found | dict(config.at)


def converged_draws(fitted: Fit, boot: Bootstrap) -> np.ndarray:
    """Parameters [P, S] of the resamples that converged.

    Some hundreds for laws without a closed form, which take a search per draw: they give the interval.
    """
    return boot.theta_PB[:, boot.converged_B][:, : None if fitted.law is CHINCHILLA else 300]


def edges(
    draws: np.ndarray, units: int, parameters: int, level: float, objective: str, estimate: float | None = None
) -> list[float] | None:
    """An interval from draws, or None from fewer than two finite ones; see `bootstrap_interval`."""
    finite = draws[np.isfinite(draws)]
    if len(finite) < 2:
        return None
    return [float(edge) for edge in bootstrap_interval(finite, units, parameters, level, objective, estimate=estimate)]


def growth_of(fitted: Fit, theta_PS: np.ndarray, config: ScalingConfig) -> np.ndarray:
    """The slope of log N* over log C between the first and the last budget."""
    return doctor.growth(fitted, theta_PS, config.budgets, held_at(fitted, config))


def describe_fit(
    fitted: Fit, boot: Bootstrap | None, config: ScalingConfig, whole: Rows, reason: str = ""
) -> dict[str, Any]:
    """Everything `fit.json` holds for approach 3.

    Args:
      fitted: the fit.
      boot: its bootstrap.
      config: the settings, budgets included.
      whole: the rows before any were left out.
      reason: why no optimum is determined; see `scaling.undetermined`.
    """
    law, here, target, at = fitted.law, fitted.parameters, max(config.budgets), held_at(fitted, config)
    units = len(np.unique(fitted.rows[config.cluster])) if config.cluster else len(fitted.rows)
    tested = None if reason else misfit.lack_of_fit(fitted)
    lacking = tested is not None and tested.rejected
    wrong = fitted.discrepancy() if config.misfit and boot is not None and not reason else None

    def pair(draws: np.ndarray, estimate: float | None) -> list[float] | None:
        objective = "normal" if estimate is None else fitted.config.objective
        return edges(draws, units, len(law.parameters), config.level, objective, estimate)

    natural = fitted.law.by_name(boot.theta_PB[:, boot.converged_B]) if boot is not None else {}
    values: dict[str, dict[str, Any]] = {name: {"value": here[name]} for name in law.parameters}
    # Draws of a parameter that nothing depends on stay where they began.
    for name in {*doctor.without_effect(fitted), *(doctor.ran_away(fitted) if reason else ())}:
        values[name]["undetermined"] = True
        natural.pop(name, None)
    for name, draws in natural.items():
        values[name] |= {"interval": pair(draws, values[name]["value"]), "se": spread_of(draws)}
        if name in law.positive:
            with np.errstate(divide="ignore"):
                values[name]["log_se"] = spread_of(np.log(draws))
    intervals = "bootstrap over runs, percentiles (bias-corrected for huber and laplace)"
    sized = {"log_params", "log_tokens"} <= set(law.features)
    bent = None
    if wrong is not None and sized and lacking:
        bent = wrong.optima(config.budgets, at=at, seed=config.seed)
        intervals += (
            "; the law is rejected, so optima and the exponent are those of the law with its discrepancy: the median "
            "and percentiles of its draws"
        )
    groups = groups_of(fitted.rows, config)[0]
    findings = [
        *examine_rows(whole, config.vocabulary),
        *([doctor.outside_budgets(groups, fitted.rows)] if sized and groups.max() >= 0 else []),
        *([] if reason else [misfit.examine_law(fitted)]),
        *doctor.examine(fitted, target, boot, all_rows=whole, at=at, lowest=min(config.budgets)),
    ]
    result: dict[str, Any] = {
        "approach": 3,
        "law": law.name,
        "formula": law.formula,
        "rows": len(fitted.rows),
        "objective": fitted.config.objective,
        **{name: getattr(fitted, name) for name in ("value", "converged", "log_likelihood", "scale")},
        "undetermined": reason,
        "rejected": bent is not None,
        "held": at,
        "level": config.level,
        "intervals": intervals if boot is not None else "none",
        "parameters": values,
        "budgets": planned(fitted, boot, config, pair, wrong, bent, reason),
        "off_optimum": [] if reason else off_optimum(law, fitted.theta, config.budgets[0], OTHER_SIZES, at=at),
        "inference": [] if reason else serving(fitted, config),
        # The best run for a law that is wrong is no good advice.
        "next_runs": [] if reason or lacking else suggest(fitted, target),
        "rows_ratio": [float(edge(fitted.rows["tokens"] / fitted.rows["params"])) for edge in (np.min, np.max)],
        "next_runs_withheld": "the law is rejected by its residuals" if lacking else "",
        "doctor": [f._asdict() for f in findings],
    }
    if reason or not np.isfinite(result["budgets"][0]["params"]):
        return result
    slope = float(growth_of(fitted, fitted.theta[:, None], config)[0])
    if wrong is not None and bent is not None:
        draws = bent_growth(wrong, config, at)
        own: dict[str, dict[str, Any]]
        middle, own = float(np.nanmedian(draws)), {"a": {"law": slope}, "b": {"law": 1 - slope}}
        own["a"]["between"] = [float(edge(wrong.rows["flops"])) for edge in (np.min, np.max)]
        ordered = sorted(result["budgets"], key=lambda row: row["flops"])
        times = {name: float(np.log(ordered[-1][name] / ordered[0][name])) for name in ("params", "flops")}
        if times["flops"]:
            own["a"]["planned"] = times["params"] / times["flops"]
    else:
        draws = growth_of(fitted, converged_draws(fitted, boot), config) if boot is not None else np.zeros(0)
        middle, own = slope, {"a": {}, "b": {}}
    result["exponents"] = {
        name: {"value": value, **own[name]}
        | ({"interval": pair(drawn, value if bent is None else None)} if boot else {})
        for name, value, drawn in (("a", middle, draws), ("b", 1 - middle, 1 - draws))
    }
    return result


def bent_growth(wrong: Discrepancy, config: ScalingConfig, at: Mapping[str, float]) -> np.ndarray:
    """Draws of the slope of log N* over log C of a law with its discrepancy, between the smallest and largest runs.

    What a rejected law does beyond the runs is not known well enough for a slope.
    """
    ends = float(wrong.rows["flops"].min()), float(wrong.rows["flops"].max())
    sizes = np.log(wrong.optima(ends, at=at, seed=config.seed).params)
    return (sizes[1] - sizes[0]) / np.log(ends[1] / ends[0])


def spread_of(draws: np.ndarray) -> float:
    """The standard deviation of the finite draws."""
    finite = draws[np.isfinite(draws)]
    return float(np.std(finite, ddof=1)) if len(finite) > 1 else math.nan


def planned(
    fitted: Fit,
    boot: Bootstrap | None,
    config: ScalingConfig,
    pair: Any,
    wrong: Discrepancy | None,
    bent: Optimum | None,
    reason: str = "",
) -> list[dict[str, Any]]:
    """N*, D*, their ratio and the loss at every asked budget, with intervals, and one new run's loss there.

    Where `bent` are draws of a rejected law with its discrepancy, values are their medians, and the law's own have
    names that end in `_law`.
    """
    names = ("params", "tokens", "ratio", "loss")
    if reason:
        return [{"flops": budget} | dict.fromkeys(names, math.nan) for budget in config.budgets]
    at = held_at(fitted, config)
    best = optima(fitted, fitted.theta[:, None], config.budgets, at)
    drawn = optima(fitted, converged_draws(fitted, boot), config.budgets, at) if boot is not None else None
    drawn = drawn if bent is None else bent
    table = []
    for c, budget in enumerate(config.budgets):
        row: dict[str, Any] = {"flops": budget}
        for name in names:
            row[name] = float(getattr(best, name)[c, 0])
            if bent is not None:
                row[f"{name}_law"] = row[name]
                # Of logarithms, so that the medians of N*, D* and their ratio are those of one draw.
                row[name] = float(np.exp(np.nanmedian(np.log(getattr(bent, name)[c]))))
            if drawn is not None:
                row[f"{name}_interval"] = pair(getattr(drawn, name)[c], row[name] if bent is None else None)
        if boot is not None and np.isfinite(row["params"]):
            columns = {"params": [row["params"]], "tokens": [row["tokens"]], "loss": [1.0]}
            there = make_rows(columns | {name: [value] for name, value in at.items()}, "the optimum")
            interval = partial(prediction_interval, fitted, boot) if wrong is None else wrong.predict
            row["run_interval"] = interval(there, level=config.level)[:, 0].tolist()
        table.append(row)
    return table


def serving(fitted: Fit, config: ScalingConfig) -> list[dict[str, float]]:
    """The cheapest model of the first budget's loss when tokens will be served, for every number of them."""
    at = held_at(fitted, config)
    best = optima(fitted, fitted.theta[:, None], config.budgets[:1], at)
    loss, params, table = float(best.loss[0, 0]), float(best.params[0, 0]), []
    for tokens in config.inference_tokens if np.isfinite(loss) else ():
        found = inference_optimum(fitted.law, fitted.theta, loss, tokens, at=at)
        total = found.training_flops + found.inference_flops
        saved = 1 - total / (config.budgets[0] + 2 * params * tokens)
        table.append({"inference_tokens": tokens, "loss": loss, "saved": saved, **found._asdict()})
    return table


def describe_powers(
    law: isoflop.PowerLaw, draws: np.ndarray, config: ScalingConfig, units: int, findings: Sequence[Any]
) -> dict[str, Any]:
    """Exponents and optima of a power law, with intervals from draws [2, B] of (exponent, intercept)."""

    def pair(values: np.ndarray) -> list[float] | None:
        return edges(values, units, 2, config.level, "normal")

    def sizes(budget: float, params: Any) -> dict[str, Any]:
        tokens = budget / (PER_PARAMETER_AND_TOKEN * params)
        return {"params": params, "tokens": tokens, "ratio": tokens / params}

    table = []
    for budget in config.budgets:
        drawn = sizes(budget, np.exp(draws[1] + draws[0] * np.log(budget)))
        intervals = {f"{name}_interval": pair(values) for name, values in drawn.items()}
        table.append({"flops": budget} | sizes(budget, law(budget)) | intervals)
    exponents = {
        "a": {"value": law.exponent, "interval": pair(draws[0])},
        "b": {"value": 1 - law.exponent, "interval": pair(1 - draws[0])},
    }
    found = [finding._asdict() for finding in findings]
    return {"exponents": exponents, "budgets": table, "level": config.level, "doctor": found}


def finite(value: Any) -> Any:
    """The same with NaN and infinities as None, which JSON can hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_numbers(workdir: Path, numbers: Mapping[str, Any]) -> None:
    """Write `fit.json`."""
    write_text(workdir / "fit.json", json.dumps(finite(numbers), indent=1) + "\n")


def fit_runs(workdir: Path, rows: Rows, config: ScalingConfig, *, show: bool = False) -> FitPage:
    """Fit runs by `config.approach`, compare it with the others, and write `fit.json`; the page is another step.

    `show` reports the progress of a fit that takes long.

    Raises:
      ValueError: the approach has no result for these rows.
      RowError: a column that the law or the settings need is missing or wrong.
    """
    used = rows.without_highest_losses(config.drop_highest)
    stages, long = 5 if config.approach == 3 else 2, len(rows) * max(config.resamples, 1) > LONG
    work = f"{counted(len(used), 'run')}, {config.resamples} resamples (--config.resamples=300 for fewer)"
    with Progress(stages, "fit", active=show and long, begins=work) as bar:
        if config.approach == 3:
            found = run_parametric(used, config, rows, bar)
        else:
            found = (run_envelope if config.approach == 1 else run_isoflop)(used, config, rows)
        bar.advance(1, now="all approaches")
        compare_approaches(used, config, found.result)
        bar.advance(1)
    write_numbers(workdir, found.result)
    return found
