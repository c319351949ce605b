"""Prompts (and an image, or a video) in, video files out: the whole run, stage by stage.

Each stage loads its networks, works for every video, and lets go of them before the next one loads its own.
"""

from collections.abc import Generator as Steps
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bounds import MOST_VIDEOS
from cvx_deploy.bundle import Bundle, Manifest
from cvx_deploy.errors import CvxError, MediaError, OutputError, PromptError, ShapeError
from cvx_deploy.files import staged_file
from cvx_deploy.models import SchedulerKind, Shape
from cvx_deploy.progress import Progress, SilentProgress
from cvx_deploy.runtime import vae
from cvx_deploy.runtime.backend import Backend
from cvx_deploy.runtime.combinations import check_combination
from cvx_deploy.runtime.contact_sheet import ContactSheet
from cvx_deploy.runtime.devices import share_out
from cvx_deploy.runtime.encoders import VideoFormat
from cvx_deploy.runtime.media import load_image, load_video
from cvx_deploy.runtime.noise import Generator, check_seed
from cvx_deploy.runtime.prompt_cache import PromptCache
from cvx_deploy.runtime.prompts import embed
from cvx_deploy.runtime.run_report import RunReport
from cvx_deploy.runtime.sampler import Conditions, Latents, denoise, modulation_of
from cvx_deploy.runtime.scheduler import Scheduler, SchedulerConfig, make_scheduler
from cvx_deploy.runtime.shapes import latent_shape, latents_header, padding
from cvx_deploy.runtime.video import check_file_place, check_writable, open_writer

MOST_GUIDANCE = 1000.0


@dataclass(frozen=True)
class RunRequest:
    """What to make.

    Video k of the run has prompt ``prompts[k // num_videos]`` and seed ``seed + k``, so that it can be made alone
    again.

    Attributes:
        prompts: One or more.
        output: A file (.mp4, .webm, .gif, .npy), or a folder for PNG frames (a string that ends in a slash is one).
        negative_prompt: What guidance leads away from.
        image: The first frame, for image-to-video models.
        video: A clip to start from, for text-to-video models, with `strength` in (0, 1]: how much of it is remade.
        guidance_scale: At most 1 turns guidance off, and halves the work.
        dynamic_cfg: Whether the guidance scale changes over the steps, as diffusers' ``use_dynamic_cfg``.
        scheduler: None for the checkpoint's own.
        num_videos: Videos a prompt.
        vae_tiling: Whether the VAE works tile by tile, as diffusers' ``enable_tiling``: less memory, other pixels.
        save_latents: Where to keep the finished latents, ``.npy``, float32 (videos, F, C, H, W).
        from_latents: Finished latents to decode; nothing is denoised.
        contact_sheet: Where to put a picture of some frames of each video, ``.png``.
    """

    prompts: tuple[str, ...]
    output: Path | str
    negative_prompt: str = ""
    image: Path | None = None
    video: Path | None = None
    strength: float = 0.8
    steps: int = 50
    guidance_scale: float = 6.0
    dynamic_cfg: bool = False
    scheduler: SchedulerKind | None = None
    seed: int = 0
    num_videos: int = 1
    vae_tiling: bool = False
    save_latents: Path | None = None
    from_latents: Path | None = None
    contact_sheet: Path | None = None

    def __post_init__(self) -> None:
        if not self.prompts and self.from_latents is None:
            raise PromptError("there is no prompt", fix="give at least one with --prompt TEXT")
        if not 0 < self.strength <= 1:
            raise CvxError(f"strength {self.strength} is not above 0 and at most 1", fix="use --strength 0.8")
        if not 0 <= self.guidance_scale <= MOST_GUIDANCE:  # a NaN fails this too
            raise CvxError(f"guidance scale {self.guidance_scale}", fix="use --guidance-scale 6, or 1 for no guidance")
        if self.num_videos < 1:
            raise CvxError(f"{self.num_videos} videos a prompt", fix="use --num-videos 1 or more")
        if self.num_videos * len(self.prompts) > MOST_VIDEOS:
            raise CvxError(
                f"{self.num_videos} videos of each of {len(self.prompts)} prompts are more than {MOST_VIDEOS}",
                fix="use a smaller --num-videos, and run several times with other seeds",
            )
        for index in (0, max(self.num_videos * len(self.prompts), 1) - 1):
            check_seed(self.seed + index)
        check_combination(self.given)
        if self.save_latents is not None and self.save_latents.suffix != ".npy":
            raise OutputError(f"{self.save_latents} is not a .npy file", fix="use --save-latents FILE.npy")
        if self.contact_sheet is not None and self.contact_sheet.suffix != ".png":
            raise OutputError(f"{self.contact_sheet} is not a .png file", fix="use --contact-sheet FILE.png")
        if self.save_latents is not None and self.save_latents.absolute() == Path(self.output).absolute():
            raise OutputError(f"{self.output} is to hold both the video and its latents", fix="name two files")

    @property
    def given(self) -> set[str]:
        """The names of the fields that are not as they are by default."""
        return {field.name for field in fields(self) if getattr(self, field.name) != field.default} - (
            set() if self.prompts else {"prompts"}
        )


