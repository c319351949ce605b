"""The Python API: a bundle opened on an engine, which makes videos as often as it is called.

::

    from cvx_deploy import Pipeline

    with Pipeline.from_pretrained("mini") as pipe:
        video = pipe("a red circle moves to the right", seed=7)
        video.save("circle.mp4")
"""

import hashlib
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from cvx_deploy import __version__
from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.pack import identity
from cvx_deploy.engines.auto import AUTO, chosen
from cvx_deploy.engines.backend import Backend
from cvx_deploy.engines.registry import engine_spec, open_backend
from cvx_deploy.engines.residency import Policy
from cvx_deploy.engines.spec import DEFAULT_OPTIONS, EngineName, EngineOptions, Needed
from cvx_deploy.errors import CvxError, EngineError
from cvx_deploy.families.cogvideox.models import SchedulerKind
from cvx_deploy.measure.cpu import cpu_name, instructions
from cvx_deploy.media.given import ClipLike, ImageLike, clip_pixels, image_pixels
from cvx_deploy.miniatures import bundle_folder
from cvx_deploy.pipeline.caching import CacheMode, PolicyMaker
from cvx_deploy.pipeline.events import Denoised, Event, Frames, Step
from cvx_deploy.pipeline.host_memory import obstacle, policy_within
from cvx_deploy.pipeline.prompt_cache import PromptCache
from cvx_deploy.pipeline.report import RunReport
from cvx_deploy.pipeline.request import RunRequest, networks_needed
from cvx_deploy.pipeline.resume import ResumePoint
from cvx_deploy.pipeline.run import events, run
from cvx_deploy.pipeline.shapes import ShapeChoice
from cvx_deploy.pipeline.video import Video
from cvx_deploy.pipeline.windows import bundle_and_windows
from cvx_deploy.precision import Precision
from cvx_deploy.progress import Progress, SilentProgress
from cvx_deploy.shape import Shape

Array = NDArray[Any]


class SeededGenerator(Protocol):
    """A generator of random numbers that knows its seed, such as PyTorch's."""

    def initial_seed(self) -> int:
        """Return it."""


Seed = int | SeededGenerator
OUTPUT_TYPES: Final = ("np", "latent")


