"""Token files of any size: .npy, raw integers with a description, and Megatron's .bin / .idx, memory-mapped.

A raw file X.bin has its description beside it, X.json: {"dtype": "uint16", "vocab_size": 50257} and, where known,
"tokens" (their number), "separator" (the token after every document), "tokenizer" (a file beside it) and "sha256". The
documents of X.bin may be in X.documents.bin: int64 [N, 3], the end of each, a hash of its text, and the text's bytes.
`tessera tokenize` writes all of these into one directory.
"""

import copy
import hashlib
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from tessera.infra.errors import ConfigError
from tessera.infra.logger import read_object

DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")
# Codes of Megatron's index files.
MEGATRON = {1: "uint8", 4: "int32", 5: "int64", 8: "uint16"}
MAGIC = b"MMIDIDX\x00\x00"
NAME = "tokens"  # of the files in a directory that `tessera tokenize` writes
PAGES = 1 << 16  # bytes that the kernel maps around a byte that is read
RELEASE = 1 << 28  # mapped bytes after which a stream lets them go
PROBE = 1 << 16  # tokens at either end of a stream that are checked before training


@dataclass(frozen=True)
class TokenFile:
    """One open token file.

    Attributes:
      path: of the tokens.
      tokens: the memory map.
      ends: end of every document, ascending, or one end where documents are not known.
      hashes: uint64 of every document's text, None where they are not known.
      text_bytes: bytes of every document's text, None where they are not known.
      vocab_size: size of the vocabulary; 0 where no description says.
      separator: the token after every document, -1 where there is none or none is known.
      tokenizer: path of the tokenizer, "" where no description says.
      fingerprint: sha256 (hex) of the tokens, or of samples of them where no description has it.
    """

    path: Path
    tokens: np.ndarray
    ends: Int64[np.ndarray, " N"]
    hashes: np.ndarray | None = None
    text_bytes: Int64[np.ndarray, " N"] | None = None
    vocab_size: int = 0
    separator: int = -1
    tokenizer: str = ""
    fingerprint: str = field(default="", repr=False)


def is_token_file(path: Path | str) -> bool:
    """Whether a path is of tokens: .npy, .bin, .idx, or a directory that `tessera tokenize` writes."""
    path = Path(path)
    return path.suffix in (".npy", ".bin", ".idx") or (path / f"{NAME}.bin").is_file()


def open_tokens(path: Path | str) -> TokenFile:
    """Open a token file; none of it is read but its ends.

    Raises:
      ConfigError: a file that is absent, truncated, of another type or shape, or that nothing describes.
    """
    path = Path(path)
    if path.is_dir():
        path = path / f"{NAME}.bin"
    if path.suffix == ".idx":
        path = path.with_suffix(".bin")
    if not path.is_file():
        raise ConfigError(f"{path}: no such token file")
    if path.suffix == ".npy":
        return _open_npy(path)
    if path.with_suffix(".json").is_file():
        return _open_raw(path, _description(path.with_suffix(".json")))
    if path.with_suffix(".idx").is_file():
        return _open_megatron(path)
    if (path.parent / "progress.json").is_file():
        raise ConfigError(f"{path}: tokenizing was not finished; run the same `tessera tokenize` again")
    raise ConfigError(
        f"{path}: neither {path.stem}.json nor Megatron's {path.stem}.idx is beside it; a description such as "
        '{"dtype": "uint16", "vocab_size": 50257} is needed in the former'
    )


def _description(path: Path) -> dict[str, Any]:
    found = read_object(path)
    if found.get("dtype") not in DTYPES:
        raise ConfigError(f"{path}: dtype={found.get('dtype')!r}: choose one of {', '.join(DTYPES)}")
    for name, least in (("vocab_size", 0), ("tokens", 0), ("separator", -1)):
        value = found.get(name, least)
        if type(value) is not int or not least <= value < 2**63:
            raise ConfigError(f"{path}: {name}={value!r}: a whole number of at least {least} is needed")
    for name in ("tokenizer", "sha256"):
        if not isinstance(found.get(name, ""), str):
            raise ConfigError(f"{path}: {name}={found[name]!r}: text is needed")
    return found


def _open_npy(path: Path) -> TokenFile:
    try:
        tokens = np.load(path, mmap_mode="r")
    except Exception as error:  # of NumPy, and of Python's parser of headers
        raise ConfigError(f"{path}: no .npy file, or a truncated one ({' '.join(str(error).split())})") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ConfigError(f"{path}: {tokens.dtype} of shape {tokens.shape}; tokens are integers [N]")
    beside = path.with_suffix(".json")
    said = _description(beside) if beside.is_file() else {}
    return _described(path, tokens, said)


