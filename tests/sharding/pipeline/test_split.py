"""The split backward pass: numbers of jax.vjp, products where they belong, and what a tick's works wait for."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sharding.analysis import count_products
from sharding.errors import PlanError
from sharding.pipeline import (
    PipelineConfig,
    StageFns,
    lockstep_schedule,
    make_value_and_grad,
    split_layer,
    split_layers,
)
from sharding.pipeline.lockstep import phases

T, D, F = 6, 8, 12
WEIGHTS = 3 * D * F  # of a layer


def wide(gain_D, x):
    return gain_D.reshape([1] * (x.ndim - 1) + [-1])


def gated(params, x_TD, micro):
    h_TD = x_TD * wide(params["gain"], x_TD) + micro["shift"].sum()
    return x_TD + (jax.nn.silu(h_TD @ params["gate"]) * (h_TD @ params["up"])) @ params["down"]


def looped(params, x_TD, micro):
    """The same channels in a loop of two halves, whose gradients are loops too."""
    halves = [jnp.stack(jnp.split(params[name], 2, axis)) for name, axis in (("gate", 1), ("up", 1), ("down", 0))]

    def add(y_TD, half):
        gate, up, down = half
        return y_TD + (jax.nn.silu(x_TD * wide(params["gain"], x_TD) @ gate) * (x_TD @ up)) @ down, None

    return lax.scan(add, x_TD + micro["shift"].sum(), halves)[0]


def shared(params, x_TD, micro):
    """A kernel that is used twice, so that one product waits for the other's gradient."""
    del micro
    return jnp.tanh(jnp.tanh(x_TD @ params["gate"] @ params["down"]) @ params["gate"] @ params["down"]) * wide(
        params["gain"], x_TD
    )


dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
LAYERS = {
    "gated": gated,
    "jit": jax.jit(gated),
    "full": jax.checkpoint(gated),
    "dots": jax.checkpoint(gated, policy=dots),
    "looped": looped,
    "shared": shared,
}


def arguments():
    key = iter(jax.random.split(jax.random.key(0), 7))
    draw = lambda *shape: jax.random.normal(next(key), shape) / shape[0] ** 0.5  # noqa: E731
    params = {"gain": 1 + draw(D), "gate": draw(D, F), "up": draw(D, F), "down": draw(F, D)}
    return params, draw(T, D), {"shift": draw(3)}, draw(T, D)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_the_parts_together_are_the_vector_jacobian_product(layer):
    params, x_TD, micro, d_TD = arguments()
    split = split_layer(layer, params, x_TD, micro)

    @jax.jit
    def parts(params, x_TD, d_TD):
        y_TD, saved = split.forward(params, micro, x_TD)
        d_x_TD, rest = split.backward(params, micro, saved, d_TD)
        return y_TD, d_x_TD, split.weights(params, micro, rest)

    y_TD, pull = jax.vjp(lambda params, x_TD: layer(params, x_TD, micro), params, x_TD)
    d_params, d_x_TD = pull(d_TD)
    chex.assert_trees_all_close(parts(params, x_TD, d_TD), (y_TD, d_x_TD, d_params), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "layer, again", [(gated, 0), (jax.checkpoint(gated), 2), (jax.checkpoint(gated, policy=dots), 0)]
)
def test_products_of_the_weights_gradients_are_w_and_no_others(layer, again):
    """A layer of products with weights alone: F, B and W have as many FLOPs each; two products are computed again."""
    params, x_TD, micro, d_TD = arguments()
    split = split_layer(layer, params, x_TD, micro)
    y_TD, saved = jax.eval_shape(lambda: split.forward(params, micro, x_TD))
    _, rest = jax.eval_shape(lambda saved: split.backward(params, micro, saved, d_TD), saved)
    one = 2 * T * WEIGHTS
    flops = lambda run, *of: sum(one.flops for one in count_products(run, *of))  # noqa: E731
    assert flops(lambda: split.forward(params, micro, x_TD)) == one
    assert flops(lambda saved: split.backward(params, micro, saved, d_TD), saved) == one + again * one / 3
    weights = jax.make_jaxpr(lambda rest: split.weights(params, micro, rest))(rest)
    assert flops(lambda rest: split.weights(params, micro, rest), rest) == one
    # W has its products and what turns them: all that prepares them is B's, also the gradient of the gain.
    assert {eqn.primitive.name for eqn in weights.eqns} == {"dot_general", "transpose"}
    # Operands of the three products, once each, and the gain's gradient.
    assert sorted(leaf.shape for leaf in rest) == sorted([(D,), (T, D), (T, D), (T, F), (T, F), (T, F)])
    assert (len(saved) == 1) == (again == 2)


