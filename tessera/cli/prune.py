"""Prune a trained language model on calibration text: `tessera prune --config.model.dir=models/smollm2`."""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from rich.console import Console

from lottery.summary import write_csv
from tessera.cli.main import Invocation
from tessera.compress.pruning import PruneConfig, PrunedDecoder, check_fits, prune_decoder
from tessera.compress.text import CalibrationConfig, Measured, draw_windows, perplexity, refuse_shared
from tessera.data.text import TextConfig, Tokenizer, read_texts
from tessera.infra.artifacts import ArtifactStore
from tessera.infra.checkpoint import CheckpointDamaged, NotOurs
from tessera.infra.config import ConfigError, build, checked
from tessera.infra.logger import Progress, write_text
from tessera.infra.schema import Group, Schema
from tessera.infra.workdir import WorkdirMismatch, hold
from tessera.reports.html import print_report
from tessera.reports.pruning import prune_report
from tessera.serving.huggingface import write_config
from tessera.serving.load import Loaded, SourceConfig, export_directory, load

MODEL = "model"  # folder of the workdir that the pruned model is written to
BLOCKS = "blocks"  # folder of pruned blocks, until the run is done


@dataclass(frozen=True)
class PruneSettings:
    """What stands at the top of the config.

    Attributes:
      texts: what is scored before and after, each a row of the table: names, files or globs as `data.name` of a
        training has them; no document of it may be calibration text.
      length: tokens of a window that is scored, the first of them context only.
      tokens: at most so many of each text; 0 is all.
      dtype: of the weights that are written, "float32" or "bfloat16".
    """

    texts: tuple[str, ...] = ("tinyshakespeare",)
    length: int = 256
    tokens: int = 0
    dtype: str = "float32"


MODEL_SOURCE = Group(SourceConfig, without=("dtype", "bits", "group", "method", "calibration"))
DATA = Group(TextConfig, without=("name", "tokenizer", "vocab_size", "max_bytes", "validation", "test"))
SCHEMA = Schema(PruneSettings, model=MODEL_SOURCE, prune=PruneConfig, calibration=CalibrationConfig, data=DATA)
ERRORS = (FileNotFoundError, FileExistsError, CheckpointDamaged, NotOurs, WorkdirMismatch, ImportError)


def main(invocation: Invocation) -> int:
    """Config -> a workdir with the pruned model, tables and a report. Returns the exit status."""
    c, console = invocation.config, Console()
    how = build(PruneConfig, c.prune, "config.prune")
    calibration = build(CalibrationConfig, c.calibration, "config.calibration")
    if c.dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"config.dtype={c.dtype!r}: float32 or bfloat16")
    if not c.texts or c.length < 2 or c.tokens < 0:
        raise ConfigError(
            f"config.texts={tuple(c.texts)}, config.length={c.length}, config.tokens={c.tokens}: at least one text, "
            "windows of at least 2 tokens, and 0 (all) or more tokens are needed"
        )
    evaluated = {name: read_documents(c, name, "config.texts") for name in c.texts}
    learned = {
        name: read_documents(c, name, "config.calibration.texts", calibration.max_bytes) for name in calibration.texts
    }
    checked("config.texts", refuse_shared, learned, evaluated)
    loaded = checked("config.model", load, build(SourceConfig, c.model, "config.model"))
    checked("config.model", write_config, loaded.config)  # what cannot be written is said before anything is pruned
    if not loaded.config.scan:
        raise ConfigError(f"config.model: {c.model.dir} has model.scan=False; only scanned blocks can be written")
    checked("config.prune", check_fits, how, loaded.params, loaded.config)
    check_lengths(loaded, c)
    windows_NT = checked("config.calibration", draw_windows, learned, loaded.tokenizer, calibration)
    tokens = {name: cut_tokens(texts, loaded.tokenizer, c.tokens)[0] for name, texts in evaluated.items()}
    workdir = invocation.prepare(whole=True)
    with hold(workdir):
        before = {name: score(loaded, name, texts, c.length) for name, texts in tokens.items()}
        store, began = ArtifactStore(workdir / BLOCKS), time.monotonic()
        with Progress(loaded.config.layers, "blocks", begins="compiling") as progress:
            options = {"store": store, "done": progress.advance}
            pruned = checked("config.prune", prune_decoder, loaded.params, loaded.config, how, windows_NT, **options)
        seconds = time.monotonic() - began
        small = loaded._replace(params=pruned.params, config=pruned.config)
        rows = [_compare(name, before[name], score(small, name, texts, c.length)) for name, texts in tokens.items()]
        if not (workdir / MODEL).exists():  # it appears when it is whole
            export_directory(small, workdir / MODEL, c.dtype)
        write_csv(pruned.rows, workdir / "layers.csv")
        summary = {"texts": rows, "seconds": seconds, "calibration_tokens": int(windows_NT.size)} | _sizes(
            loaded, pruned
        )
        write_text(workdir / "result.json", json.dumps(summary, indent=2) + "\n")
        console.print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}", soft_wrap=True)
        for row in rows:
            shown = [f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()]
            console.print(f"| {' | '.join(shown)} |", soft_wrap=True)
        console.print(
            f"{workdir / MODEL}: a Hugging Face directory; every layer is in {workdir / 'layers.csv'}",
            soft_wrap=True,
            markup=False,
        )
        print_report(prune_report, workdir, _findings(how, summary, windows_NT.shape), rows, pruned.rows)
        store.clear()
    return 0


