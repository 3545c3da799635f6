"""The layer as families of models have it, against their blocks in transformers: outputs and all gradients."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.experts import Gating, MixtureConfig
from moe.gate import RouterConfig
from moe.layer import MoE, MoEConfig

SIGMOID = RouterConfig("sigmoid", 4, 2)
GROUPS = RouterConfig("sigmoid", 8, 3, groups=4, top_groups=2)

# Every case sets each option of its family to a value that is not the default.
FAMILIES = {
    "mixtral": MoEConfig(router=RouterConfig("top_k", 4, 2)),
    "geglu": MoEConfig(router=RouterConfig("top_k", 4, 2), mixture=MixtureConfig("geglu")),
    "reglu": MoEConfig(router=RouterConfig("top_k", 4, 2), mixture=MixtureConfig("reglu")),
    "qwen2_moe": MoEConfig(router=RouterConfig("top_k", 4, 2, softmax="before"), shared=2, shared_gate=True),
    "gpt_oss": MoEConfig(
        router=RouterConfig("top_k", 4, 2, bias=True), biases=True, mixture=MixtureConfig(gating=Gating(1.3, 1.5, 1.0))
    ),
    "llama4": MoEConfig(router=replace(SIGMOID, normalize=0.0), shared=1, mixture=MixtureConfig(weigh="input")),
    "deepseek_v3": MoEConfig(router=replace(GROUPS, scale=2.5), shared=2),
    "deepseek_v3_unnormalized": MoEConfig(router=replace(GROUPS, scale=1.5, normalize=0.0), shared=2),
    "dbrx": MoEConfig(router=replace(SIGMOID, score="softmax", normalize=2.0)),
    "ernie4_5": MoEConfig(router=replace(SIGMOID, score="softmax"), shared=2),
    "deepseek_v4": MoEConfig(
        router=replace(SIGMOID, score="sqrt_softplus", scale=1.5),
        shared=1,
        mixture=MixtureConfig(gating=Gating(limit=1.5)),
    ),
    "longcat": MoEConfig(
        router=RouterConfig("sigmoid", 6, 3, score="softmax", normalize=0.0, scale=1.5),
        identity=2,
    ),
    "nemotron_h": MoEConfig(router=replace(GROUPS, scale=2.5), latent=4, shared=2, mixture=MixtureConfig("relu2")),
    "phimoe": MoEConfig(router=RouterConfig("sparsemixer", 4, 2, jitter=0.4)),
}


@pytest.mark.parametrize(
    ("name", "dispatch"),
    [("gpt_oss", "dropless"), ("llama4", "dropless")]
    + [(name, "dense") for name in ("qwen2_moe", "deepseek_v3", "dbrx", "deepseek_v4")]
    + [(name, "dense") for name in ("longcat", "nemotron_h", "phimoe")]
    + [
        pytest.param(name, "dropless", marks=pytest.mark.slow) for name in FAMILIES if name not in ("gpt_oss", "llama4")
    ],
)
def test_a_familys_block_is_that_of_transformers(name, dispatch, golden):
    everything = jax.tree.map(jnp.asarray, golden("families"))
    case, cotangent = everything[name], everything["cotangent"]
    params, x = case["params"], case["x"]
    config = replace(FAMILIES[name], mixture=replace(FAMILIES[name].mixture, dispatch=dispatch))
    if config.router.name == "sigmoid":  # none there where no bias is added
        params["router"].setdefault("bias", jnp.zeros(config.router.experts))
    model = MoE(config, x.shape[-1], params["experts"]["up"]["kernel"].shape[-1])

    @jax.jit
    def run(params, x):
        out, pull = jax.vjp(lambda params, x: model.apply({"params": params}, x), params, x)
        return out, *pull(cotangent)

    out, gradients, dx = run(params, x)
    for found, expected in ((out, case["out"]), (dx, case["dx"])):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)
    assert not gradients["router"].get("bias", jnp.zeros(1)).any()  # moved outside the gradient
    case["gradients"]["router"].pop("bias", None), gradients["router"].pop("bias", None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), gradients, case["gradients"])
