from functools import partial

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from scipy import stats

from sharding.inference.sample import DRAWN, READ, Settings, greedy, penalize, sample_tokens, uniform, warp
from sharding.inference.top_p import cutoff
from sharding.mesh import make_mesh
from sharding.plan import Plan

V = 16
WARPS = [jax.jit(partial(warp, tp=None, candidates=candidates)) for candidates in (2, 128)]
SAMPLE = jax.jit(sample_tokens)
CUTOFF = jax.jit(partial(cutoff, tp=None))
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


def settings(rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, penalty=1.0, seed=0, index=0, **drawn):
    def spread(value, dtype):
        return jnp.broadcast_to(jnp.asarray(value, dtype), (rows,))

    off = {"presence": 0.0, "frequency": 0.0} | drawn
    t, *floats = (spread(x, jnp.float32) for x in (temperature, top_p, min_p, penalty, *off.values()))
    return Settings(
        t, spread(top_k, jnp.int32), *floats, spread(seed, jnp.uint32), spread(index, jnp.int32), spread(0, jnp.int32)
    )


def allowed_tokens(logits, **how):
    """Plain numpy: the ids that may be drawn, after temperature, top-k, top-p and min-p in that order."""
    z = np.asarray(logits, np.float64) / how.get("temperature", 1.0)
    order = np.argsort(-z)
    ids = order[: how.get("top_k") or len(z)]
    p = np.exp(z[ids] - z.max())
    p /= p.sum()
    ids = ids[: int(np.searchsorted(np.cumsum(p), how.get("top_p", 1.0) - 1e-9)) + 1]
    share = np.exp(z[ids] - z.max())
    return set(ids[share >= how.get("min_p", 0.0)].tolist())


CASES = [
    {},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"top_k": 8, "top_p": 0.8, "min_p": 0.05, "temperature": 1.5},
]


@pytest.mark.parametrize("how", CASES, ids=str)
def test_what_may_be_drawn_is_what_the_definitions_say(how):
    """By a full sort; with fewer candidates than tokens are left, the thresholds come from bisection."""
    logits = np.random.default_rng(0).normal(0, 2, (5, V)).astype(np.float32)
    for cut in WARPS:
        found = np.isfinite(cut(jnp.asarray(logits), settings(5, **how)))
        for row, allowed in zip(logits, found, strict=True):
            assert set(np.flatnonzero(allowed).tolist()) == allowed_tokens(row, **how)


