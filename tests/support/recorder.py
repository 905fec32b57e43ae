"""Checks every message between clients and servers against the AsyncAPI document of the server.

The recorder reads the document as the developer of a client would, and uses nothing else of the server. A drift is a
message of the server that the document does not describe, or a success where the document says that there is none. A
message of a client may be wrong, because tests send wrong ones: then the answer must be a described refusal.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, NamedTuple

import jsonschema_rs

from lesson_server.events.event import Event
from lesson_server.events.registry import EVENTS, SERVER_EVENTS
from lesson_server.http.asyncapi import document
from lesson_server.protocol.engine import Engine
from lesson_server.protocol.engine_socket import EngineSocket
from lesson_server.server import LessonServer

CONNECT, DISCONNECT, EVENT, ACK, CONNECT_ERROR = "01234"
PACKET = re.compile(r"([0-6])(?:(/[^,]*),)?(\d+)?(.*)", re.DOTALL)
# What tests emit in the role of another program, with the rooms of the server.
FOREIGN_EVENTS = frozenset({"news", "end"})


class Packet(NamedTuple):
    """A Socket.IO packet; ``data`` is None if there is none."""

    kind: str
    namespace: str | None
    id: int | None
    data: Any


def parse(text: str) -> Packet:
    """Raises ValueError for what is no packet."""
    match = PACKET.fullmatch(text)
    if match is None:
        raise ValueError("not a packet")
    kind, namespace, number, data = match.groups()
    return Packet(kind, namespace, None if number is None else int(number), json.loads(data) if data else None)


class Operation(NamedTuple):
    """An operation: the check of its message, and of each message of its reply, by its name."""

    accepts: Callable[[Any], bool]
    replies: Mapping[str, Callable[[Any], bool]]


class Description:
    """A document, by what is looked up in it: what a kind of client sends, and what the server sends."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document
        self.received: dict[tuple[str | None, str], Operation] = {}
        self.sent: dict[str, Operation] = {}
        for operation in document["operations"].values():
            ((name, accepts),) = self._checks(operation["messages"]).items()
            described = Operation(accepts, self._checks(operation.get("reply", {"messages": []})["messages"]))
            if operation["action"] == "send":
                self.sent[name] = described
            else:
                (client,) = [tag["name"] for tag in operation.get("tags", ())] or [None]
                self.received[client, name] = described
        refusals = document["channels"]["main"]["messages"]["connect_error"]["payload"]["properties"]["message"]
        self.temporary = {refusal["const"] for refusal in refusals["anyOf"] if refusal["x-retryable"]}

    def _checks(self, references: Sequence[Mapping[str, str]]) -> dict[str, Callable[[Any], bool]]:
        """The checks of messages: by the name, or of the reply to the handshake by the packet type."""
        checks: dict[str, Callable[[Any], bool]] = {}
        for reference in references:
            message: Any = self._document
            for part in reference["$ref"].removeprefix("#/").split("/"):
                message = message[part]
            schema = {"$ref": f"{reference['$ref']}/payload", **self._document}
            checks[message["name"]] = jsonschema_rs.Draft7Validator(schema).is_valid
        return checks


@dataclass
class Conversation:
    """One Engine.IO socket: what the client said of itself, and the events that are not acknowledged yet, by id."""

    auth: Any = None
    is_described: bool = False  # whether the handshake is as the document says
    client: str | None = None  # once it is connected
    asked: defaultdict[int, list[list[Any]]] = field(default_factory=lambda: defaultdict(list))


