import re
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import kernel_reference as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import TypeCheckError

from moe.kernels import Combine, Quantized, SwiGLU, grouped_matmul, quantize
from moe.kernels.tiling import Tiling

M, K, N, T = 75, 12, 20, 31
# Five groups in all but one, so that they share a compiled program.
SIZES = {
    "uneven": [9, 30, 1, 20, 11],
    "empty at the edges": [0, 33, 0, 12, 0],
    "one group": [75],
    "all in one of many": [0, 0, 75, 0, 0],
    "none at all": [0, 0, 0, 0, 0],
    "one row each": [1] * 5,
    "tiles exactly": [16, 32, 16, 0, 11],
}
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 2e-3}
cpu = partial(grouped_matmul, backend="xla", tiling=Tiling(rows=16))


def arrays(sizes, dtype="float32", weights=1, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(M, K)] + [(len(sizes), K, N)] * weights
    x, *w = (jnp.array(rng.normal(size=shape) / np.sqrt(K), dtype) for shape in shapes)
    return x, *w, jnp.array(sizes, jnp.int32)


def routing(seed=1):
    rng = np.random.default_rng(seed)
    return jnp.array(rng.integers(0, T, M), jnp.int32), jnp.array(rng.random(M), jnp.float32)


@jax.jit
def forward_and_back(x, w, sizes, dy):
    out, pull = jax.vjp(lambda x, w: cpu(x, w, sizes), x, w)
    return out, *pull(dy)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_forward_and_both_gradients_against_float64(sizes, dtype):
    x, w, group_sizes = arrays(sizes, dtype)
    dy = jnp.array(np.random.default_rng(2).normal(size=(M, N)), dtype)
    out, dx, dw = forward_and_back(x, w, group_sizes, dy)
    w64 = np.asarray(w, np.float64)
    for ours, theirs in (
        (out, reference.grouped(x, w, sizes)),
        (dx, reference.grouped(dy, w64.swapaxes(1, 2), sizes)),
        (dw, reference.contract(x, dy, sizes)),
    ):
        assert ours.dtype == dtype
        tolerance = TOLERANCE[dtype]
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, atol=8 * tolerance, rtol=tolerance)
    assert (np.asarray(out)[sum(sizes) :] == 0).all() and (np.asarray(dx)[sum(sizes) :] == 0).all()


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        ([0, 0, 0, 0, 0, 1, 0, 1], 2),
        ([0] * 63 + [1], 1),
        ([1, 0, 0, 0] * 16, 16),
        ([0] * 85 + [512] + [0] * 170, 512),
        ([0] * 255 + [3], 5),
        ([1], 1),
        ([128] * 8, 1024),
        ([14, 3, 27, 0, 9, 20, 2, 949], 1024),
    ],
    ids=["two of eight", "one row", "every fourth", "collapsed", "at the end", "only row", "equal", "rest in the last"],
)
def test_gradients_for_sizes_of_other_libraries_and_more_groups_than_rows(sizes, rows):
    """The same by `jax.lax.ragged_dot`'s definition in float64, with the tile that is chosen for such shapes.

    Equal sizes and sizes whose rest is the last group's are those of the tests of MegaBlocks' grouped_gemm.
    """
    rng = np.random.default_rng(0)
    x, w, dy = (rng.normal(size=s).astype(np.float32) for s in ((rows, 3), (len(sizes), 3, 2), (rows, 2)))
    pull = jax.jit(lambda x, w, dy: jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.array(sizes)), x, w)[1](dy))
    dx, dw = pull(x, w, dy)
    np.testing.assert_allclose(dw, reference.contract(x, dy, sizes), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, reference.grouped(dy, w.swapaxes(1, 2), sizes), rtol=1e-5, atol=1e-5)


