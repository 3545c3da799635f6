"""The Hopper kernels against float64 numpy: interpreted, with memory that starts as NaN, and (marker gpu) on a GPU.

Nothing here needs more than jax, numpy and pytest. `make test-gpu` runs `gpu_checks.py`.
"""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import kernel_reference as reference
import numpy as np
import pytest

from moe.kernels import Combine, SwiGLU, block_sparse_matmul, block_structure, grouped_matmul, quantize
from moe.kernels.implementations import hopper
from moe.kernels.tiling import Tiling

if jax.__version_info__ < (0, 11):
    pytest.skip(f"Mosaic GPU kernels need JAX 0.11 (Python 3.12), this is {jax.__version__}", allow_module_level=True)

SIZES = {
    "uneven": ((30, 0, 135, 7), 180),
    "nothing is left over": ((8, 64, 56), 128),
    "one group": ((100,), 100),
    "all in one of many": ((0, 0, 70, 0), 75),
    "all empty": ((0, 0), 20),
    "single rows": ((1, 1, 0, 1, 3), 9),
    "more groups than rows": ((2, 0, 0, 3, 0, 0, 2, 0, 0, 0, 0, 2), 9),
}
slow, on_gpu = pytest.mark.slow, pytest.mark.gpu
gpu = partial(grouped_matmul, backend="gpu")


