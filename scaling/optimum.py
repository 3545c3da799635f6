"""Compute-optimal allocation: N* and D* at a budget, tokens per parameter, and the cost of other sizes.

A budget C fixes tokens = C / (6 N), so the optimum is a minimum over one number, log N, found for any law of params and
tokens (others of its columns are held at given values).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq, minimize_scalar

from scaling.laws import Law
from scaling.rows import PER_PARAMETER_AND_TOKEN, Rows


class Optimum(NamedTuple):
    """Compute-optimal params, tokens and loss at budgets, [C, S] for S parameter vectors; NaN without inner minimum."""

    params: Float[np.ndarray, "C S"]
    tokens: Float[np.ndarray, "C S"]
    loss: Float[np.ndarray, "C S"]

    @property
    def ratio(self) -> Float[np.ndarray, "C S"]:
        """Tokens per parameter."""
        return self.tokens / self.params


def sizes_as_rows(params: np.ndarray, tokens: np.ndarray, at: Mapping[str, float] | None = None) -> Rows:
    """Make rows of sizes, with other columns held at `at`; their losses mean nothing."""
    columns = {"params": params, "tokens": tokens, "flops": PER_PARAMETER_AND_TOKEN * params * tokens}
    others = {name: np.full(len(params), float(value)) for name, value in (at or {}).items()}
    return Rows({**columns, "loss": np.ones(len(params)), **others}, "optimum")


def log_loss_at(
    law: Law,
    theta_PS: Float[np.ndarray, "P S"],
    params: Float[np.ndarray, " R"],
    tokens: Float[np.ndarray, " R"],
    at: Mapping[str, float] | None = None,
) -> Float[np.ndarray, "R S"]:
    """Predict log losses at sizes, with other columns held at `at`."""
    rows = sizes_as_rows(np.asarray(params, float), np.asarray(tokens, float), at)
    return law.predict(np.asarray(theta_PS, float), law.gather(rows))


def compute_optimal(
    law: Law,
    theta_PS: Float[np.ndarray, "P S"],
    budgets: Sequence[float] | np.ndarray,
    *,
    at: Mapping[str, float] | None = None,
    tokens_per_flop: float = 1 / PER_PARAMETER_AND_TOKEN,
) -> Optimum:
    """Find the compute-optimal size for any law: minimize over N at each budget, for every column of theta.

    Two grids over log N, the second inside the best cell of the first, then a parabola through the lowest three points:
    log N* is right to about 1e-6.

    Args:
      law: of params and tokens.
      theta_PS: raw parameters.
      budgets: FLOPs.
      at: values of the law's other columns.
      tokens_per_flop: params x tokens per FLOP, 1 / 6 for C = 6 N D.

    Example:
      >>> import scaling
      >>> law = scaling.find_law("chinchilla")
      >>> theta = law.raw({"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28})
      >>> best = scaling.compute_optimal(law, theta[:, None], [5.76e23])
      >>> f"{best.params[0, 0]:.3g} parameters, {best.ratio[0, 0]:.0f} tokens each"
      '3.22e+10 parameters, 93 tokens each'
    """
    theta_PS = np.asarray(theta_PS, float)
    found = np.full((3, len(budgets), theta_PS.shape[1]), np.nan)
    for c, budget in enumerate(budgets):
        product = budget * tokens_per_flop
        # From one parameter to one token.
        coarse = np.linspace(0.0, np.log(product), 129)
        losses = log_loss_at(law, theta_PS, np.exp(coarse), product / np.exp(coarse), at)
        middle = coarse[np.argmin(losses, axis=0)]
        inside = (middle > coarse[0]) & (middle < coarse[-1]) & np.isfinite(losses).all(axis=0)
        for s in np.flatnonzero(inside):
            found[:, c, s] = _refine(law, theta_PS[:, s : s + 1], middle[s], coarse[1] - coarse[0], product, at)
    return Optimum(*found)


def _refine(law, theta, middle, width, product, at):
    x = middle
    for _ in range(2):
        fine = x + np.linspace(-width, width, 33)
        losses = log_loss_at(law, theta, np.exp(fine), product / np.exp(fine), at)[:, 0]
        i = int(np.clip(np.argmin(losses), 1, 31))
        x = fine[i]
        width /= 8
    below, here, above = losses[i - 1 : i + 2]
    if above - 2 * here + below > 0:
        x += 0.5 * (fine[1] - fine[0]) * (below - above) / (above - 2 * here + below)
    loss = log_loss_at(law, theta, np.array([np.exp(x)]), np.array([product / np.exp(x)]), at)[0, 0]
    return np.exp(x), product / np.exp(x), np.exp(loss)


def chinchilla_optimum(parameters: Mapping[str, float | np.ndarray], budgets: Sequence[float] | np.ndarray) -> Optimum:
    """Compute the optimum of E + A / N^alpha + B / D^beta in closed form (Hoffmann et al. 2022, eq. 4).

    Args:
      parameters: natural values by name, numbers or [S].
      budgets: FLOPs.

    Example:
      >>> import scaling
      >>> parameters = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
      >>> f"{scaling.chinchilla_optimum(parameters, [5.76e23]).params[0, 0]:.3g}"
      '3.22e+10'
    """
    a, b, e, alpha, beta = (np.atleast_1d(parameters[name]) for name in ("A", "B", "E", "alpha", "beta"))
    product = np.asarray(budgets, float)[:, None] / PER_PARAMETER_AND_TOKEN
    # In logarithms: resampled coefficients span many orders of magnitude, and some are 0: no inner optimum.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        balance = np.log(alpha) + np.log(a) - np.log(beta) - np.log(b)
        params = np.exp((balance + beta * np.log(product)) / (alpha + beta))
        params = np.where(np.isfinite(params) & (params > 0), params, np.nan)
        tokens = product / params
        return Optimum(params, tokens, e + a / params**alpha + b / tokens**beta)


def exponents(parameters: Mapping[str, float | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Compute the exponents (a, b) of N* ~ C^a and D* ~ C^b: beta / (alpha + beta) and alpha / (alpha + beta)."""
    alpha, beta = np.asarray(parameters["alpha"]), np.asarray(parameters["beta"])
    return np.asarray(beta / (alpha + beta)), np.asarray(alpha / (alpha + beta))


def growth(
    law: Law,
    theta_PS: Float[np.ndarray, "P S"],
    budgets: tuple[float, float],
    *,
    at: Mapping[str, float] | None = None,
) -> Float[np.ndarray, " S"]:
    """Compute the slope of log N* over log C between two budgets, with other columns held at `at`.

    For Chinchilla's law that is beta / (alpha + beta); a law with further columns has no such formula in general.

    Example:
      >>> import scaling
      >>> law = scaling.find_law("chinchilla")
      >>> theta = law.raw({"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28})
      >>> scaling.growth(law, theta[:, None], (1e20, 1e24)).round(4).tolist()
      [0.4516]
    """
    sizes = np.log(compute_optimal(law, theta_PS, budgets, at=at).params)
    return (sizes[1] - sizes[0]) / np.log(budgets[1] / budgets[0])


def off_optimum(
    law: Law,
    theta_P: Float[np.ndarray, " P"],
    budget: float,
    factors: Sequence[float],
    *,
    at: Mapping[str, float] | None = None,
) -> list[dict[str, float]]:
    """Compute the cost of models `factor` times the optimal size at the same budget.

    Returns:
      Per factor: params, tokens, loss, excess loss over the optimum, and `wasted`, the share of the budget that an
      optimal run would not need to reach the same loss. Empty where the law has no inner optimum at the budget.

    Example:
      >>> import scaling
      >>> law = scaling.find_law("chinchilla")
      >>> theta = law.raw({"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28})
      >>> [round(row["wasted"], 3) for row in scaling.off_optimum(law, theta, 1e21, (0.5, 1.0, 2.0))]
      [0.139, 0.0, 0.136]
    """
    theta = np.asarray(theta_P, float)[:, None]
    best = compute_optimal(law, theta, [budget], at=at)
    if not np.isfinite(best.params[0, 0]):
        return []
    table = []
    for factor in factors:
        params = float(best.params[0, 0] * factor)
        tokens = budget / (PER_PARAMETER_AND_TOKEN * params)
        loss = float(np.exp(log_loss_at(law, theta, np.array([params]), np.array([tokens]), at)[0, 0]))
        excess = loss - float(best.loss[0, 0])
        table.append(
            {"factor": factor, "params": params, "tokens": tokens, "loss": loss, "excess": excess}
            | {"wasted": 1 - needed_budget(law, theta_P, loss, below=budget, at=at) / budget}
        )
    return table


def needed_budget(
    law: Law, theta_P: Float[np.ndarray, " P"], loss: float, *, below: float, at: Mapping[str, float] | None = None
) -> float:
    """Find the smallest budget whose optimum reaches a loss, at most `below` (which must reach it)."""
    theta = np.asarray(theta_P, float)[:, None]

    def gap(log_budget: float) -> float:
        return float(compute_optimal(law, theta, [np.exp(log_budget)], at=at).loss[0, 0]) - loss

    high = np.log(below)
    if gap(high) >= 0:
        return below
    low = high - 1
    while gap(low) < 0:
        low -= 2
    return float(np.exp(brentq(gap, low, high, xtol=1e-7)))


class InferenceOptimum(NamedTuple):
    """The cheapest model that reaches a loss, inference included: sizes, and FLOPs of both phases."""

    params: float
    tokens: float
    training_flops: float
    inference_flops: float


def inference_optimum(
    law: Law,
    theta_P: Float[np.ndarray, " P"],
    loss: float,
    inference_tokens: float,
    *,
    at: Mapping[str, float] | None = None,
    sizes: tuple[float, float] = (1e4, 1e15),
) -> InferenceOptimum:
    """Minimize 6 N D + 2 N D_inference subject to L(N, D) = loss (Sardana et al. 2024, eq. 2).

    Raises:
      ValueError: no model between `sizes` reaches the loss.

    Example:
      >>> import scaling
      >>> law = scaling.find_law("chinchilla")
      >>> theta = law.raw({"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28})
      >>> few, many = (scaling.inference_optimum(law, theta, 2.2, served) for served in (1e9, 1e13))
      >>> many.params < few.params and many.tokens > few.tokens
      True
    """
    theta = np.asarray(theta_P, float)[:, None]
    token_range = (0.0, 80.0)

    def tokens_for(log_params: float) -> float:
        """log tokens at which the model reaches the loss; infinite if it never does."""

        def gap(log_tokens: float) -> float:
            sizes_ = np.exp([log_params]), np.exp([log_tokens])
            return float(log_loss_at(law, theta, *sizes_, at)[0, 0]) - np.log(loss)

        if gap(token_range[1]) >= 0 or gap(token_range[0]) <= 0:
            return np.inf
        return brentq(gap, *token_range, xtol=1e-10)

    def roughly(log_params: np.ndarray) -> np.ndarray:
        """The same of several sizes side by side, by bisection to a millionth."""

        def above(log_tokens: np.ndarray) -> np.ndarray:
            return log_loss_at(law, theta, np.exp(log_params), np.exp(log_tokens), at)[:, 0] > np.log(loss)

        low, high = (np.full(len(log_params), end) for end in token_range)
        never = above(high) | ~above(low)
        for _ in range(27):
            middle = (low + high) / 2
            more = above(middle)
            low, high = np.where(more, middle, low), np.where(more, high, middle)
        return np.where(never, np.inf, high)

    def cost(log_params: Any, find: Callable[[Any], Any] = tokens_for) -> Any:
        total = np.logaddexp(np.log(6) + find(log_params), np.log(2) + np.log(max(inference_tokens, 1e-300)))
        return log_params + total

    grid = np.linspace(np.log(sizes[0]), np.log(sizes[1]), 60)
    costs = cost(grid, roughly)
    if not np.isfinite(costs).any():
        raise ValueError(f"{law.name}: no model of {sizes[0]:g} to {sizes[1]:g} parameters reaches a loss of {loss}")
    i = int(np.argmin(costs))
    bounds = (grid[max(i - 1, 0)], grid[min(i + 1, len(grid) - 1)])
    best = minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": 1e-9}).x
    params, tokens = float(np.exp(best)), float(np.exp(tokens_for(best)))
    return InferenceOptimum(params, tokens, 6 * params * tokens, 2 * params * inference_tokens)
