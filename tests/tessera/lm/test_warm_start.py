"""A decoder's weights as those of another: upcycled into experts and merged back."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.gate import RouterConfig
from moe.layer import MoEConfig
from moe.upcycle import merge
from tessera.infra.checkpoint import CheckpointConfig, CheckpointDamaged, CheckpointReader, Checkpoints
from tessera.infra.logger import Logger
from tessera.infra.workdir import FORMAT
from tessera.lm.warm_start import (
    StartConfig,
    convert,
    join_blocks,
    keeps_outputs,
    read_model,
    recorded_load,
    split_blocks,
)
from tessera.models.lm_loss import lm_loss
from tessera.models.transformer import Decoder, TransformerConfig

DENSE = TransformerConfig(vocab_size=11, layers=2, width=16, heads=2, ff=24)
TOKENS = jax.random.randint(jax.random.key(5), (2, 8), 0, 11, jnp.int32)
KEY = jax.random.key(3)


def params_of(config):
    return jax.jit(Decoder(config).init)(jax.random.key(1), TOKENS)["params"]


def drawn(config):
    """Parameters whose numbers are all different, without a program that draws them."""
    shapes, stream = jax.eval_shape(Decoder(config).init, jax.random.key(1), TOKENS)["params"], np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(stream.standard_normal(leaf.shape), leaf.dtype), shapes)


def logits(config, params):
    return jax.jit(Decoder(config).apply)({"params": params}, TOKENS)


TOP_2 = RouterConfig("top_k", 4, 2)


def routed(every=1, router=TOP_2, **changes):
    return replace(DENSE, mlp="routed", moe=MoEConfig(every=every, router=router), **changes)


CASES = {
    "top_k": routed(),
    "every second, sigmoid": routed(2, RouterConfig("sigmoid", 3, 2)),
    "not scanned, hash": routed(1, RouterConfig("hash", 4, 2), scan=False),
    "hierarchical": routed(1, RouterConfig("hierarchical", 4, 2, groups=2, top_groups=2)),
}


@pytest.fixture(scope="module")
def dense():
    params = params_of(DENSE)
    return params, logits(DENSE, params)


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [name if name in ("top_k",) else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_an_upcycled_decoder_computes_what_the_dense_one_did_and_learns_on(name, dense):
    params, expected = dense
    target = CASES[name]
    assert keeps_outputs(target.moe)
    made = convert(params, DENSE, target, key=KEY)
    np.testing.assert_allclose(logits(target, made), expected, rtol=1e-5, atol=1e-5)
    loss = lm_loss(Decoder(target))
    grads = jax.jit(jax.grad(lambda p: loss(p, {"tokens": TOKENS}, KEY)[0]))(made)
    experts = [block["mlp"]["experts"] for block in split_blocks(grads, target) if "experts" in block["mlp"]]
    assert all(jnp.abs(leaf).max() > 0 for one in experts for leaf in jax.tree.leaves(one))


@pytest.mark.parametrize("scale", [0.02, 0.5])
def test_new_routers_start_at_their_scale(scale, dense):
    target = routed(router=RouterConfig("top_k", 64, 2))
    made = convert(dense[0], DENSE, target, StartConfig(router_scale=scale), key=KEY)
    kernels = np.stack([block["mlp"]["router"]["kernel"] for block in split_blocks(made, target)])
    assert kernels.std() == pytest.approx(scale, rel=0.1) and kernels.mean() == pytest.approx(0, abs=0.1 * scale)
    assert np.corrcoef(kernels.reshape(2, -1))[0, 1] == pytest.approx(0, abs=0.15)


@pytest.mark.parametrize("method", ["mean", "slerp", "ties", "dare"])
def test_merging_what_was_upcycled_gives_the_dense_decoder_back(method, dense):
    target = CASES["every second, sigmoid"]
    made = convert(dense[0], DENSE, target, key=KEY)
    start = StartConfig(method=method)
    back = convert(made, target, DENSE, start, base=(dense[0], DENSE), key=KEY)
    chex.assert_trees_all_close(back, dense[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_no_setting_of_a_merge_is_ignored(method, dense):
    """Against `moe.upcycle.merge` of the one layer, whose arithmetic has tests of its own."""
    made = convert(dense[0], DENSE, CASES["top_k"], StartConfig(noise=0.5), key=KEY)
    results = []
    for changes in ({}, {"density": 0.7}, {"scale": 0.3}, {"method": "mean"}):
        start = StartConfig(**{"method": method} | changes)
        back = convert(made, CASES["top_k"], DENSE, start, base=(dense[0], DENSE), key=KEY)
        results.append(np.asarray(back["blocks"]["mlp"]["up"]["kernel"]))
        if method == "ties":
            mlp, base = (
                split_blocks(params, config)[1]["mlp"] for params, config in ((made, CASES["top_k"]), (dense[0], DENSE))
            )
            wanted = merge(mlp, base, method=start.method, density=start.density, scale=start.scale)
            np.testing.assert_allclose(results[-1][1], wanted["up"]["kernel"], rtol=1e-6)
    assert all(np.abs(one - results[0]).max() > 1e-3 for one in results[1:])


def test_noise_tells_experts_apart(dense):
    made = convert(dense[0], DENSE, CASES["top_k"], StartConfig(noise=0.1), key=KEY)
    up = made["blocks"]["mlp"]["experts"]["up"]["kernel"]
    assert jnp.abs(up[:, 0] - up[:, 1]).max() > 0
    assert jnp.abs(made["blocks"]["mlp"]["router"]["kernel"]).max() > 0


@pytest.mark.parametrize("scan", [True, False])
def test_blocks_are_split_and_joined_by_either_layout(scan):
    config = routed(2, scan=scan)
    params = drawn(config)
    blocks = split_blocks(params, config)
    assert ["experts" in block["mlp"] for block in blocks] == [False, True]
    chex.assert_trees_all_equal(join_blocks(params, blocks, config), params)


@pytest.mark.parametrize(
    ("target", "start", "message"),
    [
        (replace(routed(), layers=4), StartConfig(), "2 layers there, 4 here"),
        (replace(routed(), ff=32), StartConfig(), "experts/down/kernel: .* there, .* needed"),
        (replace(routed(), moe=MoEConfig(shared=1)), StartConfig(), "plain SwiGLU experts"),
    ],
    ids=["layers", "width", "shared"],
)
def test_what_does_not_fit_is_refused(target, start, message, dense):
    with pytest.raises(ValueError, match=message):
        convert(dense[0], DENSE, target, start, key=KEY)


def test_other_counts_of_experts_are_refused():
    made = drawn(routed())
    other = routed(1, RouterConfig("top_k", 8, 2))
    with pytest.raises(ValueError, match=r"\(2, 4, 16, 24\) there, \(2, 8, 16, 24\) needed"):
        convert(made, routed(), other, key=KEY)


def test_the_load_of_a_run_is_that_of_its_last_tenth(tmp_path):
    loads = np.random.default_rng(0).dirichlet(np.ones(3), (25, 2))  # 25 logged steps, two layers, three experts
    with Logger(tmp_path) as logger:
        for step, load in enumerate(loads, 1):
            logger.write(step, {"loss": 1.0, "router/load": load.tolist()})
            logger.write(step, {"loss": 9.0}, kind="eval")
    np.testing.assert_allclose(recorded_load(tmp_path), loads[-2:].mean(0), rtol=1e-12)


def test_a_directory_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        read_model(tmp_path)


TRAINING = """
import sys, jax.numpy as jnp
from tessera.infra.checkpoint import Checkpoints, CheckpointConfig
with Checkpoints(sys.argv[1], CheckpointConfig(keep=1, best=0)) as checkpoints:
    for step in range(1, int(sys.argv[2]) + 1):
        params = {"embed": {"table": jnp.full((256, 16), float(step))}}
        params |= {f"leaf{i}": jnp.full((50, 40), float(step)) for i in range(20)}
        checkpoints.save(step, {"params": params})
        if step == 1:
            checkpoints.wait()
            print("saved", flush=True)
