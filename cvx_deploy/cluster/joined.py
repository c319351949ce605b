"""A Ray cluster: joined as one of its programs, or started on this machine alone."""

import os
import secrets
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from cvx_deploy.errors import CvxError
from cvx_deploy.terminal import reason

HERE = "here"
"""The address of a cluster that is started on this machine, and ends with this program."""

_PATIENCE = 10.0  # seconds for a host to answer
_TRIES = "2"  # of Ray, to reach the head of a cluster; one takes 47 seconds, and it would make 20


@dataclass(frozen=True)
class Cluster:
    """What a cluster has now.

    Attributes:
        address: Of its head.
        cpus: Of each node that has any.
        gpus: Of all nodes together.
    """

    address: str
    cpus: tuple[int, ...]
    gpus: int

    def workers(self, *, on_gpu: bool, workers: int | None, threads: int | None) -> tuple[int, int]:
        """Return how many workers there are to be, and how many CPUs each takes (0 where it takes a GPU).

        Args:
            on_gpu: Whether a worker takes a GPU.
            workers: How many are asked for; None for as many as have room now.
            threads: Of a worker on CPUs; None for all of the smallest node.

        Raises:
            CvxError: No node has what a worker takes.
        """
        if on_gpu:
            if not self.gpus:
                raise CvxError(f"no node of the Ray cluster {self.address} has a GPU", fix="use --engine onnxruntime")
            return workers or self.gpus, 0
        each = threads or min(self.cpus, default=0)
        room = sum(cpus // each for cpus in self.cpus) if each else 0
        if not room:
            what = f"no node of the Ray cluster {self.address} has {each or 'a'} free CPU{'s' if each > 1 else ''}"
            raise CvxError(what, fix="use fewer --threads, or add nodes that have CPUs")
        return workers or room, each


@contextmanager
def joined(address: str) -> Iterator[Cluster]:
    """Be part of a cluster for the block, in which nothing can be printed on stdout: Ray tells of its nodes there.

    Args:
        address: HOST:PORT of its head, of which this machine has to be a node; or `HERE`.

    Raises:
        CvxError: There is none, or this machine is no node of it.
    """
    if address != HERE:
        _check_reachable(address)
    _settle(address)
    import ray  # after its settings, which it reads as it is imported

    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        _join(address)
        try:
            have = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            cpus = tuple(int(node["CPU"]) for node in have if node.get("CPU", 0) >= 1)
            yield Cluster(address, cpus, sum(int(node.get("GPU", 0)) for node in have))
        finally:
            ray.shutdown()


def _join(address: str) -> None:
    import ray

    handler = signal.getsignal(signal.SIGTERM)  # Ray puts its own there
    own = {"address": "local", "include_dashboard": False}
    try:
        ray.init(**(own if address == HERE else {"address": address}), log_to_driver=False, configure_logging=False)
    except Exception as error:
        raise CvxError(
            f"the Ray cluster {address} cannot be joined: {reason(error)}",
            fix="run this on one of its nodes, with the same Ray and the same RAY_AUTH_TOKEN",
        ) from error
    finally:
        signal.signal(signal.SIGTERM, handler)


def _settle(address: str) -> None:
    """Let Ray tell nobody of itself; a cluster of one's own takes no orders from others."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", _TRIES)
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    if os.environ.get("CVX_DEBUG", "0") in ("", "0"):
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if address == HERE and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)


def _check_reachable(address: str) -> None:
    """Refuse at once what Ray would try to reach for many minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
    except (OSError, ValueError, OverflowError) as error:
        raise CvxError(
            f"no Ray cluster answers at {address}: {reason(error)}",
            fix="start one with ray start (docs/serving.md), and give the HOST:PORT that it prints",
        ) from error
