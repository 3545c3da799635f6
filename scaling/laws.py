"""Scaling laws: the loss as a function of a run's sizes, with named parameters.

Most published laws are sums of power-law terms, coefficient x prod(feature ^ exponent); those are written down as terms
and evaluated as a log-sum-exp of linear forms, which neither overflows nor cancels. Others are given as a function.

A parameter listed in `positive` is represented by its logarithm (its *raw* value), the others, exponents, by
themselves. Starts and fits use raw values, tables and reports natural ones.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scaling.evaluate import LogLoss, Term, predict
from scaling.rows import RowError, Rows


@dataclass(frozen=True, eq=False)
class Law:
    """A scaling law. Compared by identity: make it once, so that its compiled fits are reused.

    Attributes:
      name: for messages and tables.
      parameters: names, in the order of every theta [P, ...].
      positive: those whose raw value is a logarithm.
      features: inputs from a row: "log_x" is the logarithm of column x, "log_density" that of 1 - sparsity, any other
        name the column itself.
      log_loss: (parameters by name [1, S], features by name [R, 1]) -> log loss [R, S], raw parameters.
      grid: raw starting values by parameter; starts are their product.
      pairs: (coefficient, exponent, feature, sign): rows determine the raw coefficient plus sign x exponent x
        mean(feature), so fits use that as their variable.
      formula: in text, with its source.
      optional: features that are 0 when the row has no such column (log of 1: no sparsity, one expert).
      terms: of a sum of power laws: fits then have curvatures in closed form.
      nonnegative: exponents that fits hold at `least` or above: loss does not rise with size or data.
      held: raw values of what stands in `terms` and is no parameter any more; see `restrict`.

    Example:
      >>> import numpy as np, scaling
      >>> law = scaling.find_law("chinchilla")
      >>> theta = law.raw({"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28})
      >>> rows = scaling.make_rows({"params": [70e9], "tokens": [1.4e12], "loss": [1.0]})
      >>> round(float(np.exp(law.predict(theta[:, None], law.gather(rows)))[0, 0]), 3)
      1.937
    """

    name: str
    parameters: tuple[str, ...]
    positive: frozenset[str]
    features: tuple[str, ...]
    log_loss: LogLoss
    grid: Mapping[str, tuple[float, ...]]
    pairs: tuple[tuple[str, str, str, float], ...] = ()
    formula: str = ""
    optional: frozenset[str] = field(default_factory=frozenset)
    terms: tuple[Term, ...] = ()
    nonnegative: frozenset[str] = field(default_factory=frozenset)
    held: Mapping[str, float] = field(default_factory=dict)

    @property
    def least(self) -> float:
        """Least value of an exponent in `nonnegative`: 0, or nearly, where a law may divide by its exponents."""
        return 0.0 if self.terms else 1e-3

    def starts(self) -> Float[np.ndarray, "P S"]:
        """Make the grid of starts: every combination of the grid's values."""
        return np.array(list(itertools.product(*(self.grid[name] for name in self.parameters))), float).T

    def natural(self, theta: Float[np.ndarray, "P ..."]) -> Float[np.ndarray, "P ..."]:
        """Convert raw parameters to natural ones."""
        logs = np.array([name in self.positive for name in self.parameters])
        shape = (-1,) + (1,) * (np.ndim(theta) - 1)
        with np.errstate(over="ignore"):
            return np.where(logs.reshape(shape), np.exp(theta), theta)

    def raw(self, values: Mapping[str, float]) -> Float[np.ndarray, " P"]:
        """Convert natural values by name to raw parameters; 0 for a positive one gives its limit, -inf.

        Raises:
          ValueError: names that are not the law's parameters, or a negative value for a positive one.
        """
        if set(values) != set(self.parameters):
            raise ValueError(f"{self.name}: values for {sorted(values)}, parameters are {sorted(self.parameters)}")
        for name in self.positive:
            if values[name] < 0:
                raise ValueError(f"{self.name}: {name} = {values[name]} must not be negative")
        with np.errstate(divide="ignore"):
            return np.array([np.log(values[n]) if n in self.positive else values[n] for n in self.parameters], float)

    def gather(self, rows: Rows) -> dict[str, Float[np.ndarray, "R 1"]]:
        """Compute the features of rows.

        Raises:
          scaling.rows.RowError: a column that is missing, not numeric or outside the feature's domain.
        """
        return {name: gather_feature(name, rows, name in self.optional)[:, None] for name in self.features}

    def predict(
        self, theta: Float[np.ndarray, "P S"], features: Mapping[str, Float[np.ndarray, "R 1"]]
    ) -> Float[np.ndarray, "R S"]:
        """Predict log losses of rows under raw parameters, float64."""
        return predict(theta, features, self.log_loss, self.parameters, self.terms, self.held)

    def by_name(self, theta: Float[np.ndarray, "P ..."]) -> dict[str, Float[np.ndarray, "..."]]:
        """Convert raw parameters to natural ones by name."""
        return dict(zip(self.parameters, self.natural(theta), strict=True))

    def slopes(self, theta_P: Float[np.ndarray, " P"], rows: Rows) -> Float[np.ndarray, "R P"]:
        """Differentiate log losses of rows by raw parameters, by central differences."""
        size, step = len(theta_P), 1e-5
        shifts = step * np.concatenate([np.eye(size), -np.eye(size)], 1)
        moved = self.predict(theta_P[:, None] + shifts, self.gather(rows))
        return (moved[:, :size] - moved[:, size:]) / (2 * step)


def gather_feature(name: str, rows: Rows, optional: bool) -> Float[np.ndarray, " R"]:
    """Compute one feature [R] of rows; see `Law.features`."""
    if name == "log_density":
        column = "sparsity"
    else:
        column = re.sub(r"^log_", "", name)
    if optional and column not in rows.columns:
        return np.zeros(len(rows))
    values = rows.need([column])[column]
    if not name.startswith("log_"):
        return values
    wrong = ~((values >= 0) & (values < 1)) if column == "sparsity" else values <= 0
    if wrong.any():
        wanted = "must be at least 0 and under 1" if column == "sparsity" else "is not positive"
        raise RowError([(int(i) + 1, column, f"{values[i]} {wanted}") for i in np.flatnonzero(wrong)], rows.source)
    return np.log1p(-values) if column == "sparsity" else np.log(values)


def log_sum_exp(parts: Sequence[Float[Array, "..."]]) -> Float[Array, "..."]:
    """Compute log(sum(exp(parts))) without overflow; parts broadcast and may be -inf (not all of them)."""
    top = parts[0]
    for part in parts[1:]:
        top = jnp.maximum(top, part)
    # The maximum only shifts: its derivative cancels.
    top = jax.lax.stop_gradient(top)
    return top + jnp.log(sum(jnp.exp(part - top) for part in parts))


def power_law(
    name: str,
    terms: Sequence[Term],
    grid: Mapping[str, tuple[float, ...]],
    *,
    formula: str = "",
    optional: Sequence[str] = (),
    signed: Sequence[str] = (),
) -> Law:
    """Make a law that is a sum of power-law terms.

    Args:
      name: for messages.
      terms: (coefficient, ((exponent, feature, sign), ...)); the feature is a logarithm. An exponent may be shared.
      grid: raw starting values by parameter, coefficients first; its order is that of the parameters.
      formula: in text.
      optional: features that may be missing.
      signed: exponents that may be negative.

    Example:
      >>> import scaling
      >>> law = scaling.power_law(
      ...     "curve",
      ...     terms=(("A", (("alpha", "log_tokens", -1.0),)), ("E", ())),
      ...     grid={"A": (0.0, 5.0), "E": (-1.0, 1.0), "alpha": (0.1, 0.5)},
      ...     formula="E + A / D^alpha",
      ... )
      >>> law.features, law.starts().shape
      (('log_tokens',), (3, 8))
    """

    def log_loss(theta: Mapping[str, Array], features: Mapping[str, Array]) -> Array:
        parts = []
        for coefficient, factors in terms:
            part = theta[coefficient]
            for exponent, feature, sign in factors:
                part = part + sign * theta[exponent] * features[feature]
            parts.append(part)
        return log_sum_exp(parts)

    coefficients = [coefficient for coefficient, _ in terms]
    return Law(
        name=name,
        parameters=tuple(grid),
        positive=frozenset(coefficients),
        features=tuple(dict.fromkeys(factor[1] for _, factors in terms for factor in factors)),
        log_loss=log_loss,
        grid=grid,
        pairs=tuple((c, exponent, feature, sign) for c, factors in terms for exponent, feature, sign in factors),
        formula=formula,
        optional=frozenset(optional),
        terms=tuple(terms),
        nonnegative=frozenset(factor[0] for _, factors in terms for factor in factors) - set(signed),
    )


def custom_law(
    name: str,
    predict: Callable[[Mapping[str, Array], Mapping[str, Array]], Array],
    starts: Mapping[str, Sequence[float]],
    columns: Sequence[str],
    formula: str = "",
    signed: Sequence[str] = (),
) -> Law:
    """Make a law from any function of columns, with named parameters, positive unless they are `signed`.

    Args:
      name: for messages.
      predict: (natural parameters by name [1, S], columns by name [R, 1]) -> losses [R, S], positive, in jax.numpy.
      starts: natural starting values by parameter.
      columns: the columns it uses.
      formula: in text.
      signed: parameters that may be negative.

    Raises:
      ValueError: a starting value of a parameter that is not signed, and not positive.

    Example:
      >>> import jax.numpy as jnp, scaling
      >>> law = scaling.custom_law(
      ...     "logarithmic",
      ...     lambda p, x: p["E"] + p["A"] / jnp.log(x["tokens"]),
      ...     starts={"A": (10.0, 50.0), "E": (1.0,)},
      ...     columns=("tokens",),
      ... )
      >>> tokens = [1e6, 1e7, 1e8, 1e9]
      >>> loss = [1.5 + 20 / jnp.log(d).item() for d in tokens]
      >>> fitted = scaling.fit(scaling.make_rows({"params": [1.0] * 4, "tokens": tokens, "loss": loss}), law)
      >>> {name: round(value, 1) for name, value in fitted.parameters.items()}
      {'A': 20.0, 'E': 1.5}
    """
    for parameter, values in starts.items():
        if not len(values) or (min(values) <= 0 and parameter not in signed):
            raise ValueError(
                f"{name}: starts of {parameter} are {tuple(values)}; parameters must be positive unless they are signed"
            )
    positive = frozenset(starts) - set(signed)

    def log_loss(theta: Mapping[str, Array], features: Mapping[str, Array]) -> Array:
        natural = {key: jnp.exp(value) if key in positive else value for key, value in theta.items()}
        return jnp.log(predict(natural, features))

    grid = {
        key: tuple(float(np.log(value)) if key in positive else float(value) for value in values)
        for key, values in starts.items()
    }
    return Law(name, tuple(starts), positive, tuple(columns), log_loss, grid, formula=formula)


def _free_terms(law: Law, held: Mapping[str, float]) -> tuple[Term, ...]:
    """The remaining terms with raw values held: without vanished ones, and without factors of exponent 0."""
    free: list[Term] = []
    for coefficient, factors in law.terms:
        if held.get(coefficient) != -np.inf:
            free.append((coefficient, tuple(factor for factor in factors if held.get(factor[0]) != 0.0)))
    used = {name for coefficient, factors in free for name in (coefficient, *(factor[0] for factor in factors))}
    # A parameter without a remaining term has no closed form.
    return tuple(free) if set(law.parameters) - set(held) <= used else ()


def restrict(law: Law, **values: float) -> Law:
    """Hold some parameters of a law at natural values (0 for a coefficient removes its term).

    Raises:
      ValueError: names the law does not have.

    Example:
      >>> import scaling
      >>> scaling.restrict(scaling.find_law("chinchilla"), E=1.69).parameters
      ('A', 'B', 'alpha', 'beta')
    """
    unknown = sorted(set(values) - set(law.parameters))
    if unknown:
        raise ValueError(f"{law.name} has no parameter {unknown[0]!r}; it has {', '.join(law.parameters)}")
    held = {n: float(np.log(v) if v else -np.inf) if n in law.positive else v for n, v in values.items()}
    free = tuple(name for name in law.parameters if name not in held)

    def log_loss(theta: Mapping[str, Array], features: Mapping[str, Array]) -> Array:
        fixed = {name: jnp.full_like(theta[free[0]], value) for name, value in held.items()}
        return law.log_loss({**theta, **fixed}, features)

    return Law(
        name=f"{law.name} with " + ", ".join(f"{name} = {value:g}" for name, value in values.items()),
        parameters=free,
        positive=law.positive - set(held),
        features=law.features,
        log_loss=log_loss,
        grid={name: law.grid[name] for name in free},
        pairs=tuple(pair for pair in law.pairs if pair[0] in free and pair[1] in free),
        formula=law.formula,
        optional=law.optional,
        terms=_free_terms(law, held),
        nonnegative=law.nonnegative - set(held),
        held={**law.held, **held},
    )


def tie(law: Law, **ties: str) -> Law:
    """Tie parameters of a law to others of the same kind: `beta="alpha"` fits one exponent for both.

    Chinchilla's law so tied is that of Gadre et al. (2024, eq. 4): E + (a M^eta + b M^-eta) C^-eta with M = D / N and
    eta = alpha / 2.

    Raises:
      ValueError: a name the law does not have, a parameter tied to itself or to a tied one, or a coefficient to an
        exponent.

    Example:
      >>> import scaling
      >>> law = scaling.tie(scaling.find_law("chinchilla"), beta="alpha")
      >>> law.parameters, len(law.terms)
      (('A', 'B', 'E', 'alpha'), 3)
    """
    for name, other in ties.items():
        for one in (name, other):
            if one not in law.parameters:
                raise ValueError(f"{law.name} has no parameter {one!r}; it has {', '.join(law.parameters)}")
        if other in ties or (name in law.positive) != (other in law.positive):
            kind = "is tied itself" if other in ties else "is of another kind"
            raise ValueError(f"{law.name}: {name} cannot be tied to {other}, which {kind}")

    def log_loss(theta: Mapping[str, Array], features: Mapping[str, Array]) -> Array:
        return law.log_loss({**theta, **{name: theta[other] for name, other in ties.items()}}, features)

    def of(name: str) -> str:
        return ties.get(name, name)

    return replace(
        law,
        name=f"{law.name} with " + ", ".join(f"{name} = {other}" for name, other in ties.items()),
        parameters=tuple(name for name in law.parameters if name not in ties),
        positive=law.positive - set(ties),
        log_loss=log_loss,
        grid={name: values for name, values in law.grid.items() if name not in ties},
        pairs=tuple((of(c), of(exponent), feature, sign) for c, exponent, feature, sign in law.pairs),
        terms=tuple((of(c), tuple((of(e), f, sign) for e, f, sign in factors)) for c, factors in law.terms),
        nonnegative=law.nonnegative - set(ties),
    )
