"""Figures of scaling laws and sweeps: IsoFLOP curves, loss surface, residuals, bootstrap, learning rate, batch size."""

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from scaling.batch import Surface
from scaling.fitting.bootstrap import Bootstrap, interval
from scaling.fitting.fit import Fit
from scaling.isoflop import Curves, Minimum, PowerLaw
from scaling.misfit import Backtest
from scaling.optimum import compute_optimal, log_loss_at
from scaling.rows import Rows
from tessera.reports import style
from tessera.reports.style import GRID, INK, MUTED, PALETTE, Axes, Figure, dots, log_values, note, ramp, short, titles


def isoflop_figure(
    rows: Rows,
    groups: Int[np.ndarray, " R"],
    budgets: Sequence[float],
    *,
    fitted: Fit | None = None,
    minima: Sequence[Minimum] = (),
    at: Mapping[str, float] | None = None,
) -> Figure:
    """Loss against parameters, a color per budget: runs as points, the law (or parabolas) as lines, minima marked.

    Args:
      rows: the runs.
      groups: number of the budget of each, -1 for none.
      budgets: FLOPs by number.
      fitted: draws its law's IsoFLOP lines and minima.
      minima: of approach 2, draws their parabolas; refused ones dotted, without a mark.
      at: values of the law's further columns.
    """
    figure, (ax,) = style.canvas(width=8.0, height=4.8)
    numbers = [int(g) for g in np.unique(groups[groups >= 0])]
    for number, color in zip(numbers, ramp(len(numbers)), strict=True):
        sizes, loss = rows["params"][groups == number], rows["loss"][groups == number]
        dots(ax, sizes, loss, color, 3.5)
        line = np.geomspace(sizes.min() / 1.15, sizes.max() * 1.15, 80)
        if fitted is not None:
            mine, theta = rows.take(groups == number), fitted.theta[:, None]
            # FLOPs as the table counts them need not be 6 N D.
            product = float(np.median(mine["params"] * mine["tokens"] / mine["flops"]))
            height = np.exp(log_loss_at(fitted.law, theta, line, budgets[number] * product / line, at)[:, 0])
            best = compute_optimal(fitted.law, theta, [budgets[number]], at=at, tokens_per_flop=product)
            ax.plot(line, height, color=color, linewidth=1.3)
            if line[0] <= best.params[0, 0] <= line[-1]:
                _diamond(ax, best.params[0], best.loss[0])
        note(ax, line[-1], float(loss[np.argmax(sizes)]), short(budgets[number]), color=color)
    for number, found, color in zip(numbers, minima, ramp(len(minima)), strict=False):
        if found.coefficients:
            sizes = rows["params"][groups == number]
            line = np.geomspace(sizes.min(), sizes.max(), 80)
            height = np.polyval(found.coefficients, np.log(line))
            ax.plot(line, height, ":" if found.refused else "-", color=color, linewidth=1.3)
        if not found.refused:
            _diamond(ax, found.params, found.loss)
    log_values(ax, "x")
    titles(ax, "IsoFLOP curves, by budget in FLOPs", "parameters", "loss (nats per token); diamonds are minima")
    return figure


def _diamond(ax: Axes, x: Any, y: Any, color: str = INK, size: int = 4) -> None:
    ax.plot(x, y, "D", color=color, markersize=size, zorder=4)


def surface_figure(fitted: Fit, budgets: Sequence[float], *, at: Mapping[str, float] | None = None) -> Figure:
    """Contours of the fitted loss over tokens and parameters, the runs, and the efficient frontier to the budgets."""
    rows, theta, budgets = fitted.rows, fitted.theta[:, None], sorted(budgets)
    figure, (ax,) = style.canvas(width=8.0, height=5.0)
    best = compute_optimal(fitted.law, theta, budgets, at=at)

    def ranged(name: str) -> np.ndarray:
        values = np.concatenate([rows[name], getattr(best, name)[:, 0]])
        return np.geomspace(np.nanmin(values) / 2, np.nanmax(values) * 2, 70)

    params, tokens = ranged("params"), ranged("tokens")
    mesh_n, mesh_d = (x.ravel() for x in np.meshgrid(params, tokens, indexing="ij"))
    loss = np.exp(log_loss_at(fitted.law, theta, mesh_n, mesh_d, at)[:, 0]).reshape(70, 70)
    height = loss.max() - loss.min()
    levels = loss.min() + np.geomspace(height / 200, height, 14)[:-1]
    lines = ax.contour(tokens, params, loss, levels=levels, colors=MUTED, linewidths=0.7)
    ax.clabel(lines, fmt="%.3g", fontsize=7.5, colors=INK)
    dots(ax, rows["tokens"], rows["params"], PALETTE[0], alpha=0.6)
    frontier = np.geomspace(rows["flops"].min(), max(*budgets, rows["flops"].max()), 60)
    path = compute_optimal(fitted.law, theta, frontier, at=at)
    ax.plot(path.tokens[:, 0], path.params[:, 0], color=PALETTE[1], linewidth=2)
    _diamond(ax, best.tokens[:, 0], best.params[:, 0], PALETTE[1], 5)
    for budget, d, n in zip(budgets, best.tokens[:, 0], best.params[:, 0], strict=True):
        if np.isfinite(n):
            note(ax, d, n, short(budget), (-6, 7), ha="right", va="baseline")
    for axis in "xy":
        log_values(ax, axis)
    titles(ax, "Fitted loss, runs (dots) and efficient frontier (line, budgets marked)", "tokens", "parameters")
    return figure


