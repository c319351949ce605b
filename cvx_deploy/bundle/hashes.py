"""Hashes that are known: of a file that nobody has touched since, so that tens of gigabytes are read once a machine.

A file is taken to be untouched while its path, device, inode, size, and its times of writing and of change are what
they were when it was hashed; the last of these no program can set. What is known lies in memory, and of large files in
one JSON file under the user's cache folder.
"""

import threading
from pathlib import Path

from cvx_deploy.files import sha256_of
from cvx_deploy.kept import Kept
from cvx_deploy.progress import Progress

_LARGE = 1 << 24
"""Bytes from which on a hash is kept for other processes: reading less takes no time."""
_KEPT = Kept("hashes", "sha256.json")
_KNOWN: dict[str, str] = {}
_LOCK = threading.Lock()


def known_sha256(path: Path, progress: Progress) -> str:
    """Return a file's SHA-256: the one that is known while it is untouched, else hashed anew.

    Raises:
        OSError: It cannot be read.
    """
    stamp, size = _stamp(path), path.stat().st_size
    with _LOCK:
        found = _KNOWN.get(stamp) or (_KEPT.get(stamp) if size >= _LARGE else None)
    if found is None:
        with progress.task(f"check {path.name}", size) as advance:
            found = sha256_of(path, advance)
        if _stamp(path) != stamp:  # it was written to meanwhile
            return found
        with _LOCK:
            if size >= _LARGE:
                _KEPT.put(stamp, found)
    _KNOWN[stamp] = found
    return found


def _stamp(path: Path) -> str:
    told = path.stat()
    words = (path.absolute(), told.st_dev, told.st_ino, told.st_size, told.st_mtime_ns, told.st_ctime_ns)
    return "|".join(map(str, words))
