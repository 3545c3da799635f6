"""Documents packed into rows of equal length for training without attention across documents.

Which segment of which document is in which row is planned from lengths alone, at most 28 bytes a segment;
tokens are read when a row is. The plan is a function of the lengths, so that every process has the same one, and rows
are shuffled, shared out and resumed as windows are (`tessera.data.loader`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

METHODS = ("concatenate", "best_fit")
BUFFER = 1 << 16  # consecutive segments among which best fit chooses


class Documents(NamedTuple):
    """Where the documents of a token stream are.

    Attributes:
      ends: end of every document, ascending; the separator after it belongs to it.
      counted: the first token of every document that counts in a loss, behind its prompt; None where all do.
    """

    ends: Int64[np.ndarray, " N"]
    counted: Int64[np.ndarray, " N"] | None = None

    def first(self, size: int) -> "Documents":
        """Those in the first `size` tokens, the last of them cut short."""
        count = int(np.searchsorted(self.ends, size)) + 1
        counted = None if self.counted is None else self.counted[:count]
        return Documents(np.minimum(self.ends[:count], size), counted)


def joined_documents(found: Sequence[Documents]) -> Documents:
    """The documents of streams that are joined one after another."""
    shifts = np.cumsum([0, *(one.ends[-1] if len(one.ends) else 0 for one in found)])
    ends = np.concatenate([one.ends + shift for one, shift in zip(found, shifts, strict=False)])
    if all(one.counted is None for one in found):
        return Documents(ends)
    starts = [one.ends * 0 if one.counted is None else one.counted for one in found]
    return Documents(ends, np.concatenate([one + shift for one, shift in zip(starts, shifts, strict=False)]))


class Packed:
    """The documents of a token stream as rows of `length` inputs.

    "concatenate" cuts the stream into windows, and so documents where a window ends. "best_fit" leaves documents whole
    that fit into a row: among `BUFFER` consecutive ones, the longest first, each goes to the row with the least space
    that holds it (best-fit decreasing: Ding et al. 2024, arXiv:2404.10830); what is left of a row is padding. Longer
    documents are cut into segments that overlap by a token, so that every token of a document but its first is a target
    once. A segment of a single token has no target and is left out.

    Args:
      tokens: the stream, an array or `tessera.data.token_files.TokenStream`.
      documents: of it.
      length: inputs of a row, T.
      method: one of `METHODS`.

    Attributes:
      cut: documents that are in several segments.

    Raises:
      ValueError: no document has two tokens.
    """

    def __init__(self, tokens: Any, documents: Documents, length: int, method: str):
        ends = documents.ends
        starts = np.concatenate([[0], ends[:-1]])
        if method == "concatenate":
            which, begins, sizes, rows = _windows(starts, ends, length)
        else:
            which, begins, sizes = _segments(starts, ends - starts, length)
            rows = _best_fit(sizes, length + 1)
        if not len(rows):
            raise ValueError(f"{len(ends)} documents of {len(tokens)} tokens: none has the two that a target takes")
        order = np.argsort(rows, kind="stable")
        self.tokens, self.length, self.documents = tokens, length, documents
        self.cut = int((np.bincount(which, minlength=1) > 1).sum())
        self._starts, self._sizes = begins[order], sizes[order].astype(np.int32)
        self._offsets = np.searchsorted(rows[order], np.arange(rows.max() + 2))
        self._counted = None if documents.counted is None else documents.counted[which[order]]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def padding(self) -> float:
        """Share of the inputs of all rows that is padding."""
        ends = np.cumsum(self._sizes, dtype=np.int64)[self._offsets[1:] - 1]
        used = np.diff(ends, prepend=0)
        return 1 - float(np.minimum(used, self.length).sum()) / (len(self) * self.length)

    def rows(self, ids: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Read rows by number; number -1 is a row of padding alone.

        Returns:
          {"tokens": int32 [b, T + 1], "positions": int32 [b, T], which restart at 0 in every segment and are -1 for
          padding, "weights": float32 [b, T], 1 for targets that count, else 0, "ids": int64 [b]}.
        """
        ids_B = np.asarray(ids, np.int64)
        first, last = self._offsets[ids_B], np.where(ids_B < 0, self._offsets[ids_B], self._offsets[ids_B + 1])
        segments, row_G = _ranges(first, last - first)
        sizes_G = self._sizes[segments]
        position_N, segment_N = _ranges(np.zeros_like(segments), sizes_G)
        used_B = np.bincount(row_G, sizes_G, len(ids_B)).astype(np.int64)
        column_G = np.cumsum(sizes_G) - sizes_G - (np.cumsum(used_B) - used_B)[row_G]
        place_N = row_G[segment_N], column_G[segment_N] + position_N
        index_N = self._starts[segments][segment_N] + position_N
        shape = len(ids_B), self.length + 1
        tokens, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        positions = np.full(shape, -1, np.int32)
        tokens[place_N], positions[place_N] = self.tokens[index_N], position_N
        counts_N = position_N > 0
        if self._counted is not None:
            counts_N = counts_N & (index_N >= self._counted[segments][segment_N])
        weights[place_N] = counts_N
        return {"tokens": tokens, "positions": positions[:, :-1], "weights": weights[:, 1:], "ids": ids_B}


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """start, start + 1, ... of every range one after another, and the number of the range."""
    which = np.repeat(np.arange(len(sizes)), sizes)
    return np.arange(len(which)) - (np.cumsum(sizes, dtype=np.int64) - sizes)[which] + starts[which], which


def _windows(starts: np.ndarray, ends: np.ndarray, length: int) -> tuple[np.ndarray, ...]:
    """Document, start, size and row of the segments of "concatenate"; a tail shorter than a window is left out."""
    rows = max(0, int(ends[-1]) - 1) // length if len(ends) else 0
    begins = np.union1d(np.arange(rows) * length, starts[starts < rows * length])
    which = np.searchsorted(ends, begins, side="right")
    row = begins // length
    sizes = np.minimum(ends[which], (row + 1) * length + 1) - begins
    return which, begins, sizes, row


def _segments(starts: np.ndarray, sizes: np.ndarray, length: int) -> tuple[np.ndarray, ...]:
    """Document, start and size of the segments of "best_fit", of 2 to length + 1 tokens."""
    number, which = _ranges(np.zeros_like(sizes), -(-np.maximum(sizes - 1, 0) // length))
    return which, starts[which] + number * length, np.minimum(length + 1, sizes[which] - number * length)


def _best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Row of every segment; rows are numbered by their first segment."""
    found = np.empty(len(sizes), np.int64)
    total = 0
    for begin in range(0, len(sizes), BUFFER):
        block = sizes[begin : begin + BUFFER]
        rows: list[int] = [0] * len(block)
        count, spaces = 0, 0  # a bit of `spaces` for every list of `left` that is not empty
        left: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the space that they have
        for i in np.argsort(-block, kind="stable").tolist():
            size = int(block[i])
            fitting = spaces >> size
            if fitting:
                space = size + (fitting & -fitting).bit_length() - 1
                row = left[space].pop()
                spaces ^= 0 if left[space] else 1 << space
            else:
                space, row, count = capacity, count, count + 1
            rows[i] = row
            if space - size > 1:  # a token alone has no target
                left[space - size].append(row)
                spaces |= 1 << (space - size)
        _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
        rank = np.empty(count, np.int64)
        rank[np.argsort(first)] = np.arange(count)
        found[begin : begin + len(block)] = total + rank[inverse]
        total += count
    return found
