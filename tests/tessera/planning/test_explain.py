"""Estimates against what JAX and the compiler say of the same step."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.gate import RouterConfig
from moe.layer import MoEConfig
from sharding.analysis import count_products
from sharding.analysis.hardware import find_hardware
from sharding.errors import PlanError
from sharding.mesh import make_mesh
from sharding.plan import Plan
from tessera.lm.lora import LoRAConfig
from tessera.lm.run import RunConfig, first_state
from tessera.models.attention_forms import LatentConfig
from tessera.models.remat import parse_remat
from tessera.models.transformer import Decoder, TransformerConfig, param_shapes
from tessera.optim.optimizer import OptimizerConfig
from tessera.parallel.decoder import ShardedDecoder, state_shardings
from tessera.planning import costs
from tessera.planning.compile import Compiled, compile_step
from tessera.planning.costs import estimate_costs
from tessera.planning.explain import explain, search
from tessera.planning.memory import (
    Memory,
    estimate_memory,
    local_sizes,
    saved_per_row,
    split_per_row,
    state_placements,
)
from tessera.planning.report import memory_rows, picture_sections, search_outcome, tables, terminal, verdict, write_page
from tessera.step import StepConfig

MODEL = TransformerConfig(vocab_size=512, layers=4, width=64, heads=8, ff=128, dtype="bfloat16", remat="full")
ROUTED = TransformerConfig(**{**vars(MODEL), "mlp": "routed", "moe": MoEConfig(balance_scope="sequence")})
H100 = find_hardware("H100")


def make_run(plan, model=MODEL, batch_size=64, length=128, **options):
    optimizer = OptimizerConfig(clip_norm=1.0)
    return RunConfig(model, Plan(plan, **options), optimizer, StepConfig(), batch_size, length, 1e-4)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_state_bytes_are_those_of_the_arrays(ema, rank):
    """Of adapters too: the model is frozen then, and besides the state a step holds the kernels with them added."""
    run = make_run("fsdp=2, tp=2, dp=2")
    run = replace(run, step=StepConfig(ema=ema), lora=LoRAConfig(rank=rank) if rank else None)
    parts, mesh = ShardedDecoder(run.model, run.plan), make_mesh(run.plan)
    shapes = jax.eval_shape(lambda: first_state(run))
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(state_shardings(parts, mesh, shapes)), strict=True)
    state = [jax.device_put(np.zeros(leaf.shape, leaf.dtype), where) for leaf, where in pairs]
    on_first = sum(leaf.addressable_shards[0].data.nbytes for leaf in state)
    placed = state_placements(parts, shapes)
    memory = estimate_memory(parts, placed, run.batch_size, run.length)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(shapes)]
    frozen = [leaf for path, leaf in zip(paths, state, strict=True) if "frozen" in path and path.endswith("['kernel']")]
    adapted = sum(leaf.addressable_shards[0].data.nbytes for leaf in frozen)  # all projections are
    assert memory.state - adapted == on_first - 4  # the step counter
    adapters = sum(4 * leaf.size for leaf in jax.tree.leaves(shapes.params)) if rank else 0
    trained = adapted + adapters if rank else memory.params / (2 if ema else 1)
    assert memory.gradients == trained and memory.total > memory.state + memory.saved


@pytest.mark.parametrize("chunk, tokens", [(0, 1024), (256, 256), (400, 342), (2000, 1024)])
def test_chunked_logits_are_those_of_a_chunk(chunk, tokens):
    """Eight rows of 128 tokens on a device, in chunks of one size: logits, exponentials and gradient in float32."""
    run = replace(make_run("fsdp=8"), loss_chunk_size=chunk)
    decoder = run.decoder(run.plan)
    placed = state_placements(decoder, jax.eval_shape(lambda: first_state(run)))
    head = 64 * 512 * (2 + 4 * (chunk > 0))
    assert estimate_memory(decoder, placed, 64, 128).logits == 3 * 4 * tokens * 512 + head


@pytest.mark.parametrize("remat, least, most", [("full", 1, 1), ("dots", 4, 30), ("none", 30, 1000)])
def test_the_remat_policy_decides_what_is_kept(remat, least, most):
    stream = 128 * 64 * 2
    (way,) = parse_remat(remat, 4)
    kept = saved_per_row(MODEL, Plan(""), 128, way).device
    assert least * stream <= kept <= most * stream
    if remat == "dots":
        # The block's input, queries, keys, values, attention's result, gate and up, each once.
        assert kept == pytest.approx(stream * (1 + 3 + 1 + 2 * 128 / 64), rel=0.05)
    if remat == "none":  # the mask, as booleans and as float32, and rotary factors are those of all layers
        assert saved_per_row(MODEL, Plan(""), 128, way).fixed == 128 * 128 * 8 * (1 + 4) + 4 * 128 * 4 * 4
    halved = saved_per_row(MODEL, Plan("tp=2", sequence=True), 128, way).device
    assert halved < kept


def test_what_b_leaves_for_w_is_the_operands_of_its_products():
    """Channels of a token in float32, width 64 and F 128; and the gradients of two gains, which are done."""
    inputs = 64 + 64 + 64 + 128  # of queries, keys and values; of the output; of gate and up; of down
    gradients = 3 * 64 + 64 + 2 * 128 + 64
    (way,) = parse_remat("full", 4)
    found = split_per_row(replace(MODEL, dtype="float32"), Plan(""), 128, way)
    assert found == (4 * 128 * 64, 4 * 128 * (inputs + gradients) + 2 * 4 * 64)


PLANS = {
    "fsdp": ("fsdp=8", MODEL, {}),
    "fsdp-tp": ("fsdp=4, tp=2", MODEL, {"sequence": True}),
    "dp-tp": ("dp=2, tp=4", MODEL, {}),
    "cp": ("dp=4, cp=2", MODEL, {}),
    "ulysses": ("dp=4, cp=2", MODEL, {"context": "all_to_all"}),
    "ep": ("ep=4, dp=2", ROUTED, {}),
    "pp": ("pp=2, dp=4", MODEL, {"microbatches": 4}),
}
HEAVY = ("cp", "ulysses", "ep", "pp", "dp-tp")


@pytest.mark.parametrize(
    "plan, model, options",
    [pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in HEAVY)) for name, case in PLANS.items()],
)
def test_formulas_agree_with_what_is_counted_in_the_program(plan, model, options):
    run = make_run(plan, model, **options)
    found = explain(run, H100)
    parts = ShardedDecoder(run.model, run.plan, run.z_loss, H100.platform)
    costs = estimate_costs(
        parts, state_placements(parts, jax.eval_shape(lambda: first_state(run))), run.batch_size, run.length
    )
    assert costs.flops == pytest.approx(found.flops, rel=0.2)
    counted = sum(one.moved for one in found.moved)
    assert sum(axis.moved for axis in costs.moved) == pytest.approx(counted, rel=0.35)
    assert costs.bubble == pytest.approx(found.time.bubble)


@pytest.mark.parametrize(("latent", "first"), [(0, 0), (16, 3)])
def test_flops_of_routed_experts_by_hand(latent, first):
    router = RouterConfig("top_k", experts=8, k=3)
    moe = MoEConfig(ff=48, shared=2, latent=latent, first_k_dense_replace=first, router=router)
    config = TransformerConfig(vocab_size=64, layers=2 + first, width=32, heads=4, ff=128, mlp="routed", moe=moe)
    sizes = local_sizes(config, Plan(), batch_size=4, length=8)
    a_token = {
        "gate, up and down of three experts": 3 * 3 * 2 * (latent or 32) * 48,
        "of the two shared ones": 3 * 2 * 2 * 32 * 48,
        "router": 2 * 32 * 8,
        "projections into and out of the latents": 2 * 2 * 32 * latent,
    }
    _, dense, experts = costs._layer_flops(config, sizes, 8)
    assert (dense, experts) == (first * 4 * 8 * 3 * 2 * 32 * 128, 2 * 4 * 8 * sum(a_token.values()))
    staged = local_sizes(replace(config, layers=4 + first), Plan("pp=2"), batch_size=4, length=8)
    assert (staged.layers, staged.routed) == (2 + first, 2)  # of the first stage
    assert sizes.M == 4 * 8 * 3 and sizes.Z == (latent or 32)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_flops_of_a_routed_step_are_those_by_hand(dtype):
    """In loops whose trips depend on the data no product is counted, by the formula all of them once."""
    model = replace(ROUTED, dtype=dtype)
    n, length, width, heads, size, hidden, experts, k = 8 * 128, 128, 64, 8, 8, 128, 8, 2  # of one device of eight
    layer = 2 * n * width * size * 4 * heads  # queries, keys, values, output
    layer += 2 * 2 * n * length * heads * size  # scores, and what they weigh
    layer += 2 * n * width * experts  # router
    layer += 3 * 2 * n * k * width * hidden  # gate, up and down of two experts
    # A layer forward, again for its backward pass, and twice in it; the head is not computed again.
    by_hand = 4 * 4 * layer + 3 * 2 * n * width * 512
    assert explain(make_run("dp=8", model), H100).flops == pytest.approx(by_hand, rel=0.01)


@pytest.mark.long
def test_the_search_cuts_the_batch_until_it_fits():
    """What eight devices hold only in parts: the fewest parts of gradient accumulation, or so many microbatches."""
    run = make_run("", MODEL, batch_size=512, length=256)
    decoder = ShardedDecoder(run.model, Plan("fsdp=8"), run.z_loss, H100.platform)
    placed = state_placements(decoder, jax.eval_shape(lambda: first_state(run)))
    needed = {parts: estimate_memory(decoder, placed, 512, 256, parts).total for parts in (1, 2, 4, 8)}
    small = replace(H100, memory=(needed[4] + 1) / 0.92)
    assert needed[2] > needed[4] > needed[8]
    ranking = search(run, small, 8)
    parts = {one.plan.axes: one.grad_accum_steps for one in ranking.fits}
    assert parts["fsdp=8"] == 4
    best = ranking.fits[0]
    chosen = replace(run, plan=best.plan.fill(8), step=StepConfig(grad_accum_steps=best.grad_accum_steps))
    assert explain(chosen, small).fits
    assert any(one.plan.size("pp") > 1 and one.plan.microbatches > one.plan.size("pp") for one in ranking.fits)


def test_a_search_that_finds_nothing_says_why():
    run = make_run("", replace(MODEL, layers=5, ff=124), batch_size=64)
    ranking = search(run, H100, 7)
    assert ranking.tried == ranking.refused == 10  # seven stages with six numbers of microbatches
    assert search_outcome(ranking, 7, H100).startswith("10 plans for 7 devices were looked at: every one was refused")
    wanted = ("batch_size=64 by dp", "width of 64 by fsdp", "heads of 8 by tp", "length=128 by cp x tp")
    assert [dict(ranking.reasons)[reason] for reason in wanted] == [1] * 4
    small = replace(H100, memory=1e5)
    assert "every one" not in search_outcome(search(run, small, 2), 2, small)
    assert "The smallest is" in search_outcome(search(run, small, 2), 2, small)


@pytest.mark.parametrize("q_rank", [0, 12])
def test_flops_of_latent_attention_are_those_of_its_products(q_rank):
    latent = LatentConfig(kv_rank=10, q_rank=q_rank, nope_dim=6, rope_dim=4, value_dim=5)
    config = TransformerConfig(vocab_size=64, layers=2, width=32, heads=4, ff=48, latent=latent)
    tokens = jax.ShapeDtypeStruct((3, 8), jnp.int32)
    params = param_shapes(config)
    found = sum(one.flops * one.runs for one in count_products(Decoder(config).apply, {"params": params}, tokens))
    sizes = local_sizes(config, Plan(), batch_size=3, length=8)
    assert found == sum(costs._layer_flops(config, sizes, 8)) + 3 * 8 * 2 * 32 * 64


@pytest.mark.parametrize(("platform", "share"), [("tpu", 3 / 4), ("gpu", 3 / 4), ("cpu", 3), ("", 3)])
def test_bytes_of_exchanged_experts_by_hand(platform, share):
    """Choices go to experts and back, forward, once more as they are computed again, and backward.

    Of four devices each sends three quarters of its choices; in padded blocks it sends as many to each of three.
    """
    run = make_run("ep=4, dp=2", ROUTED)
    decoder = ShardedDecoder(run.model, run.plan, platform=platform)
    placed = state_placements(decoder, jax.eval_shape(lambda: first_state(run)))
    (found,) = [one for one in estimate_costs(decoder, placed, run.batch_size, run.length).moved if one.axis == "ep"]
    choices = 4 * (64 // 8) * 128 * 2 * 64 * 2  # layers, sequences, tokens, choices, width, bytes
    others = sum(one.bytes for one in placed["params"] if "/experts/" not in one.path)
    assert found.moved == pytest.approx(6 * share * choices + 2 * 3 / 4 * others)


def test_an_explanation_on_paper(tmp_path):
    run = make_run("fsdp=4, tp=2", sequence=True)
    found = explain(run, H100)
    ranking = search(make_run(""), H100, 8)
    assert ranking.fits and ranking.tried > 50 and ranking.fits[0].seconds <= ranking.fits[-1].seconds
    rows = tables(found, None, ranking)
    assert len(rows["Parameters"]) == 11 and rows["Memory of one device"][-1][0] == "peak"
    assert any("gather_params" in row[2] for row in rows["Collectives of a step"])
    assert "fits" in verdict(found, None) and terminal(found, None, ranking)
    page = write_page(tmp_path, "test", found, None, ranking).read_text()
    for words in ("Mesh and placement", "Memory of one device", "Best plans", "<svg", "docs.cloud.google.com"):
        assert words in page
    assert not [name for name in ("<script", "http://") if name in page.replace("http://www.w3.org", "")]


def test_the_pipelines_timeline_is_in_the_picture():
    mesh, pipeline = picture_sections(ShardedDecoder(MODEL, Plan("pp=2, dp=2", microbatches=4)))
    assert mesh.title == "Mesh and placement" and pipeline.title == "Pipeline schedule"
    assert "bubble 20.0%" in pipeline.caption  # 1 / (4 + 1)


def test_the_most_memory_at_once_is_the_state_what_is_saved_and_the_larger_of_head_and_layer():
    parts = {"params": 1.0, "optimizer": 2.0, "gradients": 4.0, "saved": 8.0, "attention": 16.0, "gathered": 64.0}
    wide = Memory(**parts, feed_forward=32.0, logits=128.0)
    # Of layers the larger: attention's 16, or 32 + 64; with the gradients less than the head's 128.
    assert wide.state == 3 and wide.total == 3 + 8 + 128
    assert Memory(**parts, feed_forward=32.0, logits=99.0).total == 3 + 8 + 4 + 96
    assert Memory(**parts | {"attention": 256.0}, feed_forward=32.0, logits=99.0).total == 3 + 8 + 4 + 256


@pytest.mark.parametrize(
    ("plan", "options", "parts", "rows"),
    [
        ("", {}, 1, 64),
        ("", {}, 4, 16),
        ("dp=2, fsdp=2", {}, 4, 4),
        ("dp=2, pp=2", {"microbatches": 4}, 1, 8),
        ("dp=2, pp=2", {"microbatches": 4}, 2, 4),
    ],
)
def test_parts_of_a_batch_take_their_share_of_the_activations(plan, options, parts, rows):
    """Gradient accumulation: so many rows at once, and a second set of gradients to add to."""
    assert local_sizes(MODEL, Plan(plan, **options), 64, 128, parts).b == rows
    run = make_run(plan, **options)
    decoder = ShardedDecoder(run.model, run.plan)
    placed = state_placements(decoder, jax.eval_shape(lambda: first_state(run)))
    whole, cut = (estimate_memory(decoder, placed, 64, 128, n) for n in (1, parts))
    for name in ("saved", "attention", "feed_forward"):
        assert getattr(whole, name) == parts * getattr(cut, name)
    assert cut.gradients == cut.params * (1 if parts == 1 and not options else 2)
    # The products of a step are those of its rows, whatever goes through the model at once.
    assert estimate_costs(decoder, placed, 64, 128, parts).flops == estimate_costs(decoder, placed, 64, 128).flops


def test_what_does_not_fit_is_said():
    large = TransformerConfig(vocab_size=512, layers=4, width=8192, heads=8, ff=65536, dtype="bfloat16", remat="full")
    run = make_run("dp=8", large, batch_size=8)
    found = explain(run, H100)
    assert not found.fits and "does not fit" in verdict(found, None)
    # The estimate leaves a twelfth of a device free.
    for share, fits in ((0.90, True), (0.95, False)):
        device = replace(H100, memory=found.memory.total / share)
        assert replace(found, hardware=device).fits == fits


def test_the_estimate_is_told_against_the_compilers_figure():
    run = make_run("dp=8")
    found = explain(run, H100)
    compiled = Compiled(int(found.memory.total / 1.25), 0, 0, 0, None, 1.0, 1.0)
    rows = {name: cells for name, *cells in memory_rows(found, compiled)}
    assert rows["estimate against it"] == ["+25.0%", ""]


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(PlanError, match="batch_size=64 does not divide into grad_accum_steps=3"):
        explain(RunConfig(MODEL, Plan("dp=8"), OptimizerConfig(), StepConfig(grad_accum_steps=3), 64, 128), H100)


PLAIN = replace(MODEL, dtype="float32")
CHOOSING = replace(ROUTED, dtype="float32")
# Plan, model, options, tokens of a sequence, parts. What needs most memory: scores, rows of experts, or the weights.
COMPILED = [
    ("fsdp=8", PLAIN, {}, 128, 1),
    ("fsdp=4, tp=2", PLAIN, {"sequence": True}, 128, 1),
    ("dp=2, tp=4", PLAIN, {}, 128, 1),
    ("dp=4, cp=2", PLAIN, {}, 128, 1),
    ("dp=4, cp=2", PLAIN, {}, 256, 1),
    ("dp=4, cp=2", PLAIN, {"context": "all_to_all"}, 128, 1),
    *(("pp=2, dp=4", PLAIN, {"microbatches": 4, "schedule": name}, 128, 1) for name in ("1f1b", "zb_h1", "dualpipev")),
    ("fsdp=8", CHOOSING, {}, 128, 1),
    ("fsdp=8", CHOOSING, {}, 128, 2),
    ("dp=8", replace(CHOOSING, ff=512, layers=2), {}, 32, 1),
    ("ep=4, dp=2", CHOOSING, {}, 128, 1),
    ("ep=4, dp=2", replace(CHOOSING, ff=512, layers=2), {}, 32, 1),
    ("ep=2, tp=2, dp=2", CHOOSING, {}, 128, 1),
]


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "none"])
def test_memory_estimates_are_within_a_tenth_of_the_compilers(remat):
    """float32 on CPUs; docs/results/plans.md has the table."""
    found = {}
    for plan, model, options, length, parts in COMPILED:
        model = replace(model, remat=remat)
        run = replace(make_run(plan, model, length=length, **options), step=StepConfig(grad_accum_steps=parts))
        decoder = ShardedDecoder(run.model, run.plan, run.z_loss, "cpu")
        placed = state_placements(decoder, jax.eval_shape(lambda run=run: first_state(run)))
        compiled = compile_step(run, jax.devices()).total
        case = f"{plan} {model.mlp} ff={model.ff} length={length} parts={parts} {options}"
        found[case] = estimate_memory(decoder, placed, run.batch_size, length, parts).total / compiled
    worst = max(found, key=lambda case: abs(found[case] - 1))
    print(f"worst: {worst}, {found[worst]:.3f} of the compiler's")
    assert all(0.9 < ratio < 1.1 for ratio in found.values()), found


def test_a_step_that_trains_adapters_is_explained():
    """As the whole model, less the gradient of the table, and for a kernel a x b three products a x r x b more."""
    run, rank = make_run("dp=8", length=32), 4
    plain, found = explain(run, H100), explain(replace(run, lora=LoRAConfig(rank=rank)), H100)
    inside = 4 * (4 * 64 * 64 + 3 * 64 * 128)  # weights of 4 layers: q, k, v, o and gate, up, down
    table = 64 // 8 * 32 * 64 * 512
    assert found.flops - plain.flops == 2 * (3 * inside * rank - table)
    adapters = 4 * (4 * (64 + 64) + 3 * (64 + 128)) * rank
    assert found.memory.optimizer == pytest.approx(2 * 4 * adapters, rel=0.01)
    assert [one.path for one in found.params] == [one.path for one in plain.params]
    assert found.trained == adapters and plain.trained == sum(np.prod(one.shape) for one in plain.params)


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "parts"), [("dp=8", 1), ("dp=8", 2), ("dp=2, tp=4", 1), ("pp=2, dp=4", 1)])
def test_memory_of_adapting_a_model_is_near_the_compilers(plan, parts):
    """Weights are most of it: the frozen model, the sum with the adapters, and its gradient."""
    model = replace(PLAIN, width=256, ff=1024)
    run = make_run(plan, model, 16, 32, microbatches=2 if "pp" in plan else 0)
    run = replace(run, step=StepConfig(grad_accum_steps=parts), lora=LoRAConfig(rank=4))
    decoder = run.decoder(run.plan, "cpu")
    memory = estimate_memory(
        decoder, state_placements(decoder, jax.eval_shape(lambda: first_state(run))), 16, 32, parts
    )
    assert 0.87 < memory.total / compile_step(run, jax.devices()).total < 1.13


@pytest.mark.slow
def test_the_compiled_step_is_the_one_that_is_explained():
    run = make_run("fsdp=4, tp=2", TransformerConfig(**{**vars(MODEL), "dtype": "float32"}), sequence=True)
    compiled = compile_step(run, jax.devices())
    found = explain(run, H100)
    arguments = found.memory.state + run.batch_size // 4 * (run.length + 1) * 4
    assert compiled.arguments == pytest.approx(arguments, rel=0.01)
    gathers = sum(one.count for one in compiled.collectives if one.kind == "all-gather" and one.group == 4)
    counted = sum(one.runs for one in found.moved if one.kind == "all-gather" and one.axes == ("fsdp",))
    assert 0 < gathers <= counted  # the compiler may merge what is gathered twice
    assert compiled.total > compiled.arguments and jnp.isfinite(compiled.compile_seconds)
