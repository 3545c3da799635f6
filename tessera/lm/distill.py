"""Distillation of a decoder: its loss on text mixed with a teacher's logits and hidden states (Hinton et al. 2015)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from tessera.losses import distillation, next_token_loss, padding_share, with_mean_weights
from tessera.models.transformer import Decoder, Norm
from tessera.step import Metrics


@dataclass(frozen=True)
class DistillConfig:
    """How much of the loss a teacher gives.

    Attributes:
      weight: share of the teacher's logits in the loss, the text's is 1 - weight; 0 is off.
      temperature: both models' logits are divided by it.
      hidden: weight of the mean squared distance of hidden states, added to the loss: of what every attention layer and
        the head read, normalized.
      dir: the teacher, a Hugging Face directory; "" is the model that training starts from, before any adapter.
    """

    weight: float = 0.0
    temperature: float = 1.0
    hidden: float = 0.0
    dir: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight={self.weight} must be a share between 0 and 1")
        if self.temperature <= 0 or self.hidden < 0:
            raise ValueError(f"temperature={self.temperature} must be positive, hidden={self.hidden} not negative")

    @property
    def active(self) -> bool:
        """Whether there is a teacher."""
        return bool(self.weight or self.hidden)


def distill_loss(
    model: Decoder, config: DistillConfig, z_loss: float = 0.0, teacher: Decoder | None = None
) -> Callable[..., tuple[Array, Metrics]]:
    """Make `loss((params, teacher), batch, key)` of a dense decoder; batches are those of `tessera.models.lm_loss`.

    (1 - weight) * next-token loss + weight * cross-entropy with the teacher's softened logits + hidden * distance. The
    metrics are cross_entropy and accuracy (of the text), distillation (its cross-entropy) and, where it counts,
    hidden_distance.

    Args:
      model: the student.
      config: what counts how much.
      z_loss: see `tessera.losses.cross_entropy`.
      teacher: its model; None for one like the student.

    Raises:
      ValueError: a student with routed experts, a teacher of another vocabulary, or with `hidden` of another depth or
        width.
    """
    teacher_model = model if teacher is None else teacher
    same = ("vocab_size",) + (("layers", "width", "scan") if config.hidden else ())
    for name in same:
        ours, theirs = getattr(model.config, name), getattr(teacher_model.config, name)
        if ours != theirs:
            raise ValueError(f"the teacher has {name}={theirs}, the model {ours}: they must be equal")
    if "routed" in model.config.pattern:
        raise ValueError("distillation of routed experts is not supported: choose mlp='swiglu'")

    def run(model: Decoder, params: PyTree, batch: Mapping[str, Any]) -> tuple[Any, list[Array]]:
        inputs = batch["tokens"][:, :-1], batch.get("positions")
        if not config.hidden:
            return model.apply({"params": params}, *inputs), []
        is_read = lambda module, _: isinstance(module, Norm) and module.name in ("attention_norm", "final_norm")  # noqa: E731
        logits, state = model.apply(
            {"params": params}, *inputs, capture_intermediates=is_read, mutable=["intermediates"]
        )
        return logits, jax.tree.leaves(state["intermediates"])

    def loss_fn(pair: tuple[PyTree, PyTree], batch: Mapping[str, Any], key: Any = None) -> tuple[Array, Metrics]:
        del key
        params, teacher = pair
        batch = with_mean_weights(batch)
        weights = batch.get("mean_weights")
        logits_BTV, states = run(model, params, batch)
        soft_BTV, theirs = run(teacher_model, jax.lax.stop_gradient(teacher), batch)
        loss, metrics = next_token_loss(logits_BTV, batch["tokens"], z_loss, weights)
        soft = distillation(logits_BTV, soft_BTV, config.temperature, weights)
        loss = (1 - config.weight) * loss + config.weight * soft
        metrics |= {"distillation": soft} | padding_share(batch)
        if config.hidden:
            distance = sum(_distance(a, b, weights) for a, b in zip(states, theirs, strict=True)) / len(states)
            loss, metrics = loss + config.hidden * distance, metrics | {"hidden_distance": jnp.asarray(distance)}
        return loss, metrics

    return loss_fn


def _distance(ours: Float[Array, "..."], theirs: Float[Array, "..."], weights: Any) -> Float[Array, ""]:
    """Mean squared distance of hidden states [..., B, T, D], weighed by position."""
    squared = jnp.square(ours.astype(jnp.float32) - theirs.astype(jnp.float32)).mean(-1)
    return (squared if weights is None else squared * weights).mean()
