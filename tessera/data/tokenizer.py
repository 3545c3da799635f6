"""Tokenizers: text to integers and back without loss."""

import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np


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
        """Check the marker; ValueError if the file holds another tokenizer."""
        if json.loads(Path(path).read_text(encoding="utf-8")).get("tessera_tokenizer") != "bytes":
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

    def encode(self, text: str) -> np.ndarray:
        """Tokens [N], uint16 or, past 65536 tokens, int32."""
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.int32
        return np.asarray(self._inner.encode(text).ids, dtype)

    def decode(self, tokens: np.ndarray) -> str:
        """Text of tokens [N]; bytes that are not UTF-8 become replacement characters."""
        return self._inner.decode(np.asarray(tokens).tolist())

    def save(self, path: str | os.PathLike) -> None:
        """Write the JSON format of the `tokenizers` package, in one step."""
        temporary = Path(f"{path}.{uuid.uuid4().hex}.tmp")
        self._inner.save(str(temporary))
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "BPETokenizer":
        """Read a byte-level BPE tokenizer in the JSON format of the `tokenizers` package."""
        return cls(_import_tokenizers().Tokenizer.from_file(str(path)))


TOKENIZERS = {"bytes": ByteTokenizer, "bpe": BPETokenizer}


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("tokenizer 'bpe' needs the extra `data`: pip install 'tessera-jax[data]'") from error
    return tokenizers
