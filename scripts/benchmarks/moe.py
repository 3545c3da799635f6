"""A layer of routed experts beside a dense layer of equal active FLOPs, and beside the same experts by
`jax.lax.ragged_dot`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from moe import dispatch, experts, route
from scripts.benchmarks.timing import Contest, Row
from tessera.infra.schema import Schema


@dataclass(frozen=True)
class MoEBenchmark:
    """Router to combine, in float32.

    Attributes:
      suite: the benchmark's name.
      cores: that the process may use; 0 is all.
      tokens: of a pass.
      width: of a token.
      ff: hidden units of an expert.
      k: experts of a token; the dense layer is k experts wide.
      experts: numbers of experts, a contestant each.
      rounds: that are counted.
      ragged: numbers of experts to run by `jax.lax.ragged_dot` too, in rounds of their own: it takes seconds a pass.
      ragged_rounds: those rounds.
    """

    suite: str = "moe"
    cores: int = 0
    tokens: int = 4096
    width: int = 256
    ff: int = 512
    k: int = 2
    experts: tuple[int, ...] = (8, 64)
    rounds: int = 15
    ragged: tuple[int, ...] = (64,)
    ragged_rounds: int = 1


SCHEMA = Schema(MoEBenchmark)


def rows(config: Any) -> Iterator[Row]:
    """Forward, and forward + backward, in tokens per second; then ours beside `ragged_dot`."""
    keys = jax.random.split(jax.random.key(0), 4)
    x_ND = jax.random.normal(keys[0], (config.tokens, config.width))
    dense = f"dense, {config.k * config.ff} wide"
    params = experts.initialize(config.width, config.k * config.ff, 0, key=keys[1])
    calls = {dense: both(lambda p, x: experts.dense(p, x), (params, x_ND))}
    slow: dict[str, dict[str, Callable]] = {}
    for e in config.experts:
        params = experts.initialize(config.width, config.ff, e, key=keys[2])
        params |= {"router": jax.random.normal(keys[3], (config.width, e)) * config.width**-0.5}
        calls[f"{e} experts"] = both(partial(routed, k=config.k), (params, x_ND))
        if e in config.ragged:
            slow[f"{e} experts"] = both(partial(routed, k=config.k, run=ragged), (params, x_ND))
    for product in PASSES:
        contestants = {name: passes[product] for name, passes in calls.items()}
        work = dict.fromkeys(contestants, float(config.tokens))
        case = f"{config.tokens} tokens, width {config.width}, experts {config.ff} wide, top-{config.k}: {product}"
        yield from Contest(case, contestants, dense, work, config.rounds).rows()
    for name, passes in slow.items():
        for product in PASSES:
            theirs = f"{name} by jax.lax.ragged_dot"
            contestants = {name: calls[name][product], theirs: passes[product]}
            work = dict.fromkeys(contestants, float(config.tokens))
            # Compiled ahead of time; a round of it takes seconds, so none goes unmeasured.
            yield from Contest(f"{product}, {name}", contestants, theirs, work, config.ragged_rounds, warmup=0).rows()


def routed(params, x_ND, *, k, run=None):
    """Router to combine."""
    weights = {name: leaf for name, leaf in params.items() if name != "router"}
    routing = route.top_k(x_ND @ params["router"], k)
    if run is None:
        return experts.mixture(weights, x_ND, routing)[0]
    return dispatch.dropless(x_ND, routing, partial(run, weights))


def ragged(params, rows_RD, sizes_E):
    """The same experts by `jax.lax.ragged_dot`."""
    gate, up = (jax.lax.ragged_dot(rows_RD, params[name], sizes_E) for name in ("gate", "up"))
    return jax.lax.ragged_dot(experts.activate(up, gate), params["down"], sizes_E)


PASSES = ("forward", "forward + backward")


def both(forward: Callable, args: tuple) -> dict[str, Callable]:
    """The forward pass, and the gradients of its sum of squares by everything; compiled."""
    ahead = jax.jit(forward).lower(*args).compile()
    back = jax.jit(jax.grad(lambda *args: jnp.square(forward(*args)).sum(), argnums=(0, 1))).lower(*args).compile()
    return {
        "forward": lambda: jax.block_until_ready(ahead(*args)),
        "forward + backward": lambda: jax.block_until_ready(back(*args)),
    }
