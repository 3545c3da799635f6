"""Figures of a fit: IsoFLOP curves, the loss surface with its frontier, residuals, the bootstrap's cloud."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from scipy.stats import norm

from scaling.fitting.bootstrap import Bootstrap, interval
from scaling.fitting.fit import Fit
from scaling.isoflop import Curves, Minimum, PowerLaw
from scaling.optimum import compute_optimal, log_loss_at
from scaling.rows import PER_PARAMETER_AND_TOKEN, Rows
from tessera.reports.scaling_style import GRID, INK, MUTED, PALETTE, canvas, decades, ramp, titles


def short(value: float) -> str:
    """1.2e+21 as "1.2e21"."""
    return f"{value:.3g}".replace("e+", "e")


def isoflop_figure(
    rows: Rows,
    groups: Int[np.ndarray, "R"],
    budgets: Sequence[float],
    *,
    fitted: Fit | None = None,
    minima: Sequence[Minimum] = (),
    at: Mapping[str, float] | None = None,
) -> Figure:
    """Loss against parameters, a colour per budget: runs as points, the law (or parabolas) as lines, minima marked.

    Args:
      rows: the runs.
      groups: number of the budget of each, -1 for none.
      budgets: FLOPs by number.
      fitted: draws its law's IsoFLOP lines and minima.
      minima: of approach 2, draws their parabolas; refused ones dotted, without a mark.
      at: values of the law's further columns.
    """
    figure, (ax,) = canvas(width=8.0, height=4.8)
    numbers = [int(g) for g in np.unique(groups[groups >= 0])]
    for number, colour in zip(numbers, ramp(len(numbers)), strict=True):
        mine = groups == number
        sizes, loss = rows["params"][mine], rows["loss"][mine]
        ax.plot(sizes, loss, "o", color=colour, markersize=3.5, alpha=0.75, markeredgewidth=0)
        line = np.geomspace(sizes.min() / 1.15, sizes.max() * 1.15, 80)
        if fitted is not None:
            tokens = budgets[number] / (PER_PARAMETER_AND_TOKEN * line)
            height = np.exp(log_loss_at(fitted.law, fitted.theta[:, None], line, tokens, at)[:, 0])
            best = compute_optimal(fitted.law, fitted.theta[:, None], [budgets[number]], at=at)
            ax.plot(line, height, color=colour, linewidth=1.3)
            if line[0] <= best.params[0, 0] <= line[-1]:
                ax.plot(best.params[0], best.loss[0], "D", color=INK, markersize=4, zorder=4)
        end = float(loss[np.argmax(sizes)])
        note: dict[str, Any] = {
            "xytext": (6, 0),
            "textcoords": "offset points",
            "fontsize": 8,
            "color": colour,
            "va": "center",
            "annotation_clip": False,
        }
        ax.annotate(short(budgets[number]), (float(sizes.max()) * 1.15, end), **note)
    for found, colour in zip(minima, ramp(len(minima)), strict=True):
        if found.coefficients:
            mine = groups == numbers[list(minima).index(found)]
            line = np.geomspace(rows["params"][mine].min(), rows["params"][mine].max(), 80)
            style = ":" if found.refused else "-"
            ax.plot(line, np.polyval(found.coefficients, np.log(line)), style, color=colour, linewidth=1.3)
        if not found.refused:
            ax.plot(found.params, found.loss, "D", color=INK, markersize=4, zorder=4)
    decades(ax)
    titles(ax, "IsoFLOP curves, by budget in FLOPs", "parameters", "loss (nats per token); diamonds are minima")
    return figure


def surface_figure(fitted: Fit, budgets: Sequence[float], *, at: Mapping[str, float] | None = None) -> Figure:
    """Contours of the fitted loss over tokens and parameters, the runs, and the efficient frontier to the budgets."""
    rows = fitted.rows
    figure, (ax,) = canvas(width=8.0, height=5.0)
    best = compute_optimal(fitted.law, fitted.theta[:, None], sorted(budgets), at=at)
    all_params = np.concatenate([rows["params"], best.params[:, 0]])
    all_tokens = np.concatenate([rows["tokens"], best.tokens[:, 0]])
    params = np.geomspace(np.nanmin(all_params) / 2, np.nanmax(all_params) * 2, 70)
    tokens = np.geomspace(np.nanmin(all_tokens) / 2, np.nanmax(all_tokens) * 2, 70)
    mesh_n, mesh_d = (x.ravel() for x in np.meshgrid(params, tokens, indexing="ij"))
    loss = np.exp(log_loss_at(fitted.law, fitted.theta[:, None], mesh_n, mesh_d, at)[:, 0]).reshape(70, 70)
    floor = loss.min()
    levels = floor + np.geomspace((loss.max() - floor) / 200, loss.max() - floor, 14)[:-1]
    lines = ax.contour(tokens, params, loss, levels=levels, colors=MUTED, linewidths=0.7)
    ax.clabel(lines, fmt="%.3g", fontsize=7.5, colors=INK)
    ax.plot(rows["tokens"], rows["params"], "o", color=PALETTE[0], markersize=3, alpha=0.6, markeredgewidth=0)
    frontier = np.geomspace(rows["flops"].min(), max(*budgets, rows["flops"].max()), 60)
    path = compute_optimal(fitted.law, fitted.theta[:, None], frontier, at=at)
    ax.plot(path.tokens[:, 0], path.params[:, 0], color=PALETTE[1], linewidth=2)
    ax.plot(best.tokens[:, 0], best.params[:, 0], "D", color=PALETTE[1], markersize=5)
    for budget, d, n in zip(sorted(budgets), best.tokens[:, 0], best.params[:, 0], strict=True):
        if np.isfinite(n):
            ax.annotate(
                short(budget), (d, n), xytext=(-6, 7), textcoords="offset points", fontsize=8, color=INK, ha="right"
            )
    for axis in "xy":
        decades(ax, axis)
    titles(ax, "Fitted loss, runs (dots) and efficient frontier (line, budgets marked)", "tokens", "parameters")
    return figure


def residual_figure(fitted: Fit) -> Figure:
    """Residuals of log loss against FLOPs, and against normal quantiles."""
    figure, (left, right) = canvas(2, height=3.6)
    residual = -100 * fitted.residuals
    left.axhline(0, color=GRID, linewidth=1)
    left.plot(fitted.rows["flops"], residual, "o", color=PALETTE[0], markersize=3, alpha=0.7, markeredgewidth=0)
    decades(left)
    titles(left, "Residuals by size of run", "FLOPs", "observed over fitted loss - 1 (%)")
    quantiles = norm.ppf((np.arange(len(residual)) + 0.5) / len(residual))
    middle, spread = np.median(residual), np.subtract(*np.percentile(residual, [75, 25])) / 1.349
    right.plot(quantiles, middle + spread * quantiles, color=GRID, linewidth=1.2)
    right.plot(quantiles, np.sort(residual), "o", color=PALETTE[0], markersize=3, markeredgewidth=0)
    titles(right, "Against a normal distribution", "normal quantile", "residual (%); line from the quartiles")
    return figure


def bootstrap_figure(
    fitted: Fit, boot: Bootstrap, names: tuple[str, str], log_params_B: Float[np.ndarray, "B"], budget: float
) -> Figure:
    """Two parameters of every resample's fit, and the distribution of N* at a budget if the law has one."""
    finite = log_params_B[np.isfinite(log_params_B)]
    figure, axes = canvas(2 if len(finite) > 1 else 1, height=3.8, width=9.6 if len(finite) > 1 else 5.2)
    i, j = (fitted.law.parameters.index(name) for name in names)
    axes[0].plot(*boot.natural_PB[[i, j]], "o", color=PALETTE[0], markersize=2, alpha=0.25, markeredgewidth=0)
    point = fitted.law.natural(fitted.theta)
    axes[0].plot(point[i], point[j], "D", color=PALETTE[1], markersize=6)
    titles(axes[0], f"{boot.theta_PB.shape[1]} resamples (dots), all rows (diamond)", names[0], names[1])
    if len(finite) < 2:
        return figure
    low, high = (float(edge) for edge in np.exp(np.percentile(finite, [0.1, 99.9])))
    axes[1].hist(np.exp(finite), bins=np.geomspace(low, high, 50).tolist(), color=PALETTE[0])
    low, high = np.exp(interval(finite))
    for edge in (low, high):
        axes[1].axvline(edge, color=PALETTE[1], linewidth=1.2, linestyle=(0, (4, 2)))
    decades(axes[1])
    titles(axes[1], f"N* at {short(budget)} FLOPs, 95% of draws between lines", "optimal parameters", "resamples")
    return figure


