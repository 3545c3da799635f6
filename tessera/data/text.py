"""Text as tokens: text files, rows of JSON or Parquet, token files or Python's own library, split without leakage.

Text that is read here is tokenized into memory; what is larger goes through `tessera tokenize` and is memory-mapped.
"""

import difflib
import glob
import hashlib
import json
import math
import os
import sysconfig
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from tessera.data.documents import HUB, is_rows, is_saved_dataset, read_documents
from tessera.data.download import Remote, fetch
from tessera.data.packing import METHODS, Documents, Packed, joined_documents
from tessera.data.special_tokens import add_named, read_settings, text_of
from tessera.data.token_files import TokenFile, TokenStream, is_token_file, joined, open_tokens
from tessera.infra.errors import ConfigError
from tessera.infra.logger import read_object
from tessera.infra.remote import cache_dir, is_url, local

TINYSHAKESPEARE = Remote(
    "tinyshakespeare.txt",
    ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",),
    "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)


@runtime_checkable
class Tokenizer(Protocol):
    """Text to tokens and back. `decode(encode(text)) == text` for every text."""

    vocab_size: int

    def encode(self, text: str) -> np.ndarray:
        """Tokens [N] of `text`: uint16, or int32 if the vocabulary is larger than that holds."""
        ...

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokens of each text, without the special tokens that a template would put around it."""
        ...

    def decode(self, tokens: np.ndarray) -> str:
        """Text of tokens [N]; bytes that are not UTF-8 become replacement characters."""
        ...

    def save(self, path: str | os.PathLike) -> None:
        """Write everything `load` needs to one file."""
        ...

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read back what `save` wrote."""
        ...


class ByteTokenizer:
    """Every byte of the UTF-8 encoding is a token."""

    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        """Tokens [N] uint16."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokens of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: np.ndarray) -> str:
        """Text of tokens [N]; bytes that are not UTF-8 become replacement characters."""
        return np.asarray(tokens).astype(np.uint8).tobytes().decode(errors="replace")

    def save(self, path: str | os.PathLike) -> None:
        """Write a one-line marker: there is nothing to remember."""
        Path(path).write_text(json.dumps({"tessera_tokenizer": "bytes"}) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ByteTokenizer":
        """Check the marker; ValueError if the file holds another tokenizer or is damaged."""
        if read_object(path).get("tessera_tokenizer") != "bytes":
            raise ValueError(f"{path} does not hold a byte tokenizer")
        return cls()


class NoSuchToken(ValueError):
    """A text with a token of the tokenizer that its model does not have."""


class BPETokenizer:
    """A tokenizer of the `tokenizers` package: any tokenizer.json.

    `train` makes one of byte-level byte-pair encoding (Sennrich et al. 2016; on bytes as in GPT-2, Radford et al. 2019,
    section 2.2).

    Attributes:
      own_size: tokens of tokenizer.json itself, without those that the files beside it add.
      limit: tokens of the model that reads the texts; a text with one beyond them is refused. None for any.
    """

    limit: int | None = None

    def __init__(self, inner: Any):
        self._inner = inner  # a tokenizers.Tokenizer
        # Of a file made for classifiers: texts here are whole.
        inner.no_truncation()
        inner.no_padding()
        # Some vocabularies have gaps.
        self.vocab_size: int = max(inner.get_vocab_size(), max(inner.get_vocab().values(), default=-1) + 1)
        self.own_size = self.vocab_size
        self._dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.int32

    @classmethod
    def train(cls, documents: Sequence[str], vocab_size: int) -> "BPETokenizer":
        """Learn at most `vocab_size` tokens (fewer if the text is too small to have that many); deterministic."""
        tokenizers = _import_tokenizers()
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(documents, trainer)
        return cls(inner)

    @classmethod
    def of_bytes(cls) -> "BPETokenizer":
        """Make a tokenizer whose token i is byte i, as `ByteTokenizer`, in the format of the `tokenizers` package."""
        tokenizers = _import_tokenizers()
        # Names of bytes as in GPT-2: printable ones are themselves, the others follow from U+0100 on.
        printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
        hidden = [byte for byte in range(256) if byte not in printable]
        vocabulary = {chr(byte if byte in printable else 256 + hidden.index(byte)): byte for byte in range(256)}
        inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
        return cls(inner)

    def encode(self, text: str, *, special: bool = True) -> np.ndarray:
        """Tokens [N], uint16 or, past 65536 tokens, int32; `special` adds those that begin or end every text.

        Raises:
          NoSuchToken: the model has no such token.
        """
        ids = self._inner.encode(text, add_special_tokens=special).ids
        if self.limit is not None and max(ids, default=0) >= self.limit:
            beyond = max(ids)
            raise NoSuchToken(
                f"the text has {self.name_of(beyond)!r}, which is token {beyond} of the tokenizer; "
                f"the model has tokens 0..{self.limit - 1}"
            )
        return np.asarray(ids, self._dtype)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokens of each text, on all cores, without the special tokens that a template would put around it."""
        found = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(one.ids, self._dtype) for one in found]

    def token_of(self, name: str) -> int | None:
        """Number of a token by its name in the vocabulary; None if there is none."""
        return self._inner.token_to_id(name)

    def decode(self, tokens: np.ndarray) -> str:
        """Text of tokens [N]; bytes that are not UTF-8 become replacement characters."""
        return self._inner.decode(np.asarray(tokens).tolist())

    def name_of(self, token: int) -> str:
        """A token as the vocabulary has it."""
        return self._inner.id_to_token(token)

    def to_json(self) -> str:
        """The tokenizer in the JSON format of the `tokenizers` package."""
        return self._inner.to_str()

    def save(self, path: str | os.PathLike) -> None:
        """Write the JSON format of the `tokenizers` package, in one step."""
        temporary = Path(f"{path}.{uuid.uuid4().hex}.tmp")
        self._inner.save(str(temporary))
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "BPETokenizer":
        """Read a tokenizer in the JSON format of the `tokenizers` package, with the tokens that files beside it name.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is no such tokenizer.
        """
        package = _import_tokenizers()
        read_object(path)
        try:
            inner = package.Tokenizer.from_file(str(path))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the package raises bare ones, and panics that are no Exception
            raise ValueError(f"{path} is no tokenizer of the `tokenizers` package: {error}") from error
        own = cls(inner).vocab_size
        add_named(inner, Path(path).parent)
        found = cls(inner)
        found.own_size = own
        return found


