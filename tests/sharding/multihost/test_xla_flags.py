import os
import subprocess
import sys
from pathlib import Path

import pytest

from sharding.errors import PlanError
from sharding.multihost.xla_flags import FLAGS, VARIABLES, flags, main

ROOT = Path(__file__).parents[3]


def test_flags_are_printed_for_a_launch_file(capsys):
    assert main(["tpu"]) == 0 and capsys.readouterr().out.split() == list(FLAGS["tpu"])
    assert main(["tpus"]) == 2 and "did you mean 'tpu'" in capsys.readouterr().err
    assert FLAGS.keys() == VARIABLES.keys()
    with pytest.raises(PlanError, match="One of tpu, gpu"):
        flags("cpu")


@pytest.mark.slow
def test_xla_knows_the_gpu_flags():
    """XLA ends a program that starts with a flag it does not know, whatever the backend."""
    program = "import jax; print(jax.device_count())"
    for value, known in ((flags("gpu"), True), (flags("gpu").replace("latency", "latent"), False)):
        environment = os.environ | {"XLA_FLAGS": value, "JAX_PLATFORMS": "cpu"}
        run = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, timeout=300
        )
        assert (run.returncode == 0) == known, run.stderr[-500:]
        assert (b"Unknown flag" in run.stderr) != known, run.stderr[-500:]
