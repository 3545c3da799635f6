"""Approaches 1 and 2 of Hoffmann et al. (2022): the envelope of training curves, and IsoFLOP minima.

Neither assumes a law for the loss; both end in N* = exp(k) C^a. A budget whose minimum lies on the edge of its sizes,
or whose points scatter more than the curve is deep, is refused with the reason.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.interpolate import Akima1DInterpolator

from scaling.fitting.determined import equal_losses, undetermined_sizes
from scaling.fitting.fit import Fit
from scaling.optimum import compute_optimal
from scaling.rows import PER_PARAMETER_AND_TOKEN, Rows, counted

How = Literal["parabola", "akima"]
# Relative differences of losses under this are rounding.
FLAT = 1e-9


class Minimum(NamedTuple):
    """The IsoFLOP minimum of one budget over sizes.

    Attributes:
      budget: FLOPs, the geometric mean of its runs'.
      params, loss: where the minimum is; NaN if refused.
      refused: the reason where there is none, "" otherwise.
      runs: number of the budget's runs.
      depth: rise of the curve's lower end above the minimum.
      scatter: root mean square of the points about the curve (0 for "akima", which passes through them).
      coefficients: of the parabola in log params, highest power first; empty for "akima".
      cubic_scatter: `scatter` about the best cubic; NaN for "akima", with weights and for fewer than five sizes.
    """

    budget: float
    params: float
    loss: float
    refused: str
    runs: int
    depth: float
    scatter: float
    coefficients: tuple[float, ...] = ()
    cubic_scatter: float = float("nan")


class PowerLaw(NamedTuple):
    """N* = exp(intercept) C^exponent, through `points` budgets; `residual` is the rms in log N*.

    Example:
      >>> import scaling
      >>> law = scaling.PowerLaw(exponent=0.5, intercept=0.0, points=5, residual=0.01)
      >>> round(law(1e20))
      10000000000
    """

    exponent: float
    intercept: float
    points: int
    residual: float

    def __call__(self, budget: float) -> float:
        """Compute N* at a budget."""
        return float(np.exp(self.intercept + self.exponent * np.log(budget)))


def group_budgets(flops: Float[np.ndarray, " R"], *, gap: float = 0.2) -> Int[np.ndarray, " R"]:
    """Number the budgets: sorted FLOPs, split where neighbors differ by more than `gap` (relative).

    Example:
      >>> import numpy as np, scaling
      >>> scaling.group_budgets(np.array([1e18, 1.05e18, 1e19])).tolist()
      [0, 0, 1]
    """
    order = np.argsort(flops, kind="stable")
    jumps = np.diff(np.log(flops[order])) > np.log1p(gap)
    groups = np.empty(len(flops), int)
    groups[order] = np.concatenate([[0], np.cumsum(jumps)])
    return groups


def find_budgets(rows: Rows, *, span: float = 1.5) -> tuple[Int[np.ndarray, " R"], list[float]]:
    """Find the budgets that runs were made at: a column `budget`, else gaps between their FLOPs.

    A group counts as a budget if it has at least three runs, of at least two sizes, whose FLOPs lie within a factor of
    `span`.

    Returns:
      The number of each row's budget, -1 where it has none, and the budgets: geometric means of the rows' FLOPs.

    Example:
      >>> import scaling
      >>> truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
      >>> groups, budgets = scaling.find_budgets(scaling.isoflop_design(truth, budgets=3, sizes=5))
      >>> groups.tolist(), [f"{budget:.1e}" for budget in budgets]
      ([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2], ['6.0e+18', '1.3e+20', '3.0e+21'])
    """
    named = rows.columns.get("budget")
    if named is not None and named.dtype.kind == "f":
        first = np.unique(named, return_inverse=True)[1]
    else:
        first = group_budgets(rows["flops"])
    groups = np.full(len(rows), -1)
    budgets: list[float] = []
    for group in np.unique(first):
        mine = first == group
        flops = rows["flops"][mine]
        if mine.sum() >= 3 and len(np.unique(rows["params"][mine])) > 1 and flops.max() <= span * flops.min():
            groups[mine] = len(budgets)
            budgets.append(float(np.exp(np.log(flops).mean())))
    return groups, budgets


def nearest_budgets(
    flops: Float[np.ndarray, " R"], budgets: Sequence[float] | np.ndarray, *, within: float = 0.25
) -> Int[np.ndarray, " R"]:
    """Find the index of the nearest named budget of every run, -1 where none is within the relative distance."""
    distance = np.abs(np.log(flops)[:, None] - np.log(np.asarray(budgets, float))[None, :])
    return np.where(distance.min(1) <= np.log1p(within), distance.argmin(1), -1)


def minimum(
    params: Float[np.ndarray, " R"],
    loss: Float[np.ndarray, " R"],
    budget: float,
    *,
    weights: Float[np.ndarray, " R"] | None = None,
    how: How = "parabola",
    nearest: int = 0,
    within: float = 0.0,
) -> Minimum:
    """Find the minimum of loss over log params among one budget's runs.

    A loss is a parabola in log params near its minimum only; `nearest` and `within` leave out sizes far from it.

    Args:
      params, loss: of the budget's runs.
      budget: FLOPs.
      weights: of the runs; 0 leaves a run out.
      how: the curve.
      nearest: number of sizes used, those nearest to the size of the lowest loss; 0 for all.
      within: largest ratio of a size used to the size of the lowest loss, either way; 0 for all.
    """
    w = np.ones(len(params)) if weights is None else weights
    used = w > 0
    x, y, w = np.log(params[used]), loss[used], w[used]
    if len(x) and (nearest or within):
        distance = np.abs(x - x[np.argmin(y)])
        sizes_by_distance = np.sort(np.abs(np.unique(x) - x[np.argmin(y)]))
        reach = sizes_by_distance[:nearest][-1] if nearest else np.inf
        near = distance <= min(reach, np.log(within) if within else np.inf) + 1e-9
        x, y, w = x[near], y[near], w[near]
    sizes = len(np.unique(x))
    wanted = 4 if how == "parabola" else 5
    if sizes < wanted:
        curve = "a parabola" if how == "parabola" else "an Akima spline"
        reason = f"{counted(sizes, 'size')}, {curve} needs at least {wanted}"
        return Minimum(budget, np.nan, np.nan, reason, len(x), 0.0, 0.0)
    if equal := equal_losses(y, FLAT):
        return Minimum(budget, np.nan, np.nan, equal, len(x), 0.0, 0.0)
    found = (
        _akima(x, y, w, budget) if how == "akima" else _parabola(x, y, w, budget, cubic=weights is None and sizes > 4)
    )
    if not found.refused and found.depth < FLAT * abs(found.loss):
        reason = f"the curve is flat: a depth of {found.depth:.1g} is rounding"
        return found._replace(params=np.nan, loss=np.nan, refused=reason)
    return found


def _parabola(x: np.ndarray, y: np.ndarray, w: np.ndarray, budget: float, *, cubic: bool) -> Minimum:
    center = float(x.mean())

    def about(degree: int) -> tuple[np.ndarray, float]:
        """The polynomial of a degree, and the rms of the points about it."""
        curve = np.polyfit(x - center, y, degree, w=np.sqrt(w))
        return curve, float(np.sqrt(np.average((np.polyval(curve, x - center) - y) ** 2, weights=w)))

    curve, scatter = about(2)
    vertex = -curve[1] / (2 * curve[0]) if curve[0] else np.inf
    ends = np.polyval(curve, np.array([x.min(), x.max()]) - center)
    lowest = float(np.polyval(curve, vertex)) if np.isfinite(vertex) else np.nan
    depth = float(ends.min() - lowest) if curve[0] > 0 else 0.0
    a, b, c = (float(value) for value in curve)
    shape = depth, scatter, (a, b - 2 * a * center, a * center**2 - b * center + c), about(3)[1] if cubic else np.nan
    if curve[0] <= 0:
        reason = "the parabola opens downwards"
    elif not x.min() < vertex + center < x.max():
        side = "smaller" if vertex + center <= x.min() else "larger"
        reason = f"the minimum is at the edge: {side} sizes are needed"
    elif scatter > depth:
        reason = f"the points scatter ({scatter:.2g}) more than the parabola is deep ({depth:.2g})"
    else:
        return Minimum(budget, float(np.exp(vertex + center)), lowest, "", len(x), *shape)
    return Minimum(budget, np.nan, np.nan, reason, len(x), *shape)


def _akima(x: np.ndarray, y: np.ndarray, w: np.ndarray, budget: float) -> Minimum:
    # An interpolant passes through its points: runs of one size count as their weighted mean.
    knots, where = np.unique(x, return_inverse=True)
    total = np.bincount(where, w)
    heights = np.bincount(where, w * y) / total
    fine = np.linspace(knots[0], knots[-1], 2001)
    curve = Akima1DInterpolator(knots, heights)(fine)
    lowest = int(np.argmin(curve))
    depth = float(min(curve[0], curve[-1]) - curve[lowest])
    if not 0 < lowest < len(fine) - 1:
        side = "smaller" if lowest == 0 else "larger"
        reason = f"the minimum is at the edge: {side} sizes are needed"
        return Minimum(budget, np.nan, np.nan, reason, len(x), depth, 0.0)
    return Minimum(budget, float(np.exp(fine[lowest])), float(curve[lowest]), "", len(x), depth, 0.0)


def minima(
    rows: Rows, groups: Int[np.ndarray, " R"], *, weights: Float[np.ndarray, " R"] | None = None, **options: Any
) -> list[Minimum]:
    """Find the minimum of every budget, refused ones included, in order of the group numbers; -1 is no budget.

    `options` are the further ones of `minimum`.
    """
    found = []
    for group in np.unique(groups[groups >= 0]):
        mine = groups == group
        budget = float(np.exp(np.log(rows["flops"][mine]).mean()))
        own = None if weights is None else weights[mine]
        found.append(minimum(rows["params"][mine], rows["loss"][mine], budget, weights=own, **options))
    return found


def power_fit(budgets: Sequence[float] | np.ndarray, values: Sequence[float] | np.ndarray) -> PowerLaw:
    """Fit a power law by least squares of log value on log budget.

    Raises:
      ValueError: fewer than two different budgets.
    """
    x, y = np.log(np.asarray(budgets, float)), np.log(np.asarray(values, float))
    if len(np.unique(x)) < 2:
        raise ValueError(f"{counted(len(x), 'budget')} with a minimum: a power law needs at least 2")
    center = x.mean()
    slope, height = np.polyfit(x - center, y, 1)
    rest = y - height - slope * (x - center)
    return PowerLaw(float(slope), float(height - slope * center), len(x), float(np.sqrt(np.mean(rest**2))))


def approach_2(
    rows: Rows,
    groups: Int[np.ndarray, " R"],
    *,
    weights: Float[np.ndarray, " R"] | None = None,
    **options: Any,
) -> tuple[PowerLaw, list[Minimum]]:
    """Run approach 2 (IsoFLOP): each budget's minimum, and the power law through those that are not refused.

    Args:
      rows: the runs.
      groups: budget of each, see `find_budgets`.
      weights: of the rows.
      **options: how, nearest and within of `minimum`.

    Raises:
      ValueError: fewer than two budgets have a minimum; the message says why the others were refused.

    Example:
      >>> import scaling
      >>> truth = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
      >>> rows = scaling.isoflop_design(truth, budgets=5, sizes=7, noise=0.002)
      >>> law, minima = scaling.approach_2(rows, scaling.group_budgets(rows["flops"]))
      >>> round(law.exponent, 1), [m.refused for m in minima]
      (0.5, ['', '', '', '', ''])
    """
    found = minima(rows, groups, weights=weights, **options)
    good = [m for m in found if not m.refused]
    if len(good) < 2:
        reasons = "; ".join(f"{m.budget:.3g}: {m.refused}" for m in found if m.refused)
        reasons = reasons or undetermined_sizes(rows) or "no runs of at least two sizes share a number of FLOPs"
        raise ValueError(f"{len(good)} of {len(found)} budgets have a minimum, 2 are needed ({reasons})")
    return power_fit([m.budget for m in good], [m.params for m in good]), found


class Curves(NamedTuple):
    """Training curves on one axis: FLOPs [E], parameters of each run [K], losses [K, E], infinite outside a run."""

    flops: Float[np.ndarray, " E"]
    params: Float[np.ndarray, " K"]
    loss: Float[np.ndarray, "K E"]


def training_curves(rows: Rows, runs: Sequence[object] | np.ndarray, *, points: int = 200) -> Curves:
    """Interpolate losses at FLOPs spaced evenly in their logarithm, linearly between a run's rows, not beyond them."""
    flops, params, losses_of = _interpolation(rows, runs, points)
    return Curves(flops, params, losses_of(rows["loss"]))


