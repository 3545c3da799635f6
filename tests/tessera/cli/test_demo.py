"""The tour's runner: what is done is not done again, what fails stops it, what is killed goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tessera.cli import demo, main
from tessera.cli.demo import Step
from tessera.pages import tour

ROOT = Path(__file__).parents[3]


@pytest.fixture
def fake(monkeypatch):
    """Steps that write what they are asked to instead of running, and the list of what was run."""
    ran = []

    def run(step, directory):
        ran.append(step.words[0])
        if step.words[0] == "fails":
            return 3
        path = Path(directory) / step.made
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("made")
        return 0

    monkeypatch.setattr(demo, "run", run)
    return ran


def steps(*names):
    return tuple(Step((name,), f"{name}/report.html") for name in names)


def test_what_is_done_is_not_done_again(tmp_path, fake, capsys):
    parts = {"ticket": steps("a"), "experts": steps("b", "fails"), "plan": steps("c")}
    assert demo.carry_out(str(tmp_path), parts) == 3 and fake == ["a", "b", "fails"]
    said = capsys.readouterr().err
    assert f"1 of 3  {tour.TITLES['ticket']}" in said and f"then: {tour.TITLES['plan']}" in said
    assert "exit code 3; the same command goes on" in said
    fake.clear()
    mended = parts | {"experts": steps("b", "d")}
    assert demo.carry_out(str(tmp_path), mended) == 0 and fake == ["d", "c"]
    assert set(json.loads((tmp_path / "done.json").read_text())) == {"a", "b", "c", "d"}
    fake.clear()
    (tmp_path / "b" / "report.html").unlink()  # what was made is gone
    assert demo.carry_out(str(tmp_path), mended) == 0 and fake == ["b"]


def test_a_damaged_record_is_one_line(tmp_path, capsys):
    (tmp_path / "done.json").write_text("{")
    assert demo.main([f"--workdir={tmp_path}"]) == 1
    assert re.search(r"error: .*done\.json is damaged", capsys.readouterr().err)


def test_a_step_is_a_process_of_its_own(tmp_path):
    """Its output is the file, whole or not there; its status comes back."""
    assert demo.run(Step(("train", "--help"), "said.txt", shows=True), str(tmp_path)) == 0
    assert "usage: " in (tmp_path / "said.txt").read_text() and not (tmp_path / "said.txt.part").exists()
    assert demo.run(Step(("trian",), "other.txt", shows=True), str(tmp_path)) == 2
    assert not (tmp_path / "other.txt").exists()


@pytest.mark.slow
def test_a_step_ends_with_the_tour(tmp_path):
    """A tour that is killed leaves no process that writes where the next one does."""
    step = "demo.Step(('serve', '--help'), 'said.txt', True)"
    slow = "demo.CONSOLE = 'from scaling.sweeps.worker import follow; follow({parent}); import os, time; "
    slow += "print(os.getpid(), flush=True); time.sleep(60)'; "
    code = f"from tessera.cli import demo; {slow}demo.run({step}, {str(tmp_path)!r})"
    with subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}) as parent:
        part, until = tmp_path / "said.txt.part", time.monotonic() + 60
        while not (part.exists() and part.read_text().strip()) and time.monotonic() < until:
            time.sleep(0.05)
        child = int(part.read_text())
        parent.send_signal(signal.SIGKILL)
    until = time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def test_commands_of_the_tour_are_valid():
    """Every command that the page shows can be parsed, and is about the tour's directory."""
    import importlib

    for steps_of_part in demo.PARTS.values():
        for step in steps_of_part:
            name, *words = step.command("runs/demo")
            assert not any("DIR" in word for word in words)
            if name in main.PLAIN:
                continue
            command = main.COMMANDS[name]
            options, overrides = main.parse_flags(command, words)
            config, config_name = main._load(command, vars(options))
            main.invoke(importlib.import_module(command.module).SCHEMA, config, overrides, config_name, vars(options))
