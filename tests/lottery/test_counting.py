"""Counts against Python's own integers, and the sizes of models of 7 and 70 billion weights."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lottery import allocation, counting, criteria, dynamic, masks, prune

COUNTS = st.lists(st.integers(0, 2**31 - 1), min_size=8, max_size=8)


def value(pair):
    return int(pair[0]) * 4096 + int(pair[1])


ADD = jax.jit(lambda counts: counting.total([counts]))
SHARE = jax.jit(jax.vmap(counting.share))


@settings(max_examples=50)
@given(a=COUNTS, b=st.integers(0, 2**40))
def test_sums_differences_and_order_are_pythons(a, b):
    total = ADD(jnp.asarray(a, jnp.int32))
    assert value(total) == sum(a)
    assert value(counting.subtract(total, counting.split(b))) == sum(a) - b
    assert bool(counting.less(total, counting.split(b))) == (sum(a) < b)
    assert float(counting.as_float(total)) == pytest.approx(sum(a), rel=2**-23)


@settings(max_examples=50)
@given(count=COUNTS, fraction=st.lists(st.floats(1 / 64, 1, width=32), min_size=8, max_size=8))
def test_shares_of_counts_are_exact_where_float32_is_not(count, fraction):
    got = SHARE(jnp.asarray(fraction, jnp.float32), jnp.asarray(count, jnp.int32))
    assert got.tolist() == [round(Fraction(f) * n) for f, n in zip(fraction, count, strict=True)]


def llama(layers, width, ff, heads, kv_heads):
    """Shapes of a decoder's blocks, stacked."""
    head = width // heads
    kernels = {
        "attention": {"query": (width, heads, head), "key": (width, kv_heads, head), "value": (width, kv_heads, head)},
        "mlp": {"gate": (width, ff), "up": (width, ff), "down": (ff, width)},
    }
    kernels["attention"]["output"] = (heads, head, width)
    leaf = lambda shape: {"kernel": jax.ShapeDtypeStruct((layers, *shape), jnp.bfloat16)}  # noqa: E731
    return {"blocks": jax.tree.map(leaf, kernels, is_leaf=lambda x: isinstance(x, tuple))}


@pytest.mark.parametrize(
    ("shapes", "size"),
    [(llama(32, 4096, 11008, 32, 32), 6_476_005_376), (llama(80, 8192, 28672, 64, 8), 68_451_041_280)],
    ids=["7B", "70B"],
)
def test_models_of_billions_of_weights_can_be_pruned(shapes, size):
    """Traced only: what fails beyond 2**31 fails when counts are made or given to JAX."""
    which = masks.prunable(shapes)
    sizes = prune.sizes(shapes, which)
    assert sum(sizes.values()) == size and max(sizes.values()) < 2**31
    half = allocation.counts(sizes, allocation.Everywhere(0.5), {})
    assert half == {"*": size // 2}
    config = dynamic.GradualConfig(0.1, 0, 1000, every=100, scope="global")

    def everything(params):
        mask = prune.keep(criteria.magnitude(params), masks.ones(params), which, half)
        moved = dynamic.rewire(params, criteria.magnitude(params), mask, which, 0.3)[1]
        tx = dynamic.gradual(optax.sgd(0.1), which, config)
        _, state = tx.update(params, tx.init(params), params)
        return masks.density(moved, which), masks.distance(mask, moved, which), masks.count(mask, which), state.masks

    density, _, counts, mask = jax.eval_shape(everything, shapes)
    assert density.shape == () and len(counts) == len(sizes)
    assert jax.tree.map(lambda m: m.shape, mask) == jax.tree.map(lambda p: p.shape, shapes)


@pytest.mark.slow
def test_a_mask_of_more_than_two_to_the_31_weights_is_counted_exactly():
    """2.2 billion entries that no memory holds: the program counts them as it makes them."""
    which = {"blocks": {"kernel": True}}
    row = jnp.arange(2**13) % 8 < 5  # 5120 of 8192

    @jax.jit
    def measure(row):
        mask = {"blocks": {"kernel": jnp.broadcast_to(row, (33, 2**13, 2**13))}}
        other = {"blocks": {"kernel": jnp.ones((33, 2**13, 2**13), bool)}}
        return masks.count(mask, which), masks.density(mask, which), masks.distance(mask, other, which)

    counts, density, distance = jax.device_get(measure(row))
    assert {int(n) for n in counts.values()} == {5120 * 2**13} and len(counts) == 33
    assert (float(density), float(distance)) == (0.625, 0.375)


def test_a_traced_pair_is_a_count_like_any_other():
    scores = {"one": {"kernel": jnp.arange(12.0).reshape(3, 4)}, "two": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
    which, full = masks.prunable(scores), masks.ones(scores)
    keep = jax.jit(lambda count: prune.keep(scores, full, which, {"*": count}))
    for n in (0, 7, 18, 2**33):
        left = keep(counting.split(n))
        order = np.argsort(-np.concatenate([np.arange(12.0), np.arange(6.0)]), kind="stable")
        assert sum(int(m.sum()) for m in jax.tree.leaves(left)) == min(n, 18) and len(order) == 18


def test_a_layer_of_two_to_the_31_weights_is_refused_by_name():
    shapes = {"wide": {"kernel": jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)}}
    with pytest.raises(ValueError, match="wide/kernel has 2147483648 weights"):
        prune.sizes(shapes, masks.prunable(shapes))
