"""Engines against eager PyTorch, each peer in its own process, watched from this one.

On a CPU peers take turns, round by round. On a GPU, whose memory they would have to share, each has it to itself.
"""

import importlib.util
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cvx_deploy.bench.peers import EagerPeer, EnginePeer, PeerKind, PeerProcess, Work
from cvx_deploy.bench.results import SCHEMA_VERSION, BenchResults, Forecast, Peer, Run
from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.engines.registry import engine_spec
from cvx_deploy.engines.spec import EngineName
from cvx_deploy.engines.tensorrt.store import EngineStore
from cvx_deploy.exporters.reference.checkpoint import Reference, recorded_checkpoint, reference_checkpoint
from cvx_deploy.install import pip_install
from cvx_deploy.measure.baselines import BASELINES, IN_WORDS, Baseline
from cvx_deploy.measure.conditions import conditions
from cvx_deploy.measure.difference import video_difference
from cvx_deploy.measure.memory import GpuMeter, MemoryWatch, Sample, during
from cvx_deploy.measure.thresholds import FORECAST
from cvx_deploy.pipeline.request import RunRequest
from cvx_deploy.pipeline.timing import LOAD, Trace
from cvx_deploy.progress import Advance, Progress

_TOOLS = (
    "cvx-deploy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt-cu13", "tensorrt-rtx-cu13", "torch",
    "torchao", "diffusers", "transformers", "numpy",
)  # fmt: skip
_INTERVAL = 0.01
_IDENTICAL = 150.0  # dB, for a video without any difference

_METHODS = {
    "seconds": "system's monotonic clock, in the peer's own process; its order stands in the conditions",
    "load": "networks that a peer loads within each run, as cvx-deploy run does; taken out of the stages that wait",
    "step": "from the end of a denoising step to the end of the next, so without the first",
    "first frame": "from the prompt to the first decoded frames on the host",
    "host memory, resident": f"psutil, of the peer's process, every {_INTERVAL * 1000:.0f} ms; mapped files count",
    "host memory, private": "resident memory without mapped files, which the system can drop and read again",
    "PSNR": "of the first video, float32 pixels before encoding, against the reference's of the same seed",
}


@dataclass(frozen=True)
class BenchRequest:
    """What is to be measured.

    Attributes:
        bundle: At the shape that is measured.
        engines: What runs it.
        baselines: What it is compared with; those that this machine cannot do are named in the results.
        reference: Which checkpoint PyTorch runs; without one of its own, the bundle's, as long as that is there.
        video: One prompt's video; its output is not used.
        runs: Rounds after the warm-up.
        note: What else used the machine.
        fast: Whether every engine is measured with steps forecast, too.
    """

    bundle: Bundle
    engines: tuple[EngineName, ...]
    baselines: tuple[Baseline, ...]
    reference: Reference
    video: RunRequest
    runs: int
    note: str
    fast: bool = False

    @property
    def needs_gpu(self) -> bool:
        """Whether it is a GPU that is measured; baselines run where the engines do."""
        return any(engine_spec(engine).on_gpu for engine in self.engines)


def bench(request: BenchRequest, progress: Progress) -> BenchResults:
    """Measure a bundle on its engines, and the baselines.

    Raises:
        CvxError: An engine cannot run the bundle, or a peer's process ended.
    """
    bundle, checkpoint = request.bundle, _checkpoint(request, progress)
    baselines, left_out = _baselines(request, checkpoint)
    ways = (False, True) if request.fast else (False,)
    kinds: list[PeerKind] = [*baselines, *(EnginePeer(engine, way) for engine in request.engines for way in ways)]
    work = Work(bundle.path, bundle.shape, checkpoint, request.video)
    told = _conditions(request, gpu := GpuMeter.open() if request.needs_gpu else None)
    with (
        tempfile.TemporaryDirectory() as folder,
        progress.task("measure", len(kinds) * (request.runs + 1)) as advance,
    ):
        take = partial(_measured, work=work, folder=Path(folder), runs=request.runs, gpu=gpu, advance=advance)
        together = [[kind] for kind in kinds] if request.needs_gpu else [kinds]
        measured = [one for group in together for one in take(group, reference=kinds[0].name)]
        forecasts = [_forecast(request, kind, Path(folder)) for kind in kinds]
    peers = [
        _peer(request, kind, one, forecast, checkpoint)
        for kind, one, forecast in zip(kinds, measured, forecasts, strict=True)
    ]
    manifest, methods = (
        bundle.manifest,
        _METHODS | ({"GPU memory": gpu.method, "energy a video": _ENERGY} if gpu else {}),
    )
    return BenchResults(
        SCHEMA_VERSION, manifest.model, manifest.precision, str(bundle.shape), told, methods, kinds[0].name, peers,
        left_out,
    )  # fmt: skip


