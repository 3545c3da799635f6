"""Experts on several devices give what one device gives, outputs and gradients."""

import os
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe import dispatch, experts, metrics, parallel, route
from moe.gate import RouterConfig
from moe.layer import ExpertAxes, MoE, MoEConfig
from moe.routing import only

N, D, F, E = 32, 6, 8, 8
PARAMS = experts.initialize(D, F, E, key=jax.random.key(2))
X = jax.random.normal(jax.random.key(3), (N, D))
LOGITS = 2 * jax.random.normal(jax.random.key(4), (N, E))
MASK = jnp.arange(N) % 7 != 5
COTANGENT = jnp.cos(jnp.arange(N * D).reshape(N, D))
SPECS = {"gate": P("ep", None, "tp"), "up": P("ep", None, "tp"), "down": P("ep", "tp", None)}
ROUTINGS = {
    "top_k": lambda x, mask: route.top_k(x, 2, mask),
    "all_to_one": lambda x, mask: route.switch(x + 40 * (jnp.arange(E) == 5)[None], mask),
    "k_is_e": lambda x, mask: route.top_k(x, E, mask),
}


def fake_ragged(rows, buffer, starts, sizes, there, received, axis):
    """What `jax.lax.ragged_all_to_all` does, by gathering everything, for CPUs."""
    me, r = jax.lax.axis_index(axis), rows.shape[0]
    rows, starts, sizes, there = (jax.lax.all_gather(x, axis) for x in (rows, starts, sizes, there))
    place = there[:, me, None] + jnp.arange(r)[None]  # [sender, row of its block]
    live = jnp.arange(r)[None] < sizes[:, me, None]
    source = jnp.minimum(starts[:, me, None] + jnp.arange(r)[None], r - 1)
    values = jnp.take_along_axis(rows, source[:, :, None], axis=1)
    out = buffer.at[jnp.where(live, place, buffer.shape[0])].set(values, mode="drop")
    # Where the sizes announced and sent differ, nothing is right.
    return jnp.where((sizes[:, me] == received).all(), out, jnp.nan)


def on_mesh(shape, way, exchange, name):
    """(params, x, logits, mask) -> outputs on a mesh of dp x ep x tp devices."""
    mesh = Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), ("dp", "ep", "tp"))
    tokens = P(("dp", "ep"))
    send = partial(parallel.all_to_all, exchange=exchange) if way == "all_to_all" else parallel.all_gather

    @partial(jax.shard_map, mesh=mesh, in_specs=(SPECS, tokens, tokens, tokens), out_specs=tokens)
    def forward(params, x, logits, mask):
        run = parallel.tensor_parallel(partial(experts.expert_ffn, params), "tp")
        return send(x, ROUTINGS[name](logits, mask), run, "ep")

    return forward


def with_gradients(forward, *args):
    out, pull = jax.vjp(lambda *args: forward(*args, MASK), *args)
    return out, pull(COTANGENT)


@cache
def one_device(name):
    def forward(params, x, logits, mask):
        return experts.mixture(params, x, ROUTINGS[name](logits, mask))[0]

    return jax.jit(partial(with_gradients, forward))(PARAMS, X, LOGITS)


@pytest.mark.parametrize(
    ("shape", "way", "exchange", "name"),
    [
        ((1, 8, 1), "all_to_all", "padded", "top_k"),
        ((1, 4, 1), "all_to_all", "ragged", "top_k"),
        ((2, 2, 2), "all_to_all", "padded", "all_to_one"),
        ((2, 2, 2), "all_gather", "", "top_k"),
        pytest.param((1, 8, 1), "all_gather", "", "top_k", marks=pytest.mark.slow),
        pytest.param((1, 4, 1), "all_to_all", "ragged", "all_to_one", marks=pytest.mark.slow),
        pytest.param((1, 4, 2), "all_to_all", "padded", "k_is_e", marks=pytest.mark.slow),
        pytest.param((2, 2, 2), "all_gather", "", "all_to_one", marks=pytest.mark.slow),
        pytest.param((4, 2, 1), "all_gather", "", "k_is_e", marks=pytest.mark.slow),
    ],
)
def test_outputs_and_gradients_are_one_devices(shape, way, exchange, name, monkeypatch):
    if exchange == "ragged":  # XLA has none for CPUs
        monkeypatch.setattr(parallel, "exchange_rows", fake_ragged)
    ours = jax.jit(partial(with_gradients, on_mesh(shape, way, exchange, name)))(PARAMS, X, LOGITS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, one_device(name))


