"""The results of a benchmark: what is written to ``bench.json``, and what can be read from it again."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from cvx_deploy.errors import CvxError
from cvx_deploy.files import staged_file
from cvx_deploy.pipeline.timing import LOAD
from cvx_deploy.reading import read_whole, reading

SCHEMA_VERSION = 1
_ORDER = ("text encoder", "vae encode", "modulation", "transformer", "vae decode", "write video", LOAD)


@dataclass(frozen=True)
class Run:
    """One video that was made and measured.

    Attributes:
        seconds: From the prompt to the written file.
        stages: Seconds of each stage; ``load`` is the sum of what networks took to load within the others.
        steps: Seconds from the end of each denoising step to that of the next.
        first_frame: Seconds to the first decoded frames.
        resident: Most bytes of host memory in each stage, mapped files included; `private` without them.
        gpu: Most bytes of GPU memory in each stage; empty without a GPU.
        joules: What the GPU used; None where it does not say.
    """

    seconds: float
    stages: dict[str, float]
    steps: list[float]
    first_frame: float
    resident: dict[str, int]
    private: dict[str, int]
    gpu: dict[str, int]
    joules: float | None


@dataclass(frozen=True)
class Forecast:
    """What forecasting steps does to a peer's first video: no parity, but how far it is from its engine's own full run.

    Attributes:
        against: The peer that runs all steps.
        psnr: In dB; `ssim` and `flicker` as in `cvx_deploy.measure.difference`.
        broken: Which of the limits for such videos it breaks.
    """

    against: str
    psnr: float
    ssim: float
    flicker: float
    broken: list[str]


@dataclass(frozen=True)
class Peer:
    """What one way of making the video took.

    Attributes:
        name: Such as onnxruntime, or eager.
        what: What it is, in words.
        open_seconds: From a process that runs to one that is ready for its first video.
        runs: The measured ones, after one that was not.
        memory: Of the last run: seconds since its start, bytes resident, private, and on the GPU (0 without one).
        stage_ends: Of the last run: when each stage was over, in seconds since its start.
        psnr: Of its video against the reference's, in dB; None for the reference.
        build_seconds: What each of its engines took to build; empty where nothing is built.
        sizes: Bytes on disk of what it runs from.
        first_seconds: Its first video, with what is loaded for it; None in results of earlier versions.
        forecast: Where it forecasts steps, what that does.
    """

    name: str
    what: str
    open_seconds: float
    runs: list[Run]
    memory: list[tuple[float, int, int, int]]
    stage_ends: dict[str, float]
    psnr: float | None
    build_seconds: dict[str, float]
    sizes: dict[str, int]
    first_seconds: float | None = None
    forecast: Forecast | None = None

    @property
    def cold_seconds(self) -> float | None:
        """From a process that runs to its first video: everything that is opened and loaded, once."""
        return None if self.first_seconds is None else self.open_seconds + self.first_seconds

    def median(self, values: "Values") -> float | None:
        """Return the median of a figure over the runs; None where there is none."""
        found = values(self)
        return statistics.median(found) if found else None


Values = Callable[[Peer], list[float]]
"""One figure of each of a peer's runs; empty where it has not been measured."""


@dataclass(frozen=True)
class BenchResults:
    """Everything a benchmark found.

    Attributes:
        model: The bundle's model, `precision` and `shape` likewise.
        reference: The peer that the others' speed and pixels are compared with.
        not_measured: Peers that were left out, and why.
        methods: How each kind of figure was taken.
    """

    schema_version: int
    model: str
    precision: str
    shape: str
    conditions: dict[str, Any]
    methods: dict[str, str]
    reference: str
    peers: list[Peer]
    not_measured: dict[str, str]

    def peer(self, name: str) -> Peer | None:
        """Return a peer by its name."""
        return next((peer for peer in self.peers if peer.name == name), None)

    def speedup(self, peer: Peer) -> tuple[float, float, float]:
        """Return the reference's seconds over a peer's in the same round: median, least and most."""
        reference = self.peer(self.reference) or peer
        pairs = zip(reference.runs, peer.runs, strict=True)
        ratios = [theirs.seconds / its.seconds for theirs, its in pairs]
        return statistics.median(ratios), min(ratios), max(ratios)

    def to_json(self) -> bytes:
        """Return the text of ``bench.json``."""
        return msgspec.json.format(msgspec.json.encode(asdict(self)), indent=1) + b"\n"


