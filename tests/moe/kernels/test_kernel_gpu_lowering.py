"""CUDA lowering for an H200 on a machine without one: layouts, descriptors and shared memory of every speed shape."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.bench_kernels import get_config
from moe import experts, route
from moe.kernels import Combine, SwiGLU, block_sparse_matmul, block_structure, grouped_matmul
from moe.kernels.quantize import Quantized
from moe.kernels.tiling import Tiling

if jax.__version_info__ < (0, 11):
    pytest.skip(f"Mosaic GPU kernels need JAX 0.11 (Python 3.12), this is {jax.__version__}", allow_module_level=True)

from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec, use_abstract_mesh

from moe.kernels.hopper import ring

H200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
matmul = partial(grouped_matmul, backend="gpu")
BF16, I32 = jnp.bfloat16, jnp.int32


def lower(f, *shapes):
    args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=H200)):
        return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def kernels(text):
    """Number of Mosaic GPU kernels in a program."""
    return len(re.findall(r"custom_call @mosaic_gpu_v2", text))


def three_products(f):
    return lambda x, w, dy: (f(x, w), jax.vjp(f, x, w)[1](dy))


def grouped(m, k, n, groups):
    f = lambda x, w, dy, sizes: three_products(lambda x, w: matmul(x, w, sizes))(x, w, dy)  # noqa: E731
    return f, [((m, k), BF16), ((groups, k, n), BF16), ((m, n), BF16), ((groups,), I32)]


def blocks(m, k, n, block, density):
    mask = np.random.default_rng(0).random((k // block, n // block)) < density
    structure = block_structure(mask, block, shape=(k, n))
    f = three_products(lambda x, b: block_sparse_matmul(x, b, structure, backend="gpu"))
    return f, [((m, k), BF16), ((structure.live, block, block), BF16), ((m, n), BF16)]


def layer(m, d, ff, groups):
    """Both products of routed experts with everything asked to be fused."""

    def f(x, up, down, sizes, rows, weights, dy):
        def both(x, up, down):
            h = matmul(x, (up, up), sizes, gather=rows, epilogue=SwiGLU())
            return matmul(h, down, sizes, epilogue=Combine(rows, weights, x.shape[0]))

        return jax.vjp(both, x, up, down)[1](dy)

    rows = [((groups,), I32), ((m,), I32), ((m,), jnp.float32), ((m // 8, d), BF16)]
    return f, [((m // 8, d), BF16), ((groups, d, ff), BF16), ((groups, ff, d), BF16), *rows]


HOPPER = get_config("hopper")
SPEED = {f"grouped {case}": (grouped, case) for case in HOPPER.grouped}
SPEED |= {f"blocks {case}": (blocks, case) for case in HOPPER.blocks}
SPEED |= {f"layer {case}": (layer, case) for case in HOPPER.grouped[1:2]}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPEED)
def test_every_shape_of_the_speed_table_lowers(name):
    build, case = SPEED[name]
    f, shapes = build(*case)
    # A layer: SwiGLU that keeps gate and up, and two input and two weight gradients (gate and up call the same ones).
    assert kernels(lower(f, *shapes)) == (5 if build is layer else 3)


ROUTED = [((64, 256), BF16), ((4,), I32), ((512,), I32)]


def routed(x, sizes, rows, *w):
    """SwiGLU of gathered rows; w: gate and up, or values and scales of each."""
    pair = (Quantized(*w[:2]), Quantized(*w[2:])) if len(w) == 4 else w
    return matmul(x, pair, sizes, gather=rows, epilogue=SwiGLU())


def test_no_copy_of_the_tokens_and_none_of_the_weights():
    """All arrays that programs around the kernel make are as long as the tokens are many: row numbers and metadata."""
    weights = [((4, 256, 128), BF16)] * 2
    text = lower(routed, *ROUTED, *weights)
    assert kernels(text) == 1 and "512x256" not in text
    quantized = [((4, 256, 128), jnp.int8), ((4, 2, 128), jnp.float32)] * 2
    text = lower(routed, *ROUTED, *quantized)
    assert kernels(text) == 1 and "4x256x128xbf16" not in text
    # The check can fail: a share of 32 rows is narrower than a step, and such weights are widened first.
    narrow = [((4, 256, 128), jnp.int8), ((4, 8, 128), jnp.float32)] * 2
    assert "4x256x128xbf16" in lower(routed, *ROUTED, *narrow)


def test_nothing_as_long_as_the_rows_around_gradients_of_gathered_rows_and_sums():
    """512 rows of 96 picked tokens: of their width (256, 128) nothing lies in memory but what a caller gave."""

    def weight_gradient(x, sizes, rows, w, dy):
        return jax.vjp(lambda w: matmul(x, w, sizes, gather=rows), w)[1](dy)

    def summed(h, w, sizes, rows, weights, deterministic=False):
        combine = Combine(rows, weights, 96)
        return matmul(h, w, sizes, epilogue=combine, deterministic=deterministic)

    routed = [((4,), I32), ((512,), I32)]
    text = lower(weight_gradient, ((96, 256), BF16), *routed, ((4, 256, 128), BF16), ((512, 128), BF16))
    assert kernels(text) == 1 and "512x256" not in text
    shapes = [((512, 256), BF16), ((4, 256, 128), BF16), *routed, ((512,), jnp.float32)]
    text = lower(summed, *shapes)
    assert kernels(text) == 1 and "512x128" not in text and "output_operand_alias<" in text
    assert "512x128" in lower(partial(summed, deterministic=True), *shapes)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_mixture_says_whether_its_kernels_may_add_in_any_order(deterministic):
    def mixture(x, gate, up, down, logits):
        params = {"gate": gate, "up": up, "down": down}
        routing = route.top_k(logits, 2)
        return experts.fused(params, x, routing, backend="gpu", deterministic=deterministic)

    up = (4, 128, 192), BF16
    text = lower(mixture, ((96, 128), BF16), up, up, ((4, 192, 128), BF16), ((96, 4), jnp.float32))
    assert kernels(text) == 2 and ("output_operand_alias<" in text) != deterministic


def test_odd_shapes_lower():
    f, shapes = grouped(13, 100, 72, 3)
    assert kernels(lower(f, *shapes)) == 3


def test_an_output_beyond_two_to_the_31_elements_lowers():
    rows, n = 1 << 20, 8192
    text = lower(matmul, ((rows, 64), BF16), ((4, 64, n), BF16), ((4,), I32))
    assert f"tensor<{rows}x{n}xbf16>" in text and rows * n > 1 << 31


def test_too_much_shared_memory_is_caught(monkeypatch):
    f, shapes = grouped(256, 512, 256, 2)
    with pytest.raises(ValueError, match="Choose smaller rows or cols in Tiling"):
        monkeypatch.setattr(ring, "SHARED", 1 << 16)
        lower(f, *shapes)
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        monkeypatch.setattr(ring, "SHARED", 1 << 20)
        lower(f, *shapes)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("tiling", [Tiling(256, 64, 128), Tiling(128, 128, 64), Tiling(128, 64, 192)], ids=str)
def test_every_tile_size_lowers(dtype, tiling):
    text = lower(partial(matmul, tiling=tiling), ((300, 256), dtype), ((4, 256, 512), dtype), ((4,), I32))
    assert kernels(text) == 1
    gathered = lambda x, w, sizes, rows: matmul(x, w, sizes, gather=rows, tiling=tiling)  # noqa: E731
    text = lower(gathered, ((70, 256), dtype), ((4, 256, 512), dtype), ((4,), I32), ((300,), I32))
    assert kernels(text) == 1
    summed = lambda x, w, sizes, rows: matmul(  # noqa: E731
        x, w, sizes, epilogue=Combine(rows, None, 70), tiling=tiling, deterministic=False
    )
    text = lower(summed, ((300, 256), dtype), ((4, 256, 512), dtype), ((4,), I32), ((300,), I32))
    assert kernels(text) == 1 and "300x512" not in text
    quantized = lambda x, values, scales, sizes: matmul(x, Quantized(values, scales), sizes, tiling=tiling)  # noqa: E731
    weight = ((4, 256, 512), jnp.int8), ((4, 2, 512), jnp.float32)
    text = lower(quantized, ((300, 256), dtype), *weight, ((4,), I32))
    assert kernels(text) == 1 and f"4x256x512x{'bf16' if dtype == 'bfloat16' else 'f16'}" not in text


def test_under_vmap():
    many = jax.vmap(lambda x, sizes, w: matmul(x, w, sizes), (0, 0, None))
    shapes = [((3, 64, 128), BF16), ((3, 4), I32), ((4, 128, 64), BF16)]
    assert kernels(lower(many, *shapes)) == 1


def test_under_scan_and_recomputation():
    def loss(x, ws, sizes, rows):
        one = partial(matmul, gather=rows, epilogue=Combine(rows, None, 64), deterministic=False)
        step = jax.checkpoint(lambda x, w: (one(x, w, sizes), None))
        return jnp.sum(jax.lax.scan(step, x, ws)[0].astype(jnp.float32))

    shapes = ((64, 128), BF16), ((3, 4, 128, 128), BF16), ((4,), I32), ((96,), I32)
    # Once forward, and backward both gradients: a loop's body is in the program once, whatever its length.
    assert kernels(lower(jax.grad(loss, (0, 1)), *shapes)) == 3


@pytest.mark.parametrize("fused", [False, True])
def test_under_shard_map(fused):
    mesh = AbstractMesh((2,), ("ep",), axis_types=(AxisType.Auto,), abstract_device=H200)
    spec = PartitionSpec("ep")

    def layer(x, sizes, rows, w):
        options = {"gather": rows[0], "epilogue": Combine(rows[0], None, 64), "deterministic": False} if fused else {}
        return matmul(x[0], w, sizes[0], **options)[None]

    def loss(x, w, sizes, rows):
        split = jax.shard_map(layer, mesh=mesh, in_specs=spec, out_specs=spec)
        return jnp.sum(split(x, sizes, rows, w).astype(jnp.float32))

    shapes = ((2, 64, 128), BF16), ((4, 128, 64), BF16), ((2, 2), I32), ((2, 96), I32)
    with use_abstract_mesh(mesh):
        lowered = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(*[jax.ShapeDtypeStruct(*s) for s in shapes])
        assert kernels(lowered.lower(lowering_platforms=("cuda",)).as_text()) == 3


@pytest.mark.slow
def test_tokamax_kernels_lower_for_hopper(monkeypatch):
    """Forward and both gradients of odd row numbers, float32 results, and a call under vmap."""
    pytest.importorskip("tokamax", reason="pip install tokamax (Python 3.12)")
    from tokamax._src import gpu_utils

    from moe.kernels import tokamax_ops

    real = tokamax_ops.load().ragged_dot_general
    monkeypatch.setattr(gpu_utils, "is_sm90", lambda *_: True)
    monkeypatch.setattr(tokamax_ops, "on_gpu", lambda: True)
    monkeypatch.setattr(
        "tokamax.ragged_dot_general", lambda *args, **options: real(*args, **options | {"bypass_device_check": True})
    )
    monkeypatch.setattr("jax.extend.backend.get_default_device", lambda: H200)
    matmul = partial(grouped_matmul, backend="tokamax")
    shapes = ((300, 256), BF16), ((4, 256, 512), BF16), ((300, 512), BF16), ((4,), I32)
    f = lambda x, w, dy, sizes: three_products(lambda x, w: matmul(x, w, sizes))(x, w, dy)  # noqa: E731
    assert kernels(lower(f, *shapes)) == 3
    assert kernels(lower(lambda x, w, s: matmul(x, w, s, out_dtype=jnp.float32), *shapes[:2], shapes[3])) == 1
    many = lambda x, w, s: jax.vmap(lambda x, s: matmul(x, w, s))(x, s)  # noqa: E731
    assert kernels(lower(many, ((2, 300, 256), BF16), shapes[1], ((2, 4), I32))) == 1
