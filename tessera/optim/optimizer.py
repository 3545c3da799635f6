"""Optimizers and learning-rate schedules by name, all of them optax's, with decay masks, clipping and SAM."""

import difflib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree
from optax import contrib

from sharding.rules import path_name
from tessera.optim.param_axes import clip_units, matrix_axes
from tessera.optim.rounding import bfloat16_state

# Optimizers whose state has copies of weights, which eight bits are too few for.
KEEP_WEIGHTS = ("cocob", "dog", "dowg", "madgrad", "prodigy", "schedule_free", "schedule_free_sgd")


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer and its learning-rate schedule; steps are parameter updates.

    Attributes:
      name: a key of `OPTIMIZERS`, "sam" or "schedule_free" (of AdamW, or "schedule_free_sgd").
      lr: peak learning rate. dadapt_adamw, prodigy, dog, dowg, cocob and momo find their own step size: use 1.
      schedule, steps, final, decay, milestones, factor: see `make_schedule`.
      warmup: steps over which the rate rises from 0; below 1 a share of `steps`, so that shorter runs warm up shorter.
      weight_decay: taken by the optimizer itself where it has decay (decoupled and times lr, as in AdamW; an L2 term
        for lars, dog, dowg, madgrad and novograd; a fraction per step for adafactor), else added to the gradient as an
        L2 term (sgd, adam).
      decay_mask: "matrices" decays every leaf but gains and biases, "all" decays everything. Muon's AdamW side (see
        `matrix_axes`) decays by the option adam_weight_decay only.
      clip_norm: largest global gradient norm; 0 is off.
      agc: adaptive clipping of each unit's gradient to this fraction of its weights' norm (Brock et al. 2021, eq. 3);
        the last layer is left out (section 4.1); 0 is off.
      ema: decay of the exponential moving average of parameters that the training step keeps; 0 keeps none.
      state_dtype: "float32", or "bfloat16" for moments of half the size, rounded stochastically
        (`tessera.optim.rounding`); the parameters and their moving average stay float32.
      options: further keyword arguments of the optax function, as (name, value) pairs. For sam also "base" (the
        optimizer, default momentum), "rho" (radius, default 0.05) and "sync_period" (2); the rest goes to the base.
    """

    name: str = "adamw"
    lr: float = 1e-3
    schedule: str = "constant"
    steps: int = 0
    warmup: int | float = 0
    final: float = 0.0
    decay: float = 0.2
    milestones: tuple[int, ...] = ()
    factor: float = 0.1
    weight_decay: float = 0.0
    decay_mask: str = "matrices"
    clip_norm: float = 0.0
    agc: float = 0.0
    ema: float = 0.0
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self):
        if self.decay_mask not in ("matrices", "all"):
            raise ValueError(f"decay_mask={self.decay_mask!r}: choose 'matrices' or 'all'")
        if self.state_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"state_dtype={self.state_dtype!r}: choose 'float32' or 'bfloat16'")
        if self.state_dtype == "bfloat16" and self.name in KEEP_WEIGHTS:
            raise ValueError(
                f"state_dtype='bfloat16': the state of {self.name!r} has copies of the weights, not moments alone; "
                "choose 'float32'"
            )
        for name in ("lr", "weight_decay", "clip_norm", "agc"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema} must lie in [0, 1)")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup={self.warmup} must be whole steps, or below 1 a share of them")


def hutchinson(seed: int = 0) -> optax.GradientTransformationExtraArgs:
    """Estimate the Hessian's diagonal by u * (H u), u random signs, from `grad_fn`: Liu et al. (2023), algorithm 1.

    optax's own estimator asks for the objective, which would make the training step pass the loss twice.
    """

    def init(params):
        del params
        return contrib.HutchinsonState(key=jax.random.PRNGKey(seed))

    def update(updates, state, params=None, *, grad_fn=None, **_):
        del updates
        if grad_fn is None:
            raise ValueError("sophia needs update(..., grad_fn=): a function (params, 0) -> gradients")
        key, sign_key = jax.random.split(state.key)
        signs = optax.tree.random_like(sign_key, params, jax.random.rademacher, dtype=jnp.float32)
        product = jax.jvp(lambda p: grad_fn(p, 0), (params,), (signs,))[1]
        return jax.tree.map(jnp.multiply, product, signs), contrib.HutchinsonState(key=key)

    return optax.GradientTransformationExtraArgs(init, update)


def schedule_free_adamw(
    learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, mask=None, weight_lr_power=2.0, state_dtype=None
) -> optax.GradientTransformationExtraArgs:
    """contrib.schedule_free_adamw with a decay mask and any learning-rate schedule (use constant, with a warmup)."""
    base = optax.chain(
        optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    return contrib.schedule_free(base, learning_rate, b1, weight_lr_power, state_dtype)


def schedule_free_sgd(
    learning_rate, b1=0.9, weight_decay=0.0, mask=None, weight_lr_power=2.0, state_dtype=None
) -> optax.GradientTransformationExtraArgs:
    """contrib.schedule_free_sgd with a decay mask and any learning-rate schedule (use constant, with a warmup)."""
    base = optax.chain(optax.add_decayed_weights(weight_decay, mask), optax.sgd(learning_rate))
    return contrib.schedule_free(base, learning_rate, b1, weight_lr_power, state_dtype)


class Entry(NamedTuple):
    """An optax function that takes the learning rate first, and how to call it.

    `decay` and `masks` name its decay and mask arguments, if any; `scheduled` is False where it takes a number only.
    """

    make: Callable[..., optax.GradientTransformation]
    decay: str = ""
    masks: tuple[str, ...] = ()
    scheduled: bool = True


OPTIMIZERS: dict[str, Entry] = {
    "acprop": Entry(contrib.acprop, "weight_decay", ("mask",)),
    "adabelief": Entry(optax.adabelief),
    "adadelta": Entry(optax.adadelta, "weight_decay", ("weight_decay_mask",)),
    "adafactor": Entry(optax.adafactor, "weight_decay_rate", ("weight_decay_mask",)),
    "adagrad": Entry(optax.adagrad),
    "adam": Entry(optax.adam),
    "adamax": Entry(optax.adamax),
    "adamaxw": Entry(optax.adamaxw, "weight_decay", ("mask",)),
    "adamw": Entry(optax.adamw, "weight_decay", ("mask",)),
    "adan": Entry(optax.adan, "weight_decay", ("mask",)),
    "ademamix": Entry(contrib.ademamix, "weight_decay", ("mask",)),
    "adopt": Entry(contrib.adopt),
    "amsgrad": Entry(optax.amsgrad),
    "cocob": Entry(contrib.cocob, "weight_decay", ("mask",)),
    "dadapt_adamw": Entry(contrib.dadapt_adamw, "weight_decay"),
    "dog": Entry(contrib.dog, "weight_decay", ("mask",)),
    "dowg": Entry(contrib.dowg, "weight_decay", ("mask",)),
    "fromage": Entry(optax.fromage),
    "lamb": Entry(optax.lamb, "weight_decay", ("mask",)),
    "lars": Entry(optax.lars, "weight_decay", ("weight_decay_mask", "trust_ratio_mask")),
    "lion": Entry(optax.lion, "weight_decay", ("mask",)),
    "madgrad": Entry(contrib.madgrad, "weight_decay"),
    "momentum": Entry(partial(optax.sgd, momentum=0.9)),
    "momo": Entry(contrib.momo, "weight_decay"),
    "momo_adam": Entry(contrib.momo_adam, "weight_decay"),
    "muon": Entry(
        partial(contrib.muon, muon_weight_dimension_numbers=matrix_axes), "weight_decay", ("weight_decay_mask",)
    ),
    "nadam": Entry(optax.nadam),
    "nadamw": Entry(optax.nadamw, "weight_decay", ("mask",)),
    "nesterov": Entry(partial(optax.sgd, momentum=0.9, nesterov=True)),
    "novograd": Entry(optax.novograd, "weight_decay"),
    "prodigy": Entry(contrib.prodigy, "weight_decay"),
    "radam": Entry(optax.radam),
    "rmsprop": Entry(optax.rmsprop),
    "rprop": Entry(optax.rprop, scheduled=False),
    "schedule_free": Entry(schedule_free_adamw, "weight_decay", ("mask",)),
    "schedule_free_sgd": Entry(schedule_free_sgd, "weight_decay", ("mask",)),
    "sgd": Entry(optax.sgd),
    "signum": Entry(optax.signum),
    "simplified_ademamix": Entry(contrib.simplified_ademamix, "weight_decay", ("mask",)),
    "sm3": Entry(optax.sm3, scheduled=False),
    "sophia": Entry(partial(contrib.sophia, hessian_diagonal_fn=hutchinson()), "weight_decay", ("weight_decay_mask",)),
    "yogi": Entry(optax.yogi),
}


def decayed(params: PyTree) -> PyTree:
    """Tree of bools: True for kernels and tables, False for gains and biases, whatever is stacked in front of them."""

    def is_matrix(path, leaf):
        return leaf.ndim >= 2 and path_name(path).split("/")[-1] not in ("gain", "bias", "scale", "penalty")

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """The schedule of `config` as a function from parameter updates made to learning rate."""
    return make_schedule(
        config.schedule,
        config.lr,
        steps=config.steps,
        warmup=round(config.warmup * config.steps) if 0 < config.warmup < 1 else int(config.warmup),
        final=config.final,
        decay=config.decay,
        milestones=config.milestones,
        factor=config.factor,
    )


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Build the whole transformation: clip, decay, optimizer (within SAM).

    `update(grads, state, params, grad_fn=, value=)` takes two extra arguments that every optimizer here either uses or
    ignores: `grad_fn(params, i) -> grads` on the same batch (sam, sophia) and the loss `value` (momo). With scanned
    layers a leaf is the stack of all layers, and so is a "layer" to lars, lamb, novograd and fromage.

    Raises:
      ValueError: an unknown name or option (with the nearest known one), or parts that cannot be put together.
    """
    tx = _sam(config) if config.name == "sam" else _chain(config)
    return optax.with_extra_args_support(tx)


