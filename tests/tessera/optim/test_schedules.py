import math

import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.optim.schedules import SCHEDULES, make_schedule, parse_steps

LR, STEPS, WARMUP = 0.3, 100, 20


def cosine(t, final=0.1):
    progress = min((t - WARMUP) / (STEPS - WARMUP), 1)
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


# name, keywords, closed form after the warmup as a fraction of the peak
CASES = [
    ("constant", {}, lambda t: 1.0),
    ("linear", {"final": 0.1}, lambda t: 1 - 0.9 * min((t - WARMUP) / (STEPS - WARMUP), 1)),
    ("cosine", {"final": 0.1}, cosine),
    ("wsd", {"decay": 0.3}, lambda t: min(1.0, max(0.0, (100 - t) / 30))),
    ("wsd", {"decay": 0.8, "final": 0.5}, lambda t: 1 - 0.5 * min((t - 20) / 80, 1)),
    ("rsqrt", {}, lambda t: math.sqrt(WARMUP / t)),
    ("step", {"milestones": (30,), "factor": 0.5}, lambda t: 0.5 ** ((t - WARMUP) // 30)),
    ("multistep", {"milestones": (40, 75), "factor": 0.1}, lambda t: 0.1 ** ((t >= 40) + (t >= 75))),
]


def test_every_schedule_has_a_case():
    assert {name for name, *_ in CASES} == set(SCHEDULES)


@pytest.mark.parametrize(("name", "keywords", "form"), CASES)
def test_closed_form(name, keywords, form):
    schedule = make_schedule(name, LR, steps=STEPS, warmup=WARMUP, **keywords)
    steps = np.arange(STEPS + 20)
    ours = jax.jit(jax.vmap(schedule))(steps)
    exact = [LR * (t / WARMUP if t < WARMUP else form(int(t))) for t in steps]
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd", "rsqrt"])
def test_without_warmup_the_first_step_is_the_peak(name):
    assert make_schedule(name, LR, steps=STEPS)(0) == pytest.approx(LR)


def test_cosine_is_optax_warmup_cosine():
    theirs = optax.warmup_cosine_decay_schedule(0.0, LR, WARMUP, STEPS, end_value=0.1 * LR)
    ours = make_schedule("cosine", LR, steps=STEPS, warmup=WARMUP, final=0.1)
    for t in (0, 7, 20, 55, 100, 130):
        assert float(ours(t)) == pytest.approx(float(theirs(t)), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("cosin", {}, "unknown schedule 'cosin'.*cosine"),
        ("cosine", {}, "needs steps > warmup, got steps=0"),
        ("linear", {"steps": 10, "warmup": 10}, "needs steps > warmup"),
        ("wsd", {"steps": 10, "warmup": 5, "decay": 0.6}, "6 steps, and has 5 left"),
        ("wsd", {"steps": 10, "decay": 0.0}, "0 steps"),
        ("step", {}, "takes one milestone"),
        ("multistep", {"milestones": (5, 3)}, r"rising milestones.*\(5, 3\)"),
        ("multistep", {"milestones": (5,), "warmup": 5}, "after the warmup"),
        ("constant", {"warmup": -1}, "must not be negative"),
    ],
)
def test_impossible_schedules_are_refused(name, keywords, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(name, LR, **keywords)


@pytest.mark.parametrize(
    ("text", "steps"),
    [("160ep", 62400), ("500it", 500), ("500", 500), (0, 0), ("0it", 0), ("0.5ep", 195), (".1ep", 39), (" 2ep ", 780)],
)
def test_parse_steps(text, steps):
    assert parse_steps(text, steps_per_epoch=390) == steps


@given(st.integers(0, 10**9), st.integers(1, 10**4))
def test_parse_steps_counts(amount, per_epoch):
    assert parse_steps(amount, steps_per_epoch=per_epoch) == amount
    assert parse_steps(f"{amount}it", steps_per_epoch=per_epoch) == amount
    assert parse_steps(f"{amount}ep", steps_per_epoch=per_epoch) == amount * per_epoch


@pytest.mark.parametrize("text", ["", "ep", "1.5it", "3 epochs", "-4it", -1, True, "1e3it", "2.ep"])
def test_parse_steps_refuses(text):
    with pytest.raises(ValueError, match="steps|iterations"):
        parse_steps(text, steps_per_epoch=10)


def test_epochs_of_nothing_are_refused():
    with pytest.raises(ValueError, match="an epoch has 0 steps"):
        parse_steps("3ep", steps_per_epoch=0)
