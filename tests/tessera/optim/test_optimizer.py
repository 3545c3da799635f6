import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optax import contrib

from tessera.infra.checkpoint import CheckpointConfig, Checkpoints, abstract
from tessera.optim.optimizer import (
    KEEP_WEIGHTS,
    OPTIMIZERS,
    SCHEDULES,
    OptimizerConfig,
    eval_params,
    learning_rate,
    make_optimizer,
    make_schedule,
    parse_steps,
)

X = jax.random.normal(jax.random.key(0), (32, 6))
Y = jnp.tanh(X @ jax.random.normal(jax.random.key(1), (6, 4)))
PARAMS = {
    "dense": {"kernel": 0.4 * jax.random.normal(jax.random.key(2), (6, 8)), "bias": jnp.zeros(8)},
    "output": {"kernel": 0.4 * jax.random.normal(jax.random.key(3), (8, 4)), "bias": jnp.full(4, 0.1)},
}


def loss_fn(params, x=X, y=Y):
    hidden = jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"][None])
    return jnp.mean((hidden @ params["output"]["kernel"] + params["output"]["bias"][None] - y) ** 2)


final_loss = jax.jit(loss_fn)


def train(tx, steps=150, loss_fn=loss_fn, params=PARAMS):
    """`steps` updates in one scan; returns parameters, optimizer state and the loss before every update."""

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, grad_fn=lambda p, _: jax.grad(loss_fn)(p), value=loss)
        return (optax.apply_updates(params, updates), state), loss

    (params, state), losses = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps))(params)
    return params, state, losses


# Learning rates that suit the problem; 0.02 for every name that is not here.
RATES = {"adadelta": 30.0, "adagrad": 0.3, "lars": 1.0, "momentum": 0.1, "nesterov": 0.1, "sgd": 0.3, "sm3": 0.3}
RATES |= dict.fromkeys(("cocob", "dadapt_adamw", "dog", "dowg", "momo", "prodigy", "schedule_free_sgd"), 1.0)
RATES["simplified_ademamix"] = 0.005  # its momentum is a sum, not a mean
NAMES = [*OPTIMIZERS, "sam"]


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_trains_inside_a_scan(name):
    config = OptimizerConfig(name=name, lr=RATES.get(name, 0.02))
    params, state, losses = train(make_optimizer(config))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert final_loss(eval_params(config, state, params)) < 0.2 * losses[0]


# Everything around the optimizer at once, in the shapes a run may ask for.
@pytest.mark.parametrize("name", ["momentum", "adamw", "muon", "schedule_free", "adafactor", "lion", "momo"])
def test_the_parts_go_together(name):
    decay_mask = "all" if name == "momo" else "matrices"
    config = OptimizerConfig(
        name,
        RATES.get(name, 0.02),
        "cosine",
        150,
        10,
        0.1,
        clip_norm=1.0,
        agc=0.5,
        weight_decay=1e-3,
        decay_mask=decay_mask,
    )
    params, state, losses = train(make_optimizer(config))
    assert final_loss(eval_params(config, state, params)) < 0.35 * losses[0]


def assert_same(ours, theirs, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerance or {"rtol": 1e-6, "atol": 1e-7}), ours, theirs
    )


MATRICES = {"dense": {"kernel": True, "bias": False}, "output": {"kernel": True, "bias": False}}
COSINE = optax.warmup_cosine_decay_schedule(0.0, 0.02, 5, 30)
REFERENCES = [
    (OptimizerConfig("adam", 0.02), optax.adam(0.02)),
    (OptimizerConfig("lion", 0.02), optax.lion(0.02, weight_decay=0.0)),
    (OptimizerConfig("adam", 0.02, options=(("b1", 0.8), ("eps", 1e-3))), optax.adam(0.02, b1=0.8, eps=1e-3)),
    (
        OptimizerConfig("adamw", 0.02, "cosine", 30, 5, weight_decay=0.3, clip_norm=0.2),
        optax.chain(optax.clip_by_global_norm(0.2), optax.adamw(COSINE, weight_decay=0.3, mask=MATRICES)),
    ),
    (
        OptimizerConfig("nesterov", 0.1, weight_decay=0.01, decay_mask="all"),
        optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.1, momentum=0.9, nesterov=True)),
    ),
    (
        OptimizerConfig("schedule_free", 0.02, weight_decay=0.1, decay_mask="all"),
        contrib.schedule_free_adamw(0.02, weight_decay=0.1),
    ),
    (OptimizerConfig("schedule_free_sgd", 0.3, warmup=4), contrib.schedule_free_sgd(0.3, warmup_steps=4)),
    (OptimizerConfig("muon", 0.02, options=(("muon_weight_dimension_numbers", None),)), contrib.muon(0.02)),
    (OptimizerConfig("adafactor", 0.02), optax.adafactor(0.02)),
    (
        OptimizerConfig("lars", 1.0, weight_decay=0.01),
        optax.lars(1.0, weight_decay=0.01, weight_decay_mask=MATRICES, trust_ratio_mask=MATRICES),
    ),
]


