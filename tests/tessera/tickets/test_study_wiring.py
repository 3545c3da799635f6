"""What studies hand to training and what they say of its results: a recorder stands in for the training."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from scipy import stats

from lottery import masks as masks_lib
from lottery import summary
from lottery.criteria import ScoreInputs
from lottery.imp import Result, SearchConfig, Trained
from tessera.data.images import Images, ImageSplits
from tessera.models.registry import Network
from tessera.tickets import probe_report
from tessera.tickets.probes import AnalysisConfig
from tessera.tickets.setup import Finished, FinishedLevels, Setup, init_stack
from tessera.tickets.studies import (
    ablations,
    compared_masks,
    distribution,
    instability,
    population,
    reliability,
    rewinding,
    sources,
    sparse_training,
    study,
)
from tessera.tickets.studies.sparse_methods import MethodInputs, SparseConfig, _densities
from tessera.tickets.train import Programs, TicketConfig

SEEDS = (3, 8)
INITIAL = {"dense0": {"kernel": jnp.arange(1.0, 25.0).reshape(2, 3, 4)}}  # two seeds
MASKS = jax.tree.map(lambda leaf: jnp.asarray(np.random.default_rng(0).random(leaf.shape) < 0.5), INITIAL)
INIT = Network(
    lambda key: jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape[1:]), INITIAL),
    lambda *_: None,
    lambda *_: None,
)


EMPTY = Images(np.zeros((1, 2, 2, 1), np.float32), np.zeros(1, np.int32))
UNUSED = Programs(*[lambda *_: None] * 3)


@dataclass(frozen=True)
class Recorder(Setup):
    """A setup whose training returns its starts, and rows of the measures it is told."""

    row: dict = field(default_factory=dict)
    starts: list = field(default_factory=list)

    def train(self, starts, *_):
        self.starts.append(starts)
        return Trained(starts.params, [dict(self.row)] * len(starts.names))


def recorder(**row):
    splits, search = ImageSplits(EMPTY, EMPTY, EMPTY, 3), SearchConfig(seeds=SEEDS, rewind=7)
    ticket, inputs = TicketConfig(steps=20, rewind=7), ScoreInputs()
    return Recorder(
        splits, INIT, ticket, search, optax.with_extra_args_support(optax.adam(0.1)), UNUSED, inputs, 1, 3, row
    )


class Levels(FinishedLevels):
    """Levels of a search that are at hand."""

    def __init__(self, *levels):
        super().__init__("nowhere")
        self.levels = levels

    def has(self, level):
        return level < len(self.levels)

    def load(self, level, like):
        return self.levels[level]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_branches_begin_at_one_state_in_orders_of_their_own(monkeypatch):
    setup, pairs = recorder(), []
    monkeypatch.setattr(instability, "path_rows", lambda setup, a, b, _: pairs.append((a, b)) or [{}] * 6)
    moments = jax.vmap(optax.adam(0.1).init)(INITIAL)
    moments = jax.tree.map(lambda leaf: leaf + 1, moments)  # none is zero
    state = {"params": INITIAL, "opt_state": moments}
    study = instability.InstabilityConfig(steps=(0,), orders=3)
    rows = instability._branches(setup, study, state, MASKS, 5, 0.5)
    (starts,) = setup.starts
    assert len(set(starts.seeds.tolist())) == 6 and not set(SEEDS) & set(starts.seeds.tolist())
    assert starts.start_step == 5 and [row["seed"] for row in rows] == [3, 3, 3, 8, 8, 8]
    for i in range(6):
        mask, params, opt = (jax.tree.map(lambda x, i=i: x[i // 3], x) for x in (MASKS, INITIAL, moments))
        assert same(jax.tree.map(lambda x, i=i: x[i], starts.params), masks_lib.apply(params, mask))
        inner, _ = jax.tree.map(lambda x, i=i: x[i], starts.opt_state)
        assert same(inner.mu, masks_lib.apply(opt[0].mu, mask)) and same(inner.nu, masks_lib.apply(opt[0].nu, mask))
        assert inner.count == opt[0].count


def test_second_runs_differ_in_the_order_of_the_data_alone(monkeypatch):
    setup = recorder()
    monkeypatch.setattr(probe_report, "path_rows", lambda *_, **__: [])
    level0 = {"reset": INITIAL}, [{"arm": "dense", "seed": seed} for seed in SEEDS]
    search = Finished(setup, ConfigDict(), Levels(level0))
    probe_report._second_runs(search, INITIAL, MASKS, list(SEEDS), AnalysisConfig())
    (starts,) = setup.starts
    assert len(set(starts.seeds.tolist())) == 2 and not set(SEEDS) & set(starts.seeds.tolist())
    assert starts.start_step == 7 and same(starts.params, masks_lib.apply(INITIAL, MASKS))


def test_masks_of_another_seed_are_the_next_seeds(monkeypatch):
    found = {}
    monkeypatch.setattr(sources, "train_masks", lambda setup, masks, *_: found.update(masks) or [])
    rows = [{"arm": "ticket", "seed": seed} for seed in SEEDS]
    levels = [({"reset": INITIAL}, [{**row, "arm": "dense"} for row in rows]), ({"masks": MASKS}, rows)]
    setup = recorder()
    sources._transfer(setup, {compared_masks.OWN: Finished(setup, ConfigDict(), Levels(*levels))}, 1)
    own, other = found[compared_masks.OWN], found[sources.SEED]
    assert same(own[0], jax.tree.map(lambda m: m[0], MASKS))
    assert same(own, [other[1], other[0]]) and not same(own, other)


def test_overlaps_are_with_the_seeds_own_ticket():
    own = [jax.tree.map(lambda m, i=i: m[i], MASKS) for i in range(2)]
    names = ("early_stop_test_accuracy", "final_test_accuracy", "early_stop_step")
    setup = recorder(**dict.fromkeys(names, 0.5))
    rows = compared_masks.train_masks(setup, {compared_masks.OWN: own, "other": own[::-1]}, INITIAL, SEEDS, 1)
    first, second = (np.asarray(mask["dense0"]["kernel"]) for mask in own)
    # Shared over expected: n shared / (a b); with itself n / a.
    chance = 12 * (first & second).sum() / first.sum() / second.sum()
    expected = [12 / first.sum(), 12 / second.sum(), chance, chance]
    assert [row["overlap"] for row in rows] == pytest.approx(expected) and [row["seed"] for row in rows] == [3, 8] * 2


def test_the_best_draw_has_the_lowest_early_loss():
    loss = {"target": [0.3, 0.1, 0.2], "wide": [0.2, 0.3, 0.1]}
    study = population.PopulationConfig(hidden=(2,), draws=3, repeats=1)
    setups = {name: recorder(final_test_accuracy=0.5) for name in ("target", "wide", "half", "plain", "distilled")}
    names = {id(setup): name for name, setup in setups.items()}
    stack = {"dense0": {"kernel": jnp.arange(3.0)[:, None, None] * jnp.ones((3, 2, 2))}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(population, "draw", lambda setup, *_: (stack, np.asarray(loss[names[id(setup)]])))
        patch.setattr(population, "prune_to", lambda params, hidden: params)
        rows = population._recipes(setups, study, 0)
    assert [row["recipe"] for row in rows] == [*population.RECIPES]
    trained = {name: setup.starts for name, setup in setups.items() if setup.starts}
    picked = {name: starts.params["dense0"]["kernel"][:, 0, 0].tolist() for name, (starts,) in trained.items()}
    # One draw and the best: of the target the second has the lowest loss, of the overwide the third.
    assert picked == {"target": [0, 1], "half": [0, 2], "plain": [0, 2], "distilled": [0, 2]}


def test_early_loss_agrees_with_final_accuracy_where_low_goes_with_high():
    draws = [
        {"kind": "draw", "repeat": r, "draw": i, "early": early, "accuracy": accuracy}
        for r in range(2)
        for i, (early, accuracy) in enumerate(((0.1, 0.9), (0.2, 0.8), (0.3, 0.7)))
    ]
    recipes = [
        {"kind": "recipe", "repeat": r, "recipe": name, "accuracy": 0.5 + 0.1 * i}
        for r in range(2)
        for i, name in enumerate(population.RECIPES)
    ]
    study = population.PopulationConfig(draws=3, repeats=2)
    found = population._study([*draws, *recipes], study, recorder())
    assert ": 1.00 \u00b1 0.00 over 2 populations" in found.findings[0]
    assert "better than the mean draw by 10.00 \u00b1 0.00 points" in found.findings[1]
    assert "better than one draw of the target width by 40.00 \u00b1 0.00 points" in found.findings[2]


@pytest.mark.parametrize(("value", "verdict"), [("final_test_loss", "better"), ("final_test_accuracy", "worse")])
def test_late_rewinding_is_better_where_the_loss_is_lower(value, verdict):
    rows = []
    for seed in range(4):
        common = {"seed": seed, "density": 0.5}
        rows.append({**common, "density": 1.0, "level": 0, "rewind": 7, "survivors": summary.DENSE, value: 0.2})
        for step, ticket, random in ((0, 0.5, 0.9), (7, 0.3, 0.9)):
            for name, mean in (("ticket", ticket), ("random mask", random)):
                row = {"level": 1, "rewind": step, "survivors": f"{name}, to step {step}", value: mean + 0.01 * seed}
                rows.append(common | row)
    found = rewinding._study(rows, rewinding.RewindingConfig(value), recorder())
    better = 4 if verdict == "better" else 0
    by = "0.200" if verdict == "better" else "20.00"
    assert f"the ticket rewound to step 7 is {verdict} than one rewound to 0 by {by}" in found.findings[0]
    assert f"; better in {better} of 4 seeds." in found.findings[0]
    assert "weights of step 7 are not told apart from those of step 0 (0.00" in found.findings[1]
    assert f"is {verdict} than a random mask on the same weights by" in found.findings[2]
    assert found.table.columns[2] == "steps trained" and [row[2] for row in found.table.rows] == [20, 20, 20, 13, 13]


def test_winners_are_counted_against_their_own_dense_networks_and_tails_are_the_best():
    accuracy, dense = np.array([60.0, 70.0, 80.0, 90.0]), np.array([60.0, 75.0, 85.0, 95.0])
    cell = distribution.Cell(1, 4, 0.5, 10, accuracy, dense, ())
    assert cell.winners == pytest.approx((0.25, np.sqrt(0.25 * 0.75 / 4)))
    study = distribution.DistributionConfig((4,), (1,), tickets=40, densities=(0.5,), tails=(0.25,), trials=1)
    losses = np.random.default_rng(0).exponential(size=40)
    rows = [
        {
            "depth": 1,
            "width": 4,
            "density": 0.5,
            "weights": 10,
            "loss": float(loss),
            "accuracy": 0.5,
            "dense_accuracy": 0.4,
        }
        for loss in losses
    ]
    found = distribution._study(rows, study, recorder())
    name = next(name for name in found.tables if name.startswith("Tail index"))
    assert found.tables[name].rows[0][2].startswith(f"{summary.tail_index(-losses, 10).index:.2f} ")


def test_a_ticket_is_charged_for_its_search_and_a_fixed_mask_for_one_run():
    density, found = {0: 1.0, 1: 0.5, 2: 0.25}, Result.__new__(Result)
    found.levels = 2
    for level, share in density.items():
        for arm in ("ticket", "random_mask") if level else ("dense",):
            row = {"level": level, "arm": arm, "seed": 3, "alive": int(100 * share), "prunable": 100}
            found.append(row | {"final_test_accuracy": 0.5, "final_test_loss": 1.0})
    names = ("density", "steps", "sparse_steps", "found")
    rows = {row["method"]: [row[name] for name in names] for row in sparse_training._searched(found, 10)}
    # Three runs at densities 1, 1/2 and 1/4; the mask is final after two of them.
    assert rows[sparse_training.TICKET] == pytest.approx([0.25, 30, 30 * 1.75 / 3, 2 / 3])
    assert rows[sparse_training.SEARCHED["random_mask"]] == [0.25, 10, 2.5, 0.0]
    assert rows[summary.DENSE] == [1.0, 10, 10, 0.0]


def test_a_gradual_schedule_is_counted_as_a_staircase():
    study, which = SparseConfig(every=5, pruned=0.75), {"dense0": {"kernel": True}}
    inputs = MethodInputs(recorder(), study, None, INITIAL, which, {"dense0/kernel": 6})
    # 20 steps, pruned at 0, 5, 10 and the end, 15; half of the weights stay: 1/2 + 1/2 (1 - t / 15)^3.
    stairs = [0.5 + 0.5 * (1 - t / 15) ** 3 for t in (0, 5, 10, 15)]
    np.testing.assert_allclose(_densities(inputs), np.repeat(stairs, 5), rtol=1e-6)


def _sentences(gains):
    """Every report's sentences on one difference, `gains` by seed in hundredths: (sentence, word above 0, below 0)."""
    setup, shift = recorder(), [gain / 100 for gain in gains]
    tried = [
        {"arm": arm, "seed": seed, "density": 0.5, "condition": "none", "strength": 0.0, "accuracy": 0.5 + by}
        | {"calibration_error": 0.5 + by}
        for seed, gain in enumerate(shift)
        for arm, by in {summary.DENSE: 0.0, "ticket": gain, "reinit": 0.0, "random_mask": gain}.items()
    ]
    ensembles = [
        {"arm": arm, "seed": seed, "accuracy": 0.5 + by, "calibration_error": 0.1} | reliability_costs[arm]
        for seed, gain in enumerate(shift)
        for arm, by in {"2 tickets": gain, "one dense, 2 times as long": 0.0}.items()
    ]
    found = reliability._study(tried, ensembles, 1, setup).findings
    yield found[0], "better", "worse"
    calibrations = [text for text in found if text.startswith("Calibration")]
    yield calibrations[0], "higher", "lower"
    yield found[-1], "better", "worse"

    late = [{"seed": s, "level": 0, "rewind": 7, "density": 1.0, "survivors": "dense"} for s in range(len(gains))]
    for seed, gain in enumerate(shift):
        for step, by in ((0, 0.0), (7, gain)):
            row = {"seed": seed, "level": 1, "rewind": step, "density": 0.5, "survivors": f"ticket, to step {step}"}
            late.append(row | {"loss": 2.0 - by})
    for value, sign in (("final_test_loss", 1), ("final_test_accuracy", -1)):
        rows = [{**row, value: row.get("loss", 2.0)} for row in late]
        words = ("better", "worse")[::sign]
        yield rewinding._study(rows, rewinding.RewindingConfig(value), setup).findings[0], *words

    draws = [
        {"kind": "draw", "repeat": r, "draw": i, "early": i, "accuracy": 0.5 + (0.5 - i) * 2 * gain}
        for r, gain in enumerate(shift)
        for i in range(2)
    ]
    recipes = [
        {"kind": "recipe", "repeat": r, "recipe": name, "accuracy": 0.5 + gain * (name == population.WHOLE)}
        for r, gain in enumerate(shift)
        for name in population.RECIPES
    ]
    told = population._study([*draws, *recipes], population.PopulationConfig(draws=2, repeats=len(gains)), setup)
    for text in told.findings[1:]:
        yield text, "better", "worse"

    named = {"RigL": shift, sparse_training.TICKET: [0.0] * len(shift), summary.DENSE: [0.0] * len(shift)}
    rows = [
        sparse_training._row(
            method,
            {"seed": seed, "final_test_accuracy": 0.5 + by, "final_test_loss": 1.0},
            *(0.1, 30, 0.5, 0.5, budget),
        )
        for budget in (sparse_training.ONE_RUN, sparse_training.EQUAL)
        for method, values in named.items()
        for seed, by in enumerate(values)
    ]
    yield sparse_training._study(rows, 10, 3, flops=2e9).findings[1], "Ahead of", "Behind"


