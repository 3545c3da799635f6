"""Sweep tile sizes on random uneven groups and write this device kind's table.

`python scripts/benchmarks/tune_kernels.py`
"""

import dataclasses
import importlib
import itertools
import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a program, its own package is not importable

from scripts.benchmarks import kernels
from scripts.benchmarks.kernels import ours, products, uneven_sizes
from scripts.benchmarks.timing import take_turns
from tessera.cli.main import Command, Flag, Invocation, run

COMMAND = Command(
    "scripts.benchmarks.tune_kernels",
    "benchmarks/tune_kernels",
    "Sweep tile sizes and write this device kind's table.",
    "bench_kernels",
    also=("benchmarks/run",),
    flags=(
        Flag("rows", "32,64,128,256,512", "Row tiles to try."),
        Flag("inner", "", "Contraction tiles to try; the default only where empty."),
        Flag("cols", "", "Column tiles to try; the default only where empty."),
        Flag("out", "", "File to write instead of the table inside the package."),
    ),
)
SCHEMA = kernels.SCHEMA
ERRORS = ()


def candidates(default, flags: Mapping[str, str]) -> list:
    """All combinations of the flags' values in the fields of the backend's own tiling."""
    values = {name: [int(v) for v in flags[name].split(",") if v] for name in ("rows", "inner", "cols")}
    values = {name: given or [getattr(default, name)] for name, given in values.items()}
    return [
        dataclasses.replace(default, **dict(zip(values, each, strict=True)))
        for each in itertools.product(*values.values())
    ]


def main(invocation: Invocation) -> None:
    """Time every candidate for every shape, in turns, and keep the quickest of each kernel."""
    from moe.kernels import block_sparse_matmul, block_structure, grouped_matmul, to_blocks
    from moe.kernels.implementations import BACKENDS, choose
    from moe.kernels.tiling import TABLES, slug

    def _grouped(sizes, x, w, tiling):
        return grouped_matmul(x, w, sizes, tiling=tiling, backend=ours())

    def _blocks(structure, x, b, tiling):
        return block_sparse_matmul(x, b, structure, tiling=tiling, backend=ours())

    config = invocation.config
    found: list[dict] = []
    defaults = importlib.import_module(BACKENDS[choose(ours())].module).TILINGS

    def tune(kernel, product, call, x, w, dy, *, rows_per_group):
        row = {"kernel": kernel, "rows_per_group": rows_per_group, "k": x.shape[1], "n": dy.shape[1]}
        row["dtype"] = config.dtype
        if any(row.items() <= old.items() for old in found):
            # The table does not tell block sizes apart: the first of them is tuned.
            return
        runs, tilings = {}, {str(tiling): tiling for tiling in candidates(defaults[kernel], invocation.flags)}
        for name, tiling in tilings.items():
            run = products(lambda x, w, t=tiling: call(x, w, tiling=t), x, w, dy)[product]
            try:
                run()
            except Exception as error:  # a tile too large fails in the compiler
                Console().print(f"{kernel} {name}: {type(error).__name__}, left out")
                continue
            runs[name] = run
        times = take_turns(runs, rounds=config.rounds)
        best = min(times, key=lambda name: times[name].median)
        found.append(row | {"tiling": dataclasses.asdict(tilings[best]), "seconds": round(times[best].median, 6)})
        Console().print(found[-1])

    for m, k, n, *rest in (*config.grouped, *config.blocks):
        keys = jax.random.split(jax.random.key(config.seed), 3)
        x, dy = (jax.random.normal(keys[i], (m, size), jnp.dtype(config.dtype)) for i, size in ((0, k), (1, n)))
        if len(rest) == 1:
            groups = rest[0]
            sizes = jnp.array(uneven_sizes(m, groups, concentration=config.concentration, seed=config.seed))
            w = jax.random.normal(keys[2], (groups, k, n), x.dtype)
            for kernel, product in (("grouped", "forward"), ("contraction", "weight gradient")):
                call = partial(_grouped, sizes)
                tune(kernel, product, call, x, w, dy, rows_per_group=m / groups)
        else:
            block, density = rest
            mask = np.random.default_rng(config.seed).random((k // block, n // block)) < density
            structure = block_structure(mask, block, shape=(k, n))
            w = to_blocks(jax.random.normal(keys[2], (k, n), x.dtype), structure)
            for kernel, product in (("block", "forward"), ("block_contraction", "weight gradient")):
                call = partial(_blocks, structure)
                tune(kernel, product, call, x, w, dy, rows_per_group=m)
    path = invocation.flags["out"] or TABLES / f"{slug(jax.devices()[0].device_kind)}.json"
    with open(path, "w", encoding="utf-8") as file:
        file.write("[\n" + ",\n".join(json.dumps(row) for row in found) + "\n]\n")
    Console().print(f"wrote {len(found)} rows to {path}")


if __name__ == "__main__":
    run(COMMAND)
