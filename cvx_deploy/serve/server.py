"""The server as a whole: its folder, its queue, its workers and its socket, from the first to the last moment."""

import asyncio
import fcntl
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from cvx_deploy.errors import CvxError, OutputError
from cvx_deploy.files import open_lock
from cvx_deploy.progress import Progress
from cvx_deploy.serve.api import application
from cvx_deploy.serve.hub import Hub
from cvx_deploy.serve.jobs import JobStore
from cvx_deploy.serve.keys import KeyRing
from cvx_deploy.serve.metrics import Metrics
from cvx_deploy.serve.process import Employed
from cvx_deploy.serve.service import Service, sweep, sweep_orphans
from cvx_deploy.serve.settings import ServeSettings
from cvx_deploy.serve.supervisor import Supervisor

_SWEEP = 30.0  # seconds between two looks for what has expired
_GRACE = 3  # seconds that open connections have when the server goes down
_MOST_CONNECTIONS = 512
_WAITING = 512  # connections that wait to be taken


def serve(settings: ServeSettings, progress: Progress, hire: Callable[[int], Employed] | None = None) -> dict[str, Any]:
    """Serve until a signal ends it; return how many jobs there are in each state then.

    Args:
        settings: What and how.
        progress: Told what goes on.
        hire: See `Supervisor`.

    Raises:
        CvxError: The folder, the port or the keys cannot be used, or the workers cannot come up.
    """
    keys = None if settings.api_keys is None else KeyRing(settings.api_keys)
    new = not settings.data.exists()
    with _listening(settings.host, settings.port) as listener, _alone(settings.data):
        store = JobStore(settings.data / "jobs.sqlite", settings.retention)
        sweep_orphans(store, settings.data)
        if waiting := store.recover():
            progress.note(f"note: {waiting} jobs that were being made when the server ended go on")
        hub, failures = Hub(), list[CvxError]()

        def broken(error: CvxError) -> None:
            failures.append(error)
            server.should_exit = True

        supervisor = Supervisor(settings, store, hub, progress, broken, hire)
        service = Service(settings, store, hub, supervisor)
        app = application(service, keys, Metrics(store, supervisor))
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_GRACE,
            limit_concurrency=_MOST_CONNECTIONS,
            lifespan="off",
            ws="none",
        )
        server = _Server(config, supervisor)
        host, port = listener.getsockname()[:2]
        progress.note(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}")
        done = threading.Event()
        sweeper = threading.Thread(target=_sweeping, args=(service, done), daemon=True)
        try:
            supervisor.start()
            sweeper.start()
            server.run(sockets=[listener])
        finally:
            done.set()
            supervisor.wait_ended()
            sweeper.join()
            counts = store.counts()
            store.close()
        if failures:
            if new and not any(counts.values()):
                shutil.rmtree(settings.data, ignore_errors=True)
            raise failures[0]
        return counts


class _Server(uvicorn.Server):
    """Tells the workers first when it goes down, so that streams of events end, and waits for them at last.

    After that the signal that ended it is raised again, which nothing here may survive.
    """

    def __init__(self, config: uvicorn.Config, supervisor: Supervisor) -> None:
        super().__init__(config)
        self._supervisor = supervisor

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See the class."""
        self._supervisor.end()
        await super().shutdown(sockets)
        await asyncio.to_thread(self._supervisor.wait_ended)


def _sweeping(service: Service, done: threading.Event) -> None:
    while not done.is_set():
        sweep(service)
        done.wait(_SWEEP)


@contextmanager
def _alone(data: Path) -> Iterator[None]:
    """Hold a data folder, which one server at a time may have."""
    try:
        (data / "videos").mkdir(parents=True, exist_ok=True)
        lock = open_lock(data / "server.lock")
    except OSError as error:
        raise OutputError(f"{data} cannot be written: {error.strerror}", fix="choose another --data folder") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise OutputError(f"another server has {data}", fix="end it, or choose another --data folder") from error
    finally:
        os.close(lock)


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Open the socket before anything takes long."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise CvxError(f"--host {host} is no address here: {error.strerror}", fix="use 127.0.0.1 or 0.0.0.0") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(_WAITING)  # from here on nobody is turned away
        except OSError as error:
            raise CvxError(
                f"port {port} of {host} cannot be had: {error.strerror}", fix="choose another --port"
            ) from error
        yield listener
