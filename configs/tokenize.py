"""A corpus turned into a token file, once, to be memory-mapped by every run after it.

What: reads text files, JSON lines, Parquet or `datasets`, drops exact duplicates, and writes tokens with a description
and the ends of the documents; the same command goes on after a kill. `--config.data.tokenizer` takes bytes, bpe, a
tokenizer.json or a directory that has one. `--workdir` is where the tokens go; runs name it as config.data.name.
Cost: docs/data.md has what was measured.
Expected: a line with documents, duplicates, tokens and bytes per token.
Command: python scripts/tokenize_text.py --config=tokenize --config.data.name=CORPUS.jsonl --workdir=tokens/corpus
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The defaults: the standard library's sources as bytes."""
    return ConfigDict()
