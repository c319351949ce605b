"""Prompts (and an image, or a video) in, video files out: the whole run, stage by stage.

Each stage loads its networks, works for every video, and lets go of them before the next one loads its own.
"""

from collections.abc import Generator as Steps
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.schema import Manifest
from cvx_deploy.engines.backend import Backend
from cvx_deploy.errors import CvxError, MediaError, PromptError, ShapeError
from cvx_deploy.families.cogvideox.vae import DECODER, encoder
from cvx_deploy.files import staged_file
from cvx_deploy.media.contact_sheet import ContactSheet
from cvx_deploy.media.encoders import VideoFormat
from cvx_deploy.media.read import load_image, load_video
from cvx_deploy.media.write import check_file_place, check_writable, open_writer
from cvx_deploy.pipeline import vae
from cvx_deploy.pipeline.devices import share_out
from cvx_deploy.pipeline.noise import Generator
from cvx_deploy.pipeline.prompt_cache import PromptCache
from cvx_deploy.pipeline.prompts import embed
from cvx_deploy.pipeline.report import RunReport
from cvx_deploy.pipeline.request import RunRequest, texts
from cvx_deploy.pipeline.sampler import Conditions, Latents, denoise, modulation_of
from cvx_deploy.pipeline.schedulers import Scheduler, SchedulerConfig, make_scheduler
from cvx_deploy.pipeline.shapes import latent_shape, latents_header, padding
from cvx_deploy.progress import Progress, SilentProgress
from cvx_deploy.shape import Shape


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
    return len(latents_header(request.from_latents))


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
    temporal = bundle.manifest.vae.temporal
    period = 2 * temporal
    if bundle.manifest.traits.patch_size_t is None:
        raise ShapeError(
            f"{bundle.manifest.model} cannot start from a video: diffusers encodes 8 frames at a time, and each of its "
            f"latent frames spans {temporal}",
            fix="leave --video out",
        )
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


def _prompt_embeds(
    backend: Backend, request: RunRequest, cache: PromptCache | None, progress: Progress, report: RunReport
) -> list[NDArray[np.float32]]:
    """Return for every prompt (1, S, D), or with guidance (2, S, D), negative first."""
    embeddings, report.cached_prompts = embed(backend, texts(request), cache, progress)
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
    half = encoder(backend.bundle.manifest.vae)
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
    chunks = vae.count_chunks(backend, DECODER, latents.shape[1]) * len(latents)
    if request.vae_tiling:
        chunks *= vae.count_tiles(backend, DECODER, *latents.shape[3:])
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
    if not np.isfinite(array).all():
        raise MediaError(f"{path} holds values that are not finite numbers", fix="make the latents again")
    return np.array(array)
