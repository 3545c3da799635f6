"""The Linen layer with every router, with padding, and in decoding."""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import losses, metrics
from moe.experts import Gating, MixtureConfig
from moe.gate import ROUTERS, RouterConfig, gate, parameter_shapes
from moe.layer import MoE, MoEConfig

B, T, D, F, E = 2, 6, 8, 12, 4
X = jax.random.normal(jax.random.key(0), (B, T, D))
TOKENS = jnp.arange(B * T).reshape(B, T) % 5


def make(config, **more):
    model = MoE(config, D, F, **more)
    return model, jax.jit(model.init)(jax.random.key(1), X, None, TOKENS)["params"]


def config(router="top_k", **changes):
    groups = {"hierarchical": 2, "sigmoid": 2, "softmax_groups": 2}.get(router, 1)
    k = 1 if router in ("switch", "base") else 2
    return MoEConfig(router=RouterConfig(router, E, k, groups=groups, top_groups=groups, jitter=0.01), **changes)


def quick_first(names, quick):
    """All names as cases; those that are not in `quick` are slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("router", quick_first(ROUTERS, ("top_k", "expert_choice")))
def test_every_router_in_a_layer(router):
    noisy = {"noisy": {"load": 0.1, "importance": 0.1}}.get(router, {})
    model, params = make(config(router, z=1e-3, shared=1, **noisy))

    def loss(params, key):
        rngs = {} if key is None else {"router": key}
        y, sown = model.apply({"params": params}, X, None, TOKENS, rngs=rngs, mutable=["intermediates"])
        return jnp.square(y).mean() + sown["intermediates"]["aux_loss"][0], (y, sown["intermediates"]["routing"][0])

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, (y, summary)), grads = run(params, jax.random.key(3))
    assert y.shape == X.shape and np.isfinite(y).all()
    assert {name: leaf.shape for name, leaf in summary.items()} == {
        "load": (E,),
        "max_violation": (),
        "entropy": (),
        "load_entropy": (),
        "confidence": (),
        "choices": (),
        "drop_fraction": (),
    }
    for path, leaf in jax.tree.leaves_with_path(grads):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(leaf).all()
        # The bias moves outside the gradient.
        assert (jnp.abs(leaf).max() > 0) == (name not in ("router/bias", "router/penalty")), name


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_declares_what_it_uses(name):
    """Each in the table runs with the parameters it declares, and says whether it looks ahead in decoding."""
    c = RouterConfig(name, E, 1 if name in ("switch", "base") else 2, groups=2)
    params = {key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in parameter_shapes(c, D).items()}
    routing = jax.eval_shape(lambda p: gate(p, X[0], c, tokens_N=TOKENS[0]), params)
    assert routing.experts_NK.shape[0] == T and routing.num_experts == E
    assert routing.causal == c.causal == ROUTERS[name].causal


@pytest.mark.parametrize(("ff", "granularity", "width"), [(0, 1, 24), (0, 4, 6), (10, 1, 10), (10, 4, 10)])
def test_a_width_of_ones_own_is_not_divided(ff, granularity, width):
    assert MoEConfig(ff=ff, granularity=granularity).width_of(24) == width


def test_experts_start_like_so_many_dense_layers():
    model = MoE(MoEConfig(router=RouterConfig("top_k", 8, 2), biases=True), 64, 96, 0.5, 0.25)
    params = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 2, 64)))["params"]["experts"]
    assert params["gate"]["kernel"].std() == pytest.approx(0.5 / 8, rel=0.03)
    assert params["down"]["kernel"].std() == pytest.approx(0.5 * 0.25 / np.sqrt(96), rel=0.03)
    assert jnp.abs(params["gate"]["kernel"][0] - params["gate"]["kernel"][1]).max() > 0
    assert params["up"]["bias"].shape == (8, 96) and not params["up"]["bias"].any()


@pytest.mark.parametrize(
    "router",
    quick_first(["top_k", "switch", "gshard", "noisy", "hierarchical", "sigmoid", "base", "hash"], ("sigmoid",)),
)
def test_a_token_decoded_alone_is_the_one_in_the_whole_text(router):
    """Even where training has a capacity that drops half of the choices."""
    small = MixtureConfig(dispatch="capacity", capacity_factor=0.3)
    model, params = make(config(router, mixture=small), causal=True)
    forward = jax.jit(lambda x, tokens: model.apply({"params": params}, x, None, tokens))
    whole = forward(X, TOKENS)
    for t in range(T):
        alone = forward(X[:, t : t + 1], TOKENS[:, t : t + 1])
        np.testing.assert_allclose(alone[:, 0], whole[:, t], rtol=1e-5, atol=1e-6)
    sow = jax.jit(partial(model.apply, mutable=["intermediates"]))
    _, sown = sow({"params": params}, X, None, TOKENS, rngs={"router": jax.random.key(0)})
    assert sown["intermediates"]["routing"][0]["drop_fraction"] > 0.2


@pytest.mark.parametrize("router", ["expert_choice", "soft"])
def test_routers_that_look_ahead_are_refused_in_causal_decoding(router):
    model, params = make(config(router), causal=True)
    jax.eval_shape(model.apply, {"params": params}, X, rngs={"router": jax.random.key(0)})
    with pytest.raises(ValueError, match="looks ahead"):
        jax.eval_shape(model.apply, {"params": params}, X)
    jax.eval_shape(MoE(config(router), D, F).apply, {"params": params}, X)  # no causal model: nothing to refuse


LIVE = np.array([1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1], bool)  # of the B T tokens


def dead(values, fill=jnp.nan):
    """Values with NaN in the rows of padding."""
    return jnp.where(LIVE[:, None], values, fill)


@pytest.mark.parametrize("name", quick_first(ROUTERS, ("top_k", "expert_choice", "soft", "base", "uniform")))
def test_a_router_sees_live_tokens_alone(name):
    """Weights, losses, metrics and all gradients, with NaN in the padding's activations and cotangents."""
    c = config(name).router
    shapes = parameter_shapes(c, D)
    params = {key: jax.random.normal(jax.random.key(i), shape) for i, (key, shape) in enumerate(shapes.items())}
    x, tokens, c_NE = X.reshape(-1, D), TOKENS.reshape(-1), jnp.cos(jnp.arange(B * T * E)).reshape(-1, E)

    @jax.jit
    def run(params, x, mask, tokens, c_NE):
        def f(params, x):
            r = gate(params, x, c, mask, tokens_N=tokens)
            hot_NKE = r.experts_NK[:, :, None] == jnp.arange(E)[None, None]
            weights_NE = (r.weights_NK[:, :, None] * hot_NKE).sum(1)
            found = losses.load_balance(r, choices=ROUTERS[name].balance), losses.z_loss(r), losses.importance_loss(r)
            return (weights_NE * c_NE).sum() + sum(found), (weights_NE, found, metrics.summary(r))

        (_, found), grads = jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(params, x)
        return found, grads

    (weights, *found), (dparams, dx) = run(params, dead(x), jnp.asarray(LIVE), tokens, dead(c_NE))
    alone, (dparams_alone, dx_alone) = run(params, x[LIVE], None, tokens[LIVE], c_NE[LIVE])
    assert (np.asarray(weights)[~LIVE] == 0).all() and (np.asarray(dx)[~LIVE] == 0).all()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        (weights[LIVE], *found, dparams, dx[LIVE]),
        (*alone, dparams_alone, dx_alone),
    )