def _open_raw(path: Path, said: dict[str, Any]) -> TokenFile:
    dtype, size = np.dtype(said["dtype"]).newbyteorder("<"), path.stat().st_size
    if size % dtype.itemsize:
        raise ConfigError(f"{path}: {size} bytes are no whole number of {dtype}; the file is truncated, or of another")
    return _described(path, _mapped(path, dtype), said)


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    if not path.stat().st_size:
        raise ConfigError(f"{path}: empty; at least one token is needed")
    return np.memmap(path, dtype, "r")


def _described(path: Path, tokens: np.ndarray, said: dict[str, Any]) -> TokenFile:
    if said.get("tokens", len(tokens)) != len(tokens):
        raise ConfigError(
            f"{path}: {len(tokens)} tokens, and {path.stem}.json says {said['tokens']}; the file is truncated"
        )
    ends, hashes, text_bytes = np.array([len(tokens)], np.int64), None, None
    beside = path.with_suffix(".documents.bin")
    if beside.is_file():
        table = np.fromfile(beside, "<i8")
        ends = table[0::3]
        if len(table) % 3 or not len(table) or ends[-1] != len(tokens) or (np.diff(ends, prepend=0) < 1).any():
            raise ConfigError(f"{beside}: no ends of the documents of {path.name}: it is damaged")
        hashes, text_bytes = table[1::3].view("<u8"), table[2::3]
    where = path.parent / said["tokenizer"] if said.get("tokenizer") else ""
    rest = {"vocab_size": said.get("vocab_size", 0), "separator": said.get("separator", -1), "tokenizer": str(where)}
    return TokenFile(path, tokens, ends, hashes, text_bytes, fingerprint=said.get("sha256") or _sampled(tokens), **rest)


def _open_megatron(path: Path) -> TokenFile:
    """Megatron's pair (megatron/core/datasets/indexed_dataset.py).

    The index is a header, the length and place of every sequence, and the first sequence of every document.
    """
    index = path.with_suffix(".idx")
    data = index.read_bytes()
    wrong = ConfigError(f"{index}: no Megatron index, or a truncated one")
    if len(data) < 34 or data[:9] != MAGIC or struct.unpack_from("<Q", data, 9) != (1,):
        raise wrong
    code, sequences, documents = struct.unpack_from("<BQQ", data, 17)
    if code not in MEGATRON:
        raise ConfigError(f"{index}: tokens of type code {code}; {', '.join(MEGATRON.values())} can be read")
    if len(data) < 34 + 12 * sequences + 8 * documents or not sequences or not documents:
        raise wrong
    lengths = np.frombuffer(data, "<i4", sequences, 34)
    places = np.frombuffer(data, "<i8", sequences, 34 + 4 * sequences)
    first = np.frombuffer(data, "<i8", documents, 34 + 12 * sequences)
    dtype = np.dtype(MEGATRON[code]).newbyteorder("<")
    ends = places // dtype.itemsize + lengths
    size = path.stat().st_size
    if ends[-1] * dtype.itemsize != size:
        raise ConfigError(f"{path}: {size} bytes, and its index says {ends[-1] * dtype.itemsize}; it is truncated")
    last = first[1:] - 1  # documents[i] is the number of the first sequence of document i
    if len(last) == 0 or last[-1] != sequences - 1 or (last < 0).any() or (last >= sequences).any():
        raise wrong
    if (np.diff(ends[last], prepend=0) < 1).any():
        raise wrong
    tokens = _mapped(path, dtype)
    return TokenFile(path, tokens, ends[last].astype(np.int64), fingerprint=_sampled(tokens))


def _sampled(tokens: np.ndarray) -> str:
    """A hash of size, type and 64 samples: a file of many gigabytes is not read through at every start."""
    digest = hashlib.sha256(f"{len(tokens)} {tokens.dtype.str}".encode())
    for start in np.linspace(0, max(0, len(tokens) - 4096), 64).astype(int):
        digest.update(np.ascontiguousarray(tokens[start : start + 4096]).tobytes())
    return digest.hexdigest()


