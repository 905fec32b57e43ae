"""connections.py against a real PostgreSQL that is stopped, cut off and started again; what joins see of it."""

import asyncio
import os
import re
import resource
import signal
import threading
from contextlib import closing

import pytest
from cluster import Postgres, Proxy

from lesson_server.errors import LessonNotFound, StoreUnavailable
from lesson_server.settings.schema import RdsSettings, SettingsError
from lesson_server.stores import availability
from lesson_server.stores.rds.connections import Rds, parse_dsn
from lesson_server.stores.rds.lesson import Lesson
from lesson_server.stores.rds.lesson_admin import list_lessons
from lesson_server.stores.rds.lesson_query import LessonQuery
from lesson_server.stores.rds.lessons import Lessons

QUERY = RdsSettings().lesson_query
SLOW = "SELECT seat_count FROM lessons, pg_sleep(60) WHERE id = %(lesson_id)s"
# Seconds: short ones, for these tests wait for it. PostgreSQL answers in one.
TIMEOUT = 0.5


@pytest.fixture
def lessons(open_lessons):
    return open_lessons()


@pytest.fixture
def proxy(stores):
    with closing(Proxy(re.search(r"host=(\S+)", stores.dsn)[1] + "/.s.PGSQL.5432")) as proxy:
        yield proxy


@pytest.fixture
def dsn_of_proxy(proxy):
    return f"host=127.0.0.1 port={proxy.port} user=postgres dbname=lessons sslmode=disable gssencmode=disable"


@pytest.fixture
def through_proxy(open_lessons, proxy, dsn_of_proxy):
    yield open_lessons(timeout=TIMEOUT, dsn=dsn_of_proxy)
    proxy.restore()


@pytest.fixture
def quick_probes(monkeypatch):
    """An RDS that is known not to answer is asked again sooner."""
    monkeypatch.setattr(availability, "PROBE_INTERVAL", 0.05)


@pytest.fixture(scope="module")
def own_rds(tmp_path_factory):
    with closing(Postgres(tmp_path_factory.mktemp("rds"))) as postgres:
        yield postgres


def is_known(lessons):
    """Whether RDS is known not to answer."""
    try:
        lessons._rds.availability.require()
    except StoreUnavailable:
        return True
    return False


async def becomes_known(lessons):
    with pytest.raises(StoreUnavailable):
        await lessons.get("1")
    while not is_known(lessons):
        await asyncio.sleep(0.01)
    for request in (lessons.get("1"), lessons.ping()):
        with pytest.raises(StoreUnavailable):
            request.send(None)  # it waits for nothing


async def recovers(lessons):
    while is_known(lessons):
        await asyncio.sleep(0.01)
    assert await lessons.get("1") == Lesson("1", 30)
    await lessons.ping()


def test_joins_wait_for_no_more_than_the_contract_s_times():
    """Issue 8, A7: 0.5 s while RDS is known not to answer, 2 s after its return."""
    assert availability.FIRST_PROBE_TIMEOUT < 0.5
    assert availability.PROBE_TIMEOUT + availability.PROBE_INTERVAL < 2


@pytest.mark.usefixtures("quick_probes")
@pytest.mark.parametrize("fault", ["hang", "refuse"])
def test_a_join_costs_no_time_while_rds_is_known_not_to_answer(io_loop, through_proxy, proxy, fault, caplog):
    async def story():
        assert await through_proxy.get("1") == Lesson("1", 30)
        getattr(proxy, fault)()
        await becomes_known(through_proxy)
        assert not through_proxy._slow_lessons  # it was RDS that was slow
        proxy.restore()
        await recovers(through_proxy)

    io_loop.run_sync(story, timeout=20)
    assert [line.partition(":")[0] for line in caplog.messages] == ["RDS is unavailable", "RDS is available again"]


@pytest.mark.parametrize("fault", ["hang", "refuse"])
def test_readiness_asks_rds_and_waits_no_longer_than_a_join(io_loop, through_proxy, proxy, fault):
    async def story():
        await through_proxy.ping()
        getattr(proxy, fault)()
        assert not is_known(through_proxy)
        with pytest.raises(StoreUnavailable) as caught:
            await through_proxy.ping()
        assert re.match(r"RDS: \w", caught.value.cause)

    io_loop.run_sync(story, timeout=20)


@pytest.mark.usefixtures("quick_probes")
def test_a_stopped_rds_is_known_not_to_answer_and_is_used_again_when_it_goes_on(io_loop, own_rds, open_lessons):
    lessons = open_lessons(dsn=own_rds.dsn, timeout=TIMEOUT)

    async def story():
        own_rds.hang()
        try:
            await becomes_known(lessons)
        finally:
            own_rds.restore()
        await recovers(lessons)

    io_loop.run_sync(story, timeout=20)


