import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sharding.analysis.roofline import placements
from tessera.reports.mesh_figure import placement_figure

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