_IN_ROUNDS = "one run of each peer a round; the peers' processes stay open"
_ONE_BY_ONE = "all runs of a peer, which has the GPU to itself, then those of the next"
_ENERGY = "NVML, of the whole GPU, over the run"


@dataclass
class _Measured:
    """What was measured of a peer.

    Attributes:
        opened: Seconds until it was ready.
        first: Seconds of its first run.
        psnr: How near its first video is to the reference's, in dB; None for the reference itself.
        runs: Of every run after: the trace, memory while it lasted, and the GPU's energy in joules.
    """

    name: str
    opened: float
    first: float
    psnr: float | None
    runs: list[tuple[Trace, list[Sample], float | None]] = field(default_factory=list)


def _measured(
    kinds: Sequence[PeerKind],
    *,
    reference: str,
    work: Work,
    folder: Path,
    runs: int,
    gpu: GpuMeter | None,
    advance: Advance,
) -> list[_Measured]:
    """Measure peers that stay open beside each other, in rounds of one run each.

    `reference` names the peer that all are held against; it is the first of these, or its video lies in `folder`.
    """
    with ExitStack() as stack:
        processes = [stack.enter_context(PeerProcess(kind, work)) for kind in kinds]
        opened = [process.opened() for process in processes]
        found = []
        for process, seconds in zip(processes, opened, strict=True):
            trace = process.make(folder / f"{process.kind.name}.npy")
            near = None if process.kind.name == reference else _psnr(folder, reference, process.kind.name)
            found.append(_Measured(process.kind.name, seconds, trace.end - trace.start, near))
            advance(1)
        for _ in range(runs):
            for process, measured in zip(processes, found, strict=True):
                before = gpu.joules() if gpu else None
                with MemoryWatch(process.pid, _INTERVAL, gpu) as watch:
                    trace = process.make(folder / "video.mp4")
                after = gpu.joules() if gpu else None
                joules = None if before is None or after is None else after - before
                measured.runs.append((trace, watch.samples, joules))
                advance(1)
    return found


def _psnr(folder: Path, reference: str, name: str) -> float:
    """Return how near a first video is to the reference's, in dB."""
    expected, video = (np.load(folder / f"{each}.npy").astype(np.float64) for each in (reference, name))
    error = float(np.mean((expected - video) ** 2))
    return round(min(-10 * float(np.log10(error)), _IDENTICAL) if error else _IDENTICAL, 2)


def _forecast(request: BenchRequest, kind: PeerKind, folder: Path) -> Forecast | None:
    """Hold a first video with steps forecast against that of the same engine's full run."""
    if not isinstance(kind, EnginePeer) or not kind.fast:
        return None
    against = EnginePeer(kind.engine).name
    apart = video_difference(*(np.load(folder / f"{name}.npy") for name in (kind.name, against)))
    limits = FORECAST[request.video.scheduler or request.bundle.manifest.scheduler["kind"]]
    figures = round(apart.psnr, 2), round(apart.ssim, 5), round(apart.flicker, 6)
    return Forecast(against, *figures, broken=list(apart.beyond(limits)))


def _peer(
    request: BenchRequest, kind: PeerKind, measured: _Measured, forecast: Forecast | None, checkpoint: Path | None
) -> Peer:
    trace, samples, _ = measured.runs[-1]
    build, sizes = _built(request.bundle, kind.engine if isinstance(kind, EnginePeer) else kind.name, checkpoint)
    return Peer(
        name=measured.name,
        what=_words(request, kind),
        open_seconds=round(measured.opened, 3),
        runs=[_run(*one) for one in measured.runs],
        memory=[
            (round(sample.moment - trace.start, 3), sample.resident, sample.private, sample.gpu or 0)
            for sample in _thinned(samples)
        ],
        stage_ends={span.stage: round(span.end - trace.start, 3) for span in trace.spans if span.stage != LOAD},
        psnr=measured.psnr,
        build_seconds=build,
        sizes=sizes,
        first_seconds=round(measured.first, 4),
        forecast=forecast,
    )


