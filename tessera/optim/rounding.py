"""Optimizer state in bfloat16, rounded stochastically, so that small changes of a moment are not lost."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float32, Int32, Key, PyTree

from lottery.transform import map_moments


class RoundedState(NamedTuple):
    """Number of updates made, of which the noise of rounding is a function, and the optimizer's own state."""

    step: Int32[Array, ""]
    inner: PyTree


def bfloat16_state(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Store the moments of an optimizer in bfloat16, half of the memory; updates are computed in float32.

    What mirrors a parameter (see `lottery.transform.map_moments`) is widened before an update and rounded after it,
    stochastically: rounded to nearest, a moment with decay b2 = 0.999 would stop where it changes by less than 1 part
    in 256 a step. Counters, factored moments and keys stay as they are. Numbers that bfloat16 has are left unchanged.

    Args:
      tx: any transformation; extra arguments are passed on.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> RoundedState:
        return RoundedState(jnp.zeros((), jnp.int32), _mapped(_nearest, params, tx.init(params)))

    def update(
        updates: PyTree, state: RoundedState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, RoundedState]:
        new, inner = tx.update(updates, _mapped(_widened, updates, state.inner), params, **extra)
        keys = iter(jax.random.split(jax.random.fold_in(jax.random.key(0), state.step), len(jax.tree.leaves(inner))))
        inner = _mapped(lambda leaf: stochastic_round(leaf, key=next(keys)), updates, inner)
        return new, RoundedState(state.step + 1, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _mapped(f: Any, params: PyTree, state: PyTree) -> PyTree:
    wanted = (jnp.float32, jnp.bfloat16)
    return map_moments(lambda _, leaf: f(leaf) if leaf.dtype in wanted else leaf, params, state)


def _nearest(leaf: Array) -> Array:
    return leaf.astype(jnp.bfloat16)


def _widened(leaf: Array) -> Array:
    return leaf.astype(jnp.float32)


def stochastic_round(x: Float32[Array, "*N"], *, key: Key[Array, ""]) -> BFloat16[Array, "*N"]:
    """Round float32 to one of the two nearest bfloat16 numbers, with probabilities that leave the mean unchanged.

    Random bits are added below the last one that stays and cut off (Gupta et al. 2015, arXiv:1502.02551, section 3).
    Infinities and NaN stay so.
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)
