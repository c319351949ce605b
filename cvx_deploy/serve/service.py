"""What clients can do, without a word of HTTP: ask for videos, look at them, end and delete them."""

import hashlib
import shutil
import tempfile
import threading
from dataclasses import dataclass
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.errors import CvxError
from cvx_deploy.files import free_space
from cvx_deploy.media.read import check_pixels, frames_of, load_image, load_video
from cvx_deploy.serve.faults import ApiError
from cvx_deploy.serve.files import VARIANTS, JobFiles, Variant
from cvx_deploy.serve.hub import Hub
from cvx_deploy.serve.jobs import ENDED, FullError, Job, JobStore, New, Source, Spec, new_id
from cvx_deploy.serve.schemas import Asked, Extended, Remixed, seconds_of, video_object
from cvx_deploy.serve.settings import ServeSettings
from cvx_deploy.serve.specs import Continued, goes_on, size_of, spec_of, stating
from cvx_deploy.serve.supervisor import Supervisor

_ROOM = 1 << 28  # bytes that have to be free where videos are written
_LONGEST_KEY = 255
_LONGEST_WAIT = 3600
_SHORTEST_POLL, _LONGEST_POLL = 0.5, 10.0  # seconds between two looks at a job


@dataclass(frozen=True)
class Upload:
    """A file that a client has sent, as ``input_reference`` or ``video``."""

    kind: Source
    content: bytes