@dataclass(frozen=True)
class Metric:
    """A figure that peers are compared by.

    Attributes:
        unit: seconds, bytes, joules or dB.
        better: Which way is better.
    """

    name: str
    unit: Literal["seconds", "bytes", "joules", "dB"]
    values: Values
    better: Literal["less", "more"] = "less"


def stage_names(peers: list[Peer]) -> list[str]:
    """Return the stages that took time in some peers' runs, in the order of a run; those without a name here last."""
    found = {stage for peer in peers for run in peer.runs for stage, seconds in run.stages.items() if seconds}
    return sorted(found, key=lambda stage: (_ORDER.index(stage) if stage in _ORDER else len(_ORDER), stage))


def metrics(peers: list[Peer]) -> Iterator[Metric]:
    """Yield every figure that some peers can be compared by."""
    yield Metric("a video", "seconds", lambda peer: [run.seconds for run in peer.runs])
    for stage in stage_names(peers):
        yield Metric(stage, "seconds", _of_stage(stage))
    yield Metric("first frame", "seconds", lambda peer: [run.first_frame for run in peer.runs])
    yield Metric("step, p50", "seconds", step_seconds(50))
    yield Metric("step, p95", "seconds", step_seconds(95))
    yield Metric("open", "seconds", lambda peer: [peer.open_seconds])
    yield Metric("build", "seconds", lambda peer: [sum(peer.build_seconds.values())] if peer.build_seconds else [])
    yield Metric("host memory, resident", "bytes", resident_peak)
    yield Metric("host memory, private", "bytes", private_peak)
    yield Metric("GPU memory", "bytes", gpu_peak)
    yield Metric("energy a video", "joules", joules)
    yield Metric("on disk", "bytes", lambda peer: [float(sum(peer.sizes.values()))])
    yield Metric("PSNR", "dB", lambda peer: [] if peer.psnr is None else [peer.psnr], better="more")


def _of_stage(stage: str) -> Values:
    return lambda peer: [run.stages[stage] for run in peer.runs if stage in run.stages]


def step_seconds(percent: int) -> Values:
    """Return what takes a percentile of the step times from each run."""
    return lambda peer: [percentile(run.steps, percent) for run in peer.runs if run.steps]


def resident_peak(peer: Peer) -> list[float]:
    """Return the most resident host memory of each run."""
    return [float(max(run.resident.values())) for run in peer.runs]


def private_peak(peer: Peer) -> list[float]:
    """Return the most private host memory of each run."""
    return [float(max(run.private.values())) for run in peer.runs]


def gpu_peak(peer: Peer) -> list[float]:
    """Return the most GPU memory of each run."""
    return [float(max(run.gpu.values())) for run in peer.runs if run.gpu]


def joules(peer: Peer) -> list[float]:
    """Return the energy of each run."""
    return [run.joules for run in peer.runs if run.joules is not None]


def write_results(results: BenchResults, path: Path) -> None:
    """Write results; they appear when they are whole."""
    with staged_file(path) as temporary:
        temporary.write_bytes(results.to_json())


def read_results(path: Path) -> BenchResults:
    """Read what `write_results` wrote.

    Raises:
        CvxError: The file is not there, or not of a benchmark, or of another version of its schema.
    """
    again = "run cvx-deploy bench again with this version of cvx-deploy"
    if not path.exists():
        raise CvxError(f"{path} is not there", fix="name a bench.json that cvx-deploy bench wrote")
    text = read_whole(path, CvxError, fix=again)
    with reading(path, CvxError, fix=again):
        found = msgspec.json.decode(text, type=dict[str, Any])
        if found.get("schema_version") != SCHEMA_VERSION:
            version = found.get("schema_version")
            raise CvxError(f"{path} has schema version {version}, and this program reads {SCHEMA_VERSION}", fix=again)
        return msgspec.convert(found, BenchResults)


def percentile(values: Sequence[float], percent: int) -> float:
    """Return a percentile by linear interpolation; of one value, that value."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
