"""Means of metrics over batches."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jaxtyping import PyTree


def evaluate(
    eval_fn: Callable[[PyTree, Any], Mapping[str, jax.Array]], params: PyTree, batches: Iterable[Any]
) -> dict[str, float]:
    """Mean over batches of the metrics of each.

    Args:
      eval_fn: (params, batch) -> metrics, scalars that are means over the batch; jit it outside.
      params: parameters.
      batches: equal-sized batches. The sums stay on device until the end, so batches overlap.

    Raises:
      ValueError: there was no batch.
    """
    total: Any = None
    count = 0
    for batch in batches:
        metrics = dict(eval_fn(params, batch))
        total = metrics if total is None else jax.tree.map(lambda a, b: a + b, total, metrics)
        count += 1
    if not count:
        raise ValueError("no batch to evaluate on: the split is smaller than one batch, or eval.batches is 0")
    return {name: float(value) / count for name, value in sorted(jax.device_get(total).items())}
