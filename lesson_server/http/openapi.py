"""The OpenAPI 3.1 document of the roster API, made from the types that its handlers answer with."""

from functools import cache
from typing import Any

from pydantic import TypeAdapter

from lesson_server import __version__
from lesson_server.http.api import SENTENCES, ApiHandler
from lesson_server.http.roster import DEFAULT_LIMIT, MAX_LIMIT, Error, LessonDetail, LessonPage, Overview
from lesson_server.stores.rds.lesson import LESSON_ID

REFS = "#/components/schemas/{model}"
# The name of the way to prove access.
SECURITY = "adminToken"
# Headers of errors: status → name, schema.
HEADERS = {
    401: ("WWW-Authenticate", {"type": "string", "const": "Bearer"}),
    429: ("Retry-After", {"type": "string", "pattern": "^[0-9]+$"}),
}
# The errors that any request may get.
COMMON_ERRORS = (401, 404, 429, 503)


@cache
def document() -> dict[str, Any]:
    """Return the document."""
    schemas: dict[str, Any] = {}

    def response(description: str, type_: type) -> dict[str, Any]:
        schema = TypeAdapter(type_).json_schema(mode="serialization", ref_template=REFS)
        schemas.update(schema.pop("$defs", {}))
        schemas[type_.__name__] = schema
        reference = {"$ref": REFS.format(model=type_.__name__)}
        return {"description": description, "content": {"application/json": {"schema": reference}}}

    def failure(code: int) -> dict[str, Any]:
        answer = response(_capitalized(SENTENCES[code]), Error)
        if code in HEADERS:
            name, schema = HEADERS[code]
            answer["headers"] = {name: {"required": True, "schema": schema}}
        return answer

    def operation(
        name: str,
        summary: str,
        answers: dict[int, dict[str, Any]],
        parameters: tuple[dict[str, Any], ...] = (),
        *errors: int,
    ) -> dict[str, Any]:
        failures = {code: failure(code) for code in sorted({*COMMON_ERRORS, *errors})}
        return {
            "operationId": name,
            "summary": summary,
            "parameters": list(parameters),
            "responses": {str(code): answer for code, answer in sorted((answers | failures).items())},
        }

    lesson_id = _path("lesson_id", "The lesson.", {"type": "string", "pattern": f"^{LESSON_ID.pattern}$"})
    removed = {204: {"description": "The person was removed: each connection of the person in this lesson is closed."}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Lesson server: roster",
            "version": __version__,
            "description": "Who is in which lesson, over all nodes. Times are RFC 3339 in UTC.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "security": [{SECURITY: []}],
        "paths": {
            "/api/overview": {
                "get": operation(
                    "getOverview", "The numbers over all lessons", {200: response("The numbers.", Overview)}
                )
            },
            "/api/lessons": {
                "get": operation(
                    "listLessons",
                    "The lessons in which somebody is, by lesson_id",
                    {200: response("A page of lessons.", LessonPage)},
                    (
                        _query(
                            "limit",
                            "The maximum number of lessons on the page.",
                            {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT},
                        ),
                        _query(
                            "cursor",
                            "The cursor of the page before; without one, the first page.",
                            {"type": "string", "pattern": f"^{LESSON_ID.pattern}$"},
                        ),
                    ),
                    400,
                )
            },
            "/api/lessons/{lesson_id}": {
                "get": operation(
                    "getLesson",
                    "Everybody in a lesson, and its seats",
                    {200: response("The lesson.", LessonDetail)},
                    (lesson_id,),
                )
            },
            "/api/lessons/{lesson_id}/participants/{client_id}": {
                "delete": operation(
                    "removeParticipant",
                    "Remove a participant",
                    removed,
                    (lesson_id, _path("client_id", "The participant.")),
                    403,
                )
            },
            "/api/lessons/{lesson_id}/teachers/{user_id}": {
                "delete": operation(
                    "removeTeacher", "Remove a teacher", removed, (lesson_id, _path("user_id", "The teacher.")), 403
                )
            },
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                SECURITY: {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "The setting admin.token. Not needed in the embedded set-up, from the same machine.",
                }
            },
        },
    }


def _path(name: str, description: str, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    schema = schema or {"type": "string", "minLength": 1}
    return {"name": name, "in": "path", "required": True, "description": description, "schema": schema}


def _query(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "description": description, "schema": schema}


def _capitalized(sentence: str) -> str:
    return f"{sentence[0].upper()}{sentence[1:]}."


class OpenApiHandler(ApiHandler):
    """Answers with the document."""

    def get(self) -> None:
        self.answer(document())
