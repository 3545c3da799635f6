"""Low-rank adaptation (LoRA: Hu et al. 2022, arXiv:2106.09685) as pure functions on trees of parameters.

An adapter is a small tree with the paths of the kernels it changes: a [*stack, *inputs, R] and b [*stack, R, *outputs]
in place of a kernel [*stack, *inputs, *outputs], stacked over layers and experts as the kernel is. `apply` adds
scale * a b to the kernels, so a loss of parameters becomes one of adapters, under any plan:

    loss_fn(lora.apply(params, adapters, config), batch)

A kernel may be masked, then what is added stays inside the mask, or quantized (QLoRA: Dettmers et al. 2023,
arXiv:2305.14314), then it is dequantized first. Adapters are written for `peft` by `tessera.serving.adapters`.

Example:
  >>> import jax, jax.numpy as jnp
  >>> from tessera.lm import lora
  >>> params = {"blocks": {"mlp": {"up": {"kernel": jnp.ones((2, 8, 16))}, "gain": jnp.ones((2, 8))}}}
  >>> config = lora.LoRAConfig(rank=4)
  >>> adapters = lora.initialize(params, config, key=jax.random.key(0))
  >>> jax.tree.map(jnp.shape, adapters)
  {'blocks': {'mlp': {'up': {'kernel': {'a': (2, 8, 4), 'b': (2, 4, 16)}}}}}
  >>> bool((lora.apply(params, adapters, config)["blocks"]["mlp"]["up"]["kernel"] == 1).all())  # b begins at zero
  True
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from lottery import structures
from sharding.inference.quantize import dequantize, is_quantized
from sharding.rules import path_name

__all__ = ["LoRAConfig", "apply", "initialize", "nested", "pairs", "stack"]


@dataclass(frozen=True)
class LoRAConfig:
    """Which kernels are adapted, and by how much.

    Attributes:
      rank: R of the matrix that is added, at most the smaller side of a kernel; 0 trains without adapters.
      alpha: what is added is alpha / rank times a b.
      targets: regular expression of the paths of the kernels that get an adapter.
      rank_stabilized: alpha / sqrt(rank) in place of alpha / rank (rsLoRA: Kalajdzievski 2023, arXiv:2312.03732).
    """

    rank: int = 0
    alpha: float = 16.0
    targets: str = r"/(query|key|value|output|gate|up|down)/kernel$"
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank={self.rank} must not be negative")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(f"targets={self.targets!r} is no regular expression: {error}") from None

    @property
    def scale(self) -> float:
        """Factor on a b."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


def initialize(params: PyTree, config: LoRAConfig, *, key: Key[Array, ""]) -> dict[str, Any]:
    """Make adapters that change nothing yet: a uniform within 1 / sqrt(inputs), as peft draws it, b zero; float32.

    Args:
      params: of the model; shapes are enough. Kernels may be quantized.
      config: rank and targets.
      key: of a.

    Raises:
      ValueError: no kernel is a target, a target whose axes of inputs and outputs are not known, or a rank above the
        smaller side of a kernel.
    """
    if not config.rank:
        raise ValueError("rank=0 has no adapters: at least 1 is needed")
    found: dict[str, Any] = {}
    paths = []
    for path, leaf in _leaves(params):
        if not re.search(config.targets, path):
            paths.append(path)
            continue
        shape = leaf.values.shape if is_quantized(leaf) else leaf.shape
        try:
            layout = structures.layout(path, shape, strict=True)
            _, inputs, outputs = layout.matrices(shape)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if config.rank > min(inputs, outputs):
            raise ValueError(
                f"rank={config.rank} of {path}, {inputs} inputs and {outputs} outputs: at most the smaller"
            )
        split = len(shape) - layout.outputs
        own = jax.random.fold_in(key, len(paths) + len(found))
        bound = 1 / math.sqrt(inputs)
        a = jax.random.uniform(own, (*shape[:split], config.rank), jnp.float32, -bound, bound)
        found[path] = {"a": a, "b": jnp.zeros((*shape[: layout.batch], config.rank, *shape[split:]), jnp.float32)}
        paths.append(path)
    if not found:
        shown = ", ".join(path for path in paths if path.endswith("kernel")) or ", ".join(paths)
        raise ValueError(f"targets={config.targets!r} fits none of the kernels: {shown}")
    return nested(found)


