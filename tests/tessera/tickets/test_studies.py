"""What studies make of rows and settings, without training anything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import study_sparse_training
from lottery import masks as masks_lib
from tessera.infra.config import ConfigError, build
from tessera.infra.schema import completed
from tessera.models.registry import Network
from tessera.tickets.setup import make_setup
from tessera.tickets.studies import instability, sparse_training
from tessera.tickets.studies.ablations import AblationConfig, Start, frozen_network
from tessera.tickets.studies.compared_masks import compare
from tessera.tickets.studies.schema import STUDY_SCHEMA
from tessera.tickets.studies.sources import changed
from tessera.tickets.studies.sparse_methods import METHODS, SparseConfig, make_inputs, sparse_share
from tessera.tickets.studies.study import Comparison, magnitude_masks, markdown

CONFIG = ConfigDict(
    {
        "seeds": (0, 1),
        "lr": 1e-3,
        "model": {"name": "lenet", "hidden": (8, 4)},
        "sources": {"narrow": {"model": {"hidden": (4, 2)}, "lr": 0.1}, "more": {"seeds": (2,)}},
    }
)


def test_a_source_changes_the_settings_it_names_and_no_other():
    assert changed(CONFIG, "narrow").to_dict() == {
        "seeds": (0, 1),
        "lr": 0.1,
        "model": {"name": "lenet", "hidden": (4, 2)},
    }
    assert CONFIG.model.hidden == (8, 4)
    with pytest.raises(ConfigError, match="config.sources.more.seeds: a source may change data, lr, model"):
        changed(CONFIG, "more")


@pytest.mark.parametrize(
    ("stable", "first"), [((0, 1, 0, 1), 30), ((1, 1, 1, 1), 0), ((1, 1, 1, 0), None), ((0, 0, 1, 1), 20)]
)
def test_a_network_is_stable_from_where_it_stays_so(stable, first):
    assert instability.stable_from((0, 10, 20, 30), stable) == first


def test_masks_are_compared_seed_by_seed():
    accuracy = {"own": (0.9, 0.8, 0.85), "other": (0.7, 0.7, 0.7), "random": (0.5, 0.4, 0.45)}
    rows = [
        {"mask": name, "seed": seed, "level": 1, "final_test_accuracy": value, "density": 0.25, "overlap": 1.0}
        for name, values in accuracy.items()
        for seed, value in enumerate(values)
    ]
    study = compare(rows, "other", ["own"], "title", "caption", "as it is")
    assert [row[:2] for row in study.table.rows] == [["25.0%", name] for name in accuracy]
    assert study.table.columns[-2:] == ["points over random", "points over mask as it is"]
    means = [[cell and float(cell.split()[0]) for cell in row[3:6]] for row in study.table.rows]
    assert means == [[85.0, 40.0, 15.0], [70.0, 25.0, None], [45.0, None, -25.0]]
    # Three seeds 5 points apart: the half-width is 5 / sqrt(3) times Student's t with two degrees of freedom, 4.3027.
    half = 5 / 3**0.5 * 4.3027
    assert float(study.table.rows[0][5].split()[-1]) == pytest.approx(half, abs=0.01)
    said = f"At 25.0% of the weights, mask own minus mask as it is: 15.00 \u00b1 {half:.2f} points."
    assert study.findings == [said]
    (ax,) = study.figure().axes
    drawn = [line.get_xdata().mean() for line in ax.lines if line.get_marker() == "o"]
    assert np.allclose(drawn, [40, 40, 25, 25, 0, 0]), "seeds and mean of every mask over the random one"


def test_arms_are_paired_by_seed_whatever_their_order_and_less_may_be_better():
    rows = [
        {"arm": arm, "repeat": seed, "level": level, "density": 0.5**level, "loss": loss + seed + level}
        for arm, loss in (("dense", 0.0), ("a", 2.0), ("b", 1.0))
        for level in ((0,) if arm == "dense" else (1, 2))
        for seed in ((0, 1) if arm == "a" else (1, 0))
    ]
    arms = Comparison(rows, "arm", "loss", heading="loss (nats)", unit="nats", scale=1.0, pair="repeat", sign=-1)
    assert arms.arms == ["a", "b"] and arms.levels == [1, 2] and arms.dense == [0.0, 1.0]
    assert arms.gains("b", "a", 2) == [1.0, 1.0] and arms.mean("a", 1) == 3.5
    table = arms.table({"a": "a"}, {"seeds": len})
    assert table.columns == ["weights", "arm", "seeds", "loss (nats)", "nats below a"]
    assert [row[:3] for row in table.rows] == [
        ["100.0%", "dense", 2],
        *(["50.0%", arm, 2] for arm in "ab"),
        *(["25.0%", arm, 2] for arm in "ab"),
    ]
    assert table.rows[2][-1] == "1.00 (1.00 to 1.00)" and table.rows[1][-1] is None
    figure = arms.figure({"one": {"a": "A"}, "two": {"a": "A", "b": "B"}})()
    assert [[label.get_text() for label in ax.get_yticklabels()] for ax in figure.axes] == [["A"], ["A", "B"]]


def test_frozen_weights_count_and_get_no_gradient():
    weights, mask = {"w": jnp.array([1.0, -2.0, 3.0])}, {"w": jnp.array([True, False, True])}
    start = Start.under(weights, mask)
    np.testing.assert_array_equal(start.trained["w"], [1, 0, 3])
    np.testing.assert_array_equal(start.frozen["w"], [0, -2, 0])

    def cubes(params, x):
        return jnp.sum(params["w"] ** 3 * x)

    network = frozen_network(Network(lambda key: weights, cubes, lambda p, x: (cubes(p, x), {"statistics": 1})))
    tree, x = {"trained": start.trained, "frozen": start.frozen}, jnp.array([1.0, 10.0, 100.0])
    assert network.apply(tree, x) == cubes(weights, x) and network.train(tree, x)[1] == {}
    gradient = jax.grad(network.apply)(tree, x)
    np.testing.assert_array_equal(gradient["trained"]["w"], [3, 120, 2700])
    np.testing.assert_array_equal(gradient["frozen"]["w"], [0, 0, 0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"criteria": ("largest",)}, "criteria: largest unknown; choose from large_final, small_final"),
        ({"treatments": ("rewind", "burn")}, "treatments: burn unknown; choose from rewind"),
        ({"criteria": ("small_init",)}, "criteria must have 'large_final'"),
    ],
)
def test_ablations_that_could_not_be_run(settings, message):
    with pytest.raises(ValueError, match=message):
        AblationConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ("rigl", "magic")}, "choose from set, rigl, straight_through, gradual, early_bird, popup, l1, l0"),
        ({"moves": 0}, "moves=0"),
        ({"until": 0.0}, "until=0.0"),
        ({"l1": -1.0}, "l1=-1.0"),
        ({"gate_lr": 0.0}, "gate_lr=0.0"),
    ],
)
def test_settings_of_sparse_training_that_could_not_be_run(settings, message):
    with pytest.raises(ValueError, match=message):
        SparseConfig(**settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["l1", "l0"])
def test_penalties_end_in_masks_of_the_density_and_networks_that_have_learned(name):
    config = study_sparse_training.get_config("tiny")
    config.train.steps = "300it"
    config = completed(STUDY_SCHEMA, config)
    setup, study = make_setup(config), build(SparseConfig, config.study, "config.study")
    inputs, _ = make_inputs(setup, study, config)
    found = METHODS[name].train(inputs)
    for i in range(2):
        alive = masks_lib.count(jax.tree.map(lambda leaf: leaf[i], found.masks), inputs.which)  # noqa: B023
        assert {path: int(count) for path, count in alive.items()} == inputs.counts
    assert all(row["final_test_accuracy"] > 0.4 for row in found.rows)
    assert found.found == [0.75, 0.75] and found.sparse[0] == pytest.approx(0.75 + 0.25 * inputs.density)


def test_the_sparse_count_is_the_published_one():
    # Evci et al. 2020: one of every dT + 1 steps of RigL takes 2 f_S + f_D, the others 3 f_S; f is one forward pass.
    sparse, dense, between = 5.0, 100.0, 49
    moves = np.arange(4 * (between + 1)) % (between + 1) == between
    rigl = (3 * sparse * between + 2 * sparse + dense) / (between + 1)
    assert sparse_share(np.full(len(moves), sparse / dense), moves) == pytest.approx(rigl / (3 * dense), rel=1e-12)
    assert sparse_share(np.array([1.0, 0.5, 0.0])) == 0.5


def test_methods_are_ranked_at_equal_executed_flops():
    steps, runs = 10, 3
    accuracy = {"dense": 0.9, sparse_training.TICKET: 0.8, "RigL": 0.7}
    rows = [
        sparse_training._row(
            method,
            {"seed": seed, "final_test_accuracy": value + gain + 0.01 * seed, "final_test_loss": 1.0},
            0.1,
            steps * (1 if budget != sparse_training.EQUAL and method != sparse_training.TICKET else runs),
            0.5,
            2 / 3,
            budget,
        )
        for budget in (sparse_training.ONE_RUN, sparse_training.EQUAL)
        for method, value in accuracy.items()
        for gain in (0.15 if budget == sparse_training.EQUAL and method == "RigL" else 0.0,)
        for seed in range(3)
    ]
    study = sparse_training._study(rows, steps, runs, flops=2e9)
    equal, once = study.tables.values()
    assert equal.columns[4:7] == ["executed (GFLOP)", "sparse count (GFLOP)", "until the mask is final"]
    costs = [[row[1], *row[4:7]] for row in equal.rows]
    assert costs == [[name, "60", "30", "67%"] for name in ("dense", "RigL", "ticket (iterative)")]
    assert [row[4] for row in once.rows] == ["20", "60", "20"] and once.rows[1][1] == "ticket (iterative)"
    assert study.findings[1] == "Ahead of the ticket (iterative): RigL."
    text = markdown(study)
    assert all(f"**{heading}**" in text for heading in study.tables)


def test_magnitude_masks_hold_the_largest_weights_of_every_layer():
    params = {name: {"kernel": np.random.default_rng(i).normal(size=(2, 5, 4))} for i, name in enumerate("ab")}
    found, counts = magnitude_masks(jax.tree.map(jnp.float32, params), 0.3)
    assert counts == {"a/kernel": 6, "b/kernel": 6}
    for name, layer in params.items():
        size = np.abs(layer["kernel"].reshape(2, -1))
        largest = size >= np.sort(size)[:, -6:].min(1, keepdims=True)
        np.testing.assert_array_equal(np.asarray(found[name]["kernel"]).reshape(2, -1), largest)
