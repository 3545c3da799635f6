"""Batch-size ramp: batches that grow during training, in the order of the data that they would have without it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class RampUp:
    """Batch sizes by the sequences seen so far, as Megatron-LM's `--rampup-batch-size` has them.

    Attributes:
      start: first batch size.
      increment: by which it grows.
      samples: sequences after which it is `target`; all sizes before it get equal shares of them.
      target: last batch size.
    """

    start: int
    increment: int
    samples: int
    target: int

    def __post_init__(self) -> None:
        if min(self.start, self.increment, self.samples) < 1 or self.start >= self.target:
            raise ValueError(
                f"(start, increment, samples)=({self.start}, {self.increment}, {self.samples}): positive numbers, and "
                f"a start below batch_size={self.target}, are needed"
            )
        if (self.target - self.start) % self.increment:
            raise ValueError(
                f"increments of {self.increment} do not lead from start={self.start} to batch_size={self.target}: "
                f"choose a divisor of {self.target - self.start}"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """All batch sizes, ascending."""
        return tuple(range(self.start, self.target + 1, self.increment))

    @property
    def unit(self) -> int:
        """The largest number that divides all sizes."""
        return math.gcd(self.start, self.increment)

    def size(self, seen: int) -> int:
        """The size of the batch after so many sequences."""
        steps = (self.target - self.start) // self.increment
        return self.start + self.increment * min(steps, seen * steps // self.samples)


class Stage(NamedTuple):
    """Steps [first, last] whose batches have one size, and the sequences seen before them."""

    first: int
    last: int
    size: int
    seen: int


def stages(ramp: RampUp, steps: int) -> list[Stage]:
    """The ramp by steps, up to so many."""
    found, step, seen = [], 1, 0
    for size in ramp.sizes:
        if size == ramp.target:
            last = steps
        else:
            number = ramp.sizes.index(size) + 1
            end = -(-ramp.samples * number // (len(ramp.sizes) - 1))  # first number of sequences of the next size
            last = step - 1 + max(0, -(-(end - seen) // size))
        last = min(last, steps)
        if last >= step:
            found.append(Stage(step, last, size, seen))
            seen, step = seen + (last - step + 1) * size, last + 1
    return found


class RampedBatches:
    """Batches of growing size, joined from those of an iterator whose batches have the ramp's `unit` of rows.

    The order of the rows is that of the iterator. Its position and the number of sequences seen are the state.
    """

    def __init__(self, units: Any, ramp: RampUp):
        self._units, self._ramp, self._seen = units, ramp, 0

    def __iter__(self) -> "RampedBatches":
        return self

    def __next__(self) -> Mapping[str, np.ndarray]:
        """Give the next batch."""
        size = self._ramp.size(self._seen)
        parts = [next(self._units) for _ in range(size // self._ramp.unit)]
        self._seen += size
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def get_state(self) -> dict[str, Any]:
        """Return the position."""
        return {**self._units.get_state(), "seen": self._seen}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        state = dict(state)
        self._seen = state.pop("seen")
        self._units.set_state(state)
