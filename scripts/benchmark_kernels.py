"""Time kernels and rivals in turns: `python scripts/benchmark_kernels.py --config=configs/bench_kernels.py:cpu`."""

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

_CONFIG = config_flags.DEFINE_config_file("config", "configs/bench_kernels.py:cpu", "What to time.")
_OUT = flags.DEFINE_string("out", "", "Also write the rows to this CSV file.")
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


def rows_of(label: str, product: str, rivals: dict, *, rounds: int, flops: float, moved: int, bandwidth: float) -> list:
    """One row per rival of a product. The floor is the roofline's: dense FLOP/s and copy bandwidth of this same run."""
    from training.timing import take_turns

    timings = take_turns(rivals, rounds=rounds, warmup=2)
    dense = next(timings[name] for name in timings if name.startswith("dense"))
    # A dense product of a whole weight does more work than is asked of the sparse one: its rate is taken from its own.
    floor = max(moved / bandwidth, dense.median if "dense, equal FLOPs" in timings else 0)
    result = []
    for name, timing in timings.items():
        median, low, high = timing.ratio(dense)
        done = "" if name.startswith("dense, whole") else f"{flops / timing.median / 1e12:.3f}"
        ratio = f"{median:.2f} ({low:.2f} to {high:.2f})"
        numbers = (f"{timing.median * 1e3:.2f}", done, ratio, f"{moved / 1e9:.3f}", f"{floor * 1e3:.2f}")
        result.append((label, product, name, *numbers))
    return result


def main(argv) -> None:
    """Time every shape of the config, print a table and perhaps write it."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}: give --config=FILE and --config.key=value")
    from scripts import bench_kernels

    config, rows = _CONFIG.value, []
    options = {"dtype": config.dtype, "seed": config.seed}
    common = {"rounds": config.rounds, "bandwidth": bench_kernels.copy_bandwidth()}
    itemsize = jnp.dtype(config.dtype).itemsize
    for case in config.grouped:
        m, k, n, groups = case
        rivals = bench_kernels.grouped_rivals(
            case, concentration=config.concentration, without=tuple(config.without), **options
        )
        for product in bench_kernels.PRODUCTS:
            moved = bench_kernels.bytes_moved(m, k, n, groups * k * n, itemsize)
            label = f"{m} rows, {k} x {n}, {groups} experts"
            rows += rows_of(label, product, rivals[product], flops=2 * m * k * n, moved=moved, **common)
    for case in config.blocks:
        m, k, n, block, density = case
        rivals = bench_kernels.block_rivals(case, **options)
        for product in bench_kernels.PRODUCTS:
            moved = bench_kernels.bytes_moved(m, k, n, int(density * k * n), itemsize)
            label = f"{m} rows, {k} x {n}, blocks of {block}, density {density}"
            rows += rows_of(label, product, rivals[product], flops=2 * m * k * n * density, moved=moved, **common)
    device = jax.devices()[0].device_kind
    table = Table(*HEADINGS, title=f"{device}, {jax.default_backend()}, {config.dtype}, JAX {jax.__version__}")
    for row in rows:
        table.add_row(*row)
    Console(width=180).print(table)
    if _OUT.value:
        with open(_OUT.value, "w", encoding="utf-8") as file:
            lines = [",".join(f'"{cell}"' for cell in row) for row in (HEADINGS, *rows)]
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    app.run(main)
