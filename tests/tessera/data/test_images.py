"""Image sets: sizes, ranges, splits, and errors that name the file."""

import gzip
import io
import tarfile

import numpy as np
import pytest
from sklearn import datasets

from tessera.data import images as images_module
from tessera.data.download import DataUnavailable
from tessera.data.images import CIFAR10_FILES, CIFAR10_FOLDER, MNIST_FILES, ImageConfig, load_images, read_idx


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def write_mnist(folder, train=60, test=20):
    """Random images in the four files; returns what was written."""
    rng = np.random.default_rng(0)
    shapes = [(train, 28, 28), (train,), (test, 28, 28), (test,)]
    arrays = [rng.integers(0, 256 if len(s) == 3 else 10, s, dtype=np.uint8) for s in shapes]
    folder.mkdir(parents=True, exist_ok=True)
    for filename, array in zip(MNIST_FILES, arrays, strict=True):
        write_idx(folder / filename, array)
    return arrays


def cifar_files(count=4):
    rng = np.random.default_rng(0)
    planes = rng.integers(0, 256, (6, count, 3, 32, 32), dtype=np.uint8)
    labels = rng.integers(0, 10, (6, count, 1), dtype=np.uint8)
    records = np.concatenate([labels, planes.reshape(6, count, 3072)], -1)
    return planes, labels[..., 0], {name: r.tobytes() for name, r in zip(CIFAR10_FILES, records, strict=True)}


def check(splits, sizes, shape):
    for images, size in zip((splits.train, splits.validation, splits.test), sizes, strict=True):
        assert images.images.shape == (size, *shape) and images.images.dtype == np.float32
        assert images.images.flags.c_contiguous
        assert images.labels.shape == (size,) and images.labels.dtype == np.int32
        assert images.images.min() >= 0 and images.images.max() <= 1
        assert set(images.labels.tolist()) <= set(range(10))
    assert splits.num_classes == 10


def rows(images):
    """The images as a sorted list of bytes, to compare sets of them."""
    return sorted(image.tobytes() + bytes([label]) for image, label in zip(*images, strict=True))


def test_digits():
    splits = load_images(ImageConfig())
    check(splits, (1197, 300, 300), (8, 8, 1))
    bunch = datasets.load_digits()
    whole = ((bunch.images / 16).astype(np.float32), bunch.target)
    assert sorted(rows(splits.train) + rows(splits.validation) + rows(splits.test)) == rows(whole)
    assert all(set(part.labels.tolist()) == set(range(10)) for part in splits[:3])


def test_seed_moves_validation_but_never_test():
    a, b, again = (load_images(ImageConfig(seed=seed)) for seed in (0, 1, 0))
    assert rows(a.test) == rows(b.test)
    assert rows(a.validation) != rows(b.validation)
    np.testing.assert_array_equal(a.train.images, again.train.images)
    np.testing.assert_array_equal(a.validation.labels, again.validation.labels)


def test_borders_are_cut_and_squares_averaged():
    whole, part = load_images(ImageConfig()), load_images(ImageConfig(crop=1, shrink=3))
    check(part, (1197, 300, 300), (2, 2, 1))
    np.testing.assert_allclose(part.test.images[:, 1, 0], whole.test.images[:, 4:7, 1:4].mean((1, 2)), rtol=1e-6)
    for settings, message in (({"crop": 4}, "crop=4 leaves nothing of images of 8 x 8"), ({"shrink": 3}, "8 x 8")):
        with pytest.raises(ValueError, match=message):
            load_images(ImageConfig(**settings))


@pytest.mark.parametrize("count", [0, 7, 1496])
def test_validation_size(count):
    splits = load_images(ImageConfig(validation=count))
    assert (len(splits.train.labels), len(splits.validation.labels)) == (1497 - count, count)


def test_validation_too_large():
    with pytest.raises(ValueError, match="validation=1497 leaves nothing of the 1497 training images of digits"):
        load_images(ImageConfig(validation=1497))


def test_unknown_name():
    with pytest.raises(ValueError, match=r"'minst': did you mean 'mnist'\? choose one of digits, mnist"):
        load_images(ImageConfig(name="minst"))


