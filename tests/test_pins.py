"""What leans on a part of a library that may change without notice: each is pinned here, and bounded in setup.py.

An override is compared with the method that it replaces, by itself; what is called is in a table.
"""

import importlib
import importlib.metadata
import inspect
import pkgutil
import re
from collections.abc import Iterator
from types import FunctionType

import pytest
import socketio
from cluster import ROOT
from redis.asyncio import ConnectionPool, Redis, RedisCluster
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from tornado.httpserver import HTTPServer

import lesson_server

# Library → the versions that were read, and the modules that lean on a part that may change.
READ = {
    "python-socketio": ("5.18", ["protocol/transport", "protocol/local_rooms", "protocol/rooms"]),
    "python-engineio": ("4.15", ["protocol/engine"]),
    "tornado": ("6.6", ["protocol/http_server"]),
    "picows": ("2.3", ["protocol/websocket_protocol"]),
    "transitions": ("0.9", ["events/machine"]),
    "aiopg": ("1.4", ["stores/rds/aiopg_patches"]),
    "redis": ("8", ["stores/redis/shard", "stores/redis/client"]),
    "mixpanel": ("5", ["analytics"]),
}

# Function → its parameters, and the module that calls it.
CALLED = {
    socketio.AsyncServer._handle_event_internal: ["self", "server", "sid", "eio_sid", "data", "namespace", "id"],
    socketio.AsyncServer._handle_connect: ["self", "eio_sid", "namespace", "data"],
    # these call the engine
    socketio.AsyncServer._send_packet: ["self", "eio_sid", "pkt"],
    socketio.AsyncServer._send_eio_packet: ["self", "eio_sid", "eio_pkt"],
    socketio.AsyncManager.sid_from_eio_sid: ["self", "eio_sid", "namespace"],
    socketio.AsyncManager.is_connected: ["self", "sid", "namespace"],
    socketio.AsyncManager.basic_disconnect: ["self", "sid", "namespace", "kwargs"],
    HTTPServer.handle_stream: ["self", "stream", "address"],
    HTTPServer.close_all_connections: ["self"],
    AbstractConnection.connect: ["self"],
    AbstractConnection.send_packed_command: ["self", "command", "check_health"],
    Redis.parse_response: ["self", "connection", "command_name", "options"],
    ConnectionPool.get_connection: ["self", "command_name", "keys", "options"],
    Retry.call_with_retry: ["self", "do", "fail", "is_retryable", "with_failure_count"],
    RedisCluster.get_primaries: ["self"],
    RedisCluster.get_node_from_key: ["self", "key", "replica"],
}


def overrides() -> Iterator[tuple[FunctionType, FunctionType]]:
    """Each method of ours that overrides one of a library, with that."""
    for module_info in pkgutil.walk_packages(lesson_server.__path__, "lesson_server."):
        if module_info.name.endswith("__main__"):
            continue
        module = importlib.import_module(module_info.name)
        for cls in vars(module).values():
            if not inspect.isclass(cls) or cls.__module__ != module.__name__:
                continue
            for name, method in vars(cls).items():
                theirs = next((vars(base)[name] for base in cls.__mro__[1:] if name in vars(base)), None)
                foreign = isinstance(theirs, FunctionType) and not theirs.__module__.startswith("lesson_server")
                if foreign and theirs.__name__ == "_unimplemented_method":
                    continue  # Tornado's stand-in for get, post and so on, whose arguments come from the route
                if foreign and isinstance(method, FunctionType) and not re.fullmatch(r"__\w+__|initialize", name):
                    yield method, theirs


OVERRIDES = list(overrides())


@pytest.mark.parametrize(("ours", "theirs"), OVERRIDES, ids=lambda function: function.__qualname__)
def test_an_override_takes_what_the_method_takes_that_it_replaces(ours, theirs):
    mine = [name for name in inspect.signature(ours).parameters if name not in ("args", "kwargs")]
    others = [name for name in inspect.signature(theirs).parameters if name not in ("args", "kwargs")]
    assert mine == others, f"{theirs.__qualname__} has changed: look at {ours.__module__} again"


def test_the_overrides_are_found():
    found = {ours.__qualname__ for ours, _ in OVERRIDES}
    assert {
        "Engine.send",
        "SocketServer._handle_eio_message",
        "LocalRooms.basic_enter_room",
        "Rooms._listen",
        "Rooms.enter_room",
        "ClientServer.start_request",
        "ClientStream.write",
        "PollingHandler.log_exception",
        "ChartMachine.callbacks",
        "ChartMachine.process_context",
        "Row.execute",
    } <= found


@pytest.mark.parametrize("function", CALLED, ids=lambda function: function.__qualname__)
def test_a_part_that_is_called_takes_what_it_took(function):
    assert list(inspect.signature(function).parameters) == list(CALLED[function])


@pytest.mark.parametrize("library", READ)
def test_the_version_is_one_that_was_read_and_setup_py_keeps_it_so(library):
    version, modules = READ[library]
    assert importlib.metadata.version(library).startswith(version + ".")
    (bounds,) = re.findall(
        rf'^\s+"{re.escape(library)}(?:\[\w+\])?([^"]*)"', (ROOT / "setup.py").read_text(), re.MULTILINE
    )
    *most, last = version.split(".")
    assert bounds.endswith("<" + ".".join([*most, str(int(last) + 1)])), bounds
    for module in modules:
        assert (ROOT / "lesson_server" / f"{module}.py").exists()