def eval_params(config: OptimizerConfig, opt_state: PyTree, params: PyTree) -> PyTree:
    """The parameters to evaluate: the running average for the schedule-free methods, else `params` themselves."""
    if not config.name.startswith("schedule_free"):
        return params
    is_state = lambda node: isinstance(node, contrib.ScheduleFreeState)  # noqa: E731
    states = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
    if len(states) != 1:
        raise ValueError(f"expected one ScheduleFreeState in the optimizer state, found {len(states)}")
    return contrib.schedule_free_eval_params(states[0], params)


def _chain(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping, the L2 term where the optimizer has no decay, and the optimizer."""
    entry, options = _entry(config.name), dict(config.options)
    parts: list[optax.GradientTransformation] = []
    if config.clip_norm:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    if config.agc:
        parts.append(clip_units(config.agc))
    known = list(inspect.signature(entry.make).parameters)[1:]
    for name in options:
        if name not in known:
            raise ValueError(
                f"optimizer {config.name!r} has no option {name!r}{_nearest(name, known)}; it has {', '.join(known)}"
            )
    mask = decayed if config.decay_mask == "matrices" else None
    arguments: dict[str, Any] = {}
    if not entry.decay and config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask))
    if entry.decay:
        # Always given: some of optax's defaults are not zero. Where the default is None, None is off.
        default = inspect.signature(entry.make).parameters[entry.decay].default
        arguments[entry.decay] = config.weight_decay or (None if default is None else 0.0)
        if mask is not None and entry.masks:
            arguments |= dict.fromkeys(entry.masks, mask)
        elif mask is not None and config.weight_decay:
            raise ValueError(
                f"optimizer {config.name!r} decays every parameter: set decay_mask='all' (or weight_decay=0)"
            )
    if not entry.scheduled and (config.schedule != "constant" or config.warmup):
        raise ValueError(f"optimizer {config.name!r} takes a constant learning rate without warmup")
    rate = learning_rate(config) if entry.scheduled else config.lr
    parts.append(entry.make(rate, **(arguments | options)))
    return bfloat16_state(optax.chain(*parts)) if config.state_dtype == "bfloat16" else optax.chain(*parts)


def _sam(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Sharpness-aware minimisation (Foret et al. 2021, eq. 2 and algorithm 1) around another optimizer."""
    options = dict(config.options)
    base, rho, period = options.pop("base", "momentum"), options.pop("rho", 0.05), options.pop("sync_period", 2)
    # optax's SAM passes no extra arguments on, and keeps the state of its base out of sight of `eval_params`.
    if base in ("sam", "sophia", "momo", "momo_adam", "schedule_free", "schedule_free_sgd"):
        raise ValueError(f"sam cannot use {base!r} as its base; choose one that needs gradients only, like 'momentum'")
    inner = _chain(replace(config, name=base, options=tuple(options.items())))
    # The epsilon keeps a zero gradient from becoming NaN.
    climb = optax.chain(optax.normalize_by_update_norm(eps=1e-12), optax.sgd(rho))
    sam = contrib.sam(inner, climb, sync_period=period, opaque_mode=True)

    def update(updates, state, params=None, *, grad_fn=None, **_):
        return sam.update(updates, state, params, grad_fn=grad_fn)

    return optax.GradientTransformationExtraArgs(sam.init, update)


def _entry(name: str) -> Entry:
    names = [*OPTIMIZERS, "sam"]
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}{_nearest(name, names)}; known: {', '.join(sorted(names))}")
    return OPTIMIZERS[name]


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f", did you mean {near[0]!r}?" if near else ""


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
