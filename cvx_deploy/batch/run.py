"""A batch from its first missing video to its last, whoever makes them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cvx_deploy.batch.lines import Task
from cvx_deploy.batch.make import made
from cvx_deploy.batch.manifest import Record, manifest_of
from cvx_deploy.pipeline.pipeline import Pipeline
from cvx_deploy.progress import Progress

Makes = Callable[[list[Task], Path], Iterator[Record]]
"""Makes videos in a folder, in any order, and yields the record of each when its file is there."""


def batch(tasks: list[Task], folder: Path, makes: Makes, progress: Progress) -> dict[str, Any]:
    """Make what is missing in a folder, and return what is there then.

    Args:
        tasks: All that is wanted.
        folder: Where the videos and their manifest are.
        makes: Makes them.
        progress: Told of every video.

    Raises:
        OutputError: Another batch has the folder, or it cannot be written.
        CvxError: No video can be made; those that were made before are kept, and noted.
    """
    with manifest_of(folder) as manifest:
        missing = [task for task in tasks if not manifest.is_done(task)]
        missing.sort(key=lambda task: str(task.shape))  # the networks of a shape are loaded once
        with progress.task(f"{len(missing)} of {len(tasks)} videos", len(missing)) as advance:
            for record in makes(missing, folder) if missing else ():
                manifest.note(record)
                if record.error:
                    progress.note(f"note: {record.id}: {record.error}")
                advance(1)
        records = [manifest.records[task.id] for task in tasks if task.id in manifest.records]
    errors = {record.id: record.error for record in records if record.error}
    return {
        "videos": len(tasks),
        "made": len(missing) - len(errors),
        "there_before": len(tasks) - len(missing),
        "failed": errors,
        "folder": str(folder),
    }


def here(pipeline: Pipeline) -> Makes:
    """Return what makes videos in this process, one after the other."""

    def makes(tasks: list[Task], folder: Path) -> Iterator[Record]:
        for task in tasks:
            yield made(pipeline, task, folder)

    return makes
