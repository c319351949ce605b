"""What a batch has made: a line for each video, on the disk before the next one is noted."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from cvx_deploy.batch.lines import Task
from cvx_deploy.errors import OutputError
from cvx_deploy.files import open_lock
from cvx_deploy.reading import read_whole

MANIFEST = "manifest.jsonl"
_FIX = "choose another --output folder"
_MOST_BYTES = 1 << 30


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """What came of a line.

    Attributes:
        file: The video, in the batch's folder; empty where there is none.
        seed: With it, and its line, the same video is made again.
        sha256: Of the file, and `size` its bytes.
        digest: Of the line and all else that made it: what changes is made again.
        seconds: That it took.
        steps: Denoising steps that were run and, with a cache, forecast.
        error: Why there is no video.
    """

    id: str
    seed: int
    digest: str
    seconds: float
    file: str = ""
    sha256: str = ""
    size: int = 0
    steps: str = ""
    error: str = ""


class Manifest:
    """The manifest of a folder, which one batch at a time has; made by `manifest_of`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.records = self._read()
        self._file = (folder / MANIFEST).open("ab")

    def is_done(self, task: Task) -> bool:
        """Whether the video is there, whole, and was made of just this."""
        record = self.records.get(task.id)
        if record is None or record.error or record.digest != task.digest:
            return False
        file = self._folder / record.file
        return file.is_file() and file.stat().st_size == record.size

    def note(self, record: Record) -> None:
        """Add a line; when this returns it is on the disk."""
        self._file.write(msgspec.json.encode(record) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records[record.id] = record

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _read(self) -> dict[str, Record]:
        """Read what is there; half a line at the end, which a killed process may leave, is cut off."""
        path = self._folder / MANIFEST
        if not path.exists():
            return {}
        text = read_whole(path, OutputError, fix=_FIX, limit=_MOST_BYTES)
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            os.truncate(path, len(whole))
        try:
            records = [msgspec.json.decode(line, type=Record) for line in whole.splitlines()]
        except msgspec.MsgspecError as error:
            raise OutputError(f"{path} is no manifest of a batch: {error}", fix=_FIX) from error
        return {record.id: record for record in records}


@contextmanager
def manifest_of(folder: Path) -> Iterator[Manifest]:
    """Hold the manifest of a folder, which is made if it is not there.

    Raises:
        OutputError: It cannot be written, or another batch has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open_lock(folder / ".batch.lock")
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror}", fix=_FIX) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise OutputError(f"another batch has {folder}", fix=f"wait until it ends, or {_FIX}") from error
    try:
        manifest = Manifest(folder)
        try:
            yield manifest
        finally:
            manifest.close()
    finally:
        os.close(lock)
