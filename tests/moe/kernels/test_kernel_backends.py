"""Names of backends: what "auto" resolves to, what is refused, and the tokamax backend (a stub where it is missing)."""

import sys
from functools import partial
from types import SimpleNamespace
from typing import get_args

import jax
import jax.numpy as jnp
import kernel_reference as reference
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from moe import experts, route
from moe.kernels import Combine, SwiGLU, block_sparse_matmul, block_structure, grouped_matmul, implementations, quantize
from moe.kernels.implementations import NAMES, VARIABLE, choose


class Device:
    device_kind = "a device"

    def __init__(self, capability):
        self.compute_capability = capability


@pytest.fixture
def said(monkeypatch):
    """Messages of the log, each once."""
    found = []
    monkeypatch.setattr(
        implementations.logging, "log_first_n", lambda _, message, n, *args: found.append(message % args)
    )
    monkeypatch.delenv(VARIABLE, raising=False)
    return found


def on(monkeypatch, platform, capability="9.0"):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "devices", lambda: [Device(capability)])


@pytest.mark.parametrize(
    ("platform", "capability", "installed", "expected"),
    [
        ("cpu", "", True, "xla"),
        ("tpu", "", True, "tpu"),
        ("gpu", "9.0", True, "tokamax"),
        ("gpu", "9.0", False, "xla"),
        ("gpu", "10.0", True, "tokamax"),
        ("gpu", "7.5", True, "xla"),
        ("gpu", "gfx942", True, "xla"),  # an AMD GPU
    ],
)
def test_auto_by_platform_and_what_it_logs(monkeypatch, said, platform, capability, installed, expected):
    on(monkeypatch, platform, capability)
    monkeypatch.setitem(sys.modules, "tokamax", SimpleNamespace() if installed else None)
    assert choose("auto") == expected
    assert len(said) == (platform != "cpu") and all(f"is {expected!r}" in line for line in said)


def test_the_environment_overrides_auto_alone(monkeypatch, said):
    monkeypatch.setenv(VARIABLE, "gpu_interpret")
    assert choose("auto") == "gpu_interpret" and choose("xla") == "xla"
    monkeypatch.setenv(VARIABLE, "auto")
    assert choose("auto") == "xla"
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(ValueError, match=f"{VARIABLE}='cuda': choose one of auto, xla, tpu"):
        choose("auto")


def test_a_mixture_takes_the_same_names():
    assert get_args(experts.Backend) == NAMES and get_args(experts.Dispatch) == experts.DISPATCHES
    # Under the tests' import hook jaxtyping is first to object.
    for wrong in ({"backend": "cpu"}, {"dispatch": "sparse"}):
        with pytest.raises((ValueError, TypeCheckError), match=str(next(iter(wrong)))):
            experts.MixtureConfig(**wrong)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"], ids=["fused", "unfused"])
def test_a_mixtures_backend_reaches_every_kernel_unchanged(monkeypatch, activation):
    seen = []

    def run(kernel, backend, operands, spec):
        seen.append(backend)
        return implementations.call(kernel, "xla", operands, spec)

    monkeypatch.setattr("moe.kernels.grouped.call", run)
    params = experts.initialize(8, 12, 4, activation, key=jax.random.key(0))
    config = experts.MixtureConfig(activation, backend="tpu_interpret")
    routing = route.top_k(jnp.ones((6, 4)), 2)
    jax.grad(lambda x: experts.mixture(params, x, routing, config)[0].sum())(jnp.ones((6, 8)))
    assert len(seen) >= 6 and set(seen) == {"tpu_interpret"}


def test_without_tokamax_its_name_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    x, w = jnp.ones((8, 4)), jnp.ones((2, 4, 6))
    with pytest.raises(ImportError, match=r"pip install tokamax \(Python 3.12.*backend='xla'$"):
        grouped_matmul(x, w, jnp.array([3, 5]), backend="tokamax")


class Stub:
    """`tokamax.ragged_dot_general` by a product per row, with NaN where its kernels write nothing."""

    def __init__(self):
        self.options = []
        self.refuse = False

    def ragged_dot_general(self, x, w, sizes, dimensions, *, preferred_element_type, **options):
        self.options.append(options)
        if self.refuse:
            raise NotImplementedError("no kernel")
        (_, (w_axis,)), _ = dimensions.dot_dimension_numbers
        assert tuple(dimensions.lhs_ragged_dimensions) == (0,)
        group_M = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(x.shape[0]), side="right")
        if dimensions.rhs_group_dimensions:
            w = jnp.append(
                w if w_axis == 1 else w.swapaxes(1, 2), jnp.full_like(w[:1], jnp.nan).reshape(1, x.shape[1], -1), 0
            )
            out = jnp.einsum("mk,mkn->mn", x, w[group_M], preferred_element_type=jnp.float32)
        else:
            hot_MG = (group_M[:, None] == jnp.arange(sizes.shape[0])[None]).astype(x.dtype)
            out = jnp.einsum("mg,mk,mn->gkn", hot_MG, x, w, preferred_element_type=jnp.float32)
        return out.astype(preferred_element_type)


