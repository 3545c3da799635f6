"""muP, the maximal-update parameterization: one learning rate for every width (hyperparameter transfer).

Yang et al. 2022, "Tensor Programs V", table 3 (Adam), written as two factors per parameter: one on its initial values,
one on its learning rate. `ratio` is width / base width; at ratio 1 nothing changes. The multiplier on the logits,
1 / ratio, is part of the gain that scales the last normalized activations: with Adam, a parameter stored multiplied
is trained the same as one multiplied in the forward pass if its learning rate is multiplied too (their section J.2).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple


class Factors(NamedTuple):
    """On a parameter's initial values (relative to variance 1 / fan-in; 1 / width for a table) and learning rate."""

    init: float
    lr: float


def _mup(role: str, ratio: float) -> Factors:
    if role == "table":
        # Its rows are activations, whose size does not depend on the width; a tied table is also the output.
        return Factors(ratio**0.5, 1.0)
    if role == "hidden":
        return Factors(1.0, 1 / ratio)
    if role == "readout":
        return Factors(1 / ratio, 1 / ratio)
    return Factors(1.0, 1.0)


PARAMETERIZATIONS: Mapping[str, Callable[[str, float], Factors]] = {
    "mup": _mup,
    "standard": lambda role, ratio: Factors(1.0, 1.0),
}

ROLES = ("table", "hidden", "vector", "readout")


def factors(role: str, ratio: float, parameterization: str = "mup") -> Factors:
    """Compute the muP factors of one parameter.

    Args:
      role: "table" (token embedding, perhaps tied to the output), "hidden" (a matrix with both sides as wide as the
        model), "vector" (gains), "readout" (what multiplies the last activations before the output product).
      ratio: width / base width.
      parameterization: a key of `PARAMETERIZATIONS`.

    Raises:
      ValueError: an unknown role or parameterization, or a ratio that is not positive.
    """
    if parameterization not in PARAMETERIZATIONS:
        raise ValueError(f"parameterization {parameterization!r}: choose one of {', '.join(PARAMETERIZATIONS)}")
    if role not in ROLES:
        raise ValueError(f"role {role!r}: choose one of {', '.join(ROLES)}")
    if not ratio > 0:
        raise ValueError(f"ratio {ratio} of widths must be positive")
    return PARAMETERIZATIONS[parameterization](role, ratio)
