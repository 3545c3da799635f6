from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from tessera.optim.optimizer import OPTIMIZERS, OptimizerConfig, eval_params, learning_rate, make_optimizer

X = jax.random.normal(jax.random.key(0), (32, 6))
Y = jnp.tanh(X @ jax.random.normal(jax.random.key(1), (6, 4)))
PARAMS = {
    "dense": {"kernel": 0.4 * jax.random.normal(jax.random.key(2), (6, 8)), "bias": jnp.zeros(8)},
    "output": {"kernel": 0.4 * jax.random.normal(jax.random.key(3), (8, 4)), "bias": jnp.full(4, 0.1)},
}


def loss_fn(params, x=X, y=Y):
    hidden = jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"][None])
    return jnp.mean((hidden @ params["output"]["kernel"] + params["output"]["bias"][None] - y) ** 2)


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
NAMES = [*OPTIMIZERS, "sam"]


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_trains_inside_a_scan(name):
    config = OptimizerConfig(name=name, lr=RATES.get(name, 0.02))
    params, state, losses = train(make_optimizer(config))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert loss_fn(eval_params(config, state, params)) < 0.2 * losses[0]


# Everything around the optimizer at once, in the shapes a run may ask for.
@pytest.mark.parametrize("name", ["momentum", "adamw", "muon", "schedule_free", "adafactor", "lion", "momo"])
def test_the_parts_go_together(name):
    decay_mask = "all" if name == "momo" else "matrices"
    config = OptimizerConfig(
        name,
        RATES.get(name, 0.02),
        "cosine",
        75,
        5,
        0.1,
        clip_norm=1.0,
        agc=0.5,
        weight_decay=1e-3,
        accumulate=2,
        decay_mask=decay_mask,
    )
    params, state, losses = train(make_optimizer(config))
    assert loss_fn(eval_params(config, state, params)) < 0.35 * losses[0]


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
    params = PARAMS
    for _ in range(3):
        grads = jax.grad(loss_fn)(params)
        norm = np.sqrt(sum(float(jnp.square(g).sum()) for g in jax.tree.leaves(grads)))
        worst = jax.grad(loss_fn)(jax.tree.map(lambda p, g, norm=norm: p + rho * g / norm, params, grads))
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


def test_accumulation_is_one_update_on_the_mean_gradient():
    halves = [(X[:16], Y[:16]), (X[16:], Y[16:])]
    tx = make_optimizer(OptimizerConfig("adamw", 0.02, accumulate=2, clip_norm=0.1))
    params, state = PARAMS, tx.init(PARAMS)
    for step in range(6):
        updates, state = tx.update(jax.grad(loss_fn)(params, *halves[step % 2]), state, params)
        if step % 2 == 0:
            assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))
        params = optax.apply_updates(params, updates)
    assert_same(
        params, train(make_optimizer(OptimizerConfig("adamw", 0.02, clip_norm=0.1)), 3)[0], rtol=1e-4, atol=1e-5
    )


def test_schedule_free_evaluates_the_average_wherever_its_state_is():
    config = OptimizerConfig("schedule_free_sgd", 0.2, clip_norm=1.0, accumulate=2)
    params, state, _ = train(make_optimizer(config), 40)
    average = eval_params(config, state, params)
    inner = [s for s in state.inner_opt_state if isinstance(s, contrib.ScheduleFreeState)][0]
    assert_same(average, contrib.schedule_free_eval_params(inner, params))
    assert jnp.abs(average["dense"]["kernel"] - params["dense"]["kernel"]).max() > 1e-5
    assert eval_params(OptimizerConfig(), (), params) is params


@pytest.mark.parametrize(("steps", "warmup"), [(400, 20), (50_000, 2500), (3, 0)])
def test_a_warmup_below_one_is_a_share_of_the_steps(steps, warmup):
    share, whole = (OptimizerConfig("adamw", 1e-3, "cosine", steps, w) for w in (0.05, warmup))
    for step in (0, 1, warmup, steps - 1):
        assert learning_rate(share)(step) == learning_rate(whole)(step)


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
        ({"name": "sam", "accumulate": 2}, "sam asks for gradients itself"),
        ({"name": "sophia", "accumulate": 2}, "sophia asks for gradients itself"),
        ({"name": "prodigy", "weight_decay": 0.1}, "'prodigy' decays every parameter: set decay_mask='all'"),
        ({"name": "sm3", "warmup": 3}, "'sm3' takes a constant learning rate"),
        ({"schedule": "cosine"}, "needs steps > warmup"),
        ({"decay_mask": "kernels"}, "decay_mask='kernels': choose"),
        ({"lr": -1.0}, "lr=-1.0 must not be negative"),
        ({"accumulate": 0}, "accumulate=0 must be at least 1"),
        ({"warmup": 2.5}, "warmup=2.5 must be whole steps"),
        ({"ema": 1.0}, r"ema=1.0 must lie in \[0, 1\)"),
    ],
)
def test_impossible_configs_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(OptimizerConfig(**keywords))
