"""Image classification sets in memory: digits (bundled), MNIST, Fashion-MNIST, CIFAR-10 and -100, arrays, folders.

A set larger than memory is read by `tessera.data.image_stream`.
"""

import difflib
import gzip
import lzma
import math
import tarfile
import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Integer, Shaped

from tessera.data.documents import HUB, is_saved_dataset, load_dataset, package
from tessera.data.download import Remote, fetch, find
from tessera.infra.errors import ConfigError


@dataclass(frozen=True)
class ImageConfig:
    """Which images to train on.

    Attributes:
      name: a key of `LOADERS`: "digits" (bundled with scikit-learn), "mnist", "fashion_mnist", "cifar10", "cifar100";
        or the path of an .npz or of a directory with .npy (x, y, or x_train, y_train, x_test, y_test), of class folders
        (CLASS/*.png, or train/CLASS and test/CLASS), of a set saved by `datasets`; or "datasets:NAME".
      dir: directory that holds the files, or a directory `name` with them; "" is the user's cache directory. A path in
        `name` starts from it, or from the working directory.
      validation: images moved from the training set to the validation set; -1 is the default of the set (300 for
        digits, 5000 for the others with a name, a tenth of the training set of others).
      seed: which images those are. The test set does not depend on it.
      limit: training images to keep, the first of the others in the same random order; 0 keeps all.
      test_limit: test images to keep, the first ones; 0 keeps all. For runs on a laptop: intervals grow.
      crop: pixels cut off at every border.
      shrink: average over squares of so many pixels a side, which must divide what is left of the image's.
      test: share of the images that are the test set of class folders, arrays and `datasets` without one; which they
        are does not depend on the seed.
      size: pixels a side to which pictures of class folders and `datasets` are scaled and cut; 0 leaves them.
      normalize: subtract the mean of the training images and divide by their deviation, by channel.
      image_column, label_column: of `datasets`.
    """

    name: str = "digits"
    dir: str = ""
    validation: int = -1
    seed: int = 0
    limit: int = 0
    test_limit: int = 0
    crop: int = 0
    shrink: int = 1
    test: float = 0.2
    size: int = 0
    normalize: bool = False
    image_column: str = "image"
    label_column: str = "label"

    def __post_init__(self):
        if min(self.limit, self.test_limit, self.crop) < 0 or self.shrink < 1:
            limits = f"limit={self.limit}, test_limit={self.test_limit}, crop={self.crop}"
            raise ValueError(f"{limits} must be 0 (all) or more, shrink={self.shrink} 1 or more")
        if not 0 < self.test < 1 or self.size < 0:
            raise ValueError(f"test={self.test} must be a share between 0 and 1, size={self.size} 0 or more")


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
    """A set as stored: images [N, H, W, C] whose brightest value is `white`, labels [N] below `classes`."""

    train_images: Shaped[np.ndarray, "N H W C"]
    train_labels: Integer[np.ndarray, " N"]
    test_images: Shaped[np.ndarray, "M H W C"]
    test_labels: Integer[np.ndarray, " M"]
    white: int
    validation: int
    classes: int = 10


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
CIFAR10_MEMBERS = tuple(f"{CIFAR10_FOLDER}/{name}" for name in CIFAR10_FILES)
CIFAR10 = Remote(
    "cifar-10-binary.tar.gz",
    ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
    "md5:c32a1d4ab5d03f1284b67883e8d87530",
    instead=f"a folder {CIFAR10_FOLDER} with {', '.join(CIFAR10_FILES)}",
)


# Files of the CIFAR-100 archive, whose records have two labels: coarse and fine.
CIFAR100_FOLDER = "cifar-100-binary"
CIFAR100_FILES = ("train.bin", "test.bin")
CIFAR100 = Remote(
    "cifar-100-binary.tar.gz",
    ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",),
    "md5:03b5dce01913d631647c71ecec9e9cb8",
    instead=f"a folder {CIFAR100_FOLDER} with {', '.join(CIFAR100_FILES)}",
)


