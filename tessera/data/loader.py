"""Batches in an order that is a pure function of a seed, the same after a restart and on any number of processes."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import grain
import numpy as np
from jaxtyping import Integer

from tessera.data.images import Images
from tessera.data.packing import Packed
from tessera.data.token_files import TokenStream
from tessera.infra.config import check_seed

Tokens = Integer[np.ndarray, " N"] | TokenStream | Packed


def token_batches(
    tokens: Tokens,
    *,
    batch_size: int,
    length: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    shuffle: bool = True,
    repeat: bool = True,
    parts: Sequence[tuple[Any, float]] = (),
) -> grain.DatasetIterator:
    """Iterate over windows of a token stream, for next-token prediction.

    Window i holds tokens [i * length, (i + 1) * length]: `length` inputs and, one to the right, `length` targets, so
    every token but the first is a target once per epoch; a tail shorter than a window is left out.

    Args:
      tokens: the whole stream, or its documents packed into rows of `length`, which then are the windows; every process
        passes the same one.
      batch_size: windows per step over all processes together.
      length: inputs per window.
      seed: of the shuffling; every epoch is shuffled anew.
      process_index: which of the `process_count` shares of every batch this iterator yields. Process p of P has the
        rows p, p + P, p + 2P ... of the batch that a single process would get.
      process_count: number of such shares.
      shuffle: False keeps the order of the stream.
      repeat: True goes on for ever, and a batch may straddle two epochs. False stops after the full batches of one
        epoch, their number the same on every process; windows that do not fill a batch are left out.
      parts: streams and their weights in place of `tokens`: every source is shuffled and repeated by itself, and its
        share of the windows is its weight over the sum of all (`grain.MapDataset.mix`). Windows are numbered through
        the sources in their order.

    Returns:
      Iterator of {"tokens": int32 [b, length + 1], "ids": int64 [b] window numbers}, of packed documents with what
      `tessera.data.packing.Packed.rows` has besides, with b = batch_size / process_count. Its `get_state()` is a small
      dict of JSON values; `set_state` of it in a fresh iterator goes on in the same order, whatever the number of
      processes. With another batch size it goes on with the next window too, if what was read is a whole number of the
      new batches; else, and for other windows or another seed, it is a ValueError.

    Raises:
      ValueError: sizes below 1, fewer tokens than one window, a batch that does not divide by the processes, or (with
        repeat=False) fewer windows than one batch.
    """
    _at_least("length", length, 1)
    streams = [stream for stream, _ in parts] or [tokens]
    sizes = [window_count(stream, length) for stream in streams]
    for stream, windows in zip(streams, sizes, strict=True):
        if windows < 1:
            raise ValueError(f"{len(stream)} tokens do not fill one window: length={length} needs {length + 1}")
    gather = partial(_gather_windows, tokens, length)
    return _iterate(
        partial(_gather_mixed, streams, sizes, length) if parts else gather,
        sum(sizes),
        mixture=tuple((size, weight) for size, (_, weight) in zip(sizes, parts, strict=False)),
        batch_size=batch_size,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
        shuffle=shuffle,
        repeat=repeat,
    )


def held_out_batches(
    tokens: Tokens,
    *,
    batch_size: int,
    length: int,
    limit: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[tuple[dict[str, np.ndarray], float]]:
    """Iterate once over the first windows of a stream in its order, as equal batches with weights.

    The sum of weight times a batch's mean, over the sum of weights, is the mean over the windows. Those that fill no
    batch are not left out, nor do they ask for another shape: they come with window 0 repeated behind them, and a batch
    of window 0 alone follows with the negative weight that takes it out again. Packed documents have rows of padding
    behind them, without weight.

    Args:
      limit: batches at most, the partial one included.
      tokens, batch_size, length, process_index, process_count: as in `token_batches`; same errors.
    """
    share: dict[str, Any] = {"process_index": process_index, "process_count": process_count}
    full = token_batches(tokens, batch_size=batch_size, length=length, seed=0, shuffle=False, repeat=False, **share)
    yield from ((batch, 1.0) for batch in islice(full, limit))
    windows = window_count(tokens, length)
    left = windows % batch_size
    if left and windows // batch_size < limit and isinstance(tokens, Packed):
        ids_B = np.full(batch_size, -1)
        ids_B[:left] = np.arange(windows - left, windows)
        yield tokens.rows(ids_B[process_index::process_count]), 1.0
    elif left and windows // batch_size < limit:
        first, padded = np.zeros(batch_size, np.int64), np.zeros(batch_size, np.int64)
        padded[:left] = np.arange(windows - left, windows)
        for ids_B, weight in ((padded, 1.0), (first, left / batch_size - 1)):
            yield _gather_windows(tokens, length, ids_B[process_index::process_count]), weight


def image_batches(
    images: Images,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    shuffle: bool = True,
    repeat: bool = True,
) -> grain.DatasetIterator:
    """Iterate over a set of images; arguments, order, state and errors as in `token_batches`.

    Returns:
      Iterator of {"images": float32 [b, H, W, C], "labels": int32 [b], "ids": int64 [b] positions in the set}.
    """
    return _iterate(
        partial(_gather_images, images),
        len(images.labels),
        batch_size=batch_size,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
        shuffle=shuffle,
        repeat=repeat,
    )


def window_count(tokens: Tokens, length: int) -> int:
    """Windows of a stream, a tail shorter than one left out; of packed documents, rows."""
    return len(tokens) if isinstance(tokens, Packed) else (len(tokens) - 1) // length


def _gather_windows(tokens: Any, length: int, ids: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    if isinstance(tokens, Packed):
        return tokens.rows(ids)
    ids_B = np.asarray(ids, np.int64)
    tokens = tokens[ids_B[:, None] * length + np.arange(length + 1)].astype(np.int32, copy=False)
    return {"tokens": tokens, "ids": ids_B}


def _gather_mixed(
    streams: Sequence[Any], sizes: Sequence[int], length: int, ids: Sequence[int]
) -> dict[str, np.ndarray]:
    ids_B = np.asarray(ids, np.int64)
    ends = np.cumsum(sizes)
    which = np.searchsorted(ends, ids_B, side="right")
    found: dict[str, np.ndarray] = {}
    for number in np.unique(which).tolist():
        mine = which == number
        for name, rows in _gather_windows(
            streams[number], length, ids_B[mine] - (ends[number] - sizes[number])
        ).items():
            found.setdefault(name, np.empty((len(ids_B), *rows.shape[1:]), rows.dtype))[mine] = rows
    return found | {"ids": ids_B}


def _gather_images(images: Images, ids: Sequence[int]) -> dict[str, np.ndarray]:
    ids_B = np.asarray(ids, np.int64)
    return {"images": images.images[ids_B], "labels": images.labels[ids_B], "ids": ids_B}


def _iterate(
    gather: Callable[[Sequence[int]], dict[str, Any]],
    size: int,
    *,
    batch_size: int,
    seed: int,
    process_index: int,
    process_count: int,
    shuffle: bool,
    repeat: bool,
    mixture: tuple[tuple[int, float], ...] = (),
) -> grain.DatasetIterator:
    check_seed("seed", seed)
    _at_least("batch_size", batch_size, 1)
    if not repeat and size < batch_size:
        raise ValueError(f"{size} examples do not fill one batch of {batch_size}, and repeat=False")
    # Grain shuffles epoch e with seed + e. With hashed seeds, runs 0 and 1 share no epochs.
    if mixture:
        if not (shuffle and repeat):
            raise ValueError("sources with weights are shuffled and repeated")
        order = mixed_order(mixture, seed)
    else:
        order = grain.MapDataset.range(size)
        if shuffle:
            order = order.shuffle(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]))
        # Only whole global batches are shared out, or some processes would end a step before the others and leave them
        # waiting in a collective.
        order = order.repeat() if repeat else order[: size - size % batch_size]
    what: dict[str, Any] = {"batch_size": batch_size, "size": size, "seed": seed if shuffle else None}
    what |= {"mixture": [list(pair) for pair in mixture]} if mixture else {}
    # Only indices travel through grain one by one; each batch is one gather.
    return shared(order, what, process_index=process_index, process_count=process_count, batch_fn=gather)


def mixed_order(mixture: Sequence[tuple[int, float]], seed: int) -> grain.MapDataset:
    """Windows of several sources for ever, numbered through them, of (number, weight) of each: see `token_batches`."""
    seeds = np.random.SeedSequence(seed).generate_state(len(mixture))
    ends = np.cumsum([windows for windows, _ in mixture]).tolist()
    ranges = [
        grain.MapDataset.range(end - windows, end).shuffle(seed=int(own)).repeat()
        for end, own, (windows, _) in zip(ends, seeds, mixture, strict=True)
    ]
    return grain.MapDataset.mix(ranges, [weight for _, weight in mixture])


def shared(
    order: grain.MapDataset,
    what: dict[str, Any],
    *,
    process_index: int,
    process_count: int,
    batch_fn: Callable[[Sequence[Any]], Any] | None = None,
    threads: int = 1,
) -> grain.DatasetIterator:
    """Batches of this process's share of a data set of grain's, whose state says what it is a position in.

    Args:
      order: all examples in the global order.
      what: identity of the order, JSON values; its "batch_size" is that over all processes.
      process_index, process_count: as in `token_batches`.
      batch_fn: list of examples -> batch; grain's stacking by default.
      threads: that make batches, a few ahead of the training step. One is enough for data in memory or mapped.

    Raises:
      ValueError: a batch that does not divide by the processes.
    """
    batch_size = what["batch_size"]
    _at_least("batch_size", batch_size, 1)
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} must lie in [0, process_count={process_count})")
    if batch_size % process_count:
        raise ValueError(f"batch_size={batch_size} does not divide by process_count={process_count}")
    share = order[process_index::process_count]
    share = share.batch(batch_size // process_count, drop_remainder=True, batch_fn=batch_fn)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
    return _Resumable(iter(share.to_iter_dataset(options)), what)


class _Resumable(grain.DatasetIterator):
    """An iterator whose state says what it is a position in."""

    def __init__(self, batches: grain.DatasetIterator, order: dict[str, Any]):
        super().__init__(batches)
        self._order = order

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return {**self._parent.get_state(), "order": self._order}

    def set_state(self, state: dict[str, Any]) -> None:
        state = dict(state)
        there = state.pop("order", self._order)  # 0.1 wrote none
        batch = self._order["batch_size"]
        if {**there, "batch_size": batch} != self._order:
            raise ValueError(f"the position of an iterator over {there} is none in one over {self._order}")
        if there["batch_size"] != batch:
            read = state["next_index"] * there["batch_size"]
            if read % batch:
                raise ValueError(
                    f"{read} examples were read in batches of {there['batch_size']}: no whole number of batches of "
                    f"{batch}; the order goes on with a batch size that divides {read}"
                )
            state["next_index"] = read // batch
        self._parent.set_state(state)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")
