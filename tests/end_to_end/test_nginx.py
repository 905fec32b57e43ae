"""conf/nginx.conf, run by a real nginx in front of two nodes."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
from collections import Counter

import aiohttp
import pytest
import socketio
from clients import SUCCESS, TRANSPORTS, join
from cluster import ROOT, free_port, wait_until
from lesson_client import stay_in_lesson
from tornado.httpclient import AsyncHTTPClient
from waiting import until

from lesson_server.protocol import engine_socket, limits

CONF = (ROOT / "conf/nginx.conf").read_text()
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/bin")
AUTH = {"client": "participant", "lesson_id": "1"}

# ip_hash looks at three of the four bytes. Each of these schools is somewhere else.
SCHOOLS = [f"127.0.{number}.1" for number in range(1, 9)]


def seconds(directive):
    return int(re.search(rf"^\s*{directive} (\d+)s;", CONF, re.MULTILINE)[1])


def test_its_numbers_are_those_of_the_server():
    silence = engine_socket.PING_INTERVAL + engine_socket.PING_TIMEOUT
    assert seconds("proxy_read_timeout") > silence
    assert seconds("proxy_send_timeout") > silence
    assert f"client_max_body_size {limits.MAX_MESSAGE_SIZE // 1024}k;" in CONF


def localised(nodes, port, directory):
    """The file with the addresses of a test, and without TLS; nothing else is changed."""
    replaced = [
        (r"listen 80;", f"listen 127.0.0.1:{free_port()};"),
        (r"listen 443 ssl;", f"listen 127.0.0.1:{port};"),
        (r"\n *ssl_certificate.*", ""),
        (r"server 10\.0\.0\.11:8080", f"server {nodes[0].url.removeprefix('http://')}"),
        (r"server 10\.0\.0\.12:8080", f"server {nodes[1].url.removeprefix('http://')}"),
        (r"/run/nginx.pid", str(directory / "nginx.pid")),
        (r"/var/log/nginx", str(directory)),
        (r"worker_processes auto;", "worker_processes 1;"),
    ]
    text = CONF
    for pattern, replacement in replaced:
        text, count = re.subn(pattern, replacement, text)
        assert count, pattern
    temporary = "".join(
        f"{kind}_temp_path {directory}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return text.replace("http {\n", f"http {{\n{temporary}", 1)


TOKEN = "the admin token of the tests"


@pytest.fixture
def nodes(start_server):
    return start_server(LESSON_ADMIN_TOKEN=TOKEN), start_server(LESSON_ADMIN_TOKEN=TOKEN)


@pytest.fixture
def front(nodes, tmp_path):
    """The URL of an nginx in front of both nodes."""
    if NGINX is None:
        pytest.skip("nginx is not installed (apt-get install nginx)")
    tmp_path.chmod(0o755)
    port = free_port()
    conf = tmp_path / "nginx.conf"
    conf.write_text(localised(nodes, port, tmp_path))
    command = [NGINX, "-p", tmp_path, "-c", conf]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    process = subprocess.Popen([*command, "-g", "daemon off;"], stderr=subprocess.DEVNULL)
    wait_until(lambda: accepts(port), "nginx's start")
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()


def accepts(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@contextlib.asynccontextmanager
async def client_from(address, url, transports=("websocket",), auth=AUTH):
    """A client that comes from another address."""
    connector = aiohttp.TCPConnector(local_addr=(address, 0))
    async with aiohttp.ClientSession(connector=connector) as session:
        sio = socketio.AsyncClient(reconnection=False, http_session=session)
        await sio.connect(url, transports=list(transports), auth=auth)
        try:
            yield sio
        finally:
            await sio.disconnect()
            await sio.shutdown()


def homes(nodes, clients):
    """Which node each client is connected to."""
    return [[sio.get_sid() in node.gateway.connections for node in nodes].index(True) for sio in clients]


@TRANSPORTS
@pytest.mark.gen_test
async def test_every_transport_reaches_its_node_and_schools_are_spread(front, nodes, transports):
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(client_from(school, front, transports)) for school in SCHOOLS]
        for sio in clients:
            assert await join(sio) == SUCCESS
        assert set(homes(nodes, clients)) == {0, 1}
        received = []
        for sio in clients:
            sio.on("news", received.append)
        await nodes[0]._protocol.sio.emit("news", "all of them", room="1")
        await until(lambda: received == ["all of them"] * len(clients))


@pytest.mark.gen_test
async def test_a_node_that_drains_gets_no_new_clients_and_nobody_is_turned_away(front, nodes):
    async with client_from(SCHOOLS[0], front) as sio:
        home = homes(nodes, [sio])[0]
        await nodes[home].drain()
        for transports in (["polling"], ["websocket"], ["polling", "websocket"]):
            async with client_from(SCHOOLS[0], front, transports) as newcomer:
                assert homes(nodes, [newcomer]) == [1 - home]
                assert await join(newcomer) == SUCCESS


# docs/operating/upgrade.md
@pytest.mark.gen_test
async def test_in_an_upgrade_everybody_is_disconnected_once(front, nodes, new_nodes, tmp_path, monkeypatch):
    monkeypatch.setattr("lesson_client.random.uniform", lambda least, most: 0)
    joins = Counter()
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(client_that_stays(school, front, joins)) for school in SCHOOLS]
        await until(lambda: len(joins) == len(SCHOOLS))
        assert set(homes(nodes, clients)) == {0, 1}

        (tmp_path / "nginx.conf").write_text(localised(new_nodes, front.rpartition(":")[2], tmp_path))
        os.kill(int((tmp_path / "nginx.pid").read_text()), signal.SIGHUP)
        await reaches(front, new_nodes)
        assert joins == dict.fromkeys(SCHOOLS, 1)  # the reload has disconnected nobody
        await asyncio.gather(*(node.drain() for node in nodes))

        await until(lambda: joins == dict.fromkeys(SCHOOLS, 2))
        assert set(homes(new_nodes, clients)) == {0, 1}


@contextlib.asynccontextmanager
async def client_that_stays(address, url, joins):
    """The client of the guide: when it is disconnected, it joins again."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(local_addr=(address, 0))) as session:
        sio = socketio.AsyncClient(reconnection=False, http_session=session)

        async def auth():
            return AUTH

        async def on_joined():
            joins[address] += 1

        staying = asyncio.create_task(stay_in_lesson(sio, url, auth, on_joined))
        try:
            yield sio
        finally:
            staying.cancel()
            await asyncio.wait({staying})