@pytest.mark.usefixtures("quick_probes")
def test_a_restarted_rds_is_used_again(io_loop, own_rds, open_lessons):
    lessons = open_lessons(dsn=own_rds.dsn, timeout=TIMEOUT)

    async def story():
        await asyncio.to_thread(own_rds.close)
        await becomes_known(lessons)
        await asyncio.to_thread(own_rds.start)
        await recovers(lessons)

    io_loop.run_sync(story, timeout=20)


def test_joins_that_wait_when_rds_is_found_not_to_answer_are_failed_at_once(io_loop, through_proxy, proxy, monkeypatch):
    async def story():
        proxy.hang()
        with pytest.raises(StoreUnavailable):
            await through_proxy.get("1")
        # The probe is under way. This join's own timeout won't come.
        monkeypatch.setattr(through_proxy._rds, "_timeout", 3600.0)
        assert not is_known(through_proxy)
        with pytest.raises(StoreUnavailable):
            await through_proxy.get("2")
        assert is_known(through_proxy)
        assert not through_proxy._lookups._lookups

    io_loop.run_sync(story, timeout=20)


@pytest.mark.usefixtures("quick_probes")
def test_connections_that_hang_are_not_used_again(io_loop, open_lessons, sql):
    """As behind a router that has forgotten them: only new ones get an answer."""
    sql.execute("SELECT pid FROM pg_stat_activity WHERE datname = 'lessons' AND pid <> pg_backend_pid()")
    others = set(sql.fetchall())
    lessons = open_lessons(timeout=TIMEOUT, pool_size=3)
    sql.execute("SELECT pid FROM pg_stat_activity WHERE datname = 'lessons' AND pid <> pg_backend_pid()")
    processes = [pid for (pid,) in set(sql.fetchall()) - others]
    assert len(processes) == 4  # of these, one is for probes

    async def story():
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        try:
            await becomes_known(lessons)
            await recovers(lessons)
            assert await asyncio.gather(*[lessons.get("1") for _ in range(3)]) == [Lesson("1", 30)] * 3
        finally:
            for process in processes:
                os.kill(process, signal.SIGCONT)

    io_loop.run_sync(story, timeout=20)


def test_one_connection_that_hangs_costs_one_join_and_no_outage(io_loop, open_lessons, sql, caplog):
    lessons = open_lessons(timeout=TIMEOUT, pool_size=3)
    sleeping = lessons._rds._for_lookups._idle
    processes = [connection.raw.get_backend_pid() for connection in sleeping]

    async def story():
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        try:
            with pytest.raises(StoreUnavailable):
                await lessons.get("1")
            assert await lessons.get("1") == Lesson("1", 30)
        finally:
            for process in processes:
                os.kill(process, signal.SIGCONT)

    io_loop.run_sync(story, timeout=20)
    assert "RDS is unavailable" not in caplog.text


def test_connections_that_rds_has_closed_are_replaced_unnoticed(io_loop, lessons, sql, caplog):
    """As after a restart or a failover of RDS."""
    sql.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = 'lessons'"
    )
    assert io_loop.run_sync(lambda: lessons.get("1")) == Lesson("1", 30)
    io_loop.run_sync(lessons.ping)
    assert caplog.text == ""


def test_a_connection_is_used_again_also_after_an_error(io_loop, open_lessons, sql):
    lessons = open_lessons("SELECT 12 / (length(%(lesson_id)s) - 3)", pool_size=1)
    (connection,) = lessons._rds._for_lookups._idle
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            io_loop.run_sync(lambda: lessons.get("bad"))
        assert lessons._rds._for_lookups._idle == [connection]


# A query that takes too long


def test_a_slow_query_ends_on_the_server_too(io_loop, open_lessons, sql):
    lessons = open_lessons(SLOW, timeout=0.3)
    with pytest.raises(StoreUnavailable):
        io_loop.run_sync(lambda: lessons.get("1"))
    for _ in range(200):
        sql.execute(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE query LIKE '%pg_sleep(60)%' AND pid <> pg_backend_pid() AND state = 'active'"
        )
        if sql.fetchone() == (0,):
            return
        io_loop.run_sync(lambda: asyncio.sleep(0.05))
    pytest.fail("the query goes on on the server")


def test_a_statement_that_the_server_cancels_is_unavailable_and_not_a_cancellation(io_loop, open_lessons, monkeypatch):
    """aiopg raises CancelledError for it, which would end the join's task without an answer."""
    lessons = open_lessons(SLOW, timeout=0.2)
    monkeypatch.setattr(lessons._rds, "_timeout", 3600.0)  # the server gives up first
    with pytest.raises(StoreUnavailable) as caught:
        io_loop.run_sync(lambda: lessons.get("1"), timeout=20)
    assert "cancelled" in caught.value.cause


