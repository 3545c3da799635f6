"""Text as tokens: UTF-8 files or Python's own library, split without leakage, in bytes or in byte-pair tokens."""

import difflib
import glob
import hashlib
import json
import os
import sysconfig
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer

from tessera.data.download import Remote, fetch
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


class BPETokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016; on bytes as in GPT-2, Radford et al. 2019, section 2.2)."""

    def __init__(self, inner: Any):
        self._inner = inner  # a tokenizers.Tokenizer
        self.vocab_size: int = inner.get_vocab_size()

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
        """Tokens [N], uint16 or, past 65536 tokens, int32; `special` adds those that begin or end every text."""
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.int32
        return np.asarray(self._inner.encode(text, add_special_tokens=special).ids, dtype)

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
        """Read a byte-level BPE tokenizer in the JSON format of the `tokenizers` package.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is no such tokenizer.
        """
        package = _import_tokenizers()
        read_object(path)
        try:
            return cls(package.Tokenizer.from_file(str(path)))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the package raises bare ones, and panics that are no Exception
            raise ValueError(f"{path} is no tokenizer of the `tokenizers` package: {error}") from error


TOKENIZERS = {"bytes": ByteTokenizer, "bpe": BPETokenizer}


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("tokenizer 'bpe' needs the extra `data`: pip install 'tessera-jax[data]'") from error
    return tokenizers


@dataclass(frozen=True)
class TextConfig:
    """Which text to train on and how to cut it into tokens.

    Attributes:
      name: "stdlib" (the sources of the running Python's standard library: about 10 MB, always there),
        "tinyshakespeare", a path, a glob ("books/**/*.txt") or the URL of one (s3://, gs://) of UTF-8 files.
      dir: directory that a relative path or glob starts from, or that holds tinyshakespeare.txt ("": working directory
        and the user's cache directory).
      tokenizer: "bytes" or "bpe" (byte-level byte-pair encoding trained on the training split; extra `data`).
      vocab_size: 256 for bytes; tokens to learn for bpe, from 256 up.
      max_bytes: at most so much text over all splits, each keeping its share; 0 is all.
      validation: share of the files (of the text, if it is a single file) held out for validation.
      test: the same for testing.
    """

    name: str = "stdlib"
    dir: str = ""
    tokenizer: str = "bytes"
    vocab_size: int = 256
    max_bytes: int = 0
    validation: float = 0.05
    test: float = 0.05

    def __post_init__(self):
        if self.tokenizer not in TOKENIZERS:
            raise ValueError(f"tokenizer={self.tokenizer!r}: choose one of {', '.join(TOKENIZERS)}")
        if self.tokenizer == "bytes" and self.vocab_size != 256:
            raise ValueError(f"vocab_size={self.vocab_size}: 'bytes' has exactly 256; 'bpe' can have more")
        if self.vocab_size < 256:
            raise ValueError(f"vocab_size={self.vocab_size}: bpe starts from the 256 bytes, so at least 256")
        if self.max_bytes < 0:
            raise ValueError(f"max_bytes={self.max_bytes} must be 0 (all) or more")
        if min(self.validation, self.test) < 0 or self.validation + self.test >= 1:
            raise ValueError(f"validation={self.validation} and test={self.test} must be shares with a sum below 1")


class TextSplits(NamedTuple):
    """Three disjoint token streams [N], documents joined by the token of byte 0.

    `content_hash` is the sha256 (hex) of the three texts as they were split, before tokenizing: two runs with the same
    hash saw the same text.
    """

    train: Integer[np.ndarray, " train"]
    validation: Integer[np.ndarray, " validation"]
    test: Integer[np.ndarray, " test"]
    vocab_size: int
    content_hash: str
    tokenizer: Tokenizer


def load_text(config: TextConfig) -> TextSplits:
    """Read the text, split it and tokenize it.

    Several files are split by file: a hash of each path, relative to where the search for files began, decides, so a
    file stays in its split when others come and go. A single file is cut into a beginning for training, then
    validation, then test.

    Raises:
      ValueError: a name that matches no file, a file that is not UTF-8, or a split without text.
      DataUnavailable: tinyshakespeare, if it is neither on disk nor downloadable.
      ImportError: tokenizer "bpe" without the extra `data`.
    """
    splits = _split(_documents(config), config)
    for name, documents in splits.items():
        share = getattr(config, name, 1)
        if share > 0 and not any(documents):
            raise ValueError(f"no text for {name} from {config.name!r}: use more files, a single one, or {name}=0")
    content_hash = _hash(splits)
    if config.tokenizer == "bytes":
        tokenizer: Tokenizer = ByteTokenizer()
    else:
        tokenizer = _trained_bpe(splits["train"], content_hash, config.vocab_size)
    streams = {name: _tokens(tokenizer, documents) for name, documents in splits.items()}
    return TextSplits(**streams, vocab_size=tokenizer.vocab_size, content_hash=content_hash, tokenizer=tokenizer)


def read_texts(config: TextConfig) -> list[str]:
    """Read the documents of a text as they are: no split, no tokens; with `max_bytes` the first whole ones that fit.

    Raises:
      ValueError, DataUnavailable: see `load_text`.
    """
    texts: list[str] = []
    size = 0
    for document in _documents(config).values():
        size += len(document)
        if config.max_bytes and size > config.max_bytes and texts:
            break
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


def _tokens(tokenizer: Tokenizer, documents: Sequence[bytes]) -> np.ndarray:
    """The documents as one stream with the separator between them."""
    separator = tokenizer.encode("\0")  # one token in either vocabulary
    streams = [tokenizer.encode("")]
    for document in documents:
        streams += [tokenizer.encode(document.decode()), separator]
    return np.concatenate(streams)[: -len(separator)]


def _trained_bpe(documents: Sequence[bytes], content_hash: str, vocab_size: int) -> BPETokenizer:
    path = cache_dir() / "tokenizers" / f"bpe-{vocab_size}-{content_hash[:32]}.json"
    if path.exists():
        return BPETokenizer.load(path)
    tokenizer = BPETokenizer.train([document.decode() for document in documents], vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(path)
    return tokenizer


def _documents(config: TextConfig) -> dict[str, bytes]:
    """Relative path -> contents, sorted by path."""
    if config.name == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = _stdlib_sources(root)
    elif config.name == "tinyshakespeare":
        paths = fetch([TINYSHAKESPEARE], config.dir, name="tinyshakespeare")
        root = paths[0].parent
    else:
        root, paths = _user_files(config)
    documents = {path.relative_to(root).as_posix(): _read(path) for path in paths}
    return dict(sorted(documents.items()))


def _stdlib_sources(root: Path) -> list[Path]:
    """The library's modules, without tests, generated help texts, installed packages and machine descriptions."""
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
    paths = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in skipped and not s.startswith("config-")]
        paths += [Path(folder, f) for f in files if f.endswith(".py")]
    machine = ("_sysconfig", "sitecustomize", "usercustomize")
    return [path for path in paths if not path.name.startswith(machine)]


def _user_files(config: TextConfig) -> tuple[Path, list[Path]]:
    """Where the search began, and the files found."""
    if is_url(config.name) or is_url(config.dir):
        pattern = local(config.name if is_url(config.name) else f"{config.dir}/{config.name}")
    else:
        pattern = Path(config.dir).expanduser() / Path(config.name).expanduser()
    if pattern.is_file():
        return pattern.parent, [pattern]
    paths = [Path(match) for match in glob.glob(str(pattern), recursive=True)]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        close = difflib.get_close_matches(config.name, ["stdlib", "tinyshakespeare"], 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        folder = f" (a directory: for its files, write {config.name}/**/*.txt)" if pattern.is_dir() else ""
        raise ValueError(
            f"no text file matches {str(pattern)!r}{folder}: {hint}"
            "give 'stdlib', 'tinyshakespeare', a file, or a glob such as 'books/**/*.txt'"
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
    shares = {"train": 1 - config.validation - config.test, "validation": config.validation, "test": config.test}
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
