"""The page of metrics: what it says of an engine at one moment."""

from collections import Counter
from types import SimpleNamespace

import pytest

pytest.importorskip("prometheus_client")

from tessera.serving.metrics import Latencies, page


def test_the_page_says_what_the_engine_says():
    counts = Counter(preemptions=4, prefix_queries=30, prefix_tokens=20)
    engine = SimpleNamespace(slots=[1, 2, None], waiting=[1, 2], counts=counts, running=2, usage=0.25)
    service = SimpleNamespace(engine=engine, refused=7, alive=True, dead=False, latencies=Latencies())
    lines = dict(line.rsplit(" ", 1) for line in page(service, "m").decode().splitlines() if not line.startswith("#"))
    assert float(lines['vllm:kv_cache_usage_perc{model_name="m"}']) == 0.25
    assert float(lines['vllm:num_requests_running{model_name="m"}']) == 2
    assert float(lines['vllm:num_requests_waiting{model_name="m"}']) == 2
    assert float(lines['tessera_requests_refused_total{model_name="m"}']) == 7
    assert float(lines['vllm:num_preemptions_total{model_name="m"}']) == 4
    assert float(lines['vllm:prefix_cache_queries_total{model_name="m"}']) == 30
    assert float(lines['vllm:prefix_cache_hits_total{model_name="m"}']) == 20
