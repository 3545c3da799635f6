"""The page of metrics: what it says of an engine at one moment."""

from collections import Counter
from types import SimpleNamespace

import pytest

pytest.importorskip("prometheus_client")

from tessera.serving import metrics
from tessera.serving.metrics import HISTOGRAMS, Latencies, page
from tessera.serving.requests import Request, Sampling


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


def test_times_of_a_text_are_those_of_its_moments(monkeypatch):
    """Asked at 10 s, a slot at 12, tokens at 15 (one) and 21 (three), the end at 21; and one that never had a slot."""
    clock = iter((10.0, 15.0, 21.0, 21.0, 30.0, 34.0))
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    latencies = Latencies()
    request = Request((1, 2, 3), Sampling(), started=12.0)
    went_on = latencies.follow("m")
    request.tokens.append(5)
    went_on(request)
    request.tokens.extend((5, 5, 5))
    went_on(request)
    request.finish = "length"
    went_on(request)
    never = Request((1,) * 40, Sampling(), finish="cancelled")
    latencies.follow("m")(never)
    values = {sample.name: sample.value for family in latencies.registry.collect() for sample in family.samples}
    found = {name: (values[f"vllm:{name}_count"], values[f"vllm:{name}_sum"]) for name in HISTOGRAMS}
    assert found == {
        "time_to_first_token_seconds": (1, 5.0),
        "inter_token_latency_seconds": (3, 6.0),
        "request_time_per_output_token_seconds": (1, 2.0),
        "e2e_request_latency_seconds": (2, 11.0 + 4.0),
        "request_queue_time_seconds": (1, 2.0),
        "request_prefill_time_seconds": (1, 3.0),
        "request_decode_time_seconds": (1, 6.0),
        "request_inference_time_seconds": (1, 9.0),
        "request_prompt_tokens": (2, 43.0),
        "request_generation_tokens": (2, 4.0),
    }
