"""One optimizer step as a pure function: gradient, update, moving average, and what to look at."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key, PyTree

from moe.metrics import of_load
from tessera.optim.noise_scale import noise_scale

Metrics = dict[str, PyTree]  # mostly scalars
LossFn = Callable[..., tuple[jax.Array, Metrics]]
"""(params, batch, key) -> (mean loss [] float32, metrics: dict of scalars)."""


@flax.struct.dataclass
class TrainState:
    """All that a step reads and writes. `ema` mirrors `params`; None without a moving average."""

    step: Any  # int32 [], but a sharding or a ShapeDtypeStruct in a mapped state
    params: PyTree
    opt_state: PyTree
    ema: PyTree = None


@dataclass(frozen=True)
class StepConfig:
    """Gradient accumulation, moving average and noise scale of the training step.

    Attributes:
      grad_accum_steps: gradient accumulation: parts a batch is cut into, one after the other, whose gradients are
        averaged (activation memory of one part).
      ema: decay of the exponential moving average of the parameters; 0 for none.
      noise_scale: report the gradient noise scale from the parts (McCandlish et al. 2018); needs at least 2.
    """

    grad_accum_steps: int = 1
    ema: float = 0.0
    noise_scale: bool = False

    def __post_init__(self) -> None:
        if self.grad_accum_steps < 1:
            raise ValueError(f"grad_accum_steps={self.grad_accum_steps} must be at least 1")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is a decay in [0, 1), got {self.ema}")
        if self.noise_scale and self.grad_accum_steps < 2:
            raise ValueError("noise_scale compares a batch with its parts: set grad_accum_steps to 2 or more")


def init_state(params: PyTree, tx: optax.GradientTransformation, config: StepConfig = StepConfig()) -> TrainState:
    """Make the state before the first step; `ema` starts at the parameters."""
    # A copy: the state is donated to the step, and one buffer cannot be donated twice.
    ema = jax.tree.map(jnp.copy, params) if config.ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), ema)


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformationExtraArgs,
    config: StepConfig = StepConfig(),
    *,
    adjust: Callable[[PyTree, Metrics], PyTree] | None = None,
) -> Callable[[TrainState, PyTree, Key[Array, ""]], tuple[TrainState, Metrics]]:
    """Make `step(state, batch, key) -> (state, metrics)`, pure and not jitted.

    Each step draws its own key by folding in `state.step`, so a resumed run draws what an uninterrupted one would. The
    optimizer is always given `value=` and `grad_fn=` (the gradient of this batch at other parameters, for SAM).

    `adjust(params, metrics)`, if given, changes parameters after the optimizer from the metrics of `loss_fn`: what
    moves outside the gradient, such as the biases of balanced routers.

    Metrics: those of `loss_fn` (means over the parts of a batch, but for what follows from the routers' load), loss,
    grad_norm, update_norm (float32 scalars) and finite (bool: loss and gradient norm are); with `noise_scale` also
    noise_signal and noise_trace, the two estimates to average over steps and divide.
    """
    tx = optax.with_extra_args_support(tx)

    def step(state: TrainState, batch: PyTree, key: Key[Array, ""]) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        gradient = _make_gradient(loss_fn, batch, key, config.grad_accum_steps)
        loss, metrics, grads, parts_squared = gradient(state.params)
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, value=loss, grad_fn=lambda params, _: gradient(params)[2]
        )
        params = optax.apply_updates(state.params, updates)
        if adjust is not None:
            params = adjust(params, metrics)
        ema = None
        if config.ema:
            ema = optax.incremental_update(params, state.ema, 1.0 - config.ema)
        grad_norm = optax.global_norm(grads)
        if config.noise_scale:
            size = jax.tree.leaves(batch)[0].shape[0]
            estimate = noise_scale(parts_squared, grad_norm**2, size // config.grad_accum_steps, size)
            metrics = metrics | {"noise_signal": estimate.signal, "noise_trace": estimate.noise}
        metrics = metrics | {
            "loss": loss,
            "grad_norm": grad_norm,
            "update_norm": optax.global_norm(updates),
            "finite": jnp.isfinite(loss) & jnp.isfinite(grad_norm),
        }
        return replace(state, step=state.step + 1, params=params, opt_state=opt_state, ema=ema), metrics

    return step


def router_metrics(metrics: Metrics) -> Metrics:
    """The metrics with those of routers that follow from the load of all tokens, where there is a load."""
    if "router/load" not in metrics:
        return metrics
    return metrics | {f"router/{name}": value for name, value in of_load(metrics["router/load"]).items()}


def _make_gradient(loss_fn: LossFn, batch: PyTree, key: Key[Array, ""], parts: int) -> Callable[[PyTree], Any]:
    """`params -> (loss, metrics, gradient, mean squared norm of the parts' gradients)`."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def at_once(params: PyTree) -> Any:
        (loss, metrics), grads = value_and_grad(params, batch, key)
        return loss, metrics, grads, jnp.zeros(())

    def split(x: Any) -> jax.Array:
        if x.shape[0] % parts:
            raise ValueError(f"a batch of {x.shape[0]} does not divide into grad_accum_steps={parts}")
        # Row i goes to part i % parts: every device keeps its own rows when the batch is sharded.
        return jnp.moveaxis(jnp.reshape(x, (x.shape[0] // parts, parts, *x.shape[1:])), 1, 0)

    def accumulated(params: PyTree) -> Any:
        def body(total: Any, part_and_index: Any) -> tuple[Any, None]:
            part, index = part_and_index
            (loss, metrics), grads = value_and_grad(params, part, jax.random.fold_in(key, index))
            one = (loss, metrics, grads, optax.global_norm(grads) ** 2)
            return jax.tree.map(lambda a, b: a + b / parts, total, one), None

        xs = (jax.tree.map(split, batch), jnp.arange(parts))
        first = jax.tree.map(lambda x: x[0], xs)
        (loss, metrics), grads = jax.eval_shape(value_and_grad, params, first[0], key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (loss, metrics, grads))
        (loss, metrics, *rest), _ = jax.lax.scan(body, (*zeros, jnp.zeros(())), xs)
        return loss, router_metrics(metrics), *rest

    return at_once if parts == 1 else accumulated
