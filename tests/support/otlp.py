"""A collector of OpenTelemetry that keeps what it gets: OTLP over HTTP, in protobuf."""

import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Status


@dataclass(frozen=True)
class Received:
    """A span, and its children in the order in which they began."""

    name: str
    trace: bytes
    kind: int
    start: int
    end: int
    attributes: Mapping[str, Any]
    is_error: bool
    resource: Mapping[str, Any]
    children: list["Received"]


def _values(attributes: Any) -> dict[str, Any]:
    def value(attribute: KeyValue) -> Any:
        return getattr(attribute.value, str(attribute.value.WhichOneof("value")))

    return {attribute.key: value(attribute) for attribute in attributes}


class Collector:
    """What has been received.

    Attributes:
        bodies: the bodies of the requests.
        paths: their paths.
        answers: requests wait while it is not set.
        asked: set by the first request.
    """

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.bodies: list[bytes] = []
        self.paths: set[str] = set()
        self.answers = threading.Event()
        self.answers.set()
        self.asked = threading.Event()

    def roots(self) -> list[Received]:
        """The spans without a parent, the first that has begun first; every other span is below one of them."""
        found: dict[bytes, Received] = {}
        parents: dict[bytes, bytes] = {}
        for body in self.bodies:
            for part in ExportTraceServiceRequest.FromString(body).resource_spans:
                for span in (span for scope in part.scope_spans for span in scope.spans):
                    found[span.span_id] = Received(
                        span.name,
                        span.trace_id,
                        span.kind,
                        span.start_time_unix_nano,
                        span.end_time_unix_nano,
                        _values(span.attributes),
                        span.status.code == Status.STATUS_CODE_ERROR,
                        _values(part.resource.attributes),
                        [],
                    )
                    parents[span.span_id] = span.parent_span_id
        below = defaultdict(list)
        for span_id, span in sorted(found.items(), key=lambda item: item[1].start):
            below[parents[span_id]].append(span)
        roots = below.pop(b"", [])
        for span_id, children in below.items():
            assert {span.trace for span in children} == {found[span_id].trace}
            found[span_id].children.extend(children)
        return roots


@contextmanager
def running_collector() -> Iterator[Collector]:
    """Run a collector in a thread."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            collector.asked.set()
            collector.answers.wait()
            collector.paths.add(self.path)
            collector.bodies.append(body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(server.server_port)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield collector
        finally:
            collector.answers.set()
            server.shutdown()
            thread.join()
