"""Logins to the console, as the form of a browser makes them."""

from typing import Any
from urllib.parse import urlencode

from roster_api import TOKEN, ask
from tornado.httpclient import HTTPResponse


async def login(server: Any, token: str, **headers: str) -> HTTPResponse:
    """Sends the form of the login page."""
    return await ask(
        server,
        "/console/login",
        "POST",
        token=None,
        headers={"Origin": server.url, "Content-Type": "application/x-www-form-urlencoded", **headers},
        body=urlencode({"token": token}),
    )


async def session(server: Any) -> dict[str, str]:
    """Returns the header with the cookie of a new session."""
    answer = await login(server, TOKEN)
    assert (answer.code, answer.headers["Location"]) == (303, "/console")
    return {"Cookie": answer.headers["Set-Cookie"].partition(";")[0]}


async def logout(server: Any, cookie: dict[str, str]) -> HTTPResponse:
    """Sends the form of the button Log out."""
    return await ask(server, "/console/logout", "POST", token=None, headers={**cookie, "Origin": server.url}, body="")
