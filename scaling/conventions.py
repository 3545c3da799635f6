"""Effect of the FLOP and parameter conventions on a fit: the same runs recounted and fitted under each convention.

A run trained a shape on some tokens; its parameters and FLOPs depend on the convention (`scaling.flops`). Recounting
needs the shapes, so every run gets the shape whose size is nearest to its `params`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from scaling import isoflop
from scaling.fitting.bootstrap import bootstrap
from scaling.fitting.fit import Fit, FitConfig, fit
from scaling.fitting.intervals import bootstrap_interval
from scaling.flops import CONVENTIONS, Shape, count
from scaling.optimum import log_loss_at
from scaling.published import CHINCHILLA
from scaling.rows import Rows, make_rows

# Hoffmann et al. (2022), table A9: width, key size, heads, layers; feed-forward parts are 4 widths wide.
_TABLE_A9 = (
    (512, 64, 8, 8), (576, 64, 9, 9), (640, 64, 10, 10), (640, 64, 10, 13), (640, 64, 10, 16), (768, 64, 12, 12),
    (768, 64, 12, 15), (768, 64, 12, 18), (896, 64, 14, 14), (896, 64, 14, 16), (896, 64, 14, 18), (1024, 64, 16, 16),
    (1024, 64, 16, 18), (1024, 64, 16, 20), (1280, 128, 10, 18), (1280, 128, 10, 21), (1408, 128, 11, 18),
    (1280, 128, 10, 24), (1408, 128, 11, 21), (1536, 128, 12, 19), (1408, 128, 11, 24), (1536, 128, 12, 22),
    (1536, 128, 12, 25), (1792, 128, 14, 20), (1792, 128, 14, 23), (1792, 128, 14, 26), (2048, 128, 16, 22),
    (2176, 128, 17, 22), (2048, 128, 16, 25), (2048, 128, 16, 28), (2176, 128, 17, 25), (2304, 128, 18, 24),
    (2176, 128, 17, 28), (2304, 128, 18, 28), (2304, 128, 18, 32), (2560, 128, 20, 26), (2560, 128, 20, 30),
    (2560, 128, 20, 34), (2688, 128, 22, 36), (2816, 128, 22, 36), (2944, 128, 22, 36), (3072, 128, 24, 36),
    (3584, 128, 28, 40), (4096, 128, 32, 42), (4352, 128, 32, 47), (4608, 128, 36, 44), (4608, 128, 32, 47),
    (4864, 128, 32, 47), (4992, 128, 32, 49), (5120, 128, 40, 47),
)  # fmt: skip
CHINCHILLA_SHAPES: tuple[Shape, ...] = tuple(
    Shape(layers, width, 4 * width, heads, key, vocab=32_000, length=2_048, relative_positions=True)
    for width, key, heads, layers in _TABLE_A9
)


class Effect(NamedTuple):
    """A fit under one convention.

    Attributes:
      convention: its name in `scaling.flops.CONVENTIONS`.
      parameters: of Chinchilla's law, natural, N counted by the convention.
      a: exponent of N* ~ C^a with C = 6 N D, beta / (alpha + beta).
      a_interval: its bootstrap percentiles, None without resamples.
      a_counted: slope of log N* over log C, with C counted by the convention for a model of N parameters.
      a_isoflop: approach 2's exponent, NaN where fewer than two budgets have a minimum.
    """

    convention: str
    parameters: dict[str, float]
    a: float
    a_interval: tuple[float, float] | None
    a_counted: float
    a_isoflop: float


def nearest_shapes(
    params: Float[np.ndarray, " R"], shapes: Sequence[Shape], convention: str = "6ND"
) -> Int[np.ndarray, " R"]:
    """Find the index of the shape whose parameters, under a convention, are nearest in ratio, for each run."""
    sizes = np.array([count(shape, convention).params for shape in shapes])
    return np.abs(np.log(params)[:, None] - np.log(sizes)).argmin(1)


def recount(rows: Rows, shapes: Sequence[Shape], convention: str) -> Rows:
    """Recount params and flops of the runs by a convention, for each run's shape; tokens and losses stay."""
    which = nearest_shapes(rows["params"], shapes)
    counted = [count(shape, convention) for shape in shapes]
    params = np.array([c.params for c in counted])[which]
    flops = np.array([c.flops_per_token for c in counted])[which] * rows["tokens"]
    return make_rows(
        {"params": params, "tokens": rows["tokens"], "flops": flops, "loss": rows["loss"]},
        f"{rows.source}, {convention}",
    )


