"""The parity ladder, climbed: from diffusers in float32 to what the engine runs, each rung held against the first."""

import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.schema import Network
from cvx_deploy.engines.backend import Backend
from cvx_deploy.engines.observe import ObservedBackend
from cvx_deploy.engines.registry import engine_spec, open_backend
from cvx_deploy.engines.spec import EngineName
from cvx_deploy.errors import CvxError
from cvx_deploy.measure.conditions import conditions
from cvx_deploy.measure.difference import difference, drift, video_difference
from cvx_deploy.measure.thresholds import THRESHOLDS, Thresholds, coarsest, row_of
from cvx_deploy.parity.cases import CASES, Arrays, Case, Expected, roles, run_cases
from cvx_deploy.parity.divergence import Layer, Open, Side, first_layers, first_modules
from cvx_deploy.parity.forecast import forecast_result
from cvx_deploy.parity.graph_runner import GraphRunner, graph_runner, last_engine
from cvx_deploy.parity.ladder import (
    Divergence,
    ForecastResult,
    Level,
    NetworkResult,
    Parity,
    Rung,
    RungName,
    TrajectoryResult,
    VideoResult,
)
from cvx_deploy.parity.recorder import Recorder
from cvx_deploy.parity.reduction import Fault, Reduction, reduced
from cvx_deploy.parity.wishes import GUIDANCE, remake_of, wish_of
from cvx_deploy.pipeline.request import RunRequest
from cvx_deploy.pipeline.run import run
from cvx_deploy.precision import Precision
from cvx_deploy.progress import Progress
from cvx_deploy.quantize.recipe import COMPONENTS, NetworkPrecision, Recipe
from cvx_deploy.shape import Shape

if TYPE_CHECKING:
    from cvx_deploy.exporters.reference.eager import EagerRequest, EagerVideo
    from cvx_deploy.exporters.sources.checkpoint import Checkpoint

PROMPT = "a red circle moves to the right"
_ONCE = ("text_encoder", "modulation")  # the same at every shape
_PACKAGES = ("cvx-deploy", "torch", "diffusers", "transformers", "onnxruntime", "openvino", "numpy")
_LEVELS: dict[Level, int] = {"networks": 0, "trajectory": 1, "video": 2}

Frames = NDArray[np.float32]
Show = Callable[[Shape, Frames, Frames], None]


@dataclass(frozen=True)
class CheckRequest:
    """What to check.

    Attributes:
        engine: What the last rung runs on, whether it can or not; None for what does on a CPU, if anything.
        level: Networks alone, latents step by step too, or whole videos too.
        steps: Denoising steps of the run that networks' inputs are taken from.
        shapes: Which of the bundle's; all when there are none.
        reduce: A folder for the smallest pieces of networks that the first failing rung refuses or runs wrong.
        fast: Whether a video with steps forecast is held against the full run, too, in the bundle's own steps.
    """

    engine: EngineName | None = None
    level: Level = "video"
    prompt: str = PROMPT
    steps: int = 4
    seed: int = 0
    shapes: tuple[Shape, ...] = ()
    reduce: Path | None = None
    fast: bool = False


def check(
    bundle: Bundle, checkpoint: "Checkpoint", request: CheckRequest, progress: Progress, show: Show = lambda *_: None
) -> Parity:
    """Hold a bundle against its checkpoint's networks as diffusers runs them.

    Args:
        bundle: What is checked.
        checkpoint: What it should agree with.
        request: How far to look.
        progress: Told what goes on.
        show: Given each shape's video as diffusers makes it, then as the engine does.

    Raises:
        CvxError: The checkpoint, or the engine, cannot be used; what is wrong with the bundle stands in the result.
    """
    with tempfile.TemporaryDirectory(prefix="cvx-check-") as folder:
        return _Climb(bundle, checkpoint, request, progress, Path(folder)).parity(show)