@pytest.mark.parametrize(
    ("router", "mixture"),
    [
        ("top_k", {"activation": "gelu", "dispatch": "dense"}),
        ("top_k", {"activation": "gelu", "dispatch": "capacity", "capacity_factor": 8.0, "movement": "einsum"}),
        pytest.param("top_k", {}, marks=pytest.mark.slow),
        pytest.param("expert_choice", {}, marks=pytest.mark.slow),
        pytest.param("soft", {}, marks=pytest.mark.slow),
    ],
)
def test_a_layer_sees_live_tokens_alone(router, mixture):
    """Outputs, auxiliary losses, metrics and all gradients; a sequence of padding alone counts nowhere."""
    c = config(router, shared=1, biases=True, z=0.1, balance_scope="sequence", mixture=MixtureConfig(**mixture))
    model, params = make(c)
    params = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), params)  # biases too
    out_BTD = jnp.sin(jnp.arange(B * T * D)).reshape(B, T, D)
    key = jax.random.key(0) if c.mixture.dispatch == "capacity" else None  # a capacity holds in training

    @jax.jit
    def run(params, x, mask, out):
        def f(params, x):
            rngs = {} if key is None else {"router": key}
            y, sown = model.apply({"params": params}, x, mask, rngs=rngs, mutable=["intermediates"])
            sown = jax.tree.map(lambda leaf: leaf[0], sown["intermediates"], is_leaf=lambda leaf: type(leaf) is tuple)
            return (y * out).sum() + sown["aux_loss"], (y, sown)

        (_, (y, sown)), (dparams, dx) = jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(params, x)
        return (sown, dparams), (y, dx)

    mask = jnp.asarray(LIVE[:T])
    both = (jnp.stack([row, jnp.full_like(row, jnp.nan)]) for row in (dead(X.reshape(-1, D))[:T], out_BTD[0]))
    (x, out), whole = both, jnp.stack([mask, jnp.zeros_like(mask)])
    same, rows = run(params, x, whole, jnp.where(whole[..., None], out, jnp.nan))
    same_alone, alone = run(params, X[:1, LIVE[:T]], None, out_BTD[:1, LIVE[:T]])
    for found, expected in zip(rows, alone, strict=True):
        assert (np.asarray(found)[~np.asarray(whole)] == 0).all()
        np.testing.assert_allclose(found[whole], expected[0], rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), same, same_alone)


