"""The study of strong tickets: its images, its errors of subnetworks, and what it makes of counts."""

import jax
import jax.numpy as jnp
import numpy as np

from lottery import masks as masks_lib
from tessera.data.images import Images, ImageSplits
from tessera.models.registry import make_network
from tessera.tickets.studies import strong


def test_a_choice_of_classes_is_numbered_anew():
    labels = np.array([3, 8, 1, 3, 8], np.int32)
    part = Images(np.arange(5, dtype=np.float32).reshape(5, 1, 1, 1), labels)
    found = strong.only(ImageSplits(part, part, part, 10), (8, 3))
    assert found.num_classes == 2 and found.train.labels.tolist() == [0, 1, 0, 1]
    assert found.test.images.ravel().tolist() == [0, 1, 3, 4]


def test_errors_are_those_of_the_masked_network_alone():
    keys = jax.random.split(jax.random.key(0), 3)
    images, labels = np.asarray(jax.random.normal(keys[0], (20, 2, 2, 1))), np.arange(20) % 3
    network = make_network({"name": "lenet", "hidden": (3,)}, images[:1], 3)
    params = network.init(keys[1])
    which = masks_lib.prunable(params)
    masks = np.asarray(jax.random.bernoulli(keys[2], 0.5, (5, 4 * 3 + 3 * 3)))
    found = strong.errors_of(network, params, which, jnp.asarray(images), jnp.asarray(labels))(jnp.asarray(masks))
    bias = {layer: np.asarray(leaves["bias"]) for layer, leaves in params.items()}
    for mask, errors in zip(masks, found, strict=True):
        first = np.asarray(params["dense0"]["kernel"]) * mask[:12].reshape(4, 3)
        last = np.asarray(params["output"]["kernel"]) * mask[12:].reshape(3, 3)
        logits = np.maximum(images.reshape(20, 4) @ first + bias["dense0"], 0) @ last
        assert errors == np.sum((logits + bias["output"]).argmax(-1) != labels)


def row(depth, width, seed, share, fixed=-1.0):
    bits = 10 * depth * width
    return {"depth": depth, "width": width, "seed": seed, "weights": bits, "images": 100, "dense_accuracy": 0.9} | {
        "target": 4,
        "least_errors": 3 if share is not None else 9,
        "half": share and 0.1,
        "log_share": share,
        "log_share_fixed": fixed,
        "curve": [[0.9, -1.0]],
    }


def test_counts_are_shares_of_all_masks_and_grow_by_the_likeliest_law():
    study = strong.StrongConfig(widths=(2, 4, 8), depths=(1, 2))
    # A share that does not depend on the width: 2^n times a constant, exponential in the number of weights.
    rows = [row(d, w, seed, -3 - 0.1 * seed) for d in (1, 2) for w in (2, 4, 8) for seed in range(3)]
    rows.append(row(2, 8, 3, None, None))
    np.testing.assert_allclose(strong.log_counts(rows[:1]), 20 * np.log(2) - 3)
    laws = strong._laws(rows, study)
    assert [line[7] for line in laws.rows] == ["exponential"] * len(laws.rows)
    assert all(line[8] == ("1" if line[2] == "weights" else f"{10 * int(line[0][-1])}") for line in laws.rows)
    cells = {(d, w): [r for r in rows if (r["depth"], r["width"]) == (d, w)] for d in (1, 2) for w in (2, 4, 8)}
    line = strong._line(2, 8, cells[2, 8], "log_share")
    assert line[-1] == "3 of 4" and line[4].startswith("-1.3 ±") and line[2] == 160
    text = " ".join(strong._findings(cells, rows, study))
    assert "exponential in 4" in text and "In 1 of 19 networks (depth x width: 2 x 8)" in text
    assert len(strong._figure(cells, study)().axes) == 3