@pytest.mark.parametrize(("config", "reference"), REFERENCES, ids=lambda x: getattr(x, "name", ""))
def test_a_config_is_the_optax_call_it_stands_for(config, reference):
    assert_same(train(make_optimizer(config), 30)[0], train(optax.with_extra_args_support(reference), 30)[0])


# The settings that `tests/golden/make.py` gives to torch.
TORCH = {
    "momentum": OptimizerConfig("momentum", 0.1),
    "nesterov": OptimizerConfig("nesterov", 0.1),
    "adam": OptimizerConfig("adam", 0.01),
    "adamw": OptimizerConfig("adamw", 0.01),
    "adagrad": OptimizerConfig("adagrad", 0.1),
    "rmsprop": OptimizerConfig("rmsprop", 0.01, options=(("eps_in_sqrt", False),)),
    "adamax": OptimizerConfig("adamax", 0.01),
}


@pytest.mark.parametrize("name", TORCH)
def test_updates_are_torchs(name, golden):
    case = golden("optimizers")
    config = replace(TORCH[name], weight_decay=0.0 if name == "adamax" else 0.01, decay_mask="all")
    x, y, params = jax.tree.map(jnp.asarray, (case["x"], case["y"], case["params"]))
    ours = train(make_optimizer(config), 25, lambda p: loss_fn(p, x, y), params)[0]
    assert_same(ours, case["after"][name], rtol=2e-4, atol=2e-6)


def test_sam_descends_with_the_gradient_at_the_worst_near_point():
    rho, lr = 0.3, 0.05
    tx = make_optimizer(OptimizerConfig("sam", lr, options=(("base", "sgd"), ("rho", rho))))
    ours = train(tx, 3)[0]
    params, slope = PARAMS, jax.jit(jax.grad(loss_fn))
    for _ in range(3):
        grads = slope(params)
        norm = np.sqrt(sum(float(jnp.square(g).sum()) for g in jax.tree.leaves(grads)))
        worst = slope(jax.tree.map(lambda p, g, norm=norm: p + rho * g / norm, params, grads))
        params = jax.tree.map(lambda p, g: p - lr * g, params, worst)
    assert_same(ours, params, rtol=1e-5, atol=1e-6)


def test_sam_of_a_zero_gradient_stays_finite():
    tx = make_optimizer(OptimizerConfig("sam", 0.1))
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS, grad_fn=lambda p, _: zeros)
    assert_same(updates, zeros)


def test_sophia_reads_the_curvature_from_grad_fn():
    curvature = jnp.array([1.0, 5.0, 25.0])
    quadratic = lambda p: 0.5 * (curvature * p["kernel"] ** 2).sum()  # noqa: E731
    tx = make_optimizer(OptimizerConfig("sophia", 0.0, options=(("update_interval", 1), ("b2", 0.5))))
    _, state, _ = train(tx, 20, quadratic, {"kernel": jnp.ones(3)})
    (sophia,) = [
        s for s in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, contrib.SophiaState)) if hasattr(s, "nu")
    ]
    # Signs squared are one, so the estimate of a diagonal Hessian is exact; the average starts from zero.
    assert_same(sophia.nu["kernel"], curvature * (1 - 0.5**20), rtol=1e-5, atol=1e-6)


def test_schedule_free_evaluates_the_average_wherever_its_state_is():
    config = OptimizerConfig("schedule_free_sgd", 0.2, clip_norm=1.0)
    params, state, _ = train(make_optimizer(config), 40)
    average = eval_params(config, state, params)
    (inner,) = [part for part in state if isinstance(part, contrib.ScheduleFreeState)]
    assert_same(average, contrib.schedule_free_eval_params(inner, params))
    assert jnp.abs(average["dense"]["kernel"] - params["dense"]["kernel"]).max() > 1e-5
    assert eval_params(OptimizerConfig(), (), params) is params