def test_every_pattern_of_empty_groups():
    """Eight groups of 0 to 127 of 1024 rows, each of them empty or not: the 256 cases of tokamax's tests."""
    rng = np.random.default_rng(0)
    x, w, dy = (rng.normal(size=s).astype(np.float32) for s in ((1024, 3), (8, 3, 2), (1024, 2)))
    sizes = rng.integers(0, 128, 8)
    rows = np.stack([np.where([i >> bit & 1 for bit in range(8)], sizes, 0) for i in range(256)])

    @jax.jit
    def run(sizes):
        out, pull = jax.vjp(lambda x, w: cpu(x, w, sizes, tiling=Tiling(rows=64)), x, w)
        return out, *pull(dy)

    for each in rows:
        out, dx, dw = run(each)
        np.testing.assert_allclose(out, reference.grouped(x, w, each), atol=1e-5)
        np.testing.assert_allclose(dx, reference.grouped(dy, w.swapaxes(1, 2), each), atol=1e-5)
        np.testing.assert_allclose(dw, reference.contract(x, dy, each), atol=2e-4)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 25), min_size=5, max_size=5), st.sampled_from([1, 7, 200]))
def test_any_sizes_and_any_tile(sizes, tile):
    x, w, group_sizes = arrays(sizes)
    sizes = np.diff(np.minimum(np.cumsum(sizes), M), prepend=0)
    out = cpu(x, w, group_sizes, tiling=Tiling(rows=tile))
    np.testing.assert_allclose(out, reference.grouped(x, w, sizes), atol=1e-5)


def test_rows_past_the_sum_may_hold_anything():
    x, w, sizes = arrays([9, 30, 1, 15, 5])
    poison = jnp.where(jnp.arange(M)[:, None] < 60, 0.0, jnp.nan)
    tokens, weights = routing()
    for epilogue in (None, Combine(tokens, weights, T)):

        def loss(x, w, epilogue=epilogue):
            return jnp.sum(jnp.sin(cpu(x, w, sizes, epilogue=epilogue)))

        clean, poisoned = (jax.jit(jax.value_and_grad(loss, (0, 1)))(v, w) for v in (x, x + poison))
        jax.tree.map(np.testing.assert_array_equal, clean, poisoned)


