"""The closed form of sums of power laws against JAX's derivatives, and both against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling.evaluate import Terms
from scaling.fitting.derivatives import by_autodiff, by_terms, lower
from scaling.fitting.newton_fast import NewtonWithFloor, floor_of
from scaling.laws import gather_feature, restrict
from scaling.published import CHINCHILLA, CURVE, FINE_GRAINED, JOINT, SPARSITY
from scaling.rows import make_rows

DELTA = 0.3


def case(law, seed=0, rows=23, fits=4):
    rng = np.random.default_rng(seed)
    table = make_rows(
        {
            "params": np.exp(rng.uniform(2, 6, rows)),
            "tokens": np.exp(rng.uniform(2, 6, rows)),
            "sparsity": rng.uniform(0, 0.9, rows),
            "experts": rng.uniform(1, 9, rows),
            "granularity": rng.uniform(1, 9, rows),
            "loss": np.ones(rows),
        }
    )
    features = {name: gather_feature(name, table, False)[:, None] for name in law.features}
    means = {name: float(values.mean()) for name, values in features.items()}
    target = rng.normal(0.5, 1.0, (rows, 1))
    phi = rng.uniform(-0.5, 1.0, (len(law.parameters), fits))
    weights = rng.poisson(1.0, (rows, fits)).astype(float)
    return features, means, target, phi, weights


HELD = [
    restrict(CHINCHILLA, E=1.7),
    restrict(CHINCHILLA, A=3.0, beta=0.4),
    restrict(JOINT, A=0.0, gamma=0.3, sigma=0.0),
]


@pytest.mark.parametrize("law", [CHINCHILLA, CURVE, SPARSITY, FINE_GRAINED, JOINT, *HELD], ids=lambda law: law.name)
@pytest.mark.parametrize("newton", [True, False])
@pytest.mark.parametrize(("linear", "over"), [(False, 1.0), (True, 3.0)])
def test_the_closed_form_is_what_jax_differentiates(law, newton, linear, over):
    features, means, target, phi, weights = case(law)
    if law.held:
        # A held exponent's coefficient, and the reverse, are not centered.
        means = dict.fromkeys(means, 0.0)
        phi = 0.1 * phi
    how = {"newton": newton, "over": over}
    terms = Terms(law.terms, law.parameters, features, means, held=law.held)
    closed = by_terms(terms, target, DELTA, linear=linear, **how)(phi, weights)
    centred = {name: values - means[name] for name, values in features.items()}

    def predict(*columns):
        rows = {name: jnp.asarray(values) for name, values in centred.items()}
        log_loss = law.log_loss(dict(zip(law.parameters, columns, strict=True)), rows)
        return jnp.exp(log_loss) if linear else log_loss

    with jax.enable_x64(True):
        other = by_autodiff(predict, jnp.asarray(target), jnp.float64(DELTA), **how)(
            jnp.asarray(phi), jnp.asarray(weights)
        )
        for found, wanted in zip(closed[:3], other[:3], strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-10)
        exponents = [exponent for _, factors in law.terms for exponent, _, _ in factors]
        if len(set(exponents)) == len(exponents):
            np.testing.assert_allclose(closed.diagonal, other.diagonal, rtol=1e-9)
        assert (closed.diagonal >= other.diagonal * (1 - 1e-9)).all()


@pytest.mark.parametrize(("linear", "over"), [(False, 1.0), (False, 3.0), (True, 1.0), (True, 0.2)])
def test_derivatives_are_those_of_the_objective(linear, over):
    features, means, target, phi, weights = case(CHINCHILLA, fits=1)
    terms = Terms(CHINCHILLA.terms, CHINCHILLA.parameters, features, means)
    evaluate = by_terms(terms, target, DELTA, newton=True, linear=linear, over=over)
    here = evaluate(phi, weights)
    # Huber's loss by its two cases.
    terms = [
        np.exp(phi[i] - phi[k] * (features[f] - means[f])) for i, k, f in ((0, 3, "log_params"), (1, 4, "log_tokens"))
    ]
    total = terms[0] + terms[1] + np.exp(phi[2])
    r = (total if linear else np.log(total)) - target
    rho = np.where(np.abs(r) <= DELTA, 0.5 * r**2, DELTA * (np.abs(r) - 0.5 * DELTA)) * np.where(r > 0, over, 1.0)
    np.testing.assert_allclose(here.objective, np.sum(weights * rho, 0), rtol=1e-12)
    step = 1e-6
    for k, (i, j) in enumerate(lower(5)):
        moved = [evaluate(phi + sign * step * np.eye(5)[:, j : j + 1], weights) for sign in (1, -1)]
        slope = (moved[0].objective - moved[1].objective) / (2 * step)
        np.testing.assert_allclose(here.gradient[j], slope, rtol=1e-6, atol=1e-8)
        bend = (moved[0].gradient[i] - moved[1].gradient[i]) / (2 * step)
        np.testing.assert_allclose(here.curvature[k], bend, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("law", [CHINCHILLA, CURVE, SPARSITY], ids=lambda law: law.name)
def test_sums_without_the_floor_give_the_same_curvature(law):
    features, means, target, phi, weights = case(law)
    terms = Terms(law.terms, law.parameters, features, means)
    full = by_terms(terms, target, DELTA, newton=True)(phi, weights)
    lean = NewtonWithFloor(terms, target, DELTA)(phi, weights)
    for found, wanted in zip(lean[:3], full[:3], strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)
    diagonal = [k for k, (i, j) in enumerate(lower(terms.size)) if i == j]
    np.testing.assert_allclose(lean.diagonal, np.abs(lean.curvature[diagonal]))


def test_terms_without_a_floor_of_their_own_are_refused():
    features, means, target, _, _ = case(CHINCHILLA)
    for chosen in (CHINCHILLA.terms[:2], CHINCHILLA.terms[2:]):
        names = [name for name in CHINCHILLA.parameters if any(name == c or name in str(f) for c, f in chosen)]
        terms = Terms(chosen, names, features, means)
        assert floor_of(terms) is None
        with pytest.raises(ValueError, match="use by_terms"):
            NewtonWithFloor(terms, target, DELTA)


def test_a_law_whose_terms_overflow_or_vanish_keeps_its_shares():
    features, means, _, phi, _ = case(CHINCHILLA, fits=3)
    terms = Terms(CHINCHILLA.terms, CHINCHILLA.parameters, features, means)
    phi[[0, 1, 2], 1] += 800.0
    phi[[0, 1, 2], 2] -= 800.0
    with np.errstate(over="ignore"):
        value, share = terms.shares(phi)
    base, same = terms.shares(phi - np.array([0, 800.0, -800.0]) * np.isin(np.arange(5), [0, 1, 2])[:, None])
    np.testing.assert_allclose(value, base + [0, 800.0, -800.0], rtol=1e-12)
    for one, other in zip(share, same, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)
