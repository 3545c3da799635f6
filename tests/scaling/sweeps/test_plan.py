import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling import flops
from scaling.sweeps.plan import Family, PlanConfig, Rule, plan_runs

BUDGETS = (4e10, 8e10, 3.2e11)


def plan(**changes):
    settings = {"widths": (8, 16, 32), "budgets": BUDGETS, **changes}
    return plan_runs(Family(), PlanConfig(**settings), {"data": "text"})


@given(st.integers(2, 512))
def test_a_family_grows_with_its_width(width):
    family = Family()
    here, next_ = family.shape(width), family.shape(width + 8)
    assert flops.parameters(next_).total > flops.parameters(here).total
    assert next_.layers >= here.layers >= 2 and next_.heads >= here.heads >= 1
    assert here.ff % family.ff_multiple == 0 and abs(here.ff - 8 / 3 * width) <= 2 + width * 0.01


@pytest.mark.parametrize(
    ("rule", "params", "value"),
    [
        (Rule(1e-2), 1e9, 1e-2),
        (Rule(2.0, at=1e4, exponent=0.5), 4e4, 4.0),
        (Rule(2.0, at=1e4, exponent=0.5, most=3.0), 4e4, 3.0),
        (Rule(5.0, multiple=4), 1e4, 4.0),
        (Rule(1.0, multiple=4), 1e4, 4.0),
        (Rule(1.0, exponent=-1.0, least=0.25), 1e9, 0.25),
    ],
)
def test_rules(rule, params, value):
    assert rule(params) == pytest.approx(value)
    with pytest.raises(ValueError, match="a rule of tokens needs their number"):
        Rule(1.0, tokens_exponent=0.5)(params)


def test_rules_of_tokens_see_those_of_the_longest_readout():
    lr = Rule(1.79, at=1.0, exponent=-0.713, tokens_at=1.0, tokens_exponent=0.307)
    batch = Rule(100.0, tokens_exponent=0.571)
    for run in plan(lr=lr, batch=batch):
        params, tokens = run.columns["params"], BUDGETS[-1] / (6 * run.columns["params"])
        assert run.columns["lr"] == pytest.approx(1.79 * params**-0.713 * tokens**0.307)
        assert run.columns["batch"] == max(1, int(100 * (tokens / 1e9) ** 0.571 + 0.5))


def test_every_size_is_read_out_at_every_budget():
    runs = plan()
    assert [len(run.readouts) for run in runs] == [3, 3, 3]
    for run in runs:
        for readout, budget in zip(run.readouts, BUDGETS, strict=True):
            step = run.columns["batch"] * 64
            assert readout.budget == budget and readout.tokens == readout.steps * step
            assert readout.flops == pytest.approx(budget, rel=0.5 / readout.steps)
            assert readout.flops == 6 * run.columns["params"] * readout.tokens
            assert readout.branch == readout.steps - round(0.2 * readout.steps)


def test_a_trunk_costs_little_more_than_its_largest_budget():
    for run in plan():
        decays = sum(0.2 * readout.flops for readout in run.readouts)
        assert run.cost == pytest.approx(0.8 * run.readouts[-1].flops + decays, rel=1e-2)
        assert run.cost < 1.1 * BUDGETS[-1] < sum(BUDGETS)


def test_the_key_is_that_of_what_decides_the_weights():
    a, b = plan(), plan(budgets=BUDGETS[:1])
    assert {run.key for run in a} == {run.key for run in b}
    assert not {run.key for run in a} & {run.key for run in plan(lr=Rule(3e-3))}
    assert not {run.key for run in a} & {run.key for run in plan(warmup=20)}
    assert len({run.key for run in plan(seeds=(0, 1), lr_factors=(1.0, 2.0))}) == 12


def test_a_grid_names_what_differs():
    names = {run.name for run in plan(widths=(8,), lr_factors=(1.0, 2.0), batch_factors=(1.0, 2.0), seeds=(0, 1))}
    assert len(names) == 8 and "w8-lr0.02-b32-s1" in names


def test_readouts_that_say_little_are_left_out():
    assert all(
        10 <= r.tokens / run.columns["params"] <= 2000
        for run in plan(tokens_per_parameter=(10.0, 2000.0))
        for r in run.readouts
    )
    assert all(r.steps >= 300 for run in plan(least_steps=300) for r in run.readouts)
    assert all(r.branch >= 200 for run in plan(warmup=200) for r in run.readouts)


def test_token_counts_in_place_of_budgets():
    for run in plan(budgets=(), tokens=(2e5, 1e6)):
        assert [r.tokens for r in run.readouts] == pytest.approx([2e5, 1e6], rel=5e-3)


def test_other_conventions_count_otherwise():
    exact, six = plan(convention="exact matmuls"), plan()
    for run in six:
        other = next(r for r in exact if r.name == run.name)
        assert other.readouts[-1].flops == pytest.approx(run.readouts[-1].flops, rel=1e-2)
        assert other.readouts[-1].tokens < run.readouts[-1].tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": (1e6,)}, "one of them"),
        ({"budgets": ()}, "one of them"),
        ({"widths": ()}, "widths"),
        ({"seeds": (0, 0)}, "each once"),
        ({"budgets": (-1.0,)}, "positive"),
        ({"decay": 1.0}, "decay"),
        ({"convention": "7ND"}, "'6ND'"),
        ({"least_steps": 10**9}, "cannot|can be read out"),
    ],
)
def test_plans_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)
    with pytest.raises(ValueError, match="positive"):
        Rule(-1.0)
    with pytest.raises(ValueError, match="aspect"):
        Family(aspect=0.0)
    assert math.isinf(PlanConfig(widths=(8,), budgets=(1.0,)).tokens_per_parameter[1])


@pytest.mark.parametrize("convention", ["6ND", "exact matmuls", "kaplan"])
def test_budgets_of_token_counts_follow_the_convention(convention):
    config = PlanConfig(widths=(32,), tokens=(1e6, 4e6), convention=convention)
    (run,) = plan_runs(Family(), config, {})
    each = flops.count(Family().shape(32), convention).flops_per_token
    assert [readout.budget for readout in run.readouts] == pytest.approx([1e6 * each, 4e6 * each])
