"""Prompts read and tokens decoded by a real model: this project beside transformers and llama.cpp, in turns.

Every contestant is a process of its own (`engines.py`) that waits while the others work; processor time is counted, as
cores are often shared, and the clock beside it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scripts.benchmarks.timing import Row
from tessera.infra.schema import Schema

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class DecodeBenchmark:
    """Engines that decode the same model.

    Attributes:
      suite: the benchmark's name.
      cores: that the processes may use; 0 is all.
      model: directory of the model.
      bits: of this project's weights, a contestant each; 0 is float32.
      transformers: Python with transformers and PyTorch; "" leaves it out.
      llama: Python with llama-cpp-python; "" leaves it out.
      gguf: files for llama.cpp, a contestant each.
      prompt: tokens of the prompt that is read.
      slots: texts decoded at once, a case each.
      tokens: decoded by every slot in a round.
      rounds: of each contestant.
      texts: prompts of `prompt` tokens from Python's own library that this project goes on with for `text_tokens`
        each, in the most slots, without and with drafts looked up in the text (`draft.lookup`); 0 leaves it out.
      text_tokens: of each such text.
      drafted: tokens of a draft.
    """

    suite: str = "decode"
    cores: int = 0
    model: str = ".cache/smollm2"
    bits: tuple[int, ...] = (0, 8, 4)
    transformers: str = ""
    llama: str = ""
    gguf: tuple[str, ...] = ()
    prompt: int = 256
    slots: tuple[int, ...] = (1, 8)
    tokens: int = 16
    rounds: int = 5
    texts: int = 0
    text_tokens: int = 64
    drafted: int = 4


SCHEMA = Schema(DecodeBenchmark)


def rows(config: Any) -> Iterator[Row]:
    """A row per case and engine; rates are of processor time."""
    commands = {f"tessera, {bits or 32} bits": (sys.executable, "tessera", config.model, bits) for bits in config.bits}
    if config.transformers:
        commands["transformers, 32 bits"] = (config.transformers, "transformers", config.model, 0)
    for file in config.gguf if config.llama else ():
        commands[f"llama.cpp, {Path(file).stem}"] = (config.llama, "llama_cpp", file, 0)
    engines = {name: start(*command) for name, command in commands.items()}
    cases = [(f"prompt of {config.prompt} tokens", f"prefill {config.prompt}", config.prompt)]
    for slots in config.slots:
        cases.append((f"decode, {slots} slots", f"decode {slots} {config.tokens}", slots * config.tokens))
    try:
        for case, line, work in cases:
            answers: dict[str, list[dict]] = {name: [] for name in engines}
            for _ in range(config.rounds):
                for name, engine in engines.items():
                    answers[name].append(ask(engine, line))
            yield from compared(case, answers, work)
        if config.texts:
            case = f"{config.texts} texts of {config.text_tokens} tokens, {max(config.slots)} slots"
            sizes = f"{max(config.slots)} {config.texts} {config.prompt} {config.text_tokens}"
            for name, engine in engines.items():
                if name.startswith("tessera"):
                    lines = {name: f"texts {sizes} 0", f"{name}, lookup": f"texts {sizes} {config.drafted}"}
                    found = [{one: ask(engine, line) for one, line in lines.items()} for _ in range(config.rounds)]
                    answers = {one: [each[one] for each in found] for one in lines}
                    yield from compared(case, answers, config.texts * config.text_tokens)
    finally:
        for engine in engines.values():
            engine.kill()


def start(python: str, *command: Any) -> subprocess.Popen:
    """Start an engine; returns when it has loaded its model."""
    worker = [python, "-P", str(ROOT / "scripts" / "benchmarks" / "engines.py"), *map(str, command)]
    # No path of this project before another engine's own packages.
    environment = os.environ | {"PYTHONPATH": str(ROOT) if command[0] == "tessera" else ""}
    engine = subprocess.Popen(worker, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert engine.stdout is not None
    while (line := engine.stdout.readline()) != "ready\n":
        if not line:
            raise FileNotFoundError(f"{' '.join(worker)} ended with status {engine.wait()}")
    return engine


def ask(engine: subprocess.Popen, line: str) -> dict[str, Any]:
    """Let an engine do one thing."""
    assert engine.stdin is not None and engine.stdout is not None
    engine.stdin.write(line + "\n")
    engine.stdin.flush()
    if not (answer := engine.stdout.readline()):
        raise RuntimeError(f"{line}: the engine ended with status {engine.wait()}")
    return json.loads(answer)


def compared(case: str, answers: dict[str, list[dict]], work: int) -> Iterator[Row]:
    """Rows of one case, beside the first engine."""
    base = next(iter(answers))
    processor = {name: np.asarray([one["processor"] for one in found]) for name, found in answers.items()}
    for name, found in answers.items():
        ratio = None
        if name != base:
            times = processor[base] / processor[name]
            ratio = (float(np.median(times)), float(times.min()), float(times.max()))
        seconds = float(np.median(processor[name]))
        more = {
            "tokens/s of the clock": work / float(np.median([one["seconds"] for one in found])),
            "same tokens": float(
                np.mean([a == b for a, b in zip(found[0]["tokens"], answers[base][0]["tokens"], strict=True)])
            ),
        }
        yield Row(case, name, seconds, work / seconds, ratio, base if ratio else "", more)