def check_lengths(loaded: Loaded, c: Any) -> None:
    """Raise ConfigError for windows that are longer than the model's positions."""
    longest = loaded.format.positions
    if longest and max(c.length, c.calibration.length) > longest:
        raise ConfigError(
            f"config.length={c.length}, config.calibration.length={c.calibration.length}: {c.model.dir} "
            f"has max_position_embeddings={longest}"
        )


def read_documents(c: Any, name: str, where: str, most: int = 0) -> list[str]:
    """The documents of a text, at most `most` bytes of them; `where` is the setting that names it.

    Raises:
      ConfigError: no such text.
    """
    return checked(where, read_texts, build(TextConfig, c.data, "config.data", name=name, max_bytes=most))


def cut_tokens(documents: Iterable[str], tokenizer: Tokenizer, size: int, parts: int = 1) -> list[list[list[int]]]:
    """The first size * parts tokens of documents in consecutive parts, each a list of documents' tokens.

    Args:
      documents: text.
      tokenizer: of the model.
      size: tokens of a part; 0 is all, in one part.
      parts: how many.
    """
    cut: list[list[list[int]]] = [[]]
    left = size
    for document in documents:
        tokens = tokenizer.encode(document).tolist()
        while size and len(tokens) >= left:
            cut[-1].append(tokens[:left])
            tokens, left = tokens[left:], size
            if len(cut) == parts:
                return cut
            cut.append([])
        cut[-1].append(tokens)
        left -= len(tokens)
    return cut


def score(loaded: Loaded, name: str, tokens: list[list[int]], length: int) -> Measured:
    """Cross-entropy of documents' tokens in windows of `length`, with a bar called `name`.

    Raises:
      ConfigError: no tokens.
    """
    with Progress(sum(map(len, tokens)), name, begins="compiling") as progress:
        options = {"progress": progress.advance}
        return checked(
            "config.texts", perplexity, loaded.params, loaded.config, tokens, loaded.begin, length, **options
        )


def _compare(name: str, before: Measured, after: Measured) -> dict[str, Any]:
    row = {"text": name, "tokens": before.tokens, "nats per token": before.loss, "pruned, nats": after.loss}
    return row | {"perplexity": before.perplexity, "pruned": after.perplexity}


def _sizes(loaded: Loaded, pruned: PrunedDecoder) -> dict[str, Any]:
    count = lambda params: sum(leaf.size for leaf in jax.tree.leaves(params))  # noqa: E731
    weights = [row for row in pruned.rows if "weights" in row]
    total = sum(row["weights"] for row in weights)
    density = sum(row["weights"] * row["density"] for row in weights) / total if total else None
    return {"parameters": count(loaded.params), "pruned_parameters": count(pruned.params), "density": density}


def _findings(how: PruneConfig, summary: Mapping[str, Any], shape: tuple[int, ...]) -> list[str]:
    smaller = summary["parameters"] - summary["pruned_parameters"]
    cut = f" {smaller:,} of {summary['parameters']:,} parameters were cut out." if smaller else ""
    first = (
        f"Pruned by {how.method} ({how.structure}, density {how.density:g}, allocation {how.allocation}) on {shape[0]} "
        f"windows of {shape[1]} tokens in {summary['seconds']:.0f} s.{cut}"
    )
    texts = [
        f"{row['text']}: perplexity {row['perplexity']:.2f} before, {row['pruned']:.2f} after."
        for row in summary["texts"]
    ]
    return [first, " ".join(texts), "One draw of calibration text, one seed: there is no interval."]
