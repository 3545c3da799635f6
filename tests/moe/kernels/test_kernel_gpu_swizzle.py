"""Every part of shared memory that the Hopper kernels access is where TMA, wgmma and registers agree on its bytes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.kernels import Combine, SwiGLU, block_sparse_matmul, block_structure, grouped_matmul, implementations, quantize
from moe.kernels.spec import ContractionOperands, ContractionSpec
from moe.kernels.tiling import Tiling

if jax.__version_info__ < (0, 12):
    pytest.skip(f"Pallas interprets the kernels since JAX 0.12, this is {jax.__version__}", allow_module_level=True)

import gpu_interpreter
import swizzle_emulator
from swizzle_emulator import View, mistaken

ROWS, G, T = 24, 2, 12
SIZES = jnp.array([13, 8], jnp.int32)
matmul = partial(grouped_matmul, backend="gpu_interpret")
RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.integers(0, T, ROWS), jnp.int32)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.bfloat16)


W = draw(G, 64, 128)


def gradients(f, *args):
    out, pull = jax.vjp(f, *args)
    return pull(jnp.ones_like(out))


def blocks(block):
    structure = block_structure(np.ones((1, 1), bool), block, shape=(block, block))
    f = partial(block_sparse_matmul, structure=structure, backend="gpu_interpret")
    gradients(f, draw(16, block), draw(1, block, block))


def contract(tokens):
    operands = ContractionOperands(draw(ROWS if tokens is None else T, 256), draw(ROWS, 64), SIZES, tokens)
    spec = ContractionSpec(np.dtype("float32"), Tiling(128, 64, 256))
    return implementations.call("contract", "gpu_interpret", operands, spec)


# Each runs its kernels, forward and backward where they differ.
KERNELS = {
    "grouped": lambda: matmul(draw(ROWS, 128), draw(G, 128, 128), SIZES),
    "input gradient": lambda: gradients(lambda x: matmul(x, W, SIZES), draw(ROWS, 64)),
    "gathered": lambda: matmul(draw(T, 128), draw(G, 128, 64), SIZES, gather=TOKENS),
    "gathered, steps of 128": lambda: matmul(
        draw(T, 256), draw(G, 256, 64), SIZES, gather=TOKENS, tiling=Tiling(128, 128, 64)
    ),
    "weight gradient": lambda: contract(None),
    "weight gradient of gathered rows": lambda: contract(TOKENS),
    "swiglu": lambda: matmul(draw(ROWS, 64), (draw(G, 64, 64),) * 2, SIZES, epilogue=SwiGLU()),
    "combine": lambda: matmul(
        draw(ROWS, 64), draw(G, 64, 64), SIZES, epilogue=Combine(TOKENS, None, T), deterministic=False
    ),
    **{
        dtype: partial(lambda dtype: matmul(draw(ROWS, 64), quantize(draw(G, 64, 128), dtype), SIZES), dtype)
        for dtype in ("int8", "float8_e4m3fn")
    },
    "blocks of 64": lambda: blocks(64),
    "blocks of 128": lambda: blocks(128),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_the_units_agree_on_every_part_that_a_kernel_accesses(monkeypatch, name):
    # What was traced before does not know the emulator.
    implementations.call.clear_cache()
    gpu_interpreter.teach(monkeypatch)
    seen = swizzle_emulator.watch(monkeypatch)
    jax.block_until_ready(KERNELS[name]())
    assert {view.unit for view in seen} == {"tma", "wgmma", "registers"}
    assert len(seen) > 20 or "gathered" not in name
    assert {view: why for view in seen if (why := mistaken(view))} == {}
    implementations.call.clear_cache()


def test_registers_swap_eights_in_a_part_that_begins_in_mid_pattern():
    """Of 128 columns in rows of two tiles, the second 64 as a part of their own, and from a slot of chunks."""
    second = (slice(0, 64), slice(64, 128))
    assert "elsewhere" in mistaken(View("registers", (64, 128), 2, (1, 64), 128, (second,)))
    assert mistaken(View("registers", (64, 128), 2, (1, 64), 128, ((slice(0, 64), slice(0, 64)),))) is None
    assert mistaken(View("tma", (64, 128), 2, (1, 64), 128, ((slice(3, 4), slice(0, 128)),))) is None
    assert mistaken(View("registers", (2, 64, 64), 2, (1, 64), 128, ((1,),))) is None
    # A box is dense: TMA does not write a row into two chunks.
    assert "elsewhere" in mistaken(View("tma", (2, 64, 64), 2, (1, 64), 128, ((slice(0, 2), slice(3, 4)),)))
    assert "descriptor" in mistaken(View("wgmma", (64, 128), 2, (1, 64), 128, (second,)))
    assert mistaken(View("wgmma", (64, 128), 2, (8, 64), 128, (second,))) is None
