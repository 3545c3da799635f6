"""Counts of strong tickets against every subnetwork, one by one, and laws of growth against data made from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lottery import strong

CONFIG = strong.AnnealConfig(population=256, steps=40)
SIZE = 4 * 3 + 3 * 2


def errors(first, second, x, labels, masks):
    """Errors of the subnetworks of a network with one hidden layer, 18 weights."""
    one, two = masks[:, :12].reshape(-1, 4, 3), masks[:, 12:].reshape(-1, 3, 2)
    hidden = jax.nn.relu(jnp.einsum("bi,pih->pbh", x, first[None] * one))
    return jnp.sum(jnp.argmax(jnp.einsum("pbh,phc->pbc", hidden, second[None] * two), -1) != labels[None], -1).astype(
        jnp.float32
    )


def problem(seed):
    a, b, c = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(c, (60, 4))
    labels = (x[:, 0] + 0.5 * x[:, 1] - x[:, 2] > 0).astype(int)
    return jax.tree_util.Partial(errors, jax.random.normal(a, (4, 3)), jax.random.normal(b, (3, 2)), x, labels)


def test_every_subnetwork_by_hand():
    count = problem(0)
    all_errors = strong.enumerate_errors(count, SIZE)
    assert all_errors.shape == (2**SIZE,)
    for number in (0, 1, 12345, 2**SIZE - 1):
        bits = np.array([[number >> i & 1 for i in range(SIZE)]], bool)
        assert all_errors[number] == float(count(jnp.asarray(bits))[0])
    with pytest.raises(ValueError, match="2\\^23 masks"):
        strong.enumerate_errors(count, 23)


@pytest.mark.long
@pytest.mark.parametrize("seed", [3, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (5, 22))])
def test_the_count_is_that_of_enumeration_within_its_interval(seed):
    count, (pilot_key, *keys) = problem(seed), jax.random.split(jax.random.key(100 + seed), 7)
    all_errors = strong.enumerate_errors(count, SIZE)
    target = float(np.sort(all_errors)[30])
    pilot = strong.choose_ladder(count, SIZE, target, CONFIG, key=pilot_key)
    runs = [strong.anneal(count, SIZE, target, pilot.betas, CONFIG, key=key) for key in keys]
    for threshold in (target, *map(float, np.quantile(all_errors, [0.01, 0.2]))):
        found = strong.log_share(runs, target, threshold, pilot)
        share = np.log(np.mean(all_errors <= threshold))
        assert abs(found.mean - share) <= found.half < 0.6
    # The ladder's ratio of sums, at its last temperature.
    exact = np.log(np.mean(np.exp(-pilot.betas[-1] * np.maximum(all_errors - target, 0))))
    assert np.mean([run.log_z[-1] for run in runs]) == pytest.approx(exact, abs=0.4)
    with pytest.raises(ValueError, match="below the target"):
        strong.log_share(runs, target, target - 1, pilot)


@pytest.mark.parametrize("coldest", [0.5, 3.0])
def test_a_pilot_goes_no_colder_than_it_may(coldest):
    count_off = lambda masks: jnp.sum(~masks, axis=1).astype(jnp.float32)  # noqa: E731
    config = strong.AnnealConfig(population=32, steps=2, levels=12, coldest=coldest)
    pilot = strong.choose_ladder(count_off, 40, 0, config, key=jax.random.key(0))
    assert pilot.betas.max() == pytest.approx(coldest)


def test_no_mask_that_is_good_enough_is_a_share_of_zero():
    count = problem(0)
    config = strong.AnnealConfig(population=16, steps=2, levels=3)
    pilot = strong.choose_ladder(count, SIZE, -1, config, key=jax.random.key(0))
    assert len(pilot.betas) == 3
    run = strong.anneal(count, SIZE, -1, pilot.betas, config, key=jax.random.key(1))
    found = strong.log_share([run, run], -1, -1, pilot)
    assert found.mean == -np.inf and np.isnan(found.half)
    with pytest.raises(ValueError, match="begin at 0"):
        strong.anneal(count, SIZE, 0, np.array([1.0, 2.0]), config, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("law", "logs"),
    [
        ("exponential", lambda x: 1 + 0.3 * x),
        ("power", lambda x: 2 + 1.7 * np.log(x)),
        ("linear", lambda x: np.log(3 * (x + 40))),
    ],
)
def test_the_law_that_made_the_counts_is_the_likeliest(law, logs):
    x = np.repeat([4.0, 8.0, 16.0, 32.0, 64.0], 5)
    y = logs(x) + 0.02 * np.random.default_rng(0).normal(size=len(x))
    first, second, _ = strong.growth(x, y)
    assert first.law == law and first.log_likelihood > second.log_likelihood + 3
    log_a, b = first.coefficients
    fitted = {"exponential": log_a + b * x, "power": log_a + b * np.log(x), "linear": log_a + np.log(x + b)}[law]
    np.testing.assert_allclose(fitted, logs(x), atol=0.02)
    with pytest.raises(ValueError, match="three different ones"):
        strong.growth(np.array([1.0, 2.0, 2.0]), np.zeros(3))


@pytest.mark.parametrize("wrong", [{"population": 1}, {"survivors": 1.0}, {"flips": ()}, {"rise": 0.0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}"):
        strong.AnnealConfig(**wrong)