TOKENIZERS = {"bytes": ByteTokenizer, "bpe": BPETokenizer}
# Between a prompt and what follows it; no byte of UTF-8.
PROMPT = b"\xff"
# Tokens that end a text, by the name that families of models give them; of a file without tokenizer_config.json.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
SPLITS = ("train", "validation", "test")
# Of `overlap`.
CHUNK = 1 << 17  # tokens hashed at once
FACTOR = 0x9E3779B97F4A7C15
SAMPLE = 8  # of so many n-grams one is looked up


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("tokenizer 'bpe' needs the extra `data`: pip install 'tessera-jax[data]'") from error
    return tokenizers


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json, or that of a directory: one of the `tokenizers` package, or the marker of bytes.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no tokenizer.
    """
    path = local(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such tokenizer; bytes, bpe, ids, a tokenizer.json or a directory with one")
    own = "tessera_tokenizer" in read_object(path)
    return ByteTokenizer.load(path) if own else BPETokenizer.load(path)


def separator_of(tokenizer: Tokenizer, path: str = "", name: str = "") -> int:
    """The token between two documents.

    Args:
      tokenizer: whose token it is.
      path: file or directory of the tokenizer, whose tokenizer_config.json may name the token; "" for bytes and BPE
        trained here, where it is byte 0.
      name: the token by name; "" is the tokenizer's end of text.

    Raises:
      ConfigError: there is no such token, or the tokenizer has no end of text.
    """
    if not name and (not path or isinstance(tokenizer, ByteTokenizer)):
        return int(tokenizer.encode("\0")[0])
    if isinstance(tokenizer, ByteTokenizer):
        raise ConfigError(f"config.data.separator={name!r}: bytes have none but byte 0, the default")
    assert isinstance(tokenizer, BPETokenizer)
    names = (name,) if name else (*_end_of_text(path), *ENDS)
    found = [token for one in names if (token := tokenizer.token_of(one)) is not None]
    if not found:
        what = f"{name!r} is no token of it" if name else f"it has none of {', '.join(ENDS)}"
        raise ConfigError(f"config.data.separator: the token between documents must be one of {path or 'bpe'}: {what}")
    return found[0]


def _end_of_text(path: str) -> Iterator[str]:
    place = local(path)
    token = text_of(read_settings(place if place.is_dir() else place.parent).get("eos_token"))
    if token is not None:
        yield token


@dataclass(frozen=True)
class TextConfig:
    """Which text to train on and how to cut it into tokens.

    Attributes:
      name: "stdlib" (the sources of the running Python's standard library: about 10 MB, always there),
        "tinyshakespeare", a path, a glob ("books/**/*.txt") or the URL of one (s3://, gs://): UTF-8 files, a document
        each; rows of .jsonl (also .gz, .zst) or .parquet; a directory saved by `datasets`, or "datasets:NAME"; token
        files (.npy, .bin with a description, Megatron's .bin / .idx, a directory of `tessera tokenize`).
      dir: directory that a relative path or glob starts from, or that holds tinyshakespeare.txt ("": working directory
        and the user's cache directory).
      tokenizer: "bytes", "bpe" (byte-level byte-pair encoding trained on the training split; extra `data`), a
        tokenizer.json, a directory that has one, or "ids" (token files without a tokenizer). Token files whose
        description names a tokenizer have that one.
      vocab_size: 256 for bytes; tokens to learn for bpe, from 256 up; the vocabulary of ids that no description has.
      max_bytes: at most so much text over all splits, each keeping its share; 0 is all.
      validation: share of the documents (of the text, if it is a single file) held out for validation.
      test: the same for testing.
      column: key of the text in JSON lines, column of it in Parquet and `datasets`.
      prompt: key or column of a text before it, whose tokens do not count in the loss (instruction tuning); "" has
        none. Such documents are packed.
      packing: "" trains on windows of the stream, in which attention crosses documents. With "concatenate" and
        "best_fit" positions restart in every document, attention and loss stop at its end: the same windows, or rows
        whose documents are whole where they fit, with padding; see `tessera.data.packing.Packed`.
      sources: (name, weight) of several texts in place of `name`; a weight is a share of the training windows.
      max_tokens: at most so many tokens over all splits, each keeping its share; 0 is all.
      separator: the token between documents, by name; "" is byte 0 or the tokenizer's end of text.
      overlap: tokens of the n-grams whose overlap of held-out and training text is printed at the start; -1 is 50 for
        bytes and 13 for other tokens, 0 leaves it out.
      overlap_limit: training tokens that are looked at for it, evenly spread; 0 is all.
    """

    name: str = "stdlib"
    dir: str = ""
    tokenizer: str = "bytes"
    vocab_size: int = 256
    max_bytes: int = 0
    validation: float = 0.05
    test: float = 0.05
    column: str = "text"
    prompt: str = ""
    packing: str = ""
    sources: tuple[tuple[str, float], ...] = ()
    max_tokens: int = 0
    separator: str = ""
    overlap: int = -1
    overlap_limit: int = 1 << 23

    def __post_init__(self):
        if not (self.tokenizer in (*TOKENIZERS, "ids") or self.from_file):
            raise ValueError(
                f"tokenizer={self.tokenizer!r}: choose one of {', '.join(TOKENIZERS)}, ids, a tokenizer.json or a "
                "directory that has one"
            )
        if self.tokenizer == "bytes" and self.vocab_size != 256:
            raise ValueError(f"vocab_size={self.vocab_size}: 'bytes' has exactly 256; 'bpe' can have more")
        if self.from_file and self.vocab_size != 256:
            raise ValueError(f"vocab_size={self.vocab_size}: {self.tokenizer} has its own; leave it out")
        if self.vocab_size < (1 if self.tokenizer == "ids" else 256):
            raise ValueError(f"vocab_size={self.vocab_size}: bpe starts from the 256 bytes, so at least 256")
        if min(self.max_bytes, self.max_tokens) < 0:
            raise ValueError(f"max_bytes={self.max_bytes} and max_tokens={self.max_tokens} must be 0 (all) or more")
        if min(self.validation, self.test) < 0 or self.validation + self.test >= 1:
            raise ValueError(f"validation={self.validation} and test={self.test} must be shares with a sum below 1")
        if self.packing not in ("", *METHODS):
            raise ValueError(f"packing={self.packing!r}: choose one of {', '.join(METHODS)}, or '' for none")
        if self.prompt and not self.packing:
            raise ValueError(f"prompt={self.prompt!r} needs documents with ends: packing={' or '.join(METHODS)}")
        if self.overlap < -1 or self.overlap_limit < 0:
            raise ValueError(f"overlap={self.overlap} must be -1 or more, overlap_limit={self.overlap_limit} 0 or more")
        if any(not 0 < weight < math.inf for _, weight in self.sources):
            raise ValueError(f"sources={self.sources}: weights must be above 0")

    @property
    def from_file(self) -> bool:
        """Whether the tokenizer is a file's."""
        name = self.tokenizer
        return "/" in name or name.endswith(".json") or (bool(name) and Path(name).is_dir())

    @property
    def shares(self) -> dict[str, float]:
        """Share of every split."""
        return {"train": 1 - self.validation - self.test, "validation": self.validation, "test": self.test}


class TextSplits(NamedTuple):
    """Three disjoint token streams [N], documents joined by the token of byte 0, or the tokenizer's end of text.

    Attributes:
      train, validation, test: arrays, or `tessera.data.token_files.TokenStream` of token files.
      vocab_size: tokens are below it.
      content_hash: sha256 (hex) of the three texts as they were split, before tokenizing: two runs with the same hash
        saw the same text. Of token files it is that of their tokens, or of samples of them.
      tokenizer: None where token files have none.
      bytes_per_token: bytes of UTF-8 per token by split, where they are known.
      parts: the training stream and weight of every source, where there are several.
      documents: those of each split, then, as "train 0", "train 1", ..., of each part; empty without packing.
    """

    train: Any
    validation: Any
    test: Any
    vocab_size: int
    content_hash: str
    tokenizer: Tokenizer | None
    bytes_per_token: Mapping[str, float] = {}
    parts: tuple[tuple[Any, float], ...] = ()
    documents: Mapping[str, Documents] = {}

    def packed(self, length: int, method: str) -> "TextSplits":
        """The same with rows of `length` inputs, `tessera.data.packing.Packed`, in place of the streams.

        Raises:
          ConfigError: of a split no document has two tokens.
        """
        streams = {split: getattr(self, split) for split in SPLITS}
        streams |= {f"train {i}": stream for i, (stream, _) in enumerate(self.parts)}
        try:
            rows = {
                name: Packed(stream, self.documents[name], length, method) if len(stream) else stream
                for name, stream in streams.items()
            }
        except ValueError as error:
            raise ConfigError(f"config.data.packing={method!r}: {error}") from None
        parts = tuple((rows[f"train {i}"], weight) for i, (_, weight) in enumerate(self.parts))
        return self._replace(train=rows["train"], validation=rows["validation"], test=rows["test"], parts=parts)


def load_text(config: TextConfig) -> TextSplits:
    """Read the text, split it and tokenize it.

    Several files are split by file: a hash of each path, relative to where the search for files began, decides, so a
    file stays in its split when others come and go. Rows, and documents of token files, are split by a hash of their
    text (Megatron's by their number), so equal ones are in one split. A single file is cut into a beginning for
    training, then validation, then test, as is a token file whose documents are not known.

    Raises:
      ValueError: a name that matches no file, a file that is not UTF-8, or a split without text; ConfigError for rows,
        token files and tokenizers.
      DataUnavailable: tinyshakespeare, if it is neither on disk nor downloadable.
      ImportError: a package of the extra `data` is missing.
    """
    names = [name for name, _ in config.sources] or [config.name]
    found = [_source(config, name) for name in names]
    texts = [one.texts for one in found if one.texts is not None]
    for one, name in zip(found, names, strict=True):
        for split in SPLITS:
            if config.shares[split] > 0 and not one.has(split):
                raise ValueError(f"no text for {split} from {name!r}: use more files, a single one, or {split}=0")
    content_hash = _joint_hash(found)
    tokenizer, vocab_size, end = _tokenizer(config, found, texts, content_hash)
    if config.from_file and tokenizer is not None:
        content_hash = hashlib.sha256(f"{content_hash} {_tokenizer_hash(tokenizer)}".encode()).hexdigest()
    made, documents = [], []
    for one in found:
        streams, text_bytes, within = one.streams(config, tokenizer, vocab_size, end)
        made.append((streams, text_bytes))
        documents.append(within)
    ratios = {}
    for split in SPLITS:
        tokens = sum(len(streams[split]) for streams, _ in made)
        sizes = [size for _, text_bytes in made if (size := text_bytes[split]) is not None]
        if not config.prompt and tokens and len(sizes) == len(made):
            ratios[split] = sum(sizes) / tokens
    capped = [{split: _cap(stream, config, split) for split, stream in streams.items()} for streams, _ in made]
    whole = {split: joined([streams[split] for streams in capped]) for split in SPLITS} if found[1:] else capped[0]
    weights = [weight for _, weight in config.sources]
    parts = tuple((streams["train"], w) for streams, w in zip(capped, weights, strict=True)) if weights else ()
    places: dict[str, Documents] = {}
    if config.packing:
        each = [
            {split: documents[i][split].first(len(stream)) for split, stream in streams.items()}
            for i, streams in enumerate(capped)
        ]
        places = {split: joined_documents([one[split] for one in each]) for split in SPLITS}
        places |= {f"train {i}": one["train"] for i, one in enumerate(each)}
    return TextSplits(
        **whole,
        vocab_size=vocab_size,
        content_hash=content_hash,
        tokenizer=tokenizer,
        bytes_per_token=ratios,
        parts=parts if len(parts) > 1 else (),
        documents=places,
    )


def _cap(stream: Any, config: TextConfig, split: str) -> Any:
    size = int(config.max_tokens * config.shares[split] / max(1, len(config.sources)))
    if not config.max_tokens or size >= len(stream):
        return stream
    return stream.first(size) if isinstance(stream, TokenStream) else stream[:size]


@dataclass(frozen=True)
class _Source:
    """One source as it was found: the texts of every split, or token files."""

    texts: dict[str, list[bytes]] | None = None
    files: tuple[TokenFile, ...] = ()
    ranges: dict[str, list] = field(default_factory=dict)
    text_bytes: dict[str, int | None] = field(default_factory=dict)
    sizes: dict[str, np.ndarray] | None = None

    def has(self, split: str) -> bool:
        if self.texts is not None:
            return any(self.texts[split])
        return any(len(starts) > 0 for _, starts, _ in self.ranges[split])

    def streams(
        self, config: TextConfig, tokenizer: Tokenizer | None, vocab_size: int, end: int
    ) -> tuple[dict[str, Any], dict[str, int | None], dict[str, Documents]]:
        if self.texts is not None:
            assert tokenizer is not None
            sizes: dict[str, int | None] = {split: sum(map(len, texts)) for split, texts in self.texts.items()}
            made = {split: join_documents(tokenizer, texts, end) for split, texts in self.texts.items()}
            documents = {split: found for split, (_, found) in made.items()}
            return {split: tokens for split, (tokens, _) in made.items()}, sizes, documents
        if config.packing and self.sizes is None:
            raise ConfigError(
                f"config.data.packing={config.packing!r}: the documents of {self.files[0].path} are not known; "
                "tokenize the text with `tessera tokenize`"
            )
        maps = [(one.tokens, vocab_size, one.path) for one in self.files]
        streams = {split: TokenStream(maps, ranges) for split, ranges in self.ranges.items()}
        for split, stream in streams.items():
            last = [self.files[which].separator for which, starts, _ in self.ranges[split] if len(starts)]
            if last and last[-1] >= 0:  # between documents, not after the last, as in texts
                streams[split] = stream.first(len(stream) - 1)
        for stream in streams.values():
            stream.check_ends()
        within = {split: Documents(np.cumsum(sizes)) for split, sizes in (self.sizes or {}).items()}
        return streams, self.text_bytes, within


def _source(config: TextConfig, name: str) -> _Source:
    root, paths = _find(config, name)
    known = name in ("stdlib", "tinyshakespeare")
    tokens = [] if known else [path for path in paths if is_token_file(path)]
    if tokens:
        if len(tokens) < len(paths):
            raise ConfigError(
                f"{name!r} matches token files ({tokens[0]}) and others; give them as sources of their own"
            )
        if config.max_bytes:
            raise ConfigError(f"max_bytes={config.max_bytes}: token files ({tokens[0]}) are capped by max_tokens")
        # Both files of Megatron's pair match a glob.
        paths = list(dict.fromkeys(path.with_suffix(".bin") if path.suffix == ".idx" else path for path in tokens))
        paths = [path for path in paths if not path.name.endswith(".documents.bin")]
        return _token_source(config, [open_tokens(path) for path in paths])
    if not known and any(is_rows(path) for path in paths):
        rows = (row for path in paths for row in _rows(path, config.column, config.prompt))
        return _Source(_split_rows(rows, config))
    files = {path.relative_to(root).as_posix(): _read(path) for path in paths}
    return _Source(_split(dict(sorted(files.items())), config))


def _rows(path: Path | str, column: str, prompt: str = "") -> Iterator[bytes]:
    """Documents of a file: its rows, with the mark `PROMPT` behind a prompt, or the whole text."""
    if not is_rows(path):
        yield _read(Path(path))
        return
    for _, *texts in read_documents(path, column, prompt):
        yield PROMPT.join(text.encode() for text in texts)


def _token_source(config: TextConfig, files: Sequence[TokenFile]) -> _Source:
    ranges: dict[str, list] = {split: [] for split in SPLITS}
    sizes: dict[str, list[int | None]] = {split: [] for split in SPLITS}
    lengths: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for which, one in enumerate(files):
        starts = np.concatenate([[0], one.ends[:-1]])
        if len(one.ends) == 1:  # documents are not known
            cuts = np.round(len(one.tokens) * np.cumsum([0.0, *config.shares.values()])).astype(np.int64)
            for split, begin, end in zip(SPLITS, cuts[:-1], cuts[1:], strict=True):
                if end > begin:
                    ranges[split].append((which, np.array([begin]), np.array([end])))
                    sizes[split].append(None)
            continue
        hashes = one.hashes if one.hashes is not None else _mixed(np.arange(len(one.ends), dtype=np.uint64))
        place = hashes / 2.0**64
        split_of = np.where(place < config.validation, 1, np.where(place < config.validation + config.test, 2, 0))
        for number, split in enumerate(SPLITS):
            mine = split_of == number
            # Neighbors become one range.
            begins = starts[mine & ~np.concatenate([[False], mine[:-1]])]
            stops = one.ends[mine & ~np.concatenate([mine[1:], [False]])]
            if len(begins):
                ranges[split].append((which, begins, stops))
                lengths[split].append((one.ends - starts)[mine])
            sizes[split].append(None if one.text_bytes is None else int(one.text_bytes[mine].sum()))
    totals = {split: None if None in found else sum(found) for split, found in sizes.items()}  # type: ignore[arg-type]
    known = config.packing and all(len(one.ends) > 1 for one in files)
    within = {split: np.concatenate([np.zeros(0, np.int64), *found]) for split, found in lengths.items()}
    return _Source(None, tuple(files), ranges, totals, within if known else None)


def _mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele et al. 2014), uint64 [N]."""
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def document_hash(text: bytes) -> int:
    """64 bits of a text: which split it is in, and whether it was seen before."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _split_rows(rows: Iterable[bytes], config: TextConfig) -> dict[str, list[bytes]]:
    splits: dict[str, list[bytes]] = {name: [] for name in SPLITS}
    left = {name: int(config.max_bytes * share) for name, share in config.shares.items()}
    for text in rows:
        place = document_hash(text) / 2**64
        held_out = "validation" if place < config.validation else "test"
        name = held_out if place < config.validation + config.test else "train"
        if config.max_bytes:
            if left[name] <= 0:
                if max(left.values()) <= 0:
                    break
                continue
            text = _prefix(text, left[name])
            left[name] -= len(text) + 1
        splits[name].append(text)
    return splits


def _tokenizer(
    config: TextConfig, found: Sequence[_Source], texts: Sequence[dict[str, list[bytes]]], content_hash: str
) -> tuple[Tokenizer | None, int, int]:
    """The tokenizer (None: token files have none), the size of the vocabulary and the separator of texts."""
    files = [one for source in found for one in source.files]
    named = sorted({one.tokenizer for one in files if one.tokenizer})
    sizes = sorted({one.vocab_size for one in files if one.vocab_size})
    tokenizer: Tokenizer | None = None
    path = ""
    if texts and config.tokenizer == "ids":
        raise ConfigError("config.data.tokenizer='ids': text needs a tokenizer; bytes, bpe or a tokenizer.json")
    if config.from_file or (named and not texts):
        path = config.tokenizer if config.from_file else named[0]
        tokenizer = load_tokenizer(path)
    elif config.tokenizer == "bpe" and texts:
        documents = [document.replace(PROMPT, b"") for one in texts for document in one["train"]]
        tokenizer = _trained_bpe(documents, content_hash, config.vocab_size)
    elif config.tokenizer == "bytes" and (texts or not sizes):
        tokenizer = ByteTokenizer()
    if tokenizer is not None:
        sizes = sorted({*sizes, tokenizer.vocab_size})
    elif not sizes:
        sizes = [config.vocab_size]
    if len(sizes) > 1:
        raise ConfigError(
            f"config.data: vocabularies of {' and '.join(map(str, sizes))} tokens; sources and config.data.tokenizer "
            "must have one tokenizer"
        )
    end = separator_of(tokenizer, path, config.separator) if tokenizer is not None and texts else -1
    return tokenizer, sizes[0], end


def _tokenizer_hash(tokenizer: Tokenizer) -> str:
    text = tokenizer._inner.to_str() if isinstance(tokenizer, BPETokenizer) else "bytes"
    return hashlib.sha256(text.encode()).hexdigest()


def _joint_hash(found: Sequence[_Source]) -> str:
    if len(found) == 1 and found[0].texts is not None:
        return _hash(found[0].texts)
    digest = hashlib.sha256()
    for one in found:
        if one.texts is not None:
            digest.update(_hash(one.texts).encode())
        for file in one.files:
            digest.update(file.fingerprint.encode())
        for ranges in one.ranges.values():
            for _, starts, ends in ranges:
                digest.update(np.stack([starts, ends]).astype("<i8").tobytes())
    return digest.hexdigest()


def read_texts(config: TextConfig) -> list[str]:
    """Read the documents of a text as they are: no split, no tokens; with `max_bytes` the first whole ones that fit.

    Raises:
      ValueError, DataUnavailable: see `load_text`; a token file, whose text is not known.
    """
    texts: list[str] = []
    size = 0
    _, paths = _find(config, config.name)
    for path in sorted(paths):
        if config.name not in ("stdlib", "tinyshakespeare") and is_token_file(path):
            raise ConfigError(f"{path} holds tokens, not text; name the text that they were made from")
        for document in _rows(path, config.column):
            size += len(document)
            if config.max_bytes and size > config.max_bytes and texts:
                return texts
            texts.append(document.decode())
    return texts


def _hash(splits: dict[str, list[bytes]]) -> str:
    digest = hashlib.sha256()
    for documents in splits.values():
        digest.update(len(documents).to_bytes(8, "big"))
        for document in documents:
            # Lengths go in too: moving a boundary between documents or splits is another content.
            digest.update(len(document).to_bytes(8, "big"))
            digest.update(document)
    return digest.hexdigest()


def find_documents(config: TextConfig) -> Iterator[tuple[str, bytes]]:
    """Iterate over (source, text) of all sources of a corpus, in a fixed order: that of names, then of rows.

    Raises:
      ValueError: as of `load_text`; ConfigError for token files.
    """
    for name in [name for name, _ in config.sources] or [config.name]:
        for path in sorted(_find(config, name)[1]):
            if is_token_file(path):
                raise ConfigError(f"{path}: a token file; text is needed")
            for document in _rows(path, config.column):
                yield str(path), document


def batched_by_size(
    documents: Iterable[Any], size: int = 1 << 22, size_of: Callable[[Any], int] = len
) -> Iterator[list[Any]]:
    """Lists of documents with at least `size` bytes together, the last list with what is left."""
    batch: list[Any] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += size_of(document)
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def join_documents(tokenizer: Tokenizer, documents: Sequence[bytes], end: int) -> tuple[np.ndarray, Documents]:
    """The documents as one stream with the separator between them, and where they are; prompts end with `PROMPT`."""
    empty = tokenizer.encode_documents([""])[0]
    separator = np.array([end], empty.dtype)
    streams = [empty[:0]]
    sizes, prompts = [], []
    for batch in batched_by_size(documents):
        cut = [document.split(PROMPT) for document in batch]
        encoded = iter(tokenizer.encode_documents([text.decode() for texts in cut for text in texts]))
        for texts in cut:
            tokens = [next(encoded) for _ in texts]
            streams += [*tokens, separator]
            sizes.append(sum(map(len, tokens)) + 1)
            prompts.append(len(tokens[0]) if len(tokens) > 1 else 0)
    ends = np.cumsum(np.array(sizes, np.int64))
    counted = ends - sizes + prompts if any(prompts) else None
    found = np.concatenate(streams)[:-1] if len(streams) > 1 else streams[0]
    return found, Documents(np.minimum(ends, len(found)), counted)


def _trained_bpe(documents: Sequence[bytes], content_hash: str, vocab_size: int) -> BPETokenizer:
    path = cache_dir() / "tokenizers" / f"bpe-{vocab_size}-{content_hash[:32]}.json"
    if path.exists():
        return BPETokenizer.load(path)
    tokenizer = BPETokenizer.train([document.decode() for document in documents], vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(path)
    return tokenizer


def _find(config: TextConfig, name: str) -> tuple[Path, list]:
    """Where the search for files began, and the files of a source."""
    if name == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return root, _stdlib_sources(root)
    if name == "tinyshakespeare":
        paths = fetch([TINYSHAKESPEARE], config.dir, name="tinyshakespeare")
        return paths[0].parent, paths
    if name.startswith(HUB):
        return Path(), [name]
    return _user_files(config, name)


def _stdlib_sources(root: Path) -> list[Path]:
    """The library's modules, without tests, generated help texts, installed packages and machine descriptions."""
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
    paths = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in skipped and not s.startswith("config-")]
        paths += [Path(folder, f) for f in files if f.endswith(".py")]
    machine = ("_sysconfig", "sitecustomize", "usercustomize")
    return [path for path in paths if not path.name.startswith(machine)]


def _user_files(config: TextConfig, name: str) -> tuple[Path, list[Path]]:
    if is_url(name) or is_url(config.dir):
        pattern = local(name if is_url(name) else f"{config.dir}/{name}")
    else:
        pattern = Path(config.dir).expanduser() / Path(name).expanduser()
    if pattern.is_file() or is_saved_dataset(pattern) or is_token_file(pattern):
        return pattern.parent, [pattern]
    paths = [Path(match) for match in sorted(glob.glob(str(pattern), recursive=True))]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        close = difflib.get_close_matches(name, ["stdlib", "tinyshakespeare"], 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        folder = f" (a directory: for its files, write {name}/**/*.txt)" if pattern.is_dir() else ""
        raise ValueError(
            f"no text file matches {str(pattern)!r}{folder}: {hint}"
            "give 'stdlib', 'tinyshakespeare', a file (.txt, .jsonl, .parquet, .npy, .bin), or a glob such as "
            "'books/**/*.txt'"
        )
    fixed = next((i for i, part in enumerate(pattern.parts) if glob.has_magic(part)), len(pattern.parts))
    return Path(*pattern.parts[:fixed]), paths


def _read(path: Path) -> bytes:
    data = path.read_bytes()
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {data[error.start]:#04x} at {error.start}") from error
    return data


def _split(documents: dict[str, bytes], config: TextConfig) -> dict[str, list[bytes]]:
    shares = config.shares
    if len(documents) == 1:
        (text,) = documents.values()
        text = _prefix(text, config.max_bytes) if config.max_bytes else text
        begin = len(_prefix(text, round(len(text) * shares["train"])))
        middle = len(_prefix(text, round(len(text) * (1 - config.test))))
        return {"train": [text[:begin]], "validation": [text[begin:middle]], "test": [text[middle:]]}
    splits: dict[str, list[bytes]] = {name: [] for name in shares}
    for path, text in documents.items():
        place = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64
        # Held-out files come first on the line from 0 to 1: moving one share's boundary moves few files.
        held_out = "validation" if place < config.validation else "test"
        splits[held_out if place < config.validation + config.test else "train"].append(text)
    if config.max_bytes:
        splits = {name: _capped(parts, int(config.max_bytes * shares[name])) for name, parts in splits.items()}
    return splits


def _capped(documents: Sequence[bytes], size: int) -> list[bytes]:
    """The first documents, `size` bytes of them with the separators; the last one is cut short."""
    kept = []
    for document in documents:
        if size <= 0:
            break
        kept.append(_prefix(document, size))
        size -= len(kept[-1]) + 1
    return kept


def _prefix(data: bytes, size: int) -> bytes:
    """At most `size` bytes, cut between two characters of UTF-8 (whose later bytes are 10xxxxxx)."""
    while 0 < size < len(data) and data[size] & 0xC0 == 0x80:
        size -= 1
    return data[:size]


def ngram_hashes(tokens: np.ndarray, n: int) -> np.ndarray:
    """Hashes uint64 [N - n + 1] of all n-grams of tokens [N], by doubling: h(a + b) = h(a) * factor^|b| + h(b).

    Example:
      >>> a = ngram_hashes(np.array([7, 1, 2, 3, 9, 1, 2, 3]), 3)
      >>> bool(a[1] == a[5]), len(set(a.tolist()))
      (True, 5)
    """
    if len(tokens) < n:
        return np.zeros(0, np.uint64)
    power = tokens.astype(np.uint64) + np.uint64(1)  # of length 1, 2, 4, ...
    found, have, size, rest = power[:0], 0, 1, n
    while True:
        if rest & 1:
            if not have:
                found, have = power, size
            else:
                longer = power[have:]
                found, have = found[: len(longer)] * _factor(size) + longer, have + size
        rest >>= 1
        if not rest:
            break
        power = power[: len(power) - size] * _factor(size) + power[size:]
        size *= 2
    x = found[: len(tokens) - n + 1]
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # low bits of a polynomial depend on low bits only
    return x ^ (x >> np.uint64(31))


def _factor(size: int) -> np.uint64:
    return np.uint64(pow(FACTOR, size, 2**64))


def _sampled_ngrams(tokens: Any, start: int, stop: int, n: int) -> Iterator[np.ndarray]:
    """Hashes of a sample of the n-grams that begin in [start, stop), a chunk at a time."""
    for begin in range(start, stop, CHUNK):
        end = min(begin + CHUNK, stop)
        hashes = ngram_hashes(np.asarray(tokens[begin : min(end + n - 1, len(tokens))]), n)
        yield hashes[hashes % np.uint64(SAMPLE) == 0]


def overlap(train: Any, held_out: Mapping[str, Any], n: int, limit: int) -> tuple[dict[str, float], float]:
    """Share of the n-grams of held-out tokens that are in the training tokens, and the share of training looked at.

    See Brown et al. (2020), appendix C. N-grams are compared by 64-bit polynomials of their tokens; those whose hash
    divides by `SAMPLE` are looked up, the same ones on both sides, so the share is estimated without bias.

    Args:
      train: tokens [N], an array or `tessera.data.token_files.TokenStream`.
      held_out: tokens of several texts by name, likewise.
      n: tokens of an n-gram.
      limit: training tokens to look at, in evenly spread parts. The held-out n-grams are the first of each text, of an
        eighth as many tokens, at least `CHUNK`.
    """
    most, none = max(limit // 8, CHUNK), np.zeros(0, np.uint64)
    wanted = {
        name: np.concatenate([none, *_sampled_ngrams(tokens, 0, min(len(tokens), most), n)])
        for name, tokens in held_out.items()
    }
    distinct = np.unique(np.concatenate([none, *wanted.values()]))
    seen = np.zeros(len(distinct), bool)
    size = len(train)
    looked = min(limit, size)
    parts = max(1, looked // (8 * CHUNK))
    for begin in np.linspace(0, size - looked / parts, parts).astype(int).tolist():
        for hashes in _sampled_ngrams(train, begin, min(size, begin + -(-looked // parts)), n):
            found = np.unique(hashes)
            if len(found):
                seen |= found[np.minimum(np.searchsorted(found, distinct), len(found) - 1)] == distinct
    shares = {
        name: float(seen[np.searchsorted(distinct, hashes)].mean()) if len(hashes) else 0.0
        for name, hashes in wanted.items()
    }
    return shares, looked / max(1, size)
