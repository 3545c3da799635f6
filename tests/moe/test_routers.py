"""One table of cases over every router."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe import losses, metrics, route
from moe.routing import Routing, first_experts, grouped, require_causal

N, E = 12, 8
KEY = jax.random.key(7)


def two_levels(logits, mask, key, k=2):
    groups = 2 if logits.shape[-1] % 2 == 0 else 1
    secondary = logits.reshape(len(logits), groups, -1)
    every = (groups, logits.shape[-1] // groups)
    k1, k2 = every if k == logits.shape[-1] else (1, min(2, every[1]))
    return route.hierarchical(secondary[..., 0], secondary, k1, k2, mask, noise_NAB=secondary[..., ::-1] / 3, key=key)


class Case(NamedTuple):
    """How to call a router with k choices (where it has a k), and what holds for it."""

    call: Callable  # (logits, mask, key, k) -> Routing
    least: int = 1  # experts it needs
    most: int = 99  # largest k
    sums_to_one: bool = True
    causal: bool = True
    follows: bool = True  # logits that favour one expert send every token there
    learns: bool = True  # gradients reach the logits


CASES = {
    "top_k": Case(lambda x, m, key, k: route.top_k(x, k, m)),
    "top_k_before": Case(lambda x, m, key, k: route.top_k(x, k, m, softmax="before"), sums_to_one=False),
    "switch": Case(lambda x, m, key, k: route.switch(x, m), most=1, sums_to_one=False),
    "gshard": Case(lambda x, m, key, k: route.gshard(x, m), least=2, most=2),
    "gshard_random": Case(lambda x, m, key, k: route.gshard(x, m, key=key), least=2, most=2, sums_to_one=False),
    "noisy": Case(lambda x, m, key, k: route.noisy_top_k(x, x[:, ::-1] / 3, k, m, key=key), follows=False),
    "noisy_off": Case(lambda x, m, key, k: route.noisy_top_k(x, x[:, ::-1] / 3, k, m)),
    "hierarchical": Case(lambda x, m, key, k: two_levels(x, m, None, k)),
    "hierarchical_noisy": Case(lambda x, m, key, k: two_levels(x, m, key, k), follows=False),
    "sigmoid": Case(lambda x, m, key, k: route.sigmoid_top_k(x, k, m)),
    "sigmoid_biased": Case(
        lambda x, m, key, k: route.sigmoid_top_k(x, k, m, bias_E=jnp.linspace(-0.1, 0.1, x.shape[-1])), follows=False
    ),
    "scored": Case(
        lambda x, m, key, k: route.sigmoid_top_k(x, k, m, score="sqrt_softplus", normalize=2.0), sums_to_one=False
    ),
    "sparsemixer": Case(lambda x, m, key, k: route.sparsemixer(x, k, m, epsilon=0.2), sums_to_one=False),
    "sparsemixer_drawn": Case(
        lambda x, m, key, k: route.sparsemixer(x, k, m, epsilon=0.2, key=key),
        sums_to_one=False,
        follows=False,
        learns=False,  # the gradient is not that of the drawn weight, by design
    ),
    "grouped_top_k": Case(
        lambda x, m, key, k: route.sigmoid_top_k(
            x, k, m, groups=4, top_groups=4 if k == x.shape[-1] else 2, group_score="max", score="softmax"
        ),
        least=4,
    ),
    "expert_choice": Case(
        lambda x, m, key, k: route.expert_choice(x, max(1, len(x) // x.shape[-1]), m),
        sums_to_one=False,
        causal=False,
        follows=False,
    ),
    "soft": Case(lambda x, m, key, k: route.soft(jnp.stack([x, x[:, ::-1]], -1), m), causal=False, follows=False),
    "base": Case(lambda x, m, key, k: route.base(x, m), most=1, sums_to_one=False, causal=False, follows=False),
    "base_test": Case(lambda x, m, key, k: route.base(x, m, train=False), most=1, sums_to_one=False),
    "hash": Case(
        lambda x, m, key, k: route.hash_tokens(jnp.arange(len(x)), x.shape[-1], k, m), follows=False, learns=False
    ),
    "relu": Case(lambda x, m, key, k: route.relu(x, m), sums_to_one=False, follows=False),
    "sinkhorn": Case(lambda x, m, key, k: route.sinkhorn(x, k, m), sums_to_one=False, causal=False, follows=False),
    "uniform": Case(lambda x, m, key, k: route.uniform(x, k, m), follows=False),
    "replay": Case(
        lambda x, m, key, k: route.replay(x, jnp.stack([jnp.roll(jnp.arange(x.shape[-1]), 3)[:k]] * len(x)), m),
        follows=False,
    ),
}


# Of each of these another case runs the same function: without its noise, in serving, or with one more constant.
SAME = ("noisy_off", "hierarchical", "sigmoid_biased", "base_test")
VARIANTS = (*SAME, "top_k_before", "gshard", "sparsemixer", "switch")


def cases(slow, holds=lambda case: True):
    """Names of the cases for which something holds; those in `slow` are for the slow tests."""
    names = [name for name, case in CASES.items() if holds(case)]
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


def logits(n=N, e=E, seed=0):
    """Values at least 0.5 apart in a row, of another scale in every row: a finite difference changes no choice."""
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(e), (n, 1)), axis=1)
    values = (order - e / 2) * 0.5 * (1 + 0.04 * np.arange(n)[:, None]) + rng.random((n, 1)) * 0.4
    return jnp.asarray(values, jnp.float32)


@partial(jax.jit, static_argnames=("name", "k"))
def call(name, x, mask=None, k=2, key=KEY) -> Routing:
    case = CASES[name]
    return case.call(x, mask, key, min(k, case.most, x.shape[-1]))


@jax.jit
def all_losses(routing):
    return losses.load_balance(routing), losses.z_loss(routing), losses.importance_loss(routing)


def assert_valid(routing):
    """What holds for any routing."""
    n, e = routing.probs_NE.shape
    experts, weights = np.asarray(routing.experts_NK), np.asarray(routing.weights_NK)
    assert experts.dtype == np.int32 and experts.shape == weights.shape == (n, routing.k)
    for array in (routing.weights_NK, routing.probs_NE, routing.logits_NE):
        assert array.dtype == jnp.float32 and np.isfinite(array).all()
    assert routing.probs_NE.shape == routing.logits_NE.shape == (n, e) and routing.mask_N.shape == (n,)
    assert ((experts >= 0) & (experts <= e)).all()
    assert (weights[experts == e] == 0).all() and (weights >= 0).all()
    np.testing.assert_allclose(np.asarray(routing.probs_NE).sum(-1), 1, rtol=1e-5)
    for row in experts:  # choices of one token differ
        chosen = row[row < e]
        assert len(set(chosen.tolist())) == len(chosen)
    assert (experts < e).sum() <= routing.rows


@pytest.mark.parametrize("name", CASES)
def test_shapes_dtypes_and_weight_sums(name):
    routing = call(name, logits())
    assert_valid(routing)
    if CASES[name].sums_to_one:
        np.testing.assert_allclose(np.asarray(routing.weights_NK).sum(-1), 1, rtol=1e-5)
    assert routing.causal == CASES[name].causal


@pytest.mark.parametrize("name", cases(VARIANTS))
def test_bfloat16_logits_are_routed_in_float32(name):
    x = np.asarray(logits(), jnp.bfloat16)
    half, full = call(name, x), call(name, np.asarray(x, np.float32))
    assert_valid(half)
    np.testing.assert_array_equal(half.experts_NK, full.experts_NK)
    # The case's own arithmetic on its noise is bfloat16.
    np.testing.assert_allclose(half.weights_NK, full.weights_NK, atol=2e-3)


@pytest.mark.parametrize("name", cases(SAME, lambda case: case.learns))
def test_gradients_are_finite_differences(name):
    rng = np.random.default_rng(3)
    c = rng.normal(size=(4, N, E)).astype(np.float32)

    @jax.jit
    @jax.value_and_grad
    def f(x):
        r = call(name, x)
        w = jnp.zeros((N, E + 1)).at[jnp.arange(N)[:, None], r.experts_NK].set(r.weights_NK)[:, :E]
        total = (w * c[0]).sum() + (r.probs_NE * c[1]).sum() + (r.logits_NE * c[2]).sum()
        if r.load_NE is not None:
            total += (r.load_NE * c[3]).sum()
        if r.slots is not None:
            total += (r.slots.dispatch_NEP.sum(-1) * c[3]).sum() + (r.slots.combine_NEP[..., 0] * c[0]).sum()
        return total

    x = np.asarray(logits())
    if name in ("base", "expert_choice"):  # one choice among tokens must not be nearly as good as another
        x = x + np.float32(6 * (1 + np.arange(N)[:, None] / 10) * np.eye(E)[np.arange(N) % E])
    slope, eps = np.asarray(f(x)[1]), 1e-3
    for _ in range(3):
        way = rng.normal(size=x.shape).astype(np.float32)
        found = (float(f(x + eps * way)[0]) - float(f(x - eps * way)[0])) / (2 * eps)
        np.testing.assert_allclose((slope * way).sum(), found, atol=2e-2, rtol=2e-2)
    assert np.abs(slope).max() > 1e-2


@pytest.mark.parametrize("name", cases(VARIANTS))
def test_jit_vmap_and_scan_give_what_plain_calls_do(name):
    xs = jnp.asarray(np.stack([logits(seed=s) for s in (0, 5)]))
    # Without jit every primitive is compiled by itself, which takes long: one case of each kind.
    plain = [(call.__wrapped__ if name in ("top_k", "gshard_random") else call)(name, x) for x in xs]
    one = partial(call, name)
    scanned, mapped = jax.jit(lambda xs: (jax.lax.map(one, xs), jax.vmap(one)(xs)))(xs)
    for i, expected in enumerate(plain):
        for found in (scanned, mapped):
            jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6), found, expected)
    assert scanned.rows == mapped.rows == plain[0].rows


@pytest.mark.parametrize("name", cases(VARIANTS, lambda case: case.least == 1))
def test_one_expert(name):
    routing = call(name, logits(e=1), k=1)
    assert_valid(routing)
    assert (routing.experts_NK == 0).all() or name == "relu"
    np.testing.assert_allclose(routing.probs_NE, 1, rtol=1e-6)


@pytest.mark.parametrize("name", cases(VARIANTS, lambda case: case.most >= E))
def test_k_equal_to_e_takes_every_expert(name):
    routing = call(name, logits(), k=E)
    assert_valid(routing)
    if name not in ("expert_choice", "relu"):
        np.testing.assert_array_equal(np.sort(routing.experts_NK, -1), np.broadcast_to(np.arange(E), (N, E)))


@pytest.mark.parametrize("name", CASES)
def test_all_tokens_to_one_expert_leaves_the_others_empty(name):
    x = np.zeros((N, E), np.float32)
    x[:, 3] = 9
    routing = call(name, x, k=1)
    assert_valid(routing)
    if CASES[name].follows and name not in ("gshard", "gshard_random", "hierarchical"):
        np.testing.assert_array_equal(metrics.load(routing), N * (np.arange(E) == 3))
    if CASES[name].follows:
        assert (routing.experts_NK[:, 0] == 3).all()


@partial(jax.jit, static_argnames="name")
def padded(name, x, mask, key):
    """A routing of tokens of which the masked ones are NaN, its losses, and the gradient of a function of both."""

    def f(x):
        r = call(name, jnp.where(mask[:, None], x, jnp.nan), mask, key=key)
        total = (r.weights_NK * jnp.arange(r.k)[None]).sum() + losses.load_balance(r) + losses.z_loss(r)
        return total, (r, all_losses(r))

    grads, (routing, found) = jax.grad(f, has_aux=True)(x)
    return routing, found, grads


# The noise of a token must not depend on how many there are: jax.random draws by shape, so compare with it off.
QUIET = {name: None for name in ("noisy", "hierarchical_noisy", "sparsemixer_drawn")}


@pytest.mark.parametrize("name", cases((*SAME, "sparsemixer")))
def test_padding_goes_nowhere_and_is_not_seen(name):
    x, mask, key = np.asarray(logits(N + 4)), np.arange(N + 4) % 4 != 3, QUIET.get(name, KEY)
    routing, found, grads = padded(name, x, mask, key)
    assert_valid(routing)
    routing = jax.tree.map(np.asarray, routing)
    assert (routing.experts_NK[~mask] == E).all()
    assert routing.load_NE is None or (routing.load_NE[~mask] == 0).all()
    assert np.isfinite(grads).all() and (np.asarray(grads)[~mask] == 0).all()
    if name in ("hash", "gshard_random", "expert_choice"):
        return  # these depend on the place of a token, or on how many there are
    alone = call(name, x[mask], key=key)
    np.testing.assert_array_equal(routing.experts_NK[mask], alone.experts_NK)
    np.testing.assert_allclose(routing.weights_NK[mask], alone.weights_NK, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found, all_losses(alone), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", cases((*SAME, "sparsemixer")))
def test_nothing_but_padding(name):
    routing, found, _ = padded(name, logits(N + 4), np.zeros(N + 4, bool), QUIET.get(name, KEY))
    assert_valid(routing)
    assert (np.asarray(routing.experts_NK) == E).all()
    assert found == (0, 0, 0)


@pytest.mark.parametrize("name", CASES)
def test_only_routers_that_do_not_look_ahead_may_decode(name):
    routing = call(name, logits())
    if not CASES[name].causal:
        with pytest.raises(ValueError, match="looks ahead"):
            require_causal(routing)
        return
    require_causal(routing)
    if name in ("noisy", "gshard_random", "hierarchical_noisy", "sparsemixer_drawn"):
        return  # random
    # Tokens after the sixth do not change the first six.
    other = call(name, np.concatenate([logits()[:6], logits(6, seed=9)]))
    np.testing.assert_array_equal(routing.experts_NK[:6], other.experts_NK[:6])
    np.testing.assert_array_equal(routing.weights_NK[:6], other.weights_NK[:6])


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([1, 3]),
    st.integers(0, 99),
    st.sampled_from(["top_k", "sigmoid", "expert_choice"]),
)
def test_random_routings_are_valid(e, seed, name):
    rng = np.random.default_rng(seed)
    x, mask = rng.normal(size=(5, e)).astype(np.float32) * 3, rng.random(5) < 0.7
    assert_valid(call(name, x, mask))


def test_groups_are_routed_by_themselves():
    x, mask = logits(), jnp.arange(N) % 5 != 0
    choose = jax.jit(lambda x, m: route.expert_choice(x, 2, m))
    together = jax.jit(partial(grouped, choose), static_argnums=1)(x, 3, mask)
    assert together.rows == 3 * 2 * E
    for g in range(3):
        rows = slice(4 * g, 4 * g + 4)
        alone = choose(x[rows], mask[rows])
        np.testing.assert_array_equal(together.experts_NK[rows], alone.experts_NK)
        np.testing.assert_allclose(together.weights_NK[rows], alone.weights_NK, rtol=1e-6)
    with pytest.raises(ValueError, match="12 tokens do not divide into 5 groups"):
        grouped(lambda x, m: route.expert_choice(x, 2, m), x, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: route.top_k(logits(), 9), "k=9 choices among 8 experts"),
        (lambda: route.top_k(logits(), 0), "k must be in 1..8"),
        (lambda: route.gshard(logits(e=1)), "k=2 choices among 1"),
        (lambda: route.hash_tokens(jnp.arange(3), 2, 3), "k=3 choices among 2"),
        (lambda: route.expert_choice(logits(), 13), "capacity=13 of 12 tokens"),
        (lambda: route.sigmoid_top_k(logits(), 2, groups=3), "8 experts do not divide into 3 groups"),
        (lambda: route.sigmoid_top_k(logits(), 2, groups=4, top_groups=5), "top_groups=5 of 4"),
        (lambda: route.sigmoid_top_k(logits(), 3, groups=4, top_groups=1), "k=3 experts out of 1 groups of 2"),
        (lambda: route.auction(logits(), 1), "8 experts with 1 places each cannot take 12"),
        (lambda: route.auction(logits(), 2, epsilon=0.0), "epsilon=0.0 must be positive"),
    ],
)
def test_impossible_routings_are_refused_with_their_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sinkhorn_is_alternating_normalization():
    """Of exp(logits), by rows and by columns until both hold, in float64."""
    x, mask = 2 * logits(40) + 3 * (jnp.arange(E) == 2)[None], jnp.arange(40) % 5 != 1
    plan = np.exp(np.asarray(x, np.float64))[np.asarray(mask)]
    for _ in range(3000):
        plan /= plan.sum(axis=0, keepdims=True) * E / len(plan)
        plan /= plan.sum(axis=1, keepdims=True)

    @jax.jit
    def run(x):
        exact = {"tolerance": 1e-5, "rounds": 3000}
        trained, served = (route.sinkhorn(x, 2, mask, train=train, **exact) for train in (True, False))
        plain = route.top_k(x, 2, mask)
        loads = jnp.stack([metrics.load(trained), metrics.load(plain)])
        same = (served.experts_NK == plain.experts_NK).all()
        return route.balance(x, mask, **exact), trained, metrics.max_violation(loads), same, jax.nn.softmax(x)

    found, routing, violation, same, probs = jax.tree.map(np.asarray, run(x))
    mask = np.asarray(mask)
    np.testing.assert_allclose(found[mask], plan, atol=1e-4)
    assert not found[~mask].any()
    experts = np.argsort(-plan, axis=1)[:, :2]
    np.testing.assert_array_equal(routing.experts_NK[mask], experts)
    np.testing.assert_allclose(routing.weights_NK[mask], np.take_along_axis(probs[mask], experts, 1), rtol=1e-6)
    assert violation[0] < violation[1] / 2 and same


@pytest.mark.parametrize(("experts", "k", "skew"), [(8, 1, 1.0), (8, 2, 0.5), (6, 3, 2.0), (5, 5, 1.0)])
def test_a_forced_load_follows_zipfs_law_up_to_one_choice_a_token(experts, k, skew):
    low, high = 0.0, 1e9  # the factor at which the loads, at most 1, sum to k
    for _ in range(200):
        factor = (low + high) / 2
        wanted = np.minimum(1, factor / np.arange(1, experts + 1) ** skew)
        low, high = (factor, high) if wanted.sum() < k else (low, factor)
    run = jax.jit(partial(route.uniform, k=k, skew=skew))
    routing = run(jnp.zeros((1000, experts)), mask_N=jnp.arange(1000) % 4 != 0)
    assert_valid(routing)
    np.testing.assert_allclose(metrics.load(routing), 750 * wanted, atol=3)


def test_a_negative_skew_is_refused():
    with pytest.raises(ValueError, match="skew=-1"):
        route.uniform(jnp.zeros((4, 4)), 2, skew=-1.0)


def test_of_the_first_experts_alone_the_other_choices_have_no_weight():
    routing = route.top_k(jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])), 2, softmax="before")
    first = first_experts(routing, 3)
    assert first.experts_NK.tolist() == [[3, 2], [0, 1]] and first.num_experts == 3
    np.testing.assert_allclose(first.weights_NK, [[0, 0.3], [0.4, 0.3]], rtol=1e-6)