@pytest.fixture(params=["stub", "tokamax"])
def tokamax(request, monkeypatch):
    implementations.call.clear_cache()
    if request.param == "tokamax":
        yield pytest.importorskip("tokamax", reason="pip install tokamax (Python 3.12)")
    else:
        monkeypatch.setitem(sys.modules, "tokamax", stub := Stub())
        yield stub
    implementations.call.clear_cache()


SIZES, ROWS, T = (9, 0, 14, 5), 32, 12
TOKENS = jnp.array(np.random.default_rng(1).integers(0, T, ROWS), jnp.int32)
WEIGHTS = jnp.array(np.random.default_rng(2).random(ROWS), jnp.float32)
PRODUCTS = {
    "plain": lambda f, x, w: f(x, w),
    "gather": lambda f, x, w: f(x[:T], w, gather=TOKENS),
    "swiglu": lambda f, x, w: f(x[:T], (w, w[::-1]), gather=TOKENS, epilogue=SwiGLU()),
    "combine": lambda f, x, w: f(x, w, epilogue=Combine(TOKENS, WEIGHTS, T)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_tokamax_equals_plain_jax_with_its_gradients(tokamax, name, dtype):
    rng = np.random.default_rng(0)
    x, w = (jnp.array(rng.normal(size=s) / 3, dtype) for s in ((ROWS, 16), (len(SIZES), 16, 24)))
    if name in ("plain", "combine"):  # rows past the sum may hold anything
        x = x.at[sum(SIZES) :].set(jnp.nan)
    results = []
    for backend in ("tokamax", "xla"):
        matmul = partial(grouped_matmul, group_sizes=jnp.array(SIZES), backend=backend)

        @jax.jit
        def both(x, w, matmul=matmul):
            out, pull = jax.vjp(lambda x, w: PRODUCTS[name](matmul, x, w), x, w)
            return out, *pull(jnp.sin(out))

        results.append(both(x, w))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        ours, theirs = (np.asarray(leaf, np.float64) for leaf in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=1e-5 if dtype == "float32" else 0.03, rtol=1e-2)


def test_tokamax_with_quantized_weights_vmap_and_blocks(tokamax):
    rng = np.random.default_rng(0)
    x, w = (jnp.array(rng.normal(size=s) / 4, "float32") for s in ((2, ROWS, 16), (len(SIZES), 16, 24)))
    matmul = partial(grouped_matmul, group_sizes=jnp.array(SIZES), backend="tokamax")
    quantized = quantize(w, block=8)
    meant = np.asarray(quantized.values, np.float64) * np.repeat(quantized.scales, 8, axis=1)
    out = jax.vmap(lambda x: matmul(x, quantized))(x)
    for i in range(2):
        np.testing.assert_allclose(out[i], reference.grouped(x[i], meant, SIZES), atol=1e-5)
    structure = block_structure(np.eye(2, dtype=bool), 64, shape=(128, 128))
    blocks = jnp.ones((2, 64, 64))
    out = block_sparse_matmul(jnp.ones((3, 128)), blocks, structure, backend="tokamax")
    np.testing.assert_array_equal(out, np.full((3, 128), 64.0))


@pytest.mark.parametrize(
    ("dtype", "k", "refuse", "calls"),
    [("bfloat16", 64, False, 2), ("bfloat16", 64, True, 2), ("float32", 64, False, 0), ("bfloat16", 40, False, 0)],
    ids=["its kernels", "refused", "float32", "narrow"],
)
def test_what_tokamax_kernels_do_not_support_on_a_gpu_runs_as_plain_jax(monkeypatch, said, dtype, k, refuse, calls):
    from moe.kernels import tokamax_ops
    from moe.kernels.spec import ContractionOperands, ContractionSpec, GroupedOperands, GroupedSpec
    from moe.kernels.tiling import Tiling

    on(monkeypatch, "gpu")
    monkeypatch.setitem(sys.modules, "tokamax", stub := Stub())
    stub.refuse = refuse
    rng = np.random.default_rng(0)
    x, w, dy = (jnp.array(rng.normal(size=s), dtype) for s in ((ROWS, k), (len(SIZES), k, 64), (ROWS, 64)))
    x, dy = x[:30], dy[:30]  # not a multiple of 64
    sizes, spec = jnp.array(SIZES, jnp.int32), (np.dtype("float32"), Tiling(rows=16))
    out = tokamax_ops.grouped(GroupedOperands(x, (w,), (), sizes), GroupedSpec(*spec))
    np.testing.assert_allclose(out, reference.grouped(x, w, SIZES), atol=1e-3)
    out = tokamax_ops.contract(ContractionOperands(x, dy, sizes), ContractionSpec(*spec))
    np.testing.assert_allclose(out, reference.contract(x, dy, SIZES), atol=1e-3)
    assert stub.options == [{"implementation": "mosaic", "bypass_device_check": False}] * calls
    assert len(said) == (0 if calls and not refuse else 2)