def counted_exponent(fitted: Fit, shapes: Sequence[Shape], convention: str, budgets: tuple[float, float]) -> float:
    """Compute the slope of log N* over log C between two budgets, C counted by the convention for models like `shapes`.

    FLOPs per token are interpolated between shapes, in logarithms, and extrapolated with the slope at the ends.
    """
    counted = sorted({(c.params, c.flops_per_token) for c in (count(shape, convention) for shape in shapes)})
    known_n, known_f = np.log(np.array(counted)).T
    ends = [np.polyfit(known_n[part], known_f[part], 1) for part in (slice(None, 5), slice(-5, None))]
    log_n = np.linspace(known_n[0] - 3, known_n[-1] + 3, 4001)
    log_f = np.interp(log_n, known_n, known_f)
    log_f = np.where(log_n < known_n[0], known_f[0] + ends[0][0] * (log_n - known_n[0]), log_f)
    log_f = np.where(log_n > known_n[-1], known_f[-1] + ends[1][0] * (log_n - known_n[-1]), log_f)
    # A straight line through optima at several budgets: shapes come in steps, two points would feel them.
    log_c = np.linspace(np.log(budgets[0]), np.log(budgets[1]), 25)
    best = [
        log_n[np.argmin(log_loss_at(fitted.law, fitted.theta[:, None], np.exp(log_n), np.exp(c - log_f))[:, 0])]
        for c in log_c
    ]
    return float(np.polyfit(log_c, best, 1)[0])


def effect(
    rows: Rows,
    shapes: Sequence[Shape],
    convention: str,
    *,
    groups: Int[np.ndarray, " R"] | None = None,
    resampled: int = 0,
    seed: int = 42,
    config: FitConfig | None = None,
) -> Effect:
    """Fit Chinchilla's law and IsoFLOP minima to runs recounted under a convention.

    Args:
      rows: the runs; their `params` select each one's shape, their `tokens` are unchanged.
      shapes: the trained shapes.
      convention: name in `scaling.flops.CONVENTIONS`.
      groups: budget number of every row (as planned); found from gaps if None.
      resampled, seed: bootstrap resamples of the interval of a; 0 for none.
      config: of the fit.
    """
    recounted = recount(rows, shapes, convention)
    fitted = fit(recounted, CHINCHILLA, config)
    edges, found = None, fitted.parameters
    if resampled:
        drawn = bootstrap(fitted, resampled, seed=seed)
        alpha, beta = (drawn.natural_PB[CHINCHILLA.parameters.index(name)] for name in ("alpha", "beta"))
        draws = (beta / (alpha + beta))[drawn.converged_B]
        here = found["beta"] / (found["alpha"] + found["beta"])
        sizes = len(rows), len(CHINCHILLA.parameters)
        low, high = bootstrap_interval(draws, *sizes, objective=fitted.config.objective, estimate=here)
        edges = float(low), float(high)
    groups = isoflop.group_budgets(rows["flops"]) if groups is None else groups
    try:
        parabolas = isoflop.approach_2(recounted, groups)[0].exponent
    except ValueError:
        parabolas = float("nan")
    spanned = float(recounted["flops"].min()), float(recounted["flops"].max())
    return Effect(
        convention,
        found,
        found["beta"] / (found["alpha"] + found["beta"]),
        edges,
        counted_exponent(fitted, shapes, convention, spanned),
        parabolas,
    )


def effects(
    rows: Rows,
    shapes: Sequence[Shape] = CHINCHILLA_SHAPES,
    *,
    groups: Int[np.ndarray, " R"] | None = None,
    resampled: int = 0,
    seed: int = 42,
    config: FitConfig | None = None,
) -> list[Effect]:
    """Compute `effect` for every convention that counts these shapes differently from the ones before it."""
    found, seen = [], set()
    for convention in CONVENTIONS:
        counted = tuple(count(shape, convention) for shape in shapes)
        if counted not in seen:
            seen.add(counted)
            found.append(effect(rows, shapes, convention, groups=groups, resampled=resampled, seed=seed, config=config))
    return found
