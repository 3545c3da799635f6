"""Grouped and block-sparse kernels: every product of a shape, by ours and by what else is installed."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from moe import experts, route
from moe.kernels import block_sparse_matmul, block_structure, grouped_matmul, to_blocks
from scripts.benchmarks.timing import Contest, Row, take_turns
from tessera.infra.schema import Schema

PRODUCTS = ("forward", "input gradient", "weight gradient")
Calls = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class KernelBenchmark:
    """Products of kernels, and a whole layer, beside dense products and what else is installed.

    Attributes:
      suite: the benchmark's name.
      cores: that the process may use; 0 is all.
      seed: of sizes and arrays.
      concentration: of the Dirichlet distribution of group sizes; 1 is as uneven as uniform shares get.
      rounds: that are counted.
      repeat: calls of a round: launches overlap on accelerators.
      dtype: of all operands.
      grouped: (rows, d, ff, experts) of each grouped matmul.
      blocks: (rows, d, ff, block, density) of each block-sparse matmul.
      layers: (tokens, d, ff, experts, choices) of each layer.
      patience: seconds of a call above which a contestant has one round.
      without: contestants that are left out, by name: `ragged_dot` is a masked dense product on some platforms.
    """

    suite: str = "kernels"
    cores: int = 0
    seed: int = 0
    concentration: float = 1.0
    rounds: int = 5
    repeat: int = 1
    dtype: str = "float32"
    grouped: tuple[tuple[int, int, int, int], ...] = ((8192, 256, 512, 8), (8192, 256, 512, 64))
    blocks: tuple[tuple[int, int, int, int, float], ...] = ((4096, 1024, 1024, 128, 0.1), (4096, 1024, 1024, 64, 0.1))
    layers: tuple[tuple[int, int, int, int, int], ...] = ((4096, 256, 512, 8, 2),)
    patience: float = 1.0
    without: tuple[str, ...] = ()


SCHEMA = Schema(KernelBenchmark)


class Case(NamedTuple):
    """One product of one shape: contestants, floating point operations, and bytes that must be moved at least."""

    label: str
    product: str
    contestants: Calls
    flops: float
    moved: float


def rows(config: Any) -> Iterator[Row]:
    """A row per contestant; the floor is the roofline of this run: dense FLOP/s and copy bandwidth."""
    bandwidth = copy_bandwidth()
    for case in cases(config):
        dense = next(name for name in case.contestants if name.startswith("dense"))
        contestants = working(case.contestants)
        patience = config.patience * config.repeat
        contest = Contest(f"{case.label}: {case.product}", contestants, dense, rounds=config.rounds, patience=patience)
        found = contest.rows()
        least = next(row.seconds for row in found if row.name == dense) / config.repeat
        # A dense product of a whole weight does more work than is asked of the sparse one: its rate is its own.
        floor = max(case.moved / bandwidth, least if dense == "dense, equal FLOPs" else 0)
        for row in found:
            seconds = row.seconds / config.repeat
            more = {"GB at least": case.moved / 1e9, "floor ms": floor * 1e3}
            if not row.name.startswith("dense, whole"):
                more["TFLOP/s"] = case.flops / seconds / 1e12
            yield replace(row, seconds=seconds, rate=1 / seconds, more=more)


def cases(config: Any) -> Iterator[Case]:
    """Everything that a config asks for, one shape in memory at a time."""
    options = {"dtype": config.dtype, "seed": config.seed, "repeat": config.repeat}
    itemsize = jnp.dtype(config.dtype).itemsize
    for m, k, n, groups in config.grouped:
        calls = grouped_calls(
            (m, k, n, groups), concentration=config.concentration, without=tuple(config.without), **options
        )
        moved = bytes_moved(m, k, n, groups * k * n, itemsize)
        for product in PRODUCTS:
            yield Case(f"{m} rows, {k} x {n}, {groups} experts", product, calls[product], 2 * m * k * n, moved)
    for m, k, n, block, density in config.blocks:
        calls = block_calls((m, k, n, block, density), **options)
        moved = bytes_moved(m, k, n, int(density * k * n), itemsize)
        label = f"{m} rows, {k} x {n}, blocks of {block}, density {density}"
        for product in PRODUCTS:
            yield Case(label, product, calls[product], 2 * m * k * n * density, moved)
    for tokens, d, ff, count, chosen in config.layers:
        # Weights: read forward and backward, their gradients written; tokens, outputs and the gradients of both.
        moved = itemsize * (9 * count * d * ff + 4 * tokens * d)
        label = f"layer: {tokens} tokens, {d} x {ff}, top-{chosen} of {count}"
        calls = layer_calls((tokens, d, ff, count, chosen), **options)
        yield Case(label, "forward + backward", calls, 18 * tokens * chosen * d * ff, moved)


def working(contestants: Calls) -> Calls:
    """Those that run; ours and the dense product must."""
    found = {}
    for name, run in contestants.items():
        try:
            run()
        except Exception as error:  # another library's compiler may fail in any way
            if name.startswith(("tessera", "dense")):
                raise
            logging.warning("%s left out: %s", name, str(error).split("\n")[0][:200])
            continue
        found[name] = run
    return found


def uneven_sizes(rows: int, groups: int, *, concentration: float, seed: int) -> np.ndarray:
    """Group sizes of sum `rows`, shares drawn from a symmetric Dirichlet distribution; some may be 0."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(rows, rng.dirichlet(np.full(groups, concentration))).astype(np.int32)


