"""Between pixels and latents: what a run starts from, encoded, and what it ends with, decoded."""

from collections.abc import Generator, Iterator
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.engines.backend import Backend
from cvx_deploy.families.cogvideox.vae import VaeHalf
from cvx_deploy.media.read import load_image, load_video
from cvx_deploy.pipeline import vae
from cvx_deploy.pipeline.events import Frames
from cvx_deploy.pipeline.noise import Generator as NoiseGenerator
from cvx_deploy.pipeline.report import RunReport
from cvx_deploy.pipeline.request import RunRequest
from cvx_deploy.pipeline.rounding import rounded
from cvx_deploy.pipeline.sampler import Latents
from cvx_deploy.pipeline.windows import Plan
from cvx_deploy.progress import Progress
from cvx_deploy.shape import Shape


def source_pixels(shape: Shape, request: RunRequest, progress: Progress) -> vae.Clip | None:
    """Return the image or the clip that a run starts from, (1, 3, F, H, W) in [-1, 1]."""
    if isinstance(request.image, np.ndarray):
        return request.image
    if request.image is not None:
        return load_image(request.image, shape.height, shape.width)
    if request.video is None or isinstance(request.video, np.ndarray):
        return request.video
    clip = load_video(request.video, shape.frames, shape.height, shape.width)
    if clip.total_frames is not None and clip.total_frames > shape.frames:
        progress.note(f"note: {request.video} has {clip.total_frames} frames; the first {shape.frames} are used")
    return clip.pixels


def encoded(
    backend: Backend,
    request: RunRequest,
    plan: Plan,
    pixels: vae.Clip | None,
    generators: list[NoiseGenerator],
    progress: Progress,
) -> list[Latents | None]:
    """Return for every video the latents of the image or clip it starts from, (1, f, C, H, W), unscaled."""
    if pixels is None:
        return [None] * len(generators)
    half = backend.bundle.family.vae.encoder(backend.bundle.manifest.vae)
    with progress.task(
        "encode " + ("video" if request.image is None else "image"), _passes(backend, half, request, plan, pixels)
    ) as advance:
        posterior = vae.encode(
            backend,
            pixels,
            tiled=request.vae_tiling,
            advance=advance,
            kept=request.latents_dtype,
            plane=plan.plane,
        )
    return [posterior.sample(generator).transpose(0, 2, 1, 3, 4) for generator in generators]


def decoded(
    backend: Backend, request: RunRequest, plan: Plan, latents: Latents, progress: Progress, report: RunReport
) -> Generator[Frames, None, None]:
    """Yield the frames of every video, as its chunks decode."""
    manifest = backend.bundle.manifest
    clips = plan.with_context(latents)
    passes = _passes(backend, backend.bundle.family.vae.decoder, request, plan, clips.transpose(0, 2, 1, 3, 4))
    with progress.task("decode", passes * len(clips)) as advance:
        for index, clip in enumerate(clips):
            # diffusers computes 1 / scale in double and multiplies
            scaled = clip[None].transpose(0, 2, 1, 3, 4)
            unscaled = rounded(np.float32(1 / manifest.vae.scaling_factor) * scaled, request.latents_dtype)
            pieces = vae.decode(backend, unscaled, tiled=request.vae_tiling, advance=advance, plane=plan.plane)
            with closing(pieces):
                start = 0
                for frames in _of_video(_timed(pieces, report), plan):
                    yield Frames(index, start, frames)
                    start += len(frames)


def _passes(backend: Backend, half: VaeHalf, request: RunRequest, plan: Plan, clip: vae.Clip) -> int:
    """Return how many passes through its networks a half of the VAE needs for a clip."""
    chunks = vae.count_chunks(backend, half, clip.shape[2])
    if plan.plane is not None:
        return chunks * len(plan.rows.starts) * len(plan.columns.starts)
    return chunks * (vae.count_tiles(backend, half, *clip.shape[3:]) if request.vae_tiling else 1)


def _timed(pieces: Iterator[vae.Clip], report: RunReport) -> Iterator[vae.Clip]:
    while True:
        with report.stage("vae decode"):
            piece = next(pieces, None)
        if piece is None:
            return
        yield piece


def _of_video(pieces: Iterator[vae.Clip], plan: Plan) -> Iterator[NDArray[np.float32]]:
    """Yield the frames that are the video's, without those of latents before it and of latents filled up."""
    skip, left = plan.context_frames, plan.shape.frames
    for piece in pieces:
        frames = _frames(piece)[skip : skip + left]
        skip, left = max(skip - piece.shape[2], 0), left - len(frames)
        if len(frames):
            yield frames


def _frames(piece: vae.Clip) -> NDArray[np.float32]:
    """Turn pixels (1, 3, n, H, W) in about [-1, 1] into frames (n, H, W, 3) in [0, 1]."""
    frames: NDArray[np.float32] = np.clip(piece[0].transpose(1, 2, 3, 0) / 2 + 0.5, 0, 1)
    return frames
