import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy.special import logsumexp

from sharding.mesh import abstract_mesh, make_mesh
from sharding.plan import Plan
from sharding.tensor_parallel import vary
from sharding.vocab_parallel import linear_cross_entropy, lookup, token_losses
from tessera.models.lm_loss import lm_loss
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.parallel.decoder import ShardedDecoder, make_loss
from tessera.parallel.pipelined_decoder import make_loss as make_pipelined

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


def float64_loss(x, head, labels, weights, z, softcap):
    """Sum of weight * (nll + z lse^2), its gradient by x and head, and the metrics, in float64 by their formulas."""
    x, head, weights = (np.asarray(each, np.float64) for each in (x, head, weights))
    logits = x @ head
    slope = np.ones_like(logits)
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
        slope = 1 - (logits / softcap) ** 2
    lse = logsumexp(logits, axis=-1)
    p, hot = np.exp(logits - lse[:, None]), np.eye(head.shape[1])[labels]
    nats = (weights * (lse - (hot * logits).sum(1))).sum()
    d_logits = weights[:, None] * (p - hot + 2 * z * lse[:, None] * p) * slope
    metrics = {"cross_entropy": nats, "accuracy": (weights * (logits.argmax(1) == labels)).sum()}
    return (nats + z * (weights * lse**2).sum(), metrics), (d_logits @ head.T, x.T @ d_logits)


@pytest.mark.parametrize("tp", [None, "tp"])
@pytest.mark.parametrize(
    "chunk, z, softcap", [(0, 0.1, 3.0), (1, 0.0, 0.0), (5, 0.1, 0.0), (5, 0.1, 3.0), (99, 0.1, 3.0)]
)
def test_chunked_loss_and_gradients_are_those_of_float64(tp, chunk, z, softcap):
    rng = np.random.default_rng(0)
    x, head = rng.normal(size=(13, 4)).astype(np.float32), rng.normal(size=(4, 24)).astype(np.float32)
    labels, weights = rng.integers(0, 24, 13).astype(np.int32), rng.uniform(size=13).astype(np.float32)
    weights[[2, 12]] = 0.0

    def loss(x, head):
        def total(x, head, labels, weights):
            x = vary(x, ("tp",)) if tp else x
            return linear_cross_entropy(x, head, labels, weights, tp, z=z, softcap=softcap, chunk=chunk)

        if tp is None:
            return total(x, head, jnp.asarray(labels), jnp.asarray(weights))
        specs = {"in_specs": (P(), P(None, "tp"), P(), P()), "out_specs": P()}
        return jax.shard_map(total, mesh=make_mesh(PLAN), **specs)(x, head, jnp.asarray(labels), jnp.asarray(weights))

    expected = float64_loss(x, head, labels, weights, z, softcap)
    chex.assert_trees_all_close(jax.jit(loss)(x, head), expected[0], rtol=1e-5)
    found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, head)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


def largest_with(vocabulary, jaxpr):
    """Elements of the largest array of one device that has an axis of the vocabulary."""
    sizes = [np.prod(shape) for shape in shapes_inside(jaxpr) if vocabulary in shape]
    return max(sizes)


@pytest.mark.parametrize("plan", ["", "dp=2, tp=4", "pp=2, dp=4"])
def test_chunked_loss_never_has_logits_of_all_tokens(plan):
    """On one device, over rows without a plan (8 devices), and under plans; forward and backward."""
    config = TransformerConfig(vocab_size=4 * 1013, layers=2, width=8, heads=4, ff=8)
    tokens = jax.ShapeDtypeStruct((16, 65), jnp.int32)
    params = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]
    vocabulary, axes = config.vocab_size // (4 if "tp" in plan else 1), Plan(plan)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",)) if not plan else make_mesh(axes)
    rows = 16 // (8 if not plan else axes.data) // (axes.microbatch_count if "pp" in plan else 1)

    def step(chunk):
        if plan:
            loss = make_pipelined(ShardedDecoder(config, axes, 1e-4, loss_chunk_size=chunk), mesh)
        else:
            loss = lm_loss(Decoder(config), 1e-4, chunk, mesh)
        return jax.value_and_grad(loss, has_aux=True)

    traced = {chunk: jax.jit(step(chunk)).trace(params, {"tokens": tokens}) for chunk in (0, 16)}
    largest = {chunk: largest_with(vocabulary, one.jaxpr.jaxpr) for chunk, one in traced.items()}
    assert largest[0] == rows * 64 * vocabulary and largest[16] == 16 * vocabulary  # the head itself has 8 rows
    if plan != "pp=2, dp=4":  # enough programs
        temporary = {chunk: one.lower().compile().memory_analysis().temp_size_in_bytes for chunk, one in traced.items()}
        logits = rows * 64 * vocabulary * 4
        assert temporary[0] > logits and temporary[16] < logits + temporary[0] - 2 * logits, (temporary, logits)


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
