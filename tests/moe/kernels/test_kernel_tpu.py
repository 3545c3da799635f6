"""The TPU kernels in Pallas's interpreter, whose fresh memory is NaN, and compiled ahead of time for real chips."""

import os
from functools import partial

import jax
import jax.numpy as jnp
import kernel_reference as reference
import numpy as np
import pytest
from jax.experimental import pallas as pl

from moe.kernels import Combine, Quantized, SwiGLU, block_sparse_matmul, block_structure, grouped_matmul, quantize
from moe.kernels.spec import ContractionOperands, ContractionSpec, GroupedSpec
from moe.kernels.tiling import Tiling
from moe.kernels.tpu import contraction, gather, grouped
from moe.kernels.tpu.tiles import Tiles
from sharding.analysis.collectives import inner_jaxprs

TILES = Tiling(rows=32, inner=128, cols=128)
interpreted = partial(grouped_matmul, backend="tpu_interpret", tiling=TILES)
plain_jax = partial(grouped_matmul, backend="xla", tiling=Tiling(rows=32))
T = 24


def value_and_gradients(f, *args):
    """f's output and the gradient of a curved loss in every argument, in one program."""

    def both(*args):
        out, pull = jax.vjp(f, *args)
        return out, *pull(jnp.sin(out + 1))

    return jax.jit(both)(*args)


def problem(name, matmul, *, rows, k, n, groups, dtype, seed=0):
    """A function of (x, w) by the given grouped matmul, and arguments."""
    rng = np.random.default_rng(seed)
    sizes, tokens = jnp.array(reference.uneven(rng, groups, rows)), jnp.array(rng.integers(0, T, rows), jnp.int32)
    weights = jnp.array(rng.random(rows), jnp.float32)
    gathered = name in ("gather", "swiglu")
    x = jnp.array(rng.normal(size=(T if gathered else rows, k)), dtype)
    w = jnp.array(rng.normal(size=(groups, k, n)) / np.sqrt(k), dtype)
    functions = {
        "plain": lambda x, w: matmul(x, w, sizes),
        "gather": lambda x, w: matmul(x, w, sizes, gather=tokens),
        "swiglu": lambda x, w: matmul(x, (w, w[::-1]), sizes, gather=tokens, epilogue=SwiGLU()),
        "combine": lambda x, w: matmul(x, w, sizes, epilogue=Combine(tokens, weights * x[:, 0].astype("float32"), T)),
    }
    return functions[name], x, w


def assert_agree(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


def test_the_interpreter_poisons_what_is_not_written():
    out = pl.pallas_call(lambda out: None, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32), interpret=True)()
    assert np.isnan(out).all()


def test_plain_against_float64_with_gradients():
    f, x, w = problem("plain", interpreted, rows=75, k=200, n=72, groups=4, dtype="float32")
    sizes = reference.uneven(np.random.default_rng(0), 4, 75)
    out, dx, dw = value_and_gradients(f, x, w)
    dy = np.sin(reference.grouped(x, w, sizes) + 1)
    expected = (
        reference.grouped(x, w, sizes),
        reference.grouped(dy, np.swapaxes(w, 1, 2), sizes),
        reference.contract(x, dy, sizes),
    )
    assert_agree((out, dx, dw), expected, 1e-4)


