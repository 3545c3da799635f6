"""Next-token prediction: the loss a language model is trained and judged by."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import PyTree
from rich.table import Table

from tessera.losses import cross_entropy
from tessera.step import LossFn


def make_loss(apply: Callable[..., Any], z_loss: float = 0.0) -> LossFn:
    """Make `loss(params, batch, key)` for batches {"tokens": int32 [B, T + 1]}.

    Args:
      apply: (params, tokens [B, T] int32) -> logits [B, T, V].
      z_loss: coefficient of the z-loss, see `tessera.losses.cross_entropy`.

    Returns:
      A function that gives the loss and the metrics cross_entropy (nats per token) and accuracy; `key` is not used.
    """

    def loss_fn(params: PyTree, batch: Mapping[str, Any], key: Any = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        del key
        tokens_BT = batch["tokens"]
        loss, metrics = cross_entropy(apply(params, tokens_BT[:, :-1]), tokens_BT[:, 1:], z=z_loss)
        return loss, {name: metrics[name] for name in ("cross_entropy", "accuracy")}

    return loss_fn


def make_eval(loss_fn: LossFn) -> Callable[[PyTree, Mapping[str, Any]], dict[str, jax.Array]]:
    """Make the jitted `eval(params, batch) -> {"loss", "accuracy"}`; its loss is the cross-entropy without z-loss."""

    @jax.jit
    def eval_fn(params: PyTree, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        metrics = loss_fn(params, batch, None)[1]
        return {"loss": metrics["cross_entropy"], "accuracy": metrics["accuracy"]}

    return eval_fn


def results_table(title: str, results: Mapping[str, Mapping[str, float]]) -> Table:
    """A table of losses and accuracies by split, for the terminal."""
    table = Table("", "nats per token", "bits per token", "accuracy", title=title, title_justify="left")
    for name, found in results.items():
        loss, accuracy = found["loss"], found["accuracy"]
        table.add_row(name, f"{loss:.4f}", f"{loss / math.log(2):.4f}", f"{accuracy:.4f}")
    return table
