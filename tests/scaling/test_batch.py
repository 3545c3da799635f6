import numpy as np
import pytest

from scaling.batch import critical_batch, fit_rule, fit_surface


def test_the_noise_scale_averages_before_it_divides():
    rng = np.random.default_rng(0)
    # |G|^2 = 2, tr(Sigma) = 30; single measurements of the signal are as likely negative as not.
    signal, noise = 2 + 4 * rng.standard_normal(4000), 30 + 5 * rng.standard_normal(4000)
    found = critical_batch(signal, noise)
    assert found.examples == pytest.approx(15, rel=0.05)
    assert found.low < 15 < found.high and found.high / found.low < 1.2
    assert abs(np.mean(noise / signal) - 15) > 1  # what dividing first would give


def test_intervals_of_the_noise_scale_cover():
    rng = np.random.default_rng(1)
    held = 0
    for i in range(300):
        found = critical_batch(2 + rng.standard_normal(40), 30 + 5 * rng.standard_normal(40), resamples=400, seed=i)
        held += found.low <= 15 <= found.high
    assert 0.88 <= held / 300 <= 0.98


def test_a_single_measurement_has_no_interval():
    found = critical_batch(np.array([2.0]), np.array([30.0]))
    assert found.examples == 15 and np.isnan(found.low)
    with pytest.raises(ValueError, match="more batches"):
        critical_batch(np.array([-1.0]), np.array([30.0]))
    with pytest.raises(ValueError, match="0 measurements"):
        critical_batch(np.zeros(0), np.zeros(0))


def grid(lr=3e-3, batch=40.0, noise=0.0, lrs=7, batches=6, seed=0):
    """A quadratic in logarithms with its minimum at (lr, batch) and a ridge along lr ~ batch^0.5."""
    x, y = np.meshgrid(np.geomspace(3e-4, 3e-2, lrs), np.geomspace(8, 256, batches))
    u, v = np.log(x / lr).ravel(), np.log(y / batch).ravel()
    loss = 2 + 0.03 * (u - 0.5 * v) ** 2 + 0.01 * v**2
    return x.ravel(), y.ravel(), loss + noise * np.random.default_rng(seed).standard_normal(len(u))


def test_the_surface_over_learning_rate_and_batch_is_recovered():
    found = fit_surface(*grid())
    assert not found.refused
    assert (found.lr, found.batch, found.loss, found.ridge) == pytest.approx((3e-3, 40, 2, 0.5), rel=1e-6)
    np.testing.assert_allclose(found.hessian, [[0.06, -0.03], [-0.03, 0.035]], rtol=1e-6)
    noisy = [fit_surface(*grid(noise=5e-3, seed=i)) for i in range(30)]
    assert np.mean(np.log([s.lr for s in noisy])) == pytest.approx(np.log(3e-3), abs=0.1)


@pytest.mark.parametrize(
    ("lr", "batch", "message"),
    [(1.0, 40.0, "larger learning"), (3e-3, 4.0, "smaller batches"), (1e-5, 1e4, "and larger")],
)
def test_a_minimum_at_the_edge_is_refused(lr, batch, message):
    found = fit_surface(*grid(lr, batch))
    assert message in found.refused and np.isnan(found.lr)


def test_noise_and_saddles_are_refused():
    lr, batch, loss = grid()
    assert "no minimum" in fit_surface(lr, batch, -loss).refused
    rng = np.random.default_rng(0)
    assert sum(bool(fit_surface(lr, batch, rng.standard_normal(len(lr))).refused) for _ in range(20)) > 10
    with pytest.raises(ValueError, match="2 learning rates"):
        fit_surface(*grid(lrs=2))
    with pytest.raises(ValueError, match="are left|are needed"):
        fit_surface(lr, batch, loss, within=1e-6)


def test_a_rule_through_the_best_of_several_sizes():
    params = np.array([1e4, 1e5, 1e6])
    rule = fit_rule(params, 0.01 * (params / 1e5) ** -0.25)
    assert rule.exponent == pytest.approx(-0.25) and rule(1e5) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="do not determine a power law of params and tokens"):
        fit_rule(params, params, 1e15 / params)


# Best (learning rate, batch) of N parameters and D tokens: mean logarithms of the runs within 0.25% of the best loss of
# the released dense runs of Li et al. (2025), github.com/step-law/steplaw, data/dense_lr_bs_loss.csv.
STEP_LAW = np.array([
    (214663680, 4.00e9, 2.3225e-3, 90.51), (214663680, 1.14e10, 3.2846e-3, 184.61),
    (214663680, 2.00e10, 3.9066e-3, 238.23), (214663680, 1.00e11, 4.1199e-3, 634.16),
    (268304384, 5.00e9, 2.3225e-3, 90.51), (268304384, 1.42e10, 2.7620e-3, 185.65),
    (268304384, 2.50e10, 3.5379e-3, 310.93), (268304384, 8.00e10, 3.9060e-3, 609.34),
    (429260800, 8.00e9, 1.2886e-3, 97.01), (429260800, 2.27e10, 2.0374e-3, 219.30),
    (429260800, 4.00e10, 2.2550e-3, 280.67), (429260800, 5.00e10, 2.7620e-3, 327.36),
    (536872960, 1.00e10, 1.3810e-3, 131.05), (536872960, 2.84e10, 1.9511e-3, 221.70),
    (536872960, 5.00e10, 2.0275e-3, 321.63), (1073741824, 2.00e10, 1.0198e-3, 177.22),
    (1073741824, 5.69e10, 1.2175e-3, 311.88),
])  # fmt: skip


def test_rules_of_step_law():
    params, tokens, lr, batch = STEP_LAW.T
    rate, size = fit_rule(params, lr, tokens), fit_rule(None, 2048 * batch, tokens)
    # numpy's least squares of the logarithms, in powers of one parameter and one token.
    design = np.stack([np.ones(17), np.log(params), np.log(tokens)], 1)
    scale, of_params, of_tokens = np.linalg.lstsq(design, np.log(lr), rcond=None)[0]
    assert (rate.exponent, rate.tokens_exponent) == pytest.approx((of_params, of_tokens), rel=1e-8)
    assert rate(1.0, 1.0) == pytest.approx(np.exp(scale), rel=1e-6)
    assert size.exponent == 0 and size.tokens_exponent == pytest.approx(np.polyfit(np.log(tokens), np.log(batch), 1)[0])
    # Published from all of their runs: lr = 1.79 N^-0.713 D^0.307, batch = 0.58 D^0.571 tokens.
    assert rate.exponent == pytest.approx(-0.713, abs=0.15) and rate.tokens_exponent == pytest.approx(0.307, abs=0.15)
    assert size.tokens_exponent == pytest.approx(0.571, abs=0.07)
    published = 1.79 * params**-0.713 * tokens**0.307, 0.58 * tokens**0.571 / 2048
    assert np.abs(np.log(lr / published[0])).max() < 0.4 and np.abs(np.log(batch / published[1])).max() < 0.4
    exact = fit_rule(params, published[0], tokens)
    assert (exact.exponent, exact.tokens_exponent, exact(1.0, 1.0)) == pytest.approx((-0.713, 0.307, 1.79))