def load_images(config: ImageConfig) -> ImageSplits:
    """Read a set and split it; sizes with the default `validation`, train / validation / test:

    digits 1197 / 300 / 300 of 8x8x1, mnist and fashion_mnist 55000 / 5000 / 10000 of 28x28x1, cifar10 and cifar100
    45000 / 5000 / 10000 of 32x32x3. Ten classes each, a hundred of cifar100.

    Raises:
      ValueError: unknown name, a validation set that leaves nothing to train on, or a damaged file; ConfigError for
        files of one's own.
      DataUnavailable: files that are neither on disk nor downloadable.
    """
    if config.name in LOADERS:
        raw = LOADERS[config.name](config)
    else:
        raw = _own(config)
    return _split(raw, config)


def image_splits(
    x: np.ndarray,
    y: np.ndarray,
    x_test: np.ndarray | None = None,
    y_test: np.ndarray | None = None,
    config: ImageConfig = ImageConfig(name="arrays"),
) -> ImageSplits:
    """Split arrays, for the runners that take splits (`tessera.tickets.setup.make_setup`).

    Args:
      x: images [N, H, W, C] or [N, H, W], or vectors [N, D] (which become [N, 1, D, 1]); uint8, whose 255 becomes 1, or
        floating-point numbers, which stay.
      y: classes [N], whole numbers from 0.
      x_test, y_test: the test set; without one a share `config.test` of the images is cut off.
      config: its fields from `validation` on.

    Raises:
      ConfigError: other shapes or types, or classes of the test set that are missing in training.

    Example:
      >>> x, y = np.zeros((50, 4, 4), np.uint8), np.arange(50) % 3
      >>> splits = image_splits(x, y)
      >>> splits.train.images.shape, len(splits.validation.labels), len(splits.test.labels), splits.num_classes
      ((36, 4, 4, 1), 4, 10, 3)
    """
    return _split(_raw_of(x, y, x_test, y_test, config), config)


def _split(raw: Raw, config: ImageConfig) -> ImageSplits:
    for split in ("train", "test"):
        _check(getattr(raw, f"{split}_images"), getattr(raw, f"{split}_labels"), f"{config.name} {split}", raw.classes)
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

    parts = {
        "train": convert(raw.train_images[kept], raw.train_labels[kept]),
        "validation": convert(raw.train_images[held], raw.train_labels[held]),
        "test": convert(raw.test_images[:last], raw.test_labels[:last]),
    }
    if config.normalize:
        mean, deviation = moments(parts["train"].images)
        parts = {name: part._replace(images=(part.images - mean) / deviation) for name, part in parts.items()}
    return ImageSplits(**parts, num_classes=raw.classes)


def moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [C] of images [N, H, W, C] by channel, float32; 1 for a constant channel."""
    mean, deviation = (np.asarray(f(images, (0, 1, 2), dtype=np.float64), np.float32) for f in (np.mean, np.std))
    return mean, np.where(deviation > 0, deviation, np.float32(1))


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


def _check(images: np.ndarray, labels: np.ndarray, what: str, classes: int) -> None:
    if len(images) != len(labels):
        raise ValueError(f"{what} set has {len(images)} images but {len(labels)} labels")
    if len(labels) == 0 or labels.max() >= classes:
        raise ValueError(f"{what} set: expected labels 0 to {classes - 1}, found {sorted(set(labels.tolist()))}")


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


def load_cifar(config: ImageConfig) -> Raw:
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009), binary version: the unpacked folder if there is one, else the archive.

    Of CIFAR-100's two labels the fine ones are used.
    """
    fine = config.name == "cifar100"
    names, own, remote = (
        (CIFAR100_FILES, CIFAR100_FOLDER, CIFAR100) if fine else (CIFAR10_FILES, CIFAR10_FOLDER, CIFAR10)
    )
    labels = 2 if fine else 1
    for folder in (f"{own}/", ""):
        paths = [find(folder + filename, config.dir, name=config.name) for filename in names]
        if all(paths):
            parts = [_read_cifar(path.read_bytes(), str(path), labels) for path in paths if path is not None]
            break
    else:
        (path,) = fetch([remote], config.dir, name=config.name)
        parts = _read_cifar_archive(path, [f"{own}/{filename}" for filename in names], labels)
    records = np.concatenate(parts[:-1])
    classes = 100 if fine else 10
    return Raw(*_images_of(records), *_images_of(parts[-1]), white=255, validation=5000, classes=classes)


