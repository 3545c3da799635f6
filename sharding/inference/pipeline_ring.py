"""Which group of slots is on which pipeline stage when: decoding as work that goes around a ring of stages.

p stages, g groups of slots. A group's token leaves the last stage as the input of the first, so a group can be on one
stage at a time, and p groups keep all stages busy. Item i enters stage 0 at tick i and stage s at tick i + s; item
k r + j with r = max(g, p) is the k-th token of group j, and for j >= g nothing.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sharding.errors import PlanError, nearest_divisor


class Item(NamedTuple):
    """What a stage works on: group, token number, and whether there is anything to do."""

    group: Int[Array, ""]
    step: Int[Array, ""]
    live: Bool[Array, ""]


@dataclass(frozen=True)
class Ring:
    """The schedule of one call.

    Attributes:
      stages: p.
      groups: g, groups of consecutive slots of equal size.
      steps: tokens each group advances in a call.
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
        """Ticks of a call, the ring filling and draining included."""
        return (self.steps - 1) * self.period + self.groups + self.stages - 1

    @property
    def utilisation(self) -> float:
        """Share of a stage's time that is work, in a long call: g / p below p groups, 1 from there on."""
        return self.groups / self.period

    @property
    def call_utilisation(self) -> float:
        """The same for this call, filling and draining included."""
        return self.groups * self.steps / self.ticks

    def item(self, tick: Int[Array, ""] | int, stage: Int[Array, ""] | int) -> Item:
        """What a stage works on at a tick; group and step are 0 where there is nothing to do."""
        number = jnp.asarray(tick - stage, jnp.int32)
        step, group = number // self.period, number % self.period
        live = (number >= 0) & (group < self.groups) & (step < self.steps)
        return Item(jnp.where(live, group, 0), jnp.where(live, step, 0), live)


def default_groups(stages: int, slots: int) -> int:
    """As many groups as stages, or the nearest number that divides the slots."""
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
    """Send to the next stage; the last one's goes to the first. Without stages x comes straight back."""
    if axis is None:
        return x
    size = jax.lax.axis_size(axis)
    with jax.named_scope("ring"):
        return jax.lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)])
