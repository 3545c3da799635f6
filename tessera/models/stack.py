"""A decoder's blocks in a row: one after the other, or one scan for every group of layers that is recomputed alike."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from tessera.models.remat import Remat

MakeBlock = Callable[..., nn.Module]


def run_stack(
    parent: nn.Module,
    config: Any,
    kinds: tuple[MakeBlock, MakeBlock],
    arguments: tuple,
    inputs: tuple[Float[Array, "B T D"], Array, Array | None],
) -> Float[Array, "B T D"]:
    """Run all blocks, recomputing what `remat` says; called inside the compact method of `parent`.

    Args:
      parent: whose submodules `blocks` (scanned) or `blocks_0`, ... the blocks are.
      config: `tessera.models.transformer.TransformerConfig`.
      kinds: the class of a block, and that of a step of the scan where blocks differ.
      arguments: of either; a block takes the name of its feed-forward layer too.
      inputs: activations, positions, and token ids if wanted.

    Raises:
      ValueError: groups of scanned layers with routed experts, whose metrics would be stacked apart.
    """
    x_BTD, *rest = inputs
    period, groups = len(config.pattern), config.remat_groups
    if not config.scan:
        ways = [group for group in groups for _ in range(group.layers)]
        for i, way in enumerate(ways):
            block = recomputed(kinds[0], way, scanned=False)
            x_BTD, _ = block(*arguments, config.pattern[i % period], name=f"blocks_{i}")(x_BTD, *rest)
        return x_BTD

    def scan(way: Remat, x_BTD: jax.Array) -> jax.Array:
        stack = nn.scan(
            recomputed(kinds[period > 1], way, scanned=True),
            variable_axes={"params": 0, "intermediates": 0, "routings": 0},
            split_rngs={"params": True, "router": True},
            in_axes=nn.broadcast,
            length=way.layers // period,
        )
        return stack(*arguments, name="blocks")(x_BTD, *rest)[0]

    if len(groups) == 1 or parent.is_initializing():
        return scan(replace(groups[0], layers=config.layers), x_BTD)
    if "routed" in config.pattern:
        raise ValueError(f"remat={config.remat!r}: groups of layers with routed experts need a plan, or scan=False")
    start = 0
    for way in groups:
        x_BTD = nn.map_variables(
            lambda _, x, way=way: scan(way, x), "params", trans_in_fn=_only(start, start + way.layers)
        )(parent, x_BTD)
        start += way.layers
    return x_BTD


def recomputed(block: MakeBlock, way: Remat, scanned: bool) -> MakeBlock:
    """A block whose backward pass computes again what it does not keep."""
    if way.base == "none":
        return block
    # Inside a scan XLA cannot merge the recomputation with the forward pass, so the barrier is not needed there.
    return nn.remat(block, policy=way.policy, prevent_cse=not scanned)


def _only(start: int, end: int) -> Callable[[dict], dict]:
    """These layers' parameters, as if they were all of the stack."""

    def cut(variables: dict) -> dict:
        blocks = jax.tree.map(lambda leaf: leaf[start:end], variables["params"]["blocks"])
        return {"params": {**variables["params"], "blocks": blocks}}

    return cut