print("ended", flush=True)
"""


@pytest.mark.long
@pytest.mark.parametrize("steps", [20, pytest.param(60, marks=pytest.mark.slow)])
def test_a_run_that_trains_can_be_read_and_goes_on(tmp_path, steps):
    (tmp_path / "run.json").write_text(json.dumps({"format": FORMAT}))
    (tmp_path / "config.json").write_text(json.dumps({"model": {"layers": 2, "width": 16, "heads": 2}}))
    command = [sys.executable, "-c", TRAINING, str(tmp_path / "checkpoints"), str(steps)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[3]
    training = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=root
    )
    assert training.stdout.readline() == "saved\n", training.communicate()
    seen = []
    while training.poll() is None:
        params, _ = read_model(tmp_path)
        values = {float(value) for leaf in jax.tree.leaves(params) for value in np.unique(leaf)}
        assert len(values) == 1 and len(jax.tree.leaves(params)) == 21
        seen.append(values.pop())
    output, errors = training.communicate()
    assert training.returncode == 0 and output == "ended\n", errors
    assert seen == sorted(seen) and len(set(seen)) > 1
    assert float(read_model(tmp_path)[0]["leaf0"].max()) == steps


def test_reading_leaves_a_run_as_it_is(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"format": FORMAT}))
    (tmp_path / "config.json").write_text(json.dumps({"model": {"layers": 1, "width": 4, "heads": 1}}))
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        read_model(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "run.json"]
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"params": {"embed": {"table": jnp.ones((8, 4))}}})
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)  # another process writes it
    (tmp_path / "checkpoints" / "1" / "metrics" / "metrics").write_text("{")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    read_model(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_checkpoint_that_goes_while_it_is_read_is_followed_by_the_newest(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, CheckpointConfig(keep=9)) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, {"x": jnp.full(3, step)})
    (tmp_path / "later").mkdir()
    for step in range(3, 6):
        (tmp_path / str(step)).rename(tmp_path / "later" / str(step))
    whole = CheckpointReader.restore_whole

    def overtaken(self, step):
        """The trainer saves the next step and removes this one, as far as there are more."""
        if (tmp_path / "later" / str(step + 1)).exists():
            (tmp_path / "later" / str(step + 1)).rename(tmp_path / str(step + 1))
            shutil.rmtree(tmp_path / str(step) / "state")
        return whole(self, step)

    monkeypatch.setattr(CheckpointReader, "restore_whole", overtaken)
    found = CheckpointReader(tmp_path).restore_newest()
    assert found.step == 5 and found.state["x"].tolist() == [5, 5, 5]
    shutil.rmtree(tmp_path / "5" / "state")
    with pytest.raises(CheckpointDamaged, match="checkpoint 5 in"):
        CheckpointReader(tmp_path).restore_newest()
