"""L0 regularization: random gates on weights or units that learn to be open or shut (Louizos et al. 2018).

A gate z in [0, 1] multiplies a weight, or all weights of a unit. It is drawn from a hard concrete distribution, which
is exactly 0 and exactly 1 with positive probability and has a gradient (section 2.3 there). The expected share of open
gates is then differentiable, and a Lagrange multiplier brings it to a target density (Wang et al. 2020, section 3.2):

    def loss_fn(params, gates, multipliers, key):
        opened = lottery.gates.apply(params, gates, key=key, structure="neuron")
        expected = lottery.gates.density(gates, params)
        return task_loss(opened) + lottery.gates.penalty(expected, multipliers, target)

Descend in params and gates, ascend in the multipliers (`optax.scale(-1)` in their optimizer). Gates are drawn anew in
every step; without a key they are the distribution's medians, as for evaluation.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from lottery import structures
from lottery.masks import flatten, path_name, prunable

__all__ = ["Multipliers", "apply", "density", "initialize", "masks_of", "open_probability", "penalty", "sample"]

# Temperature and the interval that the concrete distribution is stretched to: the paper's section 4.
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


class Multipliers(NamedTuple):
    """Lagrange multipliers of the distance between density and target: of itself and of its square, float32 [].

    Example:
      >>> lottery.gates.Multipliers()
      Multipliers(linear=0.0, quadratic=0.0)
    """

    linear: Float[Array, ""] | float = 0.0
    quadratic: Float[Array, ""] | float = 0.0


def initialize(
    params: PyTree, structure: str = "unstructured", which: PyTree | None = None, opened: float = 0.9
) -> dict[str, Float[Array, "..."]]:
    """Make gates that are open with a given probability: path -> log alpha, one per weight or unit, float32.

    Args:
      params: of the network; shapes are enough.
      structure: "unstructured", "neuron", "channel", "head", "expert" or a block such as "16x16".
      which: `masks.prunable`; leaves that get gates. None takes its default.
      opened: probability that a gate is not 0.

    Raises:
      ValueError: a probability outside (0, 1), n:m, or a leaf that the structure does not fit.

    Example:
      >>> gates = lottery.gates.initialize({"dense0": {"kernel": jnp.ones((4, 3))}}, "neuron")
      >>> {path: leaf.shape for path, leaf in gates.items()}
      {'dense0/kernel': (3,)}
    """
    if not 0 < opened < 1:
        raise ValueError(f"opened={opened} must be between 0 and 1")
    if ":" in structure:
        raise ValueError(f"gates of {structure!r}: n:m has no units of its own; use weights, blocks, neurons or heads")
    start = math.log(opened / (1 - opened)) + BETA * math.log(-GAMMA / ZETA)
    chosen, found = flatten(prunable(params) if which is None else which), {}
    for path, leaf in flatten(params).items():
        if chosen[path]:
            units = structures.at(path, leaf.shape, structure, chosen[path])
            shape = jax.eval_shape(
                units.pool, jax.ShapeDtypeStruct(leaf.shape, jnp.float32), jax.ShapeDtypeStruct(leaf.shape, bool)
            )[0].shape
            found[path] = jnp.full(shape, start, jnp.float32)
    return found


def sample(log_alpha: Float[Array, "*S"], key: Key[Array, ""] | None = None) -> Float[Array, "*S"]:
    """Draw gates from the hard concrete distribution (Louizos et al. 2018, eq. 11); medians without a key (eq. 13).

    Example:
      >>> lottery.gates.sample(jnp.array([-9.0, 0.0, 9.0])).tolist()
      [0.0, 0.5, 1.0]
    """
    if key is None:
        concrete = jax.nn.sigmoid(log_alpha)
    else:
        u = jax.random.uniform(key, log_alpha.shape, jnp.float32, 1e-6, 1 - 1e-6)
        concrete = jax.nn.sigmoid((jnp.log(u) - jnp.log1p(-u) + log_alpha) / BETA)
    return jnp.clip(concrete * (ZETA - GAMMA) + GAMMA, 0, 1)


def open_probability(log_alpha: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Compute the probability that a gate is not 0 (Louizos et al. 2018, eq. 12).

    Example:
      >>> bool(abs(lottery.gates.open_probability(jnp.array(0.0)) - 0.832) < 1e-3)
      True
    """
    return jax.nn.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def apply(
    params: PyTree,
    gates: dict[str, Float[Array, "..."]],
    *,
    key: Key[Array, ""] | None = None,
    structure: str = "unstructured",
    which: PyTree | None = None,
) -> PyTree:
    """Multiply weights by their gates: drawn with `key`, which depends on the path too; medians without.

    Example:
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> lottery.gates.apply(params, {"kernel": jnp.array([9.0, -9.0])}, structure="neuron")["kernel"].tolist()
      [[1.0, 0.0], [1.0, 0.0]]
    """
    return _with_gates(params, gates, structure, which, lambda at, log_alpha: sample(log_alpha, at(key)), jnp.multiply)


