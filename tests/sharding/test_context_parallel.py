from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from sharding.analysis.collectives import count_collectives, totals
from sharding.attention import PLAIN, AttentionForm
from sharding.context_parallel import contiguous_positions, ring_attention, ulysses_attention, zigzag_positions
from sharding.mesh import abstract_mesh, make_mesh
from sharding.plan import Plan
from tessera.models.transformer import attention


def reference(q, k, v, form=PLAIN):
    """Causal attention in float64, the scores of every pair one by one by the papers' formulas."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
    scores = np.einsum("bthd,bshd->bhts", q, k) * (form.scale or 1 / np.sqrt(q.shape[-1]))
    if form.softcap:
        scores = form.softcap * np.tanh(scores / form.softcap)
    length, window = scores.shape[-1], form.window or scores.shape[-1]
    seen = [[s <= t and t - s < window for s in range(length)] for t in range(length)]
    weights = np.where(seen, np.exp(scores), 0)
    total = weights.sum(-1, keepdims=True)
    if form.sinks_H is not None:
        total = total + np.exp(np.asarray(form.sinks_H, np.float64))[None, :, None, None]
    return np.einsum("bhts,bshd->bthd", weights / total, v)


def order(cut, parts, length):
    return np.concatenate([cut(i, parts, length) for i in range(parts)])


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 8), st.integers(1, 5))
def test_zigzag_gives_every_part_the_same_work(parts, chunk):
    length = 2 * parts * chunk
    positions = order(zigzag_positions, parts, length)
    assert sorted(positions) == list(range(length))
    np.testing.assert_array_equal(order(contiguous_positions, parts, length), np.arange(length))
    # Query t reads t + 1 keys.
    work = (positions + 1).reshape(parts, -1).sum(1)
    assert len(set(work)) == 1


SINKS = np.array([-1.0, 0.5, 2.0, 4.0], np.float32)
# Method, key/value heads, form: windows of less than a chunk, of several, and known only when it runs.
METHODS = {
    "ring": ("ring", 4, PLAIN),
    "all_to_all": ("all_to_all", 4, PLAIN),
    "ring, one key head, all forms": ("ring", 1, AttentionForm(5, SINKS, 0.3, 2.0)),
    "all_to_all, all forms": ("all_to_all", 4, AttentionForm(3, SINKS, 0.3, 2.0)),
    "ring, a window in an array": ("ring", 2, AttentionForm(np.float32(1))),
}


@pytest.mark.parametrize("method", METHODS)
def test_attention_over_a_split_sequence_and_its_gradient(method):
    kind, kv_heads, form = METHODS[method]
    function = {"ring": ring_attention, "all_to_all": partial(ulysses_attention, attend=attention)}[kind]
    cut = {"ring": zigzag_positions, "all_to_all": contiguous_positions}[kind]
    parts, length = 4, 16
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, length, 4, 6)).astype(np.float32) * 2
    k, v = (rng.normal(size=(2, length, kv_heads, 6)).astype(np.float32) * 2 for _ in range(2))
    weight = rng.normal(size=q.shape).astype(np.float32)
    mixed, full = order(cut, parts, length), np.arange(length)
    back = np.argsort(mixed)
    mesh = make_mesh(Plan("dp=2, cp=4"))
    specs = (*(P("dp", "cp"),) * 3, P())

    def split(q, k, v, form):
        run = lambda q, k, v, sinks: function(q, k, v, form._replace(sinks_H=sinks), axis="cp")  # noqa: E731
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P("dp", "cp"))(q, k, v, form.sinks_H)

    def run(attend, at):
        def loss(q, k, v, sinks):
            result = attend(q[:, at], k[:, at], v[:, at], form._replace(sinks_H=sinks))
            result = result[:, back if at is mixed else full]
            return (result * weight).sum(), result

        (_, result), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(q, k, v, form.sinks_H)
        return result, grads

    result, grads = run(split, mixed)
    np.testing.assert_allclose(result, reference(q, k, v, form), rtol=1e-5, atol=1e-5)
    whole, expected = run(attention, full)
    np.testing.assert_allclose(whole, reference(q, k, v, form), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


def test_keys_and_values_travel_once_forward_and_with_their_gradients_back():
    plan = Plan("cp=8")
    shard = jax.shard_map(
        partial(ring_attention, axis="cp"), mesh=abstract_mesh(plan), in_specs=P(None, "cp"), out_specs=P(None, "cp")
    )
    shapes = [jax.ShapeDtypeStruct((1, 32, heads, 4), jnp.float32) for heads in (4, 2, 2)]
    part = 4 * 2 * 4 * 4  # bytes of one device's keys
    forward = totals(count_collectives(shard, *shapes))
    assert forward == {"permute": (2 * 7, 2 * 7 * part)}
    both = totals(count_collectives(jax.grad(lambda q, k, v: shard(q, k, v).sum(), (0, 1, 2)), *shapes))
    # Back: k, v and both gradients 7 times, the gradients once more to be home.
    assert both == {"permute": (2 * 7 + 4 * 7 + 2, (2 * 7 + 4 * 7 + 2) * part)}
