"""Explain a step before it runs: `tessera explain --config=lm:base --config.plan="fsdp=8"`.

The config and its plan are those of `tessera train`. Nothing is trained and no accelerator is needed. With
`--compile=v5p:8x8x8` the step is compiled for that TPU slice ahead of time (extra `tpu`), and the compiler's own memory
is printed beside the estimate. With --config.plan="" the best plan found for `--devices` is explained.
"""

import dataclasses

import jax
from rich.console import Console

from sharding.analysis import hardware
from sharding.errors import PlanError
from tessera.cli.main import Invocation
from tessera.infra.config import ConfigError, checked
from tessera.lm import schema as lm_schema
from tessera.lm.run import run_config
from tessera.planning.compile import compile_step
from tessera.planning.explain import explain, search
from tessera.planning.report import search_outcome, terminal, write_page
from tessera.reports.html import print_report

SCHEMA = lm_schema.SCHEMA
ERRORS = (PlanError, ImportError, jax.errors.JaxRuntimeError)


def main(invocation: Invocation) -> int:
    """Config -> dataclasses -> tables and a page. Returns the exit status."""
    jax.config.update("jax_platforms", "cpu")  # libtpu is for compiling; there is no TPU to look for
    c, values = invocation.config, invocation.flags
    run = run_config(c, c.data.vocab_size)
    if run.distill is not None:
        raise ConfigError("config.distill: a teacher is not counted; explain the step with its weight and hidden of 0")
    device = checked("--hardware", hardware.find_hardware, values["compile"] or values["hardware"])
    count, slice_devices = values["devices"], []
    if values["compile"]:
        count = checked("--compile", hardware.chips, values["compile"])
        slice_devices = hardware.topology_devices(values["compile"])  # which may lack libtpu: before the search
    count = count or max(1, run.plan.devices)
    ranking = search(run, device, count) if values["search"] else None
    if not c.plan:
        if ranking is None:
            raise ConfigError("config.plan: none is given, and none is searched for (--search, --devices)")
        if not ranking.fits:
            raise ConfigError(f"config.plan: none is given, and none fits. {search_outcome(ranking, count, device)}")
        best = ranking.fits[0]
        step = dataclasses.replace(run.step, grad_accum_steps=best.grad_accum_steps)
        run = dataclasses.replace(run, plan=best.plan, step=step)
    run = dataclasses.replace(run, plan=checked("config.plan", run.plan.fill, count))
    explained = checked("config.plan", explain, run, device)
    compiled = compile_step(run, slice_devices) if values["compile"] else None
    Console().print(terminal(explained, compiled, ranking))
    workdir = invocation.workdir or f"runs/explain-{invocation.name}"
    print_report(write_page, workdir, invocation.name, explained, compiled, ranking, c.to_dict())
    return 0 if (compiled is None and explained.fits) or (compiled and compiled.total <= device.memory) else 3