def masks_of(
    params: PyTree,
    gates: dict[str, Float[Array, "..."]],
    structure: str = "unstructured",
    which: PyTree | None = None,
) -> PyTree:
    """Make masks of the gates whose median is not 0; True everywhere in leaves without gates.

    Example:
      >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
      >>> masks = lottery.gates.masks_of(params, {"kernel": jnp.array([9.0, -9.0])}, "neuron")
      >>> masks["kernel"].tolist(), masks["bias"].tolist()
      ([[True, False], [True, False]], [True, True])
    """
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    return _with_gates(
        params, gates, structure, which, lambda at, log_alpha: sample(log_alpha) > 0, jnp.logical_and, masks
    )


def density(gates: dict[str, Float[Array, "..."]], params: PyTree) -> Float[Array, ""]:
    """Compute the expected share of weights behind open gates, of all weights that have gates.

    Example:
      >>> gates = {"a": jnp.array([30.0]), "b": jnp.array([-30.0])}
      >>> float(lottery.gates.density(gates, {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 1))}))
      0.75
    """
    leaves = flatten(params)
    sizes = {path: leaves[path].size / gate.size for path, gate in gates.items()}
    opened = sum(open_probability(gate).sum() * sizes[path] for path, gate in gates.items())
    return opened / sum(leaves[path].size for path in gates)


def penalty(expected: Float[Array, ""], multipliers: Multipliers, target: float) -> Float[Array, ""]:
    """Compute the augmented Lagrangian of density = target: linear * (d - target) + quadratic * (d - target)^2.

    Args:
      expected: `density`.
      multipliers: which ascend; the loss descends.
      target: density.

    Example:
      >>> float(lottery.gates.penalty(jnp.array(0.75), lottery.gates.Multipliers(2.0, 4.0), 0.25))
      2.0
    """
    distance = expected - target
    return jnp.asarray(multipliers.linear * distance + multipliers.quadratic * distance**2)


def _with_gates(
    params: PyTree,
    gates: dict[str, Array],
    structure: str,
    which: PyTree | None,
    value: Callable[[Callable, Array], Array],
    combine: Callable[[Array, Array], Array],
    tree: PyTree | None = None,
) -> PyTree:
    chosen = flatten(prunable(params) if which is None else which)
    order = {path: i for i, path in enumerate(sorted(gates))}

    def one(path: tuple, leaf: Array, other: Array) -> Array:
        name = path_name(path)
        if name not in gates:
            return other
        units = structures.at(name, leaf.shape, structure, chosen[name] or True)
        gate = value(lambda key: None if key is None else jax.random.fold_in(key, order[name]), gates[name])
        return combine(other, units.expand(gate, leaf.shape).astype(other.dtype))

    return jax.tree.map_with_path(one, params, params if tree is None else tree)
