"""Experts are grouped and merged as the authors' code of REAM does (tests/golden/pruning.py)."""

import jax
import numpy as np
import pytest

from moe import ream


@pytest.fixture
def authors(golden):
    return golden("ream")


def similarity(found):
    logits_ME = np.asarray(found["logits"], np.float64)
    return ream.expert_similarity(found["outputs"], logits_ME.T @ logits_ME)


@pytest.mark.parametrize("size", [3, 5])
def test_groups_and_merged_experts_are_the_authors(authors, size):
    first_E = ream.group_experts(authors["saliency"], similarity(authors), keep=3, size=size)
    np.testing.assert_array_equal(first_E, authors["groups"][str(size)])
    experts = {name: {"kernel": authors[name]} for name in ("gate", "up", "down")}
    made = ream.merge_experts(experts, first_E, authors["saliency"], authors["x"])
    for name, wanted in authors["merged"][str(size)].items():
        np.testing.assert_allclose(made[name]["kernel"], wanted, atol=1e-5)


def test_groups_hold_every_expert_once_and_no_more_than_their_size(authors):
    rng = np.random.default_rng(1)
    for _ in range(50):
        experts = int(rng.integers(2, 12))
        keep = int(rng.integers(1, experts + 1))
        size = int(rng.integers(-(-experts // keep), experts + 1))
        saliency_E = rng.normal(size=experts)
        first_E = ream.group_experts(saliency_E, rng.random((experts, experts)), keep, size)
        stays, counts = np.unique(first_E, return_counts=True)
        assert set(stays) == set(np.argsort(-saliency_E)[:keep]) and counts.max() <= size
        assert (first_E[stays] == stays).all()


def test_merging_copies_of_an_expert_in_other_orders_gives_the_expert(authors):
    one = {name: authors[name][0] for name in ("gate", "up", "down")}
    orders = [np.random.default_rng(seed).permutation(5) for seed in range(3)]
    turned = {
        name: {"kernel": np.stack([leaf.take(order, axis=0 if name == "down" else 1) for order in orders])}
        for name, leaf in one.items()
    }
    made = ream.merge_experts(turned, np.zeros(3, int), np.array([1.0, 0.0, 2.0]), authors["x"])
    jax.tree.map(lambda got, wanted: np.testing.assert_allclose(got[0], wanted[0], atol=1e-6), made, turned)


def test_what_cannot_be_grouped_is_refused(authors):
    with pytest.raises(ValueError, match="keep must be in 1..7 and keep .* size at least 7"):
        ream.group_experts(authors["saliency"], similarity(authors), keep=3, size=2)
    experts = {name: {"kernel": authors[name]} for name in ("gate", "up", "down")}
    with pytest.raises(ValueError, match="no token chose any of the experts"):
        ream.merge_experts(experts, np.zeros(7, int), np.zeros(7), authors["x"])