@pytest.mark.parametrize(("steps", "warmup"), [(400, 20), (50_000, 2500), (3, 0)])
def test_a_warmup_below_one_is_a_share_of_the_steps(steps, warmup):
    share, whole = (OptimizerConfig("adamw", 1e-3, "cosine", steps, w) for w in (0.05, warmup))
    for step in (0, 1, warmup, steps - 1):
        assert learning_rate(share)(step) == learning_rate(whole)(step)


@pytest.mark.parametrize("warmup", [1, 1.0])
def test_a_warmup_of_one_is_one_step(warmup):
    rate = learning_rate(OptimizerConfig("adamw", 1e-3, "constant", 400, warmup))
    assert [float(rate(step)) for step in (0, 1, 200)] == pytest.approx([0, 1e-3, 1e-3])


def test_learning_rate_is_what_the_optimizer_uses():
    config = OptimizerConfig("sgd", 0.5, "linear", steps=10, warmup=2)
    tx, params = make_optimizer(config), {"kernel": jnp.zeros(())}
    state = tx.init(params)
    for step in range(10):
        updates, state = tx.update({"kernel": jnp.ones(())}, state, params)
        assert float(updates["kernel"]) == pytest.approx(-float(learning_rate(config)(step)))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"name": "adamx"}, "unknown optimizer 'adamx', did you mean 'adam"),
        ({"name": "zzzz"}, "unknown optimizer 'zzzz'; known: acprop, .*yogi"),
        ({"options": (("beta1", 0.9),)}, "'adamw' has no option 'beta1'.*it has b1, b2"),
        ({"name": "sam", "options": (("rh", 0.1),)}, "'momentum' has no option 'rh'"),
        ({"name": "sam", "options": (("base", "sophia"),)}, "sam cannot use 'sophia' as its base"),
        ({"name": "sam", "options": (("base", "sg"),)}, "unknown optimizer 'sg'"),
        ({"name": "prodigy", "weight_decay": 0.1}, "'prodigy' decays every parameter: set decay_mask='all'"),
        ({"name": "sm3", "warmup": 3}, "'sm3' takes a constant learning rate"),
        ({"schedule": "cosine"}, "needs steps > warmup"),
        ({"decay_mask": "kernels"}, "decay_mask='kernels': choose"),
        ({"lr": -1.0}, "lr=-1.0 must not be negative"),
        ({"warmup": 2.5}, "warmup=2.5 must be whole steps"),
        ({"ema": 1.0}, r"ema=1.0 must lie in \[0, 1\)"),
    ],
)
def test_impossible_configs_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(OptimizerConfig(**keywords))


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


# Moments in bfloat16, see `tessera.optim.rounding`.
MOMENTS = ["adamw", "muon", "sam"]
MOMENTS += [
    pytest.param(name, marks=pytest.mark.slow) for name in ("lion", "adafactor", "momentum", "sophia", "amsgrad")
]


@pytest.mark.parametrize("name", MOMENTS)
def test_an_optimizer_trains_as_in_float32(name):
    config = {"name": name, "lr": RATES.get(name, 0.02)}
    _, state, losses = train(make_optimizer(OptimizerConfig(**config, state_dtype="bfloat16")))
    params, wide, expected = train(make_optimizer(OptimizerConfig(**config)))
    assert losses[-20:].mean() < max(1.25 * expected[-20:].mean(), 0.02 * losses[0])
    shapes = {leaf.shape for leaf in jax.tree.leaves(PARAMS)}
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape in shapes]
    same = [leaf for leaf in jax.tree.leaves(wide) if leaf.shape in shapes]
    assert len(moments) == len(same) and (name == "sam" or {leaf.dtype for leaf in moments} == {jnp.dtype("bfloat16")})
    assert final_loss(params) < losses[0]


@pytest.mark.parametrize("name", KEEP_WEIGHTS)
def test_copies_of_weights_stay_float32(name):
    assert name in OPTIMIZERS
    with pytest.raises(ValueError, match="has copies of the weights"):
        OptimizerConfig(name, state_dtype="bfloat16")


def test_a_checkpoint_has_the_moments_as_they_are(tmp_path):
    tx = make_optimizer(OptimizerConfig("adamw", state_dtype="bfloat16"))
    _, state, _ = train(tx, steps=3)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(3, state, data={})
        checkpoints.wait()
        restored = checkpoints.restore_latest(abstract(state)).state
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert jax.tree.map(lambda leaf: leaf.dtype, restored) == jax.tree.map(lambda leaf: leaf.dtype, state)
