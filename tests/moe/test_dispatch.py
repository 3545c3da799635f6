"""Every way from tokens through experts and back against a plain loop in float64 numpy."""

import functools
import math
from dataclasses import replace
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe import dispatch, experts, metrics, route
from moe.routing import make_routing, prepare

N, D, F, E = 24, 6, 10, 4
PARAMS = {name: experts.initialize(D, F, E, name, biases=True, key=jax.random.key(2)) for name in experts.ACTIVATIONS}
# Biases that are not zero.
PARAMS = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size).reshape(x.shape)), PARAMS)
X = jax.random.normal(jax.random.key(3), (N, D))
LOGITS = 2 * jax.random.normal(jax.random.key(4), (N, E))
MASK = jnp.arange(N) % 7 != 5


def without_biases(params):
    return {name: leaf for name, leaf in params.items() if not name.endswith("_bias")}


ROUTINGS = {
    "top_k": lambda x: route.top_k(x, 2),
    "padded": lambda x: route.top_k(x, 2, MASK),
    "second_left_out": lambda x: route.gshard(x, MASK, key=jax.random.key(0)),
    "k_is_e": lambda x: route.sigmoid_top_k(x, E),
    "expert_choice": lambda x: route.expert_choice(x, 9, MASK),
    "one_expert_gets_all": lambda x: route.switch(x + 30 * (jnp.arange(E) == 2)[None]),
    "nothing": lambda x: route.top_k(x, 2, jnp.zeros(N, bool)),
}