@pytest.fixture
def many_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    yield
    for descriptor in taken:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_broken_statement_is_unavailable_also_above_descriptor_1023(io_loop, many_files, open_lessons):
    """aiopg's error path calls select(), which can't take such a descriptor; the query would hang."""
    lessons = open_lessons()
    lessons._query = LessonQuery("SELECT nonsense WHERE %(lesson_id)s = ''")
    with pytest.raises(StoreUnavailable) as caught:
        io_loop.run_sync(lambda: lessons.get("1"), timeout=20)
    assert "nonsense" in caught.value.cause
    lessons._query = LessonQuery(QUERY)
    assert io_loop.run_sync(lambda: lessons.get("1")) == Lesson("1", 30)


# The start


def test_open_says_in_one_line_why_it_can_not(io_loop, tmp_path):
    lessons = Lessons(f"postgresql://someone:sesame@/lessons?host={tmp_path}", QUERY, 1.0, 1)
    with pytest.raises(StoreUnavailable) as caught:
        io_loop.run_sync(lessons.open)
    assert str(tmp_path) in caught.value.cause
    assert "\n" not in caught.value.cause
    assert "sesame" not in caught.value.cause


@pytest.mark.parametrize("fault", ["hang", "refuse"])
def test_open_waits_no_longer_than_a_join(io_loop, proxy, dsn_of_proxy, fault):
    getattr(proxy, fault)()
    rds = Rds(dsn_of_proxy, TIMEOUT, 1, lambda: None)
    with pytest.raises(StoreUnavailable):
        io_loop.run_sync(rds.open, timeout=20)
    io_loop.run_sync(rds.close)


def test_open_asks_for_nothing_but_connections(io_loop, stores, sql):
    """aiopg would ask each of them for the number of a type that nobody uses."""
    rds = Rds(stores.dsn, 3.0, 1, lambda: None)
    io_loop.run_sync(rds.open)
    (connection,) = rds._for_lookups._idle
    sql.execute("SELECT query FROM pg_stat_activity WHERE pid = %s", (connection.raw.get_backend_pid(),))
    io_loop.run_sync(rds.close)
    assert sql.fetchone() == ("",)


def test_the_log_tells_of_a_fault_of_the_query_and_not_of_each_join(io_loop, lessons, caplog):
    lessons._query = LessonQuery("SELECT broken WHERE %(lesson_id)s = ''")
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            io_loop.run_sync(lambda: lessons.get("1"))
        io_loop.run_sync(lambda: lessons._rds.availability._probing)
    (line,) = caplog.messages
    assert line.startswith('RDS answers, but a request failed: column "broken" does not exist')


def test_when_it_is_closed_no_connection_and_no_probe_is_left(io_loop, proxy, dsn_of_proxy):
    rds = Rds(dsn_of_proxy, TIMEOUT, 2, lambda: None)
    io_loop.run_sync(rds.open)
    connections = [*rds._for_lookups._idle, *rds._for_probes._idle]
    assert len(connections) == 3

    async def close():
        proxy.hang()
        rds.availability.failed("timeout")
        probing = rds.availability._probing
        await asyncio.sleep(0)
        await rds.close()
        assert probing.done()

    io_loop.run_sync(close)
    assert all(connection.closed for connection in connections)


def test_no_thread_is_left(io_loop, lessons):
    io_loop.run_sync(lambda: lessons.get("1"))
    assert threading.active_count() == 1


@pytest.mark.parametrize(
    "dsn",
    [
        "postgres//someone:sesame@127.0.0.1/school",
        "postgresql://someone:ses/ame@127.0.0.1/school",
        "host=127.0.0.1 port=sesame",
    ],
)
def test_a_malformed_dsn_is_named_and_not_quoted(dsn):
    for use in (lambda: Rds(dsn, 3.0, 1, lambda: None), lambda: list_lessons(dsn)):
        with pytest.raises(SettingsError) as caught:
            use()
        assert str(caught.value) == "rds.dsn (LESSON_RDS_DSN): should be a libpq connection string or URI"


def test_a_dsn_may_name_several_hosts_each_with_its_port():
    parts = parse_dsn("postgresql://someone@first:5432,second:5433/school")
    assert (parts["host"], parts["port"]) == ("first,second", "5432,5433")


def test_the_options_of_the_dsn_are_kept(io_loop, open_lessons, stores, sql):
    sql.execute("CREATE SCHEMA elsewhere; CREATE TABLE elsewhere.here AS SELECT '1' AS id, 4 AS seats")
    try:
        lessons = open_lessons(
            "SELECT seats FROM here WHERE id = %(lesson_id)s", dsn=stores.dsn + " options='-c search_path=elsewhere'"
        )
        assert io_loop.run_sync(lambda: lessons.get("1")) == Lesson("1", 4)
        with pytest.raises(LessonNotFound):
            io_loop.run_sync(lambda: lessons.get("2"))
    finally:
        sql.execute("DROP SCHEMA elsewhere CASCADE")