def run(
    backend: Backend,
    request: RunRequest,
    progress: Progress | None = None,
    others: Sequence[Backend] = (),
    prompt_cache: PromptCache | None = None,
) -> RunReport:
    """Make the videos that `request` asks for.

    Args:
        backend: Where everything runs.
        request: What to make.
        progress: Told what goes on.
        others: More devices, which denoise their share of the videos; the result is that of one.
        prompt_cache: Embeddings of earlier runs, and where this one's are kept.

    Raises:
        CvxError: Of every kind, each before any hours of work where it can be known then.
    """
    progress = progress or SilentProgress()
    report = RunReport()
    networks_needed(backend.bundle, request)
    check_writable(request.output, _video_count(request))
    for place in filter(None, (request.save_latents, request.contact_sheet)):
        check_file_place(place)
    if request.from_latents is not None:
        latents = _read_latents(request.from_latents, backend.bundle)
    else:
        latents = make_latents(backend, request, progress, report, others, prompt_cache)
    if request.save_latents is not None:
        _write_latents(request.save_latents, latents)
    _decode(backend, request, latents, progress, report)
    return report


def networks_needed(
    bundle: Bundle, request: RunRequest, prompt_cache: PromptCache | None = None
) -> list[tuple[str, dict[str, int]]]:
    """Return the role and the sizes of every network that a run loads, so that one that is missing is known at once."""
    vae_facts, shape = bundle.manifest.vae, bundle.shape
    halves = [vae.DECODER]
    needed: list[tuple[str, dict[str, int]]] = []
    if request.from_latents is None:
        texts = _texts(request)
        if prompt_cache is None or len(prompt_cache.read(texts)) < len(texts):
            needed.append(("text_encoder", {"batch": 1}))
        needed += [("modulation", {}), ("transformer", {"batch": 2 if request.guidance_scale > 1 else 1})]
        if request.image is not None or request.video is not None:
            halves.append(vae.encoder(vae_facts))
    for half in halves:
        if request.vae_tiling:
            vae.check_tiles(vae_facts, half, shape)
        planes = vae.planes(vae_facts, half, shape, tiled=request.vae_tiling)
        for role in filter(bundle.has, (half.first, half.following)):
            needed += [(role, {"latent_height": height, "latent_width": width}) for height, width in planes]
    return needed


