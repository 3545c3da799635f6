"""Pipeline-parallel decoding: groups of slots travel around a ring of stages.

p stages, g groups of slots. A group's token leaves the last stage as the input of the first, so a group is on one stage
at a time, and p groups fill all stages. Item i enters stage 0 at tick i and stage s at tick i + s; item
k r + j with r = max(g, p) is the k-th token of group j, and for j >= g nothing.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sharding.errors import PlanError, nearest_divisor


class Item(NamedTuple):
    """Work of a stage: group, token number, and whether it is not idle."""

    group: Int[Array, ""]
    step: Int[Array, ""]
    live: Bool[Array, ""]


@dataclass(frozen=True)
class Ring:
    """The decoding schedule of one call.

    Attributes:
      stages: p.
      groups: g, groups of consecutive slots of equal size.
      steps: tokens of each group in a call.

    Example:
      >>> from sharding.inference import Ring
      >>> ring = Ring(stages=4, groups=4, steps=16)
      >>> ring.ticks, ring.utilization
      (67, 1.0)
    """

    stages: int = 1
    groups: int = 1
    steps: int = 1

    def __post_init__(self) -> None:
        if min(self.stages, self.groups, self.steps) < 1:
            raise ValueError(f"stages, groups and steps must be at least 1: {self}")

    @property
    def period(self) -> int:
        """r, ticks between two tokens of a group."""
        return max(self.stages, self.groups)

    @property
    def ticks(self) -> int:
        """Ticks of a call, filling and draining included."""
        return (self.steps - 1) * self.period + self.groups + self.stages - 1

    @property
    def utilization(self) -> float:
        """Busy share of a stage's time in a long call: g / p below p groups, 1 from there on."""
        return self.groups / self.period

    @property
    def call_utilization(self) -> float:
        """Busy share of a stage's time in this call, filling and draining included."""
        return self.groups * self.steps / self.ticks

    def item(self, tick: Int[Array, ""] | int, stage: Int[Array, ""] | int) -> Item:
        """Find the work of a stage at a tick; group and step are 0 where it is idle."""
        number = jnp.asarray(tick - stage, jnp.int32)
        step, group = number // self.period, number % self.period
        live = (number >= 0) & (group < self.groups) & (step < self.steps)
        return Item(jnp.where(live, group, 0), jnp.where(live, step, 0), live)


def default_groups(stages: int, slots: int) -> int:
    """Choose as many groups as stages, or the nearest number that divides the slots."""
    return nearest_divisor(slots, min(stages, slots))


def check_groups(groups: int, slots: int) -> None:
    """Refuse groups of unequal size.

    Raises:
      PlanError: the slots of a device do not divide into the groups.
    """
    if slots % groups:
        raise PlanError(
            f"groups={groups}: the {slots} slots of a device do not divide; "
            f"nearest valid: {nearest_divisor(slots, groups)}"
        )


def pass_on(x: jax.Array, axis: str | None) -> jax.Array:
    """Send to the next stage, from the last one to the first; without stages the identity."""
    if axis is None:
        return x
    size = jax.lax.axis_size(axis)
    with jax.named_scope("ring"):
        return jax.lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)])
