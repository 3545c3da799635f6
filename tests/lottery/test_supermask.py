"""Networks found by choosing weights, and what the parts of a mask do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from lottery import allocation, masks, prune, supermask
from tessera.models.vision import LeNet, MLPConfig

PARAMS = {"a": {"kernel": jax.random.normal(jax.random.key(0), (8, 6)), "bias": jnp.ones(6)}}
WHICH = masks.prunable(PARAMS)


def test_popup_keeps_the_highest_scores_and_passes_gradients_straight_through():
    popups = supermask.initial_scores(PARAMS, key=jax.random.key(1))
    assert float(jnp.abs(popups["a"]["kernel"]).max()) <= 8**-0.5
    counts = {"a/kernel": 12}
    slope = jax.random.normal(jax.random.key(2), (8, 6))

    def loss(popups, params):
        out = supermask.popup(params, popups, WHICH, counts)
        return jnp.sum(out["a"]["kernel"] * slope) + jnp.sum(out["a"]["bias"])

    chosen = supermask.popup(PARAMS, popups, WHICH, counts)["a"]["kernel"]
    score = np.asarray(popups["a"]["kernel"]).ravel()
    assert set(np.flatnonzero(np.asarray(chosen))) == set(np.argsort(-score)[:12])
    to_scores, to_weights = jax.jit(jax.grad(loss, argnums=(0, 1)))(popups, PARAMS)
    # Ramanujan et al. 2020, equation 7, for weights in and out of the subnetwork alike.
    np.testing.assert_allclose(to_scores["a"]["kernel"], slope * PARAMS["a"]["kernel"], rtol=1e-6)
    assert not np.any(to_scores["a"]["bias"])
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(to_weights))


@pytest.mark.long
def test_edge_popup_on_digits_beats_chance_by_far_with_untrained_weights():
    digits = load_digits()
    x, y = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target, jnp.int32)
    model = LeNet(MLPConfig((128,)))
    params = model.init(jax.random.key(0), x[:1])["params"]
    which = masks.prunable(params)
    params = supermask.signed_constant(params, which)
    shapes = {path: leaf.shape for path, leaf in masks.flatten(params).items()}
    counts = allocation.counts(prune.sizes(params, which), allocation.Uniform(0.5), shapes)
    tx = optax.sgd(0.1, momentum=0.9)

    def accuracy(popups, x, y):
        logits = model.apply({"params": supermask.popup(params, popups, which, counts)}, x)
        return jnp.mean(logits.argmax(-1) == y)

    @jax.jit
    def train(popups, x, y):
        def loss(popups, rows):
            logits = model.apply({"params": supermask.popup(params, popups, which, counts)}, x[rows])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

        def step(carry, i):
            popups, state = carry
            rows = jax.random.randint(jax.random.fold_in(jax.random.key(2), i), (64,), 0, 1300)
            updates, state = tx.update(jax.grad(loss)(popups, rows), state)
            return (optax.apply_updates(popups, updates), state), None

        before = accuracy(popups, x[1300:], y[1300:])
        (popups, _), _ = jax.lax.scan(step, (popups, tx.init(popups)), jnp.arange(200))
        return before, accuracy(popups, x[1300:], y[1300:]), popups

    before, after, popups = train(supermask.initial_scores(params, key=jax.random.key(1)), x, y)
    assert float(before) < 0.35 and float(after) > 0.8, (before, after)
    kept = masks.count(supermask.popup_masks(popups, which, counts), which)
    assert {path: int(count) for path, count in kept.items()} == counts


INITIAL = {"kernel": jnp.array([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]])}
FINAL = {"kernel": jnp.array([[4.0, -2.5, 2.0], [-4.0, -1.0, -8.0]])}


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("large_final", [4, 2.5, 2, 4, 1, 8]),
        ("small_final", [-4, -2.5, -2, -4, -1, -8]),
        ("large_init", [1, 2, 3, 4, 5, 6]),
        ("small_init", [-1, -2, -3, -4, -5, -6]),
        ("large_init_large_final", [1, 2, 2, 4, 1, 6]),
        ("small_init_small_final", [-4, -2.5, -3, -4, -5, -8]),
        ("magnitude_increase", [3, 0.5, -1, 0, -4, 2]),
        ("movement", [3, 0.5, 1, 0, 6, 2]),
    ],
)
def test_mask_criteria_by_hand(criterion, expected):
    np.testing.assert_allclose(supermask.MASK_CRITERIA[criterion](INITIAL, FINAL)["kernel"].ravel(), expected)


@pytest.mark.parametrize("keep_sign", [False, True])
@pytest.mark.parametrize(
    ("one", "zero"), [*((one, "zero") for one in supermask.MASK_ONE), ("rewind", "initial"), ("constant", "initial")]
)
def test_treatments(one, zero, keep_sign):
    key = jax.random.key(3)
    initial = {"kernel": jax.random.normal(key, (40, 30)), "bias": jnp.ones(30)}
    fresh = {"kernel": jax.random.normal(jax.random.key(4), (40, 30)), "bias": jnp.zeros(30)}
    mask = {"kernel": jax.random.bernoulli(jax.random.key(5), 0.3, (40, 30)), "bias": jnp.ones(30, bool)}
    which = {"kernel": True, "bias": False}
    out = supermask.ablate_weights(initial, mask, which, one, keep_sign, zero, key=key, fresh=fresh)
    got, before, kept = (np.asarray(tree["kernel"]) for tree in (out, initial, mask))
    np.testing.assert_array_equal(out["bias"], initial["bias"])
    np.testing.assert_array_equal(got[~kept], before[~kept] if zero == "initial" else 0)
    values = np.sort(np.abs(got[kept]))
    want = {
        "rewind": np.abs(before[kept]),
        "reinit": np.abs(np.asarray(fresh["kernel"])[kept]),
        "shuffle": np.abs(before[kept]),
        "constant": np.full(kept.sum(), before.std()),
    }[one]
    np.testing.assert_allclose(values, np.sort(want), rtol=1e-5)
    agree = np.mean(np.sign(got[kept]) == np.sign(before[kept]))
    assert agree == 1 if keep_sign or one == "rewind" else 0.4 < agree < 0.6
    if one == "shuffle":
        assert np.mean(np.abs(got[kept]) == np.abs(before[kept])) < 0.05


def test_signed_constant_and_errors():
    out = supermask.signed_constant(PARAMS, WHICH)
    kernel = np.asarray(PARAMS["a"]["kernel"])
    np.testing.assert_allclose(out["a"]["kernel"], np.sign(kernel) * kernel.std(), rtol=1e-5)
    np.testing.assert_array_equal(out["a"]["bias"], PARAMS["a"]["bias"])
    for options, message in [({"one": "keep"}, "'keep'.*rewind, reinit"), ({"one": "reinit"}, "needs fresh")]:
        with pytest.raises(ValueError, match=message):
            supermask.ablate_weights(PARAMS, masks.ones(PARAMS), WHICH, **options, key=jax.random.key(0))