def _interpolation(
    rows: Rows, runs: Sequence[object] | np.ndarray, points: int
) -> tuple[np.ndarray, np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """The axis of training curves, the runs' parameters, and the map of the rows' losses [R] to the curves' [K, E]."""
    labels, log_flops = np.asarray(runs), np.log(rows["flops"])
    grid = np.linspace(log_flops.min(), log_flops.max(), points)
    params, parts = [], []
    for name in np.unique(labels):
        mine = np.flatnonzero(labels == name)
        mine = mine[np.argsort(log_flops[mine], kind="stable")]
        x = log_flops[mine]
        left = np.clip(np.searchsorted(x, grid, side="right") - 1, 0, max(len(x) - 2, 0))
        right = np.minimum(left + 1, len(x) - 1)
        share = (grid - x[left]) / np.where(x[right] > x[left], x[right] - x[left], 1.0)
        parts.append((mine[left], mine[right], np.clip(share, 0.0, 1.0), (grid >= x[0]) & (grid <= x[-1])))
        params.append(rows["params"][mine[0]])
    left, right, share, inside = (np.stack(each) for each in zip(*parts, strict=True))

    def losses_of(loss: np.ndarray) -> np.ndarray:
        return np.where(inside, loss[left] * (1 - share) + loss[right] * share, np.inf)

    return np.exp(grid), np.array(params), losses_of


def envelope(curves: Curves) -> tuple[PowerLaw, Float[np.ndarray, "E 3"]]:
    """Find the lower envelope of curves and its power law; see `approach_1`.

    Raises:
      ValueError: fewer than two different sizes are ever the lowest.
    """
    sizes, losses = curves.params, curves.loss
    competing = np.isfinite(losses).sum(0) >= 2
    winner = np.argmin(losses, 0)
    inner = competing & (sizes[winner] > sizes.min()) & (sizes[winner] < sizes.max())
    found = np.stack([curves.flops, sizes[winner], losses.min(0)], 1)[inner]
    if len(np.unique(found[:, 1])) < 2:
        inner_sizes, curves_ = len(np.unique(found[:, 1])), counted(len(sizes), "training curve")
        raise ValueError(f"the envelope of {curves_} has {counted(inner_sizes, 'inner size')}; 2 are needed")
    # Sizes are exact, and a size is the lowest at FLOPs about those it is best for: log C is regressed on log N. The
    # other way a staircase of k steps is flatter than the line through their middles, by 1 / k^2 and more with noise.
    found_at = power_fit(found[:, 1], found[:, 0])
    if not found_at.exponent:
        raise ValueError(f"the sizes of {len(sizes)} training curves that are lowest do not grow with FLOPs")
    slope = 1 / found_at.exponent
    return PowerLaw(slope, -slope * found_at.intercept, len(found), abs(slope) * found_at.residual), found


def approach_1(rows: Rows, runs: Sequence[object] | np.ndarray, *, points: int = 200) -> tuple[PowerLaw, np.ndarray]:
    """Run approach 1 (envelope): at evenly spaced log FLOPs, the size of the run whose training curve is lowest.

    Args:
      rows: points of training curves; a run's loss is interpolated linearly in log FLOPs, not beyond its ends.
      runs: the run each row belongs to.
      points: number of FLOP counts.

    Returns:
      The power law, by least squares of log FLOPs on log params, and the envelope [E, 3] of (FLOPs, params, loss): only
      where at least two runs have a loss and neither the smallest nor the largest size is the lowest (an edge means
      only that better sizes were not tried).

    Raises:
      ValueError: the envelope has fewer than two different sizes.

    Example:
      >>> import numpy as np, scaling
      >>> params = np.geomspace(1e6, 1e9, 8).repeat(50)
      >>> tokens = np.tile(np.geomspace(1e7, 1e11, 50), 8)
      >>> loss = 1.69 + 406.4 / params**0.34 + 410.7 / tokens**0.28
      >>> rows = scaling.make_rows({"params": params, "tokens": tokens, "loss": loss})
      >>> law, envelope = scaling.approach_1(rows, runs=params)
      >>> 0.44 < law.exponent < 0.47, envelope.shape[1]
      (True, 3)
    """
    return envelope(training_curves(rows, runs, points=points))


def bootstrap_envelope(
    fitted: Fit,
    runs: Sequence[object] | np.ndarray,
    count: int,
    *,
    noise_of: Sequence[object] | np.ndarray | None = None,
    points: int = 200,
    seed: int = 42,
) -> Float[np.ndarray, "2 B"]:
    """Bootstrap (exponent, intercept) of approach 1: simulate losses from a law, centered on the estimate.

    Sizes stay as they are: a resample without a size would be another design, whose envelope is another staircase.
    Losses are those of a fitted law with normal noise of the residuals' size, of every run and of every row beside.
    Draws are moved onto the estimate, and by the bias of approach 1, their median less the law's own optimum: with
    noise a curve is the lowest by luck, and those beyond the largest size are missing.

    Args:
      fitted: the fit of a law of params and tokens to the rows.
      runs: the curve each row belongs to.
      count: of draws.
      noise_of: the run that each row shares its noise with; `runs` if None. Rows of equal size that are read as one
        curve are runs of their own.
      points: of `approach_1`.
      seed: of the noise.

    Returns:
      The draws, NaN where there is no law; all NaN where the rows themselves have none.
    """
    rows, law = fitted.rows, fitted.law
    flops, params, losses_of = _interpolation(rows, runs, points)
    group = np.unique(np.asarray(runs if noise_of is None else noise_of), return_inverse=True)[1]
    members = np.bincount(group)
    residual = -fitted.residuals
    means = np.bincount(group, residual) / members
    # Variances within and between runs; the law's parameters are taken from what varies between.
    spare = len(rows) - len(members)
    within = float(np.sum((residual - means[group]) ** 2) / spare) if spare else 0.0
    between = float(np.sum(members * means**2) / max(len(members) - len(law.parameters), 1))
    between = max(between - within, 0.0) / float(members.mean())
    mean = np.log(rows["loss"]) + fitted.residuals
    stream = np.random.default_rng(seed)
    found = np.full((2, count), np.nan)
    pivot = float(np.log(flops).mean())

    def at_pivot(loss: np.ndarray) -> tuple[float, float]:
        line, _ = envelope(Curves(flops, params, losses_of(loss)))
        return line.exponent, line.intercept + line.exponent * pivot

    try:
        estimate = np.array(at_pivot(rows["loss"]))
    except ValueError:
        return found
    for b in range(count):
        noise = np.sqrt(between) * stream.standard_normal(len(members))[group]
        try:
            found[:, b] = at_pivot(np.exp(mean + noise + np.sqrt(within) * stream.standard_normal(len(rows))))
        except ValueError:
            continue
    if np.isfinite(found[0]).any():
        middle, ends = np.nanmedian(found, axis=1), [float(flops[0]), float(flops[-1]), float(np.exp(pivot))]
        best = np.log(compute_optimal(law, fitted.theta[:, None], ends).params[:, 0])
        optimum = np.array([(best[1] - best[0]) / np.log(ends[1] / ends[0]), best[2]])
        bias = np.where(np.isfinite(optimum), middle - optimum, 0.0)
        # What moves the median off the optimum moved the estimate.
        found += (estimate - middle - bias)[:, None]
    return np.stack([found[0], found[1] - found[0] * pivot])


def bootstrap_exponent(
    rows: Rows,
    groups: Int[np.ndarray, " R"],
    counts_RB: Float[np.ndarray, "R B"],
    **options: Any,
) -> Float[np.ndarray, "2 B"]:
    """Bootstrap (exponent, intercept) of approach 2 over runs; NaN where fewer than two budgets have a minimum.

    `options` are those of `approach_2`.
    """
    found = np.full((2, counts_RB.shape[1]), np.nan)
    for b in range(counts_RB.shape[1]):
        try:
            law, _ = approach_2(rows, groups, weights=counts_RB[:, b], **options)
        except ValueError:
            continue
        found[:, b] = law.exponent, law.intercept
    return found


def tokens_at(budget: float, params: float) -> float:
    """Compute the tokens of a budget at a size, C / 6 N."""
    return budget / (PER_PARAMETER_AND_TOKEN * params)
