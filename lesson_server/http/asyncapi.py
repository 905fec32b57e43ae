"""The AsyncAPI 3 document of the Socket.IO side, made from the registry of events and the types that check the data.

The main namespace is the only channel. What a client sends is an operation that the server receives, and the
acknowledgement is the reply of the operation. Each kind of client has its own operations, because the data, the result
and the refusals of an event differ between them. AsyncAPI has no binding for Socket.IO: the extension ``x-socketio``
says what the binding ``ws`` can't, such as the packet type of a message.

Source: contract, sections 2, 3 and 12; https://www.asyncapi.com/docs/reference/specification/v3.0.0.
"""

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from string import Formatter
from typing import Any

import orjson
from pydantic import TypeAdapter

from lesson_server import __version__
from lesson_server.errors import NoSuchNamespace, Refusal, ServiceBusy
from lesson_server.events.event import Event, ServerEvent
from lesson_server.gateway import handshake
from lesson_server.protocol.http_server import PlainHandler

Schema = dict[str, Any]

CHANNEL = "main"
PATH = "/socket.io/"
TRANSPORTS = ("polling", "websocket")
QUERY = {
    "type": "object",
    "properties": {
        "EIO": {"const": "4", "description": "The protocol of Engine.IO."},
        "transport": {"enum": TRANSPORTS},
    },
    "required": ["EIO", "transport"],
}
# The characters with a meaning in a regular expression; re.escape would escape others too, which JSON Schema forbids.
SPECIAL = re.compile(r"[.*+?^${}()|\[\]\\]")
# What stands in a message for a field, if the refusal does not say more.
WORD = r"\S+"

DESCRIPTION = f"""\
What clients and the server send each other over Socket.IO.

A connection begins with the handshake, `connect`. Then the client sends events; `x-socketio` of a message tells its
packet type. The payload of an event is its one argument; a null payload may be left out. If the client asks for an
acknowledgement, it gets one within 5 s, whose one argument is the payload of the reply. An event without a request for
an acknowledgement is handled in the same way. An event that is not described here is ignored.

A refusal is the message of an ERROR or of a `connect_error`. Each text or pattern of the property `message` is one
refusal, by its `title`; `x-retryable` tells whether the same request may succeed later.

Any Socket.IO 4 client connects with the path `{PATH}`, which is the default. Protocols: Socket.IO 5, Engine.IO 4.
"""


def document(events: Sequence[Event], server_events: Sequence[ServerEvent]) -> dict[str, Any]:
    """Return the document.

    Args:
        events: the events that clients send.
        server_events: the events that the server sends.
    """
    builder = _Builder()
    clients = sorted({client for event in events for client in event.regions})
    builder.add_handshake(clients)
    for event in events:
        for client in clients:
            builder.add_event(event, client)
    for server_event in server_events:
        builder.add_server_event(server_event)
    builder.add_disconnect()
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Lesson server: Socket.IO",
            "version": __version__,
            "description": DESCRIPTION,
            "license": {"name": "MIT"},
        },
        "defaultContentType": "application/json",
        "servers": {
            "server": {
                "host": "{host}",
                "pathname": PATH,
                "protocol": "ws",
                "description": "Or `wss`, behind a proxy that ends TLS.",
                "variables": {"host": {"default": "localhost:8080", "description": "The host name and the port."}},
                "x-socketio": {"protocol": 5, "engineIo": 4, "path": PATH, "transports": TRANSPORTS},
            }
        },
        "channels": {
            CHANNEL: {
                "address": "/",
                "title": "The main namespace",
                "servers": [{"$ref": "#/servers/server"}],
                "messages": builder.messages,
                "bindings": {"ws": {"method": "GET", "query": QUERY, "bindingVersion": "0.1.0"}},
                "x-socketio": {"namespace": "/"},
            }
        },
        "operations": builder.operations,
        "components": {"schemas": builder.schemas},
    }


