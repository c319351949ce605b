"""Files written whole or not at all: hashing, staging folders, locks."""

import contextlib
import ctypes
import fcntl
import glob
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
    target = Path(os.path.realpath(target))  # what a link points to is replaced, not the link
    with _stating(target), _parents(target):
        _check_can_appear(target, replace=replace)
        with _locked(target):
            _sweep(target)
            staging = target.with_name(f".{target.name}.tmp-{os.getpid()}")
            staging.mkdir()
            try:
                yield staging
                _sync(staging)
                _take_place(staging, target)
            finally:
                shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _stating(target: Path) -> Iterator[None]:
    """Turn what the system refuses (a full disk, a name too long) into one stated failure."""
    try:
        yield
    except OSError as error:
        cause = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        raise OutputError(
            f"cannot write {target}: {cause}", fix="make room or give permission there, or choose another output folder"
        ) from error


@contextlib.contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Create the folders above `target`; those that are empty when the block fails go again."""
    made = [folder for folder in target.parents if not folder.exists()]
    ground = target.parents[len(made)]
    if not ground.is_dir():
        raise OutputError(f"{ground} is a file, not a folder", fix="choose another output folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _check_can_appear(target: Path, *, replace: bool) -> None:
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file, not a folder", fix="choose another output folder")
    if target.is_dir() and any(target.iterdir()) and not replace:
        raise OutputError(f"{target} already exists and is not empty", fix="choose another output folder, or remove it")
    if not os.access(target.parent, os.W_OK):
        raise OutputError(f"the folder {target.parent} cannot be written", fix="choose another output folder")


def _sweep(target: Path) -> None:
    """Remove what killed processes left; an earlier target that stood aside at that moment comes back."""
    old = _aside(target)
    if old.exists() and not target.exists():
        old.rename(target)
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.tmp-*"):
        shutil.rmtree(leftover)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp-old")


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the target's lock file; the kernel lets go of it however the process ends."""
    path = target.with_name(f".{target.name}.lock")
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder removes the file as it lets go: a lock on a file that is gone, or new since, locks nothing.
            if not os.path.samestat(os.fstat(handle.fileno()), path.stat()):
                raise FileNotFoundError(path)
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
        old = _aside(target)
        try:
            target.rename(old)
            staging.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths atomically with Linux's renameat2; False where there is no such call."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    status: int = libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return status == 0