@pytest.mark.parametrize(
    ("name", "settings", "learns"),
    [
        ("top_k", {}, False),
        ("top_k", {"softmax": "before"}, True),
        ("switch", {}, True),
        ("noisy", {}, False),
        ("hierarchical", {"groups": 2, "top_groups": 2}, False),
        ("hierarchical", {"groups": 2, "top_groups": 1, "k": 2}, False),
        ("hierarchical", {"groups": 2, "top_groups": 2, "k": 2}, True),
        ("sigmoid", {}, True),
        ("softmax_groups", {}, True),
        ("base", {}, True),
        ("uniform", {}, False),
        ("sparsemixer", {"k": 2}, False),
        ("sparsemixer", {"jitter": 0.9}, True),
    ],
)
def test_one_choice_trains_a_router_or_is_refused(name, settings, learns):
    """What is refused in training has no gradient in serving, and what is not has one for every kernel."""
    c = RouterConfig(name, **({"experts": E, "k": 1} | settings))
    params = {key: jax.random.normal(jax.random.key(3), shape) for key, shape in parameter_shapes(c, D).items()}

    @jax.jit
    @jax.grad
    def served(params):
        weights_NK = gate(params, X[0], c).weights_NK
        return (weights_NK * jnp.cos(jnp.arange(weights_NK.size)).reshape(weights_NK.shape)).sum()

    kernels = [np.abs(grad).max() for key, grad in served(params).items() if key in ("kernel", "inner")]
    assert all(size > 1e-3 for size in kernels) if learns else min(kernels) < 1e-6
    train = partial(jax.eval_shape, lambda p: gate(p, X[0], c, train=True), params)
    refused = pytest.raises(ValueError, match="no gradient of the loss reaches the router")
    with nullcontext() if learns else refused:
        train()


@pytest.mark.parametrize(
    ("make_config", "message"),
    [
        (lambda: MoEConfig(every=0), "every=0"),
        (lambda: MoEConfig(balance_scope="token"), "balance_scope='token'"),
        (lambda: MoEConfig(load=0.1), "needs the smooth load"),
        (lambda: MoEConfig(bias_rate=0.1), "bias_rate=0.1 moves the sigmoid router's bias"),
        (lambda: MoEConfig(granularity=5).width_of(12), "ff=12 does not divide into granularity=5"),
        (lambda: MoEConfig(shared_gate=True), "shared_gate=True without shared experts"),
        (lambda: MoEConfig(identity=4, null=4), "identity=4 and null=4 of router.experts=8"),
        (lambda: MoEConfig(identity=1, router=RouterConfig("soft")), "another router than 'soft'"),
        (lambda: MixtureConfig(weigh="input", dispatch="capacity"), "weigh='input' with dispatch='capacity'"),
        (lambda: MixtureConfig("relu", gating=Gating(limit=7.0)), "with activation='relu': choose one of"),
        (lambda: RouterConfig(score="tanh"), "score='tanh': choose one of sigmoid, softmax, sqrt_softplus"),
        (lambda: RouterConfig("hash", bias=True), "bias=True: the router 'hash' has no logits"),
        (lambda: RouterConfig("nearest"), "name='nearest': choose one of top_k"),
        (lambda: RouterConfig(experts=4, k=5), "k=5 choices among 4"),
        (lambda: RouterConfig(experts=6, groups=4), "groups must divide"),
        (lambda: RouterConfig(slots=0), "slots=0"),
        (lambda: RouterConfig(softmax="middle"), "softmax='middle'"),
        (lambda: gate({}, X[0], RouterConfig("hash", E, 1)), "pass tokens_N= to moe.gate.gate, or tokens_BT to MoE"),
    ],
)
def test_what_cannot_be_is_refused(make_config, message):
    with pytest.raises(ValueError, match=message):
        make_config()