EMBED = lambda shared, micro: micro["x"] @ shared["in"]  # noqa: E731


def head_loss(shared, x_bTD, micro):
    del micro
    return ((x_bTD @ shared["out"]) ** 2).sum(), jnp.float32(x_bTD.shape[0]), {}


def program(config, layer=gated):
    """The jaxpr of a step of a pipeline of two stages, and its products."""
    from jax.sharding import AbstractMesh, AxisType

    mesh = AbstractMesh((2, 2), ("pp", "dp"), axis_types=(AxisType.Auto,) * 2)
    micro_layer = lambda params, x, micro: layer(params, x, {"shift": micro["x"][..., 0]})  # noqa: E731
    run = make_value_and_grad(StageFns(EMBED, micro_layer, head_loss), mesh, config)
    shared = {"in": jnp.zeros((3, D)), "out": jnp.zeros((D, 1))}
    params = jax.tree.map(lambda leaf: jnp.zeros((4, *leaf.shape)), arguments()[0])
    batch = {"x": jnp.zeros((2 * config.microbatches, T, 3))}
    return jax.make_jaxpr(run)(shared, params, batch), count_products(run, shared, params, batch)


@pytest.mark.parametrize("schedule, m", [("1f1b", 6), ("zb_h1", 6), ("dualpipev", 5)])
def test_a_step_runs_the_products_of_its_table(schedule, m):
    """With what F saves, nothing is computed again: a tick's F, B and W are each the products of a stage's weights."""
    folded = schedule == "dualpipev"
    config = PipelineConfig(schedule, m, split_layers(4, 2, 1 + folded, folded), keep=True)
    _, products = program(config)
    found = sum(one.flops * one.runs for one in products if one.flops >= 2 * T * D * F)
    table = phases(lockstep_schedule(schedule, 2, m))
    works = sum(len(phase.rows) * (len(phase.kinds) + (schedule == "1f1b") * ("B" in phase.kinds)) for phase in table)
    layers = 4 // 2 // config.layout.chunks
    assert found == works * layers * 2 * T * WEIGHTS


def ancestors(eqns, start):
    """The equations that some equations wait for, transitively."""
    made = {var: n for n, eqn in enumerate(eqns) for var in eqn.outvars}
    found, waiting = set(), list(start)
    while waiting:
        for var in eqns[waiting.pop()].invars:
            n = None if hasattr(var, "val") else made.get(var)
            if n is not None and n not in found:
                found.add(n)
                waiting.append(n)
    return found


def bodies(jaxpr):
    """A jaxpr and all inside it."""
    yield jaxpr
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from bodies(inner)


def exchanging(params, x_bTD, micro):
    """A layer that sends its result round, as experts' tokens are."""
    return lax.all_to_all(gated(params, x_bTD, micro), "dp", 1, 1, tiled=True)


def test_a_pair_of_forward_and_backward_is_one_loop_in_which_neither_waits_for_the_other():
    """What F sends may be on its way while B computes, and the other way round."""
    config = PipelineConfig("dualpipev", 5, split_layers(4, 2, 2, folded=True), keep=True, paired=True)
    pairs = 0
    for body in bodies(program(config, exchanging)[0].jaxpr):
        sends = [n for n, eqn in enumerate(body.eqns) if eqn.primitive.name == "all_to_all"]
        if len(sends) != 2:
            continue
        pairs += 1
        products = {n for n, eqn in enumerate(body.eqns) if eqn.primitive.name == "dot_general"}
        before = [ancestors(body.eqns, [send]) for send in sends]
        assert not (before[0] & set(sends) or before[1] & set(sends))
        after = [{n for n in products if send in ancestors(body.eqns, [n])} for send in sends]
        # Of F the exchange ends the layer, of B it begins it: its three products wait for it and for nothing of F.
        assert sorted(map(len, after)) == [0, 3]
        assert [len(one & products) for one in sorted(before, key=len)] == [0, 3]
        assert not (max(before, key=len) & max(after, key=len))
    assert pairs == 2, "phases FB and FBW"


def test_pairs_need_independent_works():
    with pytest.raises(PlanError, match="only dualpipev"):
        PipelineConfig("zb_h1", 4, split_layers(4, 2), paired=True).table()
    with pytest.raises(PlanError, match="chunks=2, folded=True"):
        PipelineConfig("dualpipev", 4, split_layers(4, 2, 2)).table()
    assert np.array_equal(split_layers(4, 2, 2, folded=True).index, [0, 3, 1, 2])