class Pipeline:
    """A bundle on an engine. Made by `from_bundle` or `from_pretrained`; used in a ``with`` block, or closed by hand.

    Its networks stay loaded between calls (``residency="resident"``), or only those of one phase (``"phase"``). One
    call at a time: another one, from whatever thread, is refused while it lasts.

    Args:
        bundle: What to run, seen at one of its shapes.
        engine: What runs it; ``auto`` finds the fastest, see `cvx_deploy.engines.auto`.
        options: How.
        devices: Which GPUs; several share out the videos of a call, and two the branches of guidance where there is one
            video. An engine for CPUs has one.
        check_finite: Whether every output of every network is searched for NaN and infinity, which is slow.
        prompt_cache: A folder in which prompts' embeddings are kept.
        progress: Told what goes on.

    Raises:
        EngineError: The engine is not installed, or cannot run this bundle here.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: EngineName = AUTO,
        options: EngineOptions = DEFAULT_OPTIONS,
        *,
        devices: Sequence[int] = (),
        check_finite: bool = False,
        prompt_cache: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        progress = progress or SilentProgress()
        usual = _usual(bundle)
        engine = chosen(
            engine,
            bundle,
            options,
            usual,
            devices=devices,
            fits=lambda name: obstacle(bundle, name, options, usual),
            progress=progress,
        ).engine
        spec = engine_spec(engine)
        if devices and "device" not in spec.takes:
            raise EngineError(f"devices means nothing to the engine {engine}", fix="leave devices out")
        spec.check(options)
        self.bundle, self.engine = bundle, engine
        self._options, self._devices, self._check_finite = options, tuple(devices), check_finite
        self._progress = progress
        self._cache: PromptCache | None = None
        if prompt_cache is not None:
            self._cache = PromptCache(prompt_cache, bundle, engine, spec.version(), self._progress)
        self._busy = threading.Lock()
        self._stack = ExitStack()
        self._opened: Bundle | None = None
        self._backends: tuple[Backend, ...] = ()
        self._closed = False

    @classmethod
    def from_bundle(
        cls,
        path: Path | str,
        *,
        engine: EngineName = AUTO,
        shape: Shape | str | None = None,
        checkpoint: Path | str | None = None,
        devices: Sequence[int] = (),
        threads: int | None = None,
        vram: int | None = None,
        cuda_graphs: bool = True,
        residency: Policy = "resident",
        ram: int | None = None,
        check_finite: bool = False,
        prompt_cache: Path | str | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Open a bundle.

        Args:
            path: Its folder.
            engine: onnxruntime, openvino, onnxruntime-cuda, tensorrt, tensorrt-rtx, or auto: the fastest there is.
            shape: Which of the bundle's video sizes, such as ``"49x480x720"``; None for its first.
            checkpoint: Where the bundle's weights have moved to.
            devices: Which GPUs; several share out the videos of a call, or the branches of guidance of a single one.
            threads: CPU threads; None for one per core.
            vram: Bytes of device memory that compiled engines may use.
            cuda_graphs: Whether compiled engines are launched as CUDA graphs.
            residency: ``resident`` keeps all networks loaded, ``phase`` those of one phase of a call.
            ram: Bytes of this machine's memory that an engine on a CPU may use, mapped weights left out; None for all
                that this process may have. Where not all networks fit at once, those of one phase are held.
            check_finite: Whether every output is searched for NaN and infinity, which is slow.
            prompt_cache: A folder in which prompts' embeddings are kept.
            progress: Told what goes on; `cvx_deploy.progress.RichProgress` shows bars.

        Raises:
            BundleError: There is no bundle, or it is damaged.
            ShapeError: It makes no videos of that shape.
            EngineError: The engine is not installed, or cannot run this bundle here.
        """
        bundle = Bundle.open(Path(path))
        if checkpoint is not None:
            bundle = bundle.with_checkpoint(Path(checkpoint))
        if shape is not None:
            bundle = bundle.at(Shape.parse(shape) if isinstance(shape, str) else shape)
        return cls(
            bundle,
            engine,
            EngineOptions(threads=threads, vram=vram, cuda_graphs=cuda_graphs, residency=residency, ram=ram),
            devices=devices,
            check_finite=check_finite,
            prompt_cache=None if prompt_cache is None else Path(prompt_cache),
            progress=progress,
        )

    @classmethod
    def from_pretrained(cls, name: str, *, engines_dir: Path | str = "engines", **options: Any) -> Self:
        """Open a bundle by its name: one that `cvx-deploy export` wrote into `engines_dir`, or a packaged miniature.

        Args:
            name: Such as ``"5b"``, or ``"mini"``.
            engines_dir: Where bundles live by their names.
            options: See `from_bundle`.
        """
        return cls.from_bundle(bundle_folder(name, Path(engines_dir)), **options)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        output_type: str = "np",
        callback_on_step_end: Callable[[Step], object] | None = None,
        **wanted: Any,
    ) -> Video:
        """Make videos; the words are those of diffusers' pipelines.

        Args:
            prompt: What to show, or several; or `prompt_embeds`.
            output_type: ``np`` for frames, ``latent`` to stop before decoding; `Video.images` gives PIL images.
            callback_on_step_end: Called after every denoising step; what it raises ends the run, and nothing is left.
            wanted: See `stream`.

        Raises:
            CvxError: Of every kind; an option that does not fit the model or another option, before any work.
        """
        if output_type not in OUTPUT_TYPES:
            raise CvxError(f"output_type {output_type!r}", fix=f"use one of {', '.join(OUTPUT_TYPES)}")
        frames: list[NDArray[np.float32]] = []
        report, latents = RunReport(), np.empty(0, np.float32)
        bundle, request = self._asked(prompt, **wanted)
        request = replace(request, latents_only=output_type == "latent")
        with closing(self._stream(bundle, request, report)) as happening:
            for event in happening:
                if isinstance(event, Step) and callback_on_step_end is not None:
                    callback_on_step_end(event)
                elif isinstance(event, Denoised):
                    latents = event.latents
                elif isinstance(event, Frames):
                    frames.append(event.frames)
        shape = bundle.shape if request.windows is None else request.windows.shape
        size = (len(latents), shape.frames if frames else 0, shape.height, shape.width, 3)
        joined = np.concatenate(frames).reshape(size) if frames else np.empty(size, np.float32)
        return Video(joined, latents, bundle.manifest.fps, tuple(report.seeds), report)

    def stream(self, prompt: str | Sequence[str] | None = None, **wanted: Any) -> Generator[Event, None, None]:
        """Make videos, and yield each step as it is taken, then the finished latents, then frames as chunks decode.

        Closing it (or leaving its loop) stops the run there; what it had loaded stays, and nothing else is left.

        Args:
            prompt: What to show, or several; or `prompt_embeds`.
            wanted: ``negative_prompt``; ``image``, the first frame, for image-to-video models; ``video``, a clip to
                start from, with ``strength`` in (0, 1]: files, PIL images, or arrays (uint8, or floats in [0, 1], of
                height x width x 3); ``num_inference_steps`` and ``guidance_scale`` (the bundle's own unless given);
                ``use_dynamic_cfg``; ``scheduler``, ddim or dpm; ``num_videos_per_prompt``; ``seed``, that of the first
                video, the next has one more; ``generator``, a seed for every video, as ints or as objects with
                ``initial_seed()``; ``latents``, the noise to start from, float32 (videos, F, C, H, W);
                ``prompt_embeds`` and ``negative_prompt_embeds``, float32 (prompts, S, D); ``num_frames``, ``height``,
                ``width``, which pick one of the bundle's shapes, or a larger one that is made by windows of it, with
                ``overlap``, the frames that those share at the least, ``freenoise``, and ``windows_at_once``, how many
                go through the transformer together; ``loop``, for a video whose end leads back to its beginning;
                ``vae_tiling``; ``latents_dtype``, fp16 or bf16 for the video of a pipeline in half precision; ``fast``,
                or ``cache``, fixed or adaptive or a policy of
                one's own, with ``cache_speedup`` or ``cache_tolerance``, to forecast steps;
                ``resume``, the ``point`` of a step of an earlier run of the same video, to go on from there.

        Raises:
            CvxError: As a call does.
        """
        yield from self._stream(*self._asked(prompt, **wanted), RunReport())

    def run(self, request: RunRequest, watch: Callable[[Event], None] = lambda _: None) -> RunReport:
        """Make the videos of a request and write them to its output, as `cvx-deploy run` does."""
        with self._working(self.bundle, request) as backends:
            return run(backends[0], request, self._progress, backends[1:], self._cache, watch)

    def close(self) -> None:
        """Free everything; the pipeline cannot be used any more.

        Raises:
            CvxError: A run has not ended yet.
        """
        with self._alone():
            self._closed = True
            self._stack.close()

    def unload(self) -> None:
        """Free what is loaded; the next call loads it again.

        Raises:
            CvxError: A run has not ended yet.
        """
        with self._alone():
            self._stack.close()
            self._opened = None

    @property
    def residency(self) -> Policy:
        """Which networks stay loaded."""
        return self._options.residency

    @property
    def identity(self) -> str:
        """A hash of all that a video's bits depend on beside what is asked for."""
        made_by: list[Any] = [__version__, identity(self.bundle), cpu_name(), instructions()]
        made_by += [self.engine, engine_spec(self.engine).version()]
        return hashlib.sha256(repr([*made_by, self._options.threads]).encode()).hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _asked(
        self,
        prompt: str | Sequence[str] | None,
        *,
        negative_prompt: str = "",
        image: ImageLike | None = None,
        video: ClipLike | None = None,
        strength: float = 0.8,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        use_dynamic_cfg: bool = False,
        scheduler: SchedulerKind | None = None,
        num_videos_per_prompt: int = 1,
        seed: int = 0,
        generator: Seed | Sequence[Seed] | None = None,
        latents: Array | None = None,
        prompt_embeds: Array | None = None,
        negative_prompt_embeds: Array | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        overlap: int | None = None,
        freenoise: bool = False,
        loop: bool = False,
        windows_at_once: int = 1,
        vae_tiling: bool = False,
        latents_dtype: Precision = "fp32",
        cache: CacheMode | PolicyMaker | None = None,
        cache_speedup: float | None = None,
        cache_tolerance: float | None = None,
        fast: bool = False,
        resume: ResumePoint | None = None,
    ) -> tuple[Bundle, RunRequest]:
        """Return what a call asks for, and the bundle seen at the shape it is for."""
        size = ShapeChoice(num_frames, height, width)
        bundle, windows = bundle_and_windows(
            self.bundle, size, overlap=overlap, freenoise=freenoise, loop=loop, at_once=windows_at_once
        )
        shape, defaults = bundle.shape if windows is None else windows.shape, bundle.manifest.defaults
        request = RunRequest(
            prompts=() if prompt is None else (prompt,) if isinstance(prompt, str) else tuple(prompt),
            negative_prompt=negative_prompt,
            image=None if image is None else image_pixels(image, shape.height, shape.width),
            video=None if video is None else clip_pixels(video, shape.frames, shape.height, shape.width),
            strength=strength,
            steps=defaults.steps if num_inference_steps is None else num_inference_steps,
            guidance_scale=defaults.guidance_scale if guidance_scale is None else guidance_scale,
            dynamic_cfg=use_dynamic_cfg,
            scheduler=scheduler,
            num_videos=num_videos_per_prompt,
            seed=seed,
            each_seed=None if generator is None else _seeds(generator),
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            vae_tiling=vae_tiling,
            latents_dtype=latents_dtype,
            cache=cache,
            cache_speedup=cache_speedup,
            cache_tolerance=cache_tolerance,
            fast=fast,
            windows=windows,
            resume=resume,
        )
        return bundle, request

    def _stream(self, bundle: Bundle, request: RunRequest, report: RunReport) -> Generator[Event, None, None]:
        with self._working(bundle, request) as backends:
            yield from events(backends[0], request, self._progress, report, backends[1:], self._cache)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuse what comes while a run goes on."""
        if not self._busy.acquire(blocking=False):
            raise CvxError(
                "this pipeline is making a video", fix="wait for it, close its stream, or open another Pipeline"
            )
        try:
            yield
        finally:
            self._busy.release()

    @contextmanager
    def _working(self, bundle: Bundle, request: RunRequest) -> Iterator[tuple[Backend, ...]]:
        """Give the backends of a bundle, opened if they are not; those of another shape go."""
        with self._alone():
            if self._closed:
                raise CvxError("this pipeline is closed", fix="open another one")
            if self._opened is None or self._opened.index != bundle.index:
                self._stack.close()
                self._opened = None
                needed = networks_needed(bundle, request, self._cache, len(self._devices))
                policy = policy_within(bundle, self.engine, self._options, request, needed, self._progress)
                options = replace(self._options, residency=policy)
                with ExitStack() as stack:
                    self._backends = tuple(
                        stack.enter_context(self._open(bundle, replace(options, device=device), needed))
                        for device in self._devices or (0,)
                    )
                    self._stack = stack.pop_all()
                self._opened = bundle
            yield self._backends

    def _open(self, bundle: Bundle, options: EngineOptions, needed: Needed) -> AbstractContextManager[Backend]:
        return open_backend(
            self.engine,
            bundle,
            options,
            needed=needed,
            check_finite=self._check_finite,
            progress=self._progress,
        )


def _usual(bundle: Bundle) -> Needed:
    """Return what the bundle's usual run loads."""
    usual = RunRequest(prompts=("",), guidance_scale=bundle.manifest.defaults.guidance_scale)
    return networks_needed(bundle, usual)


def _seeds(generator: Seed | Sequence[Seed]) -> tuple[int, ...]:
    """Return the seeds of generators: numbers, or objects that know theirs, as PyTorch's do."""
    several = generator if isinstance(generator, Sequence) else (generator,)
    return tuple(one if isinstance(one, int) else int(one.initial_seed()) for one in several)