def residual_figure(fitted: Fit) -> Figure:
    """Residuals of log loss against FLOPs and tokens per parameter, where these differ, and normal quantiles."""
    residual, rows = -100 * fitted.residuals, fitted.rows
    against = {"By FLOPs": ("FLOPs", rows["flops"])}
    if {"log_tokens", "log_params"} <= set(fitted.law.features):
        against["By tokens per parameter"] = ("tokens per parameter", rows["tokens"] / rows["params"])
    # What is the same for all rows has no axis.
    against = {title: one for title, one in against.items() if np.ptp(np.log(one[1])) > 0.01}
    figure, axes = style.canvas(len(against) + 1, height=3.6)
    for ax, (title, (name, values)) in zip(axes, against.items(), strict=False):
        ax.axhline(0, color=GRID, linewidth=1)
        dots(ax, values, residual, PALETTE[0])
        log_values(ax, "x")
        titles(ax, title, name, "observed / fitted loss - 1 (%)")
    right = axes[-1]
    quantiles = np.array([NormalDist().inv_cdf((i + 0.5) / len(residual)) for i in range(len(residual))])
    middle, spread = np.median(residual), np.subtract(*np.percentile(residual, [75, 25])) / 1.349
    right.plot(quantiles, middle + spread * quantiles, color=GRID, linewidth=1.2)
    dots(right, quantiles, np.sort(residual), PALETTE[0], alpha=1)
    titles(right, "Normal or not", "normal quantile", "residual (%); line: normal")
    return figure


def backtest_figure(tests: Sequence[Backtest]) -> Figure:
    """Runs predicted from smaller ones: observed over predicted loss with the interval, a panel for each split."""
    figure, axes = style.canvas(len(tests), width=9.6 if len(tests) > 1 else 5.6, height=3.8)
    for ax, test in zip(axes, tests, strict=True):
        order = np.argsort(test.held_out["flops"], kind="stable")
        low, high = 100 * (test.interval[:, order] / np.sqrt(test.interval[0] * test.interval[1])[order] - 1)
        seen = 100 * (test.held_out["loss"] / np.sqrt(test.interval[0] * test.interval[1]) - 1)[order]
        # Runs of one budget stand beside each other.
        place = np.arange(len(order))
        ax.vlines(place, low, high, color=GRID, linewidth=2)
        inside = (low <= seen) & (seen <= high)
        dots(ax, place[inside], seen[inside], PALETTE[0], alpha=1)
        dots(ax, place[~inside], seen[~inside], PALETTE[1], alpha=1, marker="s")
        title = f"{test.rows} runs below {test.share:.2g} of the largest: {inside.sum()} of {len(order)} inside"
        titles(ax, title, "runs predicted, by rising FLOPs", "observed / predicted loss - 1 (%)")
    return figure


def bootstrap_figure(
    fitted: Fit, boot: Bootstrap, names: tuple[str, str], log_params_B: Float[np.ndarray, " B"], budget: float
) -> Figure:
    """Two parameters of every resample's fit, and the distribution of N* at a budget if the law has one."""
    finite = log_params_B[np.isfinite(log_params_B)]
    both = len(finite) > 1
    figure, axes = style.canvas(1 + both, height=3.8, width=9.6 if both else 5.2)
    i, j = (fitted.law.parameters.index(name) for name in names)
    dots(axes[0], boot.natural_PB[i], boot.natural_PB[j], PALETTE[0], 2, 0.25)
    point = fitted.law.natural(fitted.theta)
    _diamond(axes[0], point[i], point[j], PALETTE[1], 6)
    titles(axes[0], f"{boot.theta_PB.shape[1]} resamples (dots), all rows (diamond)", *names)
    if both:
        # A little wider: draws of rows without noise agree to the last bits.
        low, high = np.exp(np.percentile(finite, [0.1, 99.9]) + [-1e-3, 1e-3])
        axes[1].hist(np.exp(finite), bins=np.geomspace(low, high, 50).tolist(), color=PALETTE[0])
        for edge in np.exp(interval(finite)):
            axes[1].axvline(edge, color=PALETTE[1], linewidth=1.2, linestyle=(0, (4, 2)))
        log_values(axes[1], "x")
        title = f"N* at {short(budget)} FLOPs, 95% of draws between lines"
        titles(axes[1], title, "optimal parameters", "resamples")
    return figure