def test_mnist(shared_data):
    folder = shared_data(f"mnist/{MNIST_FILES[0]}").parent
    splits = load_images(ImageConfig(name="mnist", dir=str(folder)))
    check(splits, (55_000, 5_000, 10_000), (28, 28, 1))
    # Published counts of the digits 0 to 9 in the training and in the test file.
    train = np.bincount(np.concatenate([splits.train.labels, splits.validation.labels]))
    assert train.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(splits.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert splits.test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    # The mean and deviation everybody normalises MNIST with.
    both = np.concatenate([splits.train.images, splits.validation.images])
    np.testing.assert_allclose([both.mean(dtype=np.float64), both.std(dtype=np.float64)], [0.1307, 0.3081], atol=5e-5)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("nested", [False, True])
def test_idx_sets_are_found_in_either_directory(tmp_path, name, nested):
    train, train_labels, test, test_labels = write_mnist(tmp_path / name if nested else tmp_path)
    splits = load_images(ImageConfig(name=name, dir=str(tmp_path), validation=10))
    check(splits, (50, 10, 20), (28, 28, 1))
    np.testing.assert_array_equal(np.rint(splits.test.images[..., 0] * 255), test)
    np.testing.assert_array_equal(splits.test.labels, test_labels)
    both = [np.concatenate(parts) for parts in zip(splits.train, splits.validation, strict=True)]
    assert rows(both) == rows([(train[..., None] / np.float32(255)).astype(np.float32), train_labels])


def test_counts_that_do_not_match(tmp_path):
    write_mnist(tmp_path)
    write_idx(tmp_path / MNIST_FILES[1], np.zeros(59, np.uint8))
    with pytest.raises(ValueError, match="mnist train set has 60 images but 59 labels"):
        load_images(ImageConfig(name="mnist", dir=str(tmp_path)))


def test_labels_out_of_range(tmp_path):
    write_mnist(tmp_path)
    write_idx(tmp_path / MNIST_FILES[3], np.full(20, 10, np.uint8))
    with pytest.raises(ValueError, match=r"mnist test set: expected labels 0 to 9, found \[10\]"):
        load_images(ImageConfig(name="mnist", dir=str(tmp_path)))


GOOD = bytes([0, 0, 8, 2]) + (3).to_bytes(4, "big") + (2).to_bytes(4, "big") + bytes(6)
DAMAGED = {
    "not gzip": (b"<html>not found</html>", "not a complete gzip file"),
    "cut gzip": (gzip.compress(GOOD)[:-12], "not a complete gzip file"),
    "flipped bits": (gzip.compress(GOOD)[:12] + b"\xff\xff" + gzip.compress(GOOD)[14:], "not a complete gzip file"),
    "empty": (gzip.compress(b""), "not an IDX file of unsigned bytes: it begins and ends"),
    "wrong magic": (gzip.compress(b"\x01" + GOOD[1:]), "it begins 01 00 08 02"),
    "other type": (gzip.compress(GOOD[:2] + b"\x0d" + GOOD[3:]), "it begins 00 00 0d 02"),
    "cut header": (gzip.compress(GOOD[:9]), "not an IDX file"),
    "short": (gzip.compress(GOOD[:-1]), r"shape \(3, 2\) needs 18 bytes uncompressed, found 17"),
    "long": (gzip.compress(GOOD + b"\0"), r"shape \(3, 2\) needs 18 bytes uncompressed, found 19"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_idx(tmp_path, case):
    data, message = DAMAGED[case]
    path = tmp_path / "images.gz"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"images.gz.*{message}"):
        read_idx(path, 2)


@pytest.mark.parametrize("place", [CIFAR10_FOLDER, f"cifar10/{CIFAR10_FOLDER}", ".", "archive"])
def test_cifar10(tmp_path, place):
    planes, labels, files = cifar_files()
    if place == "archive":
        with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
            for filename, data in files.items():
                info = tarfile.TarInfo(f"{CIFAR10_FOLDER}/{filename}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    else:
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        for filename, data in files.items():
            (tmp_path / place / filename).write_bytes(data)
    splits = load_images(ImageConfig(name="cifar10", dir=str(tmp_path), validation=3))
    check(splits, (17, 3, 4), (32, 32, 3))
    np.testing.assert_array_equal(np.rint(splits.test.images * 255), planes[5].transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(splits.test.labels, labels[5])


def test_damaged_cifar10(tmp_path):
    _, _, files = cifar_files()
    for filename, data in files.items():
        (tmp_path / filename).write_bytes(data)
    (tmp_path / "data_batch_3.bin").write_bytes(files["data_batch_3.bin"][:-1])
    with pytest.raises(ValueError, match=r"data_batch_3.bin: expected a multiple of 3073 bytes .* found 12291"):
        load_images(ImageConfig(name="cifar10", dir=str(tmp_path)))


@pytest.mark.parametrize("data", [b"not an archive", gzip.compress(b"no members either")], ids=["text", "gzip"])
def test_damaged_cifar10_archive(tmp_path, data):
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(data)
    with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz is damaged"):
        load_images(ImageConfig(name="cifar10", dir=str(tmp_path)))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_every_missing_file_is_named(tmp_path, monkeypatch, name):
    def closed(url, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("pooch.retrieve", closed)
    with pytest.raises(DataUnavailable, match="--config.data.dir=") as caught:
        load_images(ImageConfig(name=name, dir=str(tmp_path)))
    for filename in (images_module.CIFAR10.filename,) if name == "cifar10" else MNIST_FILES:
        assert filename in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
