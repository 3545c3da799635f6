"""Text cut into windows in memory: which tokens are where, and how many of each split stay."""

import numpy as np
import pytest

from tessera.data.text import TextConfig
from tessera.data.windows import WindowConfig, load_windows, windows


def test_windows_follow_each_other_and_targets_are_the_next_tokens():
    found = windows(np.arange(14), 4)
    np.testing.assert_array_equal(found.images, np.arange(12).reshape(3, 4))
    np.testing.assert_array_equal(found.labels, np.arange(1, 13).reshape(3, 4))
    assert windows(np.arange(13), 4).images.shape == (3, 4) and windows(np.arange(12), 4).images.shape == (2, 4)
    with pytest.raises(ValueError, match="text: 4 tokens do not fill one window of length=4"):
        windows(np.arange(4), 4)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, (15, 7, 7)),
        ({"limit": 2}, (2, 7, 7)),
        ({"test_limit": 3}, (15, 3, 3)),
        ({"limit": 4, "test_limit": 1}, (4, 1, 1)),
    ],
)
def test_limits_are_of_training_or_of_both_other_splits(tmp_path, limits, expected):
    """320 bytes: 160 to train on, 80 to validate, 80 to test; the first windows of each stay."""
    words = bytes(range(65, 91)) * 13
    (tmp_path / "words.txt").write_bytes(words[:320])
    text = TextConfig(name=str(tmp_path / "words.txt"), tokenizer="bytes", validation=0.25, test=0.25)
    found = load_windows(WindowConfig(text, length=10, **limits))
    assert tuple(len(split.images) for split in (found.train, found.validation, found.test)) == expected
    whole = load_windows(WindowConfig(text, length=10))
    for name, count in zip(("train", "validation", "test"), expected, strict=True):
        np.testing.assert_array_equal(getattr(found, name).images, getattr(whole, name).images[:count])
        np.testing.assert_array_equal(getattr(found, name).labels, getattr(whole, name).labels[:count])
    assert found.num_classes == 256
