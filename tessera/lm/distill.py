"""Distillation of a decoder: its loss on text mixed with a teacher's logits and hidden states (Hinton et al. 2015)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from sharding.vocab_parallel import Sums, chunked_sum, linear_cross_entropy
from tessera.losses import distillation
from tessera.models.lm_loss import mean_over_tokens, targets
from tessera.models.transformer import Decoder, Norm
from tessera.step import Metrics, padding_share, with_mean_weights


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
    model: Decoder,
    config: DistillConfig,
    z_loss: float = 0.0,
    teacher: Decoder | None = None,
    loss_chunk_size: int = 0,
    mesh: Mesh | None = None,
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
      loss_chunk_size, mesh: see `tessera.models.lm_loss.lm_loss`; the teacher's logits too exist for a chunk only.

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
        inputs = batch["tokens"][:, :-1], batch.get("positions"), False
        if not config.hidden:
            return model.apply({"params": params}, *inputs), []
        is_read = lambda module, _: isinstance(module, Norm) and module.name in ("attention_norm", "final_norm")  # noqa: E731
        head, state = model.apply({"params": params}, *inputs, capture_intermediates=is_read, mutable=["intermediates"])
        return head, jax.tree.leaves(state["intermediates"])

    def total(head_DV: Array, x_CD: Array, rest: tuple[Array, ...], head_EV: Array) -> Sums:
        """Sums of a chunk's tokens; E is the teacher's width."""
        y_CE, labels_C, weights_C = rest
        how: Any = {"z": z_loss, "softcap": model.config.logit_softcap}
        loss, metrics = linear_cross_entropy(x_CD, head_DV, labels_C, weights_C, **how)
        logits_CV, teacher_CV = model.config.logits(x_CD, head_DV), teacher_model.config.logits(y_CE, head_EV)
        soft = distillation(logits_CV, teacher_CV, config.temperature, weights_C) * weights_C.size
        return (1 - config.weight) * loss + config.weight * soft, metrics | {"distillation": soft}

    mean = mean_over_tokens(partial(chunked_sum, total, chunk=loss_chunk_size), mesh)

    def loss_fn(pair: tuple[PyTree, PyTree], batch: Mapping[str, Any], key: Any = None) -> tuple[Array, Metrics]:
        del key
        params, teacher = pair
        batch = with_mean_weights(batch)
        weights = batch.get("mean_weights")
        (x_BTD, head_DV), states = run(model, params, batch)
        (y_BTE, head_EV), theirs = run(teacher_model, jax.lax.stop_gradient(teacher), batch)
        loss, metrics = mean(head_DV, x_BTD, (y_BTE, *targets(batch)), head_EV)
        metrics |= padding_share(batch)
        if config.hidden:
            distance = sum(_distance(a, b, weights) for a, b in zip(states, theirs, strict=True)) / len(states)
            loss, metrics = loss + config.hidden * distance, metrics | {"hidden_distance": jnp.asarray(distance)}
        return loss, metrics

    return loss_fn


def _distance(ours: Float[Array, "..."], theirs: Float[Array, "..."], weights: Any) -> Float[Array, ""]:
    """Mean squared distance of hidden states [..., B, T, D], weighed by position."""
    squared = jnp.square(ours.astype(jnp.float32) - theirs.astype(jnp.float32)).mean(-1)
    return (squared if weights is None else squared * weights).mean()