@pytest.mark.parametrize("backend", ["xla", pytest.param("tpu_interpret", marks=pytest.mark.slow)])
@pytest.mark.parametrize("gathered", [False, True])
def test_what_weights_gather_and_tokens_have_past_the_sum_is_not_used(backend, gathered):
    """NaN weights and row numbers out of range there, against float64 of the live rows alone."""
    live, rng = 60, np.random.default_rng(5)
    x, w, sizes = arrays([9, 30, 1, 15, 5])
    tokens, weights = routing()
    past = np.arange(M) >= live
    gather = jnp.where(past, 10**6, jnp.array(rng.integers(0, M, M), jnp.int32)) if gathered else None
    dirty = jnp.where(past, jnp.nan, weights)

    @jax.jit
    def both(x, w, weights):
        epilogue = Combine(jnp.where(past, -7, tokens), weights, T)
        out, pull = jax.vjp(
            lambda x, w, v: cpu(x, w, sizes, backend=backend, gather=gather, epilogue=epilogue._replace(weights=v)),
            *(x, w, weights),
        )
        return out, *pull(jnp.ones_like(out))

    rows = np.asarray(x if gather is None else x[jnp.clip(gather, 0, M - 1)], np.float64)[:live]
    product = reference.grouped(rows, w, sizes)
    v = np.asarray(weights, np.float64)[:live]
    out, dweights, dx = np.zeros((T, N)), np.zeros(M), np.zeros((M, K))
    np.add.at(out, np.asarray(tokens)[:live], v[:, None] * product)
    dweights[:live] = product.sum(1)
    dy = np.repeat(v[:, None], N, 1)
    where = np.arange(live) if gather is None else np.asarray(gather)[:live]
    np.add.at(dx, where, reference.grouped(dy, np.asarray(w, np.float64).swapaxes(1, 2), sizes))
    expected = (out, dx, reference.contract(rows, dy, sizes), dweights)
    for ours, theirs in zip(both(x, w, dirty), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_fused_gather_swiglu_and_combine_equal_the_unfused():
    _, w, w2, sizes = arrays(SIZES["uneven"], weights=2)
    x = jnp.array(np.random.default_rng(3).normal(size=(T, K)), jnp.float32)
    tokens, weights = routing()

    def fused(x, w, w2, weights):
        h = cpu(x, (w, w2), sizes, gather=tokens, epilogue=SwiGLU())
        return cpu(h, w.swapaxes(1, 2), sizes, epilogue=Combine(tokens, weights, T))

    def unfused(x, w, w2, weights):
        h = jax.nn.silu(cpu(x[tokens], w, sizes)) * cpu(x[tokens], w2, sizes)
        y = cpu(h, w.swapaxes(1, 2), sizes) * weights[:, None]
        return jnp.zeros((T, K)).at[tokens].add(y)

    assert_same = partial(np.testing.assert_allclose, atol=2e-5, rtol=2e-5)

    def both(f, *args):
        out, pull = jax.vjp(f, *args)
        return out, pull(-jnp.sin(out))

    ours, theirs = jax.jit(lambda *args: [both(f, *args) for f in (fused, unfused)])(x, w, w2, weights)
    jax.tree.map(assert_same, ours, theirs)
    h = reference.swiglu(x, (w, w2), SIZES["uneven"], gather=tokens)
    y = reference.combine(h, np.swapaxes(w, 1, 2), SIZES["uneven"], tokens, weights, T)
    assert_same(ours[0], y, atol=1e-4)


@pytest.mark.parametrize("name", ["none", "gather", "swiglu", "combine", "gather and combine"])
def test_gradients_against_finite_differences(name):
    x, w, w2, sizes = arrays(SIZES["uneven"], weights=2)
    tokens, weights = routing()
    rng = np.random.default_rng(4)

    def f(x, w, w2, weights):
        if name == "none":
            return cpu(x, w, sizes)
        if name == "gather":
            return cpu(x[:T], w, sizes, gather=tokens)
        if name == "swiglu":
            return cpu(x, (w, w2), sizes, epilogue=SwiGLU())
        if name == "combine":
            return cpu(x, w, sizes, epilogue=Combine(tokens, weights, T))
        return cpu(x[:T], w, sizes, gather=tokens, epilogue=Combine(tokens, None, T))

    args = [np.asarray(leaf) for leaf in (x, w, w2, weights)]
    weigh = rng.normal(size=jax.eval_shape(f, *args).shape).astype(np.float32)
    run = jax.jit(jax.value_and_grad(lambda *args: (f(*args) * weigh).sum(), argnums=(0, 1, 2, 3)))
    slopes, eps = jax.tree.map(np.asarray, run(*args)[1]), 2e-3
    for _ in range(3):
        way = [rng.normal(size=leaf.shape).astype(np.float32) for leaf in args]
        up, down = (run(*(leaf + step * to for leaf, to in zip(args, way, strict=True)))[0] for step in (eps, -eps))
        # Central differences on float32 lose half the digits.
        expected = sum((slope * to).sum() for slope, to in zip(slopes, way, strict=True))
        np.testing.assert_allclose((float(up) - float(down)) / (2 * eps), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("dtype", "error"), [("int8", 0.006), ("int4", 0.08), ("float8_e4m3fn", 0.04), ("float8_e5m2", 0.08)]
)
@pytest.mark.parametrize("block", [None, 4])
def test_quantized_weights_are_the_weights_they_stand_for(dtype, error, block):
    x, w, sizes = arrays(SIZES["uneven"])
    quantized = quantize(w, dtype, block=block)
    assert quantized.scales.shape == (5, 1 if block is None else K // block, N)
    meant = np.asarray(quantized.values, np.float64) * np.repeat(quantized.scales, block or K, axis=1)
    assert np.abs(meant - w).max() <= error * np.abs(w).max()
    np.testing.assert_allclose(cpu(x, quantized, sizes), reference.grouped(x, meant, SIZES["uneven"]), atol=1e-5)
    channel = 1 + jax.random.uniform(jax.random.key(3), (5, K))
    divided = quantized._replace(channel=channel)
    expected = reference.grouped(x, meant / np.asarray(channel)[:, :, None], SIZES["uneven"])
    np.testing.assert_allclose(cpu(x, divided, sizes), expected, atol=1e-5)
    with pytest.raises(TypeError, match="inference"):
        jax.grad(lambda x: cpu(x, quantized, sizes).sum())(x)


def test_under_vmap_scan_and_jit():
    x, w, sizes = arrays(SIZES["uneven"])
    xs = jnp.stack([x, 2 * x])
    many = jnp.array([SIZES["uneven"], [0, 75, 0, 0, 0]], jnp.int32)
    one_by_one = np.stack([cpu(xs[i], w, many[i]) for i in range(2)])
    slope = jax.grad(lambda w, x, s: jnp.sum(cpu(x, w, s) ** 2))

    @jax.jit
    def run(xs):
        mapped = jax.vmap(cpu, (0, None, 0))(xs, w, many)
        scanned = jax.lax.scan(lambda c, a: (c, cpu(a[0], w, a[1])), 0, (xs, many))[1]
        return mapped, scanned, jax.vmap(slope, (None, 0, 0))(w, xs, many)

    mapped, scanned, grads = run(xs)
    np.testing.assert_array_equal(mapped, one_by_one)
    np.testing.assert_array_equal(scanned, one_by_one)
    np.testing.assert_allclose(grads[0], jax.jit(slope)(w, x, sizes), rtol=1e-5, atol=1e-5)


def test_under_shard_map_a_replicated_weight_gets_the_summed_gradient():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    x, w, sizes = arrays(SIZES["uneven"])
    xs = jnp.tile(x, (4, 1)) * jnp.repeat(jnp.arange(4.0), M)[:, None]

    def loss(w, x):
        return jax.lax.psum(jnp.sum(jnp.sin(cpu(x, w, sizes))), "data")

    spec = PartitionSpec
    sharded = jax.shard_map(loss, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec())
    alone = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.sin(cpu(x, w, sizes)))))
    expected = sum(alone(w, i * x) for i in range(4))
    np.testing.assert_allclose(jax.jit(jax.grad(sharded))(w, xs), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, K, N), (M, 0, N), (M, K, 0)], ids=str)