reliability_costs = reliability.ensemble_costs(2, 1, "layer", 0.5, 0.5)


@given(st.lists(st.integers(-30, 30), min_size=3, max_size=5))
@settings(max_examples=10, deadline=None)
@pytest.mark.filterwarnings("ignore:Precision loss", "ignore:invalid value", "ignore:An input array is constant")
def test_a_sentence_goes_where_its_number_goes(gains):
    mean = np.mean(gains)
    different = np.std(gains) == 0 and mean != 0 or np.std(gains) > 0 and stats.ttest_1samp(gains, 0).pvalue < 0.05
    for text, above, below in _sentences(gains):
        text = text.partition(";")[0]  # then the count of seeds
        expected = (above if mean > 0 else below) if different else ("not told apart", "Not told apart")
        assert any(word in text for word in np.atleast_1d(expected)), text
        if different:
            assert (below if mean > 0 else above) not in text and "-" not in text.split(" by ")[-1], text


def test_what_an_ensemble_costs_is_counted_by_hand():
    # Level 3: dense, two sparser ones and the ticket's own training, 1,000 steps each; five of each.
    costs = reliability.ensemble_costs(5, 3, "layer", 0.2, 0.21)
    names = ("density", "training_flops", "finding_flops", "answer_flops")
    told = {name: [row[key] for key in names] for name, row in costs.items()}
    assert told["5 tickets"] == pytest.approx([1.0, 5, 15, 5])
    assert told["5 random masks"] == pytest.approx([1.0, 5, 0, 5]), "the rates say how many weights a layer has"
    assert told["5 small dense"] == pytest.approx([1.05, 5.25, 0, 1.05])
    assert told["one dense, 5 times as long"] == [1, 5, 0, 1] and told["one dense"] == [1, 1, 0, 1]
    over_all = reliability.ensemble_costs(5, 3, "global", 0.2, 0.21)["5 random masks"]
    assert over_all["finding_flops"] == 15, "the search says how many weights every layer has"


