"""The compiled programs of one small training run: initialize, take many steps, evaluate, measure gradient noise.

The models of a sweep are tiny, so what counts is overhead: the text lives on the device, one call takes many steps, and
trunk and decays of a size share one program (the schedule's numbers and the number of steps are arguments).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Integer, PyTree

from scaling.mup import factors
from sharding.rules import path_name
from tessera.infra.schema import differences
from tessera.losses import cross_entropy
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.optim.noise_scale import noise_scale
from tessera.optim.optimizer import decayed
from tessera.step import TrainState, init_state, make_train_step, scan_steps

NEVER = 2**30  # a step no run reaches: a trunk's learning rate does not fall

# Share of the learning rate that is left when a share x of the decay is over.
DECAYS: dict[str, Callable[[Array], Array]] = {"sqrt": lambda x: 1 - jnp.sqrt(x), "linear": lambda x: 1 - x}


@dataclass(frozen=True)
class TrialConfig:
    """How every run of a sweep is trained.

    Attributes:
      parametrization, base_width: of the width transfer, see `scaling.mup`; learning rates are those of the base.
      b1, b2, eps, weight_decay, clip_norm: of AdamW; the decay is times the learning rate, gains are not decayed.
      decay_shape: how the learning rate falls in a decay: "sqrt", 1 - sqrt(x) (Hägele et al. 2024), or "linear", 1 - x.
      eval_tokens: validation tokens of one readout, the same ones for every run.
      noise_batches: batches from which the gradient noise scale is estimated at every branch point; 0 for none.
      chunk: steps of one call.
      save_seconds: between saves of a trunk; besides, every branch point is saved.
    """

    parametrization: str = "mup"
    base_width: int = 16
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    decay_shape: str = "sqrt"
    eval_tokens: int = 131_072
    noise_batches: int = 32
    chunk: int = 200
    save_seconds: float = 20.0

    def __post_init__(self):
        factors("hidden", 1.0, self.parametrization)
        if self.decay_shape not in DECAYS:
            raise ValueError(f"decay_shape={self.decay_shape!r}: choose one of {', '.join(DECAYS)}")
        if self.noise_batches == 1 or self.noise_batches < 0:
            raise ValueError(f"noise_batches={self.noise_batches}: 0 for none, else at least 2")
        for name in ("base_width", "eval_tokens", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def settings(self) -> dict[str, Any]:
        """Those that a run's numbers depend on and that differ from the defaults."""
        return {name: value for name, value in differences(self).items() if name not in ("chunk", "save_seconds")}


class Schedule(NamedTuple):
    """A warmup-stable-decay (WSD) learning rate: warmup over `warmup` steps to `peak`, decay from `branch` to `end`.

    Numbers only, so that one compiled program serves the trunk (Hägele et al. 2024, arXiv:2405.18392) and its decays.
    """

    peak: float
    warmup: int
    branch: int = NEVER
    end: int = NEVER + 1


class Programs(NamedTuple):
    """The compiled programs of one run; see `make_programs`."""

    init: Callable
    advance: Callable
    evaluate: Callable
    noise: Callable


def role_of(path: tuple[Any, ...]) -> str:
    """Role in the width transfer (`scaling.mup`) of a leaf of `Decoder`'s parameters with tied tables."""
    name = path_name(path)
    if name.endswith("/table"):
        return "table"
    if name.startswith("final_norm/"):
        return "readout"
    return "vector" if name.endswith("/gain") else "hidden"


def factor_trees(params: PyTree, ratio: float, parametrization: str) -> tuple[PyTree, PyTree]:
    """Factors on initial values and on learning rates (floats) in the structure of `params`, which may be abstract."""
    found = [
        jax.tree_util.tree_map_with_path(
            lambda path, _, what=what: factors(role_of(path), ratio, parametrization)[what], params
        )
        for what in (0, 1)
    ]
    return found[0], found[1]


def rate(step: Int[Array, ""], schedule: Schedule, shape: str) -> Float[Array, ""]:
    """Learning rate of the step that follows `step` finished ones."""
    begun = jnp.minimum(1.0, (step + 1) / jnp.maximum(schedule.warmup, 1))
    gone = jnp.clip((step - schedule.branch) / (schedule.end - schedule.branch), 0.0, 1.0)
    return jnp.asarray(schedule.peak * begun * DECAYS[shape](gone), jnp.float32)


