"""The report for issues says what is there, and survives what is broken."""

import importlib.metadata

import jax
import pytest

import tessera
from tessera.cli import doctor

TITLES = ("tessera", "machine", "packages", "devices", "auto chooses", "extras", "caches and disk", "environment")


@pytest.fixture(scope="module")
def report():
    return doctor.report()


def section(report, title):
    parts = dict(part.split("\n", 1) for part in report.split("\n\n"))
    return dict(line.split(None, 1) for line in parts[title].splitlines())


def test_every_section_is_there_and_nothing_is_unknown(report):
    assert [part.partition("\n")[0] for part in report.split("\n\n")] == list(TITLES)
    assert "unknown (" not in report
    assert section(report, "tessera")["version"] == tessera.__version__
    assert section(report, "packages")["jax"] == jax.__version__
    assert section(report, "devices")["devices"] == "8 x cpu"


def test_on_a_cpu_the_defaults_are_those_of_the_documentation(report):
    chosen = report.partition("auto chooses\n")[2].partition("\n\n")[0]
    assert [line.split("  ")[-1].split()[0] for line in chosen.splitlines()] == [
        doctor._kernels(),
        "padded",
        "patches",
        "map",
    ]


def test_missing_extras_are_listed_by_what_they_lack(monkeypatch):
    required = [
        "jax>=0.10",
        "nothing-of-that-name; extra == 'ghost'",
        'numpy>=2; extra == "solid"',
        "jax[tpu]; extra == 'tpu'",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: required)
    lines = [line.split(None, 1) for line in doctor._extras()]
    assert lines[:2] == [["ghost", "lacks nothing-of-that-name"], ["solid", "installed"]]
    assert lines[2][0] == "tpu" and lines[2][1] in ("lacks libtpu", "installed")
    monkeypatch.setattr(
        importlib.metadata,
        "requires",
        lambda name: (_ for _ in ()).throw(importlib.metadata.PackageNotFoundError(name)),
    )
    assert list(doctor._extras()) == ["not known: tessera-jax is not installed"]


def test_a_broken_part_is_named_and_the_rest_is_printed(monkeypatch, capsys):
    def broken():
        raise RuntimeError("no driver\nmore")

    monkeypatch.setitem(doctor.CHOICES, "convolutions", broken)
    monkeypatch.setattr(jax, "devices", broken)
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    assert said.count("unknown (RuntimeError: no driver)") >= 2 and "caches and disk" in said


def test_only_variables_that_change_jax_are_printed(monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    monkeypatch.setenv("API_TOKEN", "secret")
    said = "\n".join(doctor._environment())
    assert ["JAX_NUM_CPU_DEVICES", "8"] in [line.split() for line in said.splitlines()] and "secret" not in said


def test_help_and_wrong_arguments(capsys):
    with pytest.raises(SystemExit, match="0"):
        doctor.main(["--help"])
    assert "paste into an issue" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["--nonsense"])
