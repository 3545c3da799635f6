"""Time routed experts next to a dense layer: `python scripts/benchmarks/moe.py --config=configs/bench_moe.py`."""

import os
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from absl import app
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from moe import dispatch, experts, route
from scripts.benchmarks.timing import Timing, take_turns

_CONFIG = config_flags.DEFINE_config_file("config", "configs/bench_moe.py", "What to time.")


def rivals(config) -> tuple[dict[str, Callable], dict[str, Callable]]:
    """Name -> function that runs one pass and waits for it: dense and routed layers, and those by ragged_dot."""
    keys = jax.random.split(jax.random.key(0), 4)
    x_ND = jax.random.normal(keys[0], (config.tokens, config.width))
    dense = experts.initialize(config.width, config.k * config.ff, 0, key=keys[1])
    found = both(f"dense, {config.k * config.ff} wide", lambda p, x: experts.dense(p, x), (dense, x_ND))
    slow: dict[str, Callable] = {}
    for e in config.experts:
        params = experts.initialize(config.width, config.ff, e, key=keys[2])
        params |= {"router": jax.random.normal(keys[3], (config.width, e)) * config.width**-0.5}
        found |= both(f"{e} experts", partial(routed, k=config.k), (params, x_ND))
        if e in config.ragged:
            slow |= both(f"{e} experts by ragged_dot", partial(routed, k=config.k, run=ragged), (params, x_ND))
    return found, slow


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


def both(name: str, forward, args) -> dict:
    """The forward pass, and the gradients of its sum of squares by everything."""
    ahead = jax.jit(forward).lower(*args).compile()
    back = jax.jit(jax.grad(lambda *args: jnp.square(forward(*args)).sum(), argnums=(0, 1))).lower(*args).compile()
    return {
        f"{name}, forward": lambda: jax.block_until_ready(ahead(*args)),
        f"{name}, forward + backward": lambda: jax.block_until_ready(back(*args)),
    }


def main(argv) -> None:
    """Time; print medians, ratios to the dense layer's pass of the same kind, and those of ragged_dot to ours."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}: give --config=FILE and --config.key=value")
    config = _CONFIG.value
    if config.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: config.cores]))
    found, slow = rivals(config)
    timings = take_turns(found, rounds=config.rounds)
    table = Table(
        title=f"{config.tokens} tokens, width {config.width}, experts {config.ff} wide, top-{config.k}, float32"
    )
    for heading in ("layer", "ms (median)", "times the dense layer (median, min to max)"):
        table.add_column(heading)
    for name, timing in timings.items():
        kind = name.rsplit(", ", 1)[1]
        dense = next(other for label, other in timings.items() if label.startswith("dense") and label.endswith(kind))
        table.add_row(*line(name, timing, dense))
    Console().print(table)
    if not slow:
        return
    table = Table("layer", "ms (median)", "times ours (median, min to max)")
    # The same work by our kernels takes turns with them; few rounds, none of them unmeasured, since one takes seconds.
    ours = {name.replace(" by ragged_dot", ""): found[name.replace(" by ragged_dot", "")] for name in slow}
    timings = take_turns(ours | slow, rounds=config.ragged_rounds, warmup=0)
    for name in slow:
        table.add_row(*line(name, timings[name], timings[name.replace(" by ragged_dot", "")]))
    Console().print(table)


def line(name: str, timing: Timing, reference: Timing) -> tuple[str, str, str]:
    """A row: median, and how many times longer than the reference in the same round."""
    median, low, high = reference.ratio(timing)
    return name, f"{timing.median * 1e3:.1f}", f"{median:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    app.run(main)
