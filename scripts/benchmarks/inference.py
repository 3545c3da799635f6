"""Time serving: `python scripts/benchmarks/inference.py --config=configs/bench_inference.py --workdir=runs/bench`."""

import json
import os
from pathlib import Path

import jax
from rich.console import Console

from scripts.benchmarks.inference_measures import bandwidth, compare, measure, plain, plot, random_weights, table
from sharding.errors import PlanError
from sharding.plan import Plan
from tessera.infra.config import Invocation, build, run
from tessera.infra.workdir import resolve
from tessera.models.transformer import TransformerConfig


def main(invocation: Invocation) -> int:
    """Config -> rows, plot and JSON in the workdir. Returns the exit status."""
    c, console = invocation.config, Console()
    jax.config.update("jax_num_cpu_devices", c.cpu_devices)
    model = build(TransformerConfig, c.model, "config.model")
    params = random_weights(model, c.seed)
    speed, source = bandwidth()
    device = jax.devices()[0].device_kind
    console.print(f"{device}, {os.cpu_count()} cores; memory {speed / 1e9:.1f} GB/s ({source})", soft_wrap=True)
    rows = []
    for axes in c.plans:
        for slots in (slots for slots in c.slots if slots % Plan(axes).data == 0):
            rows.append(measure(params, model, axes, slots, c, speed))
            console.print(table(rows[-1:]).splitlines()[-1], soft_wrap=True)
    found = compare(params, model, c)
    console.print(table(rows), soft_wrap=True)
    console.print(
        f"{found['requests']:.0f} requests: {found['together_tokens_per_second']:.0f} tokens/s in {found['slots']:.0f} "
        f"slots, {found['alone_tokens_per_second']:.0f} one at a time: {found['ratio']:.2f}x "
        f"(equal texts: {found['same_tokens']:.0%})",
        soft_wrap=True,
    )
    path = Path(invocation.workdir or "runs/bench-inference")
    path.mkdir(parents=True, exist_ok=True)
    plot(rows, path / "inference.png")
    (path / "inference.md").write_text(table(rows), encoding="utf-8")
    result = {"device": device, "bandwidth": speed, "source": source, "rows": [plain(row) for row in rows]}
    result |= {"compare": found, "config": resolve(c)}
    (path / "inference.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(f"table, plot and JSON in {path}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    run(main, config_file="bench_inference.py", errors=(PlanError,))