def powers_figure(law: PowerLaw, minima: Sequence[Minimum], label: str = "N*") -> Figure:
    """Minima of approach 2 against budget, with the power law through them."""
    figure, (ax,) = style.canvas(width=6.0, height=3.8)
    good = [m for m in minima if not m.refused]
    budgets = [m.budget for m in good]
    line = np.geomspace(min(budgets) / 2, max(budgets) * 2, 20)
    ax.plot(line, [law(x) for x in line], color=PALETTE[0], linewidth=1.5)
    _diamond(ax, budgets, [m.params for m in good], size=5)
    for axis in "xy":
        log_values(ax, axis)
    titles(ax, f"{label} ~ C^{law.exponent:.3f} through {law.points} budgets", "FLOPs", "optimal parameters")
    return figure


def envelope_figure(curves: Curves, envelope: Float[np.ndarray, "E 3"], law: PowerLaw) -> Figure:
    """Training curves by size with their envelope, and the sizes that are lowest against FLOPs."""
    figure, (left, right) = style.canvas(2, height=4.0)
    order = np.argsort(curves.params)
    for index, color in zip(order, ramp(len(order)), strict=True):
        seen = np.isfinite(curves.loss[index])
        left.plot(curves.flops[seen], curves.loss[index][seen], color=color, linewidth=0.9, alpha=0.8)
    dots(left, envelope[:, 0], envelope[:, 2], INK, 1.5, 1)
    titles(left, "Training curves, small to large from dark to light", "FLOPs", "loss (nats per token); dots: lowest")
    line = np.geomspace(envelope[0, 0], envelope[-1, 0], 20)
    dots(right, envelope[:, 0], envelope[:, 1], INK, 2, 1)
    right.plot(line, [law(x) for x in line], color=PALETTE[0], linewidth=1.5)
    titles(right, f"N* ~ C^{law.exponent:.3f} through the sizes of the envelope", "FLOPs", "parameters of the lowest")
    for ax, axis in ((left, "x"), (right, "x"), (right, "y")):
        log_values(ax, axis)
    return figure


def _lines(ax: Axes, x: np.ndarray, y: np.ndarray, groups: np.ndarray, label: str = "{:g}", falling: int = 1) -> None:
    """Draw y against rising x (falling for -1), a labelled line for every group."""
    values = np.unique(groups)
    for value, color in zip(values, ramp(len(values)), strict=True):
        mine = np.flatnonzero(groups == value)
        mine = mine[np.argsort(falling * x[mine], kind="stable")]
        how: dict[str, Any] = {"color": color, "marker": "o", "linewidth": 1.4, "label": label.format(value)}
        style.line_with_band(ax, x[mine], y[mine], **how)


def lr_figure(rows: Rows, minima: Sequence[Minimum]) -> Figure:
    """Loss against learning rate, a line per width; diamonds are the minima of parabolas in log learning rate."""
    figure, (ax,) = style.canvas(width=7.0, height=4.2)
    _lines(ax, rows["lr"], rows["loss"], rows["width"], "width {:g}")
    good = [m for m in minima if not m.refused]
    _diamond(ax, [m.params for m in good], [m.loss for m in good], size=5)
    log_values(ax, "x")
    titles(ax, "Loss by width", "learning rate of the base width", "loss (nats per token); diamonds are minima")
    style.label_lines(ax)
    return figure


def batch_figure(grids: Sequence[tuple[Rows, Surface]]) -> Figure:
    """Loss against learning rate, a panel per size and a line per batch; diamonds: the surfaces' minima.

    Args:
      grids: rows of one size and token count, and the surface through them.
    """
    figure, axes = style.canvas(len(grids), width=4.6 * len(grids) + 1.0, height=4.2)
    for ax, (rows, surface) in zip(axes, grids, strict=True):
        _lines(ax, rows["lr"], rows["loss"], rows["batch"])
        if not surface.refused:
            _diamond(ax, surface.lr, surface.loss, size=6)
            note(ax, surface.lr, surface.loss, f"lr {surface.lr:.3g}, batch {surface.batch:.3g}", (0, -14))
        log_values(ax, "x")
        ax.margins(y=0.12)
        titles(ax, f"{rows['params'][0]:,.0f} parameters", "learning rate of the base width", "loss (nats), by batch")
        style.label_lines(ax)
    return figure


def noise_figure(rows: Rows, length: int) -> Figure:
    """Gradient noise scale in tokens against the loss at the end of the decay that follows, a color per width."""
    figure, (ax,) = style.canvas(width=7.0, height=4.0)
    used = rows.take(rows["gradient_signal"] > 0)
    tokens = length * used["gradient_noise"] / used["gradient_signal"]
    _lines(ax, used["loss"], tokens, used["width"], falling=-1)
    style.reference(ax, length * float(np.median(rows["batch"])), "batch used", MUTED)
    ax.invert_xaxis()
    log_values(ax)
    titles(ax, "Critical batch size, by width", "loss at the readout (nats per token)", "noise scale (tokens)")
    style.label_lines(ax)
    return figure
