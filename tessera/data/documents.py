"""Documents from files: JSON lines, Parquet, and data sets of Hugging Face `datasets`, one by one, in their order.

A document comes with its place ("corpus.jsonl, line 3"), which is how every message about it begins.
"""

import gzip
import json
import logging as standard
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging

from tessera.infra.errors import ConfigError

JSONL = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".ndjson.gz", ".ndjson.zst")
ROWS = (*JSONL, ".parquet")
HUB = "datasets:"  # of a name that `datasets.load_dataset` gets


def is_rows(name: Path | str) -> bool:
    """Whether a path or name holds several documents, a row each.

    Example:
      >>> is_rows("corpus.jsonl.zst"), is_rows("book.txt"), is_rows("datasets:json")
      (True, False, True)
    """
    return str(name).startswith(HUB) or str(name).endswith(ROWS) or is_saved_dataset(name)


def is_saved_dataset(path: Path | str) -> bool:
    """Whether a directory was written by `save_to_disk` of a `datasets.Dataset` or `DatasetDict`."""
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def read_documents(source: Path | str, column: str, prompt: str = "") -> Iterator[tuple[str, ...]]:
    """Iterate over (place, text) of every row that has text, or (place, prompt, text); empty ones are counted.

    Args:
      source: a file whose name ends as one of `ROWS`, a saved data set, or "datasets:NAME" or "datasets:NAME:SPLIT" for
        `datasets.load_dataset` (the split is "train" by default).
      column: key or column of the text.
      prompt: key or column of the prompt; "" for none.

    Raises:
      ConfigError: a damaged file, a row that is not JSON, an absent column, or a value that is not text.
      ImportError: a package of the extra `data` is missing.
    """
    name = str(source)
    columns = [prompt, column] if prompt else [column]
    if name.startswith(HUB) or is_saved_dataset(source):
        rows = _dataset_rows(source, columns)
    elif name.endswith(".parquet"):
        rows = _parquet_rows(Path(source), columns)
    else:
        rows = _json_rows(Path(source), columns)
    empty, first = 0, ""
    for place, *texts in rows:
        for which, text in zip(columns, texts, strict=True):
            if not isinstance(text, str):
                raise ConfigError(f"{place}: {which!r} holds {type(text).__name__}; text is needed")
        if texts[-1]:
            yield place, *(_encodable(place, text) for text in texts)
        else:
            empty, first = empty + 1, first or place
    if empty:
        logging.warning("%s: empty, as are %d more documents of it; they are left out", first, empty - 1)


def package(name: str, purpose: str) -> Any:
    """Import a package of the extra `data`; a missing one is an ImportError that names it and the extra."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {name}, of the extra `data`: pip install 'tessera-jax[data]'") from error


def _encodable(place: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{place}: the text is no UTF-8: half a surrogate pair at {error.start}") from None
    return text


def _json_rows(path: Path, columns: list[str]) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with _lines(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}, line {number}", *_values(line, columns, f"{path}, line {number}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(f"{path}: damaged after line {number} ({error}); a whole .gz file is needed") from error
    except Exception as error:
        if type(error).__name__ != "ZstdError":
            raise
        raise ConfigError(f"{path}: damaged after line {number} ({error}); a whole .zst file is needed") from error


def _lines(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return _zstd_lines(path)
    return path.open("rb")


class _zstd_lines:
    """Lines of a .zst file; the end of the file inside a frame is an error, which zstandard's reader leaves unsaid."""

    def __init__(self, path: Path):
        self._zstandard, self._path = package("zstandard", str(path)), path

    def __enter__(self) -> Iterator[bytes]:
        self._file = self._path.open("rb")
        return self._read()

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read(self) -> Iterator[bytes]:
        rest, decoder = b"", None
        while data := self._file.read(1 << 20):
            while data:
                decoder = decoder or self._zstandard.ZstdDecompressor().decompressobj()
                *lines, rest = (rest + decoder.decompress(data)).split(b"\n")
                yield from lines
                data = decoder.unused_data
                decoder = None if decoder.eof else decoder
                if decoder:
                    break
        if decoder is not None:
            raise self._zstandard.ZstdError("the file ends inside a frame")
        if rest:
            yield rest


def _values(line: bytes, columns: list[str], place: str) -> list[Any]:
    form = ", ".join(f"{column!r}: ..." for column in columns)
    try:
        row = json.loads(line)
    except RecursionError:
        raise ConfigError(f"{place}: no JSON: nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{place}: no JSON ({error}); a line is an object such as {{{form}}}") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{place}: a {type(row).__name__}; a line is an object such as {{{form}}}")
    _require(place, columns, row)
    return [row[column] for column in columns]


def _require(place: str, columns: list[str], there: Any) -> None:
    """Raise ConfigError for a column that is not there."""
    for column in columns:
        if column not in there:
            names = ", ".join(repr(name) for name in there) or "none"
            which = "column" if column == columns[-1] else "prompt"
            raise ConfigError(f"{place}: no column {column!r}; there are {names} (config.data.{which})")


def _parquet_rows(path: Path, columns: list[str]) -> Iterator[tuple[str, Any]]:
    arrow, parquet = package("pyarrow", str(path)), package("pyarrow.parquet", str(path))
    try:
        with parquet.ParquetFile(path) as file:
            _require(str(path), columns, file.schema_arrow.names)
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for texts in zip(*(batch.column(column).to_pylist() for column in columns), strict=True):
                    row += 1
                    yield f"{path}, row {row}", *texts
    except ConfigError:
        raise
    except (arrow.ArrowException, OSError, ValueError) as error:  # ValueError: names or texts that are no UTF-8
        raise ConfigError(f"{path}: no Parquet file, or a damaged one ({_short(error)})") from error


def _dataset_rows(source: Path | str, columns: list[str]) -> Iterator[tuple[str, Any]]:
    found = load_dataset(source)
    _require(str(source), columns, found.column_names)
    row = 0
    for batch in found.select_columns(columns).iter(1024):
        for texts in zip(*(batch[column] for column in columns), strict=True):
            row += 1
            yield f"{source}, row {row}", *texts


def load_dataset(source: Path | str, split: str = "train") -> Any:
    """Open a saved data set, or one that `datasets.load_dataset` knows under the name behind "datasets:".

    Raises:
      ConfigError: it cannot be opened, or a split has to be named.
      ImportError: `datasets` is missing.
    """
    datasets = package("datasets", str(source))
    name = str(source)
    try:
        if not name.startswith(HUB):
            found = datasets.load_from_disk(name)
        else:
            name, _, named = name.removeprefix(HUB).partition(":")
            if not Path(name).exists():
                logging.warning("%s: names of the Hugging Face hub were not tried when this was written", source)
            client = standard.getLogger("huggingface_hub")
            level = client.level
            client.setLevel(standard.ERROR)  # without a network it warns of every try, before the error
            try:
                found = datasets.load_dataset(name, split=named or split)
            finally:
                client.setLevel(level)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except Exception as error:  # of many kinds: of its own, of the hub, of Arrow
        raise ConfigError(f"{source}: datasets cannot open it: {_short(error)}") from error
    if isinstance(found, dict):
        splits = ", ".join(f"{name}/{split}" for split in found)
        raise ConfigError(f"{source}: a data set of several splits; name one of {splits}")
    return found


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
