import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import mutual_info_score

from moe import route
from moe.specialization import agreement, joint_counts, mutual_information


def test_counts_by_hand():
    there = jnp.array([True, True, True, False])
    routing = route.replay(jnp.zeros((4, 3)), jnp.array([[0, 1], [2, 1], [0, 3], [1, 2]]), there)
    # Tokens of class 0: experts 0, 1, 0 (one of its choices goes nowhere); of class 1: 2, 1; the last is padding.
    np.testing.assert_array_equal(joint_counts(routing, jnp.array([0, 1, 0, 1]), 2), [[2, 1, 0], [0, 1, 1]])
    # A class out of range counts nowhere.
    np.testing.assert_array_equal(joint_counts(routing, jnp.array([0, 2, 0, 1]), 2), [[2, 1, 0], [0, 0, 0]])


def test_mutual_information_is_scikit_learns():
    rng = np.random.default_rng(0)
    classes, experts = rng.integers(0, 5, 400), rng.integers(0, 3, 400)
    experts = np.where(classes == 2, 1, experts)
    table = np.zeros((5, 3))
    np.add.at(table, (classes, experts), 1)
    found = mutual_information(table)
    assert found.plain == pytest.approx(mutual_info_score(classes, experts), rel=1e-9)
    assert found.corrected == pytest.approx(found.plain - 4 * 2 / 800)


def test_mutual_information_at_its_ends():
    assert mutual_information(np.eye(4) * 1e6).normalized == pytest.approx(1, abs=1e-4)
    # Two classes with two experts each: the expert tells the class.
    assert mutual_information(np.eye(2).repeat(2, 1) * 1e6).normalized == pytest.approx(1, abs=1e-4)
    assert mutual_information(np.ones((4, 3)) * 1e6).corrected == pytest.approx(0, abs=1e-9)
    assert mutual_information(np.zeros((4, 3))) == (0, 0, 0)
    # Noise of few tokens has information, and its bias is what the correction takes off.
    rng = np.random.default_rng(1)
    tables = [rng.multinomial(200, np.full(24, 1 / 24)).reshape(6, 4) for _ in range(200)]
    plain = np.mean([mutual_information(table).plain for table in tables])
    assert plain == pytest.approx(5 * 3 / 400, rel=0.1)


def test_agreement_finds_renamed_experts_and_knows_chance():
    rng = np.random.default_rng(2)
    table = rng.dirichlet(np.full(6, 0.3), 30) * 1000  # 30 classes, 6 experts
    order = rng.permutation(6)
    same = agreement(table, table[:, order] + rng.normal(0, 5, (30, 6)) ** 2)
    np.testing.assert_array_equal(order[same.pairs], np.arange(6))
    assert same.matched > 0.95 > 0.6 > same.chance
    other = agreement(table, rng.dirichlet(np.full(6, 0.3), 30) * 1000)
    assert abs(other.matched - other.chance) < 0.2
    with pytest.raises(ValueError, match="share classes and experts"):
        agreement(table, table[:, :5])


def test_pairs_that_occur_once_count():
    """Two classes, each once at an expert of its own: ln 2; three at one expert: nothing."""
    assert mutual_information(np.eye(2)).plain == pytest.approx(np.log(2))
    assert mutual_information(np.ones((3, 1))).plain == pytest.approx(0)


def test_experts_that_serve_every_class_alike_do_not_agree():
    """Their profiles are the classes' frequencies alone, of which every expert has the same share."""
    common = np.outer([900, 90, 10], [1, 2, 3])
    assert agreement(common, 2 * common).matched == pytest.approx(0, abs=0.01)
