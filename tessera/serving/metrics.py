"""Prometheus metrics of a server (extra `serve`), under vLLM's names where it has the same."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from tessera.serving.requests import Request

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
COUNTERS = {  # of the engine's counts: name and meaning
    "requests": ("tessera_requests", "Texts accepted."),
    "prompt_tokens": (
        "vllm:prompt_tokens",
        "Tokens that were read: of prompts, without those of the prefix cache, and of preempted texts again.",
    ),
    "tokens": ("vllm:generation_tokens", "Tokens drawn."),
    "prefix_queries": ("vllm:prefix_cache_queries", "Tokens of prompts that were looked for in the prefix cache."),
    "prefix_tokens": ("vllm:prefix_cache_hits", "Of those, the ones that it had."),
    "preemptions": ("vllm:num_preemptions", "Texts that waited again, as there were too few pages."),
    "drafted": ("vllm:spec_decode_num_draft_tokens", "Tokens the draft model guessed."),
    "accepted": ("vllm:spec_decode_num_accepted_tokens", "Of those, the ones that stayed."),
}


TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
HISTOGRAMS = {  # of texts that ended, in seconds or tokens: name, meaning and buckets
    "time_to_first_token_seconds": ("From request to first token.", SECONDS),
    "inter_token_latency_seconds": ("Between a token and the next; those that come together share the time.", SECONDS),
    "request_time_per_output_token_seconds": ("Between the tokens of a text, its mean.", SECONDS),
    "e2e_request_latency_seconds": ("From request to last token.", SECONDS),
    "request_queue_time_seconds": ("From request to a slot.", SECONDS),
    "request_prefill_time_seconds": ("From a slot to the first token.", SECONDS),
    "request_decode_time_seconds": ("From the first token to the last.", SECONDS),
    "request_inference_time_seconds": ("From a slot to the last token.", SECONDS),
    "request_prompt_tokens": ("Tokens of a prompt.", TOKENS),
    "request_generation_tokens": ("Tokens drawn for a text.", TOKENS),
}
REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}  # of a text's end, and vLLM's


class Latencies:
    """Histograms of texts; every clock is `time.monotonic`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._of = {
            name: Histogram(f"vllm:{name}", meaning, ("model_name",), buckets=buckets, registry=self.registry)
            for name, (meaning, buckets) in HISTOGRAMS.items()
        }

    def follow(self, model: str) -> Callable[[Request], None]:
        """Begin a text; returns what is to be called with it when it has gone on, and once more when it has ended."""
        begun, first, last, count = time.monotonic(), 0.0, 0.0, 0

        def note(name: str, value: float | int) -> None:
            self._of[name].labels(model).observe(value)

        def went_on(request: Request) -> None:
            nonlocal first, last, count
            now, new = time.monotonic(), len(request.tokens) - count
            if new > 0 and not count:
                first = last = now
                note("time_to_first_token_seconds", now - begun)
            elif new > 0:
                for _ in range(new):
                    note("inter_token_latency_seconds", (now - last) / new)
                last = now
            count += new
            if not request.finish:
                return
            note("e2e_request_latency_seconds", now - begun)
            note("request_prompt_tokens", len(request.prompt))
            note("request_generation_tokens", count)
            if request.started:
                note("request_queue_time_seconds", request.started - begun)
                note("request_inference_time_seconds", now - request.started)
            if request.started and count:
                note("request_prefill_time_seconds", first - request.started)
                note("request_decode_time_seconds", now - first)
            if count > 1:
                note("request_time_per_output_token_seconds", (now - first) / (count - 1))

        return went_on


def page(service: Any, model: str) -> bytes:
    """The metrics of a `Service` in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Now(service, model))  # type: ignore[arg-type]
    return generate_latest(registry) + generate_latest(service.latencies.registry)


class _Now:
    """What the engine says at this moment, as a collector."""

    def __init__(self, service: Any, model: str):
        self.service, self.model = service, model

    def collect(self) -> Iterator[Any]:
        """Families of counters and gauges."""
        service, engine, model = self.service, self.service.engine, [self.model]
        for key, (name, meaning) in COUNTERS.items():
            yield _add(CounterMetricFamily(name, meaning, labels=["model_name"]), model, engine.counts[key])
        refused = CounterMetricFamily(
            "tessera_requests_refused", "Requests refused, the queue full.", labels=["model_name"]
        )
        yield _add(refused, model, service.refused)
        ended = CounterMetricFamily("vllm:request_success", "Texts ended.", labels=["model_name", "finished_reason"])
        for reason, name in REASONS.items():
            ended.add_metric([self.model, name], engine.counts[f"finished_{reason}"])
        yield ended
        gauges = {
            "vllm:num_requests_running": ("Texts that have a slot.", engine.running),
            "vllm:num_requests_waiting": ("Texts waiting for a slot, or for pages.", len(engine.waiting)),
            "vllm:kv_cache_usage_perc": (
                "Share of the KV cache, or of its pages, that running texts fill; 1 is all of it.",
                engine.usage,
            ),
            "tessera_slots": ("Slots there are.", len(engine.slots)),
            "tessera_alive": ("1 while the engine runs.", int(service.alive and not service.dead)),
        }
        for name, (meaning, value) in gauges.items():
            yield _add(GaugeMetricFamily(name, meaning, labels=["model_name"]), model, value)


def _add(family: Any, labels: list[str], value: float | int) -> Any:
    family.add_metric(labels, value)
    return family
