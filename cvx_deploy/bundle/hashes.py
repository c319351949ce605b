"""Hashes that are known: of a file that nobody has touched since, so that tens of gigabytes are read once a machine.

A file is taken to be untouched while its path, device, inode, size, and its times of writing and of change are what
they were when it was hashed; the last of these no program can set. What is known lies in memory, and of large files in
one JSON file under the user's cache folder.
"""

import contextlib
import json
import threading
from pathlib import Path

import msgspec

from cvx_deploy.errors import CvxError, OutputError
from cvx_deploy.files import cache_folder, sha256_of, staged_file
from cvx_deploy.progress import Progress
from cvx_deploy.reading import read_whole

_LARGE = 1 << 24
"""Bytes from which on a hash is kept for other processes: reading less takes no time."""
_MOST = 2048
"""Files whose hashes are kept; the oldest go first."""
_KNOWN: dict[str, str] = {}
_LOCK = threading.Lock()


def known_sha256(path: Path, progress: Progress) -> str:
    """Return a file's SHA-256: the one that is known while it is untouched, else hashed anew.

    Raises:
        OSError: It cannot be read.
    """
    stamp, size = _stamp(path), path.stat().st_size
    with _LOCK:
        found = _KNOWN.get(stamp) or (_kept().get(stamp) if size >= _LARGE else None)
    if found is None:
        with progress.task(f"check {path.name}", size) as advance:
            found = sha256_of(path, advance)
        if _stamp(path) != stamp:  # it was written to meanwhile
            return found
        with _LOCK:
            if size >= _LARGE:
                _keep(stamp, found)
    _KNOWN[stamp] = found
    return found


def _stamp(path: Path) -> str:
    told = path.stat()
    words = (path.absolute(), told.st_dev, told.st_ino, told.st_size, told.st_mtime_ns, told.st_ctime_ns)
    return "|".join(map(str, words))


def _place() -> Path:
    return cache_folder("hashes") / "sha256.json"


def _kept() -> dict[str, str]:
    """Return what earlier processes kept; a damaged file counts as none."""
    with contextlib.suppress(CvxError, OSError, msgspec.DecodeError):
        return msgspec.json.decode(read_whole(_place(), CvxError, fix=""), type=dict[str, str])
    return {}


def _keep(stamp: str, found: str) -> None:
    """Keep a hash for other processes, if that can be done."""
    entries = [*_kept().items(), (stamp, found)][-_MOST:]
    with contextlib.suppress(OutputError, OSError):
        _place().parent.mkdir(parents=True, exist_ok=True)
        with staged_file(_place()) as staging:
            staging.write_text(json.dumps(dict(entries), indent=0), encoding="utf-8")