def ready(f: Callable, *args: Any, repeat: int = 1) -> Callable[[], object]:
    """A call that does its work `repeat` times, without waiting in between, and returns when it is done."""
    compiled = jax.jit(f)

    def run():
        for _ in range(repeat - 1):
            compiled(*args)
        return jax.block_until_ready(compiled(*args))

    return run


def products(f: Callable, x: jax.Array, w: Any, dy: jax.Array, repeat: int = 1) -> Calls:
    """The three products of y = f(x, w), each alone: what a gradient does not need is not computed."""
    back = {
        "input gradient": lambda x, w, dy: jax.vjp(lambda x: f(x, w), x)[1](dy),
        "weight gradient": lambda x, w, dy: jax.vjp(lambda w: f(x, w), w)[1](dy),
    }
    return {"forward": ready(f, x, w, repeat=repeat)} | {
        name: ready(product, x, w, dy, repeat=repeat) for name, product in back.items()
    }


def fastest(candidates: Iterable[Callable[[], object]]) -> Callable[[], object] | None:
    """The quickest of a contestant's configurations; those that do not compile drop out, None if all do."""
    working = {}
    for number, run in enumerate(candidates):
        try:
            run()
        except Exception:  # a library's compiler may fail in any way
            continue
        working[str(number)] = run
    if not working:
        return None
    times = take_turns(working, rounds=3)
    return working[min(times, key=lambda name: times[name].median)]


def ours() -> str:
    """Name of our kernels for the default backend: "auto" takes none on a GPU that no table has times for."""
    return "gpu" if jax.default_backend() == "gpu" else "auto"


def grouped_calls(
    case: tuple[int, int, int, int], *, dtype: str, concentration: float, seed: int, without=(), repeat: int = 1
) -> dict:
    """Product -> {contestant: call} for rows, d, ff, experts; the dense matmul has as many FLOPs."""
    rows, k, n, groups = case
    sizes = jnp.array(uneven_sizes(rows, groups, concentration=concentration, seed=seed))
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((rows, k), (groups, k, n), (rows, n))
    x, w, dy = (jax.random.normal(key, shape, jnp.dtype(dtype)) for key, shape in zip(keys, shapes, strict=True))
    contestants = {
        "tessera": products(lambda x, w: grouped_matmul(x, w, sizes, backend=ours()), x, w, dy, repeat),
        "dense, equal FLOPs": products(jnp.matmul, x, w[0], dy, repeat),
        "jax.lax.ragged_dot": products(lambda x, w: jax.lax.ragged_dot(x, w, sizes), x, w, dy, repeat),
    }
    backend = jax.default_backend()
    if backend == "tpu":
        contestants["megablox"] = megablox(x, w, dy, sizes, repeat)
    if backend == "gpu":
        contestants["pallas.ops.gpu ragged_dot_mgpu"] = mosaic_gpu(x, w, dy, sizes, repeat)
    try:
        import tokamax
    except ImportError:
        pass
    else:
        contestants["tokamax"] = products(lambda x, w: tokamax.ragged_dot(x, w, sizes), x, w, dy, repeat)
    return {
        product: {
            name: calls[product] for name, calls in contestants.items() if name not in without and product in calls
        }
        for product in PRODUCTS
    }


