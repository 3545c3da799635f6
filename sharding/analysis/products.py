"""Count the matrix products of a program from its jaxpr: FLOPs, bytes of operands and results, loop trips included."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from sharding.analysis.collectives import inner_jaxprs


class Product(NamedTuple):
    """One matrix product of a program.

    Attributes:
      flops: of one run; a multiply-add is two.
      bytes: operands and result of one run, each moved once.
      runs: times it runs in one call, loop trips multiplied.
      scope: named scopes it stands in.
    """

    flops: int
    bytes: int
    runs: int
    scope: str


def products(function: Callable[..., Any], *args: Any) -> list[Product]:
    """Matrix products (`dot_general`) of one call, in program order; arguments may be shapes. Nothing is compiled.

    Inside shard_map these are one device's. A loop whose number of trips is not known counts once; of a conditional the
    branch of most FLOPs. What hides inside a Pallas kernel is not seen.
    """
    return list(_walk(jax.make_jaxpr(function)(*args).jaxpr, 1, ""))


def _walk(jaxpr: Any, trips: int, scope: str) -> Iterator[Product]:
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        here = "/".join(filter(None, (scope, str(equation.source_info.name_stack))))
        if name == "dot_general":
            yield _one(equation, trips, here)
        elif name == "cond":
            branches = [list(_walk(branch.jaxpr, trips, here)) for branch in params["branches"]]
            yield from max(branches, key=lambda found: sum(one.flops * one.runs for one in found))
        elif name != "pallas_call":
            times = params["length"] if name == "scan" else 1
            for inner in inner_jaxprs(params.values()):
                yield from _walk(inner, trips * times, here)


def _one(equation: Any, trips: int, scope: str) -> Product:
    (contract, _), _ = equation.params["dimension_numbers"]
    left, right = (var.aval for var in equation.invars)
    result = equation.outvars[0].aval
    depth = math.prod(left.shape[i] for i in contract)
    size = sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in (left, right, result))
    return Product(2 * math.prod(result.shape) * depth, size, trips, scope)
