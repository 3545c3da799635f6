"""The exchange of experts' tokens (all-to-all over ep) waits for nothing that could run beside it, nor that for it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from moe.gate import RouterConfig
from moe.layer import MoEConfig
from sharding.mesh import abstract_mesh
from sharding.plan import Plan
from tessera.models.transformer import TransformerConfig, param_shapes
from tessera.parallel import pipelined_decoder
from tessera.parallel.decoder import ShardedDecoder

# Shared experts of a width of their own (40 = 2 experts of 20), by which their products are known.
MOE = MoEConfig(balance_scope="sequence", shared=2, ff=20, router=RouterConfig("top_k", 4, 2))
CONFIG = TransformerConfig(vocab_size=32, layers=4, width=16, heads=4, ff=24, mlp="routed", moe=MOE)
BATCH = {"tokens": jax.ShapeDtypeStruct((8, 17), jnp.int32)}


def step(plan, changes=None, **options):
    """The jaxpr of the loss and its gradient under a plan, all calls in it inlined where they are not loops."""
    decoder = ShardedDecoder(replace(CONFIG, **changes or {}), Plan(plan, **options))
    loss = pipelined_decoder.make_loss(decoder, abstract_mesh(decoder.plan))
    return jax.make_jaxpr(jax.value_and_grad(loss, has_aux=True))(param_shapes(decoder.config), BATCH).jaxpr


def bodies(jaxpr):
    yield jaxpr
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from bodies(inner)


def waits(eqns, start):
    """The equations that one waits for, transitively."""
    made = {var: n for n, eqn in enumerate(eqns) for var in eqn.outvars}
    found, waiting = set(), [start]
    while waiting:
        for var in eqns[waiting.pop()].invars:
            n = None if hasattr(var, "val") else made.get(var)
            if n is not None and n not in found:
                found.add(n)
                waiting.append(n)
    return found


def rows(eqn):
    """Whether an equation exchanges rows of tokens (and not their counts)."""
    return (
        eqn.primitive.name in ("all_to_all", "ragged_all_to_all")
        and eqn.invars[0].aval.ndim > 1
        and eqn.invars[0].aval.dtype == jnp.float32
    )


def is_shared(eqn):
    shapes = [var.aval.shape for var in (*eqn.invars, *eqn.outvars)]
    return eqn.primitive.name == "dot_general" and any(40 in shape for shape in shapes)


@pytest.mark.parametrize("plan, options", [("ep=2", {}), ("pp=2, ep=2", {"schedule": "zb_h1"})])
def test_shared_experts_and_the_exchange_do_not_wait_for_each_other(plan, options):
    """In the forward pass no shared product waits for an exchange, nor the other way round."""
    found = 0
    for body in bodies(step(plan, **options)):
        sends = [n for n, eqn in enumerate(body.eqns) if rows(eqn)]
        shared = [n for n, eqn in enumerate(body.eqns) if is_shared(eqn)]
        if len(sends) != 2 or len(shared) != 3:  # forward bodies alone: out and back, gate and up and down
            continue
        found += 1
        before = {n: waits(body.eqns, n) for n in (*sends, *shared)}
        assert sends[0] in before[sends[1]], "the way back waits for the way out"
        assert not any(before[send] & set(shared) for send in sends)
        assert not any(before[product] & set(sends) for product in shared)
    assert found


@pytest.mark.long
def test_the_exchange_of_one_microbatch_runs_beside_the_products_of_another():
    """DualPipeV: in the loop over the layers of a pair, each of F and B has products for the exchanges of the other."""
    found = 0
    for body in bodies(step("pp=2, ep=2", {"layers": 4}, schedule="dualpipev", microbatches=4)):
        sends = [n for n, eqn in enumerate(body.eqns) if rows(eqn)]
        if len(sends) != 4:  # F: out and back; B: their transposes
            continue
        found += 1
        before = {n: waits(body.eqns, n) for n in sends}
        chains = {frozenset(before[n] & set(sends)) | {n} for n in sends}
        pairs = [chain for chain in chains if len(chain) == 2]
        assert len(pairs) == 2 and not pairs[0] & pairs[1], (
            "two exchanges of F, two of B, that do not wait for each other"
        )
        products = [n for n, eqn in enumerate(body.eqns) if eqn.primitive.name == "dot_general"]
        for pair in pairs:
            free = [
                n for n in products if not waits(body.eqns, n) & pair and not any(n in before[send] for send in pair)
            ]
            assert len(free) >= 6, "the other's products"
    assert found
