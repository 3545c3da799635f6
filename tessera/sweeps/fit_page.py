"""The page of a fit: its numbers in sentences and tables, the doctor's findings, the sections of its approach."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scaling.rows import counted
from tessera.reports.html import Section, Table, config_section, paragraphs, table_of, write_report
from tessera.reports.style import short


class FitPage(NamedTuple):
    """A fit: its numbers, what to say before them, and the sections of its own approach."""

    result: dict[str, Any]
    lead: list[str]
    own: list[Section]


def span(pair: list[float] | None) -> str:
    """An interval as text; "not measured" without one."""
    return f"{short(pair[0])} to {short(pair[1])}" if pair else "not measured"


def summary(result: Mapping[str, Any]) -> list[str]:
    """The fit and what follows from it, in sentences."""
    texts = []
    if result["approach"] == 3:
        values = ", ".join(f"{name} = {value_of(result, name, 5)}" for name in result["parameters"])
        state = "converged" if result["converged"] else "did not converge"
        law = result["formula"] or result["law"]
        texts.append(f"{law}, fitted to {counted(result['rows'], 'run')}: {values}. The fit {state}.")
        if result["undetermined"]:
            texts.append(
                f"The optimum is undetermined: {result['undetermined']}. Parameters mean little by themselves."
            )
        elif result["held"]:
            held = ", ".join(f"{name} = {value:.4g}" for name, value in result["held"].items())
            texts.append(f"Optima are for {held} (--config.at.{next(iter(result['held']))}=VALUE for another).")
    if "exponents" in result:
        a, b = result["exponents"]["a"], result["exponents"]["b"]
        text = f"Optimal parameters grow as C^{a['value']:.3f} ({result['level']:.0%} interval "
        text += f"{span(a.get('interval'))}), optimal tokens as C^{b['value']:.3f}"
        if "between" in a:
            low, high = map(short, a["between"])
            text += f", between {low} and {high} FLOPs, those of the smallest and the largest run"
            if "planned" in a:
                text += f"; from the first to the last budget below, parameters as C^{a['planned']:.3f}"
        texts.append(text + ".")
    for row in result["budgets"]:
        at = f"At {short(row['flops'])} FLOPs"
        if result.get("undetermined"):
            continue
        if not np.isfinite(row["params"]):
            texts.append(f"{at} this law has no best size between one and all.")
            continue
        params, ratio = (span(row.get(f"{name}_interval")) for name in ("params", "ratio"))
        texts.append(
            f"{at}: {short(row['params'])} parameters ({params}), {short(row['tokens'])} tokens, "
            f"{row['ratio']:.3g} per parameter ({ratio})."
        )
    for row in result.get("inference", []):
        text = f"To reach a loss of {row['loss']:.4g} and serve {short(row['inference_tokens'])} tokens"
        text += ", by the law alone: " if result["rejected"] else ": "
        text += f"{short(row['params'])} parameters trained on {short(row['tokens'])} tokens, which saves "
        texts.append(text + f"{row['saved']:.1%} of all FLOPs over the compute-optimal model of that loss.")
    if result.get("rejected"):
        texts.append(
            "The law is rejected by its residuals: these optima are medians of the law with what it misses, intervals "
            f"allow for it. The law by itself would have {law_alone(result)}."
        )
    if result.get("next_runs"):
        best = min(result["next_runs"], key=lambda row: row["after"])
        texts.append(
            f"Next run to buy: {short(best['params'])} parameters on {short(best['tokens'])} tokens, takes the error "
            f"of log N* from {short(best['before'])} to {short(best['after'])}.{beyond_rows(result, [best])}"
        )
    warnings = [f["name"] for f in result["doctor"] if f["verdict"] == "warning"]
    if warnings:
        texts.append(f"The doctor warns of: {', '.join(warnings)}.")
    return texts


def beyond_rows(result: Mapping[str, Any], runs: Sequence[Mapping[str, float]]) -> str:
    """A sentence where the tokens per parameter of runs to buy lie outside those of the fitted rows."""
    low, high = result["rows_ratio"]
    # Sizes at the edge of the table have its ratio but for rounding.
    out = [row["tokens"] / row["params"] for row in runs]
    out = [ratio for ratio in out if not 0.999 * low < ratio < 1.001 * high]
    if not out:
        return ""
    ratios = ", ".join(short(ratio) for ratio in out)
    return f" Its tokens per parameter, {ratios}, lie outside those of the rows, {short(low)} to {short(high)}."


def value_of(result: Mapping[str, Any], name: str, digits: int) -> str:
    """A parameter's value as text; "undetermined" where no prediction depends on it or it is infinite."""
    value = result["parameters"][name]["value"]
    lost = result["parameters"][name].get("undetermined") or not np.isfinite(value)
    return "undetermined" if lost else f"{value:.{digits}g}"


def parameter_table(result: Mapping[str, Any]) -> Table:
    """The law's parameters with standard errors and intervals, for the page and for a terminal.

    Of what is positive the error is that of its logarithm too, and it alone where it is above 1: then draws span orders
    of magnitude, and their standard deviation is about the largest.
    """

    def error(row: Mapping[str, Any]) -> str:
        if row.get("se") is None or not np.isfinite(row["se"]):
            return "not measured"
        return f"{row['se']:.4g}" if row.get("log_se", 0.0) <= 1 else "–"

    found = [{"name": name} | values for name, values in result["parameters"].items()]
    columns: dict[str, Any] = {"parameter": "name", "value": lambda row: value_of(result, row["name"], 7)}
    columns["standard error"] = error
    columns["of its logarithm"] = lambda row: f"{row['log_se']:.4g}" if "log_se" in row else None
    return table_of(found, columns | {f"{result['level']:.0%} interval": lambda row: span(row.get("interval"))})


