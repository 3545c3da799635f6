"""Images of one's own: arrays, class folders, `datasets` and CIFAR-100's layout; damage and mismatches named."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from tessera.data.image_stream import AugmentConfig, held_out_images, stream_images
from tessera.data.images import CIFAR100, ImageConfig, class_folders, image_splits, load_images
from tessera.infra.errors import ConfigError

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (60, 5, 4, 3), np.uint8)
Y = np.arange(60) % 3
WITHOUT = {"validation": 6, "test": 0.25}


def folders(root, x=X, y=Y, part=""):
    for i, (image, label) in enumerate(zip(x, y, strict=True)):
        folder = root / part / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return root


def rows(images, labels):
    """Pairs as a set, whatever their order."""
    return {
        (np.round(image * 255).astype(int).tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    }


@pytest.mark.parametrize("kind", ["npz", "npy", "folders", "datasets", "arrays"])
def test_one_set_in_every_form(kind, tmp_path):
    path = tmp_path / "set"
    if kind == "npz":
        np.savez(path.with_suffix(".npz"), x=X, y=Y[:, None])
        path = path.with_suffix(".npz")
    elif kind == "npy":
        path.mkdir()
        np.save(path / "x.npy", X)
        np.save(path / "y.npy", Y)
    elif kind == "folders":
        folders(path)
    elif kind == "datasets":
        datasets = pytest.importorskip("datasets")
        datasets.disable_progress_bars()
        pictures = [Image.fromarray(image) for image in X]
        datasets.Dataset.from_dict({"image": pictures, "label": Y.tolist()}).save_to_disk(str(path))
    if kind == "arrays":
        found = image_splits(X, Y, config=ImageConfig(**WITHOUT))
    else:
        found = load_images(ImageConfig(name=str(path), **WITHOUT))
    assert found.num_classes == 3 and [len(part.labels) for part in found[:3]] == [39, 6, 15]
    whole = [rows(part.images, part.labels) for part in found[:3]]
    assert set().union(*whole) == rows(X / 255, Y) and sum(map(len, whole)) == 60


def test_a_test_set_of_its_own_and_normalization(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=X[:40], y_train=Y[:40], x_test=X[40:], y_test=Y[40:])
    plain = load_images(ImageConfig(name="a.npz", dir=str(tmp_path), validation=4))
    assert rows(plain.test.images, plain.test.labels) == rows(X[40:] / 255, Y[40:])
    found = load_images(ImageConfig(name="a.npz", dir=str(tmp_path), validation=4, normalize=True))
    images = plain.train.images.astype(np.float64)
    mean, std = images.mean((0, 1, 2)), images.std((0, 1, 2))
    np.testing.assert_allclose(found.test.images, (plain.test.images - mean) / std, atol=1e-5)
    np.testing.assert_allclose(found.train.images.mean((0, 1, 2)), 0, atol=1e-5)
    folders(folders(tmp_path / "both", X[:40], Y[:40], "train"), X[40:], Y[40:], "val")
    both = load_images(ImageConfig(name=str(tmp_path / "both"), validation=4))
    assert rows(both.test.images, both.test.labels) == rows(X[40:] / 255, Y[40:])


def test_floats_stay_and_vectors_become_images():
    x = RNG.normal(size=(50, 7)).astype(np.float32)
    found = image_splits(x, np.arange(50) % 2)
    assert found.train.images.shape[1:] == (1, 7, 1)
    assert {row.tobytes() for part in found[:3] for row in part.images} == {row.tobytes() for row in x}


def cifar100(count, seed):
    """Records of https://www.cs.toronto.edu/~kriz/cifar.html: coarse label, fine label, 1024 red, green, blue bytes."""
    rng = np.random.default_rng(seed)
    coarse, fine = rng.integers(0, 20, count, np.uint8), rng.integers(0, 100, count, np.uint8)
    pixels = rng.integers(0, 256, (count, 3, 32, 32), np.uint8)
    data = b"".join(bytes([c, f]) + image.tobytes() for c, f, image in zip(coarse, fine, pixels, strict=True))
    return data, pixels, fine