def test_comparisons_are_counted_with_and_without_bonferronis_correction():
    rng = np.random.default_rng(0)
    gains = {f"noise {i}": rng.normal(0.01 * (i - 10), 0.05, 8).tolist() for i in range(20)}
    values = {name: stats.ttest_1samp(values, 0).pvalue for name, values in gains.items()}
    told, strict = (sum(p < limit for p in values.values()) for limit in (0.05, 0.05 / 20))
    assert 0 < strict < told < 20
    *_, chance = reliability._sides(gains, "the dense network's")
    assert chance == (
        "By chance 1 of these 20 comparisons would be called better or worse if none were; "
        f"{strict} of the {told} are with intervals of 99.75% (Bonferroni) too."
    )


def test_frozen_weights_have_no_gradient():
    """Of the network x @ (trained + frozen): the gradient is that at the sum, and reaches one of the two."""
    linear = Network(lambda key: None, lambda w, x: x @ w, lambda w, x: (x @ w, {}))
    network, x = ablations.frozen_network(linear), jnp.array([[1.0, 2.0], [3.0, 4.0]])
    tree = {"trained": jnp.array([[1.0], [0.0]]), "frozen": jnp.array([[0.0], [5.0]])}
    np.testing.assert_array_equal(network.apply(tree, x), [[11], [23]])
    found = jax.grad(lambda tree: jnp.square(network.train(tree, x)[0]).sum())(tree)
    np.testing.assert_array_equal(found["trained"], [[2 * (11 + 3 * 23)], [2 * (2 * 11 + 4 * 23)]])
    assert not found["frozen"].any()