@pytest.fixture(autouse=True, scope="module")
def knowing_interpreter():
    """Interpret what the kernels do on a GPU, also where JAX's interpreter cannot and they would do otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            import gpu_interpreter

            gpu_interpreter.teach(patch)
        except (ImportError, AttributeError) as error:
            warnings.warn(f"this JAX's interpreter learns nothing: {error}", stacklevel=1)
        yield


@pytest.fixture(params=["gpu_interpret", pytest.param("gpu", marks=on_gpu)])
def backend(request):
    if request.param == "gpu" and not hopper():
        pytest.skip("needs an Nvidia GPU of compute capability 9.0")
    return request.param


@pytest.fixture
def matmul(backend):
    return partial(grouped_matmul, backend=backend)


def arrays(sizes, rows, k, n, dtype, *, integers=False):
    """x, w and dy, NaN in the rows past the sum, which nothing may read."""
    rng = np.random.default_rng(0)
    draw = partial(rng.integers, -2, 3) if integers else lambda size: rng.normal(size=size)
    x, w, dy = (np.asarray(draw(size=shape), float) for shape in ((rows, k), (len(sizes), k, n), (rows, n)))
    x[sum(sizes) :] = dy[sum(sizes) :] = np.nan
    return (jnp.asarray(v, dtype) for v in (x, w if integers else w / k**0.5, dy))


def wide(x):
    """As float64; what is not a number counts as zero."""
    return np.nan_to_num(np.asarray(x, np.float64))


def assert_close(ours, theirs, tolerance):
    ours = np.asarray(ours, np.float64)
    assert ours.shape == theirs.shape and np.isfinite(ours).all()
    np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max(initial=1))


TOLERANCE = {"bfloat16": 0.006, "float16": 8e-4}
SHAPES = [("single rows", 64, 64, "float16")]
SHAPES += [(name, 128, 192, "bfloat16") for name in SIZES] + [
    ("uneven", 72, 40, "float16"),
    ("uneven", 64, 264, "bfloat16"),
]


@pytest.mark.parametrize(
    ("name", "k", "n", "dtype"),
    [pytest.param(*shape, marks=[] if shape is SHAPES[0] else slow) for shape in SHAPES],
    ids=[f"{name}-{k}x{n}-{dtype}" for name, k, n, dtype in SHAPES],
)
def test_the_three_products_against_float64(matmul, name, k, n, dtype):
    sizes, rows = SIZES[name]
    x, w, dy = arrays(sizes, rows, k, n, dtype)
    counts = jnp.array(sizes, jnp.int32)

    @jax.jit
    def products(x, w, dy):
        out, pull = jax.vjp(lambda x, w: matmul(x, w, counts), x, w)
        return out, *pull(dy)

    out, dx, dw = products(x, w, dy)
    assert_close(out, reference.grouped(wide(x), wide(w), sizes), TOLERANCE[dtype])
    assert_close(dx, reference.grouped(wide(dy), wide(w).swapaxes(1, 2), sizes), TOLERANCE[dtype])
    assert_close(dw, reference.contract(wide(x), wide(dy), sizes), TOLERANCE[dtype])


@slow
def test_gradients_are_finite_differences(matmul):
    """Of small whole numbers, whose products and sums are exact: the difference quotient is too."""
    sizes, rows = SIZES["uneven"]
    x, w, dy = (jnp.nan_to_num(v) for v in arrays(sizes, rows, 64, 64, "float16", integers=True))
    f = jax.jit(lambda x, w: matmul(x, w, jnp.array(sizes), out_dtype=jnp.float32))
    dx, dw = jax.vjp(f, x, w)[1](dy.astype(jnp.float32))
    for value, gradient, shifted in ((x, dx, f(x + x, w)), (w, dw, f(x, w + w[::-1]))):
        step = wide(value if value is x else w[::-1])
        difference = np.sum((wide(shifted) - wide(f(x, w))) * wide(dy))
        assert difference == np.sum(wide(gradient) * step)


def fused(name, matmul, tokens, weights, sizes):
    any_order = partial(matmul, deterministic=False)
    added = lambda w: Combine(tokens, w, 60)  # noqa: E731
    return {
        "gather": lambda x, w: matmul(x, w, sizes, gather=tokens),
        "swiglu": lambda x, w: matmul(x, (w, w[::-1]), sizes, gather=tokens, epilogue=SwiGLU()),
        "combine": lambda x, w: matmul(x, w, sizes, epilogue=added(weights * x[:, 0].astype("float32"))),
        "gather, any order": lambda x, w: any_order(x, w, sizes, gather=tokens),
        "combine, any order": lambda x, w: any_order(x, w, sizes, epilogue=added(weights * x[:, 0].astype("float32"))),
        "sum, any order": lambda x, w: any_order(x, w, sizes, gather=tokens, epilogue=added(None)),
    }[name]


@slow
@pytest.mark.parametrize(
    ("name", "alike", "k"),
    [
        *[("gather", False, 64), ("swiglu", False, 64), ("combine", False, 64), ("combine", True, 64)],
        *[("gather, any order", True, 64), ("combine, any order", False, 64), ("sum, any order", False, 64)],
        # The weight gradient's tiles have 128 of K, and two blocks have neighboring ones.
        *[("gather", False, 128), ("gather", False, 256)],
    ],
)
def test_epilogues_equal_the_plain_path(matmul, name, alike, k):
    sizes, rows = SIZES["uneven"]
    rng = np.random.default_rng(1)
    # Three rows for every token, or any number.
    tokens = rng.permutation(np.repeat(np.arange(60), 3)) if alike else rng.integers(0, 60, rows)
    tokens = jnp.array(tokens, jnp.int32)
    weights, counts = jnp.array(rng.random(rows), jnp.float32), jnp.array(sizes, jnp.int32)
    x, w, _ = arrays(sizes, rows, k, 136, "bfloat16")
    x = jnp.nan_to_num(x)[: rows if name.startswith("combine") else 60]
    results = []
    for run in (matmul, partial(grouped_matmul, backend="xla")):
        f = fused(name, run, tokens, weights, counts)
        out, pull = jax.jit(partial(jax.vjp, f))(x, w)
        results.append((out, *pull(jnp.ones_like(out))))
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, wide(theirs), 0.02)


QUANTIZED = [("single rows", 64, 64, "int8", None), ("uneven", 128, 64, "int8", 64), ("uneven", 72, 136, "int8", None)]
QUANTIZED += [("uneven", 128, 136, "float8_e4m3fn", 64), ("uneven", 128, 64, "int8", 32)]
QUANTIZED += [("single rows", 64, 64, "float8_e5m2", None)]


@pytest.mark.parametrize(
    ("name", "k", "n", "dtype", "block"),
    [pytest.param(*case, marks=[] if case is QUANTIZED[0] else slow) for case in QUANTIZED],
)
def test_quantized_weights_and_gathered_rows(matmul, name, k, n, dtype, block):
    """Against float64 products of the dequantized weight; where a step would meet two scales it is widened before."""
    sizes, rows = SIZES[name]
    rng = np.random.default_rng(0)
    x, w = jnp.array(rng.normal(size=(17, k)), jnp.bfloat16), jnp.array(rng.normal(size=(2, len(sizes), k, n)))
    gate, up = (quantize(each.astype(jnp.float32) / k**0.5, dtype, block=block) for each in w)
    tokens = jnp.array(rng.integers(0, 17, rows), jnp.int32)
    out = matmul(x, (gate, up), jnp.array(sizes), gather=tokens, epilogue=SwiGLU())
    g, u = (
        reference.grouped(
            wide(x)[tokens], wide(each.values) * np.repeat(each.scales, k // each.scales.shape[1], 1), sizes
        )
        for each in (gate, up)
    )
    assert_close(out, g / (1 + np.exp(-g)) * u, 0.01)


@pytest.mark.parametrize(
    ("block", "density"), [(64, 0.4), *(pytest.param(*case, marks=slow) for case in ((128, 0.5), (64, 0.0), (64, 1.0)))]
)
def test_block_sparse(backend, block, density):
    rng = np.random.default_rng(0)
    mask = rng.random((3, 2)) < density
    # One output column without live blocks, and a weight that ends inside its last blocks.
    mask[:, 1] &= density == 1
    structure = block_structure(mask, block, shape=(3 * block - 9, 2 * block))
    x = jnp.array(rng.normal(size=(45, structure.shape[0])), jnp.bfloat16)
    blocks = jnp.array(rng.normal(size=(structure.live, block, block)) / 16, jnp.bfloat16)

    def value_and_gradients(backend):
        f = partial(block_sparse_matmul, structure=structure, backend=backend)
        out, pull = jax.jit(lambda x, b: jax.vjp(f, x, b))(x, blocks)
        return out, *pull(jnp.sin(out))

    for ours, theirs in zip(*map(value_and_gradients, (backend, "xla")), strict=True):
        assert_close(ours, wide(theirs), 0.02)


@slow
@pytest.mark.parametrize("tiling", [Tiling(256, 64, 128), Tiling(128, 128, 64), Tiling(128, 64, 192)], ids=str)
def test_every_tile_size_gives_the_same(matmul, tiling):
    sizes, rows = SIZES["uneven"]
    x, w, _ = arrays(sizes, rows, 128, 256, "bfloat16")
    out = jax.jit(partial(matmul, tiling=tiling))(x, w, jnp.array(sizes))
    assert_close(out, reference.grouped(wide(x), wide(w), sizes), 0.006)


def test_float32_runs_as_plain_jax(matmul):
    x, w = jnp.ones((16, 8)), jnp.ones((2, 8, 4))
    out = matmul(x, w, jnp.array([3, 5]))
    np.testing.assert_array_equal(out, np.repeat([8.0, 0.0], 8)[:, None] * np.ones((16, 4)))


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        (Tiling(64, 64, 256), "Tiling.rows=64 on a GPU: choose one of 128, 256"),
        (Tiling(256, 64, 256), "rows x cols may be at most 128 x 256"),
    ],
    ids=["rows", "registers"],
)
def test_tiles_that_cannot_be_are_refused(tiling, message):
    x, w = jnp.ones((16, 64), jnp.bfloat16), jnp.ones((2, 64, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=message):
        grouped_matmul(x, w, jnp.array([3, 5]), tiling=tiling, backend="gpu_interpret")


def test_forcing_the_kernels_where_they_cannot_run_is_refused():
    if hopper():
        pytest.skip("they can run here")
    x, w = jnp.ones((16, 64), jnp.bfloat16), jnp.ones((2, 64, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="'gpu' runs on (cuda|compute capability 9.0)"):
        grouped_matmul(x, w, jnp.array([3, 5]), backend="gpu")


class Device:
    device_kind = "an A100"

    def __init__(self, capability):
        self.compute_capability = capability


@pytest.mark.filterwarnings("ignore:no measured tile sizes")
@pytest.mark.parametrize("capability", ["8.0", "10.0"])
def test_other_gpus_are_refused(monkeypatch, capability):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device(capability)])
    # A shape of its own: what was traced for another device is not traced again.
    x, w = jnp.ones((16, 64), jnp.bfloat16), jnp.ones((2, 64, int(float(capability))), jnp.bfloat16)
    with pytest.raises(ValueError, match=f"compute capability 9.0 .* an A100 with {capability}"):
        grouped_matmul(x, w, jnp.array([3, 5]), backend="gpu")


@on_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("groups", [8, 64])
def test_large_products_on_a_gpu(groups, dtype):
    """Thousands of rows, against float32 products of each group: what an interpreter is too slow for."""
    if not hopper():
        pytest.skip("needs an Nvidia GPU of compute capability 9.0")
    rng, (rows, k, n) = np.random.default_rng(groups), (12345, 1536, 1408)
    sizes = reference.uneven(rng, groups, rows)
    x, w, dy = (jnp.asarray(v, dtype) for v in (rng.normal(size=s) for s in ((rows, k), (groups, k, n), (rows, n))))
    out, pull = jax.jit(partial(jax.vjp, lambda x, w: gpu(x, w, jnp.array(sizes))))(x, w)
    dx, dw = pull(dy)
    for g, part in enumerate(reference.rows_by_group(sizes)):
        with jax.default_matmul_precision("highest"):
            xs, ws, dys = (v.astype(jnp.float32) for v in (x[part], w[g], dy[part]))
            expected = (xs @ ws, dys @ ws.T, xs.T @ dys)
        for ours, theirs in zip((out[part], dx[part], dw[g]), expected, strict=True):
            if theirs.size:
                assert_close(ours, wide(theirs), TOLERANCE[dtype])
    assert not np.any(wide(out[sizes.sum() :])) and not np.any(wide(dx[sizes.sum() :]))


@on_gpu
def test_beyond_two_to_the_31_elements_on_a_gpu():
    if not hopper():
        pytest.skip("needs an Nvidia GPU of compute capability 9.0")
    rows, k, n = (1 << 19) + 8, 64, 4160
    x = jnp.ones((rows, k), jnp.bfloat16) * (jnp.arange(rows) % 7)[:, None].astype(jnp.bfloat16)
    w = jnp.ones((3, k, n), jnp.bfloat16) * jnp.arange(1, 4, dtype=jnp.bfloat16)[:, None, None]
    sizes = jnp.array([rows // 2, 0, rows // 2 - 5])
    out = jax.jit(gpu)(x, w, sizes)
    assert rows * n > 1 << 31
    group = np.where(np.arange(rows) < rows // 2, 1, 3) * (np.arange(rows) < rows - 5)
    np.testing.assert_array_equal(wide(out[:, -1]), k * (np.arange(rows) % 7) * group)
    np.testing.assert_array_equal(wide(out[:, 0]), wide(out[:, -1]))
