"""Prefill and decode under plans: the tokens and logits of the teacher-forced forward pass on one device."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.gate import RouterConfig
from moe.layer import MoEConfig
from sharding.analysis.collectives import count_collectives
from sharding.errors import PlanError
from sharding.inference.sample import greedy
from sharding.plan import Plan
from tessera.models.attention_forms import RopeScaling
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.serving import config_json
from tessera.serving.programs import Rows, ServeConfig, make_programs
from tessera.serving.served import serve

PLAIN = TransformerConfig(vocab_size=32, layers=4, width=16, heads=8, kv_heads=4, ff=16)
DENSE = replace(PLAIN, qkv_bias=True, qk_norm=True, rope_scaling=RopeScaling("llama3", 4.0, 16))
DENSE = replace(DENSE, window=5, attention_pattern="LGN")  # shorter than prompts, longer than what a call reads of some
ROUTED = replace(PLAIN, mlp="routed", moe=MoEConfig(router=RouterConfig(experts=8, k=2), shared=1))
HASHED = replace(PLAIN, mlp="routed", moe=MoEConfig(router=RouterConfig(name="hash", experts=8, k=2)))
TINY = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "rope_theta": 100.0}
TINY |= {"num_attention_heads": 8, "num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 2}
FAMILIES = {
    kind: config_json.read(config_json.settings(TINY | {"model_type": kind} | more, kind), kind)
    for kind, more in (("olmoe", {"num_key_value_heads": 8}), ("mixtral", {"sliding_window": 6}))
}
ODD = replace(PLAIN, vocab_size=37, kv_heads=2, layers=2, tied=False)
ODDER = replace(ODD, heads=6, tied=True, head_dim=4, ff=18)
SHORT = replace(DENSE, layers=2, attention_pattern="LG")
CONFIGS = {"dense": DENSE, "short": SHORT, "routed": ROUTED, "hashed": HASHED, "odd": ODD, "odder": ODDER} | FAMILIES
SIZES = ServeConfig(slots=8, length=24, chunk=8)
LENGTHS = np.array([12, 5, 8, 1, 9, 0, 3, 11], np.int32)
STEPS = 4

PLANS = [
    ("dense", "dp=2, cp=2, tp=2"),
    ("routed", "pp=2, ep=2, tp=2"),
    ("odd", "tp=4, dp=2"),  # 37 tokens, 2 key/value heads
]
SLOW_PLANS = [
    ("odder", "tp=3"),  # 2 key/value heads of 6, neither a divisor of the other
    ("odder", "pp=2, tp=3"),
    ("dense", ""),
    ("routed", ""),
    ("dense", "pp=4, dp=2"),
    *(
        (name, axes)
        for name in ("dense", "routed")
        for axes in ("tp=8", "dp=8", "cp=8", "pp=2, tp=4", "fsdp=4, tp=2", "fsdp=2, cp=4")
    ),
    *(
        (name, axes)
        for name in ("dense", "routed")
        for axes in ("pp=4, cp=2", "pp=2, cp=2, tp=2", "dp=4, tp=2", "dp=2, pp=2, tp=2")
    ),
    ("dense", "ep=2, cp=4"),
    ("hashed", ""),
    ("hashed", "ep=4, tp=2"),
    *(
        (name, axes)
        for name in FAMILIES
        for axes in ("tp=2", "tp=4", "tp=8", "ep=2", "ep=4", "ep=8", "ep=2, tp=4", "ep=4, tp=2")
    ),
    *(("routed", axes) for axes in ("ep=8", "ep=4, tp=2", "dp=2, ep=2, cp=2", "dp=2, cp=2, tp=2", "pp=4, dp=2")),
]


@cache
def weights(name):
    params = jax.jit(Decoder(CONFIGS[name]).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]

    def unlike_zero(path, leaf):
        noise = jax.random.normal(jax.random.key(1), leaf.shape)
        return leaf + 0.3 * noise if path[-1].key == "bias" else leaf

    return jax.tree_util.tree_map_with_path(unlike_zero, params)


@cache
def forward(name):
    return jax.jit(Decoder(CONFIGS[name]).apply)


@cache
def programs_for(name, axes, sizes=SIZES):
    params, served = serve(weights(name), CONFIGS[name], Plan(axes))
    programs = make_programs(served, sizes)
    return programs, programs.place(params)


def prompts():
    tokens = np.array(jax.random.randint(jax.random.key(1), (8, 12), 0, 32))
    return np.where(np.arange(12)[None] < LENGTHS[:, None], tokens, 0)


def continued(programs, params):
    """Greedy tokens [STEPS + 1, B] and the logits [STEPS + 1, B, V] they came from."""
    state, logits = programs.prefill(params, prompts(), LENGTHS)
    tokens, all_logits = [np.asarray(logits).argmax(-1)], [np.asarray(logits)]
    for _ in range(STEPS):
        live = (LENGTHS > 0).astype(np.int32)
        state, drawn = programs.generate(params, state, tokens[-1], live, greedy(8), steps=1, logits=True)
        tokens.append(np.asarray(drawn.tokens[0]))
        all_logits.append(np.asarray(drawn.logits[0]))
    assert np.asarray(state.cache.lengths).tolist() == [n + STEPS if n else 0 for n in LENGTHS]
    return np.stack(tokens), np.stack(all_logits)


@pytest.mark.parametrize(
    "name, axes",
    [PLANS[-1], *(pytest.param(*case, marks=pytest.mark.long) for case in PLANS[:-1])]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_PLANS],
    ids=str,
)
def test_greedy_tokens_and_logits_are_those_of_the_whole_forward_pass(name, axes):
    # Prompts in two pieces for some plans, in one for the rest: half as much to compile.
    sizes = SIZES if (name, axes) in PLANS[:2] else replace(SIZES, chunk=12)
    tokens, logits = continued(*programs_for(name, axes, sizes))
    whole = np.zeros((8, 12 + STEPS + 1), np.int32)
    whole[:, :12] = prompts()
    for slot, length in enumerate(LENGTHS):
        whole[slot, length : length + STEPS + 1] = tokens[:, slot]
    expected = np.asarray(forward(name)({"params": weights(name)}, whole))
    for slot, length in enumerate(LENGTHS):
        if not length:
            continue
        theirs = expected[slot, length - 1 : length + STEPS]
        np.testing.assert_allclose(logits[:, slot], theirs, atol=1e-5, rtol=1e-5, err_msg=f"slot {slot}")
        assert tokens[:, slot].tolist() == theirs.argmax(-1).tolist()


@pytest.mark.slow
def test_more_groups_of_slots_than_stages_change_nothing_and_several_steps_are_one_call():
    sizes = replace(SIZES, groups=4, steps=STEPS)
    programs, params = programs_for("dense", "pp=2", sizes)
    state, logits = programs.prefill(params, prompts(), LENGTHS)
    first = np.asarray(logits).argmax(-1)
    budget = np.where(LENGTHS > 0, np.array([4, 4, 2, 4, 1, 4, 3, 4]), 0)
    state, drawn = programs.generate(params, state, first, budget, greedy(8))
    tokens, _ = continued(*programs_for("dense", ""))
    for slot in range(8):
        assert drawn.tokens[: budget[slot], slot].tolist() == tokens[1 : 1 + budget[slot], slot].tolist()
    assert np.asarray(state.cache.lengths).tolist() == (LENGTHS + budget).tolist()


@pytest.mark.long
@pytest.mark.parametrize("dtype, atol", [pytest.param("bfloat16", 2e-2, marks=pytest.mark.slow), ("int8", 3e-2)])
def test_a_smaller_cache_is_near(dtype, atol):
    programs, params = programs_for("short", "", replace(SIZES, cache_dtype=dtype))
    state, _ = programs.prefill(params, prompts(), LENGTHS)
    found = np.asarray(programs.decode(params, state, np.arange(8), LENGTHS > 0)[1])[LENGTHS > 0]
    whole = np.pad(prompts(), ((0, 0), (0, 1)))
    whole[np.arange(8), LENGTHS] = np.arange(8)
    exact = np.asarray(forward("short")({"params": weights("short")}, whole))[np.arange(8), LENGTHS][LENGTHS > 0]
    assert 1e-4 * np.abs(exact).max() < np.abs(found - exact).max() < atol * np.abs(exact).max()
    assert programs.cache_config.bytes < programs_for("short", "")[0].cache_config.bytes


def test_a_layer_of_a_tensor_parallel_decode_has_two_all_reduces():
    programs, params = programs_for("dense", "tp=4")
    state = programs.start()
    rows = np.zeros(8, np.int32)
    whole = count_collectives(lambda *args: programs.generate(*args, steps=1), params, state, rows, rows + 1, greedy(8))
    of_layers = [one for one in whole if "layers" in one.scope]
    assert sum(one.count for one in of_layers) == 2 * DENSE.layers
    assert {one.kind for one in of_layers} == {"all-reduce"}
    assert {one.bytes for one in of_layers} == {8 * DENSE.width * 4}
    # No device ever sees all logits: what sampling moves is candidates, and numbers per row.
    assert max(one.bytes for one in whole if "sample" in one.scope) <= 8 * 4 * min(32, SIZES.candidates)


@pytest.mark.parametrize(
    "axes, sizes, words",
    [
        ("tp=3", SIZES, ["8 heads", "tp=3"]),
        ("dp=3", SIZES, ["slots=8", "dp=3", "nearest valid: 9"]),
        ("cp=5", SIZES, ["length=24", "cp=5", "nearest valid: 25"]),
        ("pp=2", replace(SIZES, groups=3), ["groups=3", "8 slots"]),
    ],
)
def test_what_does_not_divide_is_refused(axes, sizes, words):
    with pytest.raises(PlanError) as error:
        programs_for("dense", axes, sizes)
    for word in words:
        assert word in str(error.value)


def test_first_dense_layers_are_served_without_stages():
    config = replace(ROUTED, layers=3, moe=replace(ROUTED.moe, first_k_dense_replace=1))
    with pytest.raises(PlanError, match="first_k_dense_replace=1 is served without pp"):
        serve({}, config, Plan("pp=2"))


def test_a_slot_used_again_gives_what_a_fresh_one_gives():
    programs, params = programs_for("short", "", replace(SIZES, cache_dtype="int8"))  # those of the test above
    state, _ = programs.prefill(params, prompts(), LENGTHS)
    row = Rows(np.array([[7, 7, 3, 1, 0, 0, 0, 0]]), np.array([4]), np.array([0]), np.array([4]))
    state, used = programs.extend(params, state, row, logits=True, fresh=True)
    fresh_state, fresh = programs.extend(params, programs.start(), row, logits=True, fresh=True)
    assert np.array_equal(used.logits, fresh.logits)
    np.testing.assert_array_equal(state.seen[4], fresh_state.seen[4])
    budget, token = np.eye(8, dtype=np.int32)[4], np.full(8, int(used.tokens[0]), np.int32)
    _, used = programs.decode(params, state, token, budget > 0)
    _, fresh = programs.decode(params, fresh_state, token, budget > 0)
    assert np.array_equal(used[4], fresh[4])