@pytest.mark.parametrize("packed", [True, False])
def test_cifar100_in_the_published_layout(packed, tmp_path):
    parts = {"train.bin": cifar100(30, 0), "test.bin": cifar100(8, 1)}
    if packed:
        with tarfile.open(tmp_path / CIFAR100.filename, "w:gz") as archive:
            for name, (data, *_) in parts.items():
                info = tarfile.TarInfo(f"cifar-100-binary/{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    else:
        (tmp_path / "cifar-100-binary").mkdir()
        for name, (data, *_) in parts.items():
            (tmp_path / "cifar-100-binary" / name).write_bytes(data)
    found = load_images(ImageConfig(name="cifar100", dir=str(tmp_path), validation=5))
    assert found.num_classes == 100 and len(found.train.labels) == 25
    _, pixels, fine = parts["test.bin"]
    np.testing.assert_array_equal(found.test.labels, fine)
    np.testing.assert_allclose(found.test.images[3, 10, 20], pixels[3, :, 10, 20] / 255, rtol=1e-6)


def no_picture(root):
    folders(root)
    (root / "class1" / "zzz.png").write_bytes(b"\x89PNG not at all")
    return root


def cut_picture(root):
    folders(root)
    path = sorted((root / "class0").iterdir())[1]
    path.write_bytes(path.read_bytes()[:-40])
    return root


def npz(root, **arrays):
    root.mkdir()
    np.savez(root / "a.npz", **arrays)
    return root / "a.npz"


def damaged(path):
    path.write_bytes(path.read_bytes()[:-30])
    return path


def other_size(root):
    Image.fromarray(X[0][:4]).save(folders(root) / "class2" / "zzz.png")
    return root


BAD = {
    "no picture": (no_picture, r"class1/zzz.png: no picture that Pillow decodes \(cannot identify"),
    "cut picture": (cut_picture, "class0/.*.png: no picture that Pillow decodes"),
    "sizes": (other_size, "zzz.png: pictures of 4 x 4 and 5 x 4; set config.data.size"),
    "class of test": (
        lambda d: folders(folders(d, X[:40], Y[:40] % 2, "train"), X[40:], Y[40:], "test"),
        "classes class2 of test are missing in training",
    ),
    "class of arrays": (
        lambda d: npz(d, x_train=X[:40], y_train=Y[:40] % 2, x_test=X[40:], y_test=Y[40:]),
        "a.npz: classes 2 of test are missing in training",
    ),
    "no folders": (lambda d: d.mkdir() or d, "no pictures; CLASS/.*.png or train/CLASS"),
    "names": (lambda d: npz(d, a=X), "a.npz: arrays a; x_train, y_train, x_test, y_test or "),
    "damaged": (lambda d: damaged(npz(d, x=X, y=Y)), "a.npz: no arrays, or damaged"),
    "integers": (lambda d: npz(d, x=X.astype(int), y=Y), "x is int64; uint8 or floating-point"),
    "shape": (lambda d: npz(d, x=X[:, 0, 0, 0], y=Y), r"x has shape \(60,\); \[N, H, W, C\]"),
    "count": (lambda d: npz(d, x=X, y=Y[:-1]), "60 images, and 59 labels in y"),
    "labels": (lambda d: npz(d, x=X, y=Y - 1), "y is int64 of shape .*; classes .N. from 0"),
    "not finite": (
        lambda d: npz(d, x=np.where(np.arange(60)[:, None, None] == 7, np.nan, np.ones((60, 5, 4))), y=Y),
        r"x has values that are not finite, the first at \(7, 0, 0\)",
    ),
    "alike": (
        lambda d: npz(d, x_train=X, y_train=Y, x_test=X[:, :4], y_test=Y),
        r"images of training and test are uint8 \(5, 4, 3\) and uint8 \(4, 4, 3\); they must be alike",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, tmp_path):
    make, message = BAD[case]
    with pytest.raises(ConfigError, match=message) as error:
        load_images(ImageConfig(name=str(make(tmp_path / "set"))))
    assert "\n" not in str(error.value)


def test_a_data_set_without_the_column(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"img": [1, 2], "label": [0, 1]}).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(ConfigError, match="no column 'image'; there are 'img', 'label'"):
        load_images(ImageConfig(name=str(tmp_path / "set")))
    with pytest.raises(ConfigError, match="row 1: a int; a picture is needed"):
        load_images(ImageConfig(name=str(tmp_path / "set"), image_column="img"))


def batches(files, count, skip=0, **kwargs):
    options = {"batch_size": 6, "seed": 3} | kwargs
    made = stream_images(files, AugmentConfig(5, crop=2, flip=True, mean=(0.5,) * 3, std=(0.25,) * 3), **options)
    for _ in range(skip):
        next(made)
    return [next(made) for _ in range(count)], made.get_state()


def test_streamed_pictures_are_decoded_and_augmented_in_a_fixed_order(tmp_path):
    x = RNG.integers(0, 256, (24, 5, 5, 3), np.uint8)
    files = class_folders(folders(tmp_path / "set", x, np.arange(24) % 3), 0.25).train
    assert len(files) == 18
    first, state = batches(files, 4)
    other_workers, _ = batches(files, 4, workers=1)
    shares = [batches(files, 4, process_index=p, process_count=3)[0] for p in range(3)]
    seen = []
    for step, batch in enumerate(first):
        for name in batch:
            np.testing.assert_array_equal(other_workers[step][name], batch[name])
            interleaved = np.stack([share[step][name] for share in shares], 1).reshape(batch[name].shape)
            np.testing.assert_array_equal(interleaved, batch[name])
        for image, label, number in zip(batch["images"], batch["labels"], batch["ids"], strict=True):
            path, wanted = files[number]
            assert label == wanted
            padded = np.pad(np.asarray(Image.open(path), np.float32) / 255, ((2, 2), (2, 2), (0, 0)))
            padded = (padded - 0.5) / 0.25
            windows = {
                (y, z, flip): padded[y : y + 5, z : z + 5][:, :: -1 if flip else 1]
                for y in range(5)
                for z in range(5)
                for flip in (False, True)
            }
            matches = [key for key, window in windows.items() if np.abs(window - image).max() < 1e-5]
            assert matches, "no window of the padded picture, mirrored or not"
            seen.append(matches[0])
    assert {y for y, _, _ in seen} == {z for _, z, _ in seen} == set(range(5))  # the last row and column too
    assert len(set(seen)) > 8 and {flip for *_, flip in seen} == {False, True}
    assert sorted(np.concatenate([batch["ids"] for batch in first[:3]])) == list(range(18))
    fresh = stream_images(files, AugmentConfig(5), batch_size=6, seed=3)
    fresh.set_state(state)
    np.testing.assert_array_equal(next(fresh)["ids"], batches(files, 1, skip=4)[0][0]["ids"])


@pytest.mark.parametrize("processes", [1, 2])
def test_held_out_pictures_come_once_as_they_are_and_what_fills_the_last_batch_has_no_weight(tmp_path, processes):
    x = RNG.integers(0, 256, (10, 5, 5, 3), np.uint8)
    files = class_folders(folders(tmp_path / "set", x, np.arange(10) % 2), 0.0).train
    augment = AugmentConfig(5, crop=2, flip=True, mean=(0.5,) * 3, std=(0.25,) * 3)
    how = {"batch_size": 4, "process_count": processes}
    shares = [list(held_out_images(files, augment, process_index=p, **how)) for p in range(processes)]
    assert [len(batches) for batches in shares] == [3] * processes
    found = {name: np.concatenate([batch[name] for one in shares for batch in one]) for name in shares[0][0]}
    np.testing.assert_array_equal(found["weights"], found["ids"] >= 0)
    live = np.flatnonzero(found["weights"])
    assert sorted(found["ids"][live]) == list(range(10)) and len(found["ids"]) == 12
    for k in live:
        path, label = files[found["ids"][k]]
        pixels = (np.asarray(Image.open(path), np.float32) / 255 - 0.5) / 0.25
        np.testing.assert_allclose(found["images"][k], pixels, atol=1e-6)
        assert found["labels"][k] == label