def test_nothing_to_multiply_is_zeros(shape):
    m, k, n = shape
    out = cpu(jnp.ones((m, k)), jnp.ones((3, k, n)), jnp.array([1, 0, 2]))
    assert out.shape == (m, n) and not out.any()


def test_forward_mode_and_symbolic_shapes_are_refused():
    x, w, sizes = arrays(SIZES["uneven"])
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: cpu(x, w, sizes), (x,), (x,))
    (rows,) = jax.export.symbolic_shape("rows")
    many, tokens = (jax.ShapeDtypeStruct(shape, d) for shape, d in (((rows, K), x.dtype), ((rows,), jnp.int32)))
    for f, shape, name in (
        (lambda x: cpu(x, w, sizes), many, "x"),
        (lambda t: cpu(x, w, sizes, gather=t), tokens, "g"),
    ):
        with pytest.raises(ValueError, match=rf"{name}\w* has shape \(rows.*sizes that are numbers"):
            jax.export.export(jax.jit(f))(shape)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_gradient_has_one_loop_and_two_heights(groups):
    """What a program compiles: a body for each height of a tile, once for each product."""
    shapes = ((64, 8), (groups, 8, 4)), ((64, 4),)
    x, w, dy = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (*shapes[0], *shapes[1]))

    def both(x, w, dy):
        out, pull = jax.vjp(lambda x, w: cpu(x, w, jnp.zeros(groups, jnp.int32), tiling=Tiling(rows=48)), x, w)
        return out, pull(dy)

    text = jax.jit(both).lower(x, w, dy).as_text()
    assert text.count("stablehlo.while") == 3 and text.count("stablehlo.dot_general") == 2 * 3


def test_no_transposed_copy_of_the_weight():
    x, w, sizes = arrays(SIZES["uneven"])
    program = jax.make_jaxpr(jax.grad(lambda x, w: cpu(x, w, sizes).sum(), (0, 1)))(x, w)
    assert "dot_general" in str(program) and "transpose[" not in str(program)


