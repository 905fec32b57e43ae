"""Stores that can be cut off, and nodes in processes of their own."""

import re
from collections import deque

import pytest
import redis
from cluster import QUICK_NODES, NodeProcess, Proxy
from redis_cluster import Cluster

from lesson_server.server import LessonServer
from lesson_server.settings.sources import load
from lesson_server.stores.redis import nodes


@pytest.fixture
def quick_nodes(monkeypatch):
    """The nodes of this process live as fast as those of :class:`NodeProcess`."""
    for name, value in QUICK_NODES.items():
        monkeypatch.setattr(nodes, name.removeprefix("stores.redis.nodes."), value)


@pytest.fixture
def client(stores):
    """The connection to Redis of the explorer."""
    with redis.Redis.from_url(stores.redis_url, decode_responses=True, single_connection_client=True) as client:
        yield client


@pytest.fixture
def proxy_to():
    """Proxies to unix sockets."""
    proxies = []

    def proxy_to(path):
        proxies.append(Proxy(path))
        return proxies[-1]

    yield proxy_to
    for proxy in proxies:
        proxy.close()


@pytest.fixture
def redis_proxy(proxy_to, stores):
    return proxy_to(stores.redis_url.removeprefix("unix://"))


@pytest.fixture
def rds_proxy(proxy_to, stores):
    return proxy_to(re.search(r"host=(\S+)", stores.dsn)[1] + "/.s.PGSQL.5432")


@pytest.fixture
def fragile(environ, redis_proxy, rds_proxy):
    """The environment of a node that reaches both stores through proxies."""
    dsn = f"host=127.0.0.1 port={rds_proxy.port} user=postgres dbname=lessons sslmode=disable gssencmode=disable"
    return {**environ, "LESSON_REDIS_URL": f"redis://127.0.0.1:{redis_proxy.port}", "LESSON_RDS_DSN": dsn}


@pytest.fixture
def server(io_loop, fragile, redis_proxy, rds_proxy):
    """A node in this process, whose stores can be hurt; they are well again when it stops."""
    server = LessonServer(load(environ=fragile))
    io_loop.run_sync(server.start)
    yield server
    redis_proxy.restore()
    rds_proxy.restore()
    io_loop.run_sync(server.stop)


@pytest.fixture
def start_node():
    """Starts nodes in processes of their own; several of them start at the same time."""
    started = []

    def start_node(environ, times=QUICK_NODES, **more):
        started.append(NodeProcess({**environ, **more}, times))
        return started[-1]

    yield start_node
    assert [drift for node in started for drift in node.close()] == []


# Clusters that are started before the tests that need them. A master serves nothing in its first two seconds, and most
# tests take one.
STARTED_BEFORE = 2


@pytest.fixture(scope="module")
def next_clusters():
    """Clusters that have been started, and have not been used."""
    clusters = deque()
    yield clusters
    for cluster in clusters:
        cluster.valkeys.kill_all()


@pytest.fixture
def cluster(next_clusters, tmp_path_factory):
    while len(next_clusters) <= STARTED_BEFORE:
        next_clusters.append(Cluster(tmp_path_factory.mktemp("cluster")))
    cluster = next_clusters.popleft()
    cluster.wait_until_it_serves()
    yield cluster
    cluster.valkeys.kill_all()
