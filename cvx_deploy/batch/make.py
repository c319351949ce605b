"""One video of a batch: its file, and the record of it."""

import time
from contextlib import closing
from pathlib import Path

from cvx_deploy.batch.lines import Task
from cvx_deploy.batch.manifest import Record
from cvx_deploy.errors import BundleError, CvxError, EngineError, OutOfMemoryError, OutputError
from cvx_deploy.files import sha256_of
from cvx_deploy.media.encoders import VideoFormat
from cvx_deploy.media.write import open_writer
from cvx_deploy.pipeline.events import Frames, Step
from cvx_deploy.pipeline.pipeline import Pipeline


def made(pipeline: Pipeline, task: Task, folder: Path) -> Record:
    """Make a video in a folder, and return its record: with the reason, where it is this one that cannot be made.

    Raises:
        CvxError: None can be made: the engine, the bundle or the folder is not as it should be.
    """
    file, start = folder / f"{task.id}.mp4", time.monotonic()
    try:
        steps = _write(pipeline, task, file)
    except OutOfMemoryError as error:
        return failed(task, str(error), time.monotonic() - start)
    except (EngineError, BundleError, OutputError):
        raise
    except CvxError as error:
        return failed(task, str(error), time.monotonic() - start)
    return Record(
        id=task.id,
        seed=task.line.seed or 0,
        digest=task.digest,
        seconds=round(time.monotonic() - start, 3),
        file=file.name,
        sha256=sha256_of(file),
        size=file.stat().st_size,
        steps=steps,
    )


def failed(task: Task, why: str, seconds: float) -> Record:
    """Return the record of a video that is not there."""
    return Record(task.id, task.line.seed or 0, task.digest, round(seconds, 3), error=why)


def _write(pipeline: Pipeline, task: Task, file: Path) -> str:
    """Write a video, and return which steps were taken."""
    shape = task.shape
    form = VideoFormat(shape.frames, shape.height, shape.width, task.fps)
    run = forecast = 0
    with open_writer(file, form) as writer, closing(pipeline.stream(**task.arguments())) as stream:
        for event in stream:
            if isinstance(event, Step):
                run, forecast = run + (not event.forecast), forecast + event.forecast
            elif isinstance(event, Frames):
                writer.write(event.frames)
    return f"{run} run, {forecast} forecast" if forecast else f"{run} run"
