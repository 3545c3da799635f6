"""Pipeline parallelism (GPipe, 1F1B, interleaved 1F1B, ZB-H1, DualPipeV): loss and gradient as one SPMD program.

The program is a lockstep table (`sharding.pipeline.lockstep`) run inside shard_map: each of its phases is one
`lax.scan` over ticks, and a tick is F of one microbatch, B of another and W of a third, or some of them, on every stage
(`sharding.pipeline.ticks`). F saves only the stage's input, and B recomputes the stage and back-propagates with
`jax.vjp`; or F saves the layers' residuals (`PipelineConfig.keep`). The activation memory of a stage follows from the
table: what 2 p - 1 microbatches save for 1F1B whatever m is (Narayanan et al. 2021), what m save for GPipe (Huang et
al. 2019). ZB-H1 (Qi et al. 2023) and DualPipeV (DeepSeek-AI 2024) split the backward pass (`sharding.pipeline.split`).

The embedding is computed on the first stage alone and the loss on the last alone; idle stages compute nothing.
Gradients are summed over microbatches in float32, and over devices once, after the last tick.

Axes: p stages, m microbatches, v chunks, n layers of a chunk, L layers of the model, b rows of a microbatch on a
  device.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import PyTree

from sharding.errors import PlanError
from sharding.pipeline.lockstep import SPLIT, Lockstep, Phase, lockstep_schedule, phases, slots
from sharding.pipeline.split import split_layer
from sharding.pipeline.stages import StageLayout, stack_stages, unstack_stages
from sharding.pipeline.ticks import Carry, Messages, Stage, StageFns, vary, zeros_like
from sharding.zero import ShardedParams, broadcast_specs, is_spec

P = PartitionSpec
Metrics = dict[str, jax.Array]
REPLICATED = P()


@dataclass(frozen=True)
class PipelineConfig:
    """Configuration of a pipeline.

    Attributes:
      schedule: "gpipe", "1f1b", "interleaved" (1F1B over `layout.chunks` chunks per stage), "zb_h1" or "dualpipev" (two
        chunks, of a layout that is folded).
      microbatches: m.
      layout: layers of each stage.
      stage_axis: mesh axis of the stages; its size must be `layout.stages`.
      batch_axes: mesh axes the batch's rows are split over.
      sum_axes: further mesh axes over which the functions' losses and gradients are parts of a sum, such as "cp" where
        each device has some of the tokens.
      other_axes: further mesh axes that the functions use themselves and that their results do not vary over
        (`lax.psum` over "tp"). Axes named nowhere are left to the compiler.
      gather_axes: along which of the stage, batch and sum axes the pipeline all-gathers sharded parameters, once per
        step; along the others the functions do, layer by layer (ZeRO-3). None is all of them.
      keep: F saves the residuals of the layers and B computes nothing again; else F saves the stage's input alone and B
        computes the stage again.
      arranged: layers come arranged by stage (`sharding.pipeline.stages.stack_stages`), and so do their gradients.
        Otherwise they come in the model's order; unless the layout is `in_place`, each step then moves them to their
        stages and back.
      skip_idle: idle stages and padding branch round the layers. Must be off where a layer uses `lax.ppermute` (ring
        attention): all devices of the mesh participate in it at once, and XLA would wait for the ones that branched
        off. They then compute and drop the result, which costs no time, as the other stages are busy, but energy.
      paired: F and B of a tick, which in DualPipeV are of different microbatches, go through their layers in one loop:
        what one sends (an expert exchange) can be on its way while the other computes. No idle stage is skipped then.

    Example:
      >>> from sharding.pipeline import PipelineConfig, draw, split_layers
      >>> config = PipelineConfig("1f1b", microbatches=4, layout=split_layers(layers=6, stages=2))
      >>> print(draw(config.table(), note=False))
      stage 0 | F0 F1 .  F2 B0 F3 B1 .  B2 B3
      stage 1 | .  F0 B0 F1 B1 F2 B2 F3 B3 .
    """

    schedule: str
    microbatches: int
    layout: StageLayout
    stage_axis: str = "pp"
    batch_axes: tuple[str, ...] = ("dp",)
    sum_axes: tuple[str, ...] = ()
    other_axes: tuple[str, ...] = ()
    gather_axes: tuple[str, ...] | None = None
    keep: bool = False
    arranged: bool = False
    skip_idle: bool = True
    paired: bool = False

    @property
    def varying_axes(self) -> tuple[str, ...]:
        """Mesh axes over which activations and losses vary: stage, batch and sum axes."""
        return (self.stage_axis, *self.batch_axes, *self.sum_axes)

    @property
    def manual_axes(self) -> tuple[str, ...]:
        """All mesh axes of the config."""
        return (*self.varying_axes, *self.other_axes)

    def table(self) -> Lockstep:
        """Make the schedule as a table; raises PlanError for impossible sizes, or a layout that it does not fit."""
        table = lockstep_schedule(self.schedule, self.layout.stages, self.microbatches, self.layout.chunks)
        if self.paired and not table.folded:
            raise PlanError(
                f"paired=True with schedule={self.schedule!r}: only dualpipev has F and B that may be paired"
            )
        if (table.chunks, table.folded) != (self.layout.chunks, self.layout.folded):
            raise PlanError(
                f"schedule {self.schedule!r} needs a layout with chunks={table.chunks}, folded={table.folded}, not "
                f"chunks={self.layout.chunks}, folded={self.layout.folded}"
            )
        return table


def make_value_and_grad(
    fns: StageFns,
    mesh: Mesh | AbstractMesh,
    config: PipelineConfig,
    shared_specs: PyTree = REPLICATED,
    layer_specs: PyTree = REPLICATED,
) -> Callable[[PyTree, PyTree, PyTree], tuple[tuple[jax.Array, Metrics], tuple[PyTree, PyTree]]]:
    """Make the pipelined value_and_grad: `f(shared, layers, batch) -> ((loss, metrics), (shared and layer gradients))`.

    `shared` are the parameters of embedding and head (one tree, so a tied table is in it once),
    `layers` have leaves [L, ...] (or arranged by stage, see the config), and the gradients are like them. `batch` has
    leaves [B, ...], B a multiple of (product of the batch axes) * m. loss and metrics are float32 scalars: sums over
    the batch divided by the sum of the weights, and "weight" is that sum.

    Args:
      fns: the model.
      mesh: with the config's axes.
      config: schedule and layout.
      shared_specs: PartitionSpec (or tree of them) of the shared parameters. Along a batch axis or the stage axis it is
        storage only (FSDP): all-gather before the first tick, reduce-scatter of gradients after the last.
      layer_specs: the same for one layer, without the leading axis, which is always split over the stages.

    Raises:
      PlanError: (here) the mesh lacks an axis or its stages differ from the layout's, or the schedule cannot be run;
        (when called) the batch does not divide.

    Example:
      >>> import jax, jax.numpy as jnp, sharding
      >>> from sharding.pipeline import PipelineConfig, StageFns, make_value_and_grad, split_layers
      >>> fns = StageFns(
      ...     embed=lambda shared, micro: micro["x"] @ shared["in"],
      ...     layer=lambda layer, x, micro: x + jnp.tanh(x @ layer["w"]),
      ...     head_loss=lambda shared, x, micro: (((x @ shared["out"]) ** 2).sum(), jnp.float32(x.shape[0]), {}),
      ... )
      >>> config = PipelineConfig("1f1b", microbatches=4, layout=split_layers(layers=6, stages=2))
      >>> step = make_value_and_grad(fns, sharding.abstract_mesh(sharding.Plan("pp=2, dp=2")), config)
      >>> shared = {"in": jnp.zeros((3, 5)), "out": jnp.zeros((5, 1))}
      >>> (loss, metrics), grads = jax.eval_shape(step, shared, {"w": jnp.zeros((6, 5, 5))}, {"x": jnp.zeros((8, 3))})
      >>> grads[1]["w"].shape
      (6, 5, 5)
    """
    table = config.table()
    rest = slots(table, "B", "W")[0] if "W" in table.kinds else 0
    return _over_devices(fns, mesh, config, phases(table), (slots(table)[0], rest), (shared_specs, layer_specs))


def make_loss(
    fns: StageFns,
    mesh: Mesh | AbstractMesh,
    config: PipelineConfig,
    shared_specs: PyTree = REPLICATED,
    layer_specs: PyTree = REPLICATED,
) -> Callable[[PyTree, PyTree, PyTree], tuple[jax.Array, Metrics]]:
    """Make the pipelined loss `f(shared, layers, batch) -> (loss, metrics)`, forward only; see `make_value_and_grad`.

    Not for differentiation: its gradient would save the activations of every tick.

    Example:
      >>> import jax, jax.numpy as jnp, sharding
      >>> from sharding.pipeline import PipelineConfig, StageFns, make_loss, split_layers
      >>> fns = StageFns(
      ...     embed=lambda shared, micro: micro["x"] @ shared["in"],
      ...     layer=lambda layer, x, micro: x + jnp.tanh(x @ layer["w"]),
      ...     head_loss=lambda shared, x, micro: (((x @ shared["out"]) ** 2).sum(), jnp.float32(x.shape[0]), {}),
      ... )
      >>> config = PipelineConfig("gpipe", microbatches=2, layout=split_layers(layers=6, stages=2))
      >>> loss = make_loss(fns, sharding.abstract_mesh(sharding.Plan("pp=2, dp=2")), config)
      >>> shared = {"in": jnp.zeros((3, 5)), "out": jnp.zeros((5, 1))}
      >>> jax.eval_shape(loss, shared, {"w": jnp.zeros((6, 5, 5))}, {"x": jnp.zeros((8, 3))})[0].shape
      ()
    """
    rows = [phase.rows[:, :, :1] for phase in phases(config.table()) if "F" in phase.kinds]
    run = _over_devices(fns, mesh, config, [Phase("F", np.concatenate(rows))], None, (shared_specs, layer_specs))
    return lambda shared, layers, batch: run(shared, layers, batch)[0]


def _over_devices(
    fns: StageFns,
    mesh: Mesh | AbstractMesh,
    config: PipelineConfig,
    plan: list[Phase],
    numbers: tuple[int, int] | None,
    specs: tuple[PyTree, PyTree],
) -> Callable[[PyTree, PyTree, PyTree], Any]:
    """Make the shard_map of `_one_device`, with the table's rows of every stage on that stage.

    `numbers` are the slots from F to B and from B to W; None runs forward passes alone.
    """
    require_mesh(mesh, config)
    layout, axis = config.layout, config.stage_axis
    train = numbers is not None
    ends = np.zeros((layout.stages, 2), bool)
    ends[0, 0] = ends[-1, 1] = True
    constants = {
        "rows": [np.moveaxis(phase.rows, 1, 0) for phase in plan],
        "present": None if layout.even else (layout.index >= 0).reshape(layout.stages, -1),
        "ends": ends,
    }

    def call(shared: PyTree, layers: PyTree, batch: PyTree) -> Any:
        require_divides(batch, mesh, config)
        stacked = layers if config.arranged else stack_stages(layers, layout)
        shared_specs = broadcast_specs(specs[0], shared)
        layer_specs = jax.tree.map(lambda spec: P(axis, *spec), broadcast_specs(specs[1], layers), is_leaf=is_spec)

        def one_device(shared: PyTree, layers: PyTree, batch: PyTree, constants: Any) -> Any:
            constants = jax.tree.map(lambda x: x[0], constants)
            kinds = [phase.kinds for phase in plan]
            axes = config.varying_axes
            gather = axes if config.gather_axes is None else config.gather_axes
            own = (
                ShardedParams(shared, shared_specs, axes, gather),
                # A stage's layers are its own.
                ShardedParams(layers, layer_specs, axes[1:], tuple(name for name in gather if name != axis)),
            )
            return _one_device(fns, config, own, batch, kinds, constants, numbers)

        gradients = (shared_specs, layer_specs) if train else None
        run = jax.shard_map(
            one_device,
            mesh=mesh,
            in_specs=(shared_specs, layer_specs, P(config.batch_axes), P(axis)),
            out_specs=((P(), P()), gradients),
            axis_names=set(config.manual_axes),
        )
        value, grads = run(shared, stacked, batch, constants)
        if train and not config.arranged:
            grads = (grads[0], unstack_stages(grads[1], layout))
        return value, grads

    return call


def _one_device(
    fns: StageFns,
    config: PipelineConfig,
    stores: tuple[ShardedParams, ShardedParams],
    batch: PyTree,
    kinds: list[str],
    constants: Any,
    numbers: tuple[int, int] | None,
) -> Any:
    """Run the step on one device: all-gather parameters, run the phases, sum over devices."""
    axes = config.varying_axes
    m = config.microbatches
    shared, layers = (vary(store.all_gather(), axes) for store in stores)
    batch = jax.tree.map(lambda x: x.reshape(m, x.shape[0] // m, *x.shape[1:]), batch)
    stage = Stage(
        fns=fns,
        shared=shared,
        layers=layers,
        batch=batch,
        present=constants["present"],
        ends=constants["ends"],
        chunks=config.layout.chunks,
        stages=config.layout.stages,
        stage_axis=config.stage_axis,
        axes=axes,
        skip_idle=config.skip_idle and not config.paired,
        folded=config.layout.folded,
        keep=config.keep,
        apart=config.schedule in SPLIT,
        paired=config.paired,
    )
    micro = stage.micro(jnp.int32(0))
    x = jax.eval_shape(lambda: vary(fns.embed(shared, micro), axes))
    sums = jax.eval_shape(lambda: vary(fns.head_loss(shared, zeros_like(x, axes), micro), axes))
    train = numbers is not None
    saved = rest = None
    if numbers is not None:
        saved = x
        if stage.keep or stage.apart:
            stage, saved, rest = _residuals(stage, zeros_like(x, axes), micro)
        # What is a sum over an axis, as a loss of balance, must not vary over it when it is read again.
        saved = zeros_like(saved, axes[:1], lead=numbers[:1])
        rest = zeros_like(rest, axes[:1], lead=numbers[1:]) if stage.apart else None
    inbox = (zeros_like(x, axes),) * (3 if stage.folded else 1)
    carry = Carry(
        inbox=Messages(inbox, inbox if train else ()),
        saved=saved,
        rest=rest,
        shared=zeros_like(shared, axes, jnp.float32) if train else None,
        layers=zeros_like(layers, axes, jnp.float32) if train else None,
        sums=zeros_like(sums, axes),
    )
    for kind, rows in zip(kinds, constants["rows"], strict=True):
        carry = stage.scan(carry, kind, rows, save=train)
    total, weight, metrics = lax.psum(carry.sums, axes)
    # A mean over nothing is zero.
    scale = 1 / jnp.where(weight == 0, 1.0, weight)
    value = total * scale, {name: each * scale for name, each in metrics.items()} | {"weight": weight}
    if not train:
        return value, None
    grads = (
        store.reduce_scatter(total, scale) for store, total in zip(stores, (carry.shared, carry.layers), strict=True)
    )
    return value, tuple(grads)


def _residuals(stage: Stage, x: PyTree, micro: PyTree) -> tuple[Stage, PyTree, PyTree]:
    """Split the stage's layer into F, B and W; also what F and what B save of a microbatch (shapes alone)."""
    layers, present = stage.chunk((stage.layers, stage.present), jnp.int32(0))
    one = jax.tree.map(lambda leaf: leaf[0], layers)
    layer = lambda params, x, micro: vary(stage.fns.layer(params, x, micro), stage.axes)  # noqa: E731
    micro = vary(micro, stage.axes[:1])  # in a tick every stage has another microbatch
    stage = replace(stage, split=split_layer(layer, one, x, micro))
    saved = jax.eval_shape(lambda: stage.forward_layers(layers, present, x, micro))
    residuals = zeros_like(saved[1], ())
    rest = jax.eval_shape(lambda: stage.backward_layers(layers, present, residuals, x, micro)[1])
    return stage, saved if stage.keep else jax.eval_shape(lambda: x), rest


