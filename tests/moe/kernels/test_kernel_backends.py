"""Names of backends: what "auto" resolves to, what is refused, and the tokamax backend (a stub where it is missing)."""

import sys
from contextlib import nullcontext
from dataclasses import replace
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
from moe.kernels import (
    Combine,
    SwiGLU,
    block_sparse_matmul,
    block_structure,
    grouped_matmul,
    implementations,
    quantize,
    self_check,
    to_blocks,
    to_dense,
    tokamax_ops,
)
from moe.kernels.implementations import NAMES, VARIABLE, Backend, choose
from moe.kernels.spec import (
    BlockOperands,
    BlockSpec,
    ContractionOperands,
    ContractionSpec,
    GroupedOperands,
    GroupedSpec,
)
from moe.kernels.tiling import Tiling
from moe.kernels.xla import mixture, ops, ragged


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
    routing = jax.jit(route.top_k, static_argnums=1)(jnp.ones((6, 4)), 2)
    jax.make_jaxpr(jax.grad(lambda x: experts.mixture(params, x, routing, config)[0].sum()))(jnp.ones((6, 8)))
    assert len(seen) >= 6 and set(seen) == {"tpu_interpret"}


def test_without_tokamax_its_name_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    x, w = jnp.ones((8, 4)), jnp.ones((2, 4, 6))
    with pytest.raises(ImportError, match=r"pip install tokamax \(Python 3.12.*backend='xla'$"):
        grouped_matmul(x, w, jnp.array([3, 5]), backend="tokamax")


def test_auto_is_chosen_for_the_place_of_the_arrays(monkeypatch, said):
    x = jnp.ones(3)
    on(monkeypatch, "tpu")
    assert choose("auto") == "tpu" and choose("auto", x) == "xla"
    # A traced array has no place: that of the default device is meant.
    assert jax.eval_shape(lambda x: jnp.zeros(3 + (choose("auto", x) == "tpu")), x).shape == (4,)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        assert choose("auto") == "xla"


FLOAT = np.dtype("float32")
TILING = Tiling(rows=16)