def make_latents(
    backend: Backend,
    request: RunRequest,
    progress: Progress,
    report: RunReport,
    others: Sequence[Backend] = (),
    prompt_cache: PromptCache | None = None,
) -> Latents:
    """Return the finished latents of every video, unpadded: (videos, F, C, H, W)."""
    manifest = backend.bundle.manifest
    _check_task(backend, request)
    report.seeds = [request.seed + index for index in range(len(request.prompts) * request.num_videos)]
    generators = [Generator(seed) for seed in report.seeds]
    schedulers = [_scheduler(manifest, request) for _ in generators]
    source = _source_pixels(backend.bundle.shape, request, progress)
    with report.stage("text encoder"):
        prompt_embeds = _prompt_embeds(backend, request, prompt_cache, progress, report)
    with report.stage("vae encode"):
        encoded = _encoded(backend, request, source, generators, progress)
    with report.stage("modulation"):
        modulation = modulation_of(backend, schedulers[0])
    with report.stage("transformer"):
        finished: dict[int, Latents] = {}
        guided = request.guidance_scale > 1
        steps = sum(len(scheduler.timesteps) - scheduler.start for scheduler in schedulers)

        def work(device: Backend, videos: Sequence[int]) -> Steps[None, None, None]:
            with device.load("transformer", {"batch": 2 if guided else 1}) as session:
                for index in videos:
                    scheduler, generator = schedulers[index], generators[index]
                    latents, image_latents = _start(backend.bundle, scheduler, generator, encoded[index], request)
                    conditions = Conditions(
                        modulation,
                        prompt_embeds[index // request.num_videos],
                        request.guidance_scale,
                        request.dynamic_cfg,
                        image_latents,
                    )
                    for step in denoise(device, session, scheduler, latents, conditions, generator):
                        latents = step.latents
                        advance(1)
                        yield
                    finished[index] = latents[:, padding(backend.bundle) :]

        with progress.task("denoise", steps) as advance:
            share_out((backend, *others), len(generators), work)
    return np.concatenate([finished[index] for index in range(len(generators))])


def _video_count(request: RunRequest) -> int:
    if request.from_latents is None:
        return len(request.prompts) * request.num_videos
    count = len(latents_header(request.from_latents))
    if count > MOST_VIDEOS:
        raise MediaError(
            f"{request.from_latents} holds {count} videos, more than {MOST_VIDEOS}", fix="divide it among several files"
        )
    return count


def _check_task(backend: Backend, request: RunRequest) -> None:
    """Refuse an image or a video that this model, or this bundle, cannot take, and the lack of one it needs."""
    manifest = backend.bundle.manifest
    wants_image = manifest.traits.task == "image-to-video"
    if wants_image and request.image is None:
        raise PromptError(f"{manifest.model} makes videos from an image, and none is given", fix="add --image FILE")
    if not wants_image and request.image is not None:
        raise PromptError(
            f"{manifest.model} is a text-to-video model and takes no image",
            fix="use an image-to-video model (5b-i2v, 1.5-5b-i2v), or leave --image out",
        )
    if wants_image and request.video is not None:
        raise PromptError(
            f"{manifest.model} starts from an image, not a video", fix="use a text-to-video model, or --image FILE"
        )
    if request.video is not None and not backend.bundle.has("vae_encoder"):
        _refuse_video(backend.bundle)


def _refuse_video(bundle: Bundle) -> NoReturn:
    """Say which shape video-to-video can be done at, and how to come by it."""
    period = 2 * bundle.manifest.vae.temporal
    nearest = replace(bundle.shape, frames=max(bundle.shape.frames // period, 1) * period)
    there = nearest in bundle.shapes
    raise ShapeError(
        f"video-to-video cannot be done at {bundle.shape.frames} frames: {bundle.manifest.model} needs "
        "an even number of latent frames there",
        fix=f"add --shape {nearest}" if there else f"run: {bundle.export_command((*bundle.shapes, nearest))}",
    )


def _scheduler(manifest: Manifest, request: RunRequest) -> Scheduler:
    kind = request.scheduler or manifest.scheduler["kind"]
    config = SchedulerConfig.from_config({**manifest.scheduler["config"], "_class_name": _SCHEDULER_CLASSES[kind]})
    start = 0
    if request.video is not None:
        taken = int(request.steps * request.strength)
        if taken < 1 <= request.steps:
            raise CvxError(
                f"strength {request.strength} of {request.steps} steps leaves no step to take",
                fix="raise --steps or --strength",
            )
        start = max(request.steps - taken, 0)
    return make_scheduler(kind, config, request.steps, start)


_SCHEDULER_CLASSES = {"ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"}


def _source_pixels(shape: Shape, request: RunRequest, progress: Progress) -> vae.Clip | None:
    if request.image is not None:
        return load_image(request.image, shape.height, shape.width)
    if request.video is None:
        return None
    clip = load_video(request.video, shape.frames, shape.height, shape.width)
    if clip.total_frames is not None and clip.total_frames > shape.frames:
        progress.note(f"note: {request.video} has {clip.total_frames} frames; the first {shape.frames} are used")
    return clip.pixels


def _texts(request: RunRequest) -> list[str]:
    """Return what is to be encoded, each text once: with guidance the negative prompt, too."""
    guided = request.guidance_scale > 1
    return list(dict.fromkeys((*((request.negative_prompt,) if guided else ()), *request.prompts)))


def _prompt_embeds(
    backend: Backend, request: RunRequest, cache: PromptCache | None, progress: Progress, report: RunReport
) -> list[NDArray[np.float32]]:
    """Return for every prompt (1, S, D), or with guidance (2, S, D), negative first."""
    embeddings, report.cached_prompts = embed(backend, _texts(request), cache, progress)
    negative = [embeddings[request.negative_prompt]] if request.guidance_scale > 1 else []
    return [np.stack([*negative, embeddings[prompt]]) for prompt in request.prompts]


def _encoded(
    backend: Backend,
    request: RunRequest,
    pixels: vae.Clip | None,
    generators: list[Generator],
    progress: Progress,
) -> list[Latents | None]:
    """Return for every video the latents of the image or clip it starts from, (1, f, C, H, W), unscaled."""
    if pixels is None:
        return [None] * len(generators)
    half = vae.encoder(backend.bundle.manifest.vae)
    chunks = vae.count_chunks(backend, half, pixels.shape[2])
    if request.vae_tiling:
        chunks *= vae.count_tiles(backend, half, *pixels.shape[3:])
    with progress.task("encode " + ("image" if request.image else "video"), chunks) as advance:
        posterior = vae.encode(backend, pixels, tiled=request.vae_tiling, advance=advance)
    return [posterior.sample(generator).transpose(0, 2, 1, 3, 4) for generator in generators]


def _start(
    bundle: Bundle, scheduler: Scheduler, generator: Generator, encoded: Latents | None, request: RunRequest
) -> tuple[Latents, Latents | None]:
    """Return the latents that denoising starts from, and the image latents that go along with them."""
    facts = bundle.manifest.vae
    scale = np.float32(facts.scaling_factor)
    shape = latent_shape(bundle)
    if encoded is None:
        return generator.randn(shape), None
    if request.video is not None:
        return scheduler.add_noise(scale * encoded, generator.randn(shape), scheduler.start), None
    image_latents = np.zeros(shape, np.float32)
    # 1.5 was trained on image latents divided by the scale; diffusers calls it invert_scale_latents.
    image_latents[:, :1] = encoded * (1 / scale if facts.invert_scale_latents else scale)
    return generator.randn(shape), image_latents


def _decode(backend: Backend, request: RunRequest, latents: Latents, progress: Progress, report: RunReport) -> None:
    manifest, shape = backend.bundle.manifest, backend.bundle.shape
    video = VideoFormat(shape.frames, shape.height, shape.width, manifest.fps, videos=len(latents))
    chunks = vae.count_chunks(backend, vae.DECODER, latents.shape[1]) * len(latents)
    if request.vae_tiling:
        chunks *= vae.count_tiles(backend, vae.DECODER, *latents.shape[3:])
    sheet = ContactSheet(video) if request.contact_sheet is not None else None
    with open_writer(request.output, video) as writer, progress.task("decode", chunks) as advance:
        for clip in latents:
            # diffusers computes 1 / scale in double and multiplies
            unscaled = np.float32(1 / manifest.vae.scaling_factor) * clip[None].transpose(0, 2, 1, 3, 4)
            pieces = vae.decode(backend, unscaled, tiled=request.vae_tiling, advance=advance)
            while True:
                with report.stage("vae decode"):
                    piece = next(pieces, None)
                if piece is None:
                    break
                with report.stage("write video"):
                    frames = _frames(piece)
                    writer.write(frames)
                    if sheet is not None:
                        sheet.add(frames)
    report.paths = list(writer.paths)
    if sheet is not None and request.contact_sheet is not None:
        sheet.save(request.contact_sheet)


def _frames(piece: vae.Clip) -> NDArray[np.float32]:
    """Turn pixels (1, 3, n, H, W) in about [-1, 1] into frames (n, H, W, 3) in [0, 1]."""
    frames: NDArray[np.float32] = np.clip(piece[0].transpose(1, 2, 3, 0) / 2 + 0.5, 0, 1)
    return frames


def _write_latents(path: Path, latents: Latents) -> None:
    with staged_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, latents)


def _read_latents(path: Path, bundle: Bundle) -> Latents:
    array = latents_header(path)
    _, padded, *rest = latent_shape(bundle)
    expected = (padded - padding(bundle), *rest)
    if array.dtype != np.float32 or array.shape[1:] != expected or not len(array):
        raise ShapeError(
            f"{path} holds {array.dtype} of shape {array.shape}, not float32 (videos, {', '.join(map(str, expected))})",
            fix="use latents made with a bundle of this shape",
        )
    if not all(np.isfinite(video).all() for video in array):
        raise MediaError(f"{path} holds values that are not finite numbers", fix="make the latents again")
    return np.array(array)
