"""Run a benchmark: `python scripts/benchmarks/run.py --config=bench_moe`, or all of a CPU's with `--all`.

Contestants take turns in one process; the table has medians and ratios to the baseline of the same round, and goes to a
JSON
file too, with what decides such figures: device, cores, threads and memory allocator.
"""

import contextlib
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tessera.cli.main import Command, Flag, Invocation, run

SUITES = ("lottery", "moe", "kernels", "sparsity", "fits", "inference", "decode", "data", "audit")
# What `--all` runs: the configs for a CPU.
CPU = ("bench_lottery", "bench_moe", "bench_kernels:cpu", "bench_sparsity", "bench_fits", "bench_inference")
COMMAND = Command(
    "scripts.benchmarks.run",
    "benchmarks/run",
    "Time this project beside its baselines.",
    "bench_moe",
    flags=(
        Flag("out", "", "JSON file for the rows; runs/bench/SUITE.json by default."),
        Flag("all", False, f"Run every CPU benchmark, each in a process of its own: {', '.join(CPU)}."),
    ),
)


class SuiteSchema:
    """The schema of the suite that a config names; see `tessera.infra.schema.Schema`."""

    def __getattr__(self, name: str) -> Any:
        def call(given, *arguments):
            return getattr(suite(given), name)(given, *arguments)

        return call

    def child(self, name: str, given: Any) -> Any:
        """See `Schema.child`."""
        return suite(given).child(name, given)


def suite(given: Any) -> Any:
    """The schema of the suite that settings name.

    Raises:
      ConfigError: no such suite.
    """
    from tessera.infra.errors import ConfigError, no_such

    name = given.get("suite", "")
    if name not in SUITES:
        raise ConfigError(no_such(f"config.suite={name!r}", "benchmark", str(name), SUITES))
    return importlib.import_module(f"scripts.benchmarks.{name}").SCHEMA


SCHEMA = SuiteSchema()
ERRORS = (ImportError, FileNotFoundError)


def main(invocation: Invocation) -> int:
    """Config -> rows -> table and JSON. Returns the exit status."""
    if invocation.flags["all"]:
        return run_all()
    config = invocation.config
    pin(config.get("cores", 0))
    module = importlib.import_module(f"scripts.benchmarks.{config.suite}")
    show(f"{invocation.name}: {' '.join(f'{key} {value}' for key, value in surroundings().items())}")
    began, rows = time.perf_counter(), []
    out = Path(invocation.flags["out"] or f"runs/bench/{config.suite}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    for row in module.rows(config):
        rows.append(row)
        record = {"config": config.to_dict(), "machine": surroundings(), "rows": [each.as_json() for each in rows]}
        out.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    table(rows)
    if hasattr(module, "plot"):
        try:
            module.plot(rows, out.with_suffix(".png"))
            show(f"picture: {out.with_suffix('.png')}")
        except ImportError:
            show("the picture needs matplotlib: pip install -e '.[reports]'")
    show(f"{time.perf_counter() - began:.0f} s; rows: {out}")
    return 0


def run_all() -> int:
    """Every CPU benchmark in a process of its own, then one table of ratios."""
    status, summary = 0, []
    for config in CPU:
        out = Path("runs/bench") / f"{config.split(':')[0]}.json"
        command = [sys.executable, __file__, f"--config={config}", f"--out={out}"]
        status = subprocess.run(command, check=False).returncode or status
        if out.exists():
            summary += [(config, row) for row in json.loads(out.read_text(encoding="utf-8"))["rows"] if row["ratio"]]
    from rich.console import Console
    from rich.table import Table

    found = Table("benchmark", "case", "contestant", "baseline", "times its rate", title="ratios to the baselines")
    for config, row in summary:
        found.add_row(config, row["case"], row["name"], row["baseline"], ratio_text(row["ratio"]))
    Console(width=160).print(found)
    return status


def table(rows: Iterable[Any]) -> None:
    """Print rows: a column for every further figure that any of them has."""
    from rich.console import Console
    from rich.table import Table

    rows = list(rows)
    more = list(dict.fromkeys(name for row in rows for name in row.more))
    found = Table("case", "contestant", "ms (median)", "per second", "times the baseline's rate", *more)
    for row in rows:
        ratio = f"{ratio_text(row.ratio)} of {row.baseline}" if row.ratio else ""
        figures = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in map(row.more.get, more))
        cells = (row.case, row.name, f"{row.seconds * 1e3:.2f}", f"{row.rate:.4g}", ratio)
        found.add_row(*cells, *("" if cell == "None" else cell for cell in figures))
    Console(width=180).print(found)


def ratio_text(ratio: Any) -> str:
    """Median, smallest and largest."""
    return "{:.2f} ({:.2f} to {:.2f})".format(*ratio)


def pin(cores: int) -> None:
    """Leave the process `cores` cores, before any array exists; 0 leaves it all."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:cores]))
        # BLAS counted the cores when it was loaded: more threads than cores wait for each other, a hundred times as
        # long.
        for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, str(cores))
        with contextlib.suppress(ImportError):  # comes with scikit-learn
            from threadpoolctl import threadpool_limits

            threadpool_limits(cores, user_api="blas")


def surroundings() -> dict[str, Any]:
    """What decides a timing beside the code: device, cores, threads, allocator, versions."""
    import jax

    preloaded = os.environ.get("LD_PRELOAD", "")
    tuned = [name for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES") if name in os.environ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": jax.devices()[0].device_kind,
        "cores": cores,
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "allocator": Path(preloaded).name or " ".join([platform.libc_ver()[0] or "system", *tuned]),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def show(text: str) -> None:
    """Print a line that is not wrapped."""
    from rich.console import Console

    Console().print(text, soft_wrap=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))  # as a program, its own package is not importable
    run(COMMAND)
