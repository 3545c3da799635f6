"""The benchmark of token files on a small one: killed hosts read what one host reads, and every figure is there."""

import pytest

from scripts.benchmarks import data


@pytest.mark.slow
def test_killed_hosts_read_what_one_host_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TOTAL", 60)
    size = data.make_file(tmp_path, 2_000_000)
    assert size == (tmp_path / "tokens.bin").stat().st_size == 2_000_000
    shape = {"batch_size": 6, "length": 16}
    assert data.kill_and_compare(str(tmp_path), 2, 2, shape) == (60, 60)
    found = data.child("measure", directory=str(tmp_path), batches=3, **shape)
    assert found["rate"] > 0 and found["GB resident more, at most"] < 1.5
