"""Activations of a decoder's units, for activation matching by the permutations of `lottery.align.decoder_spec`."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from tessera.models.transformer import Decoder, Norm, TransformerConfig, to_heads


def decoder_activations(
    params: PyTree, tokens_BT: Int[Array, "B T"], config: TransformerConfig
) -> dict[str, np.ndarray]:
    """Compute activations [samples, units] by permutation name, for `lottery.align.match_activations`.

    "residual": the normalized residual stream before every feed-forward layer, samples over layers and tokens. "ff_i":
    the neurons of layer i, over tokens. "heads_i": its key/value heads by their values, over tokens and the channels of
    a head, which stay in their order.

    Args:
      params: of a decoder with scanned SwiGLU blocks (not opened). tokens_BT: inputs.
      config: the model.

    Raises:
      ValueError: blocks that are not scanned or not dense, latent attention, or norms that are not on what layers read.
    """
    if not config.scan or config.mlp != "swiglu" or config.latent.kv_rank or config.norm_position == "post":
        raise ValueError(
            f"decoder_activations: scan={config.scan}, mlp={config.mlp!r}, latent.kv_rank={config.latent.kv_rank}, "
            f"norm_position={config.norm_position!r}; scanned SwiGLU blocks that norm what they read are needed, "
            "without latent attention"
        )

    @jax.jit
    def norms(params: PyTree, tokens_BT: Array) -> PyTree:
        _, captured = Decoder(config).apply(
            {"params": params},
            tokens_BT,
            capture_intermediates=lambda module, _: isinstance(module, Norm),
            mutable=["intermediates"],
        )
        return captured["intermediates"]["blocks"]

    params = jax.tree.map(jnp.asarray, params)
    captured = norms(params, tokens_BT)
    before_LBTD, mlp_LBTD = (captured[f"{name}_norm"]["__call__"][0] for name in ("attention", "mlp"))
    blocks = params["blocks"]
    result = {"residual": np.asarray(mlp_LBTD).reshape(-1, config.width)}
    for i in range(config.layers):
        value_BTKh = to_heads(before_LBTD[i], blocks["attention"]["value"]["kernel"][i])
        result[f"heads_{i}"] = np.asarray(jnp.swapaxes(value_BTKh, 2, 3)).reshape(-1, config.kv_size)
        gate, up = (mlp_LBTD[i] @ blocks["mlp"][name]["kernel"][i] for name in ("gate", "up"))
        result[f"ff_{i}"] = np.asarray(jax.nn.silu(gate) * up).reshape(-1, config.ff_size)
    return result
