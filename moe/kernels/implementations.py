"""Who runs a kernel: a literal table of implementations, the choice among them, and the refusal of the wrong backend.

An implementation is a module with four functions, each `(operands, spec, *, interpret)`, and default tilings by name:

    grouped(GroupedOperands, GroupedSpec)              contract(ContractionOperands, ContractionSpec)
    block_matmul(BlockOperands, BlockSpec)             block_contract(BlockOperands, BlockSpec)
    TILINGS = {"grouped": ..., "contraction": ..., "block": ..., "block_contraction": ...}

A module may also choose them by shape: `default_tiling(kernel, rows_per_group, transpose)`.
"""

import importlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from moe.kernels.tiling import Tiling, lookup


@dataclass(frozen=True)
class Implementation:
    """A module of kernels, the platforms that run them (empty: all), and whether Pallas interprets them."""

    module: str
    platforms: tuple[str, ...] = ()
    interpret: bool = False


IMPLEMENTATIONS = {
    "cpu": Implementation("moe.kernels.xla.ops"),
    "gpu": Implementation("moe.kernels.hopper.ops", ("cuda",)),
    "gpu_interpret": Implementation("moe.kernels.hopper.ops", interpret=True),
    "tpu": Implementation("moe.kernels.tpu.ops", ("tpu",)),
    "tpu_interpret": Implementation("moe.kernels.tpu.ops", interpret=True),
}

# Whose Mosaic GPU the kernels are written for.
OLDEST_MOSAIC_GPU = (0, 11)


def choose(implementation: str) -> str:
    """Resolve "auto" for the default backend; other names are checked and returned.

    "auto" is "tpu" on TPUs and "cpu" (plain JAX, runs anywhere) elsewhere. The kernels for GPUs are taken by name only,
    until they have been timed against plain JAX; the log says once what runs. Programs compiled ahead of time for
    another platform than the default backend name it themselves.

    Raises:
      ValueError: an unknown name.
    """
    if implementation == "auto":
        backend = jax.default_backend()
        if backend == "tpu":
            logging.log_first_n(
                logging.WARNING, "implementation='auto': %s", 1, "TPU kernels (experimental, not timed)"
            )
            return "tpu"
        if backend != "cpu":
            able = hopper() and jax.__version_info__ >= OLDEST_MOSAIC_GPU
            more = "; implementation='gpu' asks for the experimental Hopper kernels, not timed yet" if able else ""
            message = "implementation='auto' on %s: plain JAX, right and slow%s"
            logging.log_first_n(logging.WARNING, message, 1, jax.devices()[0].device_kind, more)
        return "cpu"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: choose one of auto, {', '.join(IMPLEMENTATIONS)}")
    return implementation


def hopper() -> bool:
    """Whether the default device is an Nvidia GPU of compute capability 9.0."""
    return getattr(jax.devices()[0], "compute_capability", None) == "9.0"


def tiling(
    kernel: str,
    implementation: str,
    *,
    rows_per_group: float | int,
    k: int,
    n: int,
    dtype: Any,
    transpose: bool = False,
) -> Tiling:
    """Tile sizes of a kernel for a shape: measured ones if there is a table, else the implementation's own."""
    entry = IMPLEMENTATIONS[implementation]
    module = importlib.import_module(entry.module)
    choose_own = getattr(module, "default_tiling", lambda kernel, *_: module.TILINGS[kernel])
    default = choose_own(kernel, rows_per_group, transpose)
    if implementation == "cpu":
        kind = "cpu"
    elif entry.interpret or jax.default_backend() != implementation:
        return default
    else:
        kind = jax.devices()[0].device_kind
    name = jnp.dtype(dtype).name
    return lookup(kind, kernel, rows_per_group=rows_per_group, k=k, n=n, dtype=name, default=default)


@partial(jax.jit, static_argnames=("kernel", "implementation", "spec"))
def call(kernel: str, implementation: str, operands: Any, spec: Any) -> Any:
    """Run a kernel of an implementation; a leading axis added by vmap becomes a loop over kernel calls.

    Jitted, so that a call outside jit compiles one program and not one per small operation on the metadata.
    Lowering for a platform that cannot run the implementation raises ValueError.
    """
    entry = IMPLEMENTATIONS[implementation]
    run = partial(getattr(importlib.import_module(entry.module), kernel), spec=spec, interpret=entry.interpret)
    if entry.platforms:
        first = _require_p.bind(operands[0], implementation=implementation)
        operands = type(operands)(first, *operands[1:])
    return jax.custom_batching.sequential_vmap(lambda operands: run(operands))(operands)


def align(tree: Any) -> Any:
    """Inside shard_map: let every array vary over the mesh axes that any of them varies over (elsewhere: no change).

    The transpose of this cast sums cotangents, which is what a replicated weight's gradient needs.
    """
    axes = frozenset().union(*(varying(leaf) for leaf in jax.tree.leaves(tree)))

    def cast(leaf):
        missing = tuple(sorted(axes - varying(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def varying(x: Any) -> frozenset[str]:
    """Mesh axes over which `x` varies inside shard_map."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary(x: Any, like: Any) -> jax.Array:
    """x, which varies over no mesh axes, as varying over the same ones as `like`."""
    axes = tuple(sorted(varying(like)))
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def zeros(shape: tuple[int, ...], dtype: Any, like: Any) -> jax.Array:
    """Zeros that vary over the same mesh axes as `like`."""
    return vary(jnp.zeros(shape, dtype), like)


def local(x: Any) -> Any:
    """This shard's x with nothing said of mesh axes, for kernels whose inner parts know none; the inverse of `vary`."""
    return _local_p.bind(x) if varying(x) else x


_local_p = Primitive("local_shard")
_local_p.def_impl(lambda x: x)
_local_p.def_abstract_eval(lambda x: x.update(manual_axis_type=type(x.manual_axis_type)()))
batching.defvectorized(_local_p)
mlir.register_lowering(_local_p, lambda ctx, x: [x])

_require_p = Primitive("require_platform")
_require_p.def_impl(lambda x, *, implementation: jax.jit(partial(_require_p.bind, implementation=implementation))(x))
_require_p.def_abstract_eval(lambda x, *, implementation: x)
batching.defvectorized(_require_p)


def _lower_require(ctx, x, *, implementation):
    platforms = ctx.platforms or ctx.module_context.platforms
    wanted = IMPLEMENTATIONS[implementation].platforms
    if not set(platforms) <= set(wanted):
        raise ValueError(
            f"implementation={implementation!r} runs on {' or '.join(wanted)}, but the program is being compiled for "
            f"{', '.join(platforms)}: use implementation='auto' or 'cpu' (plain JAX, runs anywhere)"
        )
    return [x]


mlir.register_lowering(_require_p, _lower_require)


def struct(shape: tuple[int, ...], dtype: Any, like: Any) -> jax.ShapeDtypeStruct:
    """Output of a pallas_call that varies over the same mesh axes as `like`."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)
