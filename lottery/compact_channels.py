"""Compaction of convolutions: dead channels cut out of a network, its batch statistics included, outputs unchanged.

A channel without outgoing weights is dropped. One whose own weights are all zero is the same number everywhere in the
image; since padding makes a constant differ at the borders, such channels are not folded into the next bias but merged
into a single channel of ones, whose outgoing weights carry their sum. Behind group normalization nothing is constant,
and a zero channel takes part in its group's statistics: there channels are dropped that have neither incoming nor
outgoing weights (as `lottery.coupled.keep_units` leaves them), and the smaller network counts them as zeros. Runs on
the host, once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from lottery.coupled import Member

__all__ = ["Link", "chain", "channel_groups", "compact_channels", "group_sizes", "residual"]

STATISTICS = "batch_stats"


@dataclass(frozen=True)
class Link:
    """A hidden layer of channels: the layers before and after it, and its normalization; a ReLU stands between.

    Attributes:
      writer: name of the convolution before, {kernel [h, w, I, C], bias [C] if any}.
      reader: name of the layer after, a convolution {kernel [h, w, C, O]} or dense {kernel [C, O] or, flattened,
        [H W C, O]}.
      norm: name of the normalization {scale, bias [C]}, "" for none: batch normalization with {mean, var [C]} under
        "batch_stats", or group normalization.
      groups: number of groups (at most C); 0 for batch normalization.

    Example:
      >>> lottery.compact_channels.Link("conv0", "conv1", "norm0")
      Link(writer='conv0', reader='conv1', norm='norm0', groups=0)
    """

    writer: str
    reader: str
    norm: str = ""
    groups: int = 0


def chain(convolutions: int, reader: str, norm: bool, groups: int = 0) -> tuple[Link, ...]:
    """List the links of conv0, conv1, ... with norm0, ... if any; after the last one comes the layer `reader`.

    Example:
      >>> [link.reader for link in lottery.compact_channels.chain(2, "output", norm=True)]
      ['conv1', 'output']
    """
    names = [*(f"conv{i}" for i in range(convolutions)), reader]
    return tuple(Link(names[i], names[i + 1], f"norm{i}" if norm else "", groups) for i in range(convolutions))


def residual(stages: int, blocks: int, norm: bool = True, groups: int = 0) -> tuple[Link, ...]:
    """List the links inside a ResNet's blocks: between the first and second convolution of stage0_0, stage0_1, ...

    Example:
      >>> lottery.compact_channels.residual(1, 2)[1].writer
      'stage0_1_first_conv'
    """
    names = [f"stage{stage}_{block}" for stage in range(stages) for block in range(blocks)]
    norms = [f"{n}_first_norm" if norm else "" for n in names]
    return tuple(Link(f"{n}_first_conv", f"{n}_second_conv", at, groups) for n, at in zip(names, norms, strict=True))


def channel_groups(links: Sequence[Link]) -> dict[str, tuple[Member, ...]]:
    """List the coupled units (`lottery.coupled`) of links between convolutions: a filter and the weights after it.

    Example:
      >>> groups = lottery.compact_channels.channel_groups([lottery.compact_channels.Link("conv0", "conv1")])
      >>> [member.path for member in groups["conv0"]]
      ['conv0/kernel', 'conv1/kernel']
    """
    return {
        link.writer: (Member(f"{link.writer}/kernel", (3,)), Member(f"{link.reader}/kernel", (2,))) for link in links
    }


def compact_channels(
    params: Mapping[str, PyTree], links: Sequence[Link], eps: float = 1e-5
) -> tuple[dict[str, PyTree], dict[str, int]]:
    """Cut dead channels out of links, in order from the input to the output.

    Args:
      params: layers by name and "batch_stats"; masked weights are exact zeros. What no link names stays as it is.
      links: `chain`, `residual` or written by hand; a channel must go into its reader alone.
      eps: of the batch normalization.

    Returns:
      (smaller params, numpy; channels left by writer, at least one each). With group normalization the smaller network
      also needs to know whose groups they were: `group_sizes`.

    Raises:
      ValueError: a layer that is missing or shapes that do not fit, naming them.

    Example:
      >>> rng = np.random.default_rng(0)
      >>> params = {"conv0": {"kernel": rng.normal(size=(3, 3, 1, 4))}, "output": {"kernel": rng.normal(size=(4, 2))}}
      >>> params["output"]["kernel"][1] = 0  # channel 1 is not used
      >>> links = lottery.compact_channels.chain(1, "output", norm=False)
      >>> small, left = lottery.compact_channels.compact_channels(params, links)
      >>> small["output"]["kernel"].shape, left
      ((3, 2), {'conv0': 3})
    """
    tree, left = _compacted(params, links, eps)
    return tree, {writer: len(channels) for writer, channels in left.items()}


def group_sizes(params: Mapping[str, PyTree], links: Sequence[Link]) -> dict[str, tuple[int, ...]]:
    """Find what compaction leaves of the groups, by writer: channels a group has now, then channels left of each group.

    Args, Raises: as `compact_channels`, params before it. () for links without groups.

    Example:
      >>> rng = np.random.default_rng(0)
      >>> params = {"conv0": {"kernel": rng.normal(size=(3, 3, 1, 4))}, "output": {"kernel": rng.normal(size=(4, 2))}}
      >>> params["output"]["kernel"][1] = 0  # channel 1 is not used
      >>> links = lottery.compact_channels.chain(1, "output", norm=False)
      >>> lottery.compact_channels.group_sizes(params, links)
      {'conv0': ()}
    """
    _, channels_left = _compacted(params, links, 1e-5)
    found: dict[str, tuple[int, ...]] = {}
    for link in links:
        channels = np.shape(params[link.writer]["kernel"])[-1]
        groups = min(link.groups, channels)
        size = channels // groups if groups else 0
        left = np.bincount(channels_left[link.writer] // size, minlength=groups).tolist() if size else []
        found[link.writer] = (size, *left) if size else ()
    return found


def _compacted(
    params: Mapping[str, PyTree], links: Sequence[Link], eps: float
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The smaller tree, and the channels left of every writer."""
    tree: dict[str, Any] = jax.tree.map(np.asarray, dict(params))
    for link in links:
        tree = _merge_constants(tree, link, eps)
    left = {}
    for link in reversed(links):
        used = _rows(tree, link).any((0, 2))
        if link.groups:
            used |= tree[link.writer]["kernel"].any((0, 1, 2)) | (tree[link.writer].get("bias", np.zeros(1)) != 0)
        left[link.writer] = np.flatnonzero(used) if used.any() else np.asarray([0])
        tree = _take(tree, link, left[link.writer])
    return tree, {link.writer: left[link.writer] for link in links}


