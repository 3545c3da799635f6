import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from sharding.analysis.roofline import placements
from sharding.pipeline.timelines import Ticks, interleaved, one_f_one_b, zero_bubble
from tessera.reports.sharding import placement_figure, schedule_figure

SIZES = {"pp": 2, "fsdp": 4, "tp": 2}
TREE = {"a": jax.ShapeDtypeStruct((4, 8, 6), jnp.float32), "b": jax.ShapeDtypeStruct((5,), jnp.bfloat16)}
SPECS = {"a": P("pp", ("fsdp", "tp")), "b": P()}


def test_a_picture_has_a_tile_for_every_part_and_every_device():
    a, _ = placements(TREE, SPECS, SIZES)
    array, mesh = placement_figure(SIZES, a).axes
    colours = {patch.get_facecolor() for patch in array.patches}
    assert len(array.patches) == len(colours) == 2 * 8 and len(mesh.patches) == 16
    assert {patch.get_facecolor() for patch in mesh.patches} == colours
    assert "on 1 device" in mesh.get_title(loc="left")
    # What no axis splits is on all devices.
    array, mesh = placement_figure(SIZES, placements(TREE, SPECS, SIZES)[1]).axes
    assert len(array.patches) == 1 and "on 16 devices" in mesh.get_title(loc="left")


def test_figure_has_a_box_where_the_table_has_work():
    schedules = [one_f_one_b(3, 4, Ticks(B=2)), interleaved(3, 3, 2), zero_bubble(3, 5)]
    figure = schedule_figure(schedules)
    for ax, schedule in zip(figure.axes, schedules, strict=True):
        boxes = {patch.get_gid(): patch for patch in ax.patches if patch.get_gid()}
        spans = {
            f"{w.kind}{w.microbatch}.{w.chunk}@{s}": t for s, f in enumerate(schedule.spans()) for w, t in f.items()
        }
        assert set(boxes) == set(spans)
        for key, span in spans.items():
            assert boxes[key].get_x() == span.start / schedule.chunks
            assert boxes[key].get_width() == pytest.approx((span.end - span.start) / schedule.chunks)
        assert schedule.name in ax.get_title("left")
    assert len({ax.get_xlim() for ax in figure.axes}) == 1, "one time axis"
    figure.canvas.draw()
    with pytest.raises(ValueError, match="at least one"):
        schedule_figure([])
