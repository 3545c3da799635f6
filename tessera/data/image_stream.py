"""Pictures larger than memory: decoded and augmented by grain's workers, in an order that is a function of a seed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grain
import numpy as np

from tessera.data.images import decode, mode_of
from tessera.data.loader import shared
from tessera.infra.config import check_seed


@dataclass(frozen=True)
class AugmentConfig:
    """How pictures are scaled and changed at random.

    Attributes:
      size: pixels a side of the result, to which pictures are scaled and cut.
      crop: pixels of zeros around a picture before a window of `size` is cut at random (He et al. 2016); 0 is no crop.
      flip: mirror half of the pictures, left to right.
      mean, std: subtracted and divided by, by channel, of pixels in [0, 1]; () leaves them.
    """

    size: int = 32
    crop: int = 0
    flip: bool = False
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.size < 1 or self.crop < 0:
            raise ValueError(f"size={self.size} must be at least 1, crop={self.crop} 0 or more")
        if len(self.mean) != len(self.std) or min(self.std, default=1) <= 0:
            raise ValueError(f"mean={self.mean} and std={self.std}: one of each by channel, deviations above 0")


class _Augment(grain.transforms.RandomMap):
    def __init__(self, config: AugmentConfig, mode: str):
        self._config, self._mode = config, mode

    def random_map(self, element: tuple[str, int, int], rng: np.random.Generator) -> dict[str, Any]:
        path, label, number = element
        c = self._config
        image = decode(path, c.size, self._mode).astype(np.float32) / 255
        if c.crop:
            padded = np.pad(image, ((c.crop, c.crop), (c.crop, c.crop), (0, 0)))
            y, x = rng.integers(0, 2 * c.crop + 1, 2)
            image = padded[y : y + c.size, x : x + c.size]
        if c.flip and rng.random() < 0.5:
            image = image[:, ::-1]
        if c.mean:
            image = (image - np.asarray(c.mean, np.float32)) / np.asarray(c.std, np.float32)
        return {"images": np.ascontiguousarray(image), "labels": np.int32(label), "ids": np.int64(number)}


def stream_images(
    files: Sequence[tuple[Path, int]],
    augment: AugmentConfig,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 8,
) -> grain.DatasetIterator:
    """Iterate for ever over pictures on disk; order, state and errors as in `tessera.data.loader.token_batches`.

    Args:
      files: pictures with their classes, such as `tessera.data.images.class_folders(path).train`.
      augment: how they are changed; what is drawn for a picture depends on the seed and its place in the order alone.
      batch_size, seed, process_index, process_count: as in `token_batches`.
      workers: threads that decode (Pillow does so without Python's lock).

    Returns:
      Iterator of {"images": float32 [b, size, size, C], "labels": int32 [b], "ids": int64 [b] positions in `files`}.
    """
    check_seed("seed", seed)
    rows, mode = _rows(files), mode_of(files[0][0])
    own_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    order = grain.MapDataset.source(rows).shuffle(seed=own_seed).repeat()
    # Before the shares are cut, so that what is drawn does not depend on the number of processes.
    pictures = order.random_map(_Augment(augment, mode), seed=own_seed)
    what = {"batch_size": batch_size, "size": len(rows), "seed": seed}
    return shared(pictures, what, process_index=process_index, process_count=process_count, threads=workers)


def held_out_images(
    files: Sequence[tuple[Path, int]],
    augment: AugmentConfig,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 8,
) -> grain.DatasetIterator:
    """Iterate once over pictures in their order, scaled and normalized but not augmented, as equal batches.

    Args:
      files, augment, batch_size, process_index, process_count, workers: as in `stream_images`.

    Returns:
      Iterator of batches as of `stream_images`, with "weights" float32 [b]: 1, and 0 for what fills the last batch.
    """
    mode, plain = mode_of(files[0][0]), replace(augment, crop=0, flip=False)
    rows = _rows(files)
    rows += [(rows[0][0], 0, -1)] * (-len(rows) % batch_size)
    pictures = grain.MapDataset.source(rows).random_map(_Augment(plain, mode), seed=0)
    weighed = pictures.map(lambda one: one | {"weights": np.float32(one["ids"] >= 0)})
    what = {"batch_size": batch_size, "size": len(rows), "seed": None}
    return shared(weighed, what, process_index=process_index, process_count=process_count, threads=workers)


def _rows(files: Sequence[tuple[Path, int]]) -> list[tuple[str, int, int]]:
    return [(str(path), label, number) for number, (path, label) in enumerate(files)]
