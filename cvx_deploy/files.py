"""Files written whole or not at all: hashing, copying, staging files and folders, locks."""

import contextlib
import ctypes
import fcntl
import glob
import hashlib
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from cvx_deploy.errors import OutputError

_AT_FDCWD = -100
_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
_LONGEST_NAME = 200  # bytes; of 255 that a file system takes, what is put beside a name needs some
_PIECE = 1 << 22
_RENAME_EXCHANGE = 2


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Return the hex SHA-256 of a file, read once in pieces; `progress` is told each piece's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            if progress is not None:
                progress(len(piece))
    return digest.hexdigest()


def sums_of(hashes: dict[str, str]) -> bytes:
    """Return the content of a ``SHA256SUMS``, in the form that ``sha256sum --check`` takes, of hashes by path."""
    return "".join(f"{digest}  {path}\n" for path, digest in hashes.items()).encode()


def cache_folder(name: str) -> Path:
    """Return a folder of the user's for what may be thrown away at any time; it need not be there yet."""
    return cache_root() / name


def cache_root() -> Path:
    """Return ``CVX_CACHE_DIR`` where that is set, else ``cvx-deploy`` in ``XDG_CACHE_HOME``, else in ``~/.cache``."""
    own = os.environ.get("CVX_CACHE_DIR")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cvx-deploy"


def free_space(folder: Path) -> int:
    """Return the bytes that are free where a folder lies, or will lie: it need not be there yet."""
    return shutil.disk_usage(nearest_folder(folder)).free


def nearest_folder(folder: Path) -> Path:
    """Return a folder, or the nearest above it that is there."""
    place = folder.absolute()
    return next(there for there in (place, *place.parents) if there.is_dir())


def require_space(folder: Path, needed: int) -> None:
    """Raise OutputError unless `needed` bytes are free where `folder` lies, so that hours of writing are not lost."""
    free = free_space(folder)
    if free < needed:
        raise OutputError(
            f"{needed:,} bytes are to be written into {folder}, where {free:,} are free",
            fix="make room there, or choose another output folder",
        )


def place_file(source: Path, target: Path, progress: Callable[[int], None] | None = None) -> None:
    """Put the content of `source` at `target`, a new file, with its time stamps and permissions.

    Where the file system can (btrfs, XFS, bcachefs, ...) the two share their blocks until either is written to: that
    takes no time and no space. Elsewhere the bytes are copied. Never a hard link: a program that alters `source` in
    place would alter `target` with it, and onnx.checker and onnx.load refuse weights with a second name.

    Args:
        source: A file, or a link to one.
        target: Where it is to be; nothing may be there.
        progress: Told the bytes of each piece placed, which is the whole file when it is shared.

    Raises:
        OutputError: A copy needs more bytes than are free.
    """
    with source.open("rb") as reading, target.open("xb") as writing:
        size = os.fstat(reading.fileno()).st_size
        if _share(reading.fileno(), writing.fileno()):
            if progress is not None:
                progress(size)
        else:
            require_space(target.parent, size)
            while piece := reading.read(_PIECE):
                writing.write(piece)
                if progress is not None:
                    progress(len(piece))
    shutil.copystat(source, target)


def _share(source: int, target: int) -> bool:
    """Let a new file share the blocks of another, both open; False where the file system cannot."""
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


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
            staging = _beside(target, f"tmp-{os.getpid()}")
            staging.mkdir()
            try:
                yield staging
                _sync(staging)
                take_place(staging, target)
            finally:
                shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Yield a temporary name beside `target`; the file written there takes its place, whole, when the block ends well.

    On any exception the temporary is removed and an earlier `target` is as it was. An earlier file is replaced; all
    else is as `staged_directory` has it.

    Raises:
        OutputError: The place cannot be written, is a folder, or another process is writing it.
    """
    target = Path(os.path.realpath(target))
    with _stating(target), _parents(target):
        if target.exists() and not target.is_file():
            raise OutputError(f"{target} is there and is not a file", fix="choose another --output")
        with _locked(target):
            _sweep(target)
            staging = _beside(target, f"tmp-{os.getpid()}")
            try:
                yield staging
                _sync(staging)
                staging.replace(target)
            finally:
                staging.unlink(missing_ok=True)


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
    if old.exists() and not old.is_symlink() and not target.exists():
        old.rename(target)
    pattern = _beside(target, "tmp-").name
    for leftover in target.parent.glob(f"{glob.escape(pattern)}*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _beside(target: Path, ending: str) -> Path:
    """Name something hidden beside a target; a name that would get too long for the file system is hashed."""
    name = target.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return target.with_name(f".{name}.{ending}")


def _aside(target: Path) -> Path:
    return _beside(target, "tmp-old")


def check_unlocked(target: Path) -> None:
    """Raise OutputError where another process is writing `target` at this moment; makes nothing."""
    target = Path(os.path.realpath(target))
    try:
        descriptor = os.open(_beside(target, "lock"), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return  # there is no lock, or none that counts
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _busy(target) from error
    finally:
        os.close(descriptor)


def _busy(target: Path) -> OutputError:
    return OutputError(
        f"another process is writing {target}", fix="wait until it ends, or choose another output folder"
    )


def open_lock(path: Path) -> int:
    """Open a lock file, made when it is not there; a link or another thing in its place is nobody's lock, and goes."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        path.unlink()
    return os.open(path, flags, 0o666)


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the target's lock file; the kernel lets go of it however the process ends."""
    path = _beside(target, "lock")
    descriptor = open_lock(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder removes the file as it lets go: a lock on a file that is gone, or new since, locks nothing.
            if not os.path.samestat(os.fstat(descriptor), path.lstat()):
                raise FileNotFoundError(path)
        except (BlockingIOError, FileNotFoundError) as error:
            raise _busy(target) from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def take_place(new: Path, target: Path) -> None:
    """Move the folder `new` to `target`, on the same file system; an earlier folder there is removed.

    Where the kernel can, the two change places in one step. Elsewhere the earlier one stands aside for the moment of
    two renames, and comes back if the second fails.
    """
    if not target.exists():
        new.rename(target)
    elif _exchange(new, target):
        shutil.rmtree(new, ignore_errors=True)
    else:
        old = _aside(target)
        shutil.rmtree(old, ignore_errors=True)  # a killed process left it: `target` is there
        try:
            target.rename(old)
            new.rename(target)
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