X, W, S = jnp.ones((8, 4)), jnp.ones((2, 4, 6)), jnp.array([3, 5])
I8, C64 = jnp.int8, jnp.complex64
ROWS = jnp.arange(8, dtype=jnp.int32)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ([-2, 5], {}, "negative size, -2"),
        ([3, 5], {"gather": ROWS + 1}, r"gather has row numbers from 1 to 8: \[0, 8\)"),
        ([3, 5], {"gather": ROWS - 3}, "gather has row numbers from -3 to 4"),
        ([3, 5], {"epilogue": Combine(ROWS, None, 7)}, r"Combine.tokens has row numbers from 0 to 7: \[0, 7\)"),
    ],
    ids=["sizes", "past the end", "below zero", "tokens"],
)
def test_values_out_of_range_are_refused_outside_jit_and_found_by_checkify_inside(sizes, options, message, monkeypatch):
    monkeypatch.setenv("TESSERA_CHECKIFY", "1")
    sizes, f = jnp.array(sizes), partial(cpu, X, W, **options)
    with pytest.raises(ValueError, match=message):
        f(sizes)
    traced = lambda sizes, numbers: cpu(X, W, sizes, **options | numbers)  # noqa: E731
    found = checkify.checkify(jax.jit(traced))(sizes, {"gather": options["gather"]} if "gather" in options else {})[0]
    assert re.search(message, found.get())
    assert checkify.checkify(jax.jit(traced))(S, {"gather": ROWS})[0].get() is None or "epilogue" in options


def test_a_product_has_no_effects_so_that_layers_of_it_can_be_scanned():
    assert not jax.make_jaxpr(partial(cpu, gather=ROWS))(X, W, S).effects


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, W, S), {"backend": "cuda"}, ValueError, "choose one of auto"),
        ((X, W, S), {"backend": "tpu"}, ValueError, "runs on tpu"),
        ((X, W, S), {"epilogue": SwiGLU()}, ValueError, "pair"),
        ((X, (W, W), S), {}, ValueError, "others one"),
        ((X, W.astype(jnp.bfloat16), S), {}, TypeError, "cast one"),
        ((X, W, S), {"epilogue": Combine(jnp.zeros(3, jnp.int32), None, 2)}, ValueError, "each of the 8 rows"),
        ((X, Quantized(W.astype(jnp.int8), jnp.ones((2, 3, 6))), S), {}, ValueError, "Q dividing K"),
        ((X, (W, quantize(W)), S), {"epilogue": SwiGLU()}, TypeError, "both or none"),
        ((X.astype(C64), W.astype(C64), S), {}, TypeError, "x is complex64: the kernels multiply bfloat16"),
        ((X.astype(I8), W.astype(I8), S), {}, TypeError, "x is int8: the kernels multiply"),
        ((X.astype("float8_e4m3fn"), W.astype("float8_e4m3fn"), S), {}, TypeError, "x is float8_e4m3fn"),
        ((X, W, S), {"out_dtype": jnp.int32}, TypeError, "out_dtype is int32"),
        ((X, Quantized(W.astype(jnp.int32), jnp.ones((2, 1, 6))), S), {}, TypeError, "values of int32: choose"),
        (
            (X, Quantized(W.astype(jnp.int8), jnp.ones((2, 1, 6)), jnp.ones((2, 1))), S),
            {},
            ValueError,
            "channel of shape",
        ),
        ((X, W, S.astype(jnp.float32)), {}, TypeError, "group_sizes is float32: integers"),
        ((X, W, S), {"gather": jnp.ones(8)}, TypeError, "gather is float32: integers"),
        ((X, W, S), {"epilogue": Combine(jnp.ones(8), None, 2)}, TypeError, "tokens is float32: integers"),
        ((X, W, S), {"epilogue": Combine(ROWS, ROWS, 8)}, TypeError, "Combine.weights is int32: the kernels"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, options, error, message):
    # Under the tests' import hook jaxtyping is first to object to some dtypes.
    hooked = (error, TypeCheckError) if error is TypeError else error
    with pytest.raises(hooked) as caught:
        jax.jit(partial(grouped_matmul, **options))(*arguments)
    assert caught.type is TypeCheckError or re.search(message, str(caught.value))


@pytest.mark.parametrize("arguments", [(X, jnp.ones((2, 5, 6)), S), (X, W, jnp.array([8]))], ids=["w", "sizes"])
def test_shapes_that_do_not_match_are_refused(arguments):
    # Under the tests' import hook jaxtyping is first to object.
    with pytest.raises((ValueError, TypeCheckError)):
        grouped_matmul(*arguments)


@pytest.mark.parametrize(
    ("dtype", "block", "message"), [("int2", None, "choose one of"), ("int8", 3, "does not divide")]
)
def test_quantizing_refuses(dtype, block, message):
    with pytest.raises(ValueError, match=message):
        quantize(W, dtype, block=block)
