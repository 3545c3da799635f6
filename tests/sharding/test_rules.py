from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sharding.errors import PlanError
from sharding.mesh import make_mesh
from sharding.plan import Plan
from sharding.rules import PARAMS, Rules, logical_axes, mirrored_specs, param_specs, path_name, resolve, shardings
from tessera.models.transformer import Decoder, TransformerConfig
from tessera.optim.optimizer import OptimizerConfig, make_optimizer
from tessera.step import StepConfig, init_state

CONFIG = TransformerConfig(vocab_size=32, layers=4, width=16, heads=8, kv_heads=4, ff=24, tied=False)


def shapes(config=CONFIG):
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]


def by_path(specs):
    return {
        path_name(path): spec for path, spec in jax.tree.leaves_with_path(specs, is_leaf=lambda x: isinstance(x, P))
    }


def test_where_the_decoders_parameters_go():
    specs = by_path(param_specs(shapes(), Plan("pp=2, fsdp=2, tp=2").sizes))
    assert specs == {
        "embed/table": P("tp", "fsdp"),
        "head/kernel": P("fsdp", "tp"),
        "final_norm/gain": P(),
        "blocks/attention_norm/gain": P("pp"),
        "blocks/mlp_norm/gain": P("pp"),
        "blocks/attention/query/kernel": P("pp", "fsdp", "tp"),
        "blocks/attention/key/kernel": P("pp", "fsdp", "tp"),
        "blocks/attention/value/kernel": P("pp", "fsdp", "tp"),
        "blocks/attention/output/kernel": P("pp", "tp", None, "fsdp"),
        "blocks/mlp/gate/kernel": P("pp", "fsdp", "tp"),
        "blocks/mlp/up/kernel": P("pp", "fsdp", "tp"),
        "blocks/mlp/down/kernel": P("pp", "tp", "fsdp"),
    }
    # Absent axes are dropped, and with them what is left of a partition.
    specs = by_path(param_specs(shapes(), Plan("tp=4").sizes))
    assert specs["blocks/mlp/down/kernel"] == P(None, "tp") and specs["final_norm/gain"] == P()
    assert set(by_path(param_specs(shapes(), Plan("dp=8").sizes)).values()) == {P()}


@pytest.mark.parametrize(
    "path, ndim, axes",
    [
        ("blocks_3/mlp/gate/kernel", 2, ("width", "ff")),
        ("blocks/mlp/experts/gate", 4, ("layers", "experts", "width", "ff")),
        ("blocks_0/mlp/experts/down/kernel", 3, ("experts", "ff", "width")),
        ("blocks/mlp/router/kernel", 3, ("layers", None, None)),
        ("blocks_0/mlp/router/kernel", 2, (None, None)),
        ("dense0/kernel", 2, (None, None)),
        ("step", 0, ()),
    ],
)
def test_logical_axes(path, ndim, axes):
    assert logical_axes(path, ndim) == axes


def test_fully_sharded_data_parallelism_is_two_lines():
    without = Rules(params=tuple(rule for rule in PARAMS if rule != ("width", "fsdp")))
    sizes = Plan("fsdp=4").sizes
    assert set(by_path(param_specs(shapes(), sizes, without)).values()) == {P()}
    stored = by_path(param_specs(shapes(), sizes))
    assert all(("fsdp" in spec) == (not path.endswith("gain")) for path, spec in stored.items())
    assert resolve(("batch", "time", "width"), (8, 4, 16), Rules().compute, sizes) == P("fsdp")


@pytest.mark.parametrize(
    "changes, axes, texts",
    [
        ({"ff": 28}, "tp=8", ["blocks/mlp/down/kernel", "(ff) of 28", "tp=8", "nearest valid: tp=7"]),
        ({"ff": 7}, "tp=4", ["(ff) of 7", "tp=4", "nearest valid: tp=1"]),  # not tp=7, which are more devices
        ({"heads": 6, "kv_heads": 6, "head_dim": 4}, "tp=4", ["(heads) of 6", "tp=4", "nearest valid: tp=3"]),
        ({"layers": 3}, "pp=2", ["blocks/", "dimension 0 (layers) of 3", "pp=2"]),
        ({"width": 24, "head_dim": 4}, "fsdp=16", ["(width) of 24", "fsdp=16", "nearest valid: fsdp=12"]),
    ],
)
def test_an_indivisible_dimension_is_refused_by_path(changes, axes, texts):
    with pytest.raises(PlanError) as error:
        param_specs(shapes(replace(CONFIG, **changes)), Plan(axes).sizes)
    for text in texts:
        assert text in str(error.value)


def test_rules_that_split_two_dimensions_over_one_axis_are_refused():
    rules = Rules(params=(("width", "tp"), ("ff", "tp")))
    with pytest.raises(PlanError, match="mlp/.*dimensions 1 and 2 .* both over tp"):
        param_specs(shapes(), {"tp": 2}, rules)


