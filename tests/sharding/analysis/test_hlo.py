import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from sharding.analysis.collectives import Collective, count_collectives
from sharding.analysis.hlo import compiled_collectives
from sharding.mesh import make_mesh
from sharding.plan import Plan


def test_the_compilers_count_is_the_programs():
    def work(x):
        x = jax.lax.scan(lambda x, _: (jax.lax.psum(x, "tp") * 0.1, None), x, None, length=5)[0]
        x = jax.lax.all_gather(x, "tp", tiled=True)
        return jax.lax.all_to_all(jax.lax.ppermute(x, "dp", [(0, 1), (1, 0)]), "tp", 0, 0, tiled=True)

    mesh = make_mesh(Plan("dp=2, tp=4"))
    function = jax.jit(
        jax.shard_map(work, mesh=mesh, in_specs=P(("dp", "tp")), out_specs=P(("dp", "tp")), check_vma=False)
    )
    asked = count_collectives(function, jnp.ones(64))
    made = compiled_collectives(function.lower(jnp.ones(64)).compile().as_text())
    assert sorted((one.kind, one.group, one.count, one.bytes) for one in made) == sorted(
        (one.kind, one.group, one.count, one.bytes) for one in asked
    )


def test_groups_and_types_of_other_backends():
    text = """HloModule step, is_scheduled=true, num_partitions=4
%cond (c: (s32[], f32[4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(7)
  %c = (s32[], f32[4]{0}) parameter(0)
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}
%body2 (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  ROOT %ar2 = f32[4]{0} all-reduce(%y), replica_groups={{0,1}}, to_apply=%add
}
%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %ag = (bf16[8,16]{1,0}, bf16[8,128]{1,0:T(8,128)}) all-gather-start(%x), replica_groups=[32,8]<=[256], dimensions={1}
  %rs = bf16[8,16]{1,0} reduce-scatter(%y), replica_groups={{0,1,2,3},{4,5,6,7}}, metadata={op_name="jit(f)/scatter"}
  ROOT %t = (s32[], bf16[8,128]) tuple(%i, %z)
}
ENTRY %main (p0: f32[4]) -> f32[4] {
  %w = (s32[], bf16[8,128]) while(%init), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"16"}}
  %w2 = (s32[], f32[4]) while(%init), condition=%cond, body=%body2
  %m = f32[6]{0} all-gather(%p0), replica_groups=mesh['dp'=2,'tp'=4] {'dp','tp':(1)2}, dimensions={0}
  %cp = f32[4]{0} collective-permute(%p0), source_target_pairs={{0,1},{1,0}}
  %ra = ((bf16[8,2], bf16[64,2], s32[8]), bf16[64,2], u32[]) ragged-all-to-all-start(%r), replica_groups=[1,2]<=[2]
  %all = f32[4]{0} all-reduce(%p0), channel_id=1, replica_groups={}, use_global_device_ids=true, to_apply=%add
  %none = f32[4]{0} collective-permute(%p0), source_target_pairs={{0,0},{1,1}}
  ROOT %ar = (f32[4]{0}, pred[3]{0}) all-reduce(%cp, %q), replica_groups={{0,1}}, to_apply=%add
}
"""
    assert compiled_collectives(text) == [
        Collective("all-gather", (), 8, 16, 8 * 128 * 2, ""),
        Collective("reduce-scatter", (), 4, 16, 8 * 16 * 2 * 4, "jit(f)/scatter"),
        Collective("all-reduce", (), 2, 7, 16, ""),
        Collective("all-gather", (), 4, 1, 24, ""),
        Collective("permute", (), 2, 1, 16, ""),
        Collective("all-to-all", (), 2, 1, 8 * 2 * 2, ""),
        Collective("all-reduce", (), 4, 1, 16, ""),
        Collective("all-reduce", (), 2, 1, 4 * 4 + 3, ""),
    ]
    with pytest.raises(ValueError, match="no ENTRY"):
        compiled_collectives("fusion")
    with pytest.raises(ValueError, match="unknown format"):
        compiled_collectives(text.replace("replica_groups=[32,8]<=[256]", "replica_groups=@all"))


STEP = """
import json, sys, jax, jax.numpy as jnp, optax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 256)
from sharding.analysis.hlo import compiled_collectives
from sharding.analysis.collectives import totals
from sharding.mesh import make_mesh
from sharding.plan import Plan
from tessera.parallel.decoder import ShardedDecoder, batch_sharding, make_loss, state_shardings
from tessera.step import init_state, make_train_step
from tessera.models.transformer import Decoder, TransformerConfig

config = TransformerConfig(
    vocab_size=32768, layers=16, width=2048, heads=16, ff=5632, dtype="bfloat16", remat="full", tied=False
)
plan, tx = Plan("fsdp=32, tp=8", sequence=bool(int(sys.argv[1]))), optax.adamw(1e-3)
parts, mesh = ShardedDecoder(config, plan), make_mesh(plan)
init = lambda key: init_state(Decoder(config).init(key, jnp.zeros((1, 8), jnp.int32))["params"], tx)
state = jax.eval_shape(init, jax.random.key(0))
where = state_shardings(parts, mesh, state)
placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where)
batch = {"tokens": jax.ShapeDtypeStruct((32, 2049), jnp.int32, sharding=batch_sharding(parts, mesh))}
step = jax.jit(make_train_step(make_loss(parts, mesh), tx), donate_argnums=0, out_shardings=(where, None))
compiled = step.lower(placed, batch, jax.random.key(0)).compile()
found = compiled_collectives(compiled.as_text())
print(json.dumps({"totals": totals(found), "temp": compiled.memory_analysis().temp_size_in_bytes}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("sequence", [False, True])
def test_the_compiled_step_of_a_0_96b_model_moves_what_it_should(sequence):
    """The full step with its optimizer, as XLA compiles it for 256 CPU devices, where bfloat16 travels as float32."""
    root = Path(__file__).parents[3]
    run = subprocess.run(
        [sys.executable, "-c", STEP, str(int(sequence))],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    print(found)
    assert "all-to-all" not in found["totals"]
    assert 1e9 < sum(moved for _, moved in found["totals"].values()) <= 5.5e9
