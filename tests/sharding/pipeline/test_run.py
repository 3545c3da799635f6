"""The pipelined loss and gradient against plain jax.grad on one device, its memory, its collectives, and refusals."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from sharding.errors import PlanError
from sharding.pipeline.run import PipelineConfig, make_loss, make_value_and_grad
from sharding.pipeline.stages import StageLayout, split_layers, stack_stages, unstack_stages
from sharding.pipeline.ticks import StageFns

P = PartitionSpec
D, V, F, T = 8, 16, 12, 5


def embed(shared, micro):
    x_bTD = shared["embed"][micro["x"]]
    return {"x": x_bTD, "penalty": jnp.zeros(())}


def layer(params, state, micro):
    x_bTD = state["x"] * params["gain"].reshape(1, 1, -1)
    x_bTD = state["x"] + jnp.tanh(x_bTD @ params["up"]) @ params["down"]
    return {"x": x_bTD, "penalty": state["penalty"] + 0.01 * jnp.square(x_bTD).sum()}


def layer_tp(params, state, micro):
    """The same with `up` split by columns and `down` by rows over tp."""
    x_bTD = state["x"] * params["gain"].reshape(1, 1, -1)
    x_bTD = state["x"] + lax.psum(jnp.tanh(x_bTD @ params["up"]) @ params["down"], "tp")
    return {"x": x_bTD, "penalty": state["penalty"] + 0.01 * jnp.square(x_bTD).sum()}


def head_loss(shared, state, micro):
    head_DV = shared["head"] if "head" in shared else shared["embed"].T
    logp_bTV = jax.nn.log_softmax(state["x"] @ head_DV)
    nll_bT = -(logp_bTV * jax.nn.one_hot(micro["y"], V)).sum(-1)
    right = ((logp_bTV.argmax(-1) == micro["y"]) * micro["w"]).sum()
    return (nll_bT * micro["w"]).sum() + state["penalty"], micro["w"].sum(), {"accuracy": right}


FNS = StageFns(embed, layer, head_loss)


def model(layers, tied, seed=0):
    key = iter(jax.random.split(jax.random.key(seed), 5))
    draw = lambda *shape: jax.random.normal(next(key), shape) / shape[-2] ** 0.5  # noqa: E731
    shared = {"embed": draw(V, D)} | ({} if tied else {"head": draw(D, V)})
    gain = 1 + 0.1 * jax.random.normal(next(key), (layers, D))
    return shared, {"gain": gain, "up": draw(layers, D, F), "down": draw(layers, F, D)}


def data(rows, seed=0):
    draw = np.random.default_rng(seed)
    tokens = {name: jnp.asarray(draw.integers(0, V, (rows, T)), jnp.int32) for name in ("x", "y")}
    # Weights differ from row to row, so that means over microbatches are not the mean over the batch.
    return tokens | {"w": jnp.asarray(draw.random((rows, T)) ** 2, jnp.float32)}


@jax.jit
def one_device(shared, layers, batch):
    def loss(params):
        x = lax.scan(lambda x, one: (layer(one, x, batch), None), embed(params[0], batch), params[1])[0]
        total, weight, metrics = head_loss(params[0], x, batch)
        return total / weight, {"accuracy": metrics["accuracy"] / weight, "weight": weight}

    return jax.value_and_grad(loss, has_aux=True)((shared, layers))


def mesh_of(**sizes):
    count = int(np.prod(list(sizes.values())))
    return Mesh(np.array(jax.devices()[:count]).reshape(*sizes.values()), tuple(sizes))


assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)


# name: schedule, stages, dp, microbatches, layers, chunks, tied, skip_idle, keep
CASES = {
    "zb_h1 uneven": ("zb_h1", 2, 2, 4, 5, 1, False, True),
    "dualpipev uneven, keep, paired": ("dualpipev", 2, 1, 4, 5, 2, True, False, True, True),
    "1f1b uneven untied": ("1f1b", 2, 2, 4, 5, 1, False, True),
    "interleaved uneven": ("interleaved", 2, 2, 4, 9, 2, True, True),
    "1f1b uneven without branches": ("1f1b", 2, 1, 3, 3, 1, True, False),
}
MORE = {
    "1f1b keep": ("1f1b", 4, 2, 6, 4, 1, True, True, True),
    "gpipe uneven, keep": ("gpipe", 2, 1, 3, 3, 1, True, True, True),
    "interleaved keep": ("interleaved", 2, 1, 4, 9, 2, True, True, True),
    "zb_h1": ("zb_h1", 4, 2, 8, 4, 1, True, True),
    "zb_h1 keep": ("zb_h1", 4, 1, 9, 8, 1, False, True, True),
    "zb_h1 few microbatches, uneven, keep": ("zb_h1", 4, 1, 4, 7, 1, True, True, True),
    "zb_h1 one stage": ("zb_h1", 1, 2, 3, 3, 1, True, True),
    "zb_h1 eight stages": ("zb_h1", 8, 1, 10, 11, 1, True, True),
    "zb_h1 without branches": ("zb_h1", 2, 1, 4, 3, 1, True, False),
    "dualpipev": ("dualpipev", 4, 2, 8, 8, 2, True, True),
    "dualpipev uneven": ("dualpipev", 3, 1, 7, 11, 2, False, True),
    "dualpipev uneven, keep": ("dualpipev", 2, 2, 4, 7, 2, True, True, True),
    "dualpipev paired": ("dualpipev", 4, 2, 8, 8, 2, False, False, False, True),
    "dualpipev one stage": ("dualpipev", 1, 2, 3, 3, 2, False, True),
    "dualpipev few microbatches, keep": ("dualpipev", 4, 1, 4, 9, 2, True, True, True),
    "dualpipev without branches": ("dualpipev", 2, 1, 4, 5, 2, True, False, True),
    "1f1b": ("1f1b", 4, 2, 6, 4, 1, True, True),
    "gpipe uneven": ("gpipe", 4, 1, 5, 6, 1, True, True),
    "one stage": ("1f1b", 1, 2, 3, 3, 1, True, True),
    "eight stages": ("1f1b", 8, 1, 8, 11, 1, False, True),
    "interleaved even": ("interleaved", 4, 2, 8, 12, 3, False, True),
    "interleaved without branches": ("interleaved", 2, 1, 2, 7, 3, True, False),
    "gpipe wide": ("gpipe", 2, 4, 3, 4, 1, False, True),
}


def assert_one_devices(name, stages, dp, m, layers, chunks, tied, skip_idle, keep=False, paired=False):
    mesh = mesh_of(pp=stages, dp=dp)
    layout = split_layers(layers, stages, chunks, folded=name == "dualpipev")
    config = PipelineConfig(name, m, layout, skip_idle=skip_idle, keep=keep, paired=paired)
    params, batch = model(layers, tied), data(2 * dp * m)
    wanted = one_device(*params, batch)
    assert_close(jax.jit(make_value_and_grad(FNS, mesh, config))(*params, batch), wanted)
    return mesh, config, params, batch, wanted


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_loss_and_gradient_are_those_of_one_device(case):
    assert_one_devices(*case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE.values(), ids=MORE)
def test_more_losses_and_gradients_are_those_of_one_device(case):
    mesh, config, params, batch, wanted = assert_one_devices(*case)
    assert_close(jax.jit(make_loss(FNS, mesh, config))(*params, batch), wanted[0])


def test_parameters_stored_in_parts_over_every_axis_and_layers_split_over_tp():
    mesh = mesh_of(pp=2, dp=2, tp=2)
    params, batch = model(3, True), data(8)
    layout = split_layers(3, 2)
    config = PipelineConfig("1f1b", 2, layout, other_axes=("tp",), arranged=True)
    shared_specs = {"embed": P(("pp", "dp"))}
    layer_specs = {"gain": P("dp"), "up": P("dp", "tp"), "down": P("tp", "dp")}
    run = jax.jit(make_value_and_grad(StageFns(embed, layer_tp, head_loss), mesh, config, shared_specs, layer_specs))
    value, (shared, layers) = run(params[0], stack_stages(params[1], layout), batch)
    assert_close((value, (shared, unstack_stages(layers, layout))), one_device(*params, batch))
    assert layers["up"].sharding.spec == P("pp", "dp", "tp") and shared["embed"].sharding.spec == P(("pp", "dp"))


def test_forward_passes_alone_give_the_loss():
    mesh, config = mesh_of(pp=2, dp=1), PipelineConfig("interleaved", 2, split_layers(5, 2, 2))
    params, batch = model(5, True), data(4)
    assert_close(jax.jit(make_loss(FNS, mesh, config))(*params, batch), one_device(*params, batch)[0])


@pytest.mark.parametrize("schedule, growth", [("1f1b", 0), ("gpipe", 1), ("zb_h1", 0)])
def test_temporary_memory_grows_with_microbatches_by_stage_inputs_for_gpipe_and_not_for_others(schedule, growth):
    stages, rows, few, many, time = 2, 2, 4, 64, 32
    mesh, (shared, layers) = mesh_of(pp=stages, dp=1), model(2, True)
    memory = []
    for m in (few, many):
        batch = {name: jnp.zeros((rows * m, time), leaf.dtype) for name, leaf in data(1).items()}
        run = make_value_and_grad(FNS, mesh, PipelineConfig(schedule, m, split_layers(2, stages)))
        memory.append(jax.jit(run).lower(shared, layers, batch).compile().memory_analysis().temp_size_in_bytes)
    one_input = 4 * rows * time * D
    # All have a row of the table per tick (20 bytes of F, B or W); 1F1B's inputs are 2 p - 1 whatever m is; ZB-H1 has
    # residuals for 2 (p - 1) W besides.
    tables = (many - few) * 64
    assert memory[1] - memory[0] <= (many - few) * one_input * growth + tables, memory
    assert memory[1] - memory[0] >= (many - few) * one_input * growth, memory


def loops_and_sums(jaxpr, inside=False):
    """(is it inside a loop, axes) of every psum and reduce-scatter in a jaxpr."""
    for eqn in jaxpr.eqns:
        if "psum" in eqn.primitive.name or "reduce_scatter" in eqn.primitive.name:
            axes = eqn.params.get("axes", eqn.params.get("axis_name"))
            yield inside, axes if isinstance(axes, tuple) else (axes,)
        for value in eqn.params.values():
            for sub in value if isinstance(value, (tuple, list)) else (value,):
                sub = getattr(sub, "jaxpr", sub)
                if hasattr(sub, "eqns"):
                    yield from loops_and_sums(sub, inside or eqn.primitive.name in ("scan", "while"))


def test_gradients_are_summed_over_devices_once_after_the_last_tick():
    mesh, config = mesh_of(pp=2, dp=2, tp=2), PipelineConfig("1f1b", 2, split_layers(2, 2), other_axes=("tp",))
    specs = {"gain": P(), "up": P(None, "tp"), "down": P("tp")}
    run = make_value_and_grad(StageFns(embed, layer_tp, head_loss), mesh, config, P(), specs)
    found = list(loops_and_sums(jax.make_jaxpr(run)(*model(2, True), data(4)).jaxpr))
    assert {axes for inside, axes in found if inside} == {("tp",)}, "only the layers' own sums are in the loops"
    outside = [axis for inside, axes in found if not inside for axis in axes]
    assert {"pp", "dp"} <= set(outside)


def config_for(stages=2, m=2, layers=2, schedule="1f1b", **how):
    return PipelineConfig(schedule, m, split_layers(layers, stages), **how)


def call(rows, **sizes):
    run = make_value_and_grad(FNS, mesh_of(**sizes), config_for(m=4))
    return run(*model(2, True), data(rows))


REFUSED = {
    "stages": (lambda: make_value_and_grad(FNS, mesh_of(pp=4, dp=1), config_for()), "2 stages.*'pp' has 4 devices"),
    "axis": (
        lambda: make_value_and_grad(FNS, mesh_of(pp=2), config_for()),
        "needs mesh axis 'dp'; the mesh has {'pp': 2}",
    ),
    "few": (lambda: make_value_and_grad(FNS, mesh_of(pp=4, dp=1), config_for(4, 3, 4)), "take at least 4 microbatches"),
    "batch": (lambda: call(12, pp=2, dp=2), "12 rows do not divide into 2 .*dp.* x 4 microbatches; take 8 or 16 rows"),
    "small batch": (lambda: call(4, pp=2, dp=2), "take 8 rows"),
    "layers": (lambda: split_layers(3, 4), "3 layers cannot be cut into 4 stages x 1 chunks = 4 parts; take at most 3"),
    "counts": (lambda: StageLayout((2, 2, 1), 2), "3 layer counts .* 2 are needed"),
    "empty part": (lambda: StageLayout((2, 0), 2), "needs at least 1 layer"),
    "leaf": (lambda: stack_stages({"up": jnp.zeros((3, 2))}, split_layers(4, 2)), "up has shape .* the 4 layers"),
}


@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_run_is_refused_with_the_numbers(make, message):
    with pytest.raises(PlanError, match=message):
        make()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 6))
def test_stacking_by_stage_keeps_order_within_parts_and_is_undone(stages, chunks, extra):
    layout = split_layers(stages * chunks + extra, stages, chunks)
    assert max(layout.counts) - min(layout.counts) <= 1 and layout.layers == stages * chunks + extra
    layers = {"a": np.arange(1, layout.layers + 1)[:, None] * np.ones((1, 2))}
    placed = stack_stages(layers, layout)
    np.testing.assert_array_equal(unstack_stages(placed, layout)["a"], layers["a"])
    by_part = np.asarray(placed["a"])[:, 0].reshape(stages, chunks, layout.slots).swapaxes(0, 1).reshape(-1)
    np.testing.assert_array_equal(by_part[by_part > 0], np.arange(1, layout.layers + 1))
