"""The queue and the record of what was made: one SQLite file, where a job is before anybody is told of it.

``queued`` jobs become ``in_progress``, and end as ``completed``, ``failed`` or ``cancelled``, once. Each change is one
transaction that says which state it leaves, so that a late word of a worker changes nothing.
"""

import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from cvx_deploy.errors import CvxError
from cvx_deploy.media.interpolation import Rate

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
Source = Literal["image", "video", "extension"]
ENDED = ("completed", "failed", "cancelled")
_VERSION = 1
_RECENT = 20  # jobs whose time is that of the next one
_GUESS = 10.0  # seconds of a job before any has ended

_SCHEMA = f"""
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN {get_args(Status)}),
    spec TEXT NOT NULL,
    created REAL NOT NULL,
    started REAL,
    ended REAL,
    expires REAL,
    progress INTEGER NOT NULL DEFAULT 0,
    error_code TEXT,
    error_message TEXT,
    remixed_from TEXT,
    idempotency TEXT,
    digest TEXT NOT NULL,
    cancelling INTEGER NOT NULL DEFAULT 0,
    crashes INTEGER NOT NULL DEFAULT 0,
    size INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX once ON jobs (owner, idempotency) WHERE idempotency IS NOT NULL;
CREATE INDEX by_status ON jobs (status, owner, seq);
CREATE INDEX by_owner ON jobs (owner, seq);
CREATE TABLE turns (owner TEXT PRIMARY KEY, turn INTEGER NOT NULL);
PRAGMA user_version = {_VERSION};
"""
_INDEX = "CREATE INDEX IF NOT EXISTS by_end ON jobs (status, ended)"  # for the last ones that ended


class Spec(msgspec.Struct, frozen=True):
    """What a job makes, complete: every default filled in, the seed drawn.

    Attributes:
        frames: How many the models make; with more than they make a second there are others between them.
        fps: Frames a second of the file.
        source: What lies beside it: the first frame, or a clip to start from, in ``source.npy``; or a video that is
            continued, in ``source.mp4``.
        made_fps: Frames a second that the models make; None for `fps`.
        image_model: What makes the clips of a chain after the first one.
        left_open: What each model of a chain has a default of its own for, and was not said.
        extends: Frames of the video that is continued, which come first.
    """

    model: str
    prompt: str
    negative_prompt: str
    frames: int
    height: int
    width: int
    fps: int
    steps: int
    guidance_scale: float
    seed: int
    strength: float | None = None
    cache: Literal["fixed", "adaptive"] | None = None
    source: Source | None = None
    made_fps: int | None = None
    image_model: str | None = None
    left_open: tuple[str, ...] = ()
    extends: int = 0

    @property
    def rate(self) -> Rate:
        """Frames a second that are made, and that are written."""
        return Rate(self.fps if self.made_fps is None else self.made_fps, self.fps)

    @property
    def written(self) -> int:
        """Frames of the file."""
        if self.extends:  # the new ones, and those between them, follow the last one that is there
            return self.extends + self.rate.count(self.frames + 1) - 1
        return self.rate.count(self.frames)

    @property
    def interpolated(self) -> int:
        """How many of those no model made, as far as this job goes."""
        return self.written - self.extends - self.frames


class Job(msgspec.Struct, frozen=True):
    """A row of the queue.

    Attributes:
        owner: The name of the key that asked for it; empty where nobody is asked for one.
        progress: Percent, when a point of it was saved last.
        cancelling: Whether it is to end.
        crashes: How many workers died of it since it last got further.
        size: Bytes of its files.
    """

    seq: int
    id: str
    owner: str
    status: Status
    spec: Spec
    created: float
    started: float | None
    ended: float | None
    expires: float | None
    progress: int
    error_code: str | None
    error_message: str | None
    remixed_from: str | None
    idempotency: str | None
    digest: str
    cancelling: bool
    crashes: int
    size: int


class New(msgspec.Struct, frozen=True, kw_only=True):
    """A job that is not in the queue yet; `digest` is of all that the client sent."""

    id: str
    owner: str
    spec: Spec
    digest: str
    idempotency: str | None = None
    remixed_from: str | None = None


class FullError(Exception):
    """No more jobs are taken now; `seconds` until one ends, and whether it is this key that has too many."""

    def __init__(self, seconds: float, *, own: bool) -> None:
        super().__init__()
        self.seconds, self.own = seconds, own


def new_id() -> str:
    """Return an id that nobody can guess."""
    return f"video_{secrets.token_hex(16)}"


