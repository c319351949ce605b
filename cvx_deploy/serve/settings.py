"""What a server is started with, checked once."""

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.registry import engine_spec
from cvx_deploy.engines.spec import EngineName, EngineOptions
from cvx_deploy.errors import CvxError, EngineError


@dataclass(frozen=True)
class Limits:
    """What a client may ask for at most.

    Attributes:
        prompt: Characters of a prompt, or of a negative prompt.
        body: Bytes of a request.
        image_pixels: Pixels of an image, or of one frame of a clip, that is sent.
        steps: Denoising steps.
        frames: Frames of a long video, which is made by chaining.
        queue: Jobs that wait, of all keys.
        jobs_per_key: Jobs of one key that wait or run.
    """

    prompt: int = 4_000
    body: int = 32 << 20
    image_pixels: int = 1 << 25
    steps: int = 500
    frames: int = 1_000
    queue: int = 1_000
    jobs_per_key: int = 100


@dataclass(frozen=True)
class ServeSettings:
    """A server.

    Attributes:
        models: Bundles by the names that clients use; the first is the default.
        data: The folder of the queue and the videos.
        engine: What runs the bundles, and `options` how.
        devices: One worker each: a GPU's number, or for an engine on CPUs the number of the worker.
        host: Where it listens, and `port`; 0 takes a free one.
        api_keys: The file of those who may come in; None lets everybody in.
        open_to_all: Whether it is meant that everybody comes in who can reach a host beyond loopback.
        retention: Seconds that an ended job is kept.
        disk: Bytes that all videos may have; the oldest ended jobs go first. None for no bound.
        patience: Seconds without a sign of life after which a worker is taken to hang.
        point_seconds: Seconds between two saved points of a job, at the least.
        limits: What a client may ask for.
        elsewhere: Whether the workers run on other machines, so that what this one can run says nothing.
    """

    models: dict[str, Bundle]
    data: Path
    engine: EngineName = "onnxruntime"
    options: EngineOptions = field(default_factory=EngineOptions)
    devices: tuple[int, ...] = (0,)
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: Path | None = None
    open_to_all: bool = False
    retention: float = 24 * 3600.0
    disk: int | None = None
    patience: float = 1800.0
    point_seconds: float = 1.0
    limits: Limits = field(default_factory=Limits)
    elsewhere: bool = False

    def __post_init__(self) -> None:
        if self.api_keys is None and not self.open_to_all and not is_loopback(self.host):
            raise CvxError(
                f"--host {self.host} can be reached from other machines, and no key is asked for",
                fix="add --api-keys FILE (see --new-key), or --no-auth if everybody may come in",
            )
        if self.api_keys is not None and self.open_to_all:
            raise CvxError("--no-auth beside --api-keys means nothing", fix="leave one of them out")
        spec = engine_spec(self.engine)
        spec.check(self.options)
        if self.elsewhere:
            return
        spec.version()
        for name, bundle in self.models.items():
            obstacle = spec.obstacle(bundle.manifest)
            if obstacle:
                raise EngineError(
                    f"{self.engine} cannot run {name} here: {obstacle}", fix="choose another --engine or model"
                )

    def for_worker(self, slot: int) -> dict[str, Any]:
        """Return what the worker of a slot is told, as JSON has it."""
        threads = self.options.threads
        on_gpu = engine_spec(self.engine).on_gpu
        if "threads" in engine_spec(self.engine).takes and threads is None:
            threads = max((os.cpu_count() or 1) // len(self.devices), 1)
        return {
            "models": {name: str(bundle.path.absolute()) for name, bundle in self.models.items()},
            "engine": self.engine,
            "threads": threads,
            "device": self.devices[slot] if on_gpu else None,
            "vram": self.options.vram,
            "cuda_graphs": self.options.cuda_graphs,
            "lock": str((self.data / f"worker-{slot}.lock").absolute()),
            "point_seconds": self.point_seconds,
        }


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
