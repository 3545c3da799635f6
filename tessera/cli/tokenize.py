"""Tokenize a corpus once: `tessera tokenize --config.data.name='corpus/*.jsonl' --workdir=tokens/corpus`."""

from pathlib import Path

from rich.console import Console

from tessera.cli.main import Invocation
from tessera.data.corpus import Counts, TokenizeConfig, tokenize_corpus
from tessera.data.documents import is_saved_dataset
from tessera.data.download import DataUnavailable
from tessera.data.text import TextConfig
from tessera.infra.config import ConfigError, build, checked
from tessera.infra.logger import Progress
from tessera.infra.schema import Schema
from tessera.infra.workdir import WorkdirMismatch, hold

SCHEMA = Schema(TokenizeConfig, data=TextConfig)
ERRORS = (DataUnavailable, WorkdirMismatch, ImportError)


def main(invocation: Invocation) -> int:
    """Config -> token file, its description, a line of counts. Returns the exit status."""
    c = invocation.config
    text = build(TextConfig, c.data, "config.data")
    config = build(TokenizeConfig, {name: c[name] for name in c if name != "data"})
    if text.max_tokens:
        raise ConfigError(f"config.data.max_tokens={text.max_tokens}: here max_bytes caps; max_tokens, when it is read")
    workdir = invocation.prepare()
    sizes: dict[str, int] = {}
    with hold(workdir), Progress(1, "MB of text", every=10.0, begins="reading") as bar:

        def report(place: str, counts: Counts) -> None:
            sizes.setdefault(place, _size(Path(place)) if "datasets:" not in place else 0)
            done = counts.read_bytes >> 20
            bar.total = max(bar.total, done, sum(sizes.values()) >> 20)
            bar.advance(done - bar.done, documents=f"{counts.read:,}", tokens=f"{counts.tokens:,}")

        found = checked("config.data", tokenize_corpus, text, config, workdir, report)
        bar.total = max(1, bar.done)
    Console().print(
        f"{found['documents']:,} documents in {workdir}, {found['duplicates']:,} duplicates left out; "
        f"{found['total_tokens']:,} tokens in all, {found['unique_tokens']:,} unique of a vocabulary of "
        f"{found['vocab_size']:,}; {found['bytes_per_token']:.3f} bytes per token",
        soft_wrap=True,
        highlight=False,
    )
    return 0


def _size(path: Path) -> int:
    files = path.rglob("*.arrow") if is_saved_dataset(path) else [path]
    return sum(file.stat().st_size for file in files)
