"""A corpus tokenized once into a token file: duplicates dropped, resumable after a kill, counted.

Texts are read in one process and tokenized on all cores by the `tokenizers` package. After every part the files are on
disk and `progress.json` says how long they are; whatever came after it is cut off at the next start.
"""

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from tessera.data.text import (
    BPETokenizer,
    ByteTokenizer,
    TextConfig,
    Tokenizer,
    batched_by_size,
    document_hash,
    find_documents,
    load_tokenizer,
    separator_of,
)
from tessera.data.token_files import NAME
from tessera.infra.errors import ConfigError
from tessera.infra.logger import read_object, write_text

TOKENIZER, PROGRESS, DESCRIPTION = "tokenizer.json", "progress.json", f"{NAME}.json"


@dataclass(frozen=True)
class TokenizeConfig:
    """How a corpus is tokenized.

    Attributes:
      part_bytes: bytes of text between two saves; a kill loses the work since the last.
      learn_bytes: bytes of text, the first of the corpus outside the held-out documents, that "bpe" is trained on.
    """

    part_bytes: int = 1 << 26
    learn_bytes: int = 10**8

    def __post_init__(self) -> None:
        if self.part_bytes < 1 or self.learn_bytes < 1:
            raise ValueError(f"part_bytes={self.part_bytes} and learn_bytes={self.learn_bytes} must be at least 1")


class Counts(NamedTuple):
    """What was read and written so far.

    Attributes:
      read: documents.
      read_bytes: bytes of their text.
      read_tokens: their tokens, duplicates and separators included.
      documents: distinct documents, written.
      text_bytes: bytes of their text.
      tokens: their tokens with separators, written: unique tokens.
    """

    read: int = 0
    read_bytes: int = 0
    read_tokens: int = 0
    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0