def _run(trace: Trace, samples: list[Sample], joules: float | None) -> Run:
    within: dict[str, list[Sample]] = {}
    for span in trace.spans:
        if span.stage != LOAD:
            within.setdefault(span.stage, []).extend(during(samples, span.start, span.end))
    return Run(
        seconds=round(trace.end - trace.start, 4),
        stages={stage: round(seconds, 4) for stage, seconds in trace.stages.items()},
        steps=[round(seconds, 5) for seconds in trace.step_seconds],
        first_frame=round(trace.first_frame, 4),
        resident={stage: max(sample.resident for sample in seen) for stage, seen in within.items()},
        private={stage: max(sample.private for sample in seen) for stage, seen in within.items()},
        gpu={
            stage: max(sample.gpu or 0 for sample in seen)
            for stage, seen in within.items()
            if any(sample.gpu is not None for sample in seen)
        },
        joules=joules,
    )


def _thinned(samples: list[Sample], most: int = 300) -> list[Sample]:
    return samples[:: max(len(samples) // most, 1)]


def _words(request: BenchRequest, kind: PeerKind) -> str:
    precision = request.bundle.manifest.precision
    what = IN_WORDS.get(kind.name, "the bundle, its networks loaded once and kept")
    what += ", half of the steps forecast" if isinstance(kind, EnginePeer) and kind.fast else ""
    return f"{precision}: {what}"


def _built(bundle: Bundle, name: str, checkpoint: Path | None) -> tuple[dict[str, float], dict[str, int]]:
    """Return what a peer's engines took to build, and what lies on disk for it."""
    weights = {"weights": sum(entry.size for entry in bundle.manifest.weights.values())}
    if name not in BASELINES:
        graphs = sum(network.file.size for network in bundle.manifest.networks.values())
        records = [record for record in EngineStore(bundle).records() if record.key.kind == name]
        if records:
            engines = {"engines": sum(record.file.size for record in records)}
            return {record.network: round(record.seconds, 1) for record in records}, {"graphs": graphs} | engines
        return {}, {"graphs": graphs} | weights
    return {}, {"checkpoint": sum(file.stat().st_size for file in (checkpoint or Path()).glob("*/*.safetensors"))}


def _checkpoint(request: BenchRequest, progress: Progress) -> Path | None:
    """Return where the checkpoint lies, fetched if it has to be; None where the one of the bundle is not there."""
    bundle, reference = request.bundle, request.reference
    if reference == Reference() and not recorded_checkpoint(bundle).is_dir():
        return None
    return reference_checkpoint(bundle, reference, progress).root


def _baselines(request: BenchRequest, checkpoint: Path | None) -> tuple[list[EagerPeer], dict[str, str]]:
    """Return the baselines that can be measured, and why the others cannot."""
    reasons = {way: _obstacle(request, way, checkpoint) for way in request.baselines}
    possible = [EagerPeer(way, request.needs_gpu) for way, reason in reasons.items() if reason is None]
    return possible, {way: reason for way, reason in reasons.items() if reason is not None}


def _obstacle(request: BenchRequest, way: Baseline, checkpoint: Path | None) -> str | None:
    manifest = request.bundle.manifest
    if any(importlib.util.find_spec(name) is None for name in ("torch", "diffusers")):
        return f"PyTorch and diffusers are not installed: {pip_install('export')}"
    if checkpoint is None:
        return f"there is no checkpoint at {manifest.checkpoint}: name it with --checkpoint"
    if manifest.loras or manifest.transformer is not None:
        return "the bundle holds a LoRA or a transformer of its own, which the checkpoint does not"
    if way != "eager" and not request.needs_gpu:
        return "measured beside engines for GPUs only"
    if request.needs_gpu and not _torch_has_cuda():
        return "this PyTorch finds no CUDA GPU"
    if way in ("int8", "fp8") and importlib.util.find_spec("torchao") is None:
        return "torchao is not installed: pip install torchao"
    return None


def _torch_has_cuda() -> bool:
    from cvx_deploy.exporters.reference.baseline import has_cuda

    return has_cuda()


def _conditions(request: BenchRequest, gpu: GpuMeter | None) -> dict[str, Any]:
    video = {
        key: value
        for key, value in asdict(request.video).items()
        if key in ("prompts", "negative_prompt", "steps", "guidance_scale", "seed", "strength")
    }
    return conditions(
        _TOOLS,
        request.note,
        gpu=f"{gpu.name}, driver {gpu.driver}" if gpu else "none measured",
        time=time.strftime("%H:%M:%S %z"),
        video=video,
        image=request.video.image is not None,
        threads="each library's own choice",
        warm_up_runs=1,
        runs=request.runs,
        interleaved=not request.needs_gpu,
        order=_ONE_BY_ONE if request.needs_gpu else _IN_ROUNDS,
    )
