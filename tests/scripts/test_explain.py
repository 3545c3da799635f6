"""The explaining script: its page, and one message for what is wrong."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def explain(workdir, *flags):
    run = subprocess.run(
        [sys.executable, "-m", "scripts.explain", f"--workdir={workdir}", *flags],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    return run.returncode, run.stdout + run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--config.plan=pp=2, dp=2, tp=2", "--config.sharding.microbatches=8"], ["Pipeline schedule", "bubble 11.1%"]),
        (["--config.plan=", "--devices=8"], ["Best plans", "8 x v5p"]),
        (["--config.plan=dp=2, tp=2", "--config.lora.rank=4"], ["in adapters, which are all that a step trains"]),
    ],
    ids=["a plan", "the best plan", "adapters"],
)
def test_a_page_is_written(tmp_path, flags, words):
    status, output = explain(tmp_path, "--config=configs/lm.py:tiny", *flags)
    assert status == 0, output
    page = (tmp_path / "explain.html").read_text()
    assert all(word in page for word in ["Mesh and placement", *words]) and str(tmp_path / "explain.html") in output


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--config.plan=tp=3"], "does not divide by tp=3"),
        (["--config.plan=tp=2", "--hardware=v7"], "One of v5e, v5p"),
        (["--config.plan=tp=2", "--compile=v5p"], "v5p:8x8x8"),
        (["--config.plan=tp=2", "--devices=8"], "nearest valid: tp=8"),
        (["--config.plan=pp=4, dp=2"], "take at most 2 stages"),
        (["--config.plan=tp=2", "--config.distill.weight=0.5"], "config.distill: a teacher is not counted"),
    ],
    ids=["heads", "hardware", "topology", "devices", "stages", "teacher"],
)
def test_what_is_wrong_is_one_message(tmp_path, flags, words):
    status, output = explain(tmp_path / "run", "--config=configs/lm.py:tiny", *flags, "--no-search")
    assert status == 2 and words in output and "Traceback" not in output, output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.tpu
def test_a_step_is_compiled_for_a_slice_that_is_not_there(tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu (the extra `tpu`)")
    flags = ["--config=configs/lm.py:small", "--config.plan=fsdp=4, tp=2", "--compile=v5e:2x4", "--no-search"]
    status, output = explain(tmp_path, *flags)
    assert status == 0, output
    assert "the compiler's" in output and "estimate against it" in output


def test_a_missing_libtpu_is_said_before_anything_is_worked_out(tmp_path, monkeypatch):
    from tessera.cli import explain as command
    from tessera.cli import main as cli

    def missing(name):
        raise ImportError(f"compiling for {name} needs libtpu")

    monkeypatch.setattr(command.hardware, "topology_devices", missing)
    monkeypatch.setattr(command, "search", lambda *_: pytest.fail("it searched first"))
    flags = vars(cli.parse_flags(cli.COMMANDS["explain"], ["--compile=v5p:2x2x1"])[0])
    config, name = cli._load(cli.COMMANDS["explain"], flags)
    invocation = cli.invoke(command.SCHEMA, config, [], name, flags | {"workdir": str(tmp_path / "run")})
    with pytest.raises(ImportError, match="v5p:2x2x1 needs libtpu"):
        command.main(invocation)
