"""Configs become dataclasses or one clear message."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest
from ml_collections import ConfigDict

from sharding.plan import Plan
from tessera.infra.config import ConfigError, build, checked


@dataclass(frozen=True)
class Inner:
    width: int = 8
    rate: float = 0.1
    name: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width={self.width} must be positive")


@dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner = field(default_factory=Inner)
    flag: bool = False
    limit: int | None = None
    path: str = ""
    pair: tuple[int, str] = (0, "")


GOOD = {
    "defaults": ({"steps": 1}, Outer(1)),
    "nested": ({"steps": 1, "inner": {"width": 3}}, Outer(1, Inner(3))),
    "int for float": ({"steps": 1, "inner": {"rate": 2}}, Outer(1, Inner(rate=2.0))),
    "numpy numbers": ({"steps": np.int64(4), "inner": {"rate": np.float32(0.5)}}, Outer(4, Inner(rate=0.5))),
    "list for tuple": ({"steps": 1, "inner": {"sizes": [1, 2]}}, Outer(1, Inner(sizes=(1, 2)))),
    "group for pairs": (
        {"steps": 1, "inner": {"options": {"b2": 0.9, "b1": 1}}},
        Outer(1, Inner(options=(("b1", 1), ("b2", 0.9)))),
    ),
    "union": ({"steps": 1, "limit": None}, Outer(1)),
    "union int": ({"steps": 1, "limit": 3}, Outer(1, limit=3)),
    "fixed tuple": ({"steps": 1, "pair": [3, "x"]}, Outer(1, pair=(3, "x"))),
    "a dataclass": ({"steps": 1, "inner": Inner(5)}, Outer(1, Inner(5))),
}


@pytest.mark.parametrize("case", GOOD)
@pytest.mark.parametrize("kind", [dict, ConfigDict])
def test_build(case, kind):
    settings, expected = GOOD[case]
    if kind is ConfigDict and case == "a dataclass":
        pytest.skip("a ConfigDict holds no dataclass")
    made = build(Outer, kind(settings))
    assert made == expected
    assert hash(made) == hash(expected) and type(made.inner.rate) is float


BAD = {
    "misspelt": ({"steps": 1, "flagg": True}, r"config\.flagg: no such setting; did you mean 'flag'\?"),
    "misspelt inside": ({"steps": 1, "inner": {"widht": 3}}, r"config\.inner\.widht: .*did you mean 'width'\?"),
    "unlike anything": ({"steps": 1, "zzz": 3}, r"config\.zzz: no such setting\. Settings here: flag, inner"),
    "missing": ({}, r"config\.steps: missing \(int expected\)"),
    "string for int": ({"steps": "3"}, r"config\.steps: int expected, got '3' \(str\)"),
    "float for int": ({"steps": 3.0}, r"config\.steps: int expected, got 3\.0 \(float\)"),
    "bool for int": ({"steps": True}, r"config\.steps: int expected, got True \(bool\)"),
    "int for bool": ({"steps": 1, "flag": 1}, r"config\.flag: bool expected, got 1 \(int\)"),
    "string for float": ({"steps": 1, "inner": {"rate": "x"}}, r"config\.inner\.rate: float expected, got 'x'"),
    "number for group": ({"steps": 1, "inner": 3}, r"config\.inner: a group of settings expected, got 3"),
    "wrong choice": ({"steps": 1, "inner": {"name": "c"}}, r"config\.inner\.name: one of 'a', 'b' expected, got 'c'"),
    "inside a tuple": ({"steps": 1, "inner": {"sizes": (1, "x")}}, r"config\.inner\.sizes\[1\]: int expected, got 'x'"),
    "scalar for tuple": (
        {"steps": 1, "inner": {"sizes": 3}},
        r"sizes: tuple\[int, \.\.\.\] expected, got 3",
    ),
    "group for tuple": ({"steps": 1, "inner": {"sizes": {"a": 1}}}, r"config\.inner\.sizes: tuple"),
    "tuple length": ({"steps": 1, "pair": (1,)}, r"config\.pair: tuple\[int, str\] expected"),
    "union": ({"steps": 1, "limit": "x"}, r"config\.limit: int \| None expected, got 'x'"),
    "its own check": ({"steps": 1, "inner": {"width": 0}}, r"config\.inner: width=0 must be positive"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("kind", [dict, ConfigDict])
def test_build_errors_name_the_setting(case, kind):
    settings, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        build(Outer, kind(settings))


def test_extra_fields_come_from_the_program():
    assert build(Outer, {"flag": True}, steps=3) == Outer(3, flag=True)
    with pytest.raises(ConfigError, match=r"config\.model\.steps: this is set by the program"):
        build(Outer, {"steps": 1}, "config.model", steps=3)


@pytest.mark.parametrize("axes", ["zz=2", "tp=0"])
def test_a_wrong_plan_is_blamed_on_the_plan(axes):
    for path in ("config.sharding", "config.model"):
        with pytest.raises(ConfigError, match="^config.plan: plan "):
            checked(path, Plan, axes)