CASES = [
    (name, dict(zip(("rows", "k", "n", "groups", "dtype"), shape, strict=True)))
    for name in ("plain", "gather", "swiglu", "combine")
    for shape in (
        (75, 200, 72, 4, "float32"),
        (130, 256, 136, 6, "bfloat16"),
        (9, 40, 24, 3, "float16"),
        (9, 1, 1, 3, "bfloat16"),
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"), CASES, ids=[f"{name}-{shape['k']}-{shape['dtype']}" for name, shape in CASES]
)
def test_every_epilogue_equals_the_plain_path(name, shape):
    ours, theirs = (value_and_gradients(*problem(name, matmul, **shape)) for matmul in (interpreted, plain_jax))
    assert_agree(ours, theirs, {"float32": 1e-4, "bfloat16": 0.05, "float16": 4e-3}[shape["dtype"]])


@pytest.mark.parametrize(("name", "module"), [("combine", grouped), ("gather", gather)])
def test_what_does_not_fit_in_memory_is_not_fused_and_equal(monkeypatch, name, module):
    monkeypatch.setattr(module, "LARGE", 0)
    # A shape of its own: what was traced before, with more memory, is not traced again.
    shape = {"rows": 77, "k": 72, "n": 40, "groups": 3, "dtype": "float32"}
    ours, theirs = (value_and_gradients(*problem(name, matmul, **shape)) for matmul in (interpreted, plain_jax))
    assert_agree(ours, theirs, 1e-4)


def test_fused_layer_forward():
    rng = np.random.default_rng(0)
    sizes, tokens = jnp.array([10, 0, 25, 3]), jnp.array(rng.integers(0, T, 40), jnp.int32)
    weights = jnp.array(rng.random(40), jnp.float32)
    x = jnp.array(rng.normal(size=(T, 64)), jnp.bfloat16)
    w, w2 = (jnp.array(rng.normal(size=(4, 64, 40)) / 8, jnp.bfloat16) for _ in range(2))

    @jax.jit
    def layer(x, w, w2):
        h = interpreted(x, (w, w2), sizes, gather=tokens, epilogue=SwiGLU())
        return interpreted(h, w.swapaxes(1, 2), sizes, epilogue=Combine(tokens, weights, T), out_dtype=jnp.float32)

    h = reference.swiglu(x, (w, w2), sizes, gather=tokens)
    expected = reference.combine(h, np.swapaxes(w, 1, 2), sizes, tokens, weights, T)
    assert_agree((layer(x, w, w2),), (expected,), 0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "block", "k"),
    [("int8", None, 256), ("int8", 128, 256), ("int8", 16, 256), ("float8_e4m3fn", 128, 256), ("int8", 192, 384)],
)
def test_quantized_weights(dtype, block, k):
    _, x, w = problem("plain", plain_jax, rows=50, k=k, n=72, groups=3, dtype="float32")
    quantized, sizes = quantize(w, dtype, block=block), jnp.array([20, 0, 25])
    assert_agree((interpreted(x, quantized, sizes),), (plain_jax(x, quantized, sizes),), 1e-4)


