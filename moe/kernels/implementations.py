"""Kernel backends: the table of names, the choice behind "auto", and the refusal of platforms that cannot run one.

A backend is a module with four functions, each `(operands, spec, *, interpret)`, and default tile sizes by kernel:

    grouped(GroupedOperands, GroupedSpec)              contract(ContractionOperands, ContractionSpec)
    block_matmul(BlockOperands, BlockSpec)             block_contract(BlockOperands, BlockSpec)
    TILINGS = {"grouped": ..., "contraction": ..., "block": ..., "block_contraction": ...}

A module may also choose tile sizes by shape: `default_tiling(kernel, rows_per_group, transpose)`.
"""

import dataclasses
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from moe.kernels.self_check import works
from moe.kernels.tiling import Tiling, lookup


@dataclass(frozen=True)
class Backend:
    """A module of kernels, the platforms that run them (empty: all), and whether Pallas interprets them."""

    module: str
    platforms: tuple[str, ...] = ()
    interpret: bool = False


BACKENDS = {
    "xla": Backend("moe.kernels.xla.ops"),
    "tpu": Backend("moe.kernels.tpu.ops", ("tpu",)),
    "gpu": Backend("moe.kernels.hopper.ops", ("cuda",)),
    "tokamax": Backend("moe.kernels.tokamax_ops"),
    "tpu_interpret": Backend("moe.kernels.tpu.ops", interpret=True),
    "gpu_interpret": Backend("moe.kernels.hopper.ops", interpret=True),
}
NAMES = ("auto", *BACKENDS)
# Functions of a backend's module, by the names that they have in its TILINGS.
FUNCTIONS = {
    "grouped": "grouped",
    "contract": "contraction",
    "block_matmul": "block",
    "block_contract": "block_contraction",
}
VARIABLE = "TESSERA_BACKEND"

# The oldest JAX whose Mosaic GPU dialect the Hopper kernels are written in.
OLDEST_MOSAIC_GPU = (0, 11)


def choose(backend: str, *arrays: Any) -> str:
    """Resolve "auto" for the platform that arrays are on; check and return any other name.

    | backend | kernels | platforms |
    |---|---|---|
    | "xla" | plain JAX: loops over live tiles; on GPUs XLA's ragged and dense products | all |
    | "tpu" | Pallas Mosaic (experimental: never timed) | TPU |
    | "gpu" | Pallas Mosaic GPU (experimental: never timed) | compute capability 9.0 |
    | "tokamax" | `tokamax.ragged_dot`, epilogues in XLA | all; its kernels: GPUs and TPUs |
    | "tpu_interpret", "gpu_interpret" | the Pallas kernels in the interpreter, for tests | all |

    "auto" is the environment variable TESSERA_BACKEND where it is set; else "xla" on CPUs, "tpu" on TPUs, and on GPUs
    "tokamax" where it is installed and supports the device, "xla" otherwise. What it chooses on an accelerator is
    logged once. Arrays outside jit have a place; inside, the default device decides (`jax.default_device`): a program
    that is compiled for another platform has to name its backend.

    Before a kernel's first use for a shape, on the platform that it is for, a few rows of it are compared with plain
    JAX (`moe.kernels.self_check`). If it does not compile or differs, plain JAX runs, with one warning.

    Raises:
      ValueError: an unknown name.
      ImportError: "tokamax" without the package.
    """
    setting = "backend"
    if backend == "auto":
        setting, backend = VARIABLE, os.environ.get(VARIABLE) or "auto"
    if backend not in NAMES:
        raise ValueError(f"{setting}={backend!r}: choose one of {', '.join(NAMES)}")
    if backend == "auto":
        return _auto(platform(*arrays))
    if backend == "tokamax":
        importlib.import_module(BACKENDS[backend].module).load()
    return backend


def platform(*arrays: Any) -> str:
    """Return the platform of the first array that has a place, or while all are traced, of the default device."""
    for array in arrays:
        if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer):
            return next(iter(array.devices())).platform
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device  # type: ignore[attr-defined]
    return jax.default_backend() if device is None else getattr(device, "platform", device)


def by_platform(loops: Callable[[Any], Any], products: Callable[[Any], Any], operands: Any) -> Any:
    """Compute `products` in programs for GPUs, where every turn of `loops` would wait for the host, else `loops`."""
    if platform() != "gpu":
        return loops(operands)
    return jax.lax.platform_dependent(operands, cuda=products, rocm=products, default=loops)


def _auto(platform: str) -> str:
    if platform == "cpu":
        return "xla"
    if platform == "tpu":
        found, why = "tpu", "Pallas kernels (experimental, not timed)"
    elif importlib.import_module(BACKENDS["tokamax"].module).able():
        found, why = "tokamax", "tokamax.ragged_dot"
    else:
        found, why = "xla", "plain JAX, right and slow; `pip install tokamax` (Python 3.12) for kernels"
    logging.log_first_n(logging.WARNING, "backend='auto' on %s is %r: %s", 1, jax.devices()[0].device_kind, found, why)
    return found


