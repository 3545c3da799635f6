"""Activation checkpointing (rematerialization) and offload, by name and by group of layers.

A setting is one text, so that it can be a flag:

    none                              keep everything
    full                              keep a block's input, compute the rest again
    dots                              keep the results of matrix products
    save(attended+gate_up)            keep these activations and the input, compute the rest again
    offload(residual)                 keep these in the host's memory, fetched when they are needed
    save(attended) offload(residual)  both
    12 full; 4 none                   the first 12 layers in one way, the next 4 in another

Activations that have names are `NAMES`. `offload(residual)` leaves next to nothing of the layers on the device.
Policies are those of `jax.checkpoint_policies`; naming what to keep follows Korthikanti et al. (2022), section 5, and
keeping it on the host Rajbhandari et al. (2021), section 5.1.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

# Block's input; rotated queries, keys and values; heads' results; what attention adds; both products of the gated
# feed-forward layer; what the feed-forward layer adds.
NAMES = ("residual", "qkv", "attended", "attention", "gate_up", "mlp")

_POLICY = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
_GRAMMAR = (
    f"none, full, dots, save(NAME+...) and/or offload(NAME+...), with names among {', '.join(NAMES)}; or groups such "
    "as '12 full; 4 none'"
)


@dataclass(frozen=True)
class Remat:
    """How `layers` layers in a row are treated; `base` is "none", "full", "dots" or "names": `saved`, `offloaded`."""

    layers: int
    base: str
    saved: tuple[str, ...] = ()
    offloaded: tuple[str, ...] = ()

    @property
    def policy(self) -> Callable[..., Any] | None:
        """For `jax.checkpoint`; None where nothing is recomputed."""
        if self.base != "names":
            return _POLICY[self.base]
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=self.saved,
            names_which_can_be_offloaded=self.offloaded,
            offload_src="device",
            offload_dst="pinned_host",
        )


@functools.cache
def parse_remat(text: str, layers: int) -> tuple[Remat, ...]:
    """Groups of layers of a setting, in order; together they are `layers`.

    Args:
      text: see the module.
      layers: of the model.

    Raises:
      ValueError: what cannot be read, an unknown name, one that is saved and offloaded, or groups that do not add up.
    """
    parts = [part.strip() for part in text.split(";")]
    groups = []
    for part in parts:
        found = re.fullmatch(r"(?:(\d+)\s+)?(\S.*)", part)
        if not found or (len(parts) > 1 and not found[1]):
            raise ValueError(f"remat={text!r}: {part!r} is not a number of layers and a policy: {_GRAMMAR}")
        groups.append(_group(int(found[1] or layers), found[2], text))
    total = sum(group.layers for group in groups)
    if total != layers or any(group.layers < 1 for group in groups):
        counts = " + ".join(str(group.layers) for group in groups)
        raise ValueError(f"remat={text!r}: groups of {counts} layers are {total}, the model has {layers}")
    return tuple(groups)


def _group(layers: int, text: str, setting: str) -> Remat:
    if text in _POLICY:
        return Remat(layers, text)
    names: dict[str, tuple[str, ...]] = {"save": (), "offload": ()}
    if not re.fullmatch(r"((save|offload)\([^()]+\)\s*)+", text):
        raise ValueError(f"remat={setting!r}: choose {_GRAMMAR}")
    for kind, inside in re.findall(r"(save|offload)\(([^()]+)\)", text):
        names[kind] += tuple(name.strip() for name in inside.split("+"))
    unknown = [name for name in names["save"] + names["offload"] if name not in NAMES]
    if unknown:
        raise ValueError(f"remat={setting!r}: no activation is called {unknown[0]!r}; choose among {', '.join(NAMES)}")
    both = set(names["save"]) & set(names["offload"])
    if both:
        raise ValueError(f"remat={setting!r}: {both.pop()!r} is to be saved and offloaded; choose one")
    return Remat(layers, "names", names["save"], names["offload"])


def layers_of(name: str, start: int, end: int) -> Callable[[dict], dict]:
    """A function that cuts layers start..end - 1 out of the variables of a stack."""

    def cut(variables: dict) -> dict:
        blocks = jax.tree.map(lambda leaf: leaf[start:end], variables["params"][name])
        return {"params": {**variables["params"], name: blocks}}

    return cut