def law_alone(result: Mapping[str, Any]) -> str:
    """What a rejected law says without its discrepancy, as text."""
    texts = [f"C^{result['exponents']['a']['law']:.3f}"] if "exponents" in result else []
    texts += [f"{short(row['params_law'])} parameters at {short(row['flops'])} FLOPs" for row in result["budgets"]]
    return ", ".join(texts)


def number_sections(result: Mapping[str, Any]) -> list[Section]:
    """The law's parameters, the sizes to train at each budget, the next run to buy, the doctor's findings."""
    sections = []
    if "parameters" in result:
        table = parameter_table(result)
        caption = (
            f"Objective {result['value']:.8g}, a sum over rows; residuals of log loss have scale "
            f"{result['scale']:.3g}. Intervals: {result['intervals']}. Standard errors above 1 of a logarithm have no "
            "counterpart beside the value."
        )
        sections.append(Section("Parameters", table, caption))
    if not result.get("undetermined"):
        sections.append(optimum_section(result))
    if "approaches" in result:
        shown: dict[str, Any] = {"approach": lambda row: f"approach {row['approach']}", "N* grows as C^": "a"}
        shown |= {f"{result['level']:.0%} interval": lambda row: span(row["interval"]), "remark": "refused"}
        caption = "The same rows by all approaches. Where intervals do not fit together, the doctor says so."
        sections.append(Section("All approaches", table_of(result["approaches"], shown), caption))
    if result.get("next_runs"):
        columns = {"FLOPs of the run": "flops", "parameters": "params", "tokens": "tokens"}
        table = table_of(result["next_runs"], columns | {"error of log N* before": "before", "after": "after"})
        caption = (
            "For each cost the size that takes most off the standard error of log N* at "
            f"{short(max(row['flops'] for row in result['budgets']))} FLOPs, at the noise of the residuals; the law is "
            "assumed to hold. Such a run teaches most about the law; it is not the best model, see What to train."
            + beyond_rows(result, result["next_runs"]).replace(" Its tokens", " Some tokens")
        )
        sections.append(Section("The next run to buy", table, caption))
    elif result.get("next_runs_withheld"):
        text = f"None is recommended: {result['next_runs_withheld']}, "
        text += "and the run that is best for it need be no good one."
        sections.append(Section("The next run to buy", paragraphs(text)))
    worst_first = sorted(result["doctor"], key=lambda found: ("warning", "note", "fine").index(found["verdict"]))
    findings = table_of(worst_first, {"verdict": "verdict", "examined": "name", "finding": "text"})
    return [*sections, Section("Doctor", findings)]


def optimum_section(result: Mapping[str, Any]) -> Section:
    """Compute-optimal sizes at each budget, the cost of other sizes, and the change when tokens will be served."""

    def ranged(name: str, interval: str = "") -> Any:
        """A value with its interval in one cell: a column each would not fit beside each other."""
        pair = interval or f"{name}_interval"
        return lambda row: short(row[name]) + (f" ({span(row[pair])})" if row.get(pair) else "")

    columns: dict[str, Any] = {"FLOPs": "flops", "N* (interval)": ranged("params"), "D*": "tokens"}
    columns |= {"D* / N* (interval)": ranged("ratio")}
    caption = "FLOPs = 6 x parameters x tokens."
    if result.get("rejected"):
        columns |= {"N*, law alone": "params_law"}
        caption += " The law is rejected: values are medians of the law with its discrepancy; other tables are of the "
        caption += "law alone."
    more = []
    if result["approach"] == 3:
        columns |= {"loss (of one run)": ranged("loss", "run_interval")}
        other = {"size over N*": "factor", "parameters": "params", "tokens": "tokens", "loss": "loss"}
        more = [
            table_of(result["off_optimum"], other | {"excess loss": "excess", "share of the budget wasted": "wasted"})
        ]
        caption += " The second table is for the first budget: what a model of another size costs."
    if result.get("inference"):
        served = {"tokens served": "inference_tokens", "parameters": "params", "tokens": "tokens"}
        served |= {
            "training FLOPs": "training_flops",
            "serving FLOPs": "inference_flops",
            "FLOPs saved over N*": "saved",
        }
        more.append(table_of(result["inference"], served))
        caption += " The third: the model of the same loss that is cheapest to train and serve."
    return Section("What to train", [table_of(result["budgets"], columns), *more], caption)


def fit_page(workdir: Path, found: FitPage, source: str) -> Path:
    """Write the report of a fit to the rows of `source`; returns its path.

    Raises:
      MissingMatplotlib: matplotlib is not installed.
    """
    doubts = [one["text"] for one in found.result["doctor"] if "unit" in one["name"] and one["verdict"] != "fine"]
    lead = Section("", paragraphs(*doubts, *found.lead, *summary(found.result)))
    sections = [lead, *number_sections(found.result), *found.own, config_section(workdir)]
    return write_report(workdir, f"Scaling law from {counted(found.result['rows'], 'run')}", sections, subtitle=source)
