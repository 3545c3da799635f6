"""Losses and metrics against values worked by hand from the papers' formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from moe import losses, metrics, route
from moe.gate import RouterConfig
from moe.layer import ExpertAxes, MoEConfig, auxiliary
from moe.routing import make_routing

top_k = jax.jit(route.top_k, static_argnames=("k", "softmax"))
load_balance = jax.jit(losses.load_balance, static_argnames=("groups", "axis_name", "choices"))


def with_probs(probs, k=1, mask=None):
    """Switch or top-k routing with these probabilities."""
    return top_k(jnp.asarray(np.log(probs), jnp.float32), k, mask, softmax="before")


# Four tokens, two experts. Tokens 0-2 go to expert 0: f = (3/4, 1/4), P = (0.6, 0.4).
PROBS = [[0.7, 0.3], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]]


def test_switch_load_balance_loss():
    # Eq. 4 without alpha: N sum f_i P_i = 2 (3/4 * 0.6 + 1/4 * 0.4) = 1.1.
    assert load_balance(with_probs(PROBS)) == pytest.approx(1.1, rel=1e-6)
    # The gradient reaches P alone: d/dP_i = N f_i, spread over 4 tokens.
    routing = with_probs(PROBS)

    @jax.jit
    @jax.grad
    def gradient(probs):
        return losses.load_balance(make_routing(*prepared(routing, probs)))

    np.testing.assert_allclose(gradient(routing.probs_NE), [[2 * 3 / 4 / 4, 2 * 1 / 4 / 4]] * 4, rtol=1e-6)


def prepared(routing, probs):
    return routing.experts_NK, routing.weights_NK, probs, routing.logits_NE, routing.mask_N


def test_load_balance_is_one_when_balanced_and_e_when_collapsed():
    collapsed = jnp.asarray(50 * (np.arange(4) == 1) + np.zeros((12, 1)), jnp.float32)

    @jax.jit
    def run(x):
        return losses.load_balance(route.uniform(jnp.zeros((12, 4)), 2)), losses.load_balance(route.switch(x))

    assert run(collapsed) == pytest.approx((1, 4))


def test_gshard_auxiliary_loss():
    # Algorithm 1: l_aux = 1/E sum_e (c_e / S) m_e over first choices = 1/2 (3/4 * 0.6 + 1/4 * 0.4) = 0.275.
    routing = route.gshard(jnp.log(jnp.array(PROBS)))
    assert losses.load_balance(routing, choices="first") / 2**2 == pytest.approx(0.275, rel=1e-6)
    # Over all choices both experts have the same load, and only sum P = 1 is left.
    assert losses.load_balance(routing) == pytest.approx(1.0, rel=1e-6)


def test_load_balance_per_group_and_per_sequence():
    # Two groups: f = (1, 0), P = (.75, .25) -> 1.5; f = (.5, .5), P = (.45, .55) -> 1. Their mean is 1.25.
    assert load_balance(with_probs(PROBS), groups=2) == pytest.approx(1.25, rel=1e-6)
    # A padding token changes its group only: f = (1, 0), P = (.6, .4) -> 1.2 in the second.
    masked = with_probs(PROBS, mask=jnp.array([True, True, True, False]))
    assert load_balance(masked, groups=2) == pytest.approx((1.5 + 1.2) / 2, rel=1e-6)
    with pytest.raises(ValueError, match="4 tokens do not divide into 3 groups"):
        load_balance(masked, groups=3)
    with pytest.raises(ValueError, match="per group or global"):
        load_balance(masked, groups=2, axis_name="data")


def test_global_balance_over_devices_is_that_of_the_whole_batch():
    logits = jax.random.normal(jax.random.key(0), (2, 6, 4))
    whole = load_balance(top_k(logits.reshape(12, 4), 2))
    balance = lambda x: losses.load_balance(route.top_k(x, 2), axis_name="data")  # noqa: E731
    parts = jax.jit(jax.vmap(balance, axis_name="data"))(logits)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


@pytest.mark.parametrize("name", ["balance", "importance", "load"])
def test_parts_of_a_batch_have_the_loss_and_the_gradient_of_the_whole(name):
    """Three parts with padding, against the definitions in float64 on all tokens at once, by finite differences."""
    config = MoEConfig(**{"router": RouterConfig("noisy", 4, 2), "balance": 0.0, name: 1.0})
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 6, 4)) + np.array([[[2.0, 0, 0, 0]], [[0, 0, 1.0, 0]], [[0, -1.0, 0, 0]]])
    mask = np.array([[True] * 6, [True] * 5 + [False], [True] * 2 + [False] * 4])

    def routed(x, mask):
        return route.noisy_top_k(x, x / 3, 2, mask)

    @jax.jit
    def run(x, mask):
        loss = lambda x, m, batch=None: auxiliary(routed(x, m), config, 1, batch_SE=batch)  # noqa: E731
        sums = jax.vmap(lambda x, m: losses.batch_sums(routed(x, m)))(x, mask)
        values, grads = jax.vmap(jax.value_and_grad(loss), (0, 0, None))(x, mask, sums.mean(0))
        every = jax.value_and_grad(loss)(x.reshape(-1, 4), mask.reshape(-1))
        return jax.vmap(lambda x, m: routed(x, m).experts_NK)(x, mask), values, grads, jax.vmap(loss)(x, mask), every

    chosen, values, grads, alone, every = jax.tree.map(np.asarray, run(jnp.asarray(logits), mask))
    chosen = chosen.reshape(-1, 2)

    def whole(x):  # with the choices of the undisturbed logits
        x, live = x.reshape(-1, 4), mask.reshape(-1)
        p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
        if name == "balance":
            f = np.bincount(chosen[live].reshape(-1), minlength=4) / (2 * live.sum())
            return 4 * (f * p[live].mean(0)).sum()
        sums = np.zeros(4)
        for row in np.flatnonzero(live):
            weights = np.exp(x[row, chosen[row]])
            sums[chosen[row]] += weights / weights.sum()
        return sums.var() / sums.mean() ** 2

    if name == "load":  # its smooth load is a published formula of its own: against the plain loss of all tokens
        value, slope = every[0], every[1].reshape(logits.shape)
    else:
        value, step = whole(logits), 1e-6
        slope = np.zeros_like(logits)
        for at in np.ndindex(*logits.shape):
            shift = np.zeros_like(logits)
            shift[at] = step
            slope[at] = (whole(logits + shift) - whole(logits - shift)) / (2 * step)
    np.testing.assert_allclose(values, value, rtol=1e-5)
    np.testing.assert_allclose(grads / 3, slope, rtol=1e-4, atol=1e-6)
    assert abs(float(alone.mean()) - float(value)) > 1e-2  # the mean over the parts is another loss


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_the_auxiliary_losses_of_devices_are_those_of_all_their_tokens(scope):
    """Devices with different numbers of tokens that are not padding, and of sequences that have any."""
    config = MoEConfig(
        router=RouterConfig("noisy", 4, 2), balance=0.5, balance_scope=scope, importance=0.3, load=0.2, z=0.1
    )
    logits = jax.random.normal(jax.random.key(0), (2, 6, 4)) + jnp.array([[[2.0, 0, 0, 0]], [[0, 0, 1.0, 0]]])
    mask = jnp.array([[True] * 5 + [False], [True] * 2 + [False] * 4])

    def loss(x, mask, sequences, axes):
        return auxiliary(route.noisy_top_k(x, x / 3, 2, mask), config, sequences, ExpertAxes(tokens=axes))

    whole = jax.jit(lambda x, mask: loss(x, mask, 4, ()))(logits.reshape(12, 4), mask.reshape(12))
    parts = jax.jit(jax.vmap(lambda x, mask: loss(x, mask, 2, ("data",)), axis_name="data"))(logits, mask)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


@pytest.mark.parametrize("coefficient", [0.5, 3.0])
@pytest.mark.parametrize("name", ["balance", "importance", "load", "z"])
def test_an_auxiliary_loss_is_added_times_its_coefficient(name, coefficient):
    config = MoEConfig(**{"router": RouterConfig("noisy", 4, 2), "balance": 0.0, name: coefficient})
    alone = {"balance": losses.load_balance, "importance": losses.importance_loss}
    alone |= {"load": losses.load_loss, "z": losses.z_loss}

    @jax.jit
    def run(logits):
        routing = route.noisy_top_k(*logits, 2)
        return auxiliary(routing, config, 1), alone[name](routing)

    added, once = run(jax.random.normal(jax.random.key(0), (2, 6, 4)))
    assert float(added) == pytest.approx(coefficient * float(once), rel=1e-6)


def test_st_moe_z_loss():
    # Eq. 5: mean of (log sum exp)^2. exp rows sum to 1 + e and 2 e^2: logs are log(1 + e) and 2 + log 2.
    routing = route.top_k(jnp.array([[0.0, 1.0], [2.0, 2.0]]), 1)
    expected = (np.log(1 + np.e) ** 2 + (2 + np.log(2)) ** 2) / 2
    assert losses.z_loss(routing) == pytest.approx(expected, rel=1e-6)


def test_gshards_gate():
    # Algorithm 1: softmax, the two largest, g1 / (g1 + g2) and g2 / (g1 + g2).
    routing = route.gshard(jnp.log(jnp.array([[0.5, 0.1, 0.4], [0.2, 0.6, 0.2]])))
    np.testing.assert_array_equal(routing.experts_NK, [[0, 2], [1, 0]])
    np.testing.assert_allclose(routing.weights_NK, [[5 / 9, 4 / 9], [0.75, 0.25]], rtol=1e-6)
    # The second expert is drawn with probability 2 g2 (here 8/9 and 1/2), and g1 stays g1.
    logits = jnp.log(jnp.array([[0.5, 0.1, 0.4], [0.2, 0.6, 0.2]]))
    keys = jax.random.split(jax.random.key(0), 4000)
    many = jax.jit(jax.vmap(lambda key: route.gshard(logits, key=key)))(keys)
    rate = np.asarray(many.experts_NK[:, :, 1] < 3).mean(0)
    np.testing.assert_allclose(rate, [8 / 9, 1 / 2], atol=0.025)
    np.testing.assert_allclose(many.weights_NK[:, :, 0], np.broadcast_to([5 / 9, 0.75], (4000, 2)), rtol=1e-6)


def test_importance_loss():
    # Importance = sum of gates = (0.7 + 0.8 + 0.6, 0.7) = (2.1, 0.7): mean 1.4, variance 0.49, CV^2 = 0.25.
    np.testing.assert_allclose(metrics.importance(with_probs(PROBS)), [2.1, 0.7], rtol=1e-6)
    assert losses.importance_loss(with_probs(PROBS)) == pytest.approx(0.25, rel=1e-5)


def test_noisy_top_k_load_is_the_papers_probability():
    logits = np.array([[1.0, 0.5, -0.2, 0.1]])
    noise = np.array([[0.3, -1.0, 0.0, 2.0]])
    routing = route.noisy_top_k(jnp.asarray(logits, jnp.float32), jnp.asarray(noise, jnp.float32), 2)
    std = np.log1p(np.exp(noise[0]))
    # kth_excluding(H, 2, i): for experts 0 and 1 (inside) the third largest, 0.1; for the others the second, 0.5.
    threshold = np.array([0.1, 0.1, 0.5, 0.5])
    np.testing.assert_allclose(routing.load_NE[0], stats.norm.cdf((logits[0] - threshold) / std), rtol=1e-5)
    with pytest.raises(ValueError, match="noisy_top_k or hierarchical"):
        losses.load_loss(route.switch(jnp.zeros((2, 2))))


def test_noisy_top_k_load_predicts_how_often_an_expert_is_chosen():
    logits = jnp.array([[1.0, 0.5, -0.2, 0.1]])
    noise = jnp.array([[0.3, -1.0, 0.0, 2.0]])
    keys = jax.random.split(jax.random.key(1), 20000)
    many = jax.jit(jax.vmap(lambda key: route.noisy_top_k(logits, noise, 2, key=key)))(keys)
    chosen = np.asarray((many.experts_NK[:, 0, :, None] == jnp.arange(4)[None, None]).any(1)).mean(0)
    np.testing.assert_allclose(many.load_NE[:, 0].mean(0), chosen, atol=0.02)


def test_hierarchical_importance_and_load_are_appendix_b():
    primary = jax.random.normal(jax.random.key(2), (7, 3))
    secondary = jax.random.normal(jax.random.key(3), (7, 3, 4))

    @jax.jit
    def run(primary, secondary):
        routing = route.hierarchical(primary, secondary, 2, 1)
        inner = [route.noisy_top_k(secondary[:, a], jnp.zeros((7, 4)), 1) for a in range(3)]
        first = route.noisy_top_k(primary, jnp.zeros((7, 3)), 2)
        return routing, metrics.importance(routing), first, inner

    routing, importances, first, inners = jax.tree.map(np.asarray, run(primary, secondary))
    for a, inner in enumerate(inners):
        here = (first.experts_NK == a).any(1)
        gate = np.where(first.experts_NK == a, first.weights_NK, 0).sum(1)
        for b in range(4):
            i = 4 * a + b
            chosen = np.asarray(inner.experts_NK[:, 0] == b)
            importance = (gate * chosen * np.asarray(inner.weights_NK[:, 0])).sum()  # eq. 13
            assert importances[i] == pytest.approx(importance, rel=1e-5, abs=1e-6)
            load = first.load_NE[:, a].sum() * inner.load_NE[here, b].sum() / max(here.sum(), 1)  # eq. 14
            assert routing.load_NE[:, i].sum() == pytest.approx(float(load), rel=1e-5, abs=1e-6)


def test_deepseek_v3s_gate():
    logits = jnp.array([[2.0, 1.0, 0.0, -1.0]])
    s = 1 / (1 + np.exp(-np.array([2.0, 1.0, 0.0, -1.0])))
    bias = jnp.array([-0.5, 0.0, 0.0, 0.4])  # s + b = .38, .73, .5, .67
    routing = route.sigmoid_top_k(logits, 2, bias_E=bias, scale=2.5)
    np.testing.assert_array_equal(routing.experts_NK, [[1, 3]])
    np.testing.assert_allclose(routing.weights_NK[0], 2.5 * s[[1, 3]] / s[[1, 3]].sum(), rtol=1e-5)
    np.testing.assert_allclose(routing.probs_NE[0], s / s.sum(), rtol=1e-5)
    # Groups {0, 1} and {2, 3} count 1.11 and 1.17 with the bias and 1.61 and .77 without.
    limited = route.sigmoid_top_k(logits, 2, bias_E=bias, groups=2, top_groups=1)
    np.testing.assert_array_equal(np.sort(limited.experts_NK[0]), [2, 3])
    limited = route.sigmoid_top_k(logits, 2, groups=2, top_groups=1)
    np.testing.assert_array_equal(np.sort(limited.experts_NK[0]), [0, 1])


@pytest.mark.parametrize("groups", [1, 3])
def test_deepseek_v3s_balance_loss_counts_the_scores_without_bias(groups):
    """Eq. 17-20 in float64; biases and groups of experts send tokens elsewhere."""
    k, logits = 2, np.random.default_rng(0).normal(size=(12, 8))
    routing = route.sigmoid_top_k(
        jnp.asarray(logits, jnp.float32), k, bias_E=jnp.linspace(-1, 1, 8), groups=4, top_groups=2
    )
    expected = []
    for s in np.split(1 / (1 + np.exp(-logits)), groups):
        chosen = (np.argsort(np.argsort(-s, axis=1), axis=1) < k).astype(float)
        f = 8 / (k * len(s)) * chosen.sum(0)  # eq. 18
        expected.append((f * (s / s.sum(1, keepdims=True)).mean(0)).sum())  # eq. 17, 19, 20
    assert losses.load_balance(routing, groups, choices="scores") == pytest.approx(np.mean(expected), rel=1e-5)
    assert abs(float(losses.load_balance(routing, groups)) - np.mean(expected)) > 1e-3


def test_mixtrals_auxiliary_loss_in_transformers_is_k_times_ours_over_all_layers():
    """`load_balancing_loss_func` written out in float64: layers joined, f summed over the k choices."""
    k, layers = 2, np.random.default_rng(1).normal(size=(3, 12, 4)) + np.array([1.0, 0, 0, 0])
    logits = layers.reshape(-1, 4)
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    chosen = np.eye(4)[np.argsort(-probs, axis=1)[:, :k]]  # [N, k, E]
    theirs = 4 * (chosen.mean(0) * probs.mean(0)).sum()
    ours = load_balance(top_k(jnp.asarray(logits, jnp.float32), k))
    assert k * ours == pytest.approx(theirs, rel=1e-5)


def test_groups_of_padding_alone_do_not_count():
    masked = with_probs(PROBS, mask=jnp.array([True, True, False, False]))
    assert load_balance(masked, groups=2) == pytest.approx(1.5, rel=1e-6)


def test_sparsemixer_draws_from_the_band_with_heuns_weights():
    """GRIN (Liu et al. 2024): the softmax over the band, thirds in three of four cases, the gradient of the softmax."""
    logits = jnp.array([[4.0, 3.8, 3.5, 2.0]])  # (4 - 3.5) / 4 is within 2 epsilon = 0.2, (4 - 2) / 4 is not
    band = np.exp([4.0, 3.8, 3.5]) / np.exp([4.0, 3.8, 3.5]).sum()
    keys = jax.random.split(jax.random.key(0), 4000)

    def first(logits, key):
        routing = route.sparsemixer(logits, 2, epsilon=0.1, key=key)
        return routing.weights_NK[0, 0], routing.experts_NK[0]

    (weights, experts), grads = jax.jit(
        jax.vmap(lambda key: (first(logits, key), jax.grad(lambda x: first(x, key)[0])(logits)[0]))
    )(keys)
    assert (np.asarray(experts[:, 0]) != np.asarray(experts[:, 1])).all()
    np.testing.assert_allclose(np.bincount(experts[:, 0], minlength=4) / 4000, [*band, 0], atol=0.03)
    for e in range(3):
        chosen = np.asarray(experts[:, 0]) == e
        whole = np.isclose(weights[chosen], band[e], rtol=1e-5)
        np.testing.assert_allclose(np.asarray(weights)[chosen][~whole], band[e] / 3, rtol=1e-5)
        assert whole.mean() == pytest.approx(1 if e == 0 else 0.25, abs=0.04)
        softmax = band[e] * (np.eye(4)[e] - [*band, 0])
        np.testing.assert_allclose(grads[chosen], np.broadcast_to(softmax, (chosen.sum(), 4)), rtol=1e-4, atol=1e-6)


def test_loss_free_balancing_moves_the_bias_by_sign_and_balances():
    np.testing.assert_allclose(route.update_bias(jnp.zeros(3), jnp.array([4.0, 1.0, 1.0]), 0.1), [-0.1, 0.1, 0.1])
    logits = jax.random.normal(jax.random.key(0), (256, 8)) + jnp.linspace(2, -2, 8)[None]

    def step(bias, _):
        load = metrics.load(route.sigmoid_top_k(logits, 2, bias_E=bias))
        return route.update_bias(bias, load, 0.01), metrics.max_violation(load)

    _, violation = jax.jit(lambda: jax.lax.scan(step, jnp.zeros(8), length=200))()
    assert violation[0] > 1.5 and violation[-20:].max() < 0.25


def test_expert_choice_is_the_papers_top_k_over_tokens():
    logits = jax.random.normal(jax.random.key(5), (10, 3))
    routing = jax.jit(route.expert_choice, static_argnums=1)(logits, 4)
    s = np.asarray(jax.nn.softmax(logits))
    for e in range(3):
        chosen = np.asarray(routing.experts_NK[:, e]) == e
        assert set(np.flatnonzero(chosen)) == set(np.argsort(-s[:, e])[:4])
        np.testing.assert_allclose(routing.weights_NK[chosen, e], s[chosen, e], rtol=1e-6)


@pytest.mark.parametrize(
    ("n", "e", "equal"), [(12, 4, False), (13, 4, False), (8, 8, False), (9, 1, False), (12, 4, True)]
)
def test_the_auction_finds_scipys_assignment(n, e, equal):
    from scipy.optimize import linear_sum_assignment

    places = -(-n // e)
    values = np.random.default_rng(n * e).normal(size=(n, e)).astype(np.float32)
    epsilon = 1e-3
    if equal:  # many tokens want the same experts equally, and only epsilon ends their contest
        values = np.round(values * [0.4, 0.4, 0.0, 1.0] + [2.0, 2.0, 0.0, 0.0]).astype(np.float32)
        epsilon = 0.02
    found = np.asarray(jax.jit(functools.partial(route.auction, capacity=places, epsilon=epsilon))(values))
    assert np.bincount(found, minlength=e).max() <= places and (found < e).all()
    rows, columns = linear_sum_assignment(-np.repeat(values, places, 1))
    best = np.repeat(values, places, 1)[rows, columns].sum()
    assert best - n * epsilon - 1e-4 <= values[np.arange(n), found].sum() <= best + 1e-4


def test_an_auction_cut_short_still_fills_every_place():
    found = np.asarray(
        jax.jit(functools.partial(route.auction, capacity=3, rounds=1))(jnp.zeros((12, 4)).at[:, 0].set(1.0))
    )
    np.testing.assert_array_equal(np.bincount(found), [3, 3, 3, 3])


def test_hash_depends_on_the_token_alone_and_spreads():
    tokens = jnp.arange(4000)
    hashed = jax.jit(lambda t, **more: route.hash_tokens(t, 8, 2, **more), static_argnames="seed")
    routing, again = hashed(tokens), hashed(tokens[::-1])
    np.testing.assert_array_equal(routing.experts_NK, again.experts_NK[::-1])
    # 8000 choices over 8 experts: chi-square with 7 degrees of freedom, 99.99% quantile.
    load = np.asarray(metrics.load(routing))
    assert ((load - 1000) ** 2 / 1000).sum() < stats.chi2.ppf(0.9999, 7)
    other = hashed(tokens, seed=1)
    assert 0.1 < np.asarray(other.experts_NK[:, 0] == routing.experts_NK[:, 0]).mean() < 0.15


def test_summary_by_hand():
    found = metrics.summary(with_probs(PROBS), jnp.array([[True], [False], [True], [True]]))
    np.testing.assert_allclose(found["load"], [0.75, 0.25])
    assert found["max_violation"] == pytest.approx(0.5)
    assert found["entropy"] == pytest.approx(np.mean([stats.entropy(p) for p in PROBS]), rel=1e-5)
    assert found["load_entropy"] == pytest.approx(stats.entropy([0.75, 0.25]), rel=1e-5)
    assert found["confidence"] == pytest.approx(0.7) and found["choices"] == 1
    assert found["drop_fraction"] == pytest.approx(0.25)


def test_the_penalty_of_relu_routing_by_hand():
    """Wang et al. (2024): mean over tokens of the weights, each times its expert's load over a balanced one."""
    rng, k = np.random.default_rng(0), 2
    logits, mask = rng.normal(size=(20, 6)) + 0.3 * np.arange(6) - 0.7, np.arange(20) % 5 != 2
    weights = np.maximum(logits[mask], 0)
    share = (weights > 0).sum(axis=0) * 6 / (k * len(weights))
    run = jax.jit(jax.value_and_grad(lambda x: losses.relu_penalty(route.relu(x, jnp.asarray(mask)), k)))
    value, gradient = run(jnp.asarray(logits, jnp.float32))
    assert value == pytest.approx((weights * share).sum() / len(weights), rel=1e-5)
    expected = (logits > 0) * mask[:, None] * share / len(weights)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


