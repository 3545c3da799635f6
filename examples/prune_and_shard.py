"""Prune a trained tree of parameters with calibration data (Wanda, SparseGPT), then lay a plan over what is left.

The tree is named as Hugging Face's Llama is, [outputs, inputs] and called `weight`; nothing here wants another shape. A
layer is pruned by what its inputs look like: weights on inputs that are always small can go, and the ones that stay
can make up for them.

Run: python examples/prune_and_shard.py (about 10 seconds of processor time, most of it compiling)
"""

import jax
import jax.numpy as jnp

import sharding
from lottery import calibrated

WIDTH, HIDDEN, LAYERS = 64, 128, 2
keys = iter(jax.random.split(jax.random.key(0), 100))


def kernel(outputs, inputs):
    """Stand in for a weight that you load."""
    return {"weight": jax.random.normal(next(keys), (outputs, inputs)) / inputs**0.5}


model = {
    f"layers.{i}": {"mlp": {"up_proj": kernel(HIDDEN, WIDTH), "down_proj": kernel(WIDTH, HIDDEN)}}
    for i in range(LAYERS)
}
# Real activations are uneven and correlated; so are these.
mixing = jax.random.normal(next(keys), (WIDTH, WIDTH)) * jnp.geomspace(3, 0.1, WIDTH)
calibration, held_out = (jax.random.normal(next(keys), (1024, WIDTH)) @ mixing for _ in range(2))


def forward(model, x):
    """Residual feed-forward layers."""
    for layer in model.values():
        hidden = jax.nn.relu(x @ layer["mlp"]["up_proj"]["weight"].T)
        x = x + hidden @ layer["mlp"]["down_proj"]["weight"].T
    return x


def magnitude(w, x):
    """Score by size alone, inputs unseen."""
    return jnp.where(calibrated.keep_best(jnp.abs(w), 0.5, by_output=True), w, 0)


def wanda(w, x):
    """Score by size times the norm of the input (Sun et al. 2023)."""
    scores = calibrated.wanda(w, jnp.linalg.norm(x, axis=0))
    return jnp.where(calibrated.keep_best(scores, 0.5, by_output=True), w, 0)


def sparsegpt(w, x):
    """Remove weights input by input, and let the later ones make up for it (Frantar & Alistarh 2023)."""
    return calibrated.sparsegpt(w, x.T @ x, 0.5).weight


@jax.jit(static_argnums=0)
def prune(method, model, x):
    """Prune layer after layer, each by the inputs that the pruned layers before it make."""
    pruned = {}
    for name, layer in model.items():
        up = method(layer["mlp"]["up_proj"]["weight"].T, x).T  # the functions take [inputs, outputs]
        hidden = jax.nn.relu(x @ up.T)
        down = method(layer["mlp"]["down_proj"]["weight"].T, hidden).T
        pruned[name] = {"mlp": {"up_proj": {"weight": up}, "down_proj": {"weight": down}}}
        x = x + hidden @ down.T
    return pruned


exact = forward(model, held_out)
error = {}
for method in (magnitude, wanda, sparsegpt):
    pruned = prune(method, model, calibration)
    alive = sum(int((leaf != 0).sum()) for leaf in jax.tree.leaves(pruned))
    assert alive == sum(leaf.size for leaf in jax.tree.leaves(model)) // 2
    error[method.__name__] = float(jnp.square(forward(pruned, held_out) - exact).sum() / jnp.square(exact).sum())
    print(f"{method.__name__:10s} half of the weights gone, {error[method.__name__]:.1%} of the output changed")
assert error["sparsegpt"] < error["wanda"] < error["magnitude"]

# Where each weight would lie on eight devices: first axis outputs, second inputs, by the names of the paths.
rules = sharding.Rules(
    paths=((r"up_proj/weight$", ("ff", "width")), (r"down_proj/weight$", ("width", "ff"))),
)
specs = sharding.param_specs(pruned, sharding.Plan("fsdp=4, tp=2").sizes, rules)
print("up_proj on fsdp=4, tp=2:", specs["layers.0"]["mlp"]["up_proj"]["weight"])
assert tuple(specs["layers.0"]["mlp"]["up_proj"]["weight"]) == ("tp", "fsdp")
