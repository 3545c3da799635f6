from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy import stats

from sharding.inference.sample import DRAWN, greedy, sample_tokens
from sharding.inference.speculative import accept, distribution
from sharding.mesh import make_mesh
from sharding.plan import Plan

V, T, DRAWS = 6, 2, 6000


def tables(seed):
    """Logits of the next token after every prefix of up to T tokens: a model over a small vocabulary."""
    rng = np.random.default_rng(seed)
    return [rng.normal(0, 1.2, (V,) * t + (V,)).astype(np.float32) for t in range(T + 1)]


def settings(rows, temperature=1.0, top_k=0, presence=0.0):
    rest = {"temperature": jnp.full(rows, temperature), "top_k": jnp.full(rows, top_k)}
    return greedy(rows)._replace(**rest, presence=jnp.full(rows, presence), seed=jnp.arange(rows, dtype=jnp.uint32))


CASES = [{}, {"temperature": 0.8, "top_k": 4}, {"presence": 1.5}]


@pytest.mark.long
@pytest.mark.parametrize("how, tp", [(CASES[2], 2), *(pytest.param(x, 1, marks=pytest.mark.slow) for x in CASES)])
def test_tokens_are_distributed_as_the_large_models_own(how, tp):
    """Chi-square of the first two tokens that come out against the exact product of the large model's probabilities."""
    large, small = tables(0), tables(1)
    rows, unseen = settings(DRAWS, **how), jnp.zeros((DRAWS, V), jnp.int32)
    axis, full, spec = (None, P(), P()) if tp == 1 else ("tp", P(None, None, "tp"), P(None, "tp"))
    check = jax.shard_map(
        partial(accept, tp=axis),
        mesh=make_mesh(Plan(f"tp={tp}"), jax.devices()[:tp]),
        in_specs=(full, full, P(), spec, P()),
        out_specs=P(),
        check_vma=False,
    )

    def drawn(seen, tokens):
        return seen + DRAWN * sum(jax.nn.one_hot(token, V, dtype=jnp.int32) for token in tokens)

    @jax.jit
    def decode():
        logits, tokens, prefix = [], [], ()
        for t in range(T):
            q = jnp.broadcast_to(jnp.asarray(small[t])[prefix], (DRAWS, V))
            step = rows._replace(index=rows.index + t)
            tokens.append(sample_tokens(q, drawn(unseen, tokens), step)[0])
            logits.append(q)
            prefix = (*prefix, tokens[-1])
        drafted = jnp.stack(tokens, 1)
        p = [jnp.broadcast_to(jnp.asarray(large[t])[tuple(tokens[:t])], (DRAWS, V)) for t in range(T + 1)]
        stayed, following = check(jnp.stack(p, 1), jnp.stack(logits, 1), drafted, unseen, rows)
        # A text that stopped after one token is continued by the large model alone, as the next round would.
        step = rows._replace(index=rows.index + 1 + (1 << 20))
        more = sample_tokens(jnp.asarray(large[1])[following], drawn(unseen, [following]), step)[0]
        first = jnp.where(stayed > 0, drafted[:, 0], following)
        second = jnp.where(stayed > 1, drafted[:, 1], jnp.where(stayed == 1, following, more))
        return first, second, stayed

    first, second, stayed = decode()

    def exact(logits, after=0.0):
        one = settings(len(logits), **how)
        logits = jnp.asarray(logits) - how.get("presence", 0.0) * after
        return np.exp(np.asarray(distribution(logits, one), np.float64))

    joint = exact(large[0][None])[0][:, None] * exact(large[1], np.eye(V))
    counts = np.zeros((V, V))
    np.add.at(counts, (np.asarray(first), np.asarray(second)), 1)
    assert counts[joint == 0].sum() == 0
    some = joint > 0
    assert stats.chisquare(counts[some], DRAWS * joint[some] / joint[some].sum()).pvalue > 1e-3
    # The expected share of accepted first tokens is sum of min(p, q): Leviathan et al. (2023), theorem 3.5.
    share = np.minimum(exact(large[0][None])[0], exact(small[0][None])[0]).sum()
    assert np.mean(np.asarray(stayed) > 0) == pytest.approx(share, abs=0.03)


def test_for_temperature_zero_it_is_the_large_models_best():
    target = jax.random.normal(jax.random.key(0), (8, T + 1, V))
    drafted = jnp.where(jnp.arange(8)[:, None] < 4, target.argmax(-1)[:, :T], 0).astype(jnp.int32)
    draft = jax.nn.one_hot(drafted, V) * 10
    stayed, following = jax.jit(accept)(target, draft, drafted, jnp.zeros((8, V), jnp.int32), greedy(8))
    best = np.asarray(target.argmax(-1))
    for row in range(8):
        right = int(np.cumprod(np.asarray(drafted[row]) == best[row, :T]).sum())
        assert int(stayed[row]) == right and int(following[row]) == best[row, right]
