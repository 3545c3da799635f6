"""The peak that MFU is a share of: named, of the devices, or measured and cached."""

from types import SimpleNamespace

import pytest

from sharding.errors import PlanError
from tessera.infra import peak


def test_a_named_peak_is_the_datasheets_of_all_devices():
    found, said = peak.peak_flops("v5p", "float32", 8)
    assert found == 8 * 459e12 and said == "MFU: of 8 x 459 TFLOP/s (v5p, bfloat16, datasheet)"
    assert peak.peak_flops("none", "float32", 8) == (0.0, "")
    with pytest.raises(PlanError, match="no hardware 'v5x'; did you mean"):
        peak.peak_flops("v5x", "float32", 8)


@pytest.mark.parametrize(
    "kind, flops",
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H200", 989.4e12),
        ("Tesla T4", 0.0),
    ],
)
def test_auto_goes_by_the_kind_of_the_devices(monkeypatch, kind, flops):
    monkeypatch.setattr(peak.jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    monkeypatch.setattr(peak.jax, "default_backend", lambda: "gpu")
    found, said = peak.peak_flops("auto", "bfloat16", 2)
    assert found == 2 * flops and ("is not known; name one of v5e" in said) == (not flops)


def test_a_cpu_is_measured_once(monkeypatch, tmp_path):
    timed = []
    monkeypatch.setattr(peak, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(peak, "time_product", lambda dtype: timed.append(dtype) or 1e11)
    monkeypatch.setattr(peak.os, "sched_getaffinity", lambda _: {0, 1, 5}, raising=False)
    for dtype in ("float32", "float32", "bfloat16"):
        found, said = peak.peak_flops("auto", dtype, 8)
        assert found == 3e11 and said.startswith("MFU: of 300 GFLOP/s, measured")
    assert timed == ["float32", "bfloat16"]


def test_a_product_is_timed_by_processor_time(monkeypatch):
    now = iter([0.0, 0.5, 1.0, 1.25, 2.0, 9.0])
    monkeypatch.setattr(peak.time, "process_time", lambda: next(now))
    assert peak.time_product("float32", rounds=3) == pytest.approx(2 * 1024**3 / 0.25)
