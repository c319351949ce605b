"""Files written whole or not at all: hashing, staging folders, locks."""

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from cvx_deploy.errors import OutputError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Return the hex SHA-256 of a file, read once in pieces; `progress` is told each piece's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
            if progress is not None:
                progress(len(piece))
    return digest.hexdigest()


@contextlib.contextmanager
def staged_directory(target: Path, *, replace: bool) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that takes its place, whole, when the block ends well.

    On any exception (Ctrl-C too) the temporary is removed and an earlier `target` is as it was. What an earlier process
    left when it was killed is swept up here. One process at a time may stage a given target.

    Args:
        target: The folder to appear.
        replace: Whether an existing `target` may be replaced.

    Raises:
        OutputError: The place cannot be written, exists and may not be replaced, or another process is writing it.
    """
    target = target.absolute()
    check_folder_can_appear(target, replace=replace)
    with _locked(target):
        for leftover in target.parent.glob(f".{target.name}.tmp-*"):
            shutil.rmtree(leftover)
        staging = target.with_name(f".{target.name}.tmp-{os.getpid()}")
        staging.mkdir()
        try:
            yield staging
            _sync(staging)
            _take_place(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def check_folder_can_appear(target: Path, *, replace: bool) -> None:
    """Raise OutputError unless a folder `target` can be written, creating its parents as needed."""
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file, not a folder", fix="choose another output folder")
    if target.is_dir() and any(target.iterdir()) and not replace:
        raise OutputError(f"{target} already exists and is not empty", fix="choose another output folder, or remove it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot create the folder {target.parent}: {error.strerror}", fix="choose another output folder"
        ) from error
    if not os.access(target.parent, os.W_OK):
        raise OutputError(f"the folder {target.parent} cannot be written", fix="choose another output folder")


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the target's lock file; the kernel lets go of it however the process ends."""
    path = target.with_name(f".{target.name}.lock")
    try:
        handle = path.open("a")
    except OSError as error:
        raise OutputError(f"cannot write in {target.parent}: {error.strerror}", fix="choose another folder") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder removes the file as it lets go: a lock on a file that is gone locks nothing.
            path.stat()
        except (BlockingIOError, FileNotFoundError) as error:
            raise OutputError(
                f"another process is writing {target}", fix="wait until it ends, or choose another output folder"
            ) from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _take_place(staging: Path, target: Path) -> None:
    """Move `staging` to `target`; where the kernel can, an old target and the new one change places in one step."""
    if not target.exists():
        staging.rename(target)
    elif not _exchange(staging, target):
        old = target.with_name(f".{target.name}.tmp-old")
        target.rename(old)
        staging.rename(target)
        shutil.rmtree(old)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths atomically with Linux's renameat2; False where there is no such call."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    status: int = libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return status == 0
