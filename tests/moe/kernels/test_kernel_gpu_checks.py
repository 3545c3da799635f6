"""The script of checks for a GPU: what hangs or faults ends no other check, and results are written as they come."""

import json
import re
import sys

import gpu_checks
import pytest


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("while True: pass", "no result in 1 s"),
        ("import os; os.abort()", "exit code -6"),
        ("raise ValueError('wrong')", "exit code 1: .*wrong"),
    ],
)
def test_what_ends_badly_is_a_result(code, message):
    result = gpu_checks.child([sys.executable, "-c", code], 1 if "while" in code else 60)
    assert not result["ok"]
    assert re.search(message, result["why"], re.DOTALL)


def test_results_are_written_as_they_come_and_a_failure_is_the_exit_code(monkeypatch, tmp_path):
    out, counts = tmp_path / "runs" / "checks.jsonl", []

    def child(command, seconds):
        counts.append(len(out.read_text().splitlines()))
        assert seconds <= 60 and command[-2:] == [f"--one={'ab'[len(counts) - 1]}", "--backend=gpu"]
        return {"ok": len(counts) == 1, "error": 0.0}

    monkeypatch.setattr(gpu_checks, "child", child)
    monkeypatch.setattr(gpu_checks, "CHECKS", [(name, None, (), 60) for name in "ab"])
    with pytest.raises(SystemExit, match="1 checks failed"):
        gpu_checks.main([f"--out={out}"])
    assert counts == [0, 1]
    assert [json.loads(line)["check"] for line in out.read_text().splitlines()] == ["a", "b"]
    with pytest.raises(SystemExit, match="2 checks failed"):
        gpu_checks.main([f"--out={out}", "--seconds=1"])
    assert len(counts) == 2 and "no time left" in out.read_text()


def test_the_checks_go_from_the_plainest_product_to_a_mixture_and_their_values_can_be_wrong(monkeypatch):
    first = list(dict.fromkeys(name.split()[0] for name, *_ in gpu_checks.CHECKS))
    assert first == "ungathered odd gathered combine int8 float8_e4m3fn blocks mixture times".split()
    assert len({name for name, *_ in gpu_checks.CHECKS}) == len(gpu_checks.CHECKS)
    assert gpu_checks.product("xla", "dw", 64, 40, True) < gpu_checks.TOLERANCE
    right = gpu_checks.wide
    monkeypatch.setattr(gpu_checks, "wide", lambda x: right(x).reshape(len(x), -1, 8)[:, ::-1].reshape(x.shape))
    assert gpu_checks.product("xla", "dw", 64, 40, True) > 0.5