def powers_figure(law: PowerLaw, minima: Sequence[Minimum], label: str = "N*") -> Figure:
    """Minima of approach 2 against budget, with the power law through them."""
    figure, (ax,) = canvas(width=6.0, height=3.8)
    good = [m for m in minima if not m.refused]
    budgets = np.array([m.budget for m in good])
    line = np.geomspace(budgets.min() / 2, budgets.max() * 2, 20)
    ax.plot(line, [law(x) for x in line], color=PALETTE[0], linewidth=1.5)
    ax.plot(budgets, [m.params for m in good], "D", color=INK, markersize=5)
    for axis in "xy":
        decades(ax, axis)
    titles(ax, f"{label} ~ C^{law.exponent:.3f} through {law.points} budgets", "FLOPs", "optimal parameters")
    return figure


def envelope_figure(curves: Curves, envelope: Float[np.ndarray, "E 3"], law: PowerLaw) -> Figure:
    """Training curves by size with their envelope, and the sizes that are lowest against FLOPs."""
    figure, (left, right) = canvas(2, height=4.0)
    order = np.argsort(curves.params)
    for index, colour in zip(order, ramp(len(order)), strict=True):
        seen = np.isfinite(curves.loss[index])
        left.plot(curves.flops[seen], curves.loss[index][seen], color=colour, linewidth=0.9, alpha=0.8)
    left.plot(envelope[:, 0], envelope[:, 2], ".", color=INK, markersize=3)
    decades(left)
    titles(left, "Training curves, small to large from dark to light", "FLOPs", "loss (nats per token); dots: lowest")
    line = np.geomspace(envelope[0, 0], envelope[-1, 0], 20)
    right.plot(envelope[:, 0], envelope[:, 1], ".", color=INK, markersize=4)
    right.plot(line, [law(x) for x in line], color=PALETTE[0], linewidth=1.5)
    for axis in "xy":
        decades(right, axis)
    titles(right, f"N* ~ C^{law.exponent:.3f} through the sizes of the envelope", "FLOPs", "parameters of the lowest")
    return figure


__all__ = [
    "bootstrap_figure",
    "envelope_figure",
    "isoflop_figure",
    "powers_figure",
    "residual_figure",
    "short",
    "surface_figure",
]
