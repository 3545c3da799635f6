"""Image classification sets small enough for memory: digits (bundled), MNIST, Fashion-MNIST and CIFAR-10."""

import difflib
import gzip
import lzma
import math
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from tessera.data.download import Remote, fetch, find


@dataclass(frozen=True)
class ImageConfig:
    """Which images to train on.

    Attributes:
      name: a key of `LOADERS`: "digits" (bundled with scikit-learn), "mnist", "fashion_mnist" or "cifar10".
      dir: directory that holds the files, or a directory `name` with them; "" is the user's cache directory.
      validation: images moved from the training set to the validation set; -1 is the default of the set (300 for
        digits, 5000 for the others).
      seed: which images those are. The test set does not depend on it.
      limit: training images to keep, the first of the others in the same random order; 0 keeps all.
      test_limit: test images to keep, the first ones; 0 keeps all. For runs on a laptop: intervals grow.
      crop: pixels cut off at every border.
      shrink: average over squares of so many pixels a side, which must divide what is left of the image's.
    """

    name: str = "digits"
    dir: str = ""
    validation: int = -1
    seed: int = 0
    limit: int = 0
    test_limit: int = 0
    crop: int = 0
    shrink: int = 1

    def __post_init__(self):
        if min(self.limit, self.test_limit, self.crop) < 0 or self.shrink < 1:
            limits = f"limit={self.limit}, test_limit={self.test_limit}, crop={self.crop}"
            raise ValueError(f"{limits} must be 0 (all) or more, shrink={self.shrink} 1 or more")


class Images(NamedTuple):
    """Images in [0, 1], channels last, and their classes."""

    images: Float32[np.ndarray, "N H W C"]
    labels: Int32[np.ndarray, " N"]


class ImageSplits(NamedTuple):
    """Disjoint sets for training, for choosing (early stopping, hyperparameters) and for reporting."""

    train: Images
    validation: Images
    test: Images
    num_classes: int


class Raw(NamedTuple):
    """A set as stored: uint8 images [N, H, W, C] whose brightest value is `white`, uint8 labels [N]."""

    train_images: UInt8[np.ndarray, "N H W C"]
    train_labels: UInt8[np.ndarray, " N"]
    test_images: UInt8[np.ndarray, "M H W C"]
    test_labels: UInt8[np.ndarray, " M"]
    white: int
    validation: int


