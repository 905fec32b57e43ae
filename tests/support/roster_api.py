"""Requests to the roster API. Each answer is compared with the OpenAPI document."""

import json
import re
from typing import Any

import jsonschema_rs
from tornado.httpclient import AsyncHTTPClient, HTTPResponse

from lesson_server.http.openapi import document

TOKEN = "admin-token-of-the-tests"


async def ask(
    server: Any,
    path: str,
    method: str = "GET",
    token: str | None = TOKEN,
    headers: dict[str, str] | None = None,
    **options: Any,
) -> HTTPResponse:
    """Sends a request with the bearer token, unless ``token`` is None, and returns an answer that conforms."""
    credentials = {} if token is None else {"Authorization": f"Bearer {token}"}
    answer = await AsyncHTTPClient().fetch(
        server.url + path,
        method=method,
        headers={**credentials, **(headers or {})},
        raise_error=False,
        follow_redirects=False,
        **options,
    )
    conforms(path, method, answer)
    return answer


async def read(server: Any, path: str, **options: Any) -> Any:
    """Returns the data of a successful answer."""
    answer = await ask(server, path, **options)
    assert answer.code == 200, answer.body
    return json.loads(answer.body)


async def failure(server: Any, path: str, method: str = "GET", **options: Any) -> tuple[int, str]:
    """Returns the code and the sentence of an answer that is an error."""
    answer = await ask(server, path, method, **options)
    data = json.loads(answer.body)
    assert list(data) == ["error"]
    return answer.code, data["error"]


def conforms(path: str, method: str, answer: HTTPResponse) -> None:
    """Asserts that an answer is one that the document describes, if it describes the request."""
    operation = operation_of(path, method)
    if operation is None:
        return
    response = operation["responses"][str(answer.code)]
    for name, header in response.get("headers", {}).items():
        jsonschema_rs.validate(header["schema"], answer.headers[name])
    if "content" not in response:
        assert (answer.body, answer.headers.get("Content-Type")) == (b"", None)
        return
    assert answer.headers["Content-Type"] == "application/json"
    schema = response["content"]["application/json"]["schema"]
    jsonschema_rs.validate({**schema, "components": document()["components"]}, json.loads(answer.body))


def operation_of(path: str, method: str) -> Any:
    """Returns the description of a request in the document; None if there is none."""
    for template, operations in document()["paths"].items():
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path.partition("?")[0]):
            return operations.get(method.lower())
    return None
