"""The contestants of the kernel benchmark: every product of a shape, by ours and by what else is installed."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe.kernels import block_sparse_matmul, block_structure, grouped_matmul, to_blocks
from training.timing import take_turns

PRODUCTS = ("forward", "input gradient", "weight gradient")
Rivals = dict[str, Callable[[], object]]


def uneven_sizes(rows: int, groups: int, *, concentration: float, seed: int) -> np.ndarray:
    """Group sizes of sum `rows`, shares drawn from a symmetric Dirichlet distribution; some may be 0."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(rows, rng.dirichlet(np.full(groups, concentration))).astype(np.int32)


def ready(f: Callable, *args: Any) -> Callable[[], object]:
    """A call that returns when its work is done."""
    compiled = jax.jit(f)
    return lambda: jax.block_until_ready(compiled(*args))


def products(f: Callable, x: jax.Array, w: Any, dy: jax.Array) -> Rivals:
    """The three products of y = f(x, w), each alone: what a gradient does not need is not computed."""
    return {
        "forward": ready(f, x, w),
        "input gradient": ready(lambda x, w, dy: jax.vjp(lambda x: f(x, w), x)[1](dy), x, w, dy),
        "weight gradient": ready(lambda x, w, dy: jax.vjp(lambda w: f(x, w), w)[1](dy), x, w, dy),
    }


def fastest(candidates: Iterable[Callable[[], object]]) -> Callable[[], object] | None:
    """The quickest of a rival's configurations; those that do not compile drop out, None if all do."""
    working = {}
    for number, run in enumerate(candidates):
        try:
            run()
        except Exception:  # a rival's compiler may fail in any way
            continue
        working[str(number)] = run
    if not working:
        return None
    times = take_turns(working, rounds=3)
    return working[min(times, key=lambda name: times[name].median)]


def grouped_rivals(case: tuple[int, int, int, int], *, dtype: str, concentration: float, seed: int, without=()) -> dict:
    """Product -> {rival: call} for rows, d, ff, experts; the dense matmul has as many FLOPs."""
    rows, k, n, groups = case
    sizes = jnp.array(uneven_sizes(rows, groups, concentration=concentration, seed=seed))
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((rows, k), (groups, k, n), (rows, n))
    x, w, dy = (jax.random.normal(key, shape, jnp.dtype(dtype)) for key, shape in zip(keys, shapes, strict=True))
    contestants = {
        "tessera": products(lambda x, w: grouped_matmul(x, w, sizes), x, w, dy),
        "dense, equal FLOPs": products(jnp.matmul, x, w[0], dy),
        "jax.lax.ragged_dot": products(lambda x, w: jax.lax.ragged_dot(x, w, sizes), x, w, dy),
    }
    backend = jax.default_backend()
    if backend == "tpu":
        contestants["megablox"] = megablox(x, w, dy, sizes)
    if backend == "gpu":
        contestants["pallas.ops.gpu ragged_dot_mgpu"] = mosaic_gpu(x, w, dy, sizes)
    try:
        import tokamax
    except ImportError:
        pass
    else:
        contestants["tokamax"] = products(lambda x, w: tokamax.ragged_dot(x, w, sizes), x, w, dy)
    return {
        product: {
            name: calls[product] for name, calls in contestants.items() if name not in without and product in calls
        }
        for product in PRODUCTS
    }


def megablox(x, w, dy, sizes) -> Rivals:
    """JAX's TPU kernels, the best of a few tilings."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

    tilings = ((128, 512, 512), (256, 1024, 1024), (512, 1024, 1024), (512, 512, 2048))
    calls = {
        "forward": lambda t: ready(partial(gmm, preferred_element_type=x.dtype, tiling=t), x, w, sizes),
        "input gradient": lambda t: ready(
            partial(gmm, preferred_element_type=x.dtype, tiling=t, transpose_rhs=True), dy, w, sizes
        ),
        "weight gradient": lambda t: ready(
            lambda x, dy, s: tgmm(x.T, dy, s, preferred_element_type=x.dtype, tiling=t), x, dy, sizes
        ),
    }
    found = {name: fastest(make(t) for t in tilings) for name, make in calls.items()}
    return {name: run for name, run in found.items() if run is not None}


def mosaic_gpu(x, w, dy, sizes) -> Rivals:
    """JAX's Hopper kernels, the best of a few tilings."""
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    names = ("block_m", "block_n", "block_k", "max_concurrent_steps", "grid_block_n")
    shapes = (
        (64, 128, 64, 4, 8),
        (128, 128, 64, 4, 8),
        (64, 256, 64, 4, 4),
        (128, 256, 64, 3, 4),
        (192, 128, 64, 4, 8),
    )
    tilings = [dict(zip(names, values, strict=True)) for values in shapes]
    calls = {
        "forward": lambda t: ready(lambda x, w, s: ragged_dot(x, w, group_sizes=s, **t), x, w, sizes),
        "input gradient": lambda t: ready(
            lambda dy, w, s: ragged_dot(dy, w, group_sizes=s, transpose_rhs=True, **t), dy, w, sizes
        ),
        "weight gradient": lambda t: ready(
            lambda x, dy, s: transposed_ragged_dot(x, dy, group_sizes=s, **t), x, dy, sizes
        ),
    }
    found = {name: fastest(make(t) for t in tilings) for name, make in calls.items()}
    return {name: run for name, run in found.items() if run is not None}


def block_rivals(case: tuple[int, int, int, int, float], *, dtype: str, seed: int) -> dict:
    """Product -> {rival: call} for rows, d, ff, block, density; the dense matmul has the whole weight."""
    rows, k, n, block, density = case
    mask = np.random.default_rng(seed).random((k // block, n // block)) < density
    structure = block_structure(mask, block, shape=(k, n))
    keys = jax.random.split(jax.random.key(seed), 3)
    x, w, dy = (
        jax.random.normal(key, shape, jnp.dtype(dtype))
        for key, shape in zip(keys, ((rows, k), (k, n), (rows, n)), strict=True)
    )
    ours = products(lambda x, b: block_sparse_matmul(x, b, structure), x, to_blocks(w, structure), dy)
    dense = products(jnp.matmul, x, w, dy)
    return {product: {"tessera": ours[product], "dense, whole weight": dense[product]} for product in PRODUCTS}


def bytes_moved(rows: int, k: int, n: int, weights: int, itemsize: int) -> int:
    """Least traffic of each of the three products: x, y and `weights` elements of weight, each read or written once."""
    return itemsize * (rows * k + rows * n + weights)


def copy_bandwidth(size: int = 1 << 26) -> float:
    """Bytes per second of reading and writing `size` float32, measured here: the slope of the roofline."""
    run = ready(lambda x: x + 1, jnp.zeros(size, jnp.float32))
    return 8 * size / take_turns({"copy": run}, rounds=5)["copy"].median