def require_mesh(mesh: Mesh | AbstractMesh, config: PipelineConfig) -> None:
    """Refuse a mesh that lacks one of the config's axes, or whose stage axis is not the layout's number of stages."""
    for axis in config.manual_axes:
        if axis not in mesh.shape:
            raise PlanError(f"the pipeline needs mesh axis {axis!r}; the mesh has {dict(mesh.shape)}")
    if mesh.shape[config.stage_axis] != config.layout.stages:
        raise PlanError(
            f"the layout has {config.layout.stages} stages, but mesh axis {config.stage_axis!r} has "
            f"{mesh.shape[config.stage_axis]} devices; they must be equal"
        )


def require_divides(batch: PyTree, mesh: Mesh | AbstractMesh, config: PipelineConfig) -> None:
    """Refuse a batch whose rows do not divide into microbatches on every device.

    Raises:
      PlanError: with the sizes, and the nearest batch sizes that do divide.
    """
    split = int(np.prod([mesh.shape[axis] for axis in config.batch_axes], dtype=int))
    unit = split * config.microbatches
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "the batch"
        rows = np.shape(leaf)[0] if np.ndim(leaf) else 0
        if rows == 0 or rows % unit:
            low = rows - rows % unit
            raise PlanError(
                f"{name}: {rows} rows do not divide into {split} (mesh axes {', '.join(config.batch_axes)}) x "
                f"{config.microbatches} microbatches; take {f'{low} or ' if low else ''}{low + unit} rows"
            )
