import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lottery import connectivity


def test_ends_are_exact_and_integers_stay():
    a = {"w": jnp.array([0.1, 3.0]), "n": jnp.array(3)}
    b = {"w": jnp.array([0.7, -1e-3]), "n": jnp.array(5)}
    for alpha, end in ((0.0, a), (1.0, b)):
        np.testing.assert_array_equal(connectivity.interpolate(a, b, alpha)["w"], end["w"])
    assert int(connectivity.interpolate(a, b, 0.5)["n"]) == 3


def test_a_double_well_has_its_hill_as_barrier():
    well = lambda p: (p["x"] ** 2 - 1) ** 2 + 0.1 * p["x"]  # noqa: E731
    a, b = {"x": jnp.array(-1.0)}, {"x": jnp.array(1.0)}
    alphas, values = jax.jit(lambda a, b: connectivity.along(well, a, b, 21))(a, b)
    x = np.linspace(-1, 1, 21)
    np.testing.assert_allclose(values, (x**2 - 1) ** 2 + 0.1 * x, atol=1e-6)
    assert float(connectivity.instability(values)) == pytest.approx(max((x**2 - 1) ** 2 + 0.1 * x), abs=1e-5)
    # Over the line between ends of -0.1 and 0.1 the tilt cancels.
    assert float(connectivity.barrier(alphas, values)) == pytest.approx(1.0, abs=1e-5)
    # A convex loss has no barrier.
    alphas, values = connectivity.along(lambda p: p["x"] ** 2, a, {"x": jnp.array(3.0)}, 5)
    assert float(connectivity.barrier(alphas, values)) == 0.0


def test_a_trained_bend_is_the_minimum_that_scipy_finds():
    """On a ring-shaped valley, a point of the curve is a quadratic form of the bend, so its mean loss has a minimum."""
    from scipy.integrate import quad
    from scipy.optimize import minimize

    ring = lambda p, batch: (jnp.square(p["x"]).sum() - 1) ** 2 * batch  # noqa: E731
    ends = np.array([[-1.0, 0.0], [0.6, 0.8]])

    def mean(bend):
        point = lambda t: (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * bend + t**2 * ends[1]  # noqa: E731
        return quad(lambda t: (np.square(point(t)).sum() - 1) ** 2, 0, 1)[0]

    best = minimize(mean, ends.mean(0) + [0.0, 0.5], tol=1e-6).x
    a, b = ({"x": jnp.asarray(end, jnp.float32), "n": jnp.array(3)} for end in ends)
    schedule = optax.cosine_decay_schedule(0.05, 3000)
    bend, losses = connectivity.fit_bend(ring, a, b, jnp.ones(3000), optax.sgd(schedule), key=jax.random.key(0))
    np.testing.assert_allclose(bend["x"], best, atol=0.03)
    assert losses.shape == (3000,) and int(bend["n"]) == 3
    np.testing.assert_array_equal(connectivity.bezier(a, bend, b, 1.0)["x"], b["x"])
    mask = {"x": jnp.array([True, False]), "n": jnp.array(True)}
    bend, _ = connectivity.fit_bend(
        ring, {**a, "x": jnp.array([-1.0, 0])}, {**b, "x": jnp.array([1.0, 0])}, jnp.ones(9), optax.sgd(0.1),
        key=jax.random.key(0), masks=mask,
    )  # fmt: skip
    assert bend["x"][1] == 0


def test_runs_that_part_late_are_stable_in_a_problem_with_two_valleys():
    """Gradient descent on (x^2 - 1)^2: noise decides the valley at first, and nothing once x has left the hill."""
    start = lambda k: {"x": jnp.array(0.0 if k == 0 else 0.5)}  # noqa: E731

    def train(params, *, start_step, order):
        x = params["x"] + (0.1 if order % 2 else -0.1)
        for _ in range(100):
            x = x - 0.05 * 4 * x * (x**2 - 1)
        return {"x": x}

    error = lambda p: 0.4 * (p["x"] ** 2 - 1) ** 2  # noqa: E731
    rows = connectivity.instability_curve(start, train, error, (0, 7), orders=(0, 1, 2), points=11)
    assert [(row["step"], row["first"], row["second"]) for row in rows] == [
        (k, i, j) for k in (0, 7) for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    assert [row["stable"] for row in rows] == [False, True, False, True, True, True]
    assert rows[0]["instability"] == pytest.approx(0.4, abs=1e-3)
    with pytest.raises(ValueError, match="two different"):
        connectivity.instability_curve(start, train, error, (0,), orders=(1, 1))
    with pytest.raises(ValueError, match="two ends"):
        connectivity.along(error, start(0), start(1), 1)
