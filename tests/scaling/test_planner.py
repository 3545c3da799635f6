import numpy as np
import pytest

from scaling import planner
from scaling.optimum import chinchilla_optimum
from scaling.published import CHINCHILLA

T = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
TARGET, NOISE = 1e21, 0.005


def grid(theta):
    """An IsoFLOP grid: five budgets of seven sizes around what the law thinks is best."""
    values = dict(zip(CHINCHILLA.parameters, CHINCHILLA.natural(theta), strict=True))
    budgets = np.geomspace(1e17, 1e19, 5)
    best = chinchilla_optimum(values, budgets).params
    params = best * np.geomspace(0.2, 5, 7)
    return params.ravel(), (budgets[:, None] / (6 * params)).ravel()


def surfaces(count, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        alpha, beta = rng.uniform(0.25, 0.45, 2)
        values = {"A": np.exp(rng.uniform(5, 7)), "B": np.exp(rng.uniform(5, 8)), "E": rng.uniform(1, 2)}
        yield CHINCHILLA.raw({**values, "alpha": alpha, "beta": beta})


def test_the_gradient_of_the_optimum_is_that_of_the_closed_form():
    theta = CHINCHILLA.raw(T)
    found = planner.target_gradient(CHINCHILLA, theta, TARGET)

    def closed(theta):
        values = dict(zip(CHINCHILLA.parameters, CHINCHILLA.natural(theta), strict=True))
        return float(np.log(chinchilla_optimum(values, [TARGET]).params[0, 0]))

    exact = [(closed(theta + 1e-5 * e) - closed(theta - 1e-5 * e)) / 2e-5 for e in np.eye(5)]
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-4)


def test_the_promised_gain_is_the_gain():
    theta = CHINCHILLA.raw(T)
    made = grid(theta)
    candidates = (np.array([1e7, 1e9]), np.array([1e9, 1e10]))
    choice = planner.choose(CHINCHILLA, theta, made, candidates, budget=TARGET, noise=NOISE)
    before = planner.standard_error(CHINCHILLA, theta, *made, budget=TARGET, noise=NOISE)
    assert choice.before == pytest.approx(before)
    for i in range(2):
        more = [np.append(old, new[i]) for old, new in zip(made, candidates, strict=True)]
        after = planner.standard_error(CHINCHILLA, theta, *more, budget=TARGET, noise=NOISE)
        assert choice.after[i] == pytest.approx(after, rel=1e-6)


def flops_to_match(theta):
    """FLOPs the planner spends to reach the grid's standard error, over the grid's FLOPs; seven small runs to begin."""
    params, tokens = grid(theta)
    cost = 6 * params * tokens
    wanted = planner.standard_error(CHINCHILLA, theta, params, tokens, budget=TARGET, noise=NOISE)
    chosen = list(np.argsort(cost, kind="stable")[:10])
    errors: list[float] = []
    # Sizes at every budget of the grid, wider than the grid's own.
    candidates = (np.tile(np.geomspace(params.min() / 4, params.max() * 4, 25), 5), None)
    budgets = np.repeat(np.geomspace(1e17, 1e19, 5), 25)
    candidates = (candidates[0], budgets / (6 * candidates[0]))
    made = (params[chosen], tokens[chosen])
    while not planner.tight_enough(errors, wanted):
        choice = planner.choose(CHINCHILLA, theta, made, candidates, budget=TARGET, noise=NOISE)
        made = tuple(np.append(old, new[choice.best]) for old, new in zip(made, candidates, strict=True))
        errors.append(float(choice.after[choice.best]))
        if len(errors) > 2000:
            break
    return np.sum(6 * made[0] * made[1]) / cost.sum(), errors[-1] <= wanted


def shares(count):
    found = [flops_to_match(theta) for theta in surfaces(count)]
    assert all(reached for _, reached in found)
    return np.array([share for share, _ in found])


def test_the_planner_needs_half_of_the_grids_flops():
    assert (shares(3) <= 0.5).all()


@pytest.mark.slow
def test_the_planner_needs_half_of_the_grids_flops_on_a_hundred_surfaces():
    assert np.median(shares(100)) <= 0.5


def test_what_cannot_be_planned_is_said():
    theta = CHINCHILLA.raw(T)
    made = grid(theta)
    with pytest.raises(ValueError, match="no candidate costs 1 FLOPs or less"):
        planner.choose(
            CHINCHILLA, theta, made, (np.array([1e6]), np.array([1e6])), budget=TARGET, noise=NOISE, affordable=1.0
        )
    with pytest.raises(ValueError, match="3 runs do not determine 5 parameters"):
        planner.covariance(planner.slopes(CHINCHILLA, theta, made[0][:3], made[1][:3]), NOISE)
    assert not planner.tight_enough([], 1.0) and planner.tight_enough([2.0, 0.5], 1.0)
