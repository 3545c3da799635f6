"""Explain a step before it runs: `python scripts/explain.py --config=configs/lm.py:base --config.plan="fsdp=8"`.

The config and its plan are those of `scripts/train.py`. Nothing is trained and no accelerator is needed. With
`--compile=v5p:8x8x8` the step is compiled for that TPU slice ahead of time (extra `tpu`), and the compiler's own memory
is printed beside the estimate. With --config.plan="" the best plan found for `--devices` is explained.
"""

import dataclasses

import jax
from absl import flags
from rich.console import Console

from sharding.analysis import hardware, topology
from sharding.errors import PlanError
from tessera.infra.config import ConfigError, Invocation, checked, run
from tessera.lm.run import run_config
from tessera.planning.compile import compile_step
from tessera.planning.explain import explain, search
from tessera.planning.report import terminal, write_page
from tessera.reports.html import print_report

flags.DEFINE_string("hardware", "v5p", f"What the step would run on: {', '.join(hardware.HARDWARE)}.")
flags.DEFINE_string("compile", "", "TPU slice to compile the step for, such as v5p:8x8x8.")
flags.DEFINE_integer("devices", 0, "Number of devices; 0 takes the plan's (or the slice's).")
flags.DEFINE_bool("search", True, "Look for better plans.")


def main(invocation: Invocation) -> int:
    """Config -> dataclasses -> tables and a page. Returns the exit status."""
    jax.config.update("jax_platforms", "cpu")  # libtpu is for compiling; there is no TPU to look for
    c, values = invocation.config, flags.FLAGS
    config = run_config(c, c.data.vocab_size)
    device = checked("--hardware", hardware.find, values.compile or values.hardware)
    count = values.devices
    if values.compile:
        count = checked("--compile", hardware.chips, values.compile)
    count = count or max(1, config.plan.devices)
    ranking = search(config, device, count) if values.search else None
    if not c.plan:
        if ranking is None or not ranking.fits:
            raise ConfigError(f"config.plan: none is given, and no plan for {count} devices fits (--search, --devices)")
        config = dataclasses.replace(config, plan=ranking.fits[0].plan)
    config = dataclasses.replace(config, plan=checked("config.plan", config.plan.fill, count))
    explained = checked("config.plan", explain, config, device)
    compiled = compile_step(config, topology.topology_devices(values.compile)) if values.compile else None
    Console().print(terminal(explained, compiled, ranking))
    workdir = invocation.workdir or f"runs/explain-{invocation.name}"
    print_report(write_page, workdir, invocation.name, explained, compiled, ranking)
    return 0 if (compiled is None and explained.fits) or (compiled and compiled.total <= device.memory) else 3


if __name__ == "__main__":
    run(main, config_file="lm.py", errors=(PlanError, ImportError, jax.errors.JaxRuntimeError))