@pytest.mark.parametrize("shift", [-0.5, 0.4])
def test_the_penalty_of_relu_routing_is_that_of_its_authors_code(shift):
    """thu-ml/ReMoE: aux = sum(probs.sum(0) * tokens_per_expert) E coefficient / (T T k), and the rule by sparsity."""
    t, e, k, layers, rate = 24, 5, 2, 3, 1.2
    logits = np.random.default_rng(1).normal(size=(layers, t, e)) + shift
    probs = np.maximum(logits, 0)
    theirs = ((probs.sum(1) * (probs > 0).sum(1)).sum(1) * e * 1e-3 / (t * t * k)).sum()

    @jax.jit
    def run(x):
        routings = [route.relu(one) for one in x]
        choices = jnp.stack([metrics.summary(one)["choices"] for one in routings]).mean()
        moved = route.update_penalty(jnp.float32(1e-3), choices, k, rate)
        return sum(losses.relu_penalty(one, k) for one in routings), moved

    penalty, updated = run(jnp.asarray(logits, jnp.float32))
    assert 1e-3 * penalty == pytest.approx(theirs, rel=1e-5)
    sparsity = np.mean([1 - (one > 0).sum() / one.size for one in probs])
    moved = 1e-3 * rate if sparsity < 1 - k / e else 1e-3 / rate
    assert updated == pytest.approx(moved, rel=1e-6)


def test_the_penalty_brings_relu_routing_to_k_choices():
    """Against a loss that wants every expert."""

    def step(state, _):
        logits, penalty = state
        routing = route.relu(logits)
        choices = metrics.summary(routing)["choices"]
        grad = jax.grad(lambda x: penalty * losses.relu_penalty(route.relu(x), 2) - 0.1 * jnp.tanh(x).mean())(logits)
        return (logits - 2.0 * grad, route.update_penalty(penalty, choices, 2, 1.05)), choices

    start = (jax.random.normal(jax.random.key(0), (64, 8)), jnp.float32(1e-3))
    (_, penalty), choices = jax.jit(lambda start: jax.lax.scan(step, start, None, length=600))(start)
    assert choices[0] > 3.5 and choices[-100:].mean() == pytest.approx(2, abs=0.3) and penalty > 1e-3