class Service:
    """See the module. Its methods block, and may be called from any thread."""

    def __init__(self, settings: ServeSettings, store: JobStore, hub: Hub, supervisor: Supervisor) -> None:
        self.settings, self.store, self.hub, self.supervisor = settings, store, hub, supervisor
        self._decoding = threading.Lock()  # one picture at a time, so that what they take is bounded

    def create(
        self,
        owner: str,
        asked: Asked,
        upload: Upload | None,
        idempotency: str | None,
        remixed_from: Job | None = None,
        source_job: Job | None = None,
        continued: Continued | None = None,
    ) -> Job:
        """Put a video into the queue.

        Args:
            owner: Who asks.
            asked: For what.
            upload: The image, or the clip, that it starts from.
            idempotency: A word of the client; asked under it again, the same job is returned.
            remixed_from: The job that this one repeats with another prompt, from the same source.
            source_job: A completed job whose video this one starts from.
            continued: A video that comes first.

        Raises:
            ApiError: It cannot be made, or not now.
        """
        digest = _digest(asked, upload, continued, remixed_from, source_job)
        _check_idempotency(idempotency)
        if idempotency is not None and (there := self.store.repeated(owner, idempotency)) is not None:
            return _the_same(there, digest)
        if free_space(self.settings.data) < _ROOM:
            raise ApiError(503, "the disk for videos is full. fix: delete some, or come again later.", "disk_full")
        name, bundle = self._named(asked.model)
        source: Source | None = None if upload is None else upload.kind
        if source_job is not None:
            source = "video"
        elif remixed_from is not None:
            source = remixed_from.spec.source
        elif continued is not None:
            source = "extension"
        spec = spec_of(asked, name, self.settings.models, source, self.settings.limits, continued)
        identifier = new_id()
        files = self.files(identifier)
        try:
            with stating():
                if continued is not None:
                    files.keep_video(continued.path)
                else:
                    self._keep_source(files, spec, bundle, upload, remixed_from, source_job)
            job = self._added(
                New(
                    id=identifier,
                    owner=owner,
                    spec=spec,
                    digest=digest,
                    idempotency=idempotency,
                    remixed_from=None if remixed_from is None else remixed_from.id,
                )
            )
        except BaseException:
            files.remove()
            raise
        if job.id != identifier:  # the same was asked for at the same moment
            files.remove()
            return _the_same(job, digest)
        self.supervisor.wake()
        return job

    def find(self, owner: str, identifier: str) -> Job:
        """Return a job of an owner.

        Raises:
            ApiError: There is none; those of others are as if they were not there.
        """
        job = self.store.find(identifier, owner)
        if job is None:
            raise ApiError(404, "there is no such video. fix: list those there are.", "not_found")
        return job

    def shown(self, job: Job) -> dict[str, Any]:
        """Return a job as clients see it."""
        ahead = self.store.ahead(job) if job.status == "queued" else None
        return video_object(job, self.hub.progress(job.id, job.progress), ahead)

    def poll_after(self, job: Job) -> int:
        """Return the milliseconds after which it makes sense to look at a job again: not before its turn may come."""
        turns = self.store.ahead(job) / len(self.settings.devices) if job.status == "queued" else 0.0
        wait = turns * self.store.mean_seconds() if turns else 0.0
        return round(1000 * min(max(wait, _SHORTEST_POLL), _LONGEST_POLL))

    def page(self, owner: str, after: str | None, limit: int, *, ascending: bool) -> dict[str, Any]:
        """Return some of an owner's jobs."""
        last = None if after is None else self.find(owner, after)
        jobs = self.store.page(owner, last, limit + 1, ascending=ascending)
        shown = [self.shown(job) for job in jobs[:limit]]
        return {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
            "has_more": len(jobs) > limit,
        }

    def cancel(self, owner: str, identifier: str) -> Job:
        """End a job; one that has ended stays as it is."""
        job = self.find(owner, identifier)
        if job.status in ENDED:
            return job
        job = self.store.cancel(job.id)
        if job.status == "in_progress":
            self.supervisor.cancel(job.id)
        else:
            self.hub.ended(job.id)
        return job

    def delete(self, owner: str, identifier: str) -> None:
        """Forget a job and remove its files.

        Raises:
            ApiError: It runs.
        """
        job = self.find(owner, identifier)
        if not self.store.discard(job.id):
            raise ApiError(400, "this video is being made. fix: cancel it first, or wait for it.", "video_in_progress")
        self.files(job.id).remove()
        self.hub.ended(job.id)

    def remix(self, owner: str, identifier: str, remixed: Remixed, idempotency: str | None) -> Job:
        """Make a video again from the same source with another prompt, of the same seed unless one is given."""
        job = self.find(owner, identifier)
        spec = job.spec
        if spec.source == "extension":
            message = "an extension is not remixed. fix: extend the video that it continues again."
            raise ApiError(400, message, "unsupported")
        asked = Asked(
            prompt=remixed.prompt,
            model=spec.model,
            size=f"{spec.width}x{spec.height}",
            num_frames=spec.frames,
            fps=spec.fps,
            negative_prompt=spec.negative_prompt,
            num_inference_steps=spec.steps,
            guidance_scale=spec.guidance_scale,
            seed=spec.seed if remixed.seed is None else remixed.seed,
            strength=spec.strength,
            cache=spec.cache,
        )
        return self.create(owner, asked, None, idempotency, remixed_from=job)

    def extend(self, owner: str, more: Extended, upload: Upload | None, idempotency: str | None) -> Job:
        """Continue a completed video of the owner's, or one that is sent; what is made begins with it.

        Raises:
            ApiError: There is no such video, or nothing that goes on from it.
        """
        if upload is not None:
            with tempfile.TemporaryDirectory(dir=self.settings.data, prefix=".upload-") as folder:
                path = Path(folder) / "video"
                path.write_bytes(upload.content)
                return self._extended(owner, more, self._sent(path, more), upload, idempotency)
        identifier = (more.video or {}).get("id")
        if identifier is None:
            raise ApiError(400, 'video is missing. fix: send a file, or {"id": ...}.', "invalid_value", "video")
        job = self.find(owner, identifier)
        path, _ = self.content(owner, identifier, "video")
        spec = job.spec
        there = Continued(path, spec.written, spec.fps, f"{spec.width}x{spec.height}", identifier)
        return self._extended(owner, more, there, None, idempotency, spec.model)

    def _extended(
        self,
        owner: str,
        more: Extended,
        there: Continued,
        upload: Upload | None,
        idempotency: str | None,
        model: str | None = None,
    ) -> Job:
        asked = Asked(
            prompt=more.prompt,
            model=more.model or model,
            seconds=more.seconds,
            fps=there.fps,
            negative_prompt=more.negative_prompt,
            num_inference_steps=more.num_inference_steps,
            guidance_scale=more.guidance_scale,
            seed=more.seed,
        )
        return self.create(owner, asked, upload, idempotency, continued=there)

    def _sent(self, path: Path, more: Extended) -> Continued:
        """Look at a video that was sent: it is taken at the model's size and rate."""
        _, bundle = self._named(more.model)
        shape, most = bundle.shapes[0], self.settings.limits.frames
        try:
            with self._decoding:
                frames = sum(1 for _ in islice(frames_of(path, shape.height, shape.width), most + 1))
        except CvxError as error:
            what = error.what.replace(str(path), path.name)
            raise ApiError(400, f"{what}. fix: {error.fix}.", "invalid_video", "video") from error
        if not 0 < frames <= most:
            raise ApiError(400, f"the video has not 1 to {most} frames. fix: send another.", "too_long", "video")
        return Continued(path, frames, bundle.manifest.fps, size_of(shape))

    def content(self, owner: str, identifier: str, variant: Variant) -> tuple[Path, str]:
        """Return the file and the type of what a job has made.

        Raises:
            ApiError: It has not made it.
        """
        job = self.find(owner, identifier)
        path = self.files(job.id).path(variant)
        if job.status != "completed" or not path.is_file():
            raise ApiError(
                400, f"this video is {job.status.replace('_', ' ')}. fix: wait until it is completed.", "not_completed"
            )
        return path, VARIANTS[variant][1]

    def files(self, identifier: str) -> JobFiles:
        """Return the files of a job whose id is this server's own."""
        return JobFiles(self.supervisor.folder(identifier))

    def models(self) -> list[dict[str, Any]]:
        """Return every model, with the sizes that it makes."""
        return [
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": "cvx-deploy",
                "task": bundle.manifest.traits.task,
                "source": source_of(bundle),
                "sizes": [
                    {
                        "size": size_of(shape),
                        "num_frames": shape.frames,
                        "fps": bundle.manifest.fps,
                        "seconds": seconds_of(shape.frames, bundle.manifest.fps),
                    }
                    for shape in bundle.shapes
                ],
                "image_model": goes_on(name, self.settings.models),
                "defaults": msgspec.to_builtins(bundle.manifest.defaults),
            }
            for name, bundle in self.settings.models.items()
        ]

    def _added(self, new: New) -> Job:
        limits = self.settings.limits
        try:
            return self.store.add(new, limits.queue, limits.jobs_per_key, len(self.settings.devices))
        except FullError as error:
            wait = min(max(ceil(error.seconds), 1), _LONGEST_WAIT)
            which = f"you have {limits.jobs_per_key} jobs" if error.own else f"{limits.queue} jobs wait"
            message = f"{which}, and no more are taken. fix: come again in {wait} s."
            raise ApiError(429, message, "queue_full", retry_after=wait) from error

    def _named(self, name: str | None) -> tuple[str, Bundle]:
        models = self.settings.models
        if name is None:
            return next(iter(models.items()))
        if name not in models:
            raise ApiError(
                404, f"there is no model of that name. fix: use {', '.join(models)}.", "model_not_found", "model"
            )
        return name, models[name]

    def _keep_source(
        self,
        files: JobFiles,
        spec: Spec,
        bundle: Bundle,
        upload: Upload | None,
        remixed_from: Job | None,
        source_job: Job | None,
    ) -> None:
        if remixed_from is not None and spec.source is not None:
            files.take_source_of(self.files(remixed_from.id))
        elif source_job is not None:
            files.keep_source(self._clip(self.files(source_job.id).path("video"), spec))
        elif upload is not None:
            with tempfile.TemporaryDirectory(dir=self.settings.data, prefix=".upload-") as folder:
                path = Path(folder) / ("video" if upload.kind == "video" else "input_reference")
                path.write_bytes(upload.content)
                try:
                    pixels = self._clip(path, spec) if upload.kind == "video" else self._picture(path, spec)
                except CvxError as error:
                    what = error.what.replace(str(path), path.name)
                    raise ApiError(400, f"{what}. fix: {error.fix}.", "invalid_image", path.name) from error
            files.keep_source(pixels)

    def _picture(self, path: Path, spec: Spec) -> NDArray[np.uint8]:
        with self._decoding:
            check_pixels(path, self.settings.limits.image_pixels)
            frames = _bytes_of(load_image(path, spec.height, spec.width))
        return frames.reshape(spec.height, spec.width, 3)

    def _clip(self, path: Path, spec: Spec) -> NDArray[np.uint8]:
        with self._decoding:
            return _bytes_of(load_video(path, spec.frames, spec.height, spec.width).pixels)


