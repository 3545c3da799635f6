"""Prometheus metrics of a server (extra `serve`), under vLLM's names where it has the same: its dashboards fit."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

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


class Latencies:
    """Histograms of seconds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def make(name: str, meaning: str) -> Histogram:
            return Histogram(f"vllm:{name}", meaning, ("model_name",), buckets=SECONDS, registry=self.registry)

        self._first = make("time_to_first_token_seconds", "From request to first token.")
        self._each = make("request_time_per_output_token_seconds", "Between the tokens of a text, its mean.")
        self._whole = make("e2e_request_latency_seconds", "From request to last token.")

    def first(self, model: str, seconds: float) -> None:
        """Note when the first token of a text came."""
        self._first.labels(model).observe(seconds)

    def end(self, model: str, seconds: float, first: float | None, tokens: int) -> None:
        """Note when a text ended, `first` seconds after its first token, with how many tokens."""
        self._whole.labels(model).observe(seconds)
        if first is not None and tokens > 1:
            self._each.labels(model).observe(first / (tokens - 1))


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
        for reason in ("stop", "length", "cancelled", "error"):
            ended.add_metric([self.model, reason], engine.counts[f"finished_{reason}"])
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
