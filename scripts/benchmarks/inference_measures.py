"""What the benchmark of serving measures: steps, first tokens, and continuous batching against one text at a time."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sharding.analysis.hardware import HARDWARE
from sharding.inference.quantize import stored_bytes
from sharding.inference.sample import greedy
from sharding.plan import Plan
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.serving.engine import Engine
from tessera.serving.programs import Programs, Rows, ServeConfig, make_programs
from tessera.serving.requests import Sampling
from tessera.serving.served import serve

KINDS = {"NVIDIA H200": "h200", "NVIDIA H100": "h100", "TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v6e": "v6e"}


@dataclass(frozen=True)
class Row:
    """One plan and number of slots; seconds unless said otherwise."""

    plan: str
    slots: int
    devices: int
    first_token: float
    step_p50: float
    step_p99: float
    tokens_per_second: float
    roofline: float  # least time of a step by memory bandwidth

    @property
    def per_device(self) -> float:
        """Tokens per second and device."""
        return self.tokens_per_second / self.devices

    @property
    def fraction(self) -> float:
        """Share of the bandwidth roofline."""
        return self.roofline / self.step_p50


def random_weights(config: TransformerConfig, seed: int) -> Any:
    """Weights of an untrained decoder: speed does not depend on what it says."""
    return jax.jit(Decoder(config).init)(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"]


def bandwidth() -> tuple[float, str]:
    """Bytes per second a device reads from its memory, and where the number is from.

    A datasheet's for known accelerators. Elsewhere measured: the best of nine sums over 512 MiB, which all cores share.
    """
    device = jax.devices()[0]
    name = next((key for kind, key in KINDS.items() if device.device_kind.startswith(kind)), "")
    known = next((found for key, found in HARDWARE.items() if key.lower().startswith(name)), None) if name else None
    if known is not None:
        return known.bandwidth, f"datasheet of {known.name}"
    array = jnp.ones(2**27, jnp.float32)
    total = jax.jit(jnp.sum)
    total(array).block_until_ready()
    times = [_timed(lambda: total(array).block_until_ready()) for _ in range(9)]
    return array.nbytes / min(times), "measured: sum over 512 MiB"


def step_bytes(programs: Programs, params: Any, length: int) -> float:
    """Bytes all devices together read in a decode step: the weights each has, and the keys and values of the texts.

    Of the embedding table only as many rows as slots are read, unless it is the head too. Every expert counts: with
    many slots nearly all are read.
    """
    weights, config = 0.0, programs.decoder.config
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name == "embed/table" and not config.tied:
            continue
        weights += sum(stored_bytes(shard.data) for shard in leaf.addressable_shards)
    cache = programs.cache_config
    return weights + cache.bytes * length / cache.length


def measure(params: Any, config: TransformerConfig, axes: str, slots: int, sizes: Any, speed: float) -> Row:
    """Time the steps of one plan with all slots in use; every step is waited for, as an engine must."""
    plan = Plan(axes)
    params, served = serve(params, config, plan)
    chunk = min(sizes.prompt, 128)
    programs = make_programs(served, ServeConfig(slots=slots, length=sizes.length, chunk=chunk))
    placed = programs.place(params)
    rng = np.random.default_rng(sizes.seed)
    prompts = rng.integers(0, config.vocab_size, (slots, sizes.prompt))
    parts = programs.parts
    one = Rows(*(np.zeros((parts, sizes.prompt) if i == 0 else parts, np.int32) for i in range(4)))
    one.tokens[:], one.counts[0] = prompts[:1], sizes.prompt
    state, first = programs.start(), []
    for _ in range(sizes.first + 1):
        before = time.perf_counter()
        state, drawn = programs.extend(placed, state, one, fresh=True)
        np.asarray(drawn.tokens)
        first.append(time.perf_counter() - before)
    state, logits = programs.prefill(placed, prompts, np.full(slots, sizes.prompt))
    tokens, times = np.asarray(logits).argmax(-1).astype(np.int32), []
    settings, budget = greedy(slots), np.ones(slots, np.int32)
    for _ in range(sizes.steps + 2):
        before = time.perf_counter()
        state, drawn = programs.generate(placed, state, tokens, budget, settings, steps=1)
        tokens = np.asarray(drawn.tokens[0])
        times.append(time.perf_counter() - before)
    times = times[2:]
    middle = sizes.prompt + sizes.steps / 2
    # The devices of a CPU share one memory; those of an accelerator have one each.
    memories = 1 if jax.default_backend() == "cpu" else plan.devices
    least = step_bytes(programs, placed, int(middle)) / memories / speed
    p50, p99 = np.percentile(times, [50, 99])
    return Row(
        axes,
        slots,
        plan.devices,
        float(np.median(first[1:])),
        float(p50),
        float(p99),
        slots / float(np.mean(times)),
        least,
    )


def compare(params: Any, config: TransformerConfig, sizes: Any) -> dict[str, float]:
    """The same requests all at once through many slots, and one after the other through an engine of one slot."""
    c = sizes.compare
    rng = np.random.default_rng(sizes.seed)
    prompts = [rng.integers(0, config.vocab_size, int(n)).tolist() for n in rng.integers(4, sizes.prompt, c.requests)]
    wanted = [int(n) for n in rng.integers(c.tokens // 2, c.tokens + 1, c.requests)]
    params, served = serve(params, config, Plan(""))
    engines = {}
    for name, slots, rows in (("together", c.slots, c.rows), ("alone", 1, 1)):
        shape = ServeConfig(slots=slots, length=sizes.length, chunk=min(sizes.prompt, 128), rows=rows)
        programs = make_programs(served, shape)
        engines[name] = Engine(programs, programs.place(params), queue=c.requests)
        for prompt in prompts:  # every shape is compiled before the clock starts
            engines[name].submit(prompt, Sampling(temperature=0.0, max_tokens=2))
        engines[name].run()
    result: dict[str, float] = {"requests": c.requests, "slots": c.slots, "tokens": sum(wanted)}
    drawn = {}
    for name, engine in engines.items():
        texts, before = [], time.perf_counter()
        for prompt, count in zip(prompts, wanted, strict=True):
            texts.append(engine.submit(prompt, Sampling(temperature=0.0, max_tokens=count)))
            if name == "alone":
                engine.run()
        engine.run()
        result[f"{name}_tokens_per_second"] = sum(wanted) / (time.perf_counter() - before)
        drawn[name] = [text.tokens for text in texts]
    result["ratio"] = result["together_tokens_per_second"] / result["alone_tokens_per_second"]
    result["same_tokens"] = float(np.mean([a == b for a, b in zip(drawn["together"], drawn["alone"], strict=True)]))
    return result


def table(rows: list[Row]) -> str:
    """Markdown."""
    head = (
        "| plan | slots | first token (ms) | step p50 (ms) | p99 | tokens/s | tokens/s/device | roofline (ms) | of it |"
    )
    lines = [head, "|" + "---|" * 9]
    for row in rows:
        values = (row.first_token * 1e3, row.step_p50 * 1e3, row.step_p99 * 1e3, row.tokens_per_second, row.per_device)
        shown = " | ".join(f"{value:.1f}" for value in (*values, row.roofline * 1e3))
        lines.append(f"| {row.plan or 'one device'} | {row.slots} | {shown} | {row.fraction:.0%} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    """Latency of a token against throughput, a line per plan through its numbers of slots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for plan in dict.fromkeys(row.plan for row in rows):
        own = sorted((row for row in rows if row.plan == plan), key=lambda row: row.slots)
        rate, latency = [row.per_device for row in own], [row.step_p50 * 1e3 for row in own]
        (line,) = axes.plot(rate, latency, marker="o", label=plan or "one device")
        axes.plot(rate, [row.roofline * 1e3 for row in own], ls=":", color=line.get_color())
        for row, x, y in zip(own, rate, latency, strict=True):
            axes.annotate(f"{row.slots}", (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set(xlabel="tokens per second and device", ylabel="time per token, p50 (ms)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(title="plan (numbers: slots; dotted: roofline)", fontsize=8, title_fontsize=8)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plain(row: Row) -> dict[str, Any]:
    """A row as JSON."""
    return asdict(row) | {"per_device": row.per_device, "fraction": row.fraction}


def _timed(function: Any) -> float:
    before = time.perf_counter()
    function()
    return time.perf_counter() - before
