"""Honest timings: rivals take turns in one process, and what is quoted is a median and a ratio of the same round."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Seconds of one rival, one figure per round, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds of a round."""
        return float(np.median(self.seconds))

    def ratio(self, other: "Timing") -> tuple[float, float, float]:
        """How many times faster than `other`: median, smallest and largest of the ratios round by round."""
        ratios = np.asarray(other.seconds) / np.asarray(self.seconds)
        return float(np.median(ratios)), float(ratios.min()), float(ratios.max())


def take_turns(rivals: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Call every rival once per round, in turn, so that a machine that slows down slows all of them.

    A rival must return only when its work is done (`jax.block_until_ready`). The first `warmup` rounds (compilation,
    caches) are not counted.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: at least one is needed")
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(warmup + rounds):
        for name, run in rivals.items():
            begin = time.perf_counter()
            run()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - begin)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
