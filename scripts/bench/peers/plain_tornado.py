"""The plain join on Tornado and python-socketio."""

import asyncio
import os

import socketio
import tornado.web
from plain import PORT, PlainJoin


async def serve() -> None:
    """Serve until it is killed."""
    sio = socketio.AsyncServer(async_mode="tornado")
    await PlainJoin(sio).open()
    application = tornado.web.Application([(r"/socket.io/", socketio.get_tornado_handler(sio))])
    application.listen(PORT, "127.0.0.1")
    print("listening", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    if os.environ.get("BENCH_UVLOOP"):
        import uvloop

        uvloop.run(serve())
    else:
        asyncio.run(serve())