class JobStore:
    """The jobs of a data folder. Its methods may be called from any thread.

    Args:
        path: The SQLite file; it is made when it is not there.
        retention: Seconds that an ended job is kept.

    Raises:
        CvxError: The file is of another program, or damaged.
    """

    def __init__(self, path: Path, retention: float) -> None:
        self._retention = retention
        self._lock, self._reading = threading.RLock(), threading.Lock()
        self._thread = threading.local()
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, timeout=30)
            # Who only looks does not wait until another's change is on the disk.
            self._reader = sqlite3.connect(path, check_same_thread=False, timeout=30)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                self._db.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
            elif version != _VERSION:
                raise CvxError(f"{path} is of version {version}, not {_VERSION}", fix="choose another --data folder")
            self._db.execute(_INDEX)
        except sqlite3.Error as error:
            raise CvxError(f"{path} is no queue of jobs: {error}", fix="choose another --data folder") from error

    def close(self) -> None:
        """Let go of the file."""
        with self._lock, self._reading:
            self._reader.close()
            self._db.close()

    def add(self, new: New, queue: int, per_owner: int, workers: int) -> Job:
        """Put a job into the queue; when this returns it is on the disk.

        Args:
            new: It. One with the same idempotency key of the same owner is returned instead, whatever it asks for.
            queue: How many may wait.
            per_owner: How many of one owner may wait or run.
            workers: How many run at a time, for the time that is told to one who has to come again.

        Raises:
            FullError: There are so many.
        """
        with self._changing():
            if new.idempotency is not None and (there := self.repeated(new.owner, new.idempotency)) is not None:
                return there
            own = self._count("owner = ? AND status IN ('queued', 'in_progress')", new.owner)
            if own >= per_owner:
                owners = self._db.execute("SELECT COUNT(DISTINCT owner) FROM jobs WHERE status = 'queued'").fetchone()[
                    0
                ]
                raise FullError(self.mean_seconds() * max(owners, 1) / workers, own=True)
            if self._count("status = 'queued'") >= queue:
                raise FullError(self.mean_seconds() / workers, own=False)
            self._db.execute(
                "INSERT INTO jobs (id, owner, status, spec, created, remixed_from, idempotency, digest) "
                "VALUES (?, ?, 'queued', ?, ?, ?, ?, ?)",
                (
                    *(new.id, new.owner, msgspec.json.encode(new.spec).decode(), time.time()),
                    *(new.remixed_from, new.idempotency, new.digest),
                ),
            )
        return self._one("id = ?", new.id)

    def repeated(self, owner: str, idempotency: str) -> Job | None:
        """Return the job that an owner has asked for under an idempotency key."""
        return self._maybe("owner = ? AND idempotency = ?", owner, idempotency)

    def find(self, identifier: str, owner: str) -> Job | None:
        """Return an owner's job."""
        return self._maybe("id = ? AND owner = ?", identifier, owner)

    def page(self, owner: str, after: Job | None, limit: int, *, ascending: bool) -> list[Job]:
        """Return an owner's jobs in the order they came in, or the other way round, those after one of them."""
        sign, order = (">", "ASC") if ascending else ("<", "DESC")
        where, values = "owner = ?", [owner]
        if after is not None:
            where += f" AND seq {sign} {after.seq}"
        return self._all(f"{where} ORDER BY seq {order} LIMIT {int(limit)}", *values)

    def ahead(self, job: Job) -> int:
        """Return how many jobs that came in before it wait."""
        return self._count("status = 'queued' AND seq < ?", job.seq)

    def claim(self) -> Job | None:
        """Take a job to run: of the owner with the fewest running, then of the one whose turn was longest ago."""
        with self._changing():
            found = self._db.execute(
                """
                SELECT MIN(jobs.seq), jobs.owner, COALESCE(turns.turn, 0),
                    (SELECT COUNT(*) FROM jobs other WHERE other.status = 'in_progress' AND other.owner = jobs.owner)
                FROM jobs LEFT JOIN turns ON turns.owner = jobs.owner
                WHERE jobs.status = 'queued' GROUP BY jobs.owner ORDER BY 4, 3, 1 LIMIT 1
                """
            ).fetchone()
            if found is None:
                return None
            seq, owner = found[:2]
            self._db.execute(
                "INSERT OR REPLACE INTO turns SELECT ?, COALESCE(MAX(turn), 0) + 1 FROM turns",
                (owner,),
            )
            self._db.execute("UPDATE jobs SET status = 'in_progress', started = ? WHERE seq = ?", (time.time(), seq))
        return self._one("seq = ?", seq)

    def got_further(self, identifier: str, progress: int) -> None:
        """Note that a point of a running job was saved: what crashed before it is forgiven."""
        self._change("progress = ?, crashes = 0", identifier, "in_progress", progress)

    def complete(self, identifier: str, size: int) -> bool:
        """End a running job well; False where it is not running any more."""
        return self._end(identifier, "completed", "progress = 100, size = ?", size)

    def fail(self, identifier: str, code: str, message: str) -> bool:
        """End a running job with the reason for its failure."""
        return self._end(identifier, "failed", "error_code = ?, error_message = ?", code, message)

    def cancel(self, identifier: str) -> Job:
        """End a job that waits; note of one that runs that it is to end."""
        with self._changing():
            ended = self._end(identifier, "cancelled", "cancelling = 1", leaving="queued")
            if not ended:
                self._change("cancelling = 1", identifier, "in_progress")
        return self._one("id = ?", identifier)

    def cancelled(self, identifier: str) -> bool:
        """End a running job that was to end."""
        return self._end(identifier, "cancelled", "cancelling = 1")

    def give_back(self, identifier: str, *, crashed: bool) -> Job:
        """Let a running job wait again, since its worker has gone.

        Args:
            identifier: Which.
            crashed: Whether the worker died of it; the second time without a step further it fails.

        Returns:
            It, queued, or ended where it was to be cancelled or has failed.
        """
        with self._changing():
            job = self._one("id = ?", identifier)
            if job.cancelling:
                self.cancelled(identifier)
            elif crashed and job.crashes:
                self.fail(identifier, "worker_died", "the worker that made it died twice at the same place")
            else:
                self._change(
                    "status = 'queued', started = NULL, crashes = crashes + ?", identifier, "in_progress", int(crashed)
                )
        return self._one("id = ?", identifier)

    def recover(self) -> int:
        """Let all jobs wait again that ran when the server ended; return how many."""
        running = self._all("status = 'in_progress'")
        for job in running:
            self.give_back(job.id, crashed=False)
        return len(running)

    def remove(self, identifier: str) -> bool:
        """Forget an ended job."""
        with self._changing():
            statement = "DELETE FROM jobs WHERE id = ? AND status NOT IN ('queued', 'in_progress')"
            done = self._db.execute(statement, (identifier,))
        return done.rowcount > 0

    def discard(self, identifier: str) -> bool:
        """Forget a job that waits, or has ended; False where it runs."""
        with self._changing():
            self._end(identifier, "cancelled", "cancelling = 1", leaving="queued")
            return self.remove(identifier)

    def expired(self) -> list[Job]:
        """Return the ended jobs whose time is over."""
        return self._all("expires IS NOT NULL AND expires < ?", time.time())

    def beyond(self, budget: int) -> list[Job]:
        """Return the completed jobs, oldest first, that have to go so that the others fit into so many bytes."""
        kept, going = 0, []
        for job in self._all("status = 'completed' ORDER BY ended DESC"):
            kept += job.size
            if kept > budget:
                going.append(job)
        return going[::-1]

    def counts(self) -> dict[str, int]:
        """Return how many jobs there are in each state."""
        found = dict(self._rows("SELECT status, COUNT(*) FROM jobs GROUP BY status"))
        return {status: found.get(status, 0) for status in get_args(Status)}

    def ids(self) -> set[str]:
        """Return the id of every job."""
        return {row[0] for row in self._rows("SELECT id FROM jobs")}

    def mean_seconds(self) -> float:
        """Return how long the last completed jobs took, or a guess."""
        [[found]] = self._rows(
            "SELECT AVG(seconds) FROM (SELECT ended - started AS seconds FROM jobs WHERE status = 'completed' "
            "ORDER BY ended DESC LIMIT ?)",
            _RECENT,
        )
        return _GUESS if found is None else float(found)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Make one transaction of the block, also where it is within another one."""
        with self._lock:
            if self._db.in_transaction:
                yield
                return
            self._db.execute("BEGIN IMMEDIATE")
            self._thread.changes = True
            try:
                with self._db:
                    yield
            finally:
                self._thread.changes = False

    def _end(self, identifier: str, status: Status, also: str, *values: Any, leaving: Status = "in_progress") -> bool:
        now = time.time()
        setting = f"status = ?, ended = ?, expires = ?, {also}"
        return self._change(setting, identifier, leaving, status, now, now + self._retention, *values)

    def _change(self, setting: str, identifier: str, leaving: Status, *values: Any) -> bool:
        with self._changing():
            statement = f"UPDATE jobs SET {setting} WHERE id = ? AND status = ?"  # noqa: S608 - no words of others
            return self._db.execute(statement, (*values, identifier, leaving)).rowcount > 0

    def _count(self, where: str, *values: Any) -> int:
        return int(self._rows(f"SELECT COUNT(*) FROM jobs WHERE {where}", *values)[0][0])  # noqa: S608

    def _one(self, where: str, *values: Any) -> Job:
        [job] = self._all(where, *values)
        return job

    def _maybe(self, where: str, *values: Any) -> Job | None:
        return next(iter(self._all(where, *values)), None)

    def _all(self, where: str, *values: Any) -> list[Job]:
        columns = Job.__struct_fields__
        statement = f"SELECT {', '.join(columns)} FROM jobs WHERE {where}"  # noqa: S608 - no words of others
        return [_job(columns, row) for row in self._rows(statement, *values)]

    def _rows(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return what a query finds: within a transaction of this thread what that has changed, too."""
        if getattr(self._thread, "changes", False):
            return self._db.execute(statement, values).fetchall()
        with self._reading:
            return self._reader.execute(statement, values).fetchall()


def _job(columns: Sequence[str], row: Sequence[Any]) -> Job:
    values = dict(zip(columns, row, strict=True))
    spec = msgspec.json.decode(values.pop("spec"), type=Spec)
    cancelling = bool(values.pop("cancelling"))
    return Job(spec=spec, cancelling=cancelling, **values)