class Seen:
    """Hashes of documents, each with its number of tokens; sorted arrays, 16 bytes a document."""

    def __init__(self, hashes: np.ndarray, lengths: np.ndarray):
        order = np.argsort(hashes)
        self._hashes, self._lengths = hashes[order], lengths[order]
        self._recent: dict[int, int] = {}

    def length(self, key: int) -> int | None:
        """Tokens of the document, None if it was not seen."""
        if key in self._recent:
            return self._recent[key]
        i = int(np.searchsorted(self._hashes, np.uint64(key)))
        return int(self._lengths[i]) if i < len(self._hashes) and int(self._hashes[i]) == key else None

    def add(self, key: int, length: int) -> None:
        """Note a document."""
        self._recent[key] = length
        if len(self._recent) >= max(1 << 16, len(self._hashes) // 4):
            hashes = np.concatenate([self._hashes, np.fromiter(self._recent, np.uint64, len(self._recent))])
            lengths = np.concatenate([self._lengths, np.fromiter(self._recent.values(), np.int64, len(self._recent))])
            self.__init__(hashes, lengths)  # type: ignore[misc]


def tokenize_corpus(
    text: TextConfig,
    config: TokenizeConfig,
    directory: Path,
    report: Callable[[str, Counts], None] = lambda place, counts: None,
) -> dict[str, Any]:
    """Write the documents of a corpus as tokens, each followed by the separator; go on where a killed call stopped.

    Exact duplicates are left out after the first (by 64 bits of a hash of their text). Nothing is split: held-out
    documents are chosen when the tokens are read, by the same hash.

    Args:
      text: the corpus and its tokenizer; `max_bytes` caps what is read. Shares of held-out documents matter for "bpe"
        alone, which does not learn from them.
      config: how often to save.
      directory: gets tokens.bin, tokens.json, tokens.documents.bin and tokenizer.json; see `tessera.data.token_files`.
      report: called with the source of the last document and the counts.

    Returns:
      The description in tokens.json.

    Raises:
      ConfigError: sources that are no text, or damaged; a directory whose files are shorter than its progress says.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / DESCRIPTION).is_file():
        return read_object(directory / DESCRIPTION)
    if text.prompt:
        raise ConfigError(f"config.data.prompt={text.prompt!r}: token files have no prompts; train on the text itself")
    tokenizer = _tokenizer(text, config, directory)
    end = separator_of(tokenizer, text.tokenizer if text.from_file else "", text.separator)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    counts = Counts()
    if (directory / PROGRESS).is_file():
        counts = Counts(**read_object(directory / PROGRESS))
    sizes = {f"{NAME}.bin": counts.tokens * dtype.itemsize, f"{NAME}.documents.bin": counts.documents * 24}
    for name, size in sizes.items():
        with (directory / name).open("ab") as file:
            if file.tell() < size:
                raise ConfigError(
                    f"{directory / name}: shorter than {PROGRESS} says; remove the directory, begin again"
                )
            file.truncate(size)
    table = np.fromfile(directory / f"{NAME}.documents.bin", "<i8").reshape(-1, 3)
    seen = Seen(table[:, 1].view("<u8"), np.diff(table[:, 0], prepend=0))
    with (
        (directory / f"{NAME}.bin").open("ab") as tokens,
        (directory / f"{NAME}.documents.bin").open("ab") as documents,
    ):
        rest = itertools.islice(_capped(text), counts.read, None)
        unsaved = 0
        for batch in _batches(rest, min(config.part_bytes, 1 << 22)):
            counts, size = _append(tokenizer, end, dtype, [one for _, one in batch], seen, counts, tokens, documents)
            unsaved += size
            report(batch[-1][0], counts)
            if unsaved >= config.part_bytes:
                _save(directory, counts, tokens, documents)
                unsaved = 0
        _save(directory, counts, tokens, documents)
    if not counts.documents:
        raise ConfigError(f"no text in {text.sources or text.name!r}; at least one document is needed")
    return _describe(tokenizer, end, dtype, counts, directory)


def _capped(text: TextConfig) -> Iterator[tuple[str, bytes]]:
    held = 0
    for place, document in find_documents(text):
        if text.max_bytes and held >= text.max_bytes:
            return
        held += len(document)
        if document:
            yield place, document


def _batches(documents: Iterable[tuple[str, bytes]], size: int) -> Iterator[list[tuple[str, bytes]]]:
    return batched_by_size(documents, size, lambda pair: len(pair[1]))


def _tokenizer(text: TextConfig, config: TokenizeConfig, directory: Path) -> Tokenizer:
    """The tokenizer of the directory, or the one that is asked for, which is saved there."""
    path = directory / TOKENIZER
    if path.is_file():
        return load_tokenizer(path)
    tokenizer: Tokenizer
    if text.tokenizer == "ids":
        raise ConfigError("config.data.tokenizer='ids': text needs a tokenizer; bytes, bpe or a tokenizer.json")
    if text.from_file:
        tokenizer = load_tokenizer(text.tokenizer)
    elif text.tokenizer == "bpe":
        held_out = (text.validation + text.test) * 2**64
        learned, held = [], 0
        for _, document in _capped(text):
            if held >= config.learn_bytes:
                break
            if document_hash(document) >= held_out:
                learned.append(document.decode())
                held += len(document)
        tokenizer = BPETokenizer.train(learned, text.vocab_size)
    else:
        tokenizer = ByteTokenizer()
    tokenizer.save(path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
    return tokenizer


def _append(
    tokenizer: Tokenizer,
    end: int,
    dtype: np.dtype,
    batch: list[bytes],
    seen: Seen,
    counts: Counts,
    tokens: BinaryIO,
    documents: BinaryIO,
) -> tuple[Counts, int]:
    """Write the new documents of a batch; the counts after it, and the bytes of its texts."""
    keys = [document_hash(document) for document in batch]
    fresh: dict[int, bytes] = {}
    for key, document in zip(keys, batch, strict=True):
        if seen.length(key) is None:
            fresh.setdefault(key, document)
    encoded = tokenizer.encode_documents([document.decode() for document in fresh.values()])
    at, rows, parts = counts.tokens, [], [np.zeros(0, dtype)]
    for (key, document), found in zip(fresh.items(), encoded, strict=True):
        at += len(found) + 1
        parts += [found, np.array([end])]
        rows.append((at, np.uint64(key).astype(np.int64), len(document)))
        seen.add(key, len(found) + 1)
    if rows:
        tokens.write(np.concatenate(parts).astype(dtype).tobytes())
        documents.write(np.array(rows, "<i8").tobytes())
    size = sum(map(len, batch))
    counts = Counts(
        counts.read + len(batch),
        counts.read_bytes + size,
        counts.read_tokens + sum(seen.length(key) or 0 for key in keys),
        counts.documents + len(rows),
        counts.text_bytes + sum(map(len, fresh.values())),
        at,
    )
    return counts, size


def _save(directory: Path, counts: Counts, *files: BinaryIO) -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())
    write_text(directory / PROGRESS, json.dumps(counts._asdict()) + "\n")


def _describe(tokenizer: Tokenizer, end: int, dtype: np.dtype, counts: Counts, directory: Path) -> dict[str, Any]:
    with (directory / f"{NAME}.bin").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    found = {
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": TOKENIZER,
        "separator": end,
        "tokens": counts.tokens,
        "unique_tokens": counts.tokens,
        "total_tokens": counts.read_tokens,
        "documents": counts.documents,
        "duplicates": counts.read - counts.documents,
        "duplicate_bytes": counts.read_bytes - counts.text_bytes,
        "text_bytes": counts.text_bytes,
        "bytes_per_token": counts.text_bytes / counts.tokens,
        "sha256": digest,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_text(directory / DESCRIPTION, json.dumps(found, indent=1) + "\n")
    (directory / PROGRESS).unlink(missing_ok=True)
    return found
