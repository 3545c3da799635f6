"""Published scaling laws, by name in `LAWS`."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array

from scaling.laws import Law, log_sum_exp, power_law

PARAMS, TOKENS = "log_params", "log_tokens"

# The starts of Hoffmann et al. (2022), section D.3, all 4500 combinations.
CHINCHILLA = power_law(
    "chinchilla",
    (("A", (("alpha", PARAMS, -1.0),)), ("B", (("beta", TOKENS, -1.0),)), ("E", ())),
    {
        "A": (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
        "B": (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
        "E": (-1.0, -0.5, 0.0, 0.5, 1.0),
        "alpha": (0.0, 0.5, 1.0, 1.5, 2.0),
        "beta": (0.0, 0.5, 1.0, 1.5, 2.0),
    },
    formula="E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, eq. 2)",
)

CURVE = power_law(
    "curve",
    (("A", (("alpha", TOKENS, -1.0),)), ("E", ())),
    {"A": (0.0, 2.5, 5.0, 10.0), "E": (-1.0, 0.0, 0.5, 1.0), "alpha": (0.1, 0.3, 0.5, 1.0)},
    formula="E + A / D^alpha, a learning curve",
)

COMPUTE = power_law(
    "compute",
    (("A", (("alpha", "log_flops", -1.0),)), ("E", ())),
    {"A": (0.0, 2.5, 5.0, 10.0), "E": (-1.0, 0.0, 0.5, 1.0), "alpha": (0.02, 0.05, 0.1, 0.3)},
    formula="E + A / C^alpha, of FLOPs alone: the frontier of best runs (Kaplan et al. 2020, eq. 1.3 with a floor)",
)

# a_D of the paper is B^(1 / b_D); N counts non-zero parameters.
SPARSITY = power_law(
    "sparsity",
    (
        ("a_S", (("b_S", "log_density", 1.0), ("b_N", PARAMS, -1.0))),
        ("c_S", (("b_N", PARAMS, -1.0),)),
        ("B", (("b_D", TOKENS, -1.0),)),
        ("c", ()),
    ),
    {
        "a_S": (0.0, 4.0, 8.0),
        "c_S": (0.0, 4.0, 8.0),
        "B": (0.0, 5.0, 10.0),
        "c": (-1.0, 0.0, 0.7),
        "b_S": (0.3, 1.0),
        "b_N": (0.2, 0.5),
        "b_D": (0.2, 0.5),
    },
    formula="(a_S (1 - S)^b_S + c_S) / N^b_N + B / D^b_D + c (Frantar et al. 2023, eq. 1)",
)

FINE_GRAINED = power_law(
    "fine_grained_moe",
    (
        ("g", (("gamma", "log_granularity", -1.0), ("alpha", PARAMS, -1.0))),
        ("a", (("alpha", PARAMS, -1.0),)),
        ("b", (("beta", TOKENS, -1.0),)),
        ("c", ()),
    ),
    {
        "g": (0.0, 3.0, 6.0),
        "a": (0.0, 4.0, 8.0),
        "b": (0.0, 5.0, 10.0),
        "c": (-1.0, 0.0, 0.7),
        "gamma": (0.3, 1.0),
        "alpha": (0.15, 0.5),
        "beta": (0.15, 0.5),
    },
    formula="c + (g / G^gamma + a) / N^alpha + b / D^beta (Krajewski et al. 2024, eq. 9)",
)

JOINT = power_law(
    "joint",
    (
        (
            "S",
            (
                ("sigma", "log_density", 1.0),
                ("chi", "log_experts", -1.0),
                ("gamma", "log_granularity", -1.0),
                ("alpha", PARAMS, -1.0),
            ),
        ),
        ("A", (("alpha", PARAMS, -1.0),)),
        ("B", (("beta", TOKENS, -1.0),)),
        ("E", ()),
    ),
    {
        "S": (0.0, 4.0, 8.0),
        "A": (0.0, 4.0, 8.0),
        "B": (0.0, 5.0, 10.0),
        "E": (-1.0, 0.0, 0.7),
        "sigma": (0.3, 1.0),
        "chi": (0.2,),
        "gamma": (0.5,),
        "alpha": (0.2, 0.5),
        "beta": (0.2, 0.5),
    },
    formula="E + (A + S (1 - S)^sigma / (X^chi G^gamma)) / N^alpha + B / D^beta; S = 0 is Chinchilla's law, "
    "one expert of granularity 1 the sparsity law, density 1 and one expert the fine-grained law",
    optional=("log_density", "log_experts", "log_granularity"),
)


def _kaplan(theta: Mapping[str, Array], rows: Mapping[str, Array]) -> Array:
    by_size = theta["alpha_N"] / theta["alpha_D"] * (theta["N_c"] - rows[PARAMS])
    return theta["alpha_D"] * log_sum_exp([by_size, theta["D_c"] - rows[TOKENS]])


KAPLAN = Law(
    name="kaplan",
    parameters=("N_c", "D_c", "alpha_N", "alpha_D"),
    positive=frozenset(("N_c", "D_c")),
    features=(PARAMS, TOKENS),
    nonnegative=frozenset(("alpha_N", "alpha_D")),
    log_loss=_kaplan,
    grid={
        "N_c": (20.0, 25.0, 30.0, 35.0, 40.0),
        "D_c": (20.0, 25.0, 30.0, 35.0, 40.0),
        "alpha_N": (0.05, 0.1, 0.2, 0.4),
        "alpha_D": (0.05, 0.1, 0.2, 0.4),
    },
    formula="((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D (Kaplan et al. 2020, eq. 1.5)",
)


def _saturating(log_total: Array, log_unique: Array, log_scale: Array) -> Array:
    """log(U + U R* (1 - exp(-R / R*))) with R = total / U - 1 repetitions and R* = exp(log_scale)."""
    repeats = jnp.maximum(jnp.exp(log_total - log_unique) - 1.0, 0.0)
    scale = jnp.exp(log_scale)
    return log_unique + jnp.log1p(-scale * jnp.expm1(-repeats / scale))


def _data_constrained(theta: Mapping[str, Array], rows: Mapping[str, Array]) -> Array:
    alpha, beta = theta["alpha"], theta["beta"]
    unique = jnp.minimum(rows["log_unique_tokens"], rows[TOKENS])
    tokens = _saturating(rows[TOKENS], unique, theta["R_D"])
    # The size that is optimal for the unique tokens; parameters beyond it are worth less (their eq. 8-10).
    size = (theta["A"] - theta["B"] + jnp.log(alpha / beta) + beta * unique) / alpha
    useful = jnp.minimum(size, rows[PARAMS])
    params = _saturating(rows[PARAMS], useful, theta["R_N"])
    return log_sum_exp([theta["A"] - alpha * params, theta["B"] - beta * tokens, theta["E"]])


DATA_CONSTRAINED = Law(
    name="data_constrained",
    parameters=("A", "B", "E", "alpha", "beta", "R_D", "R_N"),
    positive=frozenset(("A", "B", "E", "R_D", "R_N")),
    features=(PARAMS, TOKENS, "log_unique_tokens"),
    nonnegative=frozenset(("alpha", "beta")),
    log_loss=_data_constrained,
    grid={
        "A": (4.0, 6.0, 8.0),
        "B": (5.0, 7.0, 9.0),
        "E": (0.0, 0.5),
        "alpha": (0.25, 0.4),
        "beta": (0.25, 0.4),
        "R_D": (1.0, 2.5),
        "R_N": (1.0, 2.5),
    },
    pairs=(("A", "alpha", PARAMS, -1.0), ("B", "beta", TOKENS, -1.0)),
    formula="E + A / N'^alpha + B / D'^beta, repeated data and surplus parameters decaying "
    "(Muennighoff et al. 2023, eq. 5-10)",
)


def _routed(theta: Mapping[str, Array], rows: Mapping[str, Array]) -> Array:
    first, last = jnp.exp(theta["E_start"]), jnp.exp(theta["E_start"]) + jnp.exp(theta["E_span"])
    experts = jnp.exp(rows["log_experts"])
    gap = 1.0 / (1.0 / first - 1.0 / last)
    effective = -jnp.log(1.0 / (experts - 1.0 + gap) + 1.0 / last)
    size = rows[PARAMS]
    return theta["a"] * size + theta["b"] * effective + theta["c"] * size * effective + theta["d"]


ROUTED = Law(
    name="routed_moe",
    parameters=("a", "b", "c", "d", "E_start", "E_span"),
    positive=frozenset(("E_start", "E_span")),
    features=(PARAMS, "log_experts"),
    log_loss=_routed,
    grid={
        "a": (-0.2, -0.05),
        "b": (-0.3, -0.1),
        "c": (0.0, 0.01),
        "d": (1.5, 3.0),
        "E_start": (0.2, 1.0),
        "E_span": (4.0, 6.0),
    },
    formula="log L = a log N + b log X + c log N log X + d with X the saturating number of experts between E_start and "
    "E_start + E_span (Clark et al. 2022, eq. 1 and 12; N active parameters)",
)

# Chinchilla's law as Besiroglu et al. (2024) estimated it from the runs of Hoffmann et al. (2022).
EPOCH = {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658}

LAWS: dict[str, Law] = {
    law.name: law
    for law in (CHINCHILLA, KAPLAN, CURVE, COMPUTE, DATA_CONSTRAINED, SPARSITY, ROUTED, FINE_GRAINED, JOINT)
}


def find_law(name: str) -> Law:
    """Find a published law by name, a key of `LAWS` such as "chinchilla" or "kaplan".

    Raises:
      ValueError: no such law; the message lists them.

    Example:
      >>> import scaling
      >>> scaling.find_law("chinchilla").formula
      'E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, eq. 2)'
    """
    if name not in LAWS:
        raise ValueError(
            f"no law {name!r}; there are {', '.join(LAWS)} (or FILE.py:NAME of your own, see scaling.custom_law)"
        )
    return LAWS[name]