def by_hand(params, x, routing, activation="swiglu"):
    """Token by token, choice by choice, in float64."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    bias = {name: p.get(f"{name}_bias", np.zeros((E, 1))) for name in ("gate", "up", "down")}
    erf = np.vectorize(math.erf)
    out = np.zeros(x.shape)
    for n in range(x.shape[0]):
        for e, w in zip(np.asarray(routing.experts_NK[n]), np.asarray(routing.weights_NK[n]), strict=True):
            if e < E:
                v = np.asarray(x[n], np.float64)
                up = v @ p["up"][e] + bias["up"][e]
                gated = activation in experts.GATED
                z = v @ p["gate"][e] + bias["gate"][e] if gated else up
                hidden = {
                    "swiglu": z / (1 + np.exp(-z)),
                    "geglu": 0.5 * z * (1 + erf(z / np.sqrt(2))),
                    "reglu": np.maximum(z, 0),
                    "gelu": 0.5 * z * (1 + erf(z / np.sqrt(2))),
                    "relu": np.maximum(z, 0),
                    "relu2": np.maximum(z, 0) ** 2,
                }[activation] * (up if gated else 1)
                out[n] += w * (hidden @ p["down"][e] + bias["down"][e])
    return out


@functools.cache
def routed(name):
    return jax.jit(ROUTINGS[name])(LOGITS)


# One program for all routings of a shape.
mixture = jax.jit(experts.mixture, static_argnums=3)


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("way", ["dropless", "dense", "gather", "einsum", "unfused"])
def test_every_way_computes_what_the_plain_loop_does(name, way):
    activation = {"unfused": "gelu"}.get(way, "swiglu")
    params = PARAMS[activation] if way == "unfused" else without_biases(PARAMS[activation])
    routing = routed(name)
    if way in ("gather", "einsum"):  # as many places as tokens: nothing drops
        config = experts.MixtureConfig(dispatch="capacity", capacity_factor=float(E), movement=way, groups=3)
    else:
        config = experts.MixtureConfig(activation, "dropless" if way == "unfused" else way)
    out, placed = mixture(params, X, routing, config)
    np.testing.assert_allclose(out, by_hand(params, X, routing, activation), rtol=1e-5, atol=1e-5)
    if placed is not None:
        np.testing.assert_array_equal(placed, np.asarray(routing.experts_NK) < E)


@pytest.mark.parametrize("drop", ["position", "probability"])
def test_groups_have_places_of_their_own(drop):
    """Three groups of tokens at once are the three one after the other, with what each drops."""
    params = without_biases(PARAMS["swiglu"])
    config = experts.MixtureConfig(dispatch="capacity", capacity_factor=0.8, drop=drop, groups=3)

    @partial(jax.jit, static_argnums=2)
    def run(x, logits, config):
        return experts.mixture(params, x, route.top_k(logits, 2), config)

    out, placed = run(X, LOGITS, config)
    cut = [np.split(np.asarray(values), 3) for values in (X, LOGITS)]
    alone = [run(x, logits, replace(config, groups=1)) for x, logits in zip(*cut, strict=True)]
    np.testing.assert_array_equal(placed, np.concatenate([one[1] for one in alone]))
    np.testing.assert_allclose(out, np.concatenate([one[0] for one in alone]), rtol=1e-5, atol=1e-6)
    assert 0 < (~np.asarray(placed)).sum() < placed.size / 2


@pytest.mark.parametrize("activation", experts.ACTIVATIONS)
def test_activations_and_biases(activation):
    params = PARAMS[activation]

    @jax.jit
    def run(params, x):
        routing = route.uniform(LOGITS, 2)  # equal sizes, as "capacity" needs
        ways = [partial(experts.expert_ffn, params, activation=activation, dispatch=way) for way in experts.DISPATCHES]
        one = {name: leaf[1] for name, leaf in params.items()}
        alone = route.replay(LOGITS, jnp.ones((N, 1), jnp.int32))
        return routing, [dispatch.dropless(x, routing, way) for way in ways], alone, experts.dense(one, x, activation)

    routing, outs, alone, dense = run(params, X)
    for out in outs:
        np.testing.assert_allclose(out, by_hand(params, X, routing, activation), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dense, by_hand(params, X, alone, activation), atol=1e-5)


@functools.cache
def gradients(name, config):
    params, c = without_biases(PARAMS["swiglu"]), np.cos(np.arange(N * D).reshape(N, D))

    @jax.jit
    @jax.grad
    def run(args):
        params, x, logits = args
        routing = ROUTINGS[name](logits)
        if config == "unfused":
            return (dispatch.dropless(x, routing, partial(experts.expert_ffn, params)) * c).sum()
        return (experts.mixture(params, x, routing, config)[0] * c).sum()

    return run((params, X, LOGITS))


@pytest.mark.parametrize(
    ("way", "name"),
    [
        *(("dropless", name) for name in ("top_k", "padded", "expert_choice")),
        *(("gather", "padded"), ("einsum", "expert_choice"), ("unfused", "padded")),
        *(pytest.param(way, "top_k", marks=pytest.mark.slow) for way in ("gather", "einsum", "unfused")),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("gather", "expert_choice"), ("einsum", "padded"), ("unfused", "expert_choice"))
        ),
    ],
)
def test_gradients_are_those_of_dense_dispatch(way, name):
    config = "unfused" if way == "unfused" else experts.MixtureConfig()
    if way in ("gather", "einsum"):
        config = experts.MixtureConfig(dispatch="capacity", capacity_factor=float(E), movement=way)
    ours, theirs = gradients(name, config), gradients(name, experts.MixtureConfig(dispatch="dense"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def few_rows(e, k, n, ff=5, collapsed=False):
    """Parameters, tokens, cotangent and a routing with more experts than rows, or with one expert for all of them."""
    params = experts.initialize(D, ff, e, key=jax.random.key(0))
    x, c = jax.random.normal(jax.random.key(1), (n, D)), jax.random.normal(jax.random.key(2), (n, D))
    logits = jax.random.normal(jax.random.key(3), (n, e)) + 30.0 * collapsed * (jnp.arange(e) == e // 3)[None]
    return params, x, c, route.top_k(logits, k)


@pytest.mark.parametrize(
    ("e", "k", "n", "collapsed"),
    [(8, 2, 1, False), (256, 8, 8, False), (256, 1, 512, True), (16, 2, 3, True)]
    + [
        pytest.param(*case, False, marks=pytest.mark.slow)
        for case in ((64, 1, 16), (2, 2, 4), (2, 1, 4), (8, 8, 64), (128, 4, 1024), (512, 1, 1024))
    ],
)
def test_gradients_with_more_experts_than_rows_against_float64(e, k, n, collapsed):
    params, x, c, routing = few_rows(e, k, n, 5, collapsed)

    def ours(args, fused):
        params, x, weights = args
        r = replace(routing, weights_NK=weights)
        if fused:
            return (experts.mixture(params, x, r, experts.MixtureConfig())[0] * c).sum()
        return (dispatch.dropless(x, r, lambda rows, sizes: experts.expert_ffn(params, rows, sizes)) * c).sum()

    args = (params, x, routing.weights_NK)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), args)
        c64, ids_NK = np.asarray(c, np.float64), np.asarray(routing.experts_NK)

        def plain(args):
            """Each row times its own expert's weights, gathered."""
            params, x, weights = args
            gate, up, down = (params[name][ids_NK] for name in ("gate", "up", "down"))
            hidden = jax.nn.silu(jnp.einsum("nd,nkdf->nkf", x, gate)) * jnp.einsum("nd,nkdf->nkf", x, up)
            return (jnp.einsum("nkf,nkfd,nk->nd", hidden, down, weights) * c64).sum()

        theirs = jax.tree.map(np.asarray, jax.jit(jax.grad(plain))(wide))
    for found in jax.jit(lambda args: [jax.grad(ours)(args, fused) for fused in (True, False)])(args):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, theirs)