def placed_by_hand(ids, devices, slack, exchange):
    """Choices [P, N, K] that receive buffers have room for: even shares, then what is left in the order of devices."""
    p, n, k = ids.shape
    share = min(n * k, -(-int(np.ceil(slack * n * k)) // devices))
    to = ids // (E // devices)
    wanted = np.array([[(to[s] == r).sum() for r in range(devices)] for s in range(p)])
    given = np.minimum(wanted, share)
    for r in range(devices if exchange == "ragged" else 0):
        left = devices * share - given[:, r].sum()
        for s in range(p):
            more = min(wanted[s, r] - given[s, r], left)
            given[s, r], left = given[s, r] + more, left - more
    placed = np.zeros(ids.shape, bool)
    for s in range(p):
        for choice in range(k):
            for token in range(n):
                receiver = to[s, token, choice]
                placed[s, token, choice] = receiver < devices and given[s, receiver] > 0
                given[s, receiver % devices] -= placed[s, token, choice]
    return placed


@pytest.mark.parametrize(("exchange", "devices"), [pytest.param("padded", 4, marks=pytest.mark.slow), ("ragged", 4)])
def test_bounded_buffers_drop_what_does_not_fit(exchange, devices, monkeypatch):
    """Outputs and gradients are those of one device that leaves the same choices out, found by loops in numpy."""
    if exchange == "ragged":
        monkeypatch.setattr(parallel, "exchange_rows", fake_ragged)
    mesh, slack = Mesh(np.array(jax.devices()[:devices]), ("ep",)), 1.3
    logits = LOGITS + 2 * (jnp.arange(E) < 3)[None]  # the first experts get more than their share

    @partial(jax.shard_map, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    def forward(params, x, logits, mask):
        run = partial(experts.expert_ffn, params)
        return parallel.bounded_all_to_all(x, route.top_k(logits, 2, mask), run, "ep", slack, exchange=exchange)

    routing = jax.jit(route.top_k, static_argnums=1)(logits, 2, MASK)
    placed = placed_by_hand(np.asarray(routing.experts_NK).reshape(devices, -1, 2), devices, slack, exchange)
    placed = placed.reshape(N, 2)
    assert 0.05 < metrics.drop_fraction(routing, jnp.asarray(placed)) < 0.5

    def plain(params, x, logits):
        return experts.mixture(params, x, only(route.top_k(logits, 2, MASK), jnp.asarray(placed)))[0]

    @jax.jit
    def both(*args):
        ours, pull, found = jax.vjp(lambda *args: forward(*args, MASK), *args, has_aux=True)
        theirs, plain_pull = jax.vjp(plain, *args)
        return found, (ours, pull(COTANGENT)), (theirs, plain_pull(COTANGENT))

    found, ours, theirs = both(PARAMS, X, logits)
    np.testing.assert_array_equal(found, placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)


def test_a_layer_bounds_its_buffers_in_training_alone_and_says_what_it_drops():
    mesh, spread = Mesh(np.array(jax.devices()[:2]), ("ep",)), (2, 8, D)
    router = RouterConfig("top_k", E, 2)
    config = MoEConfig(router=router, mixture=experts.MixtureConfig(slack=1.0))
    layer = MoE(config, D, F, axes=ExpertAxes("ep", tokens=("ep",)))
    params = {"router": {"kernel": jax.random.normal(jax.random.key(0), (D, E))}}
    params["experts"] = {name: {"kernel": leaf} for name, leaf in PARAMS.items()}
    specs = {"router": P(), "experts": P("ep")}

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(specs, P("ep")), out_specs=P("ep"))
    def dropped(params, x):
        found = []
        for rngs in ({"router": jax.random.key(1)}, {}):
            _, sown = layer.apply({"params": params}, x, rngs=rngs, mutable=["intermediates"])
            found.append(sown["intermediates"]["routing"][0]["drop_fraction"])
        return jnp.stack(found)[None]

    x = X[:16].reshape(spread)
    routing = route.top_k((x @ params["router"]["kernel"]).reshape(-1, E), 2)
    placed = placed_by_hand(np.asarray(routing.experts_NK).reshape(2, 8, 2), 2, 1.0, "padded")
    train, evaluation = dropped(params, x).T
    np.testing.assert_allclose(train, 1 - placed.mean(axis=(1, 2)))
    assert train.max() > 0 == evaluation.max()


def gradient(mesh, exchange, slack, backend="auto"):
    """Jitted gradient of experts on a mesh with an axis "ep", and the share of the choices that are dropped."""
    tokens = P(mesh.axis_names)

    @partial(jax.shard_map, mesh=mesh, in_specs=(P("ep"), tokens, tokens), out_specs=(tokens, tokens))
    def forward(params, x, logits):
        routing, run = route.top_k(logits, 2), partial(experts.expert_ffn, params, backend=backend)
        if slack:
            return parallel.bounded_all_to_all(x, routing, run, "ep", slack, exchange=exchange)
        return parallel.all_to_all(x, routing, run, "ep", exchange=exchange), jnp.ones(logits.shape[:1])

    def loss(*args):
        y, placed = forward(*args)
        return (y.astype(jnp.float32) ** 2).sum(), 1 - placed.mean()

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


@pytest.mark.long
def test_memory_of_bounded_buffers_does_not_grow_with_the_devices():
    params, bytes_of = experts.initialize(64, 64, E, key=jax.random.key(0)), {}
    for devices in (2, 8):
        x, logits = (jax.random.normal(jax.random.key(i), (256 * devices, size)) for i, size in ((1, 64), (2, E)))
        mesh = Mesh(np.array(jax.devices()[:devices]), ("ep",))
        compiled = gradient(mesh, "padded", 1.25).lower(params, x, logits).compile()
        bytes_of[devices] = compiled.memory_analysis().temp_size_in_bytes
        assert compiled(params, x, logits)[1] == 0  # random routing is a balanced load
    assert bytes_of[8] <= 1.2 * bytes_of[2]


@pytest.mark.tpu
@pytest.mark.slow
def test_bounded_buffers_compile_for_a_pod():
    """Ahead of time, with libtpu and no TPU."""
    pytest.importorskip("libtpu", reason="pip install libtpu (the tpu extra)")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    from jax.experimental.topologies import get_topology_desc

    devices = np.array(get_topology_desc(platform="tpu", topology_name="v5p:2x2x2").devices)
    bytes_of = {}
    for ep, slack in ((2, 1.25), (8, 1.25), (8, 0)):
        mesh = Mesh(devices.reshape(-1, ep), ("dp", "ep"))

        def array(spec, *shape, mesh=mesh):
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

        params = {name: array(P("ep"), 32, 512, 512) for name in PARAMS}
        tokens = (array(P(("dp", "ep")), 4096 * devices.size, size) for size in (512, 32))
        compiled = gradient(mesh, "ragged", slack, "tpu").lower(params, *tokens).compile()
        assert "ragged-all-to-all" in compiled.as_text()
        bytes_of[ep, slack] = compiled.memory_analysis().temp_size_in_bytes
    assert bytes_of[8, 1.25] <= 1.2 * bytes_of[2, 1.25] < bytes_of[8, 0] / 2


def test_the_ragged_exchange_lowers_for_tpus():
    forward = on_mesh((1, 4, 1), "all_to_all", "ragged", "top_k")
    lowered = jax.jit(forward).trace(PARAMS, X, LOGITS, MASK).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("ragged_all_to_all") >= 2


def test_experts_that_do_not_divide_are_refused():
    mesh = Mesh(np.array(jax.devices()[:3]), ("ep",))

    @partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    def forward(x):
        return parallel.all_to_all(x, route.top_k(LOGITS, 2), dispatch.gather, "ep")

    with pytest.raises(ValueError, match="8 experts do not divide among the 3 devices of axis 'ep'"):
        forward(X)


@pytest.mark.parametrize("options", [{"slack": 0.5}, {"slack": -1.0}, {"slack": 1.5, "dispatch": "capacity"}], ids=str)
def test_a_buffer_below_a_balanced_load_is_refused(options):
    with pytest.raises(ValueError, match=rf"slack={options['slack']},.*at least 1 \(a balanced load\) with 'dropless'"):
        experts.MixtureConfig(**options)


def test_identity_experts_count_once_however_many_devices_split_the_others():
    """Of experts whose weights are zeros the inputs times their weights are all there is, summed over tp."""
    config = MoEConfig(router=RouterConfig("top_k", E, 2, softmax="before"), identity=E - 1)
    params = {"router": {"kernel": jax.random.normal(jax.random.key(0), (D, E))}}
    params["experts"] = {name: {"kernel": jnp.zeros_like(leaf[:1])} for name, leaf in PARAMS.items()}
    x = X[:8].reshape(1, 8, D)
    routing = route.top_k(x[0] @ params["router"]["kernel"], 2, softmax="before")
    weights = np.where(np.asarray(routing.experts_NK) > 0, routing.weights_NK, 0).sum(1)
    mesh, cut = Mesh(np.array(jax.devices()[:2]), ("tp",)), {name: P(None, None, "tp") for name in ("gate", "up")}
    specs = {"router": P(), "experts": {name: {"kernel": cut.get(name, P(None, "tp"))} for name in params["experts"]}}
    layer = MoE(config, D, F, axes=ExpertAxes(width="tp"))

    @partial(jax.shard_map, mesh=mesh, in_specs=(specs, P()), out_specs=P())
    def run(params, x):
        return jax.lax.psum(layer.apply({"params": params}, x), "tp")

    np.testing.assert_allclose(jax.jit(run)(params, x)[0], weights[:, None] * x[0], rtol=1e-5, atol=1e-6)