class Recorder:
    """Follows the conversations of one server.

    Args:
        description: the document of the server.
        report: called with a sentence for each drift.
    """

    def __init__(self, description: Description, report: Callable[[str], None]) -> None:
        self._description = description
        self._report = report
        self._conversations: defaultdict[str, Conversation] = defaultdict(Conversation)
        self._is_described_event = lru_cache(maxsize=1_000)(self._check_event)  # everybody in a room gets the same text

    def from_client(self, sid: str, text: str) -> None:
        """Notes what a client sends; the server ends the connection of a client whose packet is malformed."""
        conversation = self._conversations[sid]
        try:
            packet = parse(text)
        except ValueError:
            return
        if packet.kind == CONNECT and conversation.client is None:
            conversation.auth = packet.data
            conversation.is_described = self._description.received[None, "connect"].accepts(packet.data)
        elif packet.kind == EVENT and packet.id is not None and isinstance(packet.data, list):
            conversation.asked[packet.id].append(packet.data)

    def to_client(self, sid: str, text: str | bytes) -> None:
        """Checks what the server sends; an error here must not be one of the server."""
        try:
            self._check(self._conversations[sid], text)
        except Exception as error:
            self._report(f"the server sent {text!r}, which can't be checked: {error!r}")

    def _check(self, conversation: Conversation, text: Any) -> None:
        if text[:2] == f"{EVENT}[":
            if not self._is_described_event(text):
                self._report(f"the server sent {text}, which is not described")
            return
        packet = parse(text)
        if packet.kind == CONNECT:
            if not self._description.received[None, "connect"].replies["connect"](packet.data):
                self._report(f"the handshake was answered by {packet.data}, which is not described")
            conversation.client = conversation.auth["client"]
        elif packet.kind == CONNECT_ERROR:
            self._check_refusal(conversation, packet)
        elif packet.kind == ACK:
            self._check_answer(conversation, packet)
        elif packet.kind != DISCONNECT or not self._description.sent["disconnect"].accepts(packet.data):
            self._report(f"the server sent {text}, which is not described")

    def _check_event(self, text: str) -> bool:
        name, *arguments = parse(text).data
        if name in FOREIGN_EVENTS:
            return True
        described = self._description.sent.get(name)
        return described is not None and len(arguments) == 1 and described.accepts(arguments[0])

    def _check_refusal(self, conversation: Conversation, packet: Packet) -> None:
        if not self._description.received[None, "connect"].replies["connect_error"](packet.data):
            self._report(f"the handshake was refused by {packet.data}, which is not described")
            return
        is_temporary = packet.data["message"] in self._description.temporary
        if packet.namespace is None and conversation.is_described and not is_temporary:
            self._report(f"a handshake as the document describes it was refused by {packet.data}")

    def _check_answer(self, conversation: Conversation, packet: Packet) -> None:
        events = conversation.asked.get(packet.id or 0)
        if not events:
            self._report(f"the server acknowledged {packet.id}, which nobody has asked for")
            return
        name, *arguments = events.pop(0)
        what = f"{name} of a {conversation.client}"
        operation = self._description.received.get((conversation.client, name))
        if operation is None:
            self._report(f"the server answered {what}, which is not described")
            return
        (answer,) = packet.data if len(packet.data) == 1 else (None,)
        matching = [reply for reply, accepts in operation.replies.items() if accepts(answer)]
        if len(matching) != 1:
            self._report(f"{what} was answered by {packet.data}, which is not described")
        elif matching == ["SUCCESS"]:
            data = arguments or [None]
            if len(data) > 1 or not operation.accepts(data[0]):
                self._report(f"{what} with {arguments} succeeded, and these data are not described")
            if not conversation.is_described:
                self._report(f"{what} succeeded, after a handshake that is not described")


@cache
def description_of(events: tuple[Event, ...]) -> Description:
    """The description of a server with these events; the JSON is what a client gets."""
    return Description(json.loads(json.dumps(document(events, SERVER_EVENTS))))


@contextmanager
def recorded_servers(report: Callable[[str], None]) -> Iterator[None]:
    """Every server that is made meanwhile is recorded, in this process and in those that it forks.

    Args:
        report: called with a sentence for each drift.
    """
    recorders: dict[int, tuple[Engine, Recorder]] = {}
    begin, receive, send = LessonServer.__init__, Engine.on_message, EngineSocket.send_packet

    def recorder_of(engine: object) -> Recorder | None:
        return recorders[id(engine)][1] if id(engine) in recorders else None

    def begin_recorded(self: LessonServer, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        events = kwargs.get("events", args[2] if len(args) > 2 else EVENTS)
        engine = self._protocol.sio.eio
        recorders[id(engine)] = engine, Recorder(description_of(tuple(events)), report)

    def receive_recorded(self: Engine, socket: EngineSocket, data: str) -> None:
        if recorder := recorder_of(self):
            recorder.from_client(socket.sid, data)
        receive(self, socket, data)

    def send_recorded(self: EngineSocket, packet: str | bytes) -> None:
        if (recorder := recorder_of(self._callbacks)) and not self.closed:
            recorder.to_client(self.sid, packet[1:])
        send(self, packet)

    try:
        LessonServer.__init__ = begin_recorded  # type: ignore[method-assign]
        Engine.on_message = receive_recorded  # type: ignore[method-assign]
        EngineSocket.send_packet = send_recorded  # type: ignore[method-assign]
        yield
    finally:
        LessonServer.__init__ = begin  # type: ignore[method-assign]
        Engine.on_message = receive  # type: ignore[method-assign]
        EngineSocket.send_packet = send  # type: ignore[method-assign]


@contextmanager
def no_drift() -> Iterator[list[str]]:
    """Asserts that there is no drift meanwhile; a test that has planted one clears the list."""
    drifts: list[str] = []
    with recorded_servers(drifts.append):
        yield drifts
    assert not drifts, "\n".join(drifts)
