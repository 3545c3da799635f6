import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy.special import logsumexp

from sharding.mesh import abstract_mesh, make_mesh
from sharding.plan import Plan
from sharding.vocab_parallel import lookup, token_losses
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.parallel.decoder import ShardedDecoder, make_loss

PLAN = Plan("tp=8")


def test_losses_from_parts_of_the_logits_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    logits = (10 * rng.normal(size=(2, 3, 40))).astype(np.float32)
    logits[0, 0, [7, 30]] = 60.0  # two equal largest ones: the first counts
    labels = rng.integers(0, 40, (2, 3)).astype(np.int32)
    labels[0, 0], labels[0, 1] = 30, logits[0, 1].argmax()
    parts = jax.shard_map(
        lambda logits, labels: token_losses(logits, labels, "tp"),
        mesh=make_mesh(PLAN),
        in_specs=(P(None, None, "tp"), P()),
        out_specs=P(),
    )
    nll, lse, right = jax.jit(parts)(logits, labels)
    wide = logits.astype(np.float64)
    expected = logsumexp(wide, axis=-1)
    np.testing.assert_allclose(lse, expected, rtol=1e-6)
    np.testing.assert_allclose(nll, expected - np.take_along_axis(wide, labels[..., None], -1)[..., 0], atol=1e-5)
    np.testing.assert_array_equal(right, wide.argmax(-1) == labels)
    assert right[0, 0] == 0 and right[0, 1] == 1


def test_rows_of_a_split_table():
    table = np.arange(48.0, dtype=np.float32).reshape(16, 3)
    tokens = np.array([[0, 15, 7], [8, 1, 2], [16, -1, 2**31 - 1]], np.int32)
    summed = jax.shard_map(
        lambda tokens, table: jax.lax.psum(lookup(tokens, table, "tp"), "tp"),
        mesh=make_mesh(PLAN),
        in_specs=(P(), P("tp")),
        out_specs=P(),
    )
    expected = np.concatenate([table[tokens[:2]], np.full((1, 3, 3), np.nan)])  # ids outside the vocabulary
    np.testing.assert_array_equal(jax.jit(summed)(tokens, table), expected)
    np.testing.assert_array_equal(lookup(jnp.asarray(tokens), jnp.asarray(table), None), expected)


def shapes_inside(jaxpr, inside=False):
    """Shapes of every array within shard_map, where they are one device's."""
    for equation in jaxpr.eqns:
        within = inside or equation.primitive.name == "shard_map"
        if inside:
            yield from (variable.aval.shape for variable in equation.outvars)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield from shapes_inside(value, within)


@pytest.mark.parametrize("tied, sequence", [(False, False), (True, True)])
def test_no_device_ever_has_logits_of_the_whole_vocabulary(tied, sequence):
    vocabulary = 8 * 37  # no other size of the model is a multiple of 37
    config = TransformerConfig(vocab_size=vocabulary, layers=1, width=16, heads=8, head_dim=2, ff=8, tied=tied)
    plan = Plan("tp=8", sequence=sequence)
    tokens = jax.ShapeDtypeStruct((2, 17), jnp.int32)
    params = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]
    step = jax.value_and_grad(make_loss(ShardedDecoder(config, plan), abstract_mesh(plan)), has_aux=True)
    shapes = set(shapes_inside(jax.make_jaxpr(step)(params, {"tokens": tokens}).jaxpr))
    assert any(37 in shape for shape in shapes)
    assert not [shape for shape in shapes if vocabulary in shape]