class TokenStream:
    """Ranges of memory maps as one array of tokens, read where it is indexed.

    Indexing gives int32, by a slice without step or by an array of whole numbers.

    Args:
      files: memory maps, or other streams, with the vocabulary and the name of each for messages.
      ranges: (number of the file, starts [K], ends [K]) of what belongs to the stream, in this order.
    """

    dtype = np.dtype(np.int32)

    def __init__(
        self,
        files: Sequence[tuple[Any, int, Path]],
        ranges: Sequence[tuple[int, np.ndarray, np.ndarray]],
    ):
        self._files = list(files)
        self._which = np.concatenate([np.full(len(starts), which) for which, starts, _ in ranges] or [np.zeros(0, int)])
        starts = np.concatenate([starts for _, starts, _ in ranges] or [np.zeros(0, np.int64)])
        lengths = np.concatenate([ends - starts for _, starts, ends in ranges] or [np.zeros(0, np.int64)])
        self._ends = np.cumsum(lengths)
        self._shift = starts - (self._ends - lengths)
        self._size = int(self._ends[-1]) if len(self._ends) else 0
        self._mapped = 0

    def __len__(self) -> int:
        return self._size

    def first(self, size: int) -> "TokenStream":
        """The first `size` tokens of the stream."""
        found = copy.copy(self)
        found._size = max(0, min(size, self._size))
        return found

    def check_ends(self) -> None:
        """Raise ConfigError if tokens at either end are not in the vocabulary; others are checked as they are read."""
        for start in (0, max(0, self._size - PROBE)):
            self[start : start + PROBE]

    def __getitem__(self, index: Any) -> np.ndarray:
        if isinstance(index, slice):
            start, stop, step = index.indices(self._size)
            if step != 1:
                raise ValueError("a token stream has slices without step only")
            return self._slice(start, max(start, stop))
        index = np.asarray(index)
        if index.size and not 0 <= index.min() <= index.max() < self._size:
            raise IndexError(f"position {index.max()} of {self._size} tokens")
        where = np.searchsorted(self._ends, index, side="right")
        physical, which = index + self._shift[where], self._which[where]
        found = np.empty(index.shape, np.int32)
        self._count(PAGES * (1 + int((np.diff(index.ravel()) != 1).sum())))
        for number in np.unique(which).tolist():
            mine = which == number
            found[mine] = self._checked(number, self._files[number][0][physical[mine]], physical[mine])
        return found

    def _slice(self, start: int, stop: int) -> np.ndarray:
        parts = [np.zeros(0, np.int32)]
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right")
        for k in range(first, last + 1) if stop > start else ():
            begin = start + int(self._shift[k])
            end = min(stop, int(self._ends[k])) + int(self._shift[k])
            number = int(self._which[k])
            part = self._files[number][0][begin:end]
            self._count(part.nbytes + PAGES)
            parts.append(self._checked(number, part, begin))
            start = min(stop, int(self._ends[k]))
        return np.concatenate(parts)

    def _count(self, size: int) -> None:
        """Note bytes about to be mapped; now and then unmap all, so that they do not count as resident memory."""
        self._mapped += size
        if self._mapped > RELEASE and hasattr(mmap, "MADV_DONTNEED"):
            self._mapped = size
            for tokens, *_ in self._files:
                if isinstance(tokens, np.memmap) and isinstance(tokens.base, mmap.mmap):
                    tokens.base.madvise(mmap.MADV_DONTNEED)  # the pages stay in the system's cache

    def _checked(self, number: int, found: np.ndarray, positions: Any) -> np.ndarray:
        _, vocab_size, path = self._files[number]
        found = np.asarray(found)
        if found.size and not 0 <= found.min() <= found.max() < vocab_size:
            at = int(np.argmax((found < 0) | (found >= vocab_size)))
            place = int(positions[at]) if isinstance(positions, np.ndarray) else positions + at
            raise ConfigError(
                f"{path}: token {found[at]} at position {place}; the vocabulary has {vocab_size}, so 0 to "
                f"{vocab_size - 1} are valid (the tokenizer, or vocab_size, of config.data or of the description)"
            )
        return found.astype(np.int32)


def joined(streams: Sequence[Any]) -> Any:
    """Several streams, arrays or `TokenStream`, as one."""
    if all(isinstance(stream, np.ndarray) for stream in streams):
        return np.concatenate(streams)
    files = [(stream, 2**31, Path("memory")) for stream in streams]
    whole = [(k, np.array([0]), np.array([len(stream)])) for k, stream in enumerate(streams) if len(stream)]
    return TokenStream(files, whole)
