"""The state on every device, the batch split."""

import jax
import numpy as np
import pytest

from tessera.parallel.placement import data_parallel


@pytest.mark.parametrize(("batch", "devices"), [(16, 8), (12, 6), (7, 7), (1, 1), (11, 1)])
def test_as_many_devices_as_divide_the_batch(batch, devices):
    placement = data_parallel(batch)
    rows = np.arange(batch * 3, dtype=np.float32).reshape(batch, 3)
    placed = placement.place({"x": rows})["x"]
    np.testing.assert_array_equal(placed, rows)
    assert len(placed.sharding.device_set) == devices
    assert placed.addressable_shards[0].data.shape == (batch // devices, 3)
    state = jax.device_put(rows, placement.state)
    assert state.addressable_shards[0].data.shape == rows.shape
