"""The loss of a `ShardedDecoder` under any plan, with pipeline stages through `sharding.pipeline.run`.

Parameters are the decoder's own tree, in the model's order (blocks [L, ...]), and so are gradients, optimizer states
and checkpoints: a run may go on under another plan. Where the layers do not divide by the stages, or a stage has
several chunks of them, a step moves the layers to their stages and the gradients back, once each (all-to-all over pp).
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import PyTree

from sharding.errors import PlanError
from sharding.pipeline.run import PipelineConfig, make_value_and_grad
from sharding.pipeline.run import make_loss as make_forward
from sharding.pipeline.stages import StageLayout, split_layers
from sharding.pipeline.ticks import StageFns
from tessera.parallel import decoder as unpipelined
from tessera.parallel.decoder import Layer, ShardedDecoder
from tessera.step import ROUTER_MEANS, LossFn, padding_share, router_metrics


def stage_layout(decoder: ShardedDecoder) -> StageLayout:
    """The plan's layout: layers as even as they can be over pp stages and `virtual` chunks; see `split_layers`.

    With `moe.every` n > 1 what is laid out are units of n blocks, of which the last is routed. The first dense layers
    of a routed model (`moe.first_k_dense_replace`) are not: the first stage has them besides.
    """
    return split_layers(decoder.units, decoder.plan.size("pp"), decoder.plan.virtual, decoder.plan.folded)


def arranged_decoder(decoder: ShardedDecoder, layout: StageLayout) -> ShardedDecoder:
    """The same decoder with blocks [p * v * n, ...] arranged by stage, which always divide by the stages."""
    c = decoder.config
    return replace(decoder, config=replace(c, layers=c.first_dense + len(layout.index) * len(c.pattern)))


def make_loss(decoder: ShardedDecoder, mesh: Mesh | AbstractMesh, layout: StageLayout | None = None) -> LossFn:
    """`loss(params, batch, key)` as `tessera.models.lm_loss.lm_loss` gives it, under any plan.

    With pipeline stages, differentiating it runs the plan's schedule, which computes the gradient along with the loss;
    calling it runs forward passes only. Metrics have no gradient. Where losses of routers are of the whole batch
    (`MoEConfig.whole_batch`), a forward pass of all microbatches comes first.

    Args:
      decoder: model and plan; any of the plan's axes may be larger than 1.
      mesh: from `sharding.mesh`.
      layout: which layer lives on which stage, default `stage_layout(decoder)`.

    Raises:
      PlanError: blocks that are not stacked (`scan` is off), a layout of another number of layers or stages, sizes the
        schedule cannot have, or (when called) a batch that does not divide.
    """
    if decoder.plan.size("pp") == 1:
        return unpipelined.make_loss(decoder, mesh)
    layout = layout or stage_layout(decoder)
    forms = decoder.config.forms(decoder.config.stacks[-1])
    if not decoder.config.scan:
        raise PlanError("a pipeline needs the blocks' parameters stacked along a layer axis: set scan=True")
    if layout.layers != decoder.units:
        raise PlanError(f"the layout has {layout.layers} layers, the model {decoder.units}; they must be equal")
    decoder = arranged_decoder(decoder, layout)
    config = PipelineConfig(
        decoder.plan.schedule,
        decoder.plan.microbatch_count,
        layout,
        batch_axes=decoder.batch_axes,
        sum_axes=decoder.plan.present("cp"),
        other_axes=decoder.plan.present("tp"),
        # The decoder's functions gather over fsdp themselves, layer by layer.
        gather_axes=("pp",),
        # What is computed again within a stage is what the layers' remat says; F saves all of them if it says none.
        keep=decoder.config.remat_groups[0].base == "none",
        skip_idle=not (decoder.plan.present("cp") and decoder.plan.context == "ring"),
        # The exchange of experts of one microbatch beside the products of another.
        paired=decoder.plan.folded and decoder.routed and bool(decoder.plan.present("ep")),
    )
    shared_specs = {name: spec for name, spec in decoder.specs.items() if name != "blocks"}
    form_specs = jax.tree.map(lambda leaf: PartitionSpec(*[None] * (leaf.ndim - 1)), forms)
    whole, microbatches = decoder.routed and decoder.config.moe.whole_batch, decoder.plan.microbatch_count

    def specs(given: bool) -> tuple[PyTree, Layer]:
        layer_specs = decoder.layer_specs(decoder.config.stacks[-1])
        return shared_specs, Layer(layer_specs, form_specs, PartitionSpec() if given else None)

    def split(params: PyTree, sums: Any) -> tuple[PyTree, Layer]:
        # The forms of attention, and sums of routers, go with the parameters of their layers.
        shared = {name: leaf for name, leaf in params.items() if name != "blocks"}
        return shared, Layer(params["blocks"], forms, sums)

    def make(dropping: bool) -> Any:
        fns = stage_fns(replace(decoder, dropping=dropping))
        # Without sums of routers, and with them.
        runs = {given: make_forward(fns, mesh, config, *specs(given)) for given in (False, True)}
        gradients = {given: make_value_and_grad(fns, mesh, config, *specs(given)) for given in (False, True)}

        def forward(params: PyTree, batch: PyTree, sums: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            return runs[sums is not None](*split(params, sums), batch)

        loss = jax.custom_vjp(forward)

        def loss_and_gradient(params: PyTree, batch: PyTree, sums: Any) -> Any:
            value, (shared, layers) = gradients[sums is not None](*split(params, sums), batch)
            return value, {**shared, "blocks": layers.params}

        def scale(grads: PyTree, cotangent: Any) -> tuple[PyTree, None, None]:
            return jax.tree.map(lambda grad: grad * cotangent[0].astype(grad.dtype), grads), None, None

        loss.defvjp(loss_and_gradient, scale)
        return loss, forward

    # With a key, that is in training, a capacity and a bounded buffer of experts drop choices.
    losses = {dropping: make(dropping) for dropping in (False, True)}

    def loss_fn(params: PyTree, batch: Mapping[str, Any], key: Any = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss, forward = losses[decoder.routed and key is not None]
        micro = dict(unpipelined.micro_of(batch, decoder))
        asked, sums = unpipelined.asks_for_sums(micro), micro.pop("router_sums", None)
        if whole and sums is None:
            # What the losses of a microbatch need of the others is known after a forward pass of all.
            given = jax.lax.stop_gradient(params), micro | {"router_sums": None}, None
            value, metrics = jax.lax.stop_gradient(forward(*given))
            sums = metrics.pop("router/sums")[-layout.layers :] * metrics["weight"]
        if not asked:
            value, metrics = loss(params, micro, None if sums is None else sums / microbatches)
        del metrics["weight"]
        for name in ROUTER_MEANS if decoder.routed else ():
            metrics[f"router/{name}"] = metrics[f"router/{name}"][-layout.layers :]  # zeros of padding come first
        found = router_metrics(metrics) | padding_share(batch)
        return value, found | {"router/sums": sums} if asked else found

    return loss_fn


def stage_fns(decoder: ShardedDecoder) -> StageFns:
    """The decoder as a pipeline wants them; a layer recomputes what the config's `remat` says."""
    (group,), stack = decoder.config.remat_groups, decoder.config.stacks[-1]
    layer = partial(decoder.layer, stack) if group.base == "none" else decoder.checkpointed(stack, group)
    return StageFns(decoder.begin_stages, layer, decoder.head_loss)
