"""Figures for Prometheus, under vLLM's names with our prefix (docs.vllm.ai, "Metrics"). Needs the extra `metrics`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ...core.vocabulary import Delta, Result, Started
from .served import Served
from .statuses import Starting
from .words import REASONS

PREFIX = "forerun:"
#: Upper bounds in seconds.
FIRST_TOKEN_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
TOKEN_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
REQUEST_BUCKETS = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class Metrics(Collector):
    """Watches every request of the edge (a Meter, and the Watch of each), and asks the engine how it is when it is asked itself."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._registry = CollectorRegistry()
        model = served.model_name

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, text, ["model_name"], buckets=buckets, registry=self._registry).labels(model)

        def counter(name: str, text: str, *labels: str) -> Any:
            made = Counter(PREFIX + name, text, ["model_name", *labels], registry=self._registry)
            return made if labels else made.labels(model)

        self._first_token = histogram("time_to_first_token_seconds", "From a request's arrival to its first piece", FIRST_TOKEN_BUCKETS)
        self._token = histogram("inter_token_latency_seconds", "Between two pieces of an answer, a token", TOKEN_BUCKETS)
        self._request = histogram("e2e_request_latency_seconds", "From a request's arrival to its end", REQUEST_BUCKETS)
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self._cached_tokens = counter("prompt_tokens_cached", "Tokens of prompts that need not be computed")
        self._generation_tokens = counter("generation_tokens", "Tokens of answers")
        self._ended = counter("request_success", "Requests that ended", "finished_reason")
        self._drafts = counter("spec_decode_num_drafts", "Drafts verified", "drafter")
        self._draft_tokens = counter("spec_decode_num_draft_tokens", "Tokens of drafts", "drafter")
        self._accepted = counter("spec_decode_num_accepted_tokens", "Tokens of drafts that were accepted", "drafter")
        self._accepted_at = counter(
            "spec_decode_num_accepted_tokens_per_pos", "Tokens of drafts that were accepted, by their place", "drafter", "position"
        )
        self._registry.register(self)
        served.meters.append(self)

    # A Meter, and a Watch

    def begun(self, request_id: str, traceparent: str) -> Metrics:
        return self

    def failed(self, error: BaseException) -> None:
        self._ended.labels(self._served.model_name, "error" if isinstance(error, Exception) else "abort").inc()

    def started(self, started: Started) -> None:
        self._prompt_tokens.inc(started.num_prompt_tokens)
        self._cached_tokens.inc(started.num_cached_tokens)

    def delta(self, delta: Delta, seconds: float, is_first: bool) -> None:
        self._generation_tokens.inc(len(delta.token_ids))
        if is_first:
            self._first_token.observe(seconds)
        else:
            for _ in delta.token_ids:
                self._token.observe(seconds / len(delta.token_ids))

    def finished(self, result: Result, seconds: float) -> None:
        model = self._served.model_name
        self._request.observe(seconds)
        self._ended.labels(model, REASONS[result.finish_reason]).inc()
        for name, each in result.speculation.drafters.items():
            self._drafts.labels(model, name).inc(each.num_drafts)
            self._draft_tokens.labels(model, name).inc(each.num_draft_tokens)
            self._accepted.labels(model, name).inc(each.num_accepted_tokens)
            for position, number in enumerate(each.num_accepted_tokens_per_pos):
                self._accepted_at.labels(model, name, str(position)).inc(number)

    # A Collector

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """The engine as it is now; nothing while it is being loaded."""
        try:
            now = self._served.engine.statistics()
        except Starting:
            return
        for name, text, value in (
            ("num_requests_running", "Requests that have memory", now.num_requests_running),
            ("num_requests_waiting", "Requests that wait for memory", now.num_requests_waiting),
            ("kv_cache_usage_perc", "Pages in use, 1 is all", now.num_pages_used / now.num_pages),
        ):
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
            gauge.add_metric([self._served.model_name], value)
            yield gauge
        for name, text, value in (
            ("num_preemptions", "Times a request gave way to another", now.num_preemptions),
            ("actor_restarts", "Times an actor was restarted", sum(actor.num_restarts for actor in now.actors.values())),
        ):
            counter = CounterMetricFamily(PREFIX + name, text, labels=["model_name"])
            counter.add_metric([self._served.model_name], value)
            yield counter

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)
