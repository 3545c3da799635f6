"""Learning-rate schedules by name, made from optax's, and step counts written as "160ep" or "500it"."""

import re
from collections.abc import Callable

import jax.numpy as jnp
import optax


def parse_steps(text: int | str, *, steps_per_epoch: int) -> int:
    """Turn a duration into optimizer steps.

    Args:
      text: an integer (steps), "500it" (iterations, that is steps) or "160ep" (epochs, may be fractional: "0.5ep").
      steps_per_epoch: optimizer steps in one pass over the training set.

    Returns:
      Steps, epochs rounded to the nearest step (halves up).

    Raises:
      ValueError: the text has another form, or epochs are asked for and `steps_per_epoch` is not positive.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        amount, unit = str(text), "it"
    else:
        match = re.fullmatch(r"(\d+|\d*\.\d+)(ep|it)?", str(text).strip())
        if not match:
            raise ValueError(f"cannot read {text!r} as a number of steps: write 500, '500it' or '160ep'")
        amount, unit = match[1], match[2] or "it"
    if unit == "it":
        if "." in amount or int(amount) < 0:
            raise ValueError(f"{text!r} is not a whole, positive number of iterations")
        return int(amount)
    if steps_per_epoch < 1:
        raise ValueError(
            f"{text!r} counts epochs, but an epoch has {steps_per_epoch} steps here: write iterations ('500it')"
        )
    return int(float(amount) * steps_per_epoch + 0.5)


def make_schedule(
    name: str,
    lr: float,
    *,
    steps: int = 0,
    warmup: int = 0,
    final: float = 0.0,
    decay: float = 0.2,
    milestones: tuple[int, ...] = (),
    factor: float = 0.1,
) -> optax.Schedule:
    """Build the function from step (0 before the first update) to learning rate.

    With `warmup` w, the rate rises linearly from 0 at step 0 to `lr` at step w; then, for w <= t <= steps (and its last
    value after that):

    - "constant": lr
    - "linear": straight from lr to final * lr at `steps`
    - "cosine": half a cosine from lr to final * lr at `steps` (Loshchilov & Hutter 2017, eq. 5, no restarts)
    - "wsd": lr, then over the last `decay` fraction of `steps` straight to final * lr (Hu et al. 2024, section 4.2)
    - "rsqrt": lr * sqrt(w / t), with max(w, 1) for w and t counted from 1 if w is 0 (Vaswani et al. 2017, section 5.3)
    - "step": lr times `factor` every milestones[0] steps after the warmup
    - "multistep": lr times `factor` at every milestone, an absolute step

    Args:
      name: one of the above.
      lr: peak learning rate.
      steps: length of training, needed by linear, cosine and wsd.
      warmup: steps of warmup.
      final: last learning rate as a fraction of `lr`.
      decay: fraction of `steps` that wsd decays over.
      milestones: see step and multistep.
      factor: see step and multistep.

    Raises:
      ValueError: an unknown name, or numbers the schedule cannot be made of.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: choose one of {', '.join(SCHEDULES)}")
    if warmup < 0 or steps < 0:
        raise ValueError(f"warmup={warmup} and steps={steps} must not be negative")
    if name in NEED_STEPS and warmup >= steps:
        raise ValueError(f"schedule {name!r} needs steps > warmup, got steps={steps} and warmup={warmup}")
    main = SCHEDULES[name](
        lr, steps=steps, warmup=warmup, final=final, decay=decay, milestones=milestones, factor=factor
    )
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup), main], [warmup])


def _wsd(lr: float, *, steps: int, warmup: int, final: float, decay: float, **_) -> optax.Schedule:
    length = round(decay * steps)
    if not 0 < length <= steps - warmup:
        raise ValueError(
            f"schedule 'wsd' decays over decay={decay} of steps={steps}, that is {length} steps, and has "
            f"{steps - warmup} left after the warmup"
        )
    return optax.linear_schedule(lr, final * lr, length, transition_begin=steps - warmup - length)


def _step(lr: float, *, milestones: tuple[int, ...], factor: float, **_) -> optax.Schedule:
    if len(milestones) != 1 or milestones[0] < 1:
        raise ValueError(f"schedule 'step' takes one milestone, the steps between two decays, not {milestones}")
    return optax.exponential_decay(lr, milestones[0], factor, staircase=True)


def _multistep(lr: float, *, milestones: tuple[int, ...], factor: float, warmup: int, **_) -> optax.Schedule:
    if not milestones or list(milestones) != sorted(set(milestones)) or milestones[0] <= warmup:
        raise ValueError(
            f"schedule 'multistep' takes rising milestones after the warmup ({warmup} steps), not {milestones}"
        )
    return optax.piecewise_constant_schedule(lr, {milestone - warmup: factor for milestone in milestones})


def _rsqrt(lr: float, *, warmup: int, **_) -> optax.Schedule:
    offset = max(warmup, 1)
    return lambda t: lr * jnp.sqrt(offset / (offset + jnp.asarray(t, jnp.float32)))


# Every maker gets the same keywords and returns a schedule whose step 0 is the end of the warmup.
SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
    "constant": lambda lr, **_: optax.constant_schedule(lr),
    "linear": lambda lr, *, steps, warmup, final, **_: optax.linear_schedule(lr, final * lr, steps - warmup),
    "cosine": lambda lr, *, steps, warmup, final, **_: optax.cosine_decay_schedule(lr, steps - warmup, alpha=final),
    "wsd": _wsd,
    "rsqrt": _rsqrt,
    "step": _step,
    "multistep": _multistep,
}
NEED_STEPS = ("linear", "cosine", "wsd")