def apply(params: PyTree, adapters: PyTree, config: LoRAConfig, masks: PyTree | None = None) -> PyTree:
    """Add adapters to the kernels they belong to: kernel + scale * a b, in the kernel's dtype.

    Used in every step of training, and once to merge a finished adapter.

    Args:
      params: of the model. A quantized kernel becomes a float32 one.
      adapters: of some of its kernels.
      config: their scale.
      masks: of the model, True where weights are alive: pruned weights stay zero.

    Raises:
      ValueError: an adapter of a kernel that is not there, or of another shape.
    """
    flat = dict(_leaves(params))
    alive = {} if masks is None else dict(_leaves(masks))
    for path, pair in pairs(adapters):
        if path not in flat:
            raise ValueError(f"the adapter changes {path}, which the model does not have")
        a, b = (jnp.asarray(pair[side]) for side in "ab")
        flat[path] = _added(path, flat[path], a, b, config.scale, alive.get(path))
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_quantized), list(flat.values()))


def _added(path: str, kernel: Any, a: Array, b: Array, scale: float, alive: Any) -> Float[Array, "..."]:
    kernel = dequantize(kernel) if is_quantized(kernel) else jnp.asarray(kernel)
    layout, rank = structures.layout(path, kernel.shape, strict=True), a.shape[-1]
    split = kernel.ndim - layout.outputs
    wanted = (*kernel.shape[:split], rank), (*kernel.shape[: layout.batch], rank, *kernel.shape[split:])
    if (a.shape, b.shape) != wanted:
        raise ValueError(
            f"the adapter of {path} has shapes {a.shape} and {b.shape}; its kernel {kernel.shape} needs "
            f"{wanted[0]} and {wanted[1]}"
        )
    stack = int(np.prod(kernel.shape[: layout.batch]))
    product = a.reshape(stack, -1, rank) @ b.reshape(stack, rank, -1)
    total = (kernel.astype(jnp.float32) + scale * product.reshape(kernel.shape)).astype(kernel.dtype)
    return total if alive is None else jnp.where(alive, total, jnp.zeros_like(total))


def stack(adapters: Sequence[tuple[PyTree, LoRAConfig]]) -> dict[str, Any]:
    """Stack adapters of one model behind an adapter 0 that adds nothing, for rows that each choose one.

    Ranks are padded to the largest with zeros, kernels that an adapter leaves out get zeros, scales are folded into b.

    Args:
      adapters: each with its settings, of kernels that are stacked by layer only.

    Returns:
      a [L, A + 1, *inputs, R] and b [L, A + 1, R, *outputs], float32 on the host, of every kernel that any adapts.

    Example:
      >>> import numpy as np
      >>> from tessera.lm import lora
      >>> one = {"blocks": {"up": {"kernel": {"a": np.ones((2, 8, 1)), "b": np.ones((2, 1, 4))}}}}
      >>> two = {"blocks": {"up": {"kernel": {"a": np.ones((2, 8, 3)), "b": np.ones((2, 3, 4))}}}}
      >>> made = lora.stack([(one, lora.LoRAConfig(1, alpha=2.0)), (two, lora.LoRAConfig(3, alpha=3.0))])
      >>> made["blocks"]["up"]["kernel"]["a"].shape, made["blocks"]["up"]["kernel"]["b"][0, :, 0, 0].tolist()
      ((2, 3, 8, 3), [0.0, 2.0, 1.0])
    """
    found: dict[str, Any] = {}
    most = max(pair["a"].shape[-1] for tree, _ in adapters for _, pair in pairs(tree))
    for number, (tree, config) in enumerate(adapters, 1):
        for path, pair in pairs(tree):
            (layers, *inputs, rank), outputs = pair["a"].shape, pair["b"].shape[2:]
            shapes = {"a": (layers, len(adapters) + 1, *inputs, most), "b": (layers, len(adapters) + 1, most, *outputs)}
            made = found.setdefault(path, {side: np.zeros(shape, np.float32) for side, shape in shapes.items()})
            made["a"][:, number, ..., :rank] = pair["a"]
            made["b"][:, number, :rank] = config.scale * np.asarray(pair["b"], np.float32)
    return nested(found)


def _leaves(tree: PyTree) -> list[tuple[str, Any]]:
    return [(path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_quantized)]


def pairs(adapters: PyTree) -> list[tuple[str, Any]]:
    """List adapters as (path of the kernel, {a, b}).

    Example:
      >>> import jax.numpy as jnp
      >>> from tessera.lm import lora
      >>> [path for path, _ in lora.pairs({"up": {"kernel": {"a": jnp.zeros((8, 2)), "b": jnp.zeros((2, 4))}}})]
      ['up/kernel']
    """
    found = jax.tree.leaves_with_path(adapters, is_leaf=lambda node: isinstance(node, dict) and set(node) == {"a", "b"})
    return [(path_name(path), pair) for path, pair in found]


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nest adapters that are given by the paths of their kernels: the inverse of `pairs`.

    Example:
      >>> from tessera.lm import lora
      >>> lora.nested({"up/kernel": {"a": 1, "b": 2}})
      {'up': {'kernel': {'a': 1, 'b': 2}}}
    """
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = value
    return tree
