"""Time kernels and rivals in turns: `python scripts/benchmarks/kernels.py --config=configs/bench_kernels.py:cpu`."""

import csv

import jax
from absl import app, flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

_CONFIG = config_flags.DEFINE_config_file("config", "configs/bench_kernels.py:cpu", "What to time.")
_OUT = flags.DEFINE_string("out", "", "Also write the rows to this CSV file, each as soon as it is measured.")
HEADINGS = (
    "shape",
    "product",
    "rival",
    "ms (median)",
    "TFLOP/s",
    "of dense (median, min to max)",
    "GB at least",
    "floor ms",
)


def rows_of(contest, *, rounds: int, patience: float, repeat: int, bandwidth: float) -> list[tuple[str, ...]]:
    """One row per rival of a product. The floor is the roofline's: dense FLOP/s and copy bandwidth of this same run."""
    from scripts.benchmarks.kernel_rivals import measure

    timings = measure(contest.rivals, rounds=rounds, patience=patience * repeat)
    dense = next(timings[name] for name in timings if name.startswith("dense"))
    # A dense product of a whole weight does more work than is asked of the sparse one: its rate is taken from its own.
    floor = max(contest.moved / bandwidth, dense.median / repeat if "dense, equal FLOPs" in timings else 0)
    result: list[tuple[str, ...]] = []
    for name, timing in timings.items():
        median, low, high = timing.ratio(dense)
        seconds = timing.median / repeat
        done = "" if name.startswith("dense, whole") else f"{contest.flops / seconds / 1e12:.3f}"
        ratio = f"{median:.2f} ({low:.2f} to {high:.2f})"
        numbers = (f"{seconds * 1e3:.3f}", done, ratio, f"{contest.moved / 1e9:.3f}", f"{floor * 1e3:.3f}")
        result.append((contest.label, contest.product, name, *numbers))
    return result


def main(argv) -> None:
    """Time every shape of the config, print a table and perhaps write it."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}: give --config=FILE and --config.key=value")
    from scripts.benchmarks import kernel_rivals

    config, rows = _CONFIG.value, []
    options = {name: getattr(config, name) for name in ("rounds", "patience", "repeat")}
    options["bandwidth"] = kernel_rivals.copy_bandwidth()
    for contest in kernel_rivals.contests(config):
        rows += rows_of(contest, **options)
        if _OUT.value:
            with open(_OUT.value, "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows((HEADINGS, *rows))
    device = jax.devices()[0].device_kind
    table = Table(*HEADINGS, title=f"{device}, {jax.default_backend()}, {config.dtype}, JAX {jax.__version__}")
    for row in rows:
        table.add_row(*row)
    Console(width=180).print(table)


if __name__ == "__main__":
    app.run(main)
