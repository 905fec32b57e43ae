"""openapi.py: the document is valid, and the server answers as the document says."""

import json
import re
import subprocess
import sys

import pytest
import schemathesis
from clients import SUCCESS, client, join
from cluster import NodeProcess
from processes import unmeasured
from roster_api import TOKEN, operation_of, read

from lesson_server.http.openapi import document

# Requests of each operation that schemathesis makes up, beside those that cover each limit of a parameter.
EXAMPLES = 15
# The names of the parts of a document: OpenAPI 3.1, "Components Object".
NAME = re.compile(r"[a-zA-Z0-9._-]+")


@pytest.fixture
def server(start_server):
    return start_server(LESSON_ADMIN_TOKEN=TOKEN)


@pytest.mark.gen_test
async def test_the_document_is_what_a_server_answers(server):
    assert await read(server, "/openapi.json") == json.loads(json.dumps(document()))


def test_the_document_is_valid():
    schemathesis.openapi.from_dict(document()).validate()
    for parts in document()["components"].values():
        assert all(NAME.fullmatch(name) for name in parts)


def test_every_path_of_the_contract_is_described():
    described = {(path, method) for path, operations in document()["paths"].items() for method in operations}
    assert described == {
        ("/api/overview", "get"),
        ("/api/lessons", "get"),
        ("/api/lessons/{lesson_id}", "get"),
        ("/api/lessons/{lesson_id}/participants/{client_id}", "delete"),
        ("/api/lessons/{lesson_id}/teachers/{user_id}", "delete"),
    }
    names = [operation["operationId"] for path in document()["paths"].values() for operation in path.values()]
    assert len(set(names)) == len(names)


def test_every_field_has_a_type_and_times_are_times():
    for name, schema in document()["components"]["schemas"].items():
        assert schema["description"], name
        assert sorted(schema["required"]) == sorted(schema["properties"])
    node = document()["components"]["schemas"]["NodeStatus"]["properties"]
    assert node["heard_of"] == {"format": "date-time", "title": "Heard Of", "type": "string"}


def test_who_may_ask_is_told_how():
    responses = operation_of("/api/overview", "GET")["responses"]
    assert responses["401"]["headers"]["WWW-Authenticate"]["schema"] == {"type": "string", "const": "Bearer"}
    assert responses["429"]["headers"]["Retry-After"]["schema"] == {"type": "string", "pattern": "^[0-9]+$"}


@pytest.fixture
def node(environ):
    """A server in a process of its own, on which wrong tokens may be tried without end."""
    node = NodeProcess({**environ, "LESSON_ADMIN_TOKEN": TOKEN}, {"http.access.MAX_FAILURES": 10**9})
    yield node
    assert node.close() == []


def test_schemathesis_finds_no_answer_that_the_document_does_not_describe(io_loop, node, mint, tmp_path):
    async def people():
        async with (
            client(node, client="participant", lesson_id="1", access_token=mint("p1")) as participant,
            client(node, client="teacher", lesson_id="1", access_token=mint("t1", "teacher")) as teacher,
        ):
            assert await join(participant) == await join(teacher) == SUCCESS
            return await io_loop.run_in_executor(None, schemathesis_run)

    def schemathesis_run():
        return subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"{node.url}/openapi.json"),
                *("--header", f"Authorization: Bearer {TOKEN}", "--checks", "all", "--max-examples", str(EXAMPLES)),
                *("--phases", "examples,coverage,fuzzing", "--seed", "1", "--no-color", "--warnings", "off"),
                *("--generation-database", "none"),
            ],
            cwd=tmp_path,
            env=unmeasured(),
            capture_output=True,
            text=True,
            timeout=60,
        )

    done = io_loop.run_sync(people, timeout=70)
    assert done.returncode == 0, done.stdout
    assert "Tested: 5" in done.stdout, done.stdout
