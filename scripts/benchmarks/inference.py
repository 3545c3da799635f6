"""Serving: decode steps by plan and number of slots beside the memory roofline, and continuous batching beside one by
one."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scripts.benchmarks.timing import Contest, Row, Timing
from sharding.analysis.hardware import HARDWARE
from sharding.inference.quantize import stored_bytes
from sharding.inference.sample import greedy
from sharding.plan import Plan
from tessera.infra.config import build
from tessera.infra.schema import Schema
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.serving.engine import Engine
from tessera.serving.programs import Programs, Rows, ServeConfig, make_programs
from tessera.serving.requests import Sampling
from tessera.serving.served import serve

KINDS = {"NVIDIA H200": "h200", "NVIDIA H100": "h100", "TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v6e": "v6e"}


@dataclass(frozen=True)
class Comparison:
    """The same requests through many slots, all at once, and one after the other through one slot.

    Attributes:
      requests: texts.
      tokens: most that each draws; at least half of it.
      slots: of the engine that takes all at once.
      rows: prompts read in one call there.
    """

    requests: int = 64
    tokens: int = 64
    slots: int = 16
    rows: int = 4


@dataclass(frozen=True)
class InferenceBenchmark:
    """Random weights of a decoder, decoded in slots that are all in use.

    Attributes:
      suite: the benchmark's name.
      cores: that the process may use; 0 is all.
      plans: how the work is split over devices.
      slots: numbers of texts decoded at once; those that a plan's data axes divide.
      prompt: tokens.
      length: tokens that a slot has room for.
      steps: timed decode steps of every plan and number of slots.
      first: timed prefills.
      cpu_devices: devices a CPU is made to look like; more than the plans need stay idle.
      compare: continuous batching beside one text at a time.
      rounds: of that comparison.
      seed: of weights and prompts.
    """

    suite: str = "inference"
    cores: int = 0
    plans: tuple[str, ...] = ("", "tp=2", "dp=2", "pp=2")
    slots: tuple[int, ...] = (1, 4, 16)
    prompt: int = 32
    length: int = 160
    steps: int = 40
    first: int = 10
    cpu_devices: int = 2
    compare: Comparison = Comparison()
    rounds: int = 1
    seed: int = 0


SCHEMA = Schema(InferenceBenchmark, model=TransformerConfig)


def rows(config: Any) -> Iterator[Row]:
    """A row per plan and number of slots, then the two ways to serve the same requests."""
    jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    model = build(TransformerConfig, config.model, "config.model")
    params = random_weights(model, config.seed)
    speed, source = bandwidth()
    for axes in config.plans:
        for slots in (slots for slots in config.slots if slots % Plan(axes).data == 0):
            yield measure(params, model, axes, slots, config, speed, source)
    yield from compare(params, model, config)


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


def measure(
    params: Any, config: TransformerConfig, axes: str, slots: int, sizes: Any, speed: float, source: str
) -> Row:
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
    more = {
        "devices": plan.devices,
        "first token ms": float(np.median(first[1:])) * 1e3,
        "p99 ms": float(p99) * 1e3,
        "roofline ms": least * 1e3,
        "of the roofline": float(least / p50),
        "bandwidth": source,
    }
    return Row(
        f"decode step, {axes or 'one device'}", f"{slots} slots", float(p50), slots / float(np.mean(times)), more=more
    )


def compare(params: Any, config: TransformerConfig, sizes: Any) -> list[Row]:
    """The same requests all at once through many slots, and one after the other through an engine of one slot."""
    c = sizes.compare
    rng = np.random.default_rng(sizes.seed)
    prompts = [rng.integers(0, config.vocab_size, int(n)).tolist() for n in rng.integers(4, sizes.prompt, c.requests)]
    wanted = [int(n) for n in rng.integers(c.tokens // 2, c.tokens + 1, c.requests)]
    params, served = serve(params, config, Plan(""))
    drawn: dict[str, list[list[int]]] = {}

    def contestant(name: str, slots: int, rows: int, one_by_one: bool) -> Callable[[], None]:
        shape = ServeConfig(slots=slots, length=sizes.length, chunk=min(sizes.prompt, 128), rows=rows)
        programs = make_programs(served, shape)
        engine = Engine(programs, programs.place(params), queue=c.requests)

        def run() -> None:
            texts = []
            for prompt, count in zip(prompts, wanted, strict=True):
                texts.append(engine.submit(prompt, Sampling(temperature=0.0, max_tokens=count)))
                if one_by_one:
                    engine.run()
            engine.run()
            drawn[name] = [text.tokens for text in texts]

        return run

    together, alone = f"continuous batching, {c.slots} slots", "one at a time"
    contest = Contest(
        f"{c.requests} requests, tokens",
        {together: contestant(together, c.slots, c.rows, False), alone: contestant(alone, 1, 1, True)},
        alone,
        {together: float(sum(wanted)), alone: float(sum(wanted))},
        sizes.rounds,
    )

    def same(name: str, timing: Timing) -> dict[str, Any]:
        return {"equal texts": float(np.mean([a == b for a, b in zip(drawn[together], drawn[alone], strict=True)]))}

    return contest.rows(same)


def plot(rows: list[Row], path: Path) -> None:
    """Latency of a token against throughput, a line per plan through its numbers of slots."""
    from matplotlib.figure import Figure

    steps = [row for row in rows if row.case.startswith("decode step")]
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for case in dict.fromkeys(row.case for row in steps):
        own = [row for row in steps if row.case == case]
        rate, latency = [row.rate / row.more["devices"] for row in own], [row.seconds * 1e3 for row in own]
        (line,) = axes.plot(rate, latency, marker="o", label=case.removeprefix("decode step, "))
        axes.plot(rate, [row.more["roofline ms"] for row in own], ls=":", color=line.get_color())
        for row, x, y in zip(own, rate, latency, strict=True):
            axes.annotate(row.name.split()[0], (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set(xlabel="tokens per second and device", ylabel="time per token, p50 (ms)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(title="plan (numbers: slots; dotted: roofline)", fontsize=8, title_fontsize=8)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=150)


def _timed(function: Any) -> float:
    before = time.perf_counter()
    function()
    return time.perf_counter() - before
