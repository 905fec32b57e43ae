"""conf/compose/nginx.conf: run by a real nginx in front of two nodes, and compared with conf/nginx.conf."""

import asyncio
import re
import shutil
import socket
import subprocess

import aiohttp
import pytest
import socketio
from clients import SUCCESS, TRANSPORTS, join
from cluster import free_port, wait_until
from deployments import CONF
from tornado.httpclient import AsyncHTTPClient

TEXT = (CONF / "compose/nginx.conf").read_text("utf-8")
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/bin")
TOKEN = "the admin token of the tests"


# Compared


def blocks(text):
    """Location or upstream → its directives, in their order, without comments."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)
    found = re.findall(r"^ *((?:location|upstream) [^{]*\S) \{\n((?:[^{}]*\n)?) *\}$", text, re.MULTILINE)
    return {name: [line.strip() for line in lines.splitlines()] for name, lines in found if "return" not in lines}


def test_what_both_files_have_is_the_same():
    ours, theirs = blocks(TEXT), blocks((CONF / "nginx.conf").read_text("utf-8"))
    sockets, console = "location /socket.io/", r"location ~ ^/(console|api)(/|$)|^/(openapi|asyncapi)\.json$"
    assert set(ours) == set(theirs) == {sockets, console, "upstream lesson_server"}
    assert [line.replace("stderr", "/var/log/nginx/error.log") for line in ours[sockets]] == theirs[sockets]
    assert [line.replace("$forwarded_proto", "$scheme") for line in ours[console]] == [
        line for line in theirs[console] if not line.startswith(("allow ", "deny "))
    ]
    assert [re.sub(r"server \S+", "server", line) for line in ours["upstream lesson_server"]] == [
        re.sub(r"server \S+", "server", line) for line in theirs["upstream lesson_server"]
    ]


# Run


@pytest.fixture
def nodes(start_server):
    return start_server(LESSON_ADMIN_TOKEN=TOKEN), start_server(LESSON_ADMIN_TOKEN=TOKEN)


@pytest.fixture
def ports(nodes, tmp_path):
    """Port of the file → port of an nginx with that file and the addresses of a test."""
    if NGINX is None:
        pytest.skip("nginx is not installed (apt-get install nginx)")
    ports = {8080: free_port(), 8081: free_port(), 8082: free_port()}
    replaced = [
        *((rf"listen (?:127\.0\.0\.1:)?{port};", f"listen 127.0.0.1:{free};") for port, free in ports.items()),
        (r"server server-1:8080", f"server {nodes[0].url.removeprefix('http://')}"),
        (r"server server-2:8080", f"server {nodes[1].url.removeprefix('http://')}"),
        (r"(?<= )/tmp/", f"{tmp_path}/"),
        (r"set_real_ip_from 172.29.77.1;", "set_real_ip_from 127.0.0.1;"),
        (r"/dev/stdout", str(tmp_path / "access.log")),
        (r"worker_processes 2;", "worker_processes 1;"),
    ]
    text = TEXT
    for pattern, replacement in replaced:
        text, count = re.subn(pattern, replacement, text)
        assert count, pattern
    tmp_path.chmod(0o755)
    file = tmp_path / "nginx.conf"
    file.write_text(text)
    command = [NGINX, "-p", tmp_path, "-c", file]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    process = subprocess.Popen([*command, "-g", "daemon off;"], stderr=subprocess.DEVNULL)
    wait_until(lambda: accepts(ports[8082]), "nginx's start")
    yield ports
    process.terminate()
    process.wait()


def accepts(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def status(port, path, **headers):
    url = f"http://127.0.0.1:{port}{path}"
    answer = await AsyncHTTPClient().fetch(url, headers=headers, raise_error=False, follow_redirects=False)
    return answer.code


@TRANSPORTS
@pytest.mark.gen_test
async def test_clients_join_with_every_transport(ports, transports):
    sio = socketio.AsyncClient(reconnection=False)
    auth = {"client": "participant", "lesson_id": "1"}
    await sio.connect(f"http://127.0.0.1:{ports[8080]}", transports=transports, auth=auth)
    try:
        assert await join(sio) == SUCCESS
    finally:
        await sio.disconnect()
        await sio.shutdown()


@pytest.mark.gen_test
async def test_clients_behind_what_terminates_tls_are_spread(ports, nodes):
    for number in range(1, 9):
        async with aiohttp.ClientSession(headers={"X-Forwarded-For": f"10.0.{number}.1"}) as session:
            sio = socketio.AsyncClient(reconnection=False, http_session=session)
            auth = {"client": "participant", "lesson_id": "1"}
            await sio.connect(f"http://127.0.0.1:{ports[8080]}", transports=["polling"], auth=auth)
            assert await join(sio) == SUCCESS
            await sio.shutdown()
    joined = [sum(node._metrics.outcomes().values()) for node in nodes]
    assert sum(joined) == 8
    assert all(joined)


@pytest.mark.gen_test
async def test_each_port_has_its_own_pages(ports):
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    assert await status(ports[8081], "/api/overview", **bearer) == 200
    assert await status(ports[8081], "/console") == 303
    for path in ("/api/overview", "/console", "/metrics", "/healthz", "/readyz", "/"):
        assert await status(ports[8080], path, **bearer) == 404
    for path in ("/socket.io/", "/metrics", "/healthz", "/readyz"):
        assert await status(ports[8081], path, **bearer) == 404
    assert await status(ports[8082], "/") == 200


@pytest.mark.gen_test
async def test_the_cookie_is_secure_behind_what_terminates_tls(ports):
    async def cookie(**headers):
        url = f"http://127.0.0.1:{ports[8081]}"
        answer = await AsyncHTTPClient().fetch(
            f"{url}/console/login",
            method="POST",
            body=f"token={TOKEN.replace(' ', '+')}",
            headers={"Origin": url, **headers},
            raise_error=False,
            follow_redirects=False,
        )
        return answer.headers["Set-Cookie"]

    plain, encrypted = await asyncio.gather(cookie(), cookie(**{"X-Forwarded-Proto": "https"}))
    assert "Secure" not in plain
    assert "Secure" in encrypted