def _read_cifar_archive(path: Path, names: Sequence[str] = CIFAR10_MEMBERS, labels: int = 1) -> list[np.ndarray]:
    try:
        with tarfile.open(path) as archive:
            members = [archive.extractfile(name) for name in names]
            if None in members:
                raise KeyError("a folder where a file should be")
            return [_read_cifar(m.read(), f"{path}:{m.name}", labels) for m in members if m is not None]
    except (KeyError, OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        why = " ".join(str(error).split())  # tarfile's has a line for every format
        raise ValueError(f"{path} is damaged ({why}); delete it to download it again") from error


def _read_cifar(data: bytes, where: str, labels: int) -> np.ndarray:
    """Records [N, labels + 3072]: label bytes, then the red, green and blue planes."""
    size = labels + 3072
    if not data or len(data) % size:
        raise ValueError(f"{where}: expected a multiple of {size} bytes (one record), found {len(data)}")
    return np.frombuffer(data, np.uint8).reshape(-1, size)


def _images_of(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels are the last 3072 bytes, the (fine) label the byte before."""
    return records[:, -3072:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, -3073]


LOADERS = {
    **{"digits": load_digits, "mnist": load_idx, "fashion_mnist": load_idx},
    **{"cifar10": load_cifar, "cifar100": load_cifar},
}
# Names of the arrays of training and test in an .npz or beside each other as .npy.
ARRAYS = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("x", "y"),
)
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
TESTS = ("test", "val", "validation")  # folders beside train/


def _own(config: ImageConfig) -> Raw:
    """A set that is no key of `LOADERS`, by its path."""
    path = Path(config.dir).expanduser() / Path(config.name).expanduser()
    if config.name.startswith(HUB) or is_saved_dataset(path):
        return _of_dataset(config.name if config.name.startswith(HUB) else path, config)
    if path.suffix == ".npz" and path.is_file():
        return _of_arrays(path, config)
    if path.is_dir():
        return _of_arrays(path, config) if list(path.glob("*.npy")) else _of_folders(path, config)
    close = difflib.get_close_matches(config.name, LOADERS, 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(
        f"unknown image set {config.name!r}: {hint}choose one of {', '.join(LOADERS)}, or give the path of an .npz, of "
        "a directory of .npy or of class folders"
    )


def _of_arrays(path: Path, config: ImageConfig) -> Raw:
    try:
        if path.is_dir():
            found: dict[str, Any] = {file.stem: np.load(file, mmap_mode="r") for file in sorted(path.glob("*.npy"))}
        else:
            with np.load(path) as file:
                found = {name: file[name] for name in file.files}
    except Exception as error:  # of zipfile, zlib, NumPy and Python's parser of headers
        raise ConfigError(f"{path}: no arrays, or damaged ({' '.join(str(error).split())})") from error
    for names in ARRAYS:
        if set(names) <= set(found):
            x, y, x_test, y_test = [*(found[name] for name in names), None, None][:4]
            return _raw_of(x, y, x_test, y_test, config, where=str(path))
    wanted = " or ".join(", ".join(names) for names in ARRAYS)
    raise ConfigError(f"{path}: arrays {', '.join(found) or 'none'}; {wanted} are needed")


def _raw_of(x: Any, y: Any, x_test: Any, y_test: Any, config: ImageConfig, where: str = "arrays") -> Raw:
    def images(x: Any, name: str) -> np.ndarray:
        x = np.asarray(x)
        if x.dtype != np.uint8 and x.dtype.kind != "f":
            raise ConfigError(f"{where}: {name} is {x.dtype}; uint8 or floating-point numbers are needed")
        if x.ndim not in (2, 3, 4):
            raise ConfigError(f"{where}: {name} has shape {x.shape}; [N, H, W, C], [N, H, W] or [N, D] is needed")
        if x.dtype.kind == "f" and not np.isfinite(x).all():
            raise ConfigError(f"{where}: {name} has values that are not finite, the first at {_first_bad(x)}")
        return x[:, None, :, None] if x.ndim == 2 else x[..., None] if x.ndim == 3 else x

    def labels(y: Any, name: str, count: int) -> np.ndarray:
        y = np.asarray(y)
        y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y  # as Keras and MedMNIST have them
        if y.ndim != 1 or y.dtype.kind not in "iu" or (len(y) and y.min() < 0):
            raise ConfigError(f"{where}: {name} is {y.dtype} of shape {y.shape}; classes [N] from 0 are needed")
        if len(y) != count:
            raise ConfigError(f"{where}: {count} images, and {len(y)} labels in {name}")
        return y.astype(np.int64)

    x = images(x, "x")
    y = labels(y, "y", len(x))
    if x_test is None:
        order = np.random.default_rng(0).permutation(len(y))
        held, rest = (np.sort(part) for part in np.split(order, [round(config.test * len(y))]))
        x, y, x_test, y_test = x[rest], y[rest], x[held], y[held]
    else:
        x_test = images(x_test, "x_test")
        y_test = labels(y_test, "y_test", len(x_test))
        if x_test.shape[1:] != x.shape[1:] or x_test.dtype != x.dtype:
            shapes = f"{x.dtype} {x.shape[1:]} and {x_test.dtype} {x_test.shape[1:]}"
            raise ConfigError(f"{where}: images of training and test are {shapes}; they must be alike")
    absent = sorted({*np.unique(y_test).tolist()} - {*np.unique(y).tolist()})
    if absent:
        raise ConfigError(f"{where}: classes {', '.join(map(str, absent))} of test are missing in training")
    classes = int(y.max()) + 1 if len(y) else 1
    return Raw(x, y, x_test, y_test, 255 if x.dtype == np.uint8 else 1, len(y) // 10, classes)


def _first_bad(x: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0])


class Folders(NamedTuple):
    """Files of class folders with their classes, by split, and the names of the classes in alphabetical order."""

    train: list[tuple[Path, int]]
    test: list[tuple[Path, int]]
    classes: list[str]


def class_folders(path: Path | str, test: float = 0.2) -> Folders:
    """List the pictures of class folders: CLASS/*, or train/CLASS/* and test/CLASS/* (or val, validation).

    Args:
      path: of the set.
      test: share of the pictures that is the test set where there is no folder of it; which does not depend on a seed.

    Raises:
      ConfigError: no pictures, or classes of the test set that are missing in training.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"{path}: no such directory of class folders")
    root = path / "train" if (path / "train").is_dir() else path
    classes = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
    number = {name: i for i, name in enumerate(classes)}

    def listed(root: Path) -> list[tuple[Path, int]]:
        files = sorted(file for file in root.glob("*/*") if file.suffix.lower() in PICTURES)
        absent = sorted({file.parent.name for file in files} - set(number))
        if absent:
            raise ConfigError(f"{path}: classes {', '.join(absent)} of {root.name} are missing in training")
        return [(file, number[file.parent.name]) for file in files]

    train = listed(root)
    if not train:
        raise ConfigError(f"{path}: no pictures; CLASS/*.png or train/CLASS/*.png are needed ({', '.join(PICTURES)})")
    held = next((path / name for name in TESTS if root != path and (path / name).is_dir()), None)
    if held is not None:
        return Folders(train, listed(held), classes)
    order = np.random.default_rng(0).permutation(len(train))
    cut = set(order[: round(test * len(train))].tolist())
    split = [one for i, one in enumerate(train) if i not in cut], [train[i] for i in sorted(cut)]
    absent = sorted({classes[label] for _, label in split[1]} - {classes[label] for _, label in split[0]})
    if absent:
        raise ConfigError(f"{path}: classes {', '.join(absent)} of test are missing in training")
    return Folders(*split, classes)


def decode(file: Any, size: int = 0, mode: str = "RGB", where: str = "") -> np.ndarray:
    """A picture as uint8 [H, W, C], scaled and cut to `size` pixels a side where that is not 0.

    Raises:
      ConfigError: it does not decode, naming it.
    """
    where = where or str(file)
    image, ops = package("PIL.Image", where), package("PIL.ImageOps", where)
    if not isinstance(file, str | Path | image.Image):
        raise ConfigError(f"{where}: a {type(file).__name__}; a picture is needed")
    try:
        with image.open(file) if isinstance(file, str | Path) else nullcontext(file) as opened:
            found = ops.exif_transpose(opened).convert(mode)
    except (OSError, ValueError, SyntaxError, EOFError, image.DecompressionBombError) as error:
        raise ConfigError(
            f"{where or file}: no picture that Pillow decodes ({' '.join(str(error).split())})"
        ) from error
    pixels = np.asarray(ops.fit(found, (size, size)) if size else found, np.uint8)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def mode_of(file: Any) -> str:
    """ "L" for a gray picture, else "RGB"."""
    image = package("PIL.Image", str(file))
    try:
        with image.open(file) if isinstance(file, str | Path) else nullcontext(file) as opened:
            return "L" if getattr(opened, "mode", "RGB") in ("1", "L", "LA", "I", "I;16", "F") else "RGB"
    except OSError as error:
        raise ConfigError(f"{file}: no picture that Pillow decodes ({' '.join(str(error).split())})") from error


def _stacked(files: Any, config: ImageConfig, mode: str) -> np.ndarray:
    """Decode (place, picture) of one size as one array."""
    found: list[np.ndarray] = []
    for place, file in files:
        found.append(decode(file, config.size, mode, place))
        if found[-1].shape != found[0].shape:
            sizes = " and ".join(f"{one.shape[0]} x {one.shape[1]}" for one in (found[-1], found[0]))
            raise ConfigError(f"{place}: pictures of {sizes}; set config.data.size to scale them")
    return np.stack(found)


def _of_folders(path: Path, config: ImageConfig) -> Raw:
    found = class_folders(path, config.test)
    mode = mode_of(found.train[0][0])
    train, test = (_stacked([(str(file), file) for file, _ in part], config, mode) for part in found[:2])
    y, y_test = (np.array([label for _, label in part]) for part in found[:2])
    return _raw_of(train, y, test, y_test, config, where=str(path))


def _of_dataset(source: Path | str, config: ImageConfig) -> Raw:
    def read(part: Any, mode: str) -> tuple[np.ndarray, np.ndarray]:
        for column in (config.image_column, config.label_column):
            if column not in part.column_names:
                raise ConfigError(
                    f"{source}: no column {column!r}; there are {', '.join(map(repr, part.column_names))} "
                    "(config.data.image_column, config.data.label_column)"
                )
        rows = ((f"{source}, row {i + 1}", one) for i, one in enumerate(part[config.image_column]))
        return _stacked(rows, config, mode), np.asarray(part[config.label_column])

    train = load_dataset(source)
    mode = mode_of(train[0][config.image_column]) if config.image_column in train.column_names else "RGB"
    x, y = read(train, mode)
    if not str(source).startswith(HUB):
        return _raw_of(x, y, None, None, config, where=str(source))
    return _raw_of(x, y, *read(load_dataset(source, "test"), mode), config, where=str(source))