def _rows(tree: Mapping[str, Any], link: Link) -> np.ndarray:
    """The reader's kernel as [positions, C, O]."""
    for name in (link.writer, link.reader, *([link.norm] if link.norm else [])):
        if name not in tree:
            raise ValueError(f"compact_channels: no layer {name}; layers: {', '.join(tree)}")
    if link.norm and not link.groups and link.norm not in tree.get(STATISTICS, {}):
        raise ValueError(
            f"compact_channels: {link.norm} has no running mean and variance under {STATISTICS}: if it is group "
            "normalization, the link needs its number of groups"
        )
    channels, kernel = tree[link.writer]["kernel"].shape[-1], tree[link.reader]["kernel"]
    inputs = kernel.size // kernel.shape[-1]
    if inputs % channels or (kernel.ndim == 4 and kernel.shape[2] != channels):
        raise ValueError(
            f"compact_channels: {link.reader} of shape {kernel.shape} does not read the {channels} channels of "
            f"{link.writer}"
        )
    return kernel.reshape(inputs // channels, channels, kernel.shape[-1])


def _with_rows(tree: dict[str, Any], link: Link, rows: np.ndarray) -> dict[str, Any]:
    old = tree[link.reader]["kernel"]
    shape = (*old.shape[:2], *rows.shape[1:]) if old.ndim == 4 else (-1, old.shape[-1])
    return {**tree, link.reader: {**tree[link.reader], "kernel": rows.reshape(shape)}}


def _constant(tree: Mapping[str, Any], link: Link, eps: float) -> np.ndarray:
    """[C] what a channel is after norm and ReLU if its filter is zero."""
    channels = tree[link.writer]["kernel"].shape[-1]
    value = tree[link.writer].get("bias", np.zeros(channels, np.float32))
    if link.norm:
        norm, seen = tree[link.norm], tree[STATISTICS][link.norm]
        value = (value - seen["mean"]) / np.sqrt(seen["var"] + eps) * norm["scale"] + norm["bias"]
    return np.maximum(value, 0).astype(np.float32)


def _merge_constants(tree: dict[str, Any], link: Link, eps: float) -> dict[str, Any]:
    rows = _rows(tree, link).copy()
    dead = np.flatnonzero(~tree[link.writer]["kernel"].any((0, 1, 2)))
    if not len(dead) or link.groups:
        return tree
    constant = _constant(tree, link, eps)[dead]
    total = np.einsum("c,pco->po", constant, rows[:, dead])
    rows[:, dead] = 0
    rows[:, dead[0]] = total
    tree = _with_rows(tree, link, rows)
    # The first dead channel becomes the channel of ones: no input, scale 0, shift 1.
    one = lambda leaf, value: np.concatenate([leaf[: dead[0]], [np.float32(value)], leaf[dead[0] + 1 :]])  # noqa: E731
    if not link.norm:
        if "bias" not in tree[link.writer]:
            return tree  # without a bias the constant is zero, and so is `total`
        return {**tree, link.writer: {**tree[link.writer], "bias": one(tree[link.writer]["bias"], 1)}}
    norm = {**tree[link.norm], "scale": one(tree[link.norm]["scale"], 0), "bias": one(tree[link.norm]["bias"], 1)}
    return {**tree, link.norm: norm}


def _take(tree: dict[str, Any], link: Link, keep: np.ndarray) -> dict[str, Any]:
    """Only the channels `keep` of a link."""
    tree = _with_rows(tree, link, _rows(tree, link)[:, keep])
    pick = lambda part: {name: leaf[..., keep] for name, leaf in part.items()}  # noqa: E731
    tree = {**tree, link.writer: pick(tree[link.writer])}
    if link.norm:
        tree = {**tree, link.norm: pick(tree[link.norm])}
    if link.norm and not link.groups:
        tree = {**tree, STATISTICS: {**tree[STATISTICS], link.norm: pick(tree[STATISTICS][link.norm])}}
    return tree