class _Builder:
    """The parts of a document, as they are added."""

    def __init__(self) -> None:
        self.messages: dict[str, Any] = {}
        self.operations: dict[str, Any] = {}
        self.schemas: dict[str, Schema] = {}

    def add_handshake(self, clients: Sequence[str]) -> None:
        auth = self._received("connect", handshake.AUTH)
        auth["properties"]["client"]["enum"] = list(clients)
        refusals = _any_of((NoSuchNamespace, *handshake.REFUSALS, ServiceBusy), {})
        self._message("connect", "connect", "CONNECT", auth)
        self._message("connected", "connect", "CONNECT", _object(sid={"type": "string", "minLength": 1}))
        self._message("connect_error", "connect_error", "CONNECT_ERROR", _object(message=refusals))
        summary = "The handshake. After a refusal the server closes the transport."
        self._operation("connect", "receive", summary, ["connect"], reply=["connected", "connect_error"])

    def add_event(self, event: Event, client: str) -> None:
        region = event.regions.get(client)
        name = f"{client}_{event.name}"
        data = {} if region is None else self._received(name, region.DATA)
        self._message(name, event.name, "EVENT", data)
        reply = []
        if region is not None and region.RESULT is not None:
            success = _object(status={"const": "SUCCESS"}, data=self._sent(f"{name}_success", region.RESULT))
            reply.append(self._message(f"{name}_success", "SUCCESS", "ACK", success))
        refusals = _any_of(event.refusals(client), {"client": client, "event": event.name})
        error = _object(status={"const": "ERROR"}, message=refusals)
        reply.append(self._message(f"{name}_error", "ERROR", "ACK", error))
        summary = f"A {client} can't send it." if region is None else _first_line(region)
        self._operation(name, "receive", summary, [name], client, reply)

    def add_server_event(self, event: ServerEvent) -> None:
        self._message(event.name, event.name, "EVENT", self._sent(event.name, event.data))
        self._operation(event.name, "send", _first_line(event.data), [event.name])

    def add_disconnect(self) -> None:
        self._message("disconnect", "disconnect", "DISCONNECT", {"type": "null"})
        summary = "The person was removed from the lesson. The official clients do not connect again by themselves."
        self._operation("disconnect", "send", summary, ["disconnect"])

    def _received(self, message: str, data: TypeAdapter[Any]) -> Schema:
        return self._separate(message, data.json_schema(ref_template=_template(message)))

    def _sent(self, message: str, data: type) -> Schema:
        schema = TypeAdapter(data).json_schema(mode="serialization", ref_template=_template(message))
        return self._separate(message, _closed(schema))

    def _separate(self, message: str, schema: Schema) -> Schema:
        """Move the schemas that a schema refers to into the components; their names begin with that of the message."""
        for model, part in schema.pop("$defs", {}).items():
            self.schemas[f"{message}.{model}"] = part
        return schema

    def _message(self, key: str, name: str, packet: str, payload: Schema) -> str:
        self.messages[key] = {"name": name, "payload": payload, "x-socketio": {"packet": packet}}
        return key

    def _operation(
        self,
        name: str,
        action: str,
        summary: str | None,
        messages: Iterable[str],
        client: str | None = None,
        reply: Iterable[str] = (),
    ) -> None:
        channel = {"$ref": f"#/channels/{CHANNEL}"}
        operation: dict[str, Any] = {"action": action, "channel": channel, "messages": _references(messages)}
        if summary is not None:
            operation["summary"] = summary
        if client is not None:
            operation["tags"] = [{"name": client}]
        if reply:
            operation["reply"] = {"channel": channel, "messages": _references(reply)}
        self.operations[name] = operation


def _object(**properties: Schema) -> Schema:
    """Return the schema of an object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _closed(schema: Any) -> Any:
    """Return a schema in which no object has properties that are not described."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(part) for name, part in schema.items()}
    return {"additionalProperties": False, **closed} if schema.get("type") == "object" else closed


def _template(message: str) -> str:
    return f"#/components/schemas/{message}.{{model}}"


def _references(messages: Iterable[str]) -> list[dict[str, str]]:
    return [{"$ref": f"#/channels/{CHANNEL}/messages/{message}"} for message in messages]


def _any_of(refusals: Iterable[type[Refusal]], known: Mapping[str, str]) -> Schema:
    return {"anyOf": [_refusal(refusal, known) for refusal in refusals]}


def _refusal(refusal: type[Refusal], known: Mapping[str, str]) -> Schema:
    """Return the schema of the message of a refusal, in which the ``known`` fields have these texts."""
    parts = list(Formatter().parse(refusal.message))
    fields = {field for _, field, _, _ in parts if field is not None}
    schema: Schema = {"title": refusal.__name__, "type": "string"}
    description = _first_line(refusal)
    if description is not None:
        schema["description"] = description
    if fields <= known.keys():
        schema["const"] = refusal.message.format(**known)
    else:
        pattern = ""
        for literal, field, _, _ in parts:
            pattern += _escaped(literal)
            if field is not None:
                pattern += _escaped(known[field]) if field in known else refusal.fields.get(field, WORD)
        schema["pattern"] = f"^{pattern}$"
    return schema | {"x-retryable": refusal.retryable}


def _escaped(text: str) -> str:
    return SPECIAL.sub(r"\\\g<0>", text)


def _first_line(cls: type) -> str | None:
    """Return the first line of a class's own docstring, in Markdown."""
    return None if cls.__doc__ is None else inspect.cleandoc(cls.__doc__).partition("\n")[0].replace("``", "`")


class AsyncApiHandler(PlainHandler):
    """Answers with the document. Anybody may read it: it is for developers of clients, and holds no secret."""

    def initialize(self, document: Mapping[str, Any]) -> None:
        self._document = document

    def get(self) -> None:
        self.set_header("Content-Type", "application/json")
        # For AsyncAPI Studio, which runs in the browser.
        self.set_header("Access-Control-Allow-Origin", "*")
        self.finish(orjson.dumps(self._document))
