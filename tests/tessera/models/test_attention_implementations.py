"""Attention by cuDNN and by JAX's splash kernel: equal to XLA's in the interpreter, lowered for their platforms."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding.attention import AttentionForm, packed_window
from sharding.mesh import make_mesh
from sharding.plan import Plan
from tessera.lm.run import RunConfig, under_plan
from tessera.models.attention_forms import attention, splash_attention
from tessera.models.lm_loss import lm_loss
from tessera.models.transformer import Decoder, TransformerConfig, param_shapes
from tessera.optim.optimizer import OptimizerConfig
from tessera.parallel.decoder import ShardedDecoder, make_loss
from tessera.step import StepConfig

CONFIG = TransformerConfig(vocab_size=64, layers=2, width=64, heads=4, kv_heads=2, head_dim=32, ff=64, dtype="bfloat16")
POSITIONS = np.concatenate([np.arange(50), np.arange(70), np.full(8, -1)]).astype(np.int32)[None]  # two documents
FORMS = {
    "window": AttentionForm(window=40),
    "softcap and scale": AttentionForm(softcap=2.0, scale=0.3),
    "packed": AttentionForm(window=packed_window(jnp.asarray(POSITIONS))),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_splash_is_the_attention_of_xla(form):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 128, heads, 16)), jnp.float32) for heads in (4, 2, 2))
    plain = lambda q, k, v: attention(q, k, v, form)  # noqa: E731
    splash = lambda q, k, v: splash_attention(q, k, v, form, interpret=True)  # noqa: E731
    chex.assert_trees_all_close(jax.jit(splash)(q, k, v), jax.jit(plain)(q, k, v), atol=1e-5)


def test_splash_has_the_gradient_of_xla():
    rng = np.random.default_rng(0)
    qkv = tuple(jnp.asarray(rng.normal(size=(1, 128, heads, 16)), jnp.float32) for heads in (2, 1, 1))
    plain = lambda *qkv: jnp.square(attention(*qkv)).sum()  # noqa: E731
    splash = lambda *qkv: jnp.square(splash_attention(*qkv, AttentionForm(), interpret=True)).sum()  # noqa: E731
    found, expected = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*qkv) for f in (splash, plain))
    chex.assert_trees_all_close(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    "name, platform, plan, call",
    [
        ("splash", "tpu", "", "tpu_custom_call"),
        ("cudnn", "cuda", "", "__cudnn$fmha"),
        pytest.param("cudnn", "cuda", "dp=2, tp=2, fsdp=2", "__cudnn$fmha", marks=pytest.mark.slow),
    ],
)
def test_a_training_step_lowers_for_its_platform(monkeypatch, name, platform, plan, call):
    """The program for an accelerator that is not there calls the kernel, forward and backward."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    config = replace(CONFIG, attention_implementation=name)
    one, axes = lm_loss(Decoder(config)), Plan(plan)
    loss = make_loss(ShardedDecoder(config, axes), make_mesh(axes)) if plan else one
    batch = {"tokens": jax.ShapeDtypeStruct((8, 129), jnp.int32)}
    step = jax.jit(jax.value_and_grad(loss, has_aux=True)).trace(param_shapes(config), batch)
    assert step.lower(lowering_platforms=(platform,)).as_text().count(call) >= 2


@pytest.mark.parametrize(
    "changes, platform, options, message",
    [
        ({"attention_implementation": "cudnn"}, "cpu", {}, "'cudnn' runs on gpu, and this is cpu: choose xla"),
        ({"attention_implementation": "splash"}, "gpu", {}, "runs on tpu, and this is gpu: choose xla or cudnn"),
        ({"attention_implementation": "cudnn", "dtype": "float32"}, "gpu", {}, "dtype='float32' .bfloat16 is needed"),
        ({"attention_implementation": "cudnn", "head_dim": 256}, "gpu", {}, "heads of 256 channels"),
        ({"attention_implementation": "cudnn", "sinks": True}, "gpu", {}, "cannot compute sinks: choose 'xla'"),
        ({"attention_implementation": "splash"}, "tpu", {"length": 100}, "length=100 .a multiple of 128 is needed"),
        ({"attention_implementation": "splash"}, "tpu", {"devices": 8}, "several devices"),
        ({"attention_implementation": "splash", "window": 8}, "tpu", {"packed": True}, "packed documents in a window"),
    ],
)
def test_what_cannot_run_is_refused(changes, platform, options, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes).check_attention(platform, **{"length": 128} | options)


def test_the_log_says_which_runs_and_what_else_could():
    assert replace(CONFIG).check_attention("cpu", 128) == "attention: xla (products and a softmax, fused by XLA)"
    said = CONFIG.check_attention("gpu", 128)
    assert said.startswith("attention: xla (") and said.endswith("may also be cudnn (experimental, not timed)")
    chosen = replace(CONFIG, attention_implementation="splash").check_attention("tpu", 128)
    assert chosen == "attention: splash (JAX's Pallas splash attention), experimental: not timed"


def test_a_run_refuses_what_its_devices_cannot():
    config = replace(CONFIG, attention_implementation="splash")
    with pytest.raises(ValueError, match="runs on tpu, and this is cpu"):
        under_plan(RunConfig(config, Plan(""), OptimizerConfig(), StepConfig(), 8, 128))
    with pytest.raises(ValueError, match="ring attention is XLA's; choose 'xla', or context='all_to_all'"):
        under_plan(RunConfig(config, Plan("cp=8", context="ring"), OptimizerConfig(), StepConfig(), 8, 128))
