"""Whether rows, and a law fitted to them, determine a compute-optimal size, and the cause where they do not."""

import numpy as np
from jaxtyping import Float

from scaling.evaluate import Terms
from scaling.laws import Law
from scaling.rows import Rows, counted


def _line(rows: Rows) -> tuple[float, float, float]:
    """How the sizes lie: standard deviations of (log N, log D) along and across their main line, and its slope."""
    centered = np.stack([np.log(rows[name]) - np.log(rows[name]).mean() for name in ("params", "tokens")])
    values, vectors = np.linalg.eigh(centered @ centered.T / len(rows))
    slope = float(vectors[1, 1] / vectors[0, 1]) if abs(vectors[0, 1]) > 1e-9 else np.inf
    return float(np.sqrt(max(values[1], 0.0))), float(np.sqrt(max(values[0], 0.0))), slope


def undetermined_rows(rows: Rows, law: Law, across: float = 0.03) -> str:
    """Find the reason why no fit of a law can determine an optimum from rows; "" if there is none.

    Args:
      rows: the runs.
      law: to fit.
      across: standard deviation of log N and log D about a line under which they lie on it.

    Example:
      >>> import numpy as np, scaling
      >>> from scaling.fitting.determined import undetermined_rows
      >>> params = np.geomspace(1e7, 1e10, 12)
      >>> rows = scaling.make_rows({"params": params, "tokens": 20 * params, "loss": 2 + 300 / params**0.3})
      >>> undetermined_rows(rows, scaling.find_law("chinchilla"))
      'N and D are proportional (D = 20 N): runs of one size with other tokens are needed'
    """
    if reason := equal_losses(rows["loss"]):
        return reason
    if not {"log_params", "log_tokens"} <= set(law.features):
        return ""
    if reason := undetermined_sizes(rows, across):
        return reason
    if len(rows) <= len(law.parameters):
        free = counted(len(law.parameters), "parameter")
        return f"{counted(len(rows), 'row')} for {free} leave nothing to judge the fit by: add runs"
    return ""


def equal_losses(loss: Float[np.ndarray, " R"], least: float = 1e-6) -> str:
    """Tell that losses are equal, to a relative `least`; "" if they are not."""
    return f"all losses are {loss[0]:.4g}" if np.ptp(loss) < least * np.abs(loss).max() else ""


def undetermined_sizes(rows: Rows, across: float = 0.03) -> str:
    """Find the reason why sizes on a line in log N and log D determine no optimum; see `undetermined_rows`."""
    for name, symbol in (("params", "N"), ("tokens", "D")):
        if np.ptp(np.log(rows[name])) < across:
            return f"all runs have {symbol} = {np.median(rows[name]):.3g} {name}: runs of other {name} are needed"
    _, aside, slope = _line(rows)
    if aside < across:
        if abs(slope - 1) < 0.05:
            ratio = float(np.median(rows["tokens"] / rows["params"]))
            return f"N and D are proportional (D = {ratio:.3g} N): runs of one size with other tokens are needed"
        if abs(slope + 1) < 0.05:
            return f"all runs have one budget ({np.median(rows['flops']):.3g} FLOPs): runs at other budgets are needed"
        return f"D follows N (as N^{slope:.2f}): runs of one size with other tokens are needed"
    return ""


def undetermined_fit(law: Law, theta_P: Float[np.ndarray, " P"], rows: Rows) -> str:
    """Find the reason why a fitted law determines no optimum; "" if there is none. See `scaling.undetermined`."""
    if reason := undetermined_rows(rows, law):
        return reason
    here = dict(zip(law.parameters, theta_P, strict=True))
    for name in sorted(law.nonnegative):
        if here[name] <= law.least:
            return f"{name} = {here[name]:g}, its least value: these losses do not fall as the law says"
        if here[name] > 5:
            return f"{name} = {here[name]:.3g} is no exponent of a loss curve: its term only serves a few rows"
    for (coefficient, factors), share in zip(law.terms, _term_shares(law, theta_P, rows), strict=True):
        if factors and share < 1e-6:
            return f"the term of {coefficient} vanishes from every row"
    return ""


def _term_shares(law: Law, theta_P: np.ndarray, rows: Rows) -> list[float]:
    """The largest share of every term in the loss of a row."""
    if not law.terms:
        return []
    features = law.gather(rows)
    terms = Terms(law.terms, law.parameters, features, dict.fromkeys(features, 0.0), held=law.held)
    return [float(share.max()) for share in terms.shares(theta_P[:, None])[1]]
