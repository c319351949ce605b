"""A server in a process of its own, and one in this process whose workers never start."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
from starlette.testclient import TestClient

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.miniatures import miniature
from cvx_deploy.progress import SilentProgress
from cvx_deploy.serve.api import application
from cvx_deploy.serve.hub import Hub
from cvx_deploy.serve.jobs import JobStore
from cvx_deploy.serve.keys import KeyRing
from cvx_deploy.serve.metrics import Metrics
from cvx_deploy.serve.service import Service
from cvx_deploy.serve.settings import ServeSettings
from cvx_deploy.serve.supervisor import Supervisor

PROGRAM = """
import sys
from pathlib import Path
from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.spec import EngineOptions
from cvx_deploy.miniatures import miniature
from cvx_deploy.progress import RichProgress
from cvx_deploy.serve.server import serve
from cvx_deploy.serve.settings import ServeSettings

data, models, patience = sys.argv[1:]
serve(
    ServeSettings(
        {name: Bundle.open(miniature(name)) for name in models.split(",")},
        Path(data),
        port=0,
        options=EngineOptions(threads=1),
        point_seconds=0,
        patience=float(patience),
    ),
    RichProgress(),
)
"""
PROMPT = "a red circle moves to the right"
PATIENCE = 90.0


class Server:
    """A server that makes videos, saving a point every five steps."""

    def __init__(self, data: Path, models: str = "mini", patience: float = 1800.0) -> None:
        self._words = (sys.executable, "-W", "ignore", "-c", PROGRAM, str(data), models, str(patience))
        self.data = data
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.stop()

    def start(self) -> None:
        """Start it, and wait until it has said where it listens."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        self.process = subprocess.Popen(self._words, stderr=subprocess.PIPE, text=True, env=environment)
        assert self.process.stderr is not None
        line = next(line for line in self.process.stderr if "listening on " in line)
        self.url = line.split()[-1]

    def wait_ready(self) -> None:
        """Wait until a worker has warmed up."""
        until(lambda: httpx.get(f"{self.url}/readyz").status_code == 200)

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self.process.communicate()

    def stop(self) -> tuple[int, str]:
        """End it as a service manager does, and return its exit code and what it said."""
        self.process.send_signal(signal.SIGTERM)
        said = self.process.communicate(timeout=60)[1]
        return self.process.returncode, said


def until(true: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + patience
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return a server of both miniatures; every test leaves it able to work."""
    with Server(tmp_path_factory.mktemp("served"), "mini,mini-i2v") as running:
        running.wait_ready()
        yield running


class Still:
    """An application whose jobs wait for ever, and what it consists of."""

    def __init__(self, data: Path, keys: Path | None = None, **settings: Any) -> None:
        bundles = {name: Bundle.open(miniature(name)) for name in ("mini", "mini-i2v")}
        (data / "videos").mkdir(parents=True, exist_ok=True)
        self.settings = ServeSettings(bundles, data, api_keys=keys, **settings)
        self.store, self.data = JobStore(data / "jobs.sqlite", self.settings.retention), data
        hub = Hub()
        self.supervisor = Supervisor(self.settings, self.store, hub, SilentProgress(), lambda _: None)
        self.service = Service(self.settings, self.store, hub, self.supervisor)
        ring = None if keys is None else KeyRing(keys)
        app = application(self.service, ring, Metrics(self.store, self.supervisor))
        self.client = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


@pytest.fixture
def still(tmp_path: Path) -> Iterator[Still]:
    """Return one without keys."""
    application = Still(tmp_path)
    yield application
    application.store.close()
