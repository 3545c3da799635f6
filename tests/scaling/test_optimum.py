import numpy as np
import pytest

from scaling import optimum
from scaling.laws import restrict
from scaling.published import CHINCHILLA, SPARSITY

T = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
THETA = CHINCHILLA.raw(T)


def test_the_search_agrees_with_the_closed_form():
    budgets = [1e18, 5.76e23]
    theta = np.stack([THETA, CHINCHILLA.raw({**T, "alpha": 0.5})], 1)
    found = optimum.compute_optimal(CHINCHILLA, theta, budgets)
    values = dict(zip(CHINCHILLA.parameters, CHINCHILLA.natural(theta), strict=True))
    exact = optimum.chinchilla_optimum(values, budgets)
    np.testing.assert_allclose(found.params, exact.params, rtol=1e-5)
    np.testing.assert_allclose(found.loss, exact.loss, rtol=1e-7)
    np.testing.assert_allclose(6 * exact.params * exact.tokens, np.array(budgets)[:, None] * [[1, 1]], rtol=1e-12)


def test_published_parameters_give_the_published_sizes():
    # Hoffmann et al. (2022), table 2 gives 0.46 and 0.54 for approach 3; the rounded parameters give a hundredth less.
    a, b = optimum.exponents({k: np.array(v) for k, v in T.items()})
    assert (round(float(a), 2), round(float(b), 2)) == (0.45, 0.55)


def test_off_the_optimum():
    best = optimum.compute_optimal(CHINCHILLA, THETA[:, None], [1e21])
    table = optimum.off_optimum(CHINCHILLA, THETA, 1e21, (0.5, 1.0, 2.0))
    assert table[1]["excess"] == pytest.approx(0, abs=1e-9)
    assert table[0]["excess"] > 0 < table[2]["excess"]
    for row in table:
        assert 6 * row["params"] * row["tokens"] == pytest.approx(1e21)
        needed = optimum.compute_optimal(CHINCHILLA, THETA[:, None], [1e21 * (1 - row["wasted"])])
        assert needed.loss[0, 0] == pytest.approx(row["loss"], rel=1e-6)
    assert best.ratio[0, 0] == pytest.approx(best.tokens[0, 0] / best.params[0, 0])


def test_inference_moves_the_optimum_to_smaller_models_trained_longer():
    loss = float(optimum.compute_optimal(CHINCHILLA, THETA[:, None], [1e21]).loss[0, 0])
    none = optimum.inference_optimum(CHINCHILLA, THETA, loss, 0.0)
    # Without inference it is the training optimum.
    assert none.training_flops == pytest.approx(1e21, rel=1e-4)
    much = optimum.inference_optimum(CHINCHILLA, THETA, loss, 1e12)
    assert much.params < none.params and much.tokens > none.tokens
    assert float(
        np.exp(optimum.log_loss_at(CHINCHILLA, THETA[:, None], np.array([much.params]), np.array([much.tokens])))[0, 0]
    ) == pytest.approx(loss)
    total = much.training_flops + much.inference_flops
    assert total < none.training_flops + 2 * none.params * 1e12
    # Stationary: dF/dN + dF/dD dD/dN = 0 along the curve of constant loss (Sardana et al. 2024, eq. 3).
    n, d = much.params, much.tokens
    slope = -(T["alpha"] * T["A"] / n ** (T["alpha"] + 1)) / (T["beta"] * T["B"] / d ** (T["beta"] + 1))
    assert 6 * d + 2e12 + 6 * n * slope == pytest.approx(0, abs=1e-3 * 6 * d)
    with pytest.raises(ValueError, match="no model of .* reaches a loss of 1.0"):
        optimum.inference_optimum(CHINCHILLA, THETA, 1.0, 0.0)


def test_another_count_of_flops_is_another_budget():
    """With C = 8 N D the optimum at a budget is that of C = 6 N D at three quarters of it."""
    ours = optimum.compute_optimal(CHINCHILLA, THETA[:, None], [8e20], tokens_per_flop=1 / 8)
    theirs = optimum.compute_optimal(CHINCHILLA, THETA[:, None], [6e20])
    np.testing.assert_allclose(ours.params, theirs.params, rtol=1e-6)
    np.testing.assert_allclose(ours.tokens, theirs.tokens, rtol=1e-6)


def test_other_columns_are_held():
    t = {"a_S": 16.8, "c_S": 45.8, "B": 400.0, "c": 0.651, "b_S": 0.722, "b_N": 0.245, "b_D": 0.25}
    dense, sparse = (
        optimum.compute_optimal(SPARSITY, SPARSITY.raw(t)[:, None], [1e20], at={"sparsity": s}) for s in (0.0, 0.75)
    )
    assert sparse.loss < dense.loss
    at_three_quarters = CHINCHILLA.raw(
        {"A": 16.8 * 0.25**0.722 + 45.8, "B": 400.0, "E": 0.651, "alpha": 0.245, "beta": 0.25}
    )
    same = optimum.compute_optimal(CHINCHILLA, at_three_quarters[:, None], [1e20])
    np.testing.assert_allclose(sparse.params, same.params, rtol=1e-9)


def test_no_minimum_inside_is_nan():
    only_size = restrict(CHINCHILLA, B=0.0, beta=1.0)
    theta = only_size.raw({"A": 406.4, "E": 1.69, "alpha": 0.34})
    assert np.isnan(optimum.compute_optimal(only_size, theta[:, None], [1e20]).params).all()
