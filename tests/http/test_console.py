"""console.py: the pages and their headers."""

import pytest
from event_streams import event_stream
from tornado.httpclient import AsyncHTTPClient

from lesson_server.http.page import HEADERS

TOKEN = "the-admin-token-of-the-tests-0123456789"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def console(start_server):
    return start_server(LESSON_ADMIN_TOKEN=TOKEN)


async def get(server, path, **headers):
    return await AsyncHTTPClient().fetch(
        server.url + path, raise_error=False, follow_redirects=False, headers={**BEARER, **headers}
    )


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/console", 200),
        ("/console/lessons/1", 200),
        ("/console/lessons/%20", 404),
        ("/console/charts/join_lesson/teacher.svg", 200),
        ("/console/charts/join_lesson/nobody.svg", 404),
        ("/console/static/console.js", 200),
        ("/console/static/nothing.js", 404),
        ("/console/static/..?secret", 403),
        ("/", 302),
    ],
)
@pytest.mark.gen_test
async def test_every_page_and_asset_has_the_headers(console, caplog, path, status):
    response = await get(console, path)
    assert response.code == status
    expected = dict(HEADERS)
    if "/static/" in path and status == 200:
        expected["Cache-Control"] = "no-cache"
    assert {name: response.headers[name] for name in HEADERS} == expected
    assert "secret" not in caplog.text


@pytest.mark.gen_test
async def test_without_a_session_pages_lead_to_the_login(console):
    response = await get(console, "/console", Authorization="Bearer wrong")
    assert (response.code, response.headers["Location"]) == (303, "/console/login")


@pytest.mark.gen_test
async def test_it_is_off_without_a_token(server):
    for path in ("/", "/console", "/try", "/console/static/console.js"):
        assert (await get(server, path)).code == 404


@pytest.mark.gen_test
async def test_the_overview_is_sent(console):
    async with event_stream(console.url + "/console/events", BEARER) as stream:
        shown = await stream.until("overview")
        assert [store["name"] for store in shown["stores"]] == ["RDS", "Redis", "Mixpanel"]
        assert (await stream.until("lessons"))["total"] == 0