@pytest.mark.parametrize("block", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_block_sparse(block):
    rng = np.random.default_rng(0)
    mask = rng.random((4, 3)) < 0.4
    mask[:, 1] = False
    structure = block_structure(mask, block, shape=(4 * block - 9, 3 * block))
    x = jnp.array(rng.normal(size=(45, structure.shape[0])), jnp.float32)
    blocks = jnp.array(rng.normal(size=(structure.live, block, block)) / 16, jnp.float32)
    ours, theirs = (
        value_and_gradients(
            lambda x, b, i=i: block_sparse_matmul(x, b, structure, backend=i, tiling=Tiling(rows=32)), x, blocks
        )
        for i in ("tpu_interpret", "xla")
    )
    assert_agree(ours, theirs, 1e-4)


def test_an_output_beyond_two_to_the_31_elements_lowers_for_tpus():
    rows, n = 1 << 20, 8192
    shapes = [((rows, 128), jnp.bfloat16), ((4, 128, n), jnp.bfloat16), ((4,), jnp.int32)]
    program = jax.jit(partial(grouped_matmul, backend="tpu"))
    traced = program.trace(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    lowered = traced.lower(lowering_platforms=("tpu",))
    assert lowered.out_info.shape == (rows, n) and rows * n > 1 << 31


@pytest.mark.parametrize(("width", "rows", "fits"), [(2048, 512, True), (16384, 256, True), (65536, 128, False)])
def test_wider_gathered_rows_make_shorter_tiles(width, rows, fits):
    x = jnp.zeros((8, width), jnp.bfloat16)
    tiles = gather.shorten(x, Tiles(m=512, k=1024, n=512, rows=4096, inner=width, cols=512))
    assert tiles.m == rows and gather.fits(x, tiles) == fits


@pytest.mark.parametrize(("tokens", "width", "fits"), [(4096, 512, True), (6144, 512, True), (6145, 512, False)])
def test_all_sums_of_a_combine_stay_in_half_of_the_memory_twice(tokens, width, fits):
    # Two buffers of float32 in 24 MiB: 24 * 2**20 / (2 * 4 * 512) = 6144 tokens.
    spec = GroupedSpec(np.dtype("float32"), Tiling(), "combine", num_tokens=tokens)
    tiles = Tiles(m=128, k=512, n=width, rows=4096, inner=512, cols=width)
    assert grouped._combine_fits(spec, tiles) == fits


@pytest.fixture(scope="session")
def chip():
    """A function from a topology's name to one of its devices; needs libtpu, and no TPU."""
    pytest.importorskip("libtpu", reason="pip install libtpu (the tpu extra)")
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        os.environ.setdefault(name, value)
    from jax.experimental.topologies import get_topology_desc

    return lambda name: get_topology_desc(platform="tpu", topology_name=name).devices[0]


M, K, N, G = 4000, 1024, 1536, 8
matmul = partial(grouped_matmul, backend="tpu")
BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32
X, W, SIZES, INDEX = ((M, K), BF16), ((G, K, N), BF16), ((G,), I32), ((M,), I32)


def gradient(f, count=2):
    return jax.grad(lambda *args: jnp.sum(f(*args).astype(F32)), tuple(range(count)))


def blocks_gradient(block):
    structure = block_structure(np.random.default_rng(0).random((K // block, N // block)) < 0.1, block, shape=(K, N))
    f = gradient(lambda x, b: block_sparse_matmul(x, b, structure, backend="tpu"))
    return f, [X, ((structure.live, block, block), BF16)]


def quantized(dtype, shares, k=K):
    f = lambda x, values, scales, sizes: matmul(x, Quantized(values, scales), sizes)  # noqa: E731
    return f, [((M, k), BF16), ((G, k, N), dtype), ((G, shares, N), F32), SIZES]


def odd(k, n, dtype=BF16):
    f = lambda x, w, sizes: gradient(lambda x, w: matmul(x, w, sizes))(x, w)  # noqa: E731
    return f, [((13, k), dtype), ((3, k, n), dtype), ((3,), I32)]


def swiglu_gradient(x, w, sizes, rows):
    return gradient(lambda x, w: matmul(x, (w, w), sizes, gather=rows, epilogue=SwiGLU()))(x, w)


def combine_gradient(x, w, weights, sizes, rows):
    return gradient(lambda x, w, v: matmul(x, w, sizes, epilogue=Combine(rows, v, 2000)), 3)(x, w, weights)


COMPILED = {
    "plain": (lambda x, w, sizes: gradient(lambda x, w: matmul(x, w, sizes))(x, w), [X, W, SIZES]),
    "plain, float32, odd": odd(1100, 1500, F32),
    **{f"plain, {k} x {n}": odd(k, n) for k, n in ((1, 1), (1, 8), (8, 1))},
    "gathered swiglu": (swiglu_gradient, [((2000, K), BF16), W, SIZES, INDEX]),
    "gathered swiglu, many rows": (
        swiglu_gradient,
        [((20000, 256), BF16), ((G, 256, 384), BF16), SIZES, ((140000,), I32)],
    ),
    "combine": (combine_gradient, [X, W, ((M,), F32), SIZES, INDEX]),
    "int8 by channel": quantized(jnp.int8, 1),
    "fp8 by blocks of 128": quantized(jnp.float8_e4m3fn, K // 128),
    **{f"int8 by blocks of {share}": quantized(jnp.int8, 2, 2 * share) for share in (32, 64, 96, 192)},
    "blocks of 64": blocks_gradient(64),
    "blocks of 128": blocks_gradient(128),
}


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_ahead_of_time(chip, topology, name):
    f, shapes = COMPILED[name]
    where = jax.sharding.SingleDeviceSharding(chip(topology))
    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape, dtype in shapes]
    compiled = jax.jit(f).lower(*args).compile()
    text = compiled.as_text()
    assert "tpu_custom_call" in text
    assert ("ragged_contraction_gathered" in text) == ("gathered" in name)


def test_a_weight_gradient_has_nothing_of_other_groups_and_of_rows_past_them():
    """Three groups in one tile of rows, the second empty; what is past them is NaN in both operands."""
    rng, sizes = np.random.default_rng(0), (7, 0, 12)
    x, dy = rng.normal(size=(24, 40)), rng.normal(size=(24, 24))
    x[19:] = dy[19:] = np.nan
    operands = ContractionOperands(*(jnp.array(a, jnp.float32) for a in (x, dy)), jnp.array(sizes, jnp.int32))
    found = contraction.contract(operands, ContractionSpec(np.dtype("float32"), TILES), interpret=True)
    expected = [x[:7].T @ dy[:7], np.zeros((40, 24)), x[7:19].T @ dy[7:19]]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_float16_is_computed_in_float32():
    """TPUs have none: no array of a kernel is float16, while operands and results are."""
    x, w = jnp.zeros((32, 128), jnp.float16), jnp.zeros((2, 128, 128), jnp.float16)
    run = lambda x, w: interpreted(x, w, jnp.array([8, 24]))  # noqa: E731
    kernels = [eqn for eqn in every_equation(jax.make_jaxpr(run)(x, w).jaxpr) if eqn.primitive.name == "pallas_call"]
    assert kernels and run(x, w).dtype == jnp.float16
    for eqn in kernels:
        assert "float16" not in {var.aval.dtype.name for var in (*eqn.invars, *eqn.outvars)}


def every_equation(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in inner_jaxprs(eqn.params.values()):
            yield from every_equation(inner)