class _Climb:
    """One check in progress."""

    def __init__(
        self, bundle: Bundle, checkpoint: "Checkpoint", request: CheckRequest, progress: Progress, folder: Path
    ) -> None:
        from cvx_deploy.exporters.reference.checkpoint import require_adapters, with_adapters
        from cvx_deploy.exporters.reference.eager import own_precision

        self.bundle, self.request, self.progress, self.folder = bundle, request, progress, folder
        self.shapes = request.shapes or bundle.shapes
        self.own: Precision = own_precision(checkpoint)
        self.engine, self.no_engine = last_engine(request.engine, bundle.manifest)
        require_adapters(bundle)
        self.graphs = self._graphs(checkpoint)
        self.runners = {name: graph_runner(self.engine, graph.manifest) for name, graph in self.graphs.items()}
        self.checkpoint = with_adapters(checkpoint, self.graphs["onnx"])
        self.rungs = self._rungs()
        self.suspects: dict[tuple[RungName, str], tuple[Bundle, str, Case]] = {}
        self.refused: dict[tuple[RungName, str], tuple[Bundle, str, Case, str]] = {}

    @property
    def _last_graphs(self) -> RungName:
        """The last rung of ONNX graphs: those are the bundle's own."""
        return list(self.graphs)[-1]

    def _graphs(self, checkpoint: "Checkpoint") -> dict[RungName, Bundle]:
        """Return the bundles that the rungs of ONNX graphs run."""
        graphs: dict[RungName, Bundle] = {
            "onnx": self._export(checkpoint, "straight", rewrites=()),
            "rewritten": self.bundle,
        }
        if _is_quantized(self.bundle):
            graphs |= {"rewritten": self._export(checkpoint, "rewritten", rewrites=None), "quantized": self.bundle}
        return graphs

    def _export(self, checkpoint: "Checkpoint", name: str, rewrites: tuple[str, ...] | None) -> Bundle:
        from cvx_deploy.exporters.export import ExportRequest, bundle_from_checkpoint

        manifest = self.bundle.manifest
        request = ExportRequest(
            manifest.model,
            checkpoint.root,
            shapes=tuple(self.shapes),
            precision=_unquantized(self.bundle),
            transformer=checkpoint.transformer,
            loras=tuple((Path(lora.path), lora.scale) for lora in manifest.loras),
            variant=checkpoint.variant,
            rewrites=rewrites,
        )
        return bundle_from_checkpoint(request, self.folder / name, self.progress)

    def _rungs(self) -> dict[RungName, Rung]:
        eager = f"PyTorch {version('torch')}, diffusers {version('diffusers')}"
        rungs = [Rung("eager", "fp32", eager), Rung("own-type", None, f"{eager}, {self.own}")]
        if self.own == "fp32":
            rungs[1].skipped = "the checkpoint is stored in float32"
        for name, graph in self.graphs.items():
            rungs.append(Rung(name, _row_of_all(graph, self.runners[name].engine), str(self.runners[name])))
        if self.engine is None:
            instead = f"the rung {self._last_graphs} stands in for it, on {self.runners[self._last_graphs]}"
            rungs.append(Rung("engine", None, "nothing", skipped=f"{self.no_engine}; {instead}"))
        else:
            told = f"{self.engine} {engine_spec(self.engine).version()}"
            rungs.append(Rung("engine", _row_of_all(self.bundle, self.engine), told))
            if GraphRunner(self.engine) == self.runners[self._last_graphs]:
                rungs[-1].notes.append(f"its networks are those of the rung {self._last_graphs}")
        return {rung.name: rung for rung in rungs}

    def parity(self, show: Show) -> Parity:
        """Climb every rung at every shape."""
        start, expected = time.perf_counter(), Expected()
        for shape in self.shapes:
            self._check_shape(shape, expected, show)
        told = _conditions(self.request) | {"seconds": round(time.perf_counter() - start, 1)}
        found = Parity(
            str(self.bundle.path),
            str(self.checkpoint.root),
            self.engine or "none",
            self.request.level,
            self.bundle.manifest.precision,
            told,
            tuple(self.rungs.values()),
        )
        forecasts = tuple(map(self._forecast, self.shapes if self.request.fast else ()))
        found = replace(found, divergence=tuple(self._divergence(found.first_failing)), forecasts=forecasts)
        return replace(found, reduced=tuple(self._reductions(found.first_failing)))

    def _forecast(self, shape: Shape) -> ForecastResult:
        """Hold a video with steps forecast against the full run of what the last rung runs on."""
        view, defaults = self.bundle.at(shape), self.bundle.manifest.defaults
        wish = wish_of(self.bundle, shape, self.request, self.folder)
        request = RunRequest(
            (wish.prompt,),
            image=wish.image,
            steps=defaults.steps,
            guidance_scale=defaults.guidance_scale,
            seed=wish.seed,
        )
        opened = self._opener(self._last_graphs if self.engine is None else "engine")(view)
        return forecast_result(opened, request, self.folder, self.progress)

    def _check_shape(self, shape: Shape, expected: Expected, show: Show) -> None:
        from cvx_deploy.exporters.reference.eager import eager_video

        view, wish = self.bundle.at(shape), wish_of(self.bundle, shape, self.request, self.folder)
        with self.progress.task(f"diffusers in fp32 at {shape}"):
            video = eager_video(view, self.checkpoint, "fp32", wish)
        with self.progress.task(f"compare networks at {shape}", len(roles(view))) as advance:
            for role in roles(view):
                if role not in _ONCE or role not in expected:
                    cases = list(CASES[role](view, video, expected))
                    expected[role] = self._check_network(view, role, cases)
                advance(1)
        if _LEVELS[self.request.level]:
            if not self.rungs["own-type"].skipped:
                with self.progress.task(f"diffusers in {self.own} at {shape}"):
                    own = eager_video(view, self.checkpoint, self.own, wish)
                made = (*own.hidden_states, own.latents)
                self._hold(self.rungs["own-type"], str(shape), made, own.frames, video)
            self._check_run(view, str(shape), wish, video, show)
            if self.bundle.manifest.traits.task == "text-to-video" and view.has("vae_encoder"):
                self._check_remade(view, video)

    def _check_remade(self, view: Bundle, video: "EagerVideo") -> None:
        """Make a video from a video too, where the bundle can; diffusers cuts it into chunks as it does."""
        from cvx_deploy.exporters.reference.eager import eager_video

        wish = remake_of(view.shape, self.request, self.folder)
        with self.progress.task(f"diffusers in fp32 at {view.shape}, from a video"):
            expected = eager_video(view, self.checkpoint, "fp32", wish, video)
        self._check_run(view, f"{view.shape}, from a video", wish, expected, lambda *_: None)

    def _openers(self) -> Iterator[tuple[Rung, Open, Bundle]]:
        """Yield what runs the networks of each rung but the first."""
        from cvx_deploy.exporters.reference.eager import EagerBackend

        def eager(view: Bundle) -> AbstractContextManager[Backend]:
            return contextlib.nullcontext(EagerBackend(view, self.checkpoint, self.own))

        if not self.rungs["own-type"].skipped:
            yield self.rungs["own-type"], eager, self.bundle
        for name, bundle in self.graphs.items():
            yield self.rungs[name], self._opener(name), bundle
        if self.engine is not None and GraphRunner(self.engine) != self.runners[self._last_graphs]:
            yield self.rungs["engine"], self._opener("engine"), self.bundle

    def _opener(self, rung: RungName) -> Open:
        """Return what opens a bundle on what a rung runs on."""

        def engine(view: Bundle) -> AbstractContextManager[Backend]:
            assert self.engine is not None
            return open_backend(self.engine, view, progress=self.progress)

        def graph(view: Bundle) -> AbstractContextManager[Backend]:
            return self.runners[rung].open(view, self.progress)

        return engine if rung == "engine" else graph

    def _check_network(self, view: Bundle, role: str, cases: list[Case]) -> list[tuple[Case, Arrays]]:
        """Run a network on every rung, and return what it should put out."""
        from cvx_deploy.exporters.reference.eager import EagerBackend

        reference = EagerBackend(view, self.checkpoint, "fp32")
        expected = list(run_cases(reference, role, cases))
        for case, outputs in expected:
            if not all(np.isfinite(array).all() for array in outputs.values()):
                self._judge(self.rungs["eager"], view, role, case, outputs, outputs)
        for rung, open_, bundle in self._openers():
            there = bundle.at(view.shape)
            failed: list[tuple[Case, CvxError]] = []
            for (case, outputs), found in zip(expected, _tried(open_, there, role, cases), strict=True):
                if isinstance(found, CvxError):
                    failed.append((case, found))
                else:
                    self._judge(rung, there, role, case, found, outputs)
            self._did_not_run(rung, view, role, failed, some_ran=len(failed) < len(cases))
        return expected

    def _judge(self, rung: Rung, view: Bundle, role: str, case: Case, found: Arrays, expected: Arrays) -> None:
        """Add what was found of one run of a network to a rung."""
        every = [difference(name, found[name], array) for name, array in expected.items() if name in found]
        worst = max(every, key=lambda one: one.relative_l2)
        limits = self._limits(rung, view.network(role))
        broken = () if limits is None else tuple(line for one in every for line in one.beyond(limits))
        name = view.network_name(role)
        rung.networks.append(NetworkResult(name, str(view.shape), case.label, worst, broken))
        if broken:
            self.suspects.setdefault((rung.name, name), (view, role, case))

    def _limits(self, rung: Rung, network: Network) -> Thresholds | None:
        """Return what a network is held to; None on the rung that is measured and not judged."""
        if rung.precision is None:
            return None
        engine = self.engine if rung.name == "engine" else None
        return THRESHOLDS[_row_on(engine, "fp32" if rung.name == "eager" else row_of(network))]

    def _did_not_run(
        self, rung: Rung, view: Bundle, role: str, failed: list[tuple[Case, CvxError]], *, some_ran: bool
    ) -> None:
        """Note the batch sizes that no engine was compiled for, as long as there is one; all else is a failure."""
        name, optional = (
            view.network_name(role),
            self.engine is not None and rung.name == "engine" and engine_spec(self.engine).compiled,
        )
        for case, error in failed:
            if optional and some_ran:
                rung.notes.append(f"{name} was not run at {case.label}: {error.what}")
            else:
                rung.networks.append(NetworkResult(name, str(view.shape), case.label, None, (error.what,)))
                self.refused.setdefault((rung.name, name), (view, role, case, error.what))

    def _hold(self, rung: Rung, shape: str, latents: tuple[Frames, ...], frames: Frames, video: "EagerVideo") -> None:
        """Hold a whole run against that of diffusers in float32."""
        limits = None if rung.precision is None else THRESHOLDS[rung.precision]
        channels = video.latents.shape[2]
        expected = [array[:1, :, :channels] for array in (*video.hidden_states, video.latents)]
        moved = drift([array[:1, :, :channels] for array in latents], expected)[1:]
        broken = () if limits is None else _drifted(moved, limits)
        rung.trajectories.append(TrajectoryResult(shape, moved, broken))
        if _LEVELS[self.request.level] > 1:
            apart = video_difference(frames, video.frames)
            rung.videos.append(VideoResult(shape, apart, () if limits is None else apart.beyond(limits)))

    def _check_run(self, view: Bundle, told: str, wish: "EagerRequest", video: "EagerVideo", show: Show) -> None:
        """Make the video on the engine, or what stands in for it, from the same noise; hold it against diffusers'."""
        rung = self.rungs[self._last_graphs if self.engine is None else "engine"]
        output, kept = self.folder / "video.npy", self.folder / "latents.npy"
        request = RunRequest(
            (wish.prompt,),
            output,
            image=wish.image,
            video=wish.video,
            strength=RunRequest.strength if wish.video is None else wish.strength,
            steps=wish.steps,
            seed=wish.seed,
            save_latents=kept,
        )
        try:
            with self._opener(rung.name)(view) as backend:
                recorder = Recorder()
                run(ObservedBackend(backend, recorder), request, self.progress)
        except CvxError as error:
            rung.trajectories.append(TrajectoryResult(told, (), (error.what,)))
            return
        frames: Frames = np.load(output)
        self._hold(rung, told, (*recorder.hidden_states, np.load(kept)), frames, video)
        show(view.shape, video.frames, frames)

    def _divergence(self, rung: Rung | None) -> Iterator[Divergence]:
        """Yield where each network of a failing rung parts from a rung that is right."""
        for (name, network), (view, role, case) in self.suspects.items():
            if rung is not None and name == rung.name:
                with self.progress.task(f"find where {network} parts"):
                    layers = self._layers(rung, view, role, case)
                if layers:
                    yield Divergence(network, str(view.shape), tuple(layers))

    def _reductions(self, rung: Rung | None) -> Iterator[Reduction]:
        """Yield each network of a failing rung cut down to what still shows it, where that was asked for."""
        engine = None if rung is None else self.engine if rung.name == "engine" else _engine_of(self.runners, rung.name)
        if rung is None or engine is None or self.request.reduce is None:
            return
        faults = {name: (*what, "") for (at, name), what in self.suspects.items() if at == rung.name}
        faults |= {name: what for (at, name), what in self.refused.items() if at == rung.name}
        for name, (view, role, case, said) in faults.items():
            limits = self._limits(rung, view.network(role))
            fault = Fault(engine, said, limits.relative_l2 if limits else 0.0)
            try:
                yield reduced(view, role, case, fault, self.request.reduce / f"reduced-{name}", self.progress)
            except CvxError as error:
                self.progress.note(f"{name} is not reduced: {error}")

    def _layers(self, rung: Rung, view: Bundle, role: str, case: Case) -> list[Layer]:
        """Return the first nodes of a network that differ on a rung, where its inner tensors can be looked at."""
        limits = self._limits(rung, view.network(role))
        if (
            limits is None
            or rung.name == "eager"
            or (self.engine and rung.name == "engine" and engine_spec(self.engine).on_gpu)
        ):
            return []
        bad = self._side(rung.name, view, role)
        if rung.name == "onnx":
            return first_modules(self.checkpoint, bad, case, limits.relative_l2)
        right: RungName = self._last_graphs if rung.name == "engine" else "onnx"
        return first_layers(self._side(right, view, role), bad, case, limits.relative_l2)

    def _side(self, rung: RungName, view: Bundle, role: str) -> Side:
        from cvx_deploy.graph.probe import Graph

        return Side(Graph(self.graphs.get(rung, self.bundle).at(view.shape), role), self._opener(rung))