@pytest.mark.parametrize(
    ("n", "width", "k"),
    [(256, 100, 3)]
    + [
        pytest.param(n, width, k, marks=pytest.mark.slow)
        for n, width, k in ((1, 100, 3), (1, 128, 4), (1, 600, 2), (512, 100, 4), (256, 128, 3), (512, 600, 3))
    ],
)
def test_gelu_experts_with_biases_at_the_sizes_of_scattermoes_tests(n, width, k):
    """Eight experts 4 width / k wide, a single token, odd widths: outputs and gradients against float64."""
    ff = 4 * width // k

    @jax.jit
    def given():
        params = experts.initialize(width, ff, 8, "gelu", biases=True, key=jax.random.key(0))
        x, c = (jax.random.normal(jax.random.key(i), (n, width)) for i in (1, 2))
        return params, x, c, route.top_k(jax.random.normal(jax.random.key(3), (n, 8)), k, softmax="before")

    params, x, c, routing = given()
    params = {name: leaf + 0.02 * np.sin(np.arange(leaf.size).reshape(leaf.shape)) for name, leaf in params.items()}
    params = {name: np.asarray(leaf, np.float32) for name, leaf in params.items()}

    @jax.jit
    def ours(*args):
        def layer(params, x, weights):
            config = experts.MixtureConfig("gelu")
            return experts.mixture(params, x, replace(routing, weights_NK=weights), config)[0]

        out, pull = jax.vjp(layer, *args)
        return out, pull(c)

    args = (params, x, routing.weights_NK)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), args)
        ids_NK = np.asarray(routing.experts_NK)
        hot_NKE = np.eye(8)[ids_NK]

        def plain(params, x, weights):
            """Every expert on every token, of which a token's own are weighed."""
            hidden = jnp.einsum("nd,edf->nef", x, params["up"]) + params["up_bias"][None]
            out = jnp.einsum("nef,efd->ned", jax.nn.gelu(hidden, approximate=False), params["down"])
            return jnp.einsum("ned,nke,nk->nd", out + params["down_bias"][None], hot_NKE, weights)

        @jax.jit
        def both(c, *args):
            out, pull = jax.vjp(plain, *args)
            return out, pull(c)

        theirs = jax.tree.map(np.asarray, both(np.asarray(c, np.float64), *wide))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-4, atol=5e-5), ours(*args), theirs)