def test_initializations_differ_by_seed_and_salt_and_are_the_same_again():
    drawn = [init_stack(recorder(), SEEDS, salt)["dense0"]["kernel"] for salt in (0, 1, 0)]
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert len(np.unique(drawn[:2])) == 2 * drawn[0].size


def test_the_analysis_names_what_it_found_once_and_draws_intervals():
    """Arms with one mask are one line; the whole network's distance stands once; two seeds have a range."""
    curve = {"alpha": [0.0, 0.5, 1.0], "error": [0.02, 0.03, 0.02], "loss": [0.1, 0.2, 0.1]}
    rises = {"instability": 0.01, "barrier": 0.01, "loss_barrier": 0.1, "stable": True}
    found = {"connectivity": [], "overlap": [], "sharpness": []}
    for arm, level in (("dense", 0), ("ticket", 2), ("reinit", 2)):
        for seed in range(3):
            about = {"level": level, "arm": arm, "seed": seed, "density": 0.5**level}
            found["connectivity"] += [about | curve | rises] if arm != "reinit" else []
            sharp = {"eigenvalue": 4.74 - level + 0.1 * seed, "sharpness": 0.1, "train_loss": 0.1, "residual": 1e-6}
            found["sharpness"].append(about | sharp)
            for path in ("*", "dense0/kernel") if level else ():
                overlap = {"seed": 0, "path": path, "ratio": 1.2, "z": 3.0, "distance": 0.25}
                found["overlap"].append(about | overlap)
    texts = probe_report._findings(found)
    (eigenvalues,) = (text for text in texts if "Hessian" in text)
    assert "dense network 4.84 ± 0.25 (level 0), winning ticket 2.84 ± 0.25 (level 2)" in eigenvalues
    assert "linear mode connectivity" in texts[0] and sum("share" in text for text in texts) == 1
    section = probe_report._overlap(found["overlap"], AnalysisConfig())
    table = section.parts()[1]
    assert [row[2:4] for row in table.rows] == [["all", 0.25], ["dense0/kernel", None]]
    assert "reinitialized: the same masks as winning ticket" in section.caption
    figure = probe_report._connectivity(found["connectivity"], AnalysisConfig()).parts()[0]
    assert figure.axes[0].get_xlabel() == "interpolation coefficient" and len(figure.axes[0].collections) == 2


def test_two_seeds_have_a_range_and_no_interval():
    assert study.with_interval([0.4, 0.5]) == "45.00 (40.00 to 50.00)" and study.with_interval([0.5]) == "50.00"
    assert study.with_interval([0.4, 0.5, 0.6]) == "50.00 ± 24.84"
    config = {"model": {"name": "lenet", "hidden": [300, 100]}, "data": {"name": "mnist"}, "seeds": [0, 1]}
    said = study.describe(config | {"train": {"steps": "1200it", "batch_size": 60}})
    assert said == "Network lenet (300-100) on mnist, 1,200 steps of 60 examples, 2 seeds." and study.describe({}) == ""