class Trial:
    """One model and its optimizer; the methods are pure functions of their arguments.

    Args:
      model_settings: layers, width, ff, heads, head_dim, vocab and length (T).
      seed: of the initial parameters.
      config: how to train.
    """

    def __init__(self, model_settings: Mapping[str, Any], seed: int, config: TrialConfig):
        sizes = dict(model_settings)
        self.length, vocab = sizes.pop("length"), sizes.pop("vocab")
        # Few blocks: unrolled they run faster than scanned.
        self.model = Decoder(TransformerConfig(vocab_size=vocab, scan=False, **sizes))
        self.seed, self.config = seed, config
        abstract = jax.eval_shape(self._initial)
        self.init_factors, self.lr_factors = factor_trees(
            abstract, sizes["width"] / config.base_width, config.parametrization
        )

    def _initial(self) -> PyTree:
        return self.model.init(jax.random.key(self.seed), jnp.zeros((1, self.length), jnp.int32))["params"]

    def optimizer(self, lr: float | Float[Array, ""]) -> optax.GradientTransformationExtraArgs:
        """AdamW with each leaf's own factor (muP) on the learning rate, which may be traced."""

        def scaled(updates: PyTree, params: PyTree) -> PyTree:
            del params
            return jax.tree.map(lambda update, factor: -lr * factor * update, updates, self.lr_factors)

        return optax.chain(
            optax.clip_by_global_norm(self.config.clip_norm),
            optax.scale_by_adam(self.config.b1, self.config.b2, self.config.eps),
            optax.add_decayed_weights(self.config.weight_decay, decayed),
            optax.stateless(scaled),
        )

    def init(self) -> TrainState:
        """The state before the first step."""
        params = jax.tree.map(jnp.multiply, self._initial(), self.init_factors)
        return init_state(params, self.optimizer(0.0))

    def loss(self, params: PyTree, tokens_BT: Int[Array, "B T"]) -> Float[Array, ""]:
        """Mean cross-entropy of windows of T + 1 tokens."""
        logits_BTV: Any = self.model.apply({"params": params}, tokens_BT[:, :-1])
        return cross_entropy(logits_BTV, tokens_BT[:, 1:])[0]

    def windows(self, tokens_N: Integer[Array, " N"], index_B: Int[Array, " B"]) -> Int[Array, "B T"]:
        """Window i holds the tokens i T to i T + T, the last one being a target only."""
        return tokens_N[index_B[:, None] * self.length + jnp.arange(self.length + 1)[None, :]].astype(jnp.int32)

    def step(
        self, state: TrainState, tokens_BT: Int[Array, "B T"], schedule: Schedule
    ) -> tuple[TrainState, Float[Array, ""]]:
        """One optimizer step; returns the loss before it."""
        tx = self.optimizer(rate(state.step, schedule, self.config.decay_shape))
        train_step = make_train_step(lambda params, tokens, key: (self.loss(params, tokens), {}), tx)
        state, metrics = train_step(state, tokens_BT, jax.random.key(0))
        return state, metrics["loss"]

    def advance(
        self,
        state: TrainState,
        tokens_N: Integer[Array, " N"],
        index_TB: Int[Array, "T B"],
        count: Any,
        schedule: Schedule,
    ) -> tuple[TrainState, Float[Array, ""]]:
        """One step for each of the first `count` rows of the index; returns their mean loss too."""
        step = lambda state, index_B: self.step(state, self.windows(tokens_N, index_B), schedule)  # noqa: E731
        return scan_steps(step, state, index_TB, count)

    def evaluate(self, params: PyTree, windows_nbT: Int[Array, "n b T"]) -> Float[Array, ""]:
        """Mean loss over n equal batches."""
        return jax.lax.map(lambda tokens_BT: self.loss(params, tokens_BT), windows_nbT).mean()

    def noise(
        self, params: PyTree, tokens_N: Integer[Array, " N"], index_KB: Int[Array, "K B"]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """(|G|^2, trace of the covariance over sequences) from K batches; see `tessera.optim.noise_scale`."""

        def body(total: PyTree, index_B: Array) -> tuple[PyTree, Array]:
            grads = jax.grad(self.loss)(params, self.windows(tokens_N, index_B))
            return jax.tree.map(jnp.add, total, grads), optax.global_norm(grads) ** 2

        total, squared_K = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, params), index_KB)
        count, batch = index_KB.shape
        found = noise_scale(squared_K.mean(), optax.global_norm(total) ** 2 / count**2, batch, batch * count)
        return found.signal, found.noise


def compile_programs(trial: Trial) -> Programs:
    """The trial's methods, each compiled once."""
    # Drawing random weights is run once: optimized, it takes four times as long to compile as it saves.
    init = jax.jit(trial.init, compiler_options={"xla_backend_optimization_level": 0})
    return Programs(init, jax.jit(trial.advance), jax.jit(trial.evaluate), jax.jit(trial.noise))