@pytest.mark.parametrize(
    "tokens", [None, np.random.default_rng(1).integers(0, 12, 32).astype(np.int32)], ids=["rows", "gathered"]
)
def test_products_without_loops_against_float64(tokens):
    """What "xla" is on a GPU, with rows past the sum that are NaN."""
    rng = np.random.default_rng(0)
    gather, live = None if tokens is None else jnp.asarray(tokens), sum(SIZES)
    x, dy = (rng.normal(size=(n, k)).astype(np.float32) for n, k in ((32 if tokens is None else 12, 6), (32, 10)))
    dy[live:] = np.nan
    if tokens is None:
        x[live:] = np.nan
    rows = x[:live] if tokens is None else x[tokens[:live]]
    w = rng.normal(size=(len(SIZES), 6, 10)).astype(np.float32)
    sizes, spec = jnp.array(SIZES, jnp.int32), GroupedSpec(FLOAT, TILING, "swiglu", save_residuals=True)
    x, dy, w = map(jnp.asarray, (x, dy, w))
    made = ragged.grouped(GroupedOperands(x, (w, -w), (), sizes, gather), spec)
    gate = reference.grouped(rows, w, SIZES)
    for ours, theirs in zip(made, (-gate / (1 + np.exp(-gate)) * gate, gate, -gate), strict=True):
        np.testing.assert_allclose(ours[:live], theirs, atol=1e-4)
        assert not np.any(ours[live:])
    back = GroupedOperands(dy, (w,), (), sizes, tokens=gather)
    spec = GroupedSpec(FLOAT, TILING, "none" if tokens is None else "combine", transpose=True, num_tokens=12)
    dx = np.zeros((32, 6) if tokens is None else (12, 6))
    where = np.arange(live) if tokens is None else tokens[:live]
    np.add.at(dx, where, reference.grouped(dy[:live], w.swapaxes(1, 2), SIZES))
    for deterministic in (True, False):
        spec = replace(spec, deterministic=deterministic)
        np.testing.assert_allclose(ragged.grouped(back, spec), dx, atol=1e-4)
    dw = ragged.contract(ContractionOperands(x, dy, sizes, gather), ContractionSpec(FLOAT, TILING))
    np.testing.assert_allclose(dw, reference.contract(rows, dy[:live], SIZES), atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "count"),
    [([3, 0, 1, 1, 0, 2, 3], 4), ([1, 1, 0, 1, 3, 1, 1], 4), ([5, 0, 7], 8), ([0, 1, 1, 0], 2)],
    ids=["two each at most", "five of one", "fewer rows than tokens", "two each"],
)
def test_a_combine_after_a_kernel_sums_every_tokens_rows(tokens, count):
    rows, weights = np.random.default_rng(0).normal(size=(len(tokens), 5)), np.arange(len(tokens)) + 0.5
    expected = np.zeros((count, 5))
    np.add.at(expected, tokens, rows * weights[:, None])
    spec = GroupedSpec(FLOAT, TILING, "combine", num_tokens=count)
    found = jax.jit(lambda *arrays: ragged.combine(*arrays, spec))(
        jnp.asarray(rows, jnp.float32), jnp.asarray(tokens, jnp.int32), jnp.asarray(weights, jnp.float32)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("mask", [np.array([[1, 0, 0], [1, 0, 1]], bool), np.ones((2, 3), bool)])
def test_block_products_without_loops_against_the_dense_product(mask):
    rng = np.random.default_rng(0)
    structure = block_structure(mask, 64, shape=(128, 192))
    x, dy, w = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 128), (5, 192), (128, 192)))
    w *= np.kron(mask, np.ones((64, 64), np.float32))
    blocks = to_blocks(jnp.asarray(w), structure)
    forward, back = (BlockSpec(FLOAT, TILING, 64, n, t) for n, t in ((3, False), (2, True)))
    made = ragged.block_matmul(BlockOperands(x, blocks, structure.forward), forward)
    np.testing.assert_allclose(made, x @ w, atol=1e-3)
    made = ragged.block_matmul(BlockOperands(dy, blocks, structure.transposed), back)
    np.testing.assert_allclose(made, dy @ w.T, atol=1e-3)
    made = ragged.block_contract(BlockOperands(x, dy, structure.contraction), replace(forward, outputs=structure.live))
    np.testing.assert_allclose(to_dense(made, structure), (x.T @ dy) * (w != 0), atol=1e-3)


def test_a_program_for_gpus_has_no_loop_over_tiles(monkeypatch):
    """Forward and gradients of experts; the same program for a CPU has its loops."""
    monkeypatch.setattr(implementations, "platform", lambda *_: "gpu")
    monkeypatch.setattr(mixture, "platform", lambda *_: "gpu")
    implementations.call.clear_cache()
    shapes = ((16, 8), (4, 8, 12), (4, 8, 12), (4, 12, 8), (32,))
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def loss(x, gate, up, down, weights, *, combine):
        if combine:
            return mixture.mixture(x, gate, up, down, jnp.array(SIZES), TOKENS, weights).sum()
        h = grouped_matmul(x, (gate, up), jnp.array(SIZES), gather=TOKENS, epilogue=SwiGLU(), backend="xla")
        return grouped_matmul(h, down, jnp.array(SIZES), backend="xla", deterministic=False).sum()

    def loops(platform, combine=False):
        f = jax.jit(jax.grad(partial(loss, combine=combine), range(5)))
        return f.trace(*args).lower(lowering_platforms=(platform,)).as_text().count("stablehlo.while")

    assert loops("cuda", combine=True) < loops("cpu", combine=True)
    monkeypatch.setattr("moe.kernels.xla.ragged.combine", lambda rows, *_: rows[:16])
    implementations.call.clear_cache()
    # Outside of a deterministic combine, which adds one row of every token in a turn.
    assert loops("cuda") == 0 < loops("cpu")
    implementations.call.clear_cache()


