"""``lesson-server run``: one process, or the parent of several workers."""

import argparse
import asyncio
import contextlib
import gc
import os
import resource
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass

import uvloop
from pydantic import SecretStr

from lesson_server.cli.failures import EXIT_FAILED, log_failure, print_failure, status_of
from lesson_server.cli.log_format import configure_log
from lesson_server.cli.shared_folder import SharedFolder
from lesson_server.cli.workers import SIGNALS, Supervisor
from lesson_server.embedded.stores import EmbeddedStores
from lesson_server.log import EventLogger
from lesson_server.protocol.worker import Worker, make_inboxes
from lesson_server.settings.schema import Settings

logger = EventLogger(__name__)

# Net allocations before the garbage collector scans the youngest generation. Python's default is 700.
GC_THRESHOLD = 50_000


def run(settings: Settings, args: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        SystemExit: the server has failed, and the reason has been logged or printed.
    """
    configure_log(settings.server.log_format)
    status = _status_of(settings, lambda: _run(settings))
    if status:
        raise SystemExit(status)


def _status_of(settings: Settings, work: Callable[[], None]) -> int:
    """Do the work and return the exit status; with JSON, the line of a failure is JSON, too."""
    try:
        return status_of(work, log_failure if settings.server.log_format == "json" else print_failure)
    except Exception:
        logger.exception("server_failed", "the server failed")
        return EXIT_FAILED


def _run(settings: Settings) -> None:
    # Until the event loop handles signals, SIGTERM raises KeyboardInterrupt like SIGINT, so that no store is left over.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings.require_complete()
    _raise_file_limit()
    with contextlib.suppress(KeyboardInterrupt):
        if not settings.embedded:
            _serve(settings)
            return
        with EmbeddedStores(settings.server.data_dir) as stores:
            _say(f"no stores are configured: starting our own PostgreSQL and Valkey in {settings.server.data_dir}")
            stores.start(_say)
            _say(f"PostgreSQL: {stores.dsn}")
            _say(f"Redis: {stores.redis_url}")
            _serve(_with_stores(settings, stores), is_embedded=True)


def _raise_file_limit() -> None:
    """Raise the limit of open files: each connection is an open file, and the usual limit is 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _serve(settings: Settings, *, is_embedded: bool = False) -> None:
    if settings.server.workers == 1:
        uvloop.run(_serve_until_signal(settings, is_embedded))
        return
    metrics = SharedFolder("lesson-server-metrics-", ".db")
    try:
        status = _supervise(settings, is_embedded, metrics)
    finally:
        metrics.leave()
    if status:
        raise SystemExit(status)  # the worker has printed the reason


def _supervise(settings: Settings, is_embedded: bool, metrics: SharedFolder) -> int:
    """Run the workers as child processes.

    Returns:
        0, or the exit status of a worker that could not start.
    """
    # Set before the import of prometheus_client: the workers then share their metrics there, and each exports the sums.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(metrics.path)
    from prometheus_client import values
    from prometheus_client.multiprocess import mark_process_dead

    from lesson_server.server import open_port, url_of

    sockets = open_port(settings)
    inboxes = make_inboxes(settings.server.workers)

    def serve(number: int, ready: Callable[[], object], parent_gone: int) -> int:
        # A worker goes on with the files of the one that it replaces. With files named by pid, each death would leave
        # files that every scrape reads.
        values.ValueClass = values.MultiProcessValue(lambda: number)  # type: ignore[no-untyped-call]
        worker_start = _WorkerStart(Worker(number, inboxes), sockets, ready, parent_gone)
        try:
            return _status_of(settings, lambda: uvloop.run(_serve_until_signal(settings, is_embedded, worker_start)))
        finally:
            metrics.leave()  # the last process removes the folder, and the parent may have been killed

    supervisor = Supervisor(settings.server.workers, serve, mark_process_dead)
    return supervisor.run(lambda: _say_url(settings, url_of(settings, sockets), is_embedded))


@dataclass(frozen=True)
class _WorkerStart:
    """What a worker gets from its parent.

    Attributes:
        worker: the worker's number, and the inboxes of all workers.
        sockets: the listening sockets.
        ready: called by the worker once it serves.
        parent_gone: a file descriptor that becomes readable once the parent has ended.
    """

    worker: Worker
    sockets: list[socket.socket]
    ready: Callable[[], object]
    parent_gone: int


async def _serve_until_signal(settings: Settings, is_embedded: bool, worker_start: _WorkerStart | None = None) -> None:
    """Serve until the first signal, then drain; a second signal stops the server at once.

    Args:
        settings: with the stores and the key.
        is_embedded: whether the stores are those of the embedded set-up.
        worker_start: set for one of several workers; None for a single process.
    """
    from lesson_server.server import LessonServer

    loop = asyncio.get_running_loop()
    signals: asyncio.Queue[None] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, None)
    if worker_start is not None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a signal that arrived before is handled now
        loop.add_reader(worker_start.parent_gone, _stop_as_orphan, worker_start.parent_gone, signals)
    server = LessonServer(settings, worker_start.worker if worker_start else None, is_embedded=is_embedded)
    try:
        await server.start(worker_start.sockets if worker_start else None)
        _tune_garbage_collector()
        if worker_start is None:
            _say_url(settings, server.url, is_embedded)
        else:
            worker_start.ready()
        await signals.get()
        drain = asyncio.create_task(server.drain())
        second = asyncio.create_task(signals.get())
        await asyncio.wait({drain, second}, return_when=asyncio.FIRST_COMPLETED)
        drain.cancel()
        second.cancel()
    finally:
        await server.stop()


def _tune_garbage_collector() -> None:
    """Let the garbage collector skip the objects of the start, and run less often.

    The objects of the start stay alive, so that scanning them is useless. A join allocates a thousand objects, and
    reference counting has freed nearly all of these by the end of the join.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)


def _stop_as_orphan(parent_gone: int, signals: asyncio.Queue[None]) -> None:
    """Stop a worker whose parent was killed: no other process would stop it."""
    asyncio.get_running_loop().remove_reader(parent_gone)
    signals.put_nowait(None)


def _with_stores(settings: Settings, stores: EmbeddedStores) -> Settings:
    """Return the settings with the embedded stores, and with the generated key if the operator set none."""
    return settings.model_copy(
        update={
            "rds": settings.rds.model_copy(update={"dsn": SecretStr(stores.dsn)}),
            "redis": settings.redis.model_copy(update={"url": SecretStr(stores.redis_url)}),
            "auth": settings.auth.model_copy(update={"key": settings.auth.key or SecretStr(stores.key)}),
        }
    )


def _say_url(settings: Settings, url: str, is_embedded: bool) -> None:
    from lesson_server.http.access import is_loopback

    _say(f"lesson-server listening on {url}")
    if settings.admin.token is not None or (is_embedded and is_loopback(settings.server.host)):
        _say(f"console: {url}/console")


def _say(line: str) -> None:
    print(line, flush=True)
