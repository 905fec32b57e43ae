"""OpenTelemetry: a span for each event that runs, with a child for each step, in the sampled traces.

The standard environment variables configure it: ``OTEL_EXPORTER_OTLP_ENDPOINT`` turns it on; docs/operating/traces.md
lists the others. A thread of the library sends the spans in batches. No span holds a token.

tracing.py is for one connection that somebody looks at; this module is for all of them. Both learn of a step from
:attr:`ChartMachine.observe_step <lesson_server.events.machine.ChartMachine>`.
"""

import os
import threading
import time
from contextvars import ContextVar

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision, ParentBasedTraceIdRatio
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context

from lesson_server import __version__
from lesson_server.errors import OUR_FAULTS, Refusal
from lesson_server.events.connection import Region
from lesson_server.events.machine import StepObserver

# The share of the traces that is sampled, unless OTEL_TRACES_SAMPLER says something else.
DEFAULT_RATIO = 0.01
# The outcomes that are our fault: the span of a client's fault is no error.
FAILURES = {refusal.outcome for refusal in OUR_FAULTS}

# No trace begins before a client's event.
ROOT = Context()

# The sampled span of the event that runs in this task, as the parent of its steps.
_event: ContextVar[Context | None] = ContextVar("event", default=None)


class EventSpan:
    """The span of an event that runs in this task, and is sampled.

    Args:
        span: the span.
    """

    def __init__(self, span: Span) -> None:
        self._span = span
        _event.set(set_span_in_context(span, ROOT))

    def end(self, outcome: str) -> None:
        """End the span.

        Args:
            outcome: that of the event, as the metric ``lesson_events_total`` has it.
        """
        _event.set(None)
        _set_outcome(self._span, outcome)
        self._span.end()


class _TraceIds(RandomIdGenerator):
    """Draws the id of a trace before its first span is begun, because the sampler decides by the id.

    To begin a span that is not sampled takes 5 µs, to ask the sampler 1.5 µs.
    """

    def __init__(self) -> None:
        self._drawn = 0

    def draw(self) -> int:
        self._drawn = super().generate_trace_id()
        return self._drawn

    def generate_trace_id(self) -> int:
        return self._drawn


class Spans:
    """The spans of one process; begins the thread that sends them."""

    def __init__(self) -> None:
        sampler = None if os.environ.get("OTEL_TRACES_SAMPLER") else ParentBasedTraceIdRatio(DEFAULT_RATIO)
        self._trace_ids = _TraceIds()
        # Not closed by the library's exit handler, which may wait for 30 s.
        self._provider = TracerProvider(
            sampler=sampler, resource=_resource(), shutdown_on_exit=False, id_generator=self._trace_ids
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("lesson_server", __version__)

    def begin(self, region: Region) -> EventSpan | None:
        """Begin the span of an event; None if the trace is not sampled."""
        name = region.CHART.EVENT
        result = self._provider.sampler.should_sample(ROOT, self._trace_ids.draw(), name, SpanKind.SERVER)
        if result.decision is not Decision.RECORD_AND_SAMPLE:
            return None
        span = self._tracer.start_span(name, ROOT, SpanKind.SERVER)
        connection = region.connection
        span.set_attribute("client", region.CHART.CLIENT)
        span.set_attribute("sid", connection.sid)
        span.set_attribute("lesson_id", connection.handshake.lesson_id)
        return EventSpan(span)

    def observer(self, observe: StepObserver) -> StepObserver:
        """Return an observer that also adds the step to the span of the event that runs in this task, if there is one.

        Args:
            observe: the observer that is called first.
        """

        def observe_both(step: str, seconds: float, error: BaseException | None) -> None:
            observe(step, seconds, error)
            if (event := _event.get()) is not None:
                self._add_step(event, step, seconds, error)

        return observe_both

    def _add_step(self, event: Context, step: str, seconds: float, error: BaseException | None) -> None:
        now = time.time_ns()
        span = self._tracer.start_span(step, event, start_time=now - int(seconds * 1e9))
        if isinstance(error, Refusal):
            _set_outcome(span, error.outcome)
        elif error is not None:
            # Only the type: the text of a defect may quote anything, and is in the log.
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(StatusCode.ERROR)
        span.end(now)

    def close(self, deadline: float) -> None:
        """Send the last spans; wait at most ``deadline`` seconds."""
        closing = threading.Thread(target=self._provider.shutdown, name="close spans", daemon=True)
        closing.start()
        closing.join(deadline)


def _resource() -> Resource:
    resource = Resource.create({SERVICE_VERSION: __version__})
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "lesson-server"}))
    return resource


def _set_outcome(span: Span, outcome: str) -> None:
    span.set_attribute("outcome", outcome)
    if outcome in FAILURES:
        span.set_status(StatusCode.ERROR)