def capability() -> float:
    """CUDA compute capability of the default device; 0 for devices that have none."""
    try:
        return float(getattr(jax.devices()[0], "compute_capability", 0))
    except ValueError:  # AMD's names are not numbers
        return 0.0


def hopper() -> bool:
    """Whether the default device is an Nvidia GPU of compute capability 9.0."""
    return capability() == 9.0


def tiling(
    kernel: str,
    backend: str,
    *,
    rows_per_group: float | int,
    k: int,
    n: int,
    dtype: Any,
    transpose: bool = False,
) -> Tiling:
    """Choose the tile sizes of a kernel for a shape: tuned ones if there is a table, else the backend's default."""
    entry = BACKENDS[backend]
    module = importlib.import_module(entry.module)
    choose_own = getattr(module, "default_tiling", lambda kernel, *_: module.TILINGS[kernel])
    default = choose_own(kernel, rows_per_group, transpose)
    if backend == "xla":
        kind = "cpu"
    elif entry.interpret or jax.default_backend() != backend:
        return default
    else:
        kind = jax.devices()[0].device_kind
    name = jnp.dtype(dtype).name
    return lookup(kind, kernel, rows_per_group=rows_per_group, k=k, n=n, dtype=name, default=default)


@partial(jax.jit, static_argnames=("kernel", "backend", "spec"))
def call(kernel: str, backend: str, operands: Any, spec: Any) -> Any:
    """Run a kernel of a backend; a leading axis added by vmap becomes a loop over kernel calls.

    Jitted, so that a call outside jit compiles one program and not one per small operation on the metadata.
    Lowering for a platform that cannot run the backend raises ValueError.
    """
    entry = BACKENDS[backend]
    run = partial(getattr(importlib.import_module(entry.module), kernel), interpret=entry.interpret)
    if _here(backend):
        plain = importlib.import_module(BACKENDS["xla"].module)
        tiles = plain.TILINGS[FUNCTIONS[kernel]]
        name = f"backend={backend!r}: {kernel}"
        if not works(name, run.func, getattr(plain, kernel), tiles, operands, spec):
            entry, run, spec = BACKENDS["xla"], getattr(plain, kernel), dataclasses.replace(spec, tiling=tiles)
    run = partial(run, spec=spec)
    if entry.platforms:
        first = _require_p.bind(operands[0], backend=backend)
        operands = type(operands)(first, *operands[1:])
    return jax.custom_batching.sequential_vmap(lambda operands: run(operands))(operands)


def _here(backend: str) -> bool:
    """Whether programs are compiled for a platform of the backend's own kernels, whose devices are here."""
    here = jax.default_backend()
    if platform() != here or (backend == "tokamax" and here == "cpu"):
        return False
    entry = BACKENDS[backend]
    return not entry.interpret and (backend == "tokamax" or {"gpu": "cuda"}.get(here, here) in entry.platforms)


def align(tree: Any) -> Any:
    """Cast all arrays inside shard_map to vary over the mesh axes of any of them (elsewhere the identity).

    The transpose of this cast sums cotangents, as the gradient of a replicated weight requires.
    """
    axes = frozenset().union(*(varying(leaf) for leaf in jax.tree.leaves(tree)))

    def cast(leaf):
        missing = tuple(sorted(axes - varying(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def varying(x: Any) -> frozenset[str]:
    """Return the mesh axes over which `x` varies inside shard_map."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary(x: Any, like: Any) -> jax.Array:
    """Cast x, which varies over no mesh axes, to vary over the same ones as `like`."""
    axes = tuple(sorted(varying(like)))
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def zeros(shape: tuple[int, ...], dtype: Any, like: Any) -> jax.Array:
    """Make zeros that vary over the same mesh axes as `like`."""
    return vary(jnp.zeros(shape, dtype), like)


def local(x: Any) -> Any:
    """Drop the varying mesh axes from x's type, for kernels whose body has none; the inverse of `vary`."""
    return _local_p.bind(x) if varying(x) else x


_local_p = Primitive("local_shard")
_local_p.def_impl(lambda x: x)
_local_p.def_abstract_eval(lambda x: x.update(manual_axis_type=type(x.manual_axis_type)()))
batching.defvectorized(_local_p)
mlir.register_lowering(_local_p, lambda ctx, x: [x])

_require_p = Primitive("require_platform")
_require_p.def_impl(lambda x, *, backend: jax.jit(partial(_require_p.bind, backend=backend))(x))
_require_p.def_abstract_eval(lambda x, *, backend: x)
batching.defvectorized(_require_p)


def _lower_require(ctx, x, *, backend):
    platforms = ctx.platforms or ctx.module_context.platforms
    wanted = BACKENDS[backend].platforms
    if not set(platforms) <= set(wanted):
        raise ValueError(
            f"backend={backend!r} runs on {' or '.join(wanted)}, but the program is being compiled for "
            f"{', '.join(platforms)}: use backend='auto' or 'xla' (plain JAX, runs anywhere)"
        )
    return [x]


mlir.register_lowering(_require_p, _lower_require)


def struct(shape: tuple[int, ...], dtype: Any, like: Any) -> jax.ShapeDtypeStruct:
    """Make the output type of a pallas_call that varies over the same mesh axes as `like`."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)