@pytest.mark.parametrize("how", [CASES[1], CASES[-1]], ids=str)
def test_draws_have_the_distribution(how):
    logits = np.random.default_rng(1).normal(0, 1.5, V).astype(np.float32)
    draws = 4000
    rows = settings(draws, seed=np.arange(draws) % 37, index=np.arange(draws) // 37, **how)
    tokens, logprobs = SAMPLE(jnp.tile(logits, (draws, 1)), jnp.zeros((draws, V), jnp.int32), rows)
    allowed = sorted(allowed_tokens(logits, **how))
    p = np.exp(logits[allowed].astype(np.float64) / how["temperature"])
    counts = np.bincount(np.asarray(tokens), minlength=V)
    assert counts.sum() == counts[allowed].sum()
    assert stats.chisquare(counts[allowed], draws * p / p.sum()).pvalue > 1e-3
    model = jax.nn.log_softmax(jnp.asarray(logits))
    np.testing.assert_allclose(logprobs, model[tokens], rtol=1e-5)


@pytest.mark.parametrize("spread", [0.01, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("how", [{}, {"top_k": 20}, {"min_p": 0.3}, {"temperature": 0.5}], ids=str)
def test_the_best_token_of_the_nucleus_is_drawn(how, spread):
    """The nucleus by a full sort in float64, and the noise as it is: the very token, in every row."""
    rows, rng = 60, np.random.default_rng(2)
    logits = rng.normal(0, spread, (rows, V)).astype(np.float32)
    top_p = rng.choice([0.01, 0.3, 0.6, 0.9, 0.97, 1.0], rows)
    given = settings(rows, seed=np.arange(rows), index=5, **how)._replace(top_p=jnp.asarray(top_p, jnp.float32))
    tokens, _ = SAMPLE(jnp.asarray(logits), jnp.zeros((rows, V), jnp.int32), given)
    noise = -np.log(-np.log(np.asarray(uniform(given.seed, given.index, jnp.arange(V)), np.float64)))
    for row, p, gumbel, token in zip(logits, top_p, noise, tokens.tolist(), strict=True):
        allowed = sorted(allowed_tokens(row, top_p=p, **how))
        scores = row.astype(np.float64) / how.get("temperature", 1.0) + gumbel
        assert token == max(allowed, key=lambda i, scores=scores: scores[i])


@pytest.mark.parametrize("spread", [0.01, 3.0, 60.0], ids=["flat", "peaked", "one"])
def test_a_nucleus_too_small_for_a_float32_is_the_most_probable_token(spread):
    top_p = [5e-324, 1e-45, 1e-38, 2e-38] * 15  # 0 as float32, or where such small numbers are taken for 0
    logits = np.random.default_rng(3).normal(0, spread, (60, V)).astype(np.float32)
    given = settings(60, top_p=top_p, seed=np.arange(60))
    tokens, _ = SAMPLE(jnp.asarray(logits), jnp.zeros((60, V), jnp.int32), given)
    assert tokens.tolist() == logits.argmax(-1).tolist()


def test_the_noise_is_uniform_and_ids_seeds_and_numbers_are_independent():
    """Kolmogorov-Smirnov over the ids of a row, and correlations of neighbors along each of the three."""
    ids, n = jnp.arange(20_000), 12
    drawn = [
        uniform(jnp.arange(n).astype(jnp.uint32), jnp.full(n, 3), ids),
        uniform(jnp.full(n, 9), jnp.arange(n), ids),
    ]
    for x in (np.asarray(x, np.float64) for x in drawn):
        assert min(stats.kstest(row, "uniform").pvalue for row in x) > 1e-4
        for one, other in ((x[:, 1:], x[:, :-1]), (x[1:], x[:-1])):
            assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 4.5 / np.sqrt(one.size)


@pytest.mark.parametrize("candidates", [4, pytest.param(128, marks=pytest.mark.slow)])
def test_a_split_vocabulary_gives_the_same_tokens(candidates):
    """Rows over dp too; in only one of the two parts is a nucleus larger than the candidates."""
    logits = jax.random.normal(jax.random.key(0), (12, 32)) * 2
    seen = jax.random.randint(jax.random.key(1), (12, 32), 0, 6)
    rows = settings(
        12,
        temperature=[0, 0.5, 1, 2] * 3,
        top_k=[0, 3, 4, 0, 0, 0, 30, 0, 9, 0, 0, 0],
        top_p=[1, 0.1, 0.1, 1, 1, 1] + [1, 0.95, 0.8, 0.99, 1, 0.9],
        min_p=[0, 0, 0.1] * 4,
        penalty=[1.0, 1.3] * 6,
        presence=[0.0, 0.5, -0.5] * 4,
        frequency=[0.0, 0.25] * 6,
        seed=np.arange(12),
        index=7,
    )
    one = jax.jit(partial(sample_tokens, candidates=128))(logits, seen, rows)
    split = jax.shard_map(
        partial(sample_tokens, tp="tp", candidates=candidates),
        mesh=make_mesh(Plan("dp=2, tp=4"), jax.devices()),
        in_specs=(P("dp", "tp"), P("dp", "tp"), P("dp")),
        out_specs=P("dp"),
        check_vma=False,
    )
    tokens, logprobs = jax.jit(split)(logits, seen, rows)
    assert tokens.tolist() == one[0].tolist()
    np.testing.assert_allclose(logprobs, one[1], rtol=1e-5)


@hypothesis.settings(deadline=None, max_examples=50)
@given(hnp.arrays(np.float32, (1, 7), elements=FLOATS), st.integers(1, 7))
def test_a_cutoff_by_bisection_is_the_kth_largest_to_the_last_bit(x, k):
    ones, need = jnp.ones((1, 7)), jnp.array([k], jnp.float32)
    found = CUTOFF(jnp.asarray(x), ones, need, jnp.zeros(1), jnp.array([True]))
    assert found[0] == np.sort(x[0])[-k]


def test_a_rows_noise_depends_on_nothing_but_its_seed_and_place():
    ids = jnp.arange(V, dtype=jnp.int32)
    noise = jax.jit(uniform)
    alone = noise(jnp.array([5], jnp.uint32), jnp.array([3], jnp.int32), ids)
    among = noise(jnp.array([1, 5, 2], jnp.uint32), jnp.array([3, 3, 9], jnp.int32), ids)
    assert np.array_equal(alone[0], among[1])
    assert not np.array_equal(among[0], among[1])
    assert 0 < float(among.min()) and float(among.max()) < 1


def test_greedy_takes_the_first_of_equals_and_the_penalty_pushes_both_signs_down():
    logits = jnp.array([[1.0, 3.0, 3.0, -1.0]])
    assert SAMPLE(logits, jnp.zeros((1, 4), jnp.int32), greedy(1))[0].tolist() == [1]
    # The first token is new, the second was read, the third drawn twice, the last read and drawn.
    seen = jnp.array([[0, READ, 2 * DRAWN, READ + DRAWN]])
    assert penalize(logits, seen, settings(1, penalty=2.0)).tolist() == [[1.0, 1.5, 1.5, -2.0]]
    assert penalize(logits, seen, settings(1, presence=0.5)).tolist() == [[1.0, 3.0, 2.5, -1.5]]
    assert penalize(logits, seen, settings(1, frequency=0.5)).tolist() == [[1.0, 3.0, 2.0, -1.5]]