MNIST_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
# For each set: places that serve the four files, and the md5 of each.
IDX_SETS = {
    "mnist": (
        ("https://storage.googleapis.com/cvdf-datasets/mnist/", "https://ossci-datasets.s3.amazonaws.com/mnist/"),
        (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
    ),
    "fashion_mnist": (
        (
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
        (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
    ),
}
CIFAR10_FOLDER = "cifar-10-batches-bin"
CIFAR10_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
CIFAR10 = Remote(
    "cifar-10-binary.tar.gz",
    ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
    "md5:c32a1d4ab5d03f1284b67883e8d87530",
    instead=f"a folder {CIFAR10_FOLDER} with {', '.join(CIFAR10_FILES)}",
)


def load_images(config: ImageConfig) -> ImageSplits:
    """Read a set and split it; sizes with the default `validation`, train / validation / test:

    digits 1197 / 300 / 300 of 8x8x1, mnist and fashion_mnist 55000 / 5000 / 10000 of 28x28x1, cifar10
    45000 / 5000 / 10000 of 32x32x3. Ten classes each.

    Raises:
      ValueError: unknown name, a validation set that leaves nothing to train on, or a damaged file.
      DataUnavailable: files that are neither on disk nor downloadable.
    """
    if config.name not in LOADERS:
        close = difflib.get_close_matches(config.name, LOADERS, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown image set {config.name!r}: {hint}choose one of {', '.join(LOADERS)}")
    raw = LOADERS[config.name](config)
    for split in ("train", "test"):
        _check(getattr(raw, f"{split}_images"), getattr(raw, f"{split}_labels"), f"{config.name} {split}")
    size = len(raw.train_labels)
    count = raw.validation if config.validation < 0 else config.validation
    if count >= size:
        raise ValueError(f"validation={count} leaves nothing of the {size} training images of {config.name}")
    order = np.random.default_rng(config.seed).permutation(size)
    kept = order[count:][: config.limit or size]
    held, kept = np.sort(order[:count]), np.sort(kept)
    last = config.test_limit or len(raw.test_labels)

    def convert(images, labels):
        scaled = images.astype(np.float32, order="C")  # CIFAR's planes come transposed
        scaled /= raw.white
        return Images(_shrunk(_cropped(scaled, config.crop), config.shrink), labels.astype(np.int32))

    return ImageSplits(
        train=convert(raw.train_images[kept], raw.train_labels[kept]),
        validation=convert(raw.train_images[held], raw.train_labels[held]),
        test=convert(raw.test_images[:last], raw.test_labels[:last]),
        num_classes=10,
    )


def _cropped(images: np.ndarray, border: int) -> np.ndarray:
    height, width = images.shape[1:3]
    if 2 * border >= min(height, width):
        raise ValueError(f"crop={border} leaves nothing of images of {height} x {width}")
    return images[:, border : height - border, border : width - border]


def _shrunk(images: np.ndarray, side: int) -> np.ndarray:
    n, height, width, channels = images.shape
    if height % side or width % side:
        raise ValueError(f"shrink={side} does not divide images of {height} x {width}")
    return images.reshape(n, height // side, side, width // side, side, channels).mean((2, 4), dtype=np.float32)


def _check(images: np.ndarray, labels: np.ndarray, what: str) -> None:
    if len(images) != len(labels):
        raise ValueError(f"{what} set has {len(images)} images but {len(labels)} labels")
    if len(labels) == 0 or labels.max() >= 10:
        raise ValueError(f"{what} set: expected labels 0 to 9, found {sorted(set(labels.tolist()))}")


def load_digits(config: ImageConfig) -> Raw:
    """The 1797 real handwritten digits that come with scikit-learn, pixels 0 to 16; 300 fixed ones are the test set."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("data set 'digits' needs the extra `data`: pip install 'tessera-jax[data]'") from error
    bunch = datasets.load_digits()
    images, labels = bunch.images.astype(np.uint8)[..., None], bunch.target.astype(np.uint8)
    # The set has no split of its own. The seed is fixed: results of different runs are about the same test images.
    order = np.random.default_rng(0).permutation(len(labels))
    test, train = np.sort(order[:300]), np.sort(order[300:])
    return Raw(images[train], labels[train], images[test], labels[test], white=16, validation=300)


def load_idx(config: ImageConfig) -> Raw:
    """MNIST (LeCun et al. 1998) or Fashion-MNIST (Xiao et al. 2017) from their four gzipped IDX files."""
    places, hashes = IDX_SETS[config.name]
    remotes = [
        Remote(filename, tuple(place + filename for place in places), f"md5:{md5}")
        for filename, md5 in zip(MNIST_FILES, hashes, strict=True)
    ]
    files = fetch(remotes, config.dir, name=config.name)
    train, train_labels, test, test_labels = map(read_idx, files, (3, 1, 3, 1))
    return Raw(train[..., None], train_labels, test[..., None], test_labels, white=255, validation=5000)


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """A gzipped IDX file of unsigned bytes as a uint8 array of `ndim` dimensions, of the shape in its header.

    Raises:
      ValueError: naming the file, when it does not decompress, has another type, other dimensions or another size than
        its header says.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file ({error}); delete it to download it again") from error
    # Two zero bytes, the type (8 is unsigned byte), the number of dimensions, then each as big-endian 32 bits.
    header = 4 + 4 * ndim
    if data[:3] != b"\0\0\x08" or len(data) < header:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes: it begins {data[:4].hex(' ') or 'and ends'}")
    if data[3] != ndim:
        raise ValueError(f"{path} has {data[3]} dimensions; {ndim} are needed")
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", ndim, offset=4))
    expected = header + math.prod(shape)
    if len(data) != expected:
        raise ValueError(f"{path}: shape {shape} needs {expected} bytes uncompressed, found {len(data)}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def load_cifar10(config: ImageConfig) -> Raw:
    """CIFAR-10 (Krizhevsky 2009), binary version: the unpacked folder if there is one, else read from the archive."""
    for folder in (f"{CIFAR10_FOLDER}/", ""):
        paths = [find(folder + filename, config.dir, name=config.name) for filename in CIFAR10_FILES]
        if all(paths):
            parts = [_read_cifar(path.read_bytes(), str(path)) for path in paths if path is not None]
            break
    else:
        parts = _read_cifar_archive(*fetch([CIFAR10], config.dir, name=config.name))
    records = np.concatenate(parts[:-1])
    return Raw(*_images_of(records), *_images_of(parts[-1]), white=255, validation=5000)


def _read_cifar_archive(path: Path) -> list[np.ndarray]:
    try:
        with tarfile.open(path) as archive:
            members = [archive.extractfile(f"{CIFAR10_FOLDER}/{filename}") for filename in CIFAR10_FILES]
            if None in members:
                raise KeyError("a folder where a file should be")
            return [_read_cifar(m.read(), f"{path}:{m.name}") for m in members if m is not None]
    except (KeyError, OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        why = " ".join(str(error).split())  # tarfile's has a line for every format
        raise ValueError(f"{path} is damaged ({why}); delete it to download it again") from error


def _read_cifar(data: bytes, where: str) -> np.ndarray:
    """Records [N, 3073]: a label byte, then the red, green and blue planes."""
    if not data or len(data) % 3073:
        raise ValueError(f"{where}: expected a multiple of 3073 bytes (one record), found {len(data)}")
    return np.frombuffer(data, np.uint8).reshape(-1, 3073)


def _images_of(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]


LOADERS = {"digits": load_digits, "mnist": load_idx, "fashion_mnist": load_idx, "cifar10": load_cifar10}
