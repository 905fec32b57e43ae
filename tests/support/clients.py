"""A client of python-socketio that joins, and what it is answered."""

import asyncio
import contextlib

import pytest
import socketio
from socketio.exceptions import ConnectionError as ConnectFailedError

SUCCESS = {"status": "SUCCESS", "data": {}}
UNAVAILABLE = {"status": "ERROR", "message": "the lesson service is unavailable, try again"}
TRANSPORTS = pytest.mark.parametrize("transports", [["websocket"], ["polling"], ["polling", "websocket"]], ids="/".join)


def error(message):
    return {"status": "ERROR", "message": message}


@contextlib.asynccontextmanager
async def client(server, transports=("websocket",), **auth):
    sio = socketio.AsyncClient(reconnection=False)
    await sio.connect(server.url, transports=list(transports), auth=auth)
    try:
        yield sio
    finally:
        await sio.disconnect()
        await sio.shutdown()
        for task in (sio.eio.read_loop_task, sio.eio.write_loop_task):
            if task is not None:  # after the server's farewell the client's polling loops wait out a timeout
                task.cancel()


async def join(sio, *data):
    return await sio.call("join_lesson", *data, timeout=10)


async def refusal(server, auth):
    """What a client with that handshake is told, and what becomes of its transport."""
    sio = socketio.AsyncClient(reconnection=False)
    told = asyncio.get_running_loop().create_future()
    sio.on("connect_error", told.set_result)
    with contextlib.suppress(ConnectFailedError):
        await sio.connect(server.url, transports=["websocket"], auth=auth)
    await sio.shutdown()
    return (await told)["message"]