def broken(kernel, operands, spec, *, interpret=False):
    out = getattr(ops, kernel)(operands, spec)
    return jax.tree.map(lambda leaf: leaf[..., ::-1], out)


def uncompiled(kernel, operands, spec, *, interpret=False):
    return jax.pure_callback(fail, jax.eval_shape(lambda: getattr(ops, kernel)(operands, spec)))


def fail():
    raise RuntimeError("ptxas fatal")


def greedy(kernel, operands, spec, *, interpret=False):
    """Reads rows past the groups, which may hold anything."""
    out = getattr(ops, kernel)(operands, spec)
    return jax.tree.map(lambda leaf: leaf + 0 * operands.x.sum(), out)


CHECKED = [
    ("plain", broken, "differ by"),
    ("plain", greedy, "differ by"),
    ("plain", uncompiled, "ptxas fatal"),
    ("plain", None, None),
]
CHECKED += [
    pytest.param(name, *case, marks=pytest.mark.slow)
    for name in ("gather", "swiglu", "combine")
    for case in ((broken, "differ by"), (None, None))
]


@pytest.mark.parametrize(("name", "kernels", "why"), CHECKED)
def test_kernels_that_fail_their_check_are_replaced_with_one_warning(monkeypatch, name, kernels, why):
    implementations.call.clear_cache()
    self_check._works.cache_clear()
    warnings, runs = [], []
    monkeypatch.setattr(self_check.logging, "warning", lambda message, *args: warnings.append(message % args))

    def stand_in(kernel):
        def run(operands, spec, *, interpret=False):
            runs.append(kernel)
            return (kernels or (lambda kernel, *args: getattr(ops, kernel)(*args)))(kernel, operands, spec)

        return run

    module = SimpleNamespace(**{kernel: stand_in(kernel) for kernel in ("grouped", "contract")}, TILINGS=ops.TILINGS)
    monkeypatch.setitem(sys.modules, "stand_in", module)
    monkeypatch.setitem(implementations.BACKENDS, "gpu", Backend("stand_in", ("cpu",)))
    rng = np.random.default_rng(0)
    x, w = (jnp.array(rng.normal(size=s), jnp.float32) for s in ((ROWS, 6), (len(SIZES), 6, 10)))

    def both(backend):
        f = partial(grouped_matmul, group_sizes=jnp.array(SIZES), backend=backend, tiling=TILING)
        out, pull = jax.vjp(jax.jit(lambda x, w: PRODUCTS[name](f, x, w)), x, w)
        return out, *pull(jnp.ones_like(out))

    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), both("gpu"), both("xla"))
    count, checked = len(warnings), len(runs)
    assert set(runs) == {"grouped", "contract"} and (count > 0) == (why is not None)
    assert all(why in line and "backend='gpu'" in line for line in warnings)
    implementations.call.clear_cache()
    both("gpu")  # the result of a check is remembered, a kernel that passed runs without another
    assert len(warnings) == count and (len(runs) == checked if why else len(runs) < 2 * checked)
    implementations.call.clear_cache()
    self_check._works.cache_clear()


@pytest.mark.parametrize(("platforms", "runs"), [(("tpu",), True), (("tpu", "cpu"), False), (("cpu",), False)])
def test_a_kernel_has_to_run_on_every_platform_of_its_program(platforms, runs):
    traced = jax.jit(lambda x: implementations._require_p.bind(x, backend="tpu")).trace(jnp.ones(3))
    names = ", ".join(platforms)
    with (
        nullcontext()
        if runs
        else pytest.raises(ValueError, match=f"backend='tpu' runs on tpu, .* compiled for {names}")
    ):
        traced.lower(lowering_platforms=platforms)


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