@pytest.fixture
def new_nodes(start_server):
    return start_server(), start_server()


async def reaches(url, nodes):
    """Waits until new clients come to one of these nodes."""
    while True:
        async with client_from(SCHOOLS[0], url) as sio:
            if any(sio.get_sid() in node.gateway.connections for node in nodes):
                return


@pytest.mark.gen_test
async def test_a_node_that_is_gone_is_passed_over(front, nodes):
    await nodes[0].stop()
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(client_from(school, front, ["polling"])) for school in SCHOOLS]
        assert [await join(sio) for sio in clients] == [SUCCESS] * len(SCHOOLS)


@pytest.mark.parametrize("path", ["/metrics", "/readyz", "/healthz", "/", "/socket.io"])
def test_nothing_but_socketio_is_public(io_loop, front, path):
    async def story():
        answer = await AsyncHTTPClient().fetch(front + path, raise_error=False, follow_redirects=False)
        assert answer.code in (404, 301)
        assert b"lesson_" not in answer.body

    io_loop.run_sync(story)


@pytest.mark.gen_test
async def test_no_sid_is_logged_even_when_the_nodes_are_gone(front, nodes, tmp_path):
    access_log, error_log = tmp_path / "access.log", tmp_path / "error.log"
    async with client_from(SCHOOLS[0], front, ["polling"]) as sio:
        assert await join(sio) == SUCCESS
        sid = sio.eio.sid
    for node in nodes:
        await node.stop()
    url = f"{front}/socket.io/?EIO=4&transport=polling&sid={sid}"
    assert (await AsyncHTTPClient().fetch(url, raise_error=False)).code == 502
    await until(lambda: "/socket.io/ 502" in access_log.read_text())
    assert sid not in access_log.read_text()
    assert sid not in error_log.read_text()


@pytest.mark.gen_test
async def test_the_console_and_the_roster_are_for_the_schools_own_network(front):
    ask = AsyncHTTPClient().fetch
    answer = await ask(f"{front}/api/overview", headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.code == 200
    assert (await ask(f"{front}/asyncapi.json")).code == 200
    form = await ask(
        f"{front}/console/login",
        method="POST",
        body=f"token={TOKEN.replace(' ', '+')}",
        headers={"Origin": front},
        follow_redirects=False,
        raise_error=False,
    )
    assert form.code == 303
    assert "HttpOnly" in form.headers["Set-Cookie"]
    assert "deny all;" in CONF