def _engine_of(runners: dict[RungName, GraphRunner], rung: RungName) -> EngineName | None:
    """Return what runs a rung of graphs; None for those of eager PyTorch."""
    return runners[rung].engine if rung in runners else None


def _tried(open_: Open, bundle: Bundle, role: str, cases: list[Case]) -> Iterator[Arrays | CvxError]:
    """Yield for each case what a network puts out, or why it does not; cases of one size stand together."""
    for _, group in itertools.groupby(cases, lambda case: case.sizes):
        left = list(group)
        try:
            with open_(bundle) as backend:
                for _, outputs in run_cases(backend, role, list(left)):
                    left.pop(0)
                    yield outputs
        except CvxError as error:
            yield from [error] * len(left)


def _row_of_all(bundle: Bundle, kind: EngineName) -> str:
    """Return which row of the thresholds a whole run on an engine is held against."""
    return coarsest(_row_on(kind, row_of(network)) for network in bundle.manifest.networks.values())


def _row_on(engine: EngineName | None, row: str) -> str:
    """Return the row for an engine: TensorRT multiplies float32 in tf32."""
    return "tf32" if row == "fp32" and engine is not None and engine_spec(engine).compiled else row


def _is_quantized(bundle: Bundle) -> bool:
    return any(network.quantization is not None for network in bundle.manifest.networks.values())


def _unquantized(bundle: Bundle) -> str:
    """Return the precision of a bundle as it would be without quantization."""
    recipe = Recipe.parse(bundle.manifest.precision, "fp32")
    return str(Recipe(**{name: NetworkPrecision(recipe.of(name).compute) for name in COMPONENTS}))


def _drifted(moved: tuple[float, ...], limits: Thresholds) -> tuple[str, ...]:
    far = [index for index, error in enumerate(moved) if not error <= limits.drift]
    return (f"step {far[0] + 1}: drift {moved[far[0]]:.2e} is above {limits.drift:.0e}",) if far else ()


def _conditions(request: CheckRequest) -> dict[str, Any]:
    """Say what figures were taken on."""
    asked = {"prompt": request.prompt, "steps": request.steps, "seed": request.seed, "guidance_scale": GUIDANCE}
    return conditions(_PACKAGES, "", **asked)
