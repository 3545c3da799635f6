"""Counters, gauges and histograms in Prometheus' text format, version 0.0.4."""

import threading
from collections.abc import Sequence

PREFIX = "tessera_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """Counts of observations up to each bound; safe to use from several threads."""

    def __init__(self, bounds: Sequence[float]):
        self.bounds, self.total, self.sum = tuple(bounds), 0, 0.0
        self.below = [0] * len(self.bounds)
        self._lock = threading.Lock()

    def add(self, value: float) -> None:
        """Observe a value."""
        with self._lock:
            self.total += 1
            self.sum += value
            self.below = [count + (value <= bound) for count, bound in zip(self.below, self.bounds, strict=True)]


def counter(name: str, help_text: str, values: dict[str, int] | dict[str, float] | float | int) -> list[str]:
    """Lines of a counter; a dict has one value per label, written 'name="value"'."""
    return _family(f"{name}_total", "counter", help_text, values)


def gauge(name: str, help_text: str, value: float | int) -> list[str]:
    """Lines of a gauge."""
    return _family(name, "gauge", help_text, value)


def histogram(name: str, help_text: str, found: Histogram) -> list[str]:
    """Lines of a histogram."""
    full = PREFIX + name
    lines = [f"# HELP {full} {help_text}", f"# TYPE {full} histogram"]
    lines += [f'{full}_bucket{{le="{bound}"}} {count}' for bound, count in zip(found.bounds, found.below, strict=True)]
    return [
        *lines,
        f'{full}_bucket{{le="+Inf"}} {found.total}',
        f"{full}_sum {found.sum}",
        f"{full}_count {found.total}",
    ]


def _family(name: str, kind: str, help_text: str, values: dict[str, int] | dict[str, float] | float | int) -> list[str]:
    full = PREFIX + name
    lines = [f"# HELP {full} {help_text}", f"# TYPE {full} {kind}"]
    if isinstance(values, dict):
        return lines + [f"{full}{{{label}}} {value}" for label, value in values.items()]
    return [*lines, f"{full} {values}"]
