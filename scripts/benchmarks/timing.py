"""Honest timings: contestants take turns in one process; what is quoted is a median and a ratio of the same round."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant, one figure per round, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds of a round."""
        return float(np.median(self.seconds))

    def ratio(self, other: "Timing") -> tuple[float, float, float]:
        """How many times faster than `other`: median, smallest and largest of the ratios round by round."""
        rounds = min(len(self.seconds), len(other.seconds))
        ratios = np.asarray(other.seconds[:rounds]) / np.asarray(self.seconds[:rounds])
        return float(np.median(ratios)), float(ratios.min()), float(ratios.max())


def take_turns(
    contestants: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1, patience: float = float("inf")
) -> dict[str, Timing]:
    """Call every contestant once per round, in turn, so that a machine that slows down slows all of them.

    Args:
      contestants: name -> call, which must return only when its work is done (`jax.block_until_ready`).
      rounds: that are counted.
      warmup: rounds before them that are not (compilation, caches).
      patience: a contestant that takes longer than this many seconds a call has one round that counts.

    Raises:
      ValueError: no rounds.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: at least one is needed")
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warmup + rounds):
        for name, run in contestants.items():
            if seconds[name] and seconds[name][0] > patience:
                continue
            begin = time.perf_counter()
            run()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - begin)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


@dataclass(frozen=True)
class Row:
    """One line of the one table.

    Attributes:
      case: what is computed.
      name: the contestant.
      seconds: median of a call.
      rate: units of work per second.
      ratio: how many times the baseline's rate: median, smallest and largest over the rounds; None for the baseline,
        and where nothing is compared.
      baseline: name of the contestant that it is compared with.
      more: further figures by name, with their unit in the name.
    """

    case: str
    name: str
    seconds: float
    rate: float
    ratio: tuple[float, float, float] | None = None
    baseline: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The row as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Contest:
    """Ways to do the same work, one of which is the baseline.

    Attributes:
      case: what is computed.
      contestants: name -> call.
      baseline: its name; where it is not among the contestants, nothing is compared.
      work: units of work of a call, by name; 1 where absent.
      rounds, warmup, patience: see `take_turns`.
    """

    case: str
    contestants: Mapping[str, Callable[[], object]]
    baseline: str
    work: Mapping[str, float] = field(default_factory=dict)
    rounds: int = 5
    warmup: int = 1
    patience: float = float("inf")

    def rows(self, more: Callable[[str, Timing], Mapping[str, Any]] = lambda name, timing: {}) -> list[Row]:
        """Time it.

        Args:
          more: further figures of a contestant.
        """
        timings = take_turns(self.contestants, rounds=self.rounds, warmup=self.warmup, patience=self.patience)
        found = []
        for name, timing in timings.items():
            work, ratio = self.work.get(name, 1.0), None
            if self.baseline in timings and name != self.baseline:
                share = work / self.work.get(self.baseline, 1.0)
                low_to_high = timing.ratio(timings[self.baseline])
                ratio = (low_to_high[0] * share, low_to_high[1] * share, low_to_high[2] * share)
            compared = self.baseline if ratio else ""
            found.append(Row(self.case, name, timing.median, work / timing.median, ratio, compared, more(name, timing)))
        return found
