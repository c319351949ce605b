"""Prompts (and an image, or a video) in, video files out: the whole run, stage by stage.

Each stage loads its networks, works for every video, and lets go of them before the next one loads its own.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bounds import MOST_VIDEOS
from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.schema import Manifest
from cvx_deploy.engines.backend import Backend, prefetch
from cvx_deploy.errors import CvxError, MediaError, PromptError, ShapeError
from cvx_deploy.files import staged_file
from cvx_deploy.media.encoders import VideoFormat
from cvx_deploy.media.film import Film
from cvx_deploy.media.interpolation import check_rate
from cvx_deploy.media.write import check_file_place, check_writable
from cvx_deploy.pipeline.branches import denoisers
from cvx_deploy.pipeline.caching import policy_for
from cvx_deploy.pipeline.coding import decoded, encoded, source_pixels
from cvx_deploy.pipeline.denoising import Videos
from cvx_deploy.pipeline.devices import share_out
from cvx_deploy.pipeline.events import Denoised, Event, Frames
from cvx_deploy.pipeline.noise import Generator as NoiseGenerator
from cvx_deploy.pipeline.prompt_cache import PromptCache
from cvx_deploy.pipeline.prompts import embed
from cvx_deploy.pipeline.report import RunReport
from cvx_deploy.pipeline.request import RunRequest, networks_needed, texts
from cvx_deploy.pipeline.rounding import is_kept
from cvx_deploy.pipeline.sampler import Latents, modulation_of
from cvx_deploy.pipeline.schedulers import Scheduler, SchedulerConfig, make_scheduler
from cvx_deploy.pipeline.shapes import latents_header
from cvx_deploy.pipeline.windows import Plan, plan_for
from cvx_deploy.progress import Progress, SilentProgress
from cvx_deploy.shape import Shape


def run(
    backend: Backend,
    request: RunRequest,
    progress: Progress | None = None,
    others: Sequence[Backend] = (),
    prompt_cache: PromptCache | None = None,
    watch: Callable[[Event], None] = lambda _: None,
) -> RunReport:
    """Make the videos that `request` asks for, and write them to its output.

    Args:
        backend: Where everything runs.
        request: What to make.
        progress: Told what goes on.
        others: More devices, which denoise their share of the videos, or the prompt's branch of a single one; see
            `pipeline.branches`.
        prompt_cache: Embeddings of earlier runs, and where this one's are kept.
        watch: Told of every step and every piece of a video.

    Raises:
        CvxError: Of every kind, each before any hours of work where it can be known then.
    """
    progress, report, output = progress or SilentProgress(), RunReport(), request.output
    assert output is not None
    networks_needed(backend.bundle, request)
    videos = _video_count(request)
    check_writable(output, videos)
    check_rate(backend.bundle.manifest.fps, request.fps)
    for place in filter(None, (request.save_latents, request.contact_sheet)):
        check_file_place(place)
    with ExitStack() as stack:
        happening = stack.enter_context(closing(events(backend, request, progress, report, others, prompt_cache)))
        film: Film | None = None
        for event in happening:
            watch(event)
            if isinstance(event, Denoised):
                if request.save_latents is not None:
                    _write_latents(request.save_latents, event.latents)
                form = video_format(backend.bundle, request, len(event.latents))
                film = stack.enter_context(Film(output, form, request.fps, request.contact_sheet))
            elif isinstance(event, Frames) and film is not None:
                with report.stage("write video"):
                    film.add(event.frames)
    if film is not None:
        report.paths, report.fps, report.interpolated = list(film.paths), film.form.fps, film.interpolated
    return report


def video_format(bundle: Bundle, request: RunRequest, videos: int) -> VideoFormat:
    """Return what finished videos are."""
    shape = bundle.shape if request.windows is None else request.windows.shape
    return VideoFormat(shape.frames, shape.height, shape.width, bundle.manifest.fps, videos=videos)


def events(
    backend: Backend,
    request: RunRequest,
    progress: Progress,
    report: RunReport,
    others: Sequence[Backend] = (),
    prompt_cache: PromptCache | None = None,
) -> Generator[Event, None, None]:
    """Yield what happens while the videos of `request` are made; nothing is written.

    It can be closed wherever it yields: what the run has loaded stays or goes as the backend's residency says, and all
    else is let go of.

    Args:
        backend: Where everything runs.
        request: What to make; its output is not looked at.
        progress: Told what goes on.
        report: Where it is noted what was done when.
        others: More devices; see `run`.
        prompt_cache: Embeddings of earlier runs, and where this one's are kept.

    Raises:
        CvxError: As `run` does.
    """
    _check_kept(backend.bundle, request)  # before anything is loaded for it
    plan = plan_for(backend.bundle, request.windows)
    if request.from_latents is None:
        check_task(backend.bundle, request)
    for role, sizes in networks_needed(backend.bundle, request, prompt_cache, 1 + len(others)):
        prefetch(backend, role, sizes)
    if request.parts_branches(1 + len(others)):
        if plan.at_once > 1:
            raise CvxError(
                "the branches of one video run on two devices, and there windows go one after another",
                fix="leave out --windows-at-once, or use one device",
            )
        prefetch(others[0], "transformer", {"batch": 1})
    if request.from_latents is not None:
        latents = _read_latents(request.from_latents, plan)
        _check_values(str(request.from_latents), latents, request)
    else:
        latents = yield from _denoised(backend, request, plan, progress, report, others, prompt_cache)
    yield Denoised(latents)
    if not request.latents_only:
        yield from decoded(backend, request, plan, latents, progress, report)


def make_latents(
    backend: Backend,
    request: RunRequest,
    progress: Progress,
    report: RunReport,
    others: Sequence[Backend] = (),
    prompt_cache: PromptCache | None = None,
) -> Latents:
    """Return the finished latents of every video, unpadded: (videos, F, C, H, W)."""
    made = events(backend, replace(request, latents_only=True), progress, report, others, prompt_cache)
    return next(event.latents for event in made if isinstance(event, Denoised))


def _denoised(
    backend: Backend,
    request: RunRequest,
    plan: Plan,
    progress: Progress,
    report: RunReport,
    others: Sequence[Backend],
    prompt_cache: PromptCache | None,
) -> Generator[Event, None, Latents]:
    """Yield every step, and return the finished latents of every video, unpadded."""
    manifest = backend.bundle.manifest
    report.seeds = request.seeds
    generators = [NoiseGenerator(seed, request.latents_dtype) for seed in report.seeds]
    schedulers = [scheduler_for(manifest, request) for _ in generators]
    policies = [policy_for(request, scheduler, backend.bundle) for scheduler in schedulers]
    source = source_pixels(plan.shape, request, progress)
    with report.stage("text encoder"):
        prompt_embeds = _prompt_embeds(backend, request, prompt_cache, progress, report)
    with report.stage("vae encode"):
        starts = encoded(backend, request, plan, source, generators, progress)
    with report.stage("modulation"):
        modulation = modulation_of(backend, schedulers[0])
    with report.stage("transformer"):
        videos = Videos(
            backend.bundle, request, plan, schedulers, policies, generators, prompt_embeds, starts, modulation
        )
        steps = sum(len(scheduler.timesteps) - scheduler.start for scheduler in schedulers)
        if plan.count > 1:
            report.windows = plan
            progress.note(f"note: {plan}, each at every step: {steps} steps, {steps * plan.count} passes")
        label = "denoise" if plan.count == 1 else f"denoise, {plan.count} windows a step"
        with (
            progress.task(label, steps) as advance,
            denoisers((backend, *others), request, report) as devices,
            closing(share_out(devices, len(generators), videos.denoised)) as shared,
        ):
            for step in shared:
                advance(1)
                yield step
    report.steps = videos.taken
    return np.concatenate([videos.finished[index] for index in range(len(generators))])


def _video_count(request: RunRequest) -> int:
    if request.from_latents is None:
        return request.video_count
    count = len(latents_header(request.from_latents))
    if count > MOST_VIDEOS:
        raise MediaError(
            f"{request.from_latents} holds {count} videos, more than {MOST_VIDEOS}", fix="divide it among several files"
        )
    return count


def check_schedule(bundle: Bundle, request: RunRequest) -> None:
    """Refuse steps that the schedule does not have, or that are too few for what is asked for; nothing is loaded."""
    policy_for(request, scheduler_for(bundle.manifest, request), bundle)


def check_task(bundle: Bundle, request: RunRequest) -> None:
    """Refuse an image or a video that this model, or this bundle, cannot take, and the lack of one it needs."""
    manifest = bundle.manifest
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
    if request.video is not None and not bundle.has("vae_encoder"):
        _refuse_video(bundle)
    if request.windows is not None:
        _check_windows(bundle.shape, request.windows.shape, request)
    taken = {spec.name: spec.shape for spec in bundle.network("transformer").inputs}["encoder_hidden_states"][1:]
    for embeds in (request.prompt_embeds, request.negative_prompt_embeds):
        if embeds is not None and embeds.shape[1:] != taken:
            raise PromptError(
                f"embeddings of a prompt have the shape {embeds.shape[1:]}, not {taken} (tokens, channels)",
                fix=f"make them with the text encoder of {manifest.model}",
            )


def _check_windows(window: Shape, shape: Shape, request: RunRequest) -> None:
    """Refuse what windows have no use for."""
    if request.image is not None and shape.frames > window.frames:
        raise PromptError(
            f"windows in time have no image to start from but the first, and {shape.frames} frames take several",
            fix=f"use --long chain, or --frames {window.frames}",
        )
    if request.vae_tiling and (shape.height, shape.width) != (window.height, window.width):
        raise ShapeError(
            f"frames of {shape.height}x{shape.width} go through the VAE by windows of {window.height}x{window.width}, "
            "and not by other tiles",
            fix="leave out --vae-tiling",
        )


def _check_kept(bundle: Bundle, request: RunRequest) -> None:
    """Refuse what no pipeline in half precision could do, so that there is none to agree with."""
    kept, computed = request.latents_dtype, bundle.network("transformer").precision
    if kept not in ("fp32", computed) and computed != "fp32":
        raise CvxError(
            f"latents in {kept} cannot go through a transformer in {computed}: diffusers refuses it, too",
            fix=f"use --latents-dtype {computed}, or export with --precision {kept}",
        )
    if request.latents is not None:
        _check_values("latents", request.latents, request)


def _check_values(name: str, latents: Latents, request: RunRequest) -> None:
    if request.latents_dtype != "fp32" and not is_kept(latents, request.latents_dtype):
        raise CvxError(
            f"{name} hold values that {request.latents_dtype} has not",
            fix=f"use latents of a run with --latents-dtype {request.latents_dtype}, or leave that out",
        )


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


def scheduler_for(manifest: Manifest, request: RunRequest) -> Scheduler:
    """Return the sampler of one video, fresh.

    Raises:
        CvxError: It has no such number of steps, or none to take.
    """
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
    return make_scheduler(kind, config, request.steps, start, request.latents_dtype)


_SCHEDULER_CLASSES = {"ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"}


def _prompt_embeds(
    backend: Backend, request: RunRequest, cache: PromptCache | None, progress: Progress, report: RunReport
) -> list[NDArray[np.float32]]:
    """Return for every prompt (1, S, D), or with guidance (2, S, D), negative first."""
    embeddings, report.cached_prompts = embed(backend, texts(request), cache, progress)
    positive = request.prompt_embeds
    if positive is None:
        positive = np.stack([embeddings[prompt] for prompt in request.prompts])
    if not request.is_guided:
        return [embeds[None] for embeds in positive]
    negative = request.negative_prompt_embeds
    if negative is None:
        negative = np.stack([embeddings[request.negative_prompt]] * len(positive))
    return [np.stack(pair) for pair in zip(negative, positive, strict=True)]


def _write_latents(path: Path, latents: Latents) -> None:
    with staged_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, latents)


def _read_latents(path: Path, plan: Plan) -> Latents:
    array = latents_header(path)
    _, padded, *rest = plan.latent_shape
    expected = (padded - plan.padding, *rest)
    if array.dtype != np.float32 or array.shape[1:] != expected or not len(array):
        raise ShapeError(
            f"{path} holds {array.dtype} of shape {array.shape}, not float32 (videos, {', '.join(map(str, expected))})",
            fix="use latents made with a bundle of this shape",
        )
    if not all(np.isfinite(video).all() for video in array):
        raise MediaError(f"{path} holds values that are not finite numbers", fix="make the latents again")
    return np.array(array)