def test_optimizer_state_lies_as_its_parameters_and_zero_1_splits_it_alone():
    params, tx = shapes(), make_optimizer(OptimizerConfig("adamw", clip_norm=1.0))
    state = jax.eval_shape(lambda p: init_state(p, tx, StepConfig(ema=0.9)), params)
    sizes = Plan("fsdp=4").sizes
    specs = by_path(mirrored_specs(state, params, param_specs(params, sizes)))
    split = {path for path, spec in specs.items() if "fsdp" in spec}
    kernels = {path for path, spec in by_path(param_specs(params, sizes)).items() if "fsdp" in spec}
    copies = {"params": 0, "mu": 0, "nu": 0, "ema": 0}
    for path in split:
        kind = next(kind for kind in copies if f"{kind}/" in path)
        copies[kind] += 1
        assert any(path.endswith(kernel) for kernel in kernels)
    assert set(copies.values()) == {len(kernels)}
    assert all(spec == P() for path, spec in specs.items() if path.endswith(("count", "step")))
    assert set(by_path(param_specs(params, sizes, zero=1)).values()) == {P()}
    # Masks mirror parameters too.
    masks = {"masks": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, bool), params)}
    assert {
        path for path, spec in by_path(mirrored_specs(masks, params, param_specs(params, sizes))).items() if spec
    } == {f"masks/{kernel}" for kernel in kernels}


@pytest.mark.parametrize(
    "axes, table, key",
    [
        ("fsdp=2, tp=4", P(None, ("fsdp", "tp")), P(None, "fsdp", "tp")),
        ("fsdp=2, tp=8", P(None, ("fsdp", "tp")), P(None, ("fsdp", "tp"))),
        ("tp=6", P(), P()),  # the width of 16 does not divide either
        ("tp=2", P(None, "tp"), P(None, None, "tp")),
    ],
)
def test_what_tp_does_not_divide_is_stored_by_its_width(axes, table, key):
    """A vocabulary of 37 and 4 key/value heads keep their shapes; no parameter has padding or copies."""
    model = replace(CONFIG, vocab_size=37, heads=24, head_dim=4, ff=48)
    specs = by_path(param_specs(shapes(model), Plan(axes).sizes))
    assert specs["embed/table"] == table
    assert specs["blocks/attention/key/kernel"] == key


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ((2, 256, 512), {"v_row": P(None, "fsdp"), "v_col": P(None, "tp")}),
        ((2, 512, 256), {"v_row": P(None, "tp"), "v_col": P(None, "fsdp")}),
        ((2, 256, 256), {"v_row": P(None, "fsdp"), "v_col": P(None, "tp")}),  # equal sizes: by optax's order
        ((256, 256, 256), {"v_row": P("pp", "fsdp"), "v_col": P("pp", "tp")}),
        ((2, 64, 64), {"v": P("pp", "fsdp", "tp")}),  # too small to be factored
    ],
)
def test_factored_moments_lie_as_what_is_left_of_their_parameter(sizes, expected):
    """The rows' statistic is the mean over the largest dimension, the columns' over the second largest."""
    params = {"blocks": {"mlp": {"up": {"kernel": jax.ShapeDtypeStruct(sizes, jnp.float32)}}}}
    mesh = {"pp": 2 if sizes[0] == 256 else 1, "fsdp": 4, "tp": 2} | ({"pp": 2} if "v" in expected else {})
    state = jax.eval_shape(make_optimizer(OptimizerConfig("adafactor")).init, params)
    specs = by_path(mirrored_specs(state, params, param_specs(params, mesh)))
    for name, spec in expected.items():
        assert specs[f"0/0/{name}/blocks/mlp/up/kernel"] == spec
    rest = {"v_row", "v_col", "v"} - set(expected)
    assert all(specs[f"0/0/{name}/blocks/mlp/up/kernel"] == P() for name in rest)


def test_accumulators_of_single_dimensions_lie_as_these():
    params = {"blocks": {"mlp": {"up": {"kernel": jax.ShapeDtypeStruct((2, 8, 16), jnp.float32)}}}}
    state = jax.eval_shape(make_optimizer(OptimizerConfig("sm3", decay_mask="all")).init, params)
    specs = by_path(mirrored_specs(state, params, param_specs(params, {"fsdp": 4, "tp": 2})))
    found = {path.rsplit("kernel", 1)[1]: spec for path, spec in specs.items() if "kernel/" in path}
    assert found == {"/0": P(None), "/1": P("fsdp"), "/2": P("tp")}


def test_a_parameter_is_cut_as_the_partition_says():
    mesh = make_mesh(Plan("fsdp=4, tp=2"))
    specs = param_specs({"head": {"kernel": jax.ShapeDtypeStruct((8, 6), jnp.float32)}}, mesh.shape)
    value = np.arange(48.0).reshape(8, 6)
    placed = jax.device_put({"head": {"kernel": value}}, shardings(mesh, specs))["head"]["kernel"]
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(placed, value)
