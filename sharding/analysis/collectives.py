"""Count collectives (kind, group, bytes, scope) and matrix products (FLOPs, bytes) of a program from its jaxpr.

Loop trips are multiplied. What is counted is what the program asks for. The compiler may merge or rewrite it (XLA on
CPU lowers a reduce-scatter to an all-reduce and computes bfloat16 in float32), and adds what automatic sharding needs.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

KINDS = {
    "psum": "all-reduce",
    "psum2": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ragged_all_to_all": "all-to-all",
    "ppermute": "permute",
}


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: all-reduce, all-gather, reduce-scatter, all-to-all or permute.
      axes: mesh axes of the group.
      group: devices in it.
      count: times it runs in one call, loop trips multiplied.
      bytes: size of the full array per run: the reduced, exchanged or sent array, or the gathered result.
      scope: its named scopes, with JAX's marks for derivatives.

    Example:
      >>> from sharding.analysis import Collective
      >>> Collective("all-gather", ("fsdp",), group=4, count=2, bytes=4000, scope="layer").moved
      6000.0
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    count: int
    bytes: int
    scope: str

    @property
    def moved(self) -> float:
        """Bytes that one device sends over all runs by the ring algorithms (Thakur et al. 2005, section 4).

        (n - 1) / n of the array for an all-gather, reduce-scatter or all-to-all, twice that for an all-reduce, the
        array itself for a permute.
        """
        share = {"all-reduce": 2 * (self.group - 1) / self.group, "permute": 1.0}
        return self.count * self.bytes * share.get(self.kind, (self.group - 1) / self.group)


def count_collectives(function: Callable[..., Any], *args: Any) -> list[Collective]:
    """Count the collectives of one call of `function`, in program order; nothing is compiled or run.

    A loop of unknown length counts once, a conditional as the branch that moves most. Groups of one device are left
    out.

    Args:
      function: to trace, usually a shard_map over an `abstract_mesh`.
      args: arrays or shapes.

    Example:
      >>> import jax, jax.numpy as jnp, sharding
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = sharding.abstract_mesh(sharding.Plan("tp=4"))
      >>> step = jax.shard_map(lambda x: jax.lax.psum(x, "tp"), mesh=mesh, in_specs=P("tp"), out_specs=P())
      >>> [one] = sharding.analysis.count_collectives(step, jnp.zeros(32))
      >>> one.kind, one.group, one.bytes
      ('all-reduce', 4, 32)
    """
    return list(_walk(jax.make_jaxpr(function)(*args).jaxpr, _collectives_of, lambda one: one.moved, {}))


def totals(found: Iterable[Collective]) -> dict[str, tuple[int, float]]:
    """Sum collectives by kind: number of runs and bytes moved.

    Example:
      >>> from sharding.analysis import Collective, totals
      >>> totals([Collective("all-gather", ("fsdp",), 4, 2, 4000, "")] * 3)
      {'all-gather': (6, 18000.0)}
    """
    total: dict[str, tuple[int, float]] = {}
    for one in found:
        count, moved = total.get(one.kind, (0, 0.0))
        total[one.kind] = (count + one.count, moved + one.moved)
    return total


class Product(NamedTuple):
    """One matrix product of a program.

    Attributes:
      flops: of one run; a multiply-add is two.
      bytes: operands and result of one run, each moved once.
      runs: times it runs in one call, loop trips multiplied.
      scope: its named scopes.
    """

    flops: int
    bytes: int
    runs: int
    scope: str


def count_products(function: Callable[..., Any], *args: Any) -> list[Product]:
    """Count the matrix products (`dot_general`) of one call, in program order; nothing is compiled or run.

    Inside shard_map these are one device's. A loop of unknown length counts once, a conditional as the branch of most
    FLOPs. Pallas kernels are not counted.

    Args:
      function: to trace.
      args: arrays or shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> from sharding.analysis import count_products
      >>> [one] = count_products(jnp.matmul, jnp.zeros((8, 16)), jnp.zeros((16, 4)))
      >>> one.flops, one.bytes
      (1024, 896)
    """
    return list(_walk(jax.make_jaxpr(function)(*args).jaxpr, _products_of, lambda one: one.flops * one.runs, {}))


Counted = TypeVar("Counted")
Visit = Callable[[Any, Mapping[str, int], int, str], Iterable[Counted] | None]
"""(equation, mesh axis sizes, trips, scope) -> its counts; None to descend into it."""


def _walk(
    jaxpr: Any,
    visit: Visit[Counted],
    weight: Callable[[Counted], float],
    sizes: Mapping[str, int],
    trips: int = 1,
    scope: str = "",
) -> Iterator[Counted]:
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        here = "/".join(filter(None, (scope, str(equation.source_info.name_stack))))
        counted = visit(equation, sizes, trips, here)
        if counted is not None:
            yield from counted
        elif name == "cond":
            branches = [list(_walk(branch.jaxpr, visit, weight, sizes, trips, here)) for branch in params["branches"]]
            yield from max(branches, key=lambda found: sum(map(weight, found)))
        elif name != "pallas_call":
            inside = dict(params["mesh"].shape) if name == "shard_map" else {}
            times = params["length"] if name == "scan" else 1
            for inner in inner_jaxprs(params.values()):
                yield from _walk(inner, visit, weight, {**sizes, **inside}, trips * times, here)


def _collectives_of(equation: Any, sizes: Mapping[str, int], trips: int, scope: str) -> list[Collective] | None:
    if equation.primitive.name not in KINDS:
        return None
    params = equation.params
    axes = params["axes"] if "axes" in params else params["axis_name"]
    axes = tuple(axis for axis in (axes if isinstance(axes, tuple) else (axes,)) if isinstance(axis, str))
    group = math.prod(sizes[axis] for axis in axes)
    if group == 1:
        return []
    kind = KINDS[equation.primitive.name]
    arrays = equation.outvars if kind == "all-gather" else equation.invars
    if equation.primitive.name == "ragged_all_to_all":
        # Rows and their target buffer: at most the smaller of them is sent.
        arrays = [min(equation.invars[:2], key=lambda array: math.prod(array.aval.shape))]
    return [Collective(kind, axes, group, trips, _size(array.aval), scope) for array in arrays]


def _products_of(equation: Any, sizes: Mapping[str, int], trips: int, scope: str) -> list[Product] | None:
    if equation.primitive.name != "dot_general":
        return None
    (contract, _), _ = equation.params["dimension_numbers"]
    left, right = (var.aval for var in equation.invars)
    result = equation.outvars[0].aval
    flops = 2 * math.prod(result.shape) * math.prod(left.shape[i] for i in contract)
    return [Product(flops, sum(map(_size, (left, right, result))), trips, scope)]


def _size(array: Any) -> int:
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize


def inner_jaxprs(values: Iterable[Any]) -> Iterator[Any]:
    """Find the jaxprs among an equation's parameters."""
    for value in values:
        if hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr") and hasattr(value.jaxpr, "eqns"):
            yield value.jaxpr
        elif isinstance(value, tuple | list):
            yield from inner_jaxprs(value)
