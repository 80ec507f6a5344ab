"""Requests as OpenTelemetry spans, within the trace of their caller (W3C Trace Context), under the names of the semantic conventions for
generative AI (opentelemetry.io/docs/specs/semconv/gen-ai). What a prompt or an answer says is never recorded. Needs the extra `otel`."""

from __future__ import annotations

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace import TracerProvider as AnyProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ...core.vocabulary import Delta, Result, Started


class Telemetry:
    """A Meter."""

    def __init__(self, model_name: str, provider: AnyProvider) -> None:
        self._model_name, self._tracer = model_name, provider.get_tracer("forerun")

    def begun(self, request_id: str, traceparent: str) -> RequestSpan:
        context = TraceContextTextMapPropagator().extract({"traceparent": traceparent}) if traceparent else None
        attributes = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "forerun",
            "gen_ai.request.model": self._model_name,
            "gen_ai.response.id": request_id,
        }
        span = self._tracer.start_span(f"text_completion {self._model_name}", context, SpanKind.SERVER, attributes)
        return RequestSpan(span, self._model_name)


class RequestSpan:
    """The Watch of one request."""

    def __init__(self, span: Span, model_name: str) -> None:
        self._span, self._model_name = span, model_name

    def started(self, started: Started) -> None:
        sampling = started.sampling
        self._span.set_attributes(
            {
                "gen_ai.response.model": self._model_name,
                "gen_ai.usage.input_tokens": started.num_prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": started.num_cached_tokens,
                "gen_ai.request.temperature": sampling.temperature,
                "gen_ai.request.top_p": sampling.top_p,
                "gen_ai.request.top_k": sampling.top_k,
                "gen_ai.request.seed": str(sampling.seed),  # up to 64 bits without a sign, which no attribute has
                "forerun.queue_seconds": started.queue_seconds,
            }
        )

    def delta(self, delta: Delta, seconds: float, is_first: bool) -> None:
        if is_first:
            self._span.set_attribute("gen_ai.server.time_to_first_token", seconds)

    def finished(self, result: Result, seconds: float) -> None:
        timings = result.timings
        accepted = sum(each.num_accepted_tokens for each in result.speculation.drafters.values())
        self._span.set_attributes(
            {
                "gen_ai.response.finish_reasons": [result.finish_reason.value],
                "gen_ai.usage.output_tokens": result.usage.num_completion_tokens,
                "forerun.prefill_seconds": timings.prefill_seconds,
                "forerun.decode_seconds": timings.decode_seconds,
                "forerun.num_rounds": result.speculation.num_rounds,
                "forerun.num_accepted_tokens": accepted,
            }
        )
        self._span.end()

    def failed(self, error: BaseException) -> None:
        self._span.set_attribute("error.type", type(error).__name__)
        self._span.set_status(StatusCode.ERROR)
        self._span.end()


def exporting(version: str) -> TracerProvider:
    """Sends spans where the environment says (OTEL_EXPORTER_OTLP_ENDPOINT...), from a thread of its own, the last when the process ends."""
    provider = TracerProvider(resource=Resource.create({"service.name": "forerun", "service.version": version}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
