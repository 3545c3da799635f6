"""Time training of tickets beside other implementations, in turns.

`python scripts/benchmarks/lottery.py --config=configs/bench_lottery.py`
"""

import os

import numpy as np
from absl import app, flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

_CONFIG = config_flags.DEFINE_config_file("config", "configs/bench_lottery.py", "What to time.")
_OUT = flags.DEFINE_string("out", "", "Also write the rows to this CSV file.")


def lottery_rivals(config) -> dict:
    """Name -> (function that runs one round, tickets it trains)."""
    from scripts.benchmarks.lottery_rivals import stack_rival, synthetic

    splits = synthetic(config.images, config.inputs)
    index = np.random.default_rng(1).integers(0, config.images, (config.steps, config.batch_size)).astype(np.int32)
    result = {}
    for tickets in config.tickets:
        for stack in ("map", "vmap"):
            run = stack_rival(splits, index, tickets=tickets, stack=stack, config=config)
            result[f"tessera, {stack}, {tickets} ticket(s)"] = (run, tickets)
    try:
        import torch  # noqa: F401
    except ImportError:
        Console().print("PyTorch is not installed: its rows are left out")
        return result
    from scripts.benchmarks.torch_lenet import lenet_loop

    x, y = splits.train.images.reshape(config.images, -1), splits.train.labels
    for name, density in (("same masked step", config.density), ("no masks", None)):
        run = lenet_loop(x, y, index, hidden=config.hidden, lr=config.lr, density=density)
        result[f"torch, fused Adam, {name}"] = (run, 1)
    return result


RIVALS = {"lottery": lottery_rivals}


def main(argv) -> None:
    """Pin to `config.cores` cores before any array exists, time, print and perhaps write."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}: give --config=FILE and --config.key=value")
    config = _CONFIG.value
    if config.get("name") not in RIVALS:
        own = "bench_moe, bench_kernels and bench_inference have scripts of their own"
        raise app.UsageError(f"config.name={config.get('name')!r}: choose from {', '.join(RIVALS)} ({own})")
    if config.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: config.cores]))
    from scripts.benchmarks.timing import take_turns

    rivals = RIVALS[config.name](config)
    timings = take_turns({name: run for name, (run, _) in rivals.items()}, rounds=config.rounds)
    table = Table(title=f"{config.name}: training iterations per second and ticket, {config.cores} core(s)")
    rows = ["rival,iterations_per_second_per_ticket,ratio_to_torch,ratio_min,ratio_max"]
    reference = "torch, fused Adam, same masked step"
    for heading in ("rival", "it/s per ticket (median)", "times the PyTorch step (median, min to max)"):
        table.add_column(heading)
    for name, timing in timings.items():
        rate = config.steps * rivals[name][1] / timing.median
        ratios = [r * rivals[name][1] for r in timing.ratio(timings[reference])] if reference in timings else []
        table.add_row(name, f"{rate:.0f}", "{:.2f} ({:.2f} to {:.2f})".format(*ratios) if ratios else "not measured")
        rows.append(f'"{name}",{rate:.1f},' + (",".join(f"{r:.3f}" for r in ratios) or ",,"))
    Console().print(table)
    if _OUT.value:
        with open(_OUT.value, "w", encoding="utf-8") as file:
            file.write("\n".join(rows) + "\n")


if __name__ == "__main__":
    app.run(main)
