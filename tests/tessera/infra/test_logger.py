"""Rows survive: exact floats, truncation, unfinished lines; progress in both its forms."""

import builtins
import io
import json
import math
import sys
import tempfile
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.infra.logger import METRICS, TIMING, Logger, Progress, read_rows


def test_rows_round_trip_and_are_valid_json(tmp_path):
    values = {"a": 0.1, "nan": math.nan, "up": math.inf, "down": -math.inf, "n": 3, "f32": float(np.float32(0.1))}
    with Logger(tmp_path) as logger:
        logger.write(5, values)
        logger.write(6, {"loss": jnp.float32(1.5)}, kind="eval")
        rows = logger.rows()
    assert rows[1] == {"step": 6, "kind": "eval", "loss": 1.5}
    assert math.isnan(rows[0].pop("nan"))
    assert rows[0] == {"step": 5, "kind": "train"} | {k: v for k, v in values.items() if k != "nan"}
    for line in (tmp_path / METRICS).read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1))
def test_float32_values_come_back_exactly(values):
    values = np.array(values, np.float32)
    with tempfile.TemporaryDirectory() as directory:
        with Logger(directory) as logger:
            for step, value in enumerate(values):
                logger.write(step, {"x": value})
        back = np.array([row["x"] for row in logger.rows()], np.float32)
    assert back.tobytes() == values.tobytes()


def test_truncate_drops_later_rows_and_unfinished_lines(tmp_path):
    with Logger(tmp_path) as logger:
        for step in (10, 20, 30):
            logger.write(step, {"loss": 1 / step, "bad": math.nan})
            logger.write(step, {"s": 1.0}, kind="time")
    before = (tmp_path / METRICS).read_bytes()
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 40, "ki')
    with Logger(tmp_path) as logger:
        assert [row["step"] for row in logger.rows()] == [10, 20, 30]
        logger.truncate(20)
        assert [row["step"] for row in read_rows(tmp_path / TIMING)] == [10, 20]
        logger.write(30, {"loss": 1 / 30, "bad": math.nan})
    assert (tmp_path / METRICS).read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {METRICS, TIMING}


def test_rows_after_a_garbled_line_are_not_trusted(tmp_path):
    (tmp_path / METRICS).write_text('{"step": 1, "kind": "train"}\nxx\n{"step": 2}\n')
    assert read_rows(tmp_path / METRICS) == [{"step": 1, "kind": "train"}]
    assert read_rows(tmp_path / "absent") == []


def test_inactive_writes_nothing(tmp_path):
    with Logger(tmp_path / "none", active=False, tensorboard=True) as logger:
        logger.write(1, {"x": 1.0})
        logger.truncate(0)
    assert not (tmp_path / "none").exists()


def test_tensorboard_files_can_be_read_back(tmp_path):
    with Logger(tmp_path, tensorboard=True) as logger:
        logger.write(1, {"loss": 2.0})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_wandb_missing_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        if name == "wandb":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
    with pytest.raises(ImportError, match=r"tessera-jax\[wandb\]"):
        Logger(tmp_path, wandb=True)


def test_workdirs_of_one_name_are_two_runs_of_weights_and_biases(tmp_path, monkeypatch):
    started = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: started.append(options["id"])))
    monkeypatch.chdir(tmp_path)
    for workdir in (tmp_path / "a" / "lm", tmp_path / "b" / "lm", "a/lm", tmp_path / "a" / ".." / "b" / "lm"):
        Logger(workdir, wandb=True)
    assert started[0] != started[1] and started[2:] == started[:2] and all(len(one) <= 64 for one in started)


def test_progress_as_plain_lines():
    stream = io.StringIO()
    with Progress(4, "work", start=1, every=0.0, stream=stream) as bar:
        bar.advance()
        bar.advance()
        bar.advance(1, loss=0.25, note="x")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "work 2/4" and lines[1].startswith("work 3/4") and "left" in lines[1]
    assert lines[-1].startswith("work 4/4") and "loss 0.25 note x" in lines[-1] and "left" not in lines[-1]


@pytest.mark.parametrize(("units", "seconds", "rate"), [(8, 2.0, "4.0/s"), (2, 8.0, "4.0 s each"), (3, 3.0, "1.0/s")])
def test_progress_tells_units_a_second_or_seconds_a_unit(monkeypatch, units, seconds, rate):
    """After the first unit, which holds compilation."""
    now, stream = [50.0], io.StringIO()
    monkeypatch.setattr("tessera.infra.logger.time.monotonic", lambda: now[0])
    with Progress(units + 2, every=0.0, stream=stream) as bar:
        now[0] = 90.0
        bar.advance()
        now[0] += seconds
        bar.advance(units)
        line = stream.getvalue().splitlines()[-1]
    assert f"/{units + 2}  {rate}  " in line


def test_progress_is_quiet_between_lines_and_when_inactive():
    stream = io.StringIO()
    with Progress(1000, every=60.0, stream=stream) as bar:
        for _ in range(1000):
            bar.advance()
    assert len(stream.getvalue().splitlines()) == 1
    silent = io.StringIO()
    with Progress(3, every=0.0, stream=silent, active=False) as bar:
        bar.advance(3)
    assert silent.getvalue() == ""


def test_progress_as_bars_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress(2, "outer", stream=stream) as outer:
        for _ in range(2):
            with Progress(3, "inner", stream=stream, parent=outer) as inner:
                inner.advance(3, loss=1.0)
            outer.advance()
    assert "outer" in stream.getvalue() and "2/2" in stream.getvalue()