def random_routing(seed, n, e, k):
    """Any distinct experts, some choices nowhere, any weights."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(e)[:k] for _ in range(n)]).astype(np.int32)
    logits, mask = prepare(jnp.zeros((n, e)), jnp.asarray(rng.random(n) < 0.8))
    routed = jnp.asarray(rng.random((n, k)) < 0.8)
    probs = jax.nn.softmax(jnp.asarray(rng.normal(size=(n, e)), jnp.float32))
    return make_routing(jnp.asarray(ids), jnp.asarray(rng.random((n, k))), probs, logits, mask, routed)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(1, 1, 1), (7, 3, 2), (16, 5, 5), (16, 9, 1)]))
def test_a_plan_is_a_stable_sort_and_its_inverse(seed, shape):
    routing = random_routing(seed, *shape)
    plan = jax.tree.map(np.asarray, jax.jit(dispatch.plan)(routing))
    n, e, k = shape
    flat = np.asarray(routing.experts_NK).reshape(-1)
    live = plan.sizes_E.sum()
    np.testing.assert_array_equal(plan.sizes_E, np.bincount(flat, minlength=e + 1)[:e])
    np.testing.assert_array_equal(plan.order_R, np.argsort(flat, kind="stable"))
    np.testing.assert_array_equal(plan.tokens_R, plan.order_R // k)
    np.testing.assert_array_equal(plan.inverse_NK.reshape(-1)[plan.order_R[:live]], np.arange(live))
    assert (plan.inverse_NK.reshape(-1)[flat == e] == n * k).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(7, 3, 2), (16, 5, 5)]), st.integers(1, 5), st.booleans())
def test_places_serve_in_order_up_to_the_capacity(seed, shape, capacity, by_probability):
    routing = random_routing(seed, *shape)
    drop = "probability" if by_probability else "position"
    place, placed = map(np.asarray, jax.jit(dispatch.places, static_argnums=(1, 2))(routing, capacity, drop))
    n, e, k = shape
    ids, probs = np.asarray(routing.experts_NK), np.asarray(routing.probs_NE)
    best = [max([probs[t, i] for i in ids[t] if i < e], default=0) for t in range(n)]
    served = np.argsort(-np.array(best), kind="stable") if by_probability else np.arange(n)
    used = np.zeros(e, int)
    for j in range(k):
        for t in served:
            if ids[t, j] < e:
                assert place[t, j] == used[ids[t, j]] and placed[t, j] == (place[t, j] < capacity)
                used[ids[t, j]] += 1
            else:
                assert not placed[t, j]


@pytest.mark.parametrize("movement", ["gather", "einsum"])
@pytest.mark.parametrize("drop", ["position", "probability"])
def test_dropped_choices_add_nothing(movement, drop):
    config = experts.MixtureConfig(dispatch="capacity", capacity_factor=0.5, drop=drop, movement=movement)
    routing, params = routed("padded"), without_biases(PARAMS["swiglu"])
    out, placed = mixture(params, X, routing, config)
    left = make_routing(
        routing.experts_NK, routing.weights_NK, routing.probs_NE, routing.logits_NE, routing.mask_N, placed
    )
    np.testing.assert_allclose(out, by_hand(params, X, left), rtol=1e-5, atol=1e-5)
    capacity = dispatch.capacity_of(N, routing, 0.5)
    assert metrics.load(routing, placed).max() == capacity == 6
    lost = 1 - np.asarray(placed).sum() / (2 * np.asarray(MASK).sum())
    assert metrics.drop_fraction(routing, placed) == pytest.approx(lost) and lost > 0


def test_capacity_by_probability_keeps_the_surest_tokens():
    # Weights from a softmax over one choice are all 1: the order is that of the probabilities.
    routing = route.top_k(jnp.zeros((6, 2)).at[:, 0].set(jnp.array([1.0, 5.0, 2.0, 4.0, 3.0, 0.5])), 1)
    assert np.asarray(dispatch.places(routing, 2, "position")[1])[:, 0].tolist() == [1, 1, 0, 0, 0, 0]
    assert np.asarray(dispatch.places(routing, 2, "probability")[1])[:, 0].tolist() == [0, 1, 0, 1, 0, 0]


def test_capacity_is_switchs_formula():
    routing = route.top_k(LOGITS, 2)
    # (tokens / experts) * factor, for two choices twice that.
    assert dispatch.capacity_of(24, routing, 1.0) == 12
    assert dispatch.capacity_of(24, routing, 1.25) == 15
    assert dispatch.capacity_of(24, routing, 1.01) == 13
    assert dispatch.capacity_of(24, routing, 1.01, multiple=8) == 16
    assert dispatch.capacity_of(1, routing, 0.1) == 1


def test_soft_moe_is_the_papers_formula():
    routing = jax.jit(route.soft)(jax.random.normal(jax.random.key(8), (N, E, 3)))
    params = without_biases(PARAMS["swiglu"])
    out, _ = mixture(params, X, routing, experts.MixtureConfig())
    slots = np.einsum("nep,nd->epd", routing.slots.dispatch_NEP, X)
    y = jax.jit(jax.vmap(experts.dense))(params, slots)
    np.testing.assert_allclose(out, np.einsum("nep,epd->nd", routing.slots.combine_NEP, y), rtol=1e-5, atol=1e-6)


def test_bfloat16_stays_bfloat16_and_near():
    params, routing = without_biases(PARAMS["swiglu"]), routed("top_k")
    exact = by_hand(params, X, routing)
    for config in (experts.MixtureConfig(), experts.MixtureConfig(dispatch="capacity", capacity_factor=float(E))):
        out, _ = mixture(params, X.astype(jnp.bfloat16), routing, config)
        assert out.dtype == jnp.bfloat16
        assert np.abs(np.asarray(out, np.float64) - exact).max() < 0.03 * np.abs(exact).max()


def test_expert_dropout_drops_hidden_units_and_keeps_the_mean():
    params, routing = without_biases(PARAMS["swiglu"]), routed("top_k")
    config = experts.MixtureConfig(dropout=0.5)
    run = jax.jit(lambda key: experts.mixture(params, X, routing, config, key=key)[0])
    plain = mixture(params, X, routing, config)[0]
    many = jax.jit(lambda keys: jax.lax.map(run, keys))(jax.random.split(jax.random.key(0), 600))
    assert jnp.abs(many[0] - plain).max() > 0.1
    np.testing.assert_allclose(many.mean(0), plain, atol=5 * float(many.std(0).max()) / np.sqrt(600))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: experts.MixtureConfig(dropout=1.0), "dropout=1.0 in"),
        (lambda: dispatch.places(ROUTINGS["top_k"](LOGITS), 0), "capacity=0 places"),
        (lambda: dispatch.soft(X, ROUTINGS["top_k"](LOGITS), experts.expert_ffn), "only route.soft"),
        (
            lambda: experts.mixture(
                {}, X, ROUTINGS["top_k"](LOGITS), experts.MixtureConfig(dispatch="capacity", groups=5)
            ),
            "24 tokens do not divide into 5",
        ),
        (lambda: experts.expert_ffn(PARAMS["swiglu"], X[:5], jnp.zeros(E, jnp.int32), dispatch="capacity"), "5 rows"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_symbolic_batches_and_forward_mode_work_or_are_refused():
    """`jax.export` with a batch of any size, and `jax.jvp`: dispatch "dense" has both, the others say they do not."""
    params, router = experts.initialize(D, F, E, key=jax.random.key(0)), jax.random.normal(jax.random.key(1), (D, E))
    (n,) = jax.export.symbolic_shape("n")
    shape, x = jax.ShapeDtypeStruct((n, D), jnp.float32), jax.random.normal(jax.random.key(2), (5, D))

    def layer(way):
        config = experts.MixtureConfig(dispatch=way)
        return lambda x: experts.mixture(params, x, route.top_k(x @ router, 2), config)[0]

    for way in ("dropless", "capacity"):
        with pytest.raises(ValueError, match=r"has shape \(n, .*sizes that are numbers; export a program for each"):
            jax.export.export(jax.jit(layer(way)))(shape)
    with pytest.raises(TypeError, match=r"forward-mode autodiff \(jvp\) to a custom_vjp"):
        jax.jvp(layer("dropless"), (x,), (x,))
    plain = layer("dense")
    expected = jax.jit(layer("dropless"))(x)
    np.testing.assert_allclose(jax.export.export(jax.jit(plain))(shape).call(x), expected, rtol=1e-5, atol=1e-5)
    slope = jax.jit(lambda x: jax.jvp(plain, (x,), (jnp.ones_like(x),)))(x)[1]
    weights = jnp.cos(x)
    gradient = jax.jit(jax.grad(lambda x: (layer("dropless")(x) * weights).sum()))(x)
    np.testing.assert_allclose((slope * weights).sum(), gradient.sum(), rtol=1e-4)


@pytest.mark.parametrize("how", ["dropless", "capacity", "dense"])
@pytest.mark.parametrize(("held", "routed"), [(4, 8), (8, 4)])
def test_a_router_among_another_number_of_experts_is_refused(how, held, routed):
    """Choices of experts that are not there would go to the last one, and experts without choices would lie idle."""
    params = experts.initialize(8, 4, held, key=jax.random.key(0))
    x_ND = jax.random.normal(jax.random.key(1), (16, 8))
    routing = route.top_k(jax.random.normal(jax.random.key(2), (16, routed)), k=2)
    with pytest.raises(ValueError, match=f"among {routed} experts, params hold {held}"):
        experts.mixture(params, x_ND, routing, experts.MixtureConfig(dispatch=how))
