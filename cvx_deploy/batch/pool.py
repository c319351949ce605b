"""A batch on the nodes of a Ray cluster: an actor pool of Ray Data, whose files come back to this machine."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import ray
import ray.data

from cvx_deploy.batch.lines import Task
from cvx_deploy.batch.make import failed, made
from cvx_deploy.batch.manifest import Record
from cvx_deploy.batch.run import Makes
from cvx_deploy.cluster.bundles import Known, at_hand
from cvx_deploy.cluster.source import sender_of
from cvx_deploy.engines.registry import engine_spec
from cvx_deploy.engines.spec import EngineName
from cvx_deploy.errors import CvxError, EngineError
from cvx_deploy.files import staged_file
from cvx_deploy.pipeline.pipeline import Pipeline
from cvx_deploy.terminal import reason

_TRIES = 3  # of a video whose worker or node dies
Row = dict[str, Any]


@dataclass(frozen=True)
class Pool:
    """Workers that are alike.

    Attributes:
        bundle: What they run, and `source` the actor that gives it to them.
        engine: What runs it, with `threads` and `vram`.
        count: How many there are to be.
        cpus: That each takes; 0 where it takes a GPU.
    """

    bundle: Known
    source: Any
    engine: EngineName
    threads: int | None
    vram: int | None
    count: int
    cpus: int


class Maker:
    """One worker of a pool, on some node, whose networks stay loaded."""

    def __init__(self, pool: Pool) -> None:
        self._pipeline: Pipeline | None = None
        self._stop: Row = {}
        try:
            compiled = engine_spec(pool.engine).compiled
            self._pipeline = Pipeline.from_bundle(
                at_hand(pool.bundle, sender_of(pool.source), compiled=compiled),
                engine=pool.engine,
                devices=() if pool.cpus else (0,),
                threads=pool.threads,
                vram=pool.vram,
            )
        except CvxError as error:
            self._stop = _stop(error)

    def __call__(self, row: Row) -> Row:
        """Make a video: a row with a task and its sources gives one with its record and its file."""
        if self._pipeline is None:
            return self._stop
        task = msgspec.json.decode(row["task"], type=Task)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            try:
                record = made(self._pipeline, _with_source(task, row["source"], folder), folder)
            except CvxError as error:
                return _stop(error)
            content = b"" if record.error else (folder / record.file).read_bytes()
        return _row(msgspec.json.encode(record), content)


def spread(pool: Pool) -> Makes:
    """Return what makes videos with a pool; one whose worker dies is made by another, three times at the most."""

    def makes(tasks: list[Task], folder: Path) -> Iterator[Record]:
        open_ones = {task.id: task for task in tasks}
        for row in _rows(pool, tasks):
            record = _kept(row, folder)
            if open_ones.pop(record.id, None) is not None:
                yield record
        for task in open_ones.values():
            yield failed(task, f"its worker died {_TRIES} times", 0.0)

    return makes


def _rows(pool: Pool, tasks: list[Task]) -> Iterator[Row]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a video takes as long as it takes
    context.max_errored_blocks = len(tasks)  # a video that kills every worker ends itself, and not the batch
    takes = {"num_cpus": pool.cpus} if pool.cpus else {"num_gpus": 1}
    rows = [{"task": msgspec.json.encode(task), "source": _source_of(task)} for task in tasks]
    videos = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        Maker,
        fn_constructor_args=(pool,),
        compute=ray.data.ActorPoolStrategy(size=pool.count, max_tasks_in_flight_per_actor=1),
        ray_remote_args_fn=lambda: {"max_task_retries": _TRIES - 1},
        **takes,
    )
    try:
        yield from videos.iter_rows()
    except ray.exceptions.RayError as error:
        what = f"the Ray cluster cannot go on with the batch: {reason(error)}"
        raise EngineError(what, fix="see that its nodes are up, and run the command again") from error


def _kept(row: Row, folder: Path) -> Record:
    """Put a video into the folder, and return its record."""
    if row["what"]:
        raise EngineError(f"a node cannot make videos: {row['what']}", fix=row["fix"])
    record = msgspec.json.decode(row["record"], type=Record)
    if not record.error:
        with staged_file(folder / record.file) as temporary:
            temporary.write_bytes(row["content"])
    return record


def _source_of(task: Task) -> bytes:
    path = task.line.image or task.line.video
    return b"" if path is None else Path(path).read_bytes()


def _with_source(task: Task, source: bytes, folder: Path) -> Task:
    """Put what a video starts from where it is made."""
    for name in ("image", "video"):
        if (path := getattr(task.line, name)) is not None:
            here = folder / f"source{Path(path).suffix}"
            here.write_bytes(source)
            return msgspec.structs.replace(task, line=msgspec.structs.replace(task.line, **{name: str(here)}))
    return task


def _row(record: bytes = b"", content: bytes = b"", what: str = "", fix: str = "") -> Row:
    return {"record": record, "content": content, "what": what, "fix": fix}


def _stop(error: CvxError) -> Row:
    return _row(what=error.what, fix=error.fix)
