"""A SLURM of this machine for the tests, which skip and say what to install where there can be none."""

import local_slurm
import pytest


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory):
    """Environment variables of a running SLURM of four processors."""
    directory = tmp_path_factory.mktemp("slurm")
    try:
        variables = local_slurm.start(directory)
    except local_slurm.Unavailable as reason:
        pytest.skip(str(reason))
    yield variables
    local_slurm.stop(directory)
