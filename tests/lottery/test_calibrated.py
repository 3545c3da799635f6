"""Pruning from statistics of a layer's inputs equals the authors' own code on random layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lottery import calibrated
from lottery.allocation import spread_densities

prune = jax.jit(calibrated.sparsegpt, static_argnames=("pattern", "block", "damping", "bits"))


@pytest.fixture
def authors(golden):
    """Arrays of tests/golden/pruning.py."""
    return jax.tree.map(jnp.asarray, golden("pruning"))


PATTERN = {"half": ("unstructured", 0.5), "quarter": ("unstructured", 0.25), "2:4": ("2:4", 0.5)}


@pytest.mark.parametrize("name", PATTERN)
def test_wanda_prunes_what_the_authors_code_does(authors, name):
    found, (pattern, density) = authors, PATTERN[name]
    w, x = found["layer"]["w"], found["layer"]["x"]
    scores = calibrated.wanda(w, jnp.linalg.norm(x, axis=0))
    mask = calibrated.keep_best(scores, density, pattern, by_output=True)
    np.testing.assert_array_equal(np.where(mask, w, 0), found["wanda"][name])


@pytest.mark.parametrize("name", [*PATTERN, "half-4bit", "2:4-4bit", "dead"])
def test_sparsegpt_prunes_and_updates_as_the_authors_code_does(authors, name):
    found, w = authors["sparsegpt"][name], authors["layer"]["w"]
    kind, _, bits = name.partition("-")
    pattern, density = PATTERN.get(kind, PATTERN["half"])
    if pattern == "unstructured":  # the authors' threshold takes one weight more of every block of 8 inputs
        density -= 1 / (8 * w.shape[1])
    made = prune(w, found["hessian"], density, pattern=pattern, block=8, bits=4 if bits else 0)
    if not bits:
        np.testing.assert_array_equal(made.mask, found["pruned"] != 0)
    np.testing.assert_allclose(made.weight, found["pruned"], atol=1e-4)
    assert not np.asarray(made.weight)[~np.asarray(made.mask)].any()
    if bits:
        whole = made.weight / made.scale[None]
        np.testing.assert_allclose(whole, np.round(whole), atol=1e-5)


@pytest.mark.parametrize("block", [8, 11, 128])
def test_an_update_under_a_given_mask_is_the_least_squares_solution_of_the_last_step(authors, block):
    """With the first inputs gone and the others staying, the survivors solve the damped normal equations exactly."""
    w, single = authors["layer"]["w"], authors["sparsegpt"]["half"]["hessian"]
    hessian, mask = np.asarray(single, np.float64), jnp.zeros(w.shape, bool).at[7:].set(True)
    made = prune(w, single, mask_NM=mask, block=block)
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(len(w))
    best = np.linalg.solve(damped[7:, 7:], damped[7:] @ np.asarray(w, np.float64))
    np.testing.assert_allclose(made.weight[7:], best, atol=2e-4)
    error = calibrated.output_error(w, made.weight, single)
    gap = np.asarray(w - made.weight)
    by_hand = np.einsum("nm,nk,km->", gap, hessian, gap) / np.einsum("nm,nk,km->", w, hessian, w)
    np.testing.assert_allclose(error, by_hand, rtol=1e-4)
    assert error < calibrated.output_error(w, jnp.where(mask, w, 0), single)


def test_obs_is_what_removing_a_weight_costs(authors):
    w, hessian = authors["layer"]["w"], authors["sparsegpt"]["half"]["hessian"]
    found = calibrated.obs(w, hessian)
    exact = np.asarray(hessian, np.float64) + 0.01 * np.diag(hessian).mean() * np.eye(len(w))
    np.testing.assert_allclose(found, w**2 / (2 * np.diag(np.linalg.inv(exact))[:, None]), rtol=1e-3)


def test_blocks_of_owl_get_the_authors_densities(authors):
    found = authors
    norm, wanted = jnp.linalg.norm(found["layer"]["x"], axis=0), found["owl"]
    ratios = [float(calibrated.outlier_ratio(calibrated.wanda(w, norm), 3.0)) for w in wanted["w"]]
    np.testing.assert_allclose(100 * np.array(ratios), wanted["percent"], rtol=1e-6)
    np.testing.assert_allclose(spread_densities(ratios, 0.5, 0.08), wanted["densities"], rtol=1e-6)


def test_densities_in_a_band_have_the_weighted_mean_that_is_asked_for():
    sizes = (1.0, 5.0, 2.0)
    found = spread_densities((0.3, 0.1, 0.2), 0.4, 0.1, sizes)
    assert np.average(found, weights=sizes) == pytest.approx(0.4) and found[0] - found[1] == pytest.approx(0.2)
    assert spread_densities((0.2, 0.2), 0.5) == (0.5, 0.5)
    for density, width in ((0.05, 0.2), (0.97, 0.1)):
        with pytest.raises(ValueError, match="smaller width"):
            spread_densities((1.0, 2.0), density, width)


def test_experts_saliency_is_the_authors(authors):
    found = authors["reap"]
    saliency = calibrated.reap(found["weights"], found["experts"], found["norms"], 5)
    np.testing.assert_allclose(saliency, found["saliency"], rtol=1e-5)


def test_a_stack_of_experts_is_pruned_by_vmap(authors):
    w, hessian = authors["layer"]["w"], authors["sparsegpt"]["half"]["hessian"]
    ws, hessians = jnp.stack([w, 2 * w[::-1]]), jnp.stack([hessian, hessian[::-1, ::-1]])
    made = jax.vmap(functools.partial(calibrated.sparsegpt, pattern="2:4", block=8))(ws, hessians)
    for i in range(2):
        alone = prune(ws[i], hessians[i], pattern="2:4", block=8)
        np.testing.assert_allclose(made.weight[i], alone.weight, atol=1e-5)


def test_a_density_or_pattern_that_cannot_be_is_refused():
    w, hessian = jnp.ones((6, 2)), jnp.eye(6)
    with pytest.raises(ValueError, match="2:4: every group of 4 keeps 2, so the density is 0.5"):
        calibrated.keep_best(w, 0.4, "2:4")
    with pytest.raises(ValueError, match="2:4 needs multiples of 4, not 6 inputs"):
        calibrated.sparsegpt(w, hessian, 0.5, pattern="2:4")
    with pytest.raises(ValueError, match="unstructured or n:m"):
        calibrated.sparsegpt(w, hessian, 0.5, pattern="2x2")
    with pytest.raises(ValueError, match="blocks of 4 x 2 do not divide"):
        calibrated.keep_best(w, 0.5, "4x2")
    with pytest.raises(ValueError, match="unstructured, n:m"):
        calibrated.keep_best(w, 0.5, "head")
    with pytest.raises(ValueError, match="0 to 1, is needed"):
        calibrated.keep_best(w, 1.5)
    assert not np.isfinite(calibrated.inverse_factor(jnp.full((2, 2), jnp.nan))).all()
