"""Convolutional and residual tickets, cut out: the same outputs from fewer numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lottery import compact_channels, coupled, criteria, masks, prune
from tessera.models.registry import STATISTICS, conv_net, resnet
from tessera.models.vision import ConvConfig, ResNetConfig

X = jax.random.normal(jax.random.key(9), (5, 8, 8, 3))


def shaken(tree):
    """Norms and statistics as training leaves them: nothing at its initial zero or one."""
    generator = np.random.default_rng(0)
    shake = lambda leaf: leaf + 0.3 * np.abs(generator.normal(size=leaf.shape)).astype(np.float32)  # noqa: E731
    return jax.tree.map(lambda leaf: jnp.asarray(shake(np.asarray(leaf))) if leaf.ndim == 1 else leaf, tree)


def removed(tree, which, removals):
    run = lambda p: prune.remove(criteria.magnitude(p), masks.ones(p), which, removals, "channel")  # noqa: E731
    return jax.jit(run)(tree)


def kept(tree, which, groups, counts):
    run = lambda p: coupled.keep_units(criteria.magnitude(p), masks.ones(p), which, groups, counts)  # noqa: E731
    return jax.jit(run)(tree)


def close(network, ticket, small_network, small):
    want = jax.jit(network.apply)(ticket, X)
    got = jax.jit(small_network.apply)(jax.tree.map(jnp.asarray, small), X)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * float(jnp.abs(want).max()))


CONV = ConvConfig(blocks=((6, 8), (10,)), dense=(), classes=4)


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("dense", [(), (12,)], ids=["average", "flat"])
@pytest.mark.parametrize("count", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_channels_of_a_chain_are_cut_out(norm, dense, count):
    config = dataclasses.replace(CONV, norm=norm, dense=dense)
    network = conv_net(config, X)
    tree = shaken(jax.jit(network.init)(jax.random.key(0)))
    which = masks.prunable(tree, (("dense|output", False),))
    removals = {f"conv{i}/kernel": count for i in range(3)}
    mask = removed(tree, which, removals)
    ticket = masks.apply(tree, mask)
    links = compact_channels.chain(3, "dense0" if dense else "output", norm == "batch")
    small, left = compact_channels.compact_channels(ticket, links)
    # One channel of ones may stand for all that were cut.
    for name, size in zip(("conv0", "conv1", "conv2"), (6, 8, 10), strict=True):
        assert size - count <= left[name] <= size - count + 1
    sizes = dataclasses.replace(config, blocks=((left["conv0"], left["conv1"]), (left["conv2"],)))
    close(network, ticket, conv_net(sizes, X), small)
    if norm == "batch":
        assert small[STATISTICS]["norm1"]["var"].shape == (left["conv1"],)


def test_coupled_channels_of_a_residual_network_are_cut_out():
    config = ResNetConfig(blocks=1, widths=(6, 8), classes=4)
    network = resnet(config, X)
    tree = shaken(jax.jit(network.init)(jax.random.key(0)))
    links = compact_channels.residual(2, 1)
    groups = compact_channels.channel_groups(links)
    which = masks.prunable(tree)
    counts = {"stage0_0_first_conv": 2, "stage1_0_first_conv": 5}
    mask = kept(tree, which, groups, counts)
    ticket = masks.apply(tree, mask)
    small, left = compact_channels.compact_channels(ticket, links)
    assert left == counts
    close(network, ticket, resnet(dataclasses.replace(config, inner=tuple(left.values())), X), small)
    alone = removed(tree, which, {"stage0_0_first_conv/kernel": 3})
    ticket = masks.apply(tree, alone)
    small, left = compact_channels.compact_channels(ticket, links)
    # What three dead channels leave behind, if anything, fits into one.
    assert left["stage0_0_first_conv"] in (3, 4) and left["stage1_0_first_conv"] == 8
    close(network, ticket, resnet(dataclasses.replace(config, inner=tuple(left.values())), X), small)


@pytest.mark.parametrize("kind", ["chain", pytest.param("residual", marks=pytest.mark.slow)])
def test_channels_behind_group_normalization_go_where_nobody_writes_and_nobody_reads(kind):
    if kind == "chain":
        config, make = ConvConfig(blocks=((6, 8),), dense=(), classes=4, norm="group", groups=2), conv_net
        links = compact_channels.chain(1, "conv1", True, 2)
        counts = {"conv0": 2}
    else:
        config, make = ResNetConfig(blocks=1, widths=(6, 8), classes=4, norm="group", groups=2), resnet
        links = compact_channels.residual(2, 1, groups=2)
        counts = {"stage0_0_first_conv": 1, "stage1_0_first_conv": 5}
    network = make(config, X)
    tree = shaken(jax.jit(network.init)(jax.random.key(0)))
    groups = compact_channels.channel_groups(links)
    mask = kept(tree, masks.prunable(tree), groups, counts)
    ticket = masks.apply(tree, mask)
    small, left = compact_channels.compact_channels(ticket, links)
    parts = compact_channels.group_sizes(ticket, links)
    assert left == counts and {name: sum(part[1:]) for name, part in parts.items()} == counts
    if kind == "chain":
        sizes = dataclasses.replace(config, blocks=((left["conv0"], 8),), left=(parts["conv0"], ()))
    else:
        sizes = dataclasses.replace(config, inner=tuple(left.values()), left=tuple(parts.values()))
    close(network, ticket, make(sizes, X), small)
    # A filter of zeros that somebody reads is not a constant here, and stays.
    alone = removed(tree, masks.prunable(tree), {f"{links[0].writer}/kernel": 3})
    assert compact_channels.compact_channels(masks.apply(tree, alone), links)[1][links[0].writer] == 6
    with pytest.raises(ValueError, match="does not fit channels"):
        dataclasses.replace(sizes, left=((3, 3, 3),) * len(sizes.left))


def test_layers_that_do_not_chain_are_named():
    shapes = jax.eval_shape(conv_net(CONV, X).init, jax.random.key(0))
    tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    tree = {**tree, "norm0": {"scale": np.ones(6, np.float32), "bias": np.zeros(6, np.float32)}}  # as of groups
    for links, message in [
        ((compact_channels.Link("conv0", "conv1", "norm0"),), "norm0 has no running mean and variance"),
        ((compact_channels.Link("conv7", "conv1"),), "no layer conv7"),
        ((compact_channels.Link("conv0", "conv2"),), "conv2 of shape .* does not read the 6 channels of conv0"),
    ]:
        with pytest.raises(ValueError, match=message):
            compact_channels.compact_channels(tree, links)