def source_of(bundle: Bundle) -> Source | None:
    """Return what a bundle's videos start from, or can, beside their prompt."""
    if bundle.manifest.traits.task == "image-to-video":
        return "image"
    return "video" if bundle.has("vae_encoder") else None


def _check_idempotency(key: str | None) -> None:
    if key is not None and not (0 < len(key) <= _LONGEST_KEY and key.isprintable()):
        raise ApiError(
            400,
            f"the idempotency key is no plain word. fix: use 1 to {_LONGEST_KEY} characters.",
            "invalid_value",
            "Idempotency-Key",
        )


def _the_same(job: Job, digest: str) -> Job:
    if job.digest != digest:
        raise ApiError(
            400,
            "that idempotency key was used for another request. fix: use a new one.",
            "idempotency_error",
            "Idempotency-Key",
        )
    return job


def _digest(asked: Asked, upload: Upload | None, continued: Continued | None, *jobs: Job | None) -> str:
    before = [None if job is None else job.id for job in jobs]
    follows = [] if continued is None else ["extension", continued.job]
    digest = hashlib.sha256(msgspec.json.encode([asked, *before, *follows]))
    if upload is not None:
        digest.update(upload.kind.encode() + b"\0" + upload.content)
    return digest.hexdigest()


def _bytes_of(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Turn pixels (1, 3, F, H, W) that were made of bytes back into them, (F, H, W, 3)."""
    unit = (pixels[0].transpose(1, 2, 3, 0) + 1) * 127.5
    return np.ascontiguousarray(np.rint(unit).astype(np.uint8))


def sweep(service: Service) -> int:
    """Remove what has expired and what is beyond the disk budget; return how many jobs went."""
    store, budget = service.store, service.settings.disk
    going = {job.id for job in store.expired()}
    if budget is not None:
        going |= {job.id for job in store.beyond(budget)}
    for identifier in going:
        if store.remove(identifier):
            service.files(identifier).remove()
    return len(going)


def sweep_orphans(store: JobStore, data: Path) -> None:
    """Remove folders that belong to no job, which a server that was killed may leave."""
    known = store.ids()
    for folder in (data / "videos").glob("video_*"):
        if folder.name not in known:
            shutil.rmtree(folder, ignore_errors=True)
    for folder in data.glob(".upload-*"):
        shutil.rmtree(folder, ignore_errors=True)