def megablox(x, w, dy, sizes, repeat) -> Calls:
    """JAX's TPU kernels, the best of a few tilings."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

    again = partial(ready, repeat=repeat)
    tilings = ((128, 512, 512), (256, 1024, 1024), (512, 1024, 1024), (512, 512, 2048))
    calls = {
        "forward": lambda t: again(partial(gmm, preferred_element_type=x.dtype, tiling=t), x, w, sizes),
        "input gradient": lambda t: again(
            partial(gmm, preferred_element_type=x.dtype, tiling=t, transpose_rhs=True), dy, w, sizes
        ),
        "weight gradient": lambda t: again(
            lambda x, dy, s: tgmm(x.T, dy, s, preferred_element_type=x.dtype, tiling=t), x, dy, sizes
        ),
    }
    found = {name: fastest(make(t) for t in tilings) for name, make in calls.items()}
    return {name: run for name, run in found.items() if run is not None}


def mosaic_gpu(x, w, dy, sizes, repeat) -> Calls:
    """JAX's Hopper kernels, the best of a few tilings."""
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    again = partial(ready, repeat=repeat)
    names = ("block_m", "block_n", "block_k", "max_concurrent_steps", "grid_block_n")
    # Of the kind that JAX's own sweeps try; all lower for an H200.
    both = [(128, 128, 64, 4, 8), (128, 128, 64, 6, 4), (64, 128, 64, 6, 8)]
    shapes = [*both, (192, 128, 64, 4, 8), (128, 192, 64, 4, 1)]
    turned = [*both, (128, 128, 128, 2, 8), (128, 256, 64, 4, 4)]
    tilings = {name: turned if name == "weight gradient" else shapes for name in PRODUCTS}
    calls = {
        "forward": lambda t: again(lambda x, w, s: ragged_dot(x, w, group_sizes=s, **t), x, w, sizes),
        "input gradient": lambda t: again(
            lambda dy, w, s: ragged_dot(dy, w, group_sizes=s, transpose_rhs=True, **t), dy, w, sizes
        ),
        "weight gradient": lambda t: again(
            lambda x, dy, s: transposed_ragged_dot(x, dy, group_sizes=s, **t), x, dy, sizes
        ),
    }
    found = {
        name: fastest(make(dict(zip(names, values, strict=True))) for values in tilings[name])
        for name, make in calls.items()
    }
    return {name: run for name, run in found.items() if run is not None}


def block_calls(case: tuple[int, int, int, int, float], *, dtype: str, seed: int, repeat: int = 1) -> dict:
    """Product -> {contestant: call} for rows, d, ff, block, density; the dense matmul has the whole weight."""
    rows, k, n, block, density = case
    mask = np.random.default_rng(seed).random((k // block, n // block)) < density
    structure = block_structure(mask, block, shape=(k, n))
    keys = jax.random.split(jax.random.key(seed), 3)
    x, w, dy = (
        jax.random.normal(key, shape, jnp.dtype(dtype))
        for key, shape in zip(keys, ((rows, k), (k, n), (rows, n)), strict=True)
    )
    sparse = products(
        lambda x, b: block_sparse_matmul(x, b, structure, backend=ours()),
        x,
        to_blocks(w, structure),
        dy,
        repeat,
    )
    dense = products(jnp.matmul, x, w, dy, repeat)
    return {product: {"tessera": sparse[product], "dense, whole weight": dense[product]} for product in PRODUCTS}


def layer_calls(case: tuple[int, int, int, int, int], *, dtype: str, seed: int, repeat: int = 1) -> Calls:
    """Tokens, d, ff, experts, choices: router to combine, forward and backward, and a dense layer of equal FLOPs.

    On GPUs ours runs twice: a token's rows summed in order behind the kernel, and in any order within it.
    """
    tokens, d, ff, count, chosen = case
    keys = jax.random.split(jax.random.key(seed), 4)
    x_ND = jax.random.normal(keys[0], (tokens, d), jnp.dtype(dtype))
    routed = experts.initialize(d, ff, count, key=keys[1])
    routed |= {"router": jax.random.normal(keys[2], (d, count)) * d**-0.5}

    def mixture(params, x_ND, deterministic=True):
        config = experts.MixtureConfig(backend=ours(), deterministic=deterministic)
        weights = {name: leaf for name, leaf in params.items() if name != "router"}
        return experts.mixture(weights, x_ND, route.top_k(x_ND @ params["router"], chosen), config)[0]

    contestants = [
        ("tessera", mixture, routed),
        ("dense, equal FLOPs", experts.dense, experts.initialize(d, chosen * ff, 0, key=keys[3])),
    ]
    if jax.default_backend() == "gpu":
        contestants.append(("tessera, sums in any order", partial(mixture, deterministic=False), routed))
    calls = {}
    for name, f, params in contestants:
        params = jax.tree.map(lambda leaf: leaf.astype(x_ND.dtype), params)
        step = jax.grad(lambda p, x, f=f: jnp.sum(jnp.square(f(p, x)).astype(jnp.float32)), argnums=(0, 1))
        calls[name] = ready(step, params, x_ND, repeat=repeat)
    return calls


def bytes_moved(rows: int, k: int, n: int, weights: int, itemsize: int) -> int:
    """Least traffic of each of the three products: x, y and `weights` elements of weight, each read or written once."""
    return itemsize * (rows * k + rows * n + weights)


def copy_bandwidth(size: int = 1 << 26) -> float:
    """Bytes per second of reading and writing `size` float32, measured here: the slope of the roofline."""
    run = ready(lambda x: x + 1, jnp.zeros(size, jnp.float32))
    return 8 * size / take_turns({"copy": run}, rounds=5)["copy"].median
