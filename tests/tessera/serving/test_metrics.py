"""The page of metrics: what it says of an engine at one moment."""

from collections import Counter
from types import SimpleNamespace

import pytest

pytest.importorskip("prometheus_client")

from tessera.serving.metrics import Latencies, page


def test_the_cache_is_filled_by_prompts_and_by_what_was_drawn():
    running = SimpleNamespace(read=10, tokens=[1, 2, 3, 4, 5]), SimpleNamespace(read=3, tokens=[])
    config = SimpleNamespace(length=24)
    engine = SimpleNamespace(
        slots=[*running, None], waiting=[1, 2], counts=Counter(), programs=SimpleNamespace(config=config)
    )
    service = SimpleNamespace(engine=engine, refused=7, alive=True, dead=False, latencies=Latencies())
    lines = dict(line.rsplit(" ", 1) for line in page(service, "m").decode().splitlines() if not line.startswith("#"))
    assert float(lines['vllm:kv_cache_usage_perc{model_name="m"}']) == pytest.approx((10 + 5 + 3) / (3 * 24))
    assert float(lines['vllm:num_requests_running{model_name="m"}']) == 2
    assert float(lines['vllm:num_requests_waiting{model_name="m"}']) == 2
    assert float(lines['tessera_requests_refused_total{model_name="m"}']) == 7
