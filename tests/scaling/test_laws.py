"""Every law against its formula, and synthetic truth recovered."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling.fitting.fit import FitConfig, fit
from scaling.laws import custom_law, power_law, restrict
from scaling.published import (
    CHINCHILLA,
    CURVE,
    DATA_CONSTRAINED,
    FINE_GRAINED,
    JOINT,
    KAPLAN,
    LAWS,
    ROUTED,
    SPARSITY,
    find_law,
)
from scaling.rows import make_rows

# The published values of each paper, or near them.
TRUTH = {
    "chinchilla": {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28},
    "kaplan": {"N_c": 6.4e13, "D_c": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103},
    "curve": {"A": 300.0, "E": 2.0, "alpha": 0.3},
    "compute": {"A": 30.0, "E": 1.7, "alpha": 0.05},
    "data_constrained": {
        "A": 521.0, "B": 1488.0, "E": 1.87, "alpha": 0.35, "beta": 0.35, "R_D": 15.4, "R_N": 5.3,
    },
    "sparsity": {"a_S": 16.8, "c_S": 45.8, "B": 400.0, "c": 0.651, "b_S": 0.722, "b_N": 0.245, "b_D": 0.25},
    "routed_moe": {"a": -0.082, "b": -0.108, "c": 0.009, "d": 2.6, "E_start": 1.85, "E_span": 312.0},
    "fine_grained_moe": {"g": 2.1, "a": 18.1, "b": 30.8, "c": 0.47, "gamma": 0.58, "alpha": 0.115, "beta": 0.147},
    "joint": {
        "S": 20.0, "A": 45.0, "B": 400.0, "E": 0.7, "sigma": 0.7, "chi": 0.2, "gamma": 0.5, "alpha": 0.25, "beta": 0.25,
    },
}  # fmt: skip


def design(law, count=160, seed=0):
    """Rows over which every parameter matters."""
    rng = np.random.default_rng(seed)
    columns = {
        "params": np.exp(rng.uniform(math.log(1e6), math.log(1e10), count)),
        "tokens": np.exp(rng.uniform(math.log(1e8), math.log(1e12), count)),
        "sparsity": rng.choice([0.0, 0.5, 0.75, 0.9375], count),
        "experts": rng.choice([1.0, 2.0, 8.0, 32.0, 128.0, 512.0], count),
        "granularity": rng.choice([1.0, 2.0, 4.0, 16.0], count),
    }
    columns["unique_tokens"] = columns["tokens"] / rng.choice([1.0, 2.0, 8.0, 40.0], count)
    return make_rows({**columns, "loss": np.ones(count)})


def simulate(law, truth, noise=0.0, seed=0):
    rows = design(law)
    mean = law.predict(law.raw(truth)[:, None], law.gather(rows))[:, 0]
    noise_R = noise * np.random.default_rng(seed).standard_normal(len(rows))
    return make_rows({**rows.columns, "loss": np.exp(mean + noise_R)})


def by_hand(name, t, row):
    """The formulas of the papers, in plain Python."""
    n, d = row["params"], row["tokens"]
    if name == "chinchilla":
        return t["E"] + t["A"] / n ** t["alpha"] + t["B"] / d ** t["beta"]
    if name == "kaplan":
        return ((t["N_c"] / n) ** (t["alpha_N"] / t["alpha_D"]) + t["D_c"] / d) ** t["alpha_D"]
    if name == "curve":
        return t["E"] + t["A"] / d ** t["alpha"]
    if name == "compute":
        return t["E"] + t["A"] / row["flops"] ** t["alpha"]
    if name == "sparsity":
        factor = t["a_S"] * (1 - row["sparsity"]) ** t["b_S"] + t["c_S"]
        return factor / n ** t["b_N"] + t["B"] / d ** t["b_D"] + t["c"]
    if name == "fine_grained_moe":
        factor = t["g"] / row["granularity"] ** t["gamma"] + t["a"]
        return t["c"] + factor / n ** t["alpha"] + t["b"] / d ** t["beta"]
    if name == "joint":
        gain = (1 - row["sparsity"]) ** t["sigma"] / row["experts"] ** t["chi"] / row["granularity"] ** t["gamma"]
        return t["E"] + (t["A"] + t["S"] * gain) / n ** t["alpha"] + t["B"] / d ** t["beta"]
    if name == "routed_moe":
        last = t["E_start"] + t["E_span"]
        inverse = 1 / (row["experts"] - 1 + 1 / (1 / t["E_start"] - 1 / last)) + 1 / last
        x = -math.log(inverse)
        return math.exp(t["a"] * math.log(n) + t["b"] * x + t["c"] * math.log(n) * x + t["d"])
    unique = row["unique_tokens"]
    useful = min(n, (t["alpha"] * t["A"] / (t["beta"] * t["B"]) * unique ** t["beta"]) ** (1 / t["alpha"]))
    n_ = useful + useful * t["R_N"] * (1 - math.exp(-(n / useful - 1) / t["R_N"]))
    d_ = unique + unique * t["R_D"] * (1 - math.exp(-(d / unique - 1) / t["R_D"]))
    return t["E"] + t["A"] / n_ ** t["alpha"] + t["B"] / d_ ** t["beta"]


@pytest.mark.parametrize("name", LAWS)
def test_laws_are_their_papers_formulas(name):
    law = find_law(name)
    rows = design(law, count=40)
    found = np.exp(law.predict(law.raw(TRUTH[name])[:, None], law.gather(rows))[:, 0])
    for i in range(len(rows)):
        row = {column: float(values[i]) for column, values in rows.columns.items()}
        assert found[i] == pytest.approx(by_hand(name, TRUTH[name], row), rel=1e-10)


def assert_recovered(law, truth, noise, tolerance, starts=0):
    rows = simulate(law, truth, noise)
    found = fit(rows, law, FitConfig(objective="normal" if noise else "huber", starts=starts))
    mean = law.predict(law.raw(truth)[:, None], law.gather(rows))[:, 0]
    predicted = law.predict(found.theta[:, None], law.gather(rows))[:, 0]
    np.testing.assert_allclose(predicted, mean, atol=max(noise, 1e-9))
    for name, value in truth.items():
        got = found.parameters[name]
        distance = abs(math.log(got / value)) if name in law.positive else abs(got - value)
        assert distance < tolerance, f"{law.name}: {name} is {got}, truth {value}"


@pytest.mark.parametrize("name", ["chinchilla", "curve", "compute", "kaplan"])
def test_truth_is_recovered_exactly_without_noise(name):
    assert_recovered(find_law(name), TRUTH[name], 0.0, 1e-5, starts=400)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAWS if name not in ("chinchilla", "curve", "compute", "kaplan")])
def test_truth_is_recovered_exactly_without_noise_larger_laws(name):
    assert_recovered(find_law(name), TRUTH[name], 0.0, 1e-4)


def test_the_joint_law_contains_the_others():
    rows = design(JOINT)
    flat = make_rows({name: rows[name] for name in ("params", "tokens", "loss")})
    t = TRUTH["chinchilla"]
    rest = {"sigma": 1.0, "chi": 0.3, "gamma": 0.2}
    as_joint = JOINT.raw({**rest, "S": 0.0, **t})
    np.testing.assert_allclose(
        JOINT.predict(as_joint[:, None], JOINT.gather(rows)),
        CHINCHILLA.predict(CHINCHILLA.raw(t)[:, None], CHINCHILLA.gather(flat)),
        rtol=1e-13,
    )
    s = TRUTH["sparsity"]
    dense = make_rows({name: rows[name] for name in ("params", "tokens", "loss", "sparsity")})
    as_joint = JOINT.raw(
        {"S": s["a_S"], "A": s["c_S"], "B": s["B"], "E": s["c"], "sigma": s["b_S"], "chi": 0.4, "gamma": 0.6}
        | {"alpha": s["b_N"], "beta": s["b_D"]}
    )
    np.testing.assert_allclose(
        JOINT.predict(as_joint[:, None], JOINT.gather(dense)),
        SPARSITY.predict(SPARSITY.raw(s)[:, None], SPARSITY.gather(dense)),
        rtol=1e-13,
    )
    f = TRUTH["fine_grained_moe"]
    fine = make_rows({name: rows[name] for name in ("params", "tokens", "loss", "granularity")})
    as_joint = JOINT.raw(
        {"S": f["g"], "A": f["a"], "B": f["b"], "E": f["c"], "sigma": 1.0, "chi": 0.4, "gamma": f["gamma"]}
        | {"alpha": f["alpha"], "beta": f["beta"]}
    )
    np.testing.assert_allclose(
        JOINT.predict(as_joint[:, None], JOINT.gather(fine)),
        FINE_GRAINED.predict(FINE_GRAINED.raw(f)[:, None], FINE_GRAINED.gather(fine)),
        rtol=1e-13,
    )


def test_restricting_the_joint_law_gives_chinchillas_fit():
    rows = simulate(CHINCHILLA, TRUTH["chinchilla"], noise=0.01)
    flat = make_rows({name: rows[name] for name in ("params", "tokens", "loss")})
    held = restrict(JOINT, S=0.0, sigma=1.0, chi=0.0, gamma=0.0)
    assert held.parameters == ("A", "B", "E", "alpha", "beta")
    assert held.terms == CHINCHILLA.terms
    # An exponent without its term has no closed form: it is differentiated.
    assert not restrict(JOINT, S=0.0).terms
    starts = CHINCHILLA.raw(TRUTH["chinchilla"])[:, None]
    np.testing.assert_allclose(
        fit(flat, held, starts=starts).theta, fit(flat, CHINCHILLA, starts=starts).theta, rtol=1e-6
    )
    with pytest.raises(ValueError, match="joint has no parameter 'delta'"):
        restrict(JOINT, delta=1.0)


@pytest.mark.parametrize("law", [CHINCHILLA, JOINT], ids=lambda law: law.name)
def test_holding_values_one_by_one_is_holding_them_at_once(law):
    rows, values = simulate(law, TRUTH[law.name]), dict(list(TRUTH[law.name].items())[:2])
    one_by_one = law
    for name, value in values.items():
        one_by_one = restrict(one_by_one, **{name: value})
    free = np.asarray([TRUTH[law.name][name] for name in one_by_one.parameters])
    theta = np.where([name in law.positive for name in one_by_one.parameters], np.log(free), free)[:, None]
    whole = law.predict(law.raw(TRUTH[law.name])[:, None], law.gather(rows))
    for held in (one_by_one, restrict(law, **values)):
        np.testing.assert_allclose(held.predict(theta, held.gather(rows)), whole, rtol=1e-12)


def test_a_custom_law_is_fitted():
    def predict(p, row):
        return p["floor"] + p["height"] * jnp.exp(-row["dose"] / p["length"])

    law = custom_law(
        "decay", predict, {"floor": (0.5, 2.0), "height": (1.0, 5.0), "length": (1.0, 10.0)}, columns=("dose",)
    )
    dose = np.linspace(0, 20, 30)
    rows = make_rows({"params": np.ones(30), "tokens": np.ones(30), "dose": dose, "loss": 1.5 + 3 * np.exp(-dose / 4)})
    found = fit(rows, law)
    assert found.converged
    assert found.parameters == pytest.approx({"floor": 1.5, "height": 3.0, "length": 4.0}, rel=1e-6)
    slope = custom_law(
        "line",
        lambda p, x: p["height"] + p["slope"] * jnp.log(x["dose"]),
        {"height": (1.0, 3.0), "slope": (-0.1, 0.1)},
        columns=("dose",),
        signed=("slope",),
    )
    falling = make_rows({**rows.columns, "dose": dose + 1, "loss": 3 - 0.4 * np.log(dose + 1)})
    assert fit(falling, slope).parameters == pytest.approx({"height": 3.0, "slope": -0.4}, rel=1e-6)
    with pytest.raises(ValueError, match="starts of floor"):
        custom_law("bad", predict, {"floor": (0.0,)}, columns=())


def test_a_signed_exponent_may_be_negative():
    # Loss that rises with size: log L = 1 + 0.1 log N, a line of slope -0.1 in the law's terms.
    law = power_law(
        "signed", [("A", (("alpha", "log_params", -1.0),))], {"A": (0.0, 2.0), "alpha": (0.1, 0.4)}, signed=["alpha"]
    )
    params = np.geomspace(1e6, 1e9, 8)
    rows = make_rows({"params": params, "tokens": params, "loss": np.e * params**0.1})
    assert fit(rows, law).parameters == pytest.approx({"A": np.e, "alpha": -0.1}, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=5, max_size=5), st.floats(0.1, 10))
def test_scaling_the_units_of_size_moves_coefficients_only(values, unit):
    a, b, e, alpha, beta = values
    rows = design(CHINCHILLA, count=10)
    scaled = make_rows({**rows.columns, "params": rows["params"] * unit, "flops": rows["flops"] * unit})
    one = CHINCHILLA.raw({"A": a, "B": b, "E": e, "alpha": alpha, "beta": beta})
    other = CHINCHILLA.raw({"A": a * unit**alpha, "B": b, "E": e, "alpha": alpha, "beta": beta})
    np.testing.assert_allclose(
        CHINCHILLA.predict(one[:, None], CHINCHILLA.gather(rows)),
        CHINCHILLA.predict(other[:, None], CHINCHILLA.gather(scaled)),
        atol=1e-9,
    )


def test_names_and_values_are_checked():
    with pytest.raises(ValueError, match="no law 'chinchila'; there are chinchilla, kaplan"):
        find_law("chinchila")
    with pytest.raises(ValueError, match="parameters are"):
        CHINCHILLA.raw({"A": 1.0})
    with pytest.raises(ValueError, match="A = -1.0 must not be negative"):
        CHINCHILLA.raw({**TRUTH["chinchilla"], "A": -1.0})
    assert {law.name for law in (KAPLAN, CURVE, DATA_CONSTRAINED, ROUTED)} <= set(LAWS)
