"""A batch on the nodes of a Ray cluster: an actor for each worker, whose files come back to this machine.

Not with Ray Data, whose pool of actors once waited without end for what a dead node had begun, and which brings 250 MB
along.
"""

import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray.exceptions import RayError

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
_MOST_LOST = 10
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

    def ready(self) -> Row:
        """Return a row that says whether it can make videos."""
        return self._stop or _row()

    def make(self, row: Row) -> Row:
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
        crew = _Crew(pool, tasks)
        while (ended := crew.next()) is not None:
            yield ended if isinstance(ended, Record) else _kept(ended, folder)

    return makes


class _Crew:
    """The actors of a pool, and what each of them is at."""

    def __init__(self, pool: Pool, tasks: list[Task]) -> None:
        takes = {"num_cpus": pool.cpus} if pool.cpus else {"num_gpus": 1}
        self._actors = ray.remote(Maker).options(scheduling_strategy="SPREAD", max_restarts=0, **takes)
        self._pool, self._tries = pool, dict.fromkeys((task.id for task in tasks), 0)
        self._waiting = deque(tasks)
        self._at: dict[Any, tuple[Any, Task | None]] = {}  # by what is awaited: an actor, and its task or none
        self._idle: list[Any] = []
        self._lost = 0  # actors in a row that never came up
        for _ in range(min(pool.count, len(tasks))):
            self._hire()

    def next(self) -> Row | Record | None:
        """Return the next row that an actor gives back, or the record of a video that is given up; None at the end.

        Raises:
            EngineError: No actor comes up.
        """
        while self._waiting or any(task is not None for _, task in self._at.values()):
            self._hand_out()
            [ended], _ = ray.wait(list(self._at))
            actor, task = self._at.pop(ended)
            try:
                row = Row(ray.get(ended))
            except RayError as error:
                if (given_up := self._lose(actor, task, error)) is not None:
                    return given_up
                continue
            self._lost = 0
            self._idle.append(actor)
            if task is not None or row["what"]:
                return row
        return None

    def _hire(self) -> None:
        actor = self._actors.remote(self._pool)
        self._at[actor.ready.remote()] = actor, None

    def _hand_out(self) -> None:
        while self._waiting and self._idle:
            actor, task = self._idle.pop(), self._waiting.popleft()
            row = {"task": msgspec.json.encode(task), "source": _source_of(task)}
            self._at[actor.make.remote(row)] = actor, task

    def _lose(self, actor: Any, task: Task | None, error: RayError) -> Record | None:
        """Let another actor take the place of one that has gone, and another try that of its task's."""
        ray.kill(actor)
        self._hire()
        if task is None:
            self._lost += 1
            if self._lost > _MOST_LOST:
                what = f"no worker comes up on the Ray cluster: {reason(error)}"
                raise EngineError(what, fix="see that its nodes are up, and have this program")
            return None
        self._tries[task.id] += 1
        if self._tries[task.id] < _TRIES:
            self._waiting.appendleft(task)
            return None
        return failed(task, f"its worker died {_TRIES} times", 0.0)


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
