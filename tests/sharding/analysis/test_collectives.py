from collections import Counter

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from sharding.analysis.collectives import Collective, count_collectives, count_products, totals
from sharding.mesh import abstract_mesh
from sharding.plan import Plan
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.parallel.decoder import ShardedDecoder, make_loss
from tessera.step import init_state, make_train_step


def test_kinds_bytes_trips_and_causes():
    def work(x):
        def body(x, _):
            with jax.named_scope("loop"):
                x = jax.lax.psum_scatter(x, "tp", tiled=True)
                return jax.lax.all_gather(x, "tp", tiled=True).astype(jnp.float32), None

        x = jax.lax.scan(body, x, None, length=5)[0]
        y = jax.lax.ppermute(x.astype(jnp.bfloat16), "dp", [(0, 1), (1, 0)])
        y = jax.lax.cond(x.sum() > 0, lambda y: jax.lax.all_to_all(y, "tp", 0, 0, tiled=True), lambda y: y * 2, y)
        return jax.lax.psum(y.astype(jnp.float32), ("dp", "tp"))

    mesh = abstract_mesh(Plan("dp=2, tp=4"))
    found = count_collectives(
        jax.jit(jax.shard_map(work, mesh=mesh, in_specs=P(("dp", "tp")), out_specs=P())), jnp.ones(64)
    )
    scopes = [one.scope for one in found]
    # A device has 8 of the 64 float32 numbers.
    assert [Collective(one.kind, one.axes, one.group, one.count, one.bytes, "") for one in found] == [
        Collective("reduce-scatter", ("tp",), 4, 5, 32, ""),
        Collective("all-gather", ("tp",), 4, 5, 32, ""),
        Collective("permute", ("dp",), 2, 1, 16, ""),
        Collective("all-to-all", ("tp",), 4, 1, 16, ""),
        Collective("all-reduce", ("dp", "tp"), 8, 1, 32, ""),
    ]
    assert all("loop" in scope for scope in scopes[:2]) and "loop" not in scopes[2]
    assert totals(found) == {
        "reduce-scatter": (5, 5 * 32 * 3 / 4),
        "all-gather": (5, 5 * 32 * 3 / 4),
        "permute": (1, 16.0),
        "all-to-all": (1, 16 * 3 / 4),
        "all-reduce": (1, 2 * 32 * 7 / 8),
    }


def gradient_collectives(config, plan, batch_size, length, *, backward=True):
    tokens = jax.ShapeDtypeStruct((batch_size, length + 1), jnp.int32)
    params = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]
    loss = make_loss(ShardedDecoder(config, plan), abstract_mesh(plan))
    function = jax.value_and_grad(loss, has_aux=True) if backward else loss
    return count_collectives(function, params, {"tokens": tokens})


# Megatron-LM's counts per layer: Shoeybi et al. 2019, figure 4; Korthikanti et al. 2022, figure 5. The split residual
# stream also sums the gradients of its two norm gains, a vector each.
@pytest.mark.parametrize(
    "sequence, forward, both",
    [
        (False, {"all-reduce": 2}, {"all-reduce": 4}),
        (True, {"all-gather": 2, "reduce-scatter": 2}, {"all-gather": 4, "reduce-scatter": 4, "gains": 2}),
    ],
)
def test_a_layers_collectives_are_megatrons(sequence, forward, both):
    layers, width = 3, 16
    config = TransformerConfig(vocab_size=32, layers=layers, width=width, heads=4, ff=24)
    for backward, expected in ((False, forward), (True, both)):
        found = gradient_collectives(config, Plan("tp=4", sequence=sequence), 2, 8, backward=backward)
        counts = Counter()
        for one in found:
            if "layer/" in one.scope + "/":
                activation = one.bytes == 2 * 8 * width * 4
                assert one.axes == ("tp",) and (activation or one.bytes == width * 4)
                counts["gains" if not activation else one.kind] += one.count
        assert counts == {kind: layers * count for kind, count in expected.items()}


def test_zero_3_gathers_each_parameter_twice_and_scatters_each_gradient_once():
    config = TransformerConfig(vocab_size=32, layers=3, width=16, heads=4, ff=24, dtype="bfloat16", tied=False)
    found = gradient_collectives(config, Plan("fsdp=8"), 8, 8)
    kernels = 4 * 16 * 16 + 3 * 16 * 24
    by_kind = Counter()
    for one in found:
        if "layer/" in one.scope + "/" and one.kind != "all-reduce":
            by_kind[one.kind] += one.count * one.bytes
    # bfloat16: two bytes each. The backward pass gathers again, so full parameters never wait for it.
    assert by_kind == {"all-gather": 2 * 2 * 3 * kernels, "reduce-scatter": 2 * 3 * kernels}


@pytest.mark.slow
@pytest.mark.parametrize("sequence", [False, True])
def test_the_bytes_of_a_step_of_a_0_96b_model(sequence):
    """fsdp 32 x tp 8: at most 5.5 GB per device and step, where constraints placed naively moved 14.5."""
    config = TransformerConfig(
        vocab_size=32768, layers=16, width=2048, heads=16, ff=5632, dtype="bfloat16", remat="full", tied=False
    )
    plan, tx = Plan("fsdp=32, tp=8", sequence=sequence), optax.adamw(1e-3)
    parts = ShardedDecoder(config, plan)
    parts.check(32, 2048)
    tokens = jax.ShapeDtypeStruct((32, 2049), jnp.int32)
    state = jax.eval_shape(
        lambda key, tokens: init_state(Decoder(config).init(key, tokens)["params"], tx), jax.random.key(0), tokens
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == pytest.approx(0.956e9, rel=1e-3)
    step = make_train_step(make_loss(parts, abstract_mesh(plan)), tx)
    found = count_collectives(step, state, {"tokens": tokens}, jax.random.key(0))
    total = totals(found)
    assert 1e9 < sum(moved for _, moved in total.values()) <= 5.5e9 and "all-to-all" not in total


def test_products_are_counted_with_their_trips():
    def work(x, w):
        def body(x, _):
            with jax.named_scope("inside"):
                return x @ w, None

        x = jax.lax.scan(body, x, None, length=5)[0]
        return jax.lax.cond(x.sum() > 0, lambda: (x @ w) @ w, lambda: x)

    mesh = abstract_mesh(Plan("dp=2"))
    function = jax.shard_map(work, mesh=mesh, in_specs=(P("dp"), P()), out_specs=P("dp"))
    found = count_products(function, jnp.ones((8, 4)), jnp.ones((4, 4)))
    # One device has 4 of the 8 rows: 2 x 4 x 4 x 4 FLOPs, and 3 arrays of 16 float32.
    assert [(one.flops, one.bytes, one.runs) for one in found] == [(128, 192, 5), (128, 192, 1), (128, 192, 1)]
    assert "inside" in found[0].scope
