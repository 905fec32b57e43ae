"""The plain join on ASGI: python-socketio and uvicorn, the latter with uvloop and httptools."""

import socketio
import uvicorn
from plain import PORT, PlainJoin

sio = socketio.AsyncServer(async_mode="asgi")
plain = PlainJoin(sio)


async def start() -> None:
    """Prepare the stores; uvicorn calls this before it accepts connections."""
    await plain.open()


app = socketio.ASGIApp(sio, on_startup=start)

if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=PORT, log_level="warning", access_log=False)
