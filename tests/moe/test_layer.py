"""The Linen layer with every router, decoding, and the block of another library."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.experts import MixtureConfig
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
        "drop_fraction": (),
    }
    for path, leaf in jax.tree.leaves_with_path(grads):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(leaf).all()
        # The bias moves outside the gradient.
        assert (jnp.abs(leaf).max() > 0) == (name != "router/bias"), name


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_declares_what_it_uses(name):
    """Each in the table runs with the parameters it declares, and says whether it looks ahead in decoding."""
    c = RouterConfig(name, E, 1 if name in ("switch", "base") else 2, groups=2)
    params = {key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in parameter_shapes(c, D).items()}
    routing = jax.eval_shape(lambda p: gate(p, X[0], c, tokens_N=TOKENS[0]), params)
    assert routing.experts_NK.shape[0] == T and routing.num_experts == E
    assert routing.causal == c.causal == ROUTERS[name].causal


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


def test_padding_comes_out_as_zeros():
    model, params = make(config())
    mask = jnp.arange(T)[None] < jnp.array([[4], [6]])
    apply = jax.jit(model.apply)
    y = apply({"params": params}, jnp.where(mask[..., None], X, jnp.nan), mask)
    assert (np.asarray(y)[~np.asarray(mask)] == 0).all()
    np.testing.assert_allclose(y[0, :4], apply({"params": params}, X)[0, :4], rtol=1e-5, atol=1e-6)


def test_top_k_equals_mixtrals_block_in_hugging_face_transformers(golden):
    case = jax.tree.map(jnp.asarray, golden("mixtral"))
    ours = jax.jit(MoE(config(), D, F).apply)({"params": case["params"]}, case["x"])
    np.testing.assert_allclose(ours, case["out"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make_config", "message"),
    [
        (lambda: MoEConfig(every=0), "every=0"),
        (lambda: MoEConfig(balance_scope="token"), "balance_scope='token'"),
        (lambda: MoEConfig(load=0.1), "needs the smooth load"),
        (lambda: MoEConfig(bias_rate=0.1), "bias_rate=0.1 moves the sigmoid router's bias"),
        (lambda: MoEConfig(granularity=5).width_of(12), "ff=12 does not divide into granularity=5"),
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
