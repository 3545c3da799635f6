from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from sharding.attention import AttentionForm
from sharding.errors import PlanError
from sharding.inference.attention import cached_attention, merge, over_chunk, over_past
from sharding.inference.kv_cache import (
    CacheConfig,
    Past,
    append,
    cache_specs,
    copy_prefix,
    make_cache,
    quantize_vectors,
    read_range,
    read_slots,
)
from sharding.inference.pipeline_ring import Ring, check_groups, default_groups
from sharding.mesh import make_mesh
from sharding.plan import Plan
from tessera.models.transformer import attention

L, B, K, S, h, G = 2, 4, 2, 16, 8, 3
CONFIG = CacheConfig(L, B, K, S, h)


def keys(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("dtype, atol", [("float32", 2e-6), ("int8", 0.05)])
@pytest.mark.parametrize("ways", [1, 4])
def test_pieces_read_into_a_cache_attend_like_the_whole_text(dtype, atol, ways):
    """Texts of different lengths in scattered slots, in two chunks, the second over the cache of the first."""
    q, k, v = keys(2, 9, K * G, h), keys(2, 9, K, h, seed=1), keys(2, 9, K, h, seed=2)
    slots, first = jnp.array([3, 1]), jnp.array([4, 5])
    expected = attention(q, k, v)
    config = CacheConfig(L, B, K, S, h, dtype)
    plan = Plan(f"cp={ways}")
    mesh, specs = make_mesh(plan, jax.devices()[:ways]), cache_specs(config, plan)
    cp = "cp" if ways > 1 else None
    tell = partial(jax.shard_map, mesh=mesh, check_vma=False)

    def stacked(x):
        return jnp.stack([x.transpose(0, 2, 1, 3)] * L)

    put = jax.jit(tell(partial(append, cp=cp), in_specs=(specs, P(), P(), P(), P(), P()), out_specs=specs))
    cache = put(make_cache(config), stacked(k[:, :5]), stacked(v[:, :5]), slots, jnp.zeros(2, jnp.int32), first)
    assert cache.lengths.tolist() == [0, 5, 0, 4]

    def later(cache, q, k, v):
        return cached_attention(q, k, v, read_slots(slots)(cache, 1), first, cp)

    rest = [jnp.stack([x[0, 4:8], x[1, 5:9]]) for x in (q, k, v)]
    found = jax.jit(tell(later, in_specs=(specs, P(), P(), P()), out_specs=P()))(cache, *rest)
    np.testing.assert_allclose(found, jnp.stack([expected[0, 4:8], expected[1, 5:9]]), atol=atol)


def test_an_unused_row_writes_nothing_and_slots_beside_it_stay():
    cache = make_cache(CONFIG)._replace(lengths=jnp.array([3, 0, 0, 2]))
    values = keys(L, 2, K, 4, h)
    full = jax.jit(append)(cache, values, values, jnp.array([1, 3]), jnp.array([0, 2]), jnp.array([2, 0]))
    assert full.lengths.tolist() == [3, 2, 0, 2]
    assert not np.any(full.k[:, [0, 2, 3]]) and not np.any(full.k[:, 1, :, 2:])
    assert np.array_equal(full.k[:, 1, :, :2], values[:, 0, :, :2])
    a, b = read_range(1, 2)(full, 1), read_slots(jnp.array([1, 2]))(full, 1)
    assert np.array_equal(a.k, b.k) and np.array_equal(a.v, b.v)


def test_a_window_sees_only_the_texts_part_of_the_cache():
    """Rows of a slot behind its text hold what others left; a window wider than the text changes nothing."""
    past, q = Past(keys(2, K, S, h), keys(2, K, S, h, seed=1), None, None), keys(2, 1, K, G, h, seed=2)
    starts = jnp.array([3, 7])
    plain, wide, narrow = (over_past(q, past, starts, form=AttentionForm(window=w)) for w in (None, 12, 3))
    for one, other in zip(plain, wide, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    # Window 3 of a query at position 7: keys 5 and 6, and itself, which the cache does not have.
    s = np.einsum("kgh,ksh->kgs", q[1, 0], past.k[1, :, 5:7]) * h**-0.5
    np.testing.assert_allclose(narrow[1][1, 0], np.log(np.exp(s).sum(-1)), rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_copied_prefix_reads_as_its_source(dtype):
    k, v = 10 * keys(L, 2, K, 6, h), keys(L, 2, K, 6, h, seed=1)
    cache = make_cache(CacheConfig(L, B, K, S, h, dtype))
    cache = jax.jit(append)(cache, k, v, jnp.array([0, 2]), jnp.zeros(2, jnp.int32), jnp.array([6, 5]))
    copied = jax.jit(copy_prefix)(cache, jnp.array([0, 1]), jnp.array([2, 0]), jnp.array([4, 0]))
    assert copied.lengths.tolist() == [6, 0, 4, 0]  # a count of 0 copies nothing
    np.testing.assert_array_equal(copied.k[:, 0], cache.k[:, 0])
    for layer in range(L):
        past = read_slots(jnp.array([0, 2]))(copied, layer)
        for one in (part for part in past if part is not None):
            np.testing.assert_array_equal(one[1, :, :4], one[0, :, :4])
    assert np.abs(np.asarray(past.k[0, :, :4], np.float32)).max() > 0
    assert (dtype == "int8") == (past.k_scale is not None)


def test_an_empty_cache_adds_nothing():
    q, k, v = keys(1, 3, K, G, h), keys(1, 3, K, h, seed=1), keys(1, 3, K, h, seed=2)
    past = Past(keys(1, K, S, h), keys(1, K, S, h), None, None)
    empty, chunk = jax.jit(over_past)(q, past, jnp.array([0])), jax.jit(over_chunk)(q, k, v)
    assert np.all(np.isneginf(empty[1]))
    for one in (merge(empty, chunk), merge(chunk, empty)):
        np.testing.assert_allclose(one[0], chunk[0], rtol=1e-6)
        np.testing.assert_allclose(one[1], chunk[1], rtol=1e-6)
    both = merge(empty, empty)
    assert not np.any(both[0]) and np.all(np.isneginf(both[1]))


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=8))
def test_int8_is_off_by_half_a_step_at_most(values):
    x = jnp.asarray(values, jnp.float32)[None]
    found, scale = quantize_vectors(x)
    assert float(jnp.abs(found * scale[:, None] - x).max()) <= float(scale[0]) * 0.5001


@pytest.mark.parametrize("p, g, steps", [(1, 1, 3), (4, 1, 5), (4, 2, 3), (4, 4, 3), (2, 4, 2), (3, 5, 1)])
def test_every_group_visits_every_stage_in_order_and_never_twice_at_once(p, g, steps):
    ring = Ring(p, g, steps)
    seen = []
    for tick in range(ring.ticks):
        here = [jax.tree.map(int, ring.item(tick, stage)) for stage in range(p)]
        groups = [item.group for item in here if item.live]
        assert len(groups) == len(set(groups)), "a group on two stages at the same tick"
        seen += [(item.group, item.step, stage, tick) for stage, item in enumerate(here) if item.live]
    assert len(seen) == p * g * steps
    when = {(group, step, stage): tick for group, step, stage, tick in seen}
    for (group, step, stage), tick in when.items():
        if stage:
            assert tick == when[group, step, stage - 1] + 1
        elif step:
            assert tick > when[group, step - 1, p - 1], "a token enters before the one before it has left"
    # One more token a slot costs max(g, p) ticks: stages work g of them.
    assert Ring(p, g, steps + 1).ticks - ring.ticks == max(g, p)
    assert ring.utilization == min(1, g / p)
    assert ring.call_utilization == len(seen) / (p * ring.ticks)


def test_groups():
    assert [default_groups(4, 8), default_groups(4, 2), default_groups(1, 8), default_groups(4, 6)] == [4, 2, 1, 3]
    with pytest.raises(PlanError, match="nearest valid: 4"):
        check_groups(3, 8)
    with pytest.raises(PlanError, match="kv_heads=2.*tp=4"):
        cache_specs(CONFIG, Plan("tp=4"))
    with pytest.raises(ValueError, match="int8"):
        CacheConfig(1, 1, 1, 1, 2, "int4")


@pytest.mark.parametrize("dtype, ways, shared", [("float32", 1, True), ("int8", 2, False)])
def test_pages_in_any_order_read_as_contiguous_slots(dtype, ways, shared):
    """Two chunks, the second from within a page; one slot has fewer pages, and what is past them is not written."""
    table = np.array([[9, 9, 9, 9], [4, 0, 7, 2], [9, 9, 9, 9], [5, 1, 9, 9]])  # page 9 is none; 3, 6 and 8 are free
    plain = CacheConfig(L, B, K, S, h, dtype, shared)
    paged = CacheConfig(L, B, K, S, h, dtype, shared, pages=9, page_size=4)
    plan, slots = Plan(f"cp={ways}" if ways > 1 else ""), jnp.array([3, 1])
    mesh, cp = make_mesh(plan, jax.devices()[:ways]), "cp" if ways > 1 else None
    found = []
    for config in (plain, paged):
        specs = cache_specs(config, plan)
        tell = partial(jax.shard_map, mesh=mesh, check_vma=False)
        put = jax.jit(tell(partial(append, cp=cp), in_specs=(specs, P(), P(), P(), P(), P()), out_specs=specs))
        cache = make_cache(config)
        cache = cache._replace(table=jnp.asarray(table, jnp.int32)) if config.pages else cache
        for seed, starts, counts in ((0, [0, 0], [6, 5]), (1, [6, 5], [5, 7])):
            k, v = (keys(L, 2, K, 7, h, seed=2 * seed + i) for i in range(2))
            cache = put(cache, k, v, slots, jnp.array(starts), jnp.array(counts))
        assert cache.lengths.tolist() == [0, 12, 0, 11]
        reads = [lambda cache: read_slots(slots)(cache, 1), lambda cache: read_range(1, 1)(cache, 0)]
        rows = P(None, None, cp)
        out = Past(rows, None if shared else rows, *[rows if dtype == "int8" else None] * 2)
        found.append([jax.jit(tell(read, in_specs=(specs,), out_specs=out))(cache) for read in reads])
    at = np.arange(S).reshape(S // ways, ways).T.reshape(-1)  # position of every row of the devices' parts
    for one, other in zip(*(jax.tree.leaves(each) for each in found), strict=True):
        for number, length in enumerate((8, 12) if len(one) == 2 else (12,)):  # slot 3 has 2 pages of 4
            np.testing.assert_array_equal(one[number][:, at < length], other[number][:, at < length])
        assert np.abs(np.asarray(one[-1][:, at < 12], np.float32)).min(-1).max() > 0
    assert not np.any(cache.k[:, [3, 6, 8]]) and np.any(cache.k[:, 1, :, -1])


@pytest.mark.parametrize("pages", [0, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_bytes_are_those_of_the_arrays(dtype, pages):
    config = CacheConfig(L, B, K, S, h, dtype, pages=pages, page_size=4)
    arrays = jax.eval_shape(lambda: make_cache(config))._replace(lengths=None, table=None)
    assert config.bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
