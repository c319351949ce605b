"""Bytes that others wrote: looked at before they are read, and whatever goes wrong with them is one stated failure."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from cvx_deploy.errors import CvxError
from cvx_deploy.terminal import reason

SMALL = 1 << 25
"""The most bytes of a config, a manifest, a header or another file that is held as Python objects."""

_OF_THE_SYSTEM = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.EIO, errno.ELOOP, errno.ENAMETOOLONG}
"""What is wrong with a path or a disk; a library's own words, for content that it cannot map, have other numbers."""
_ODD = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


@contextlib.contextmanager
def reading(path: object, failure: type[CvxError], *, fix: str, says: str = "is damaged") -> Iterator[None]:
    """Turn any exception of the block, which reads foreign bytes, into one stated failure.

    Parsers raise nearly every exception there is, whatever their documentation says, and those in Rust a kind of their
    own that is no `Exception`.

    Args:
        path: What is read, as the message is to name it.
        failure: What is raised.
        fix: How to mend damaged content.
        says: What is wrong with the path, if its content cannot be read.
    """
    try:
        yield
    except CvxError:
        raise
    except MemoryError as error:
        raise failure(f"{path} needs more memory than there is", fix=fix) from error
    except BaseException as error:
        if isinstance(error, OSError) and (error.filename is not None or error.errno in _OF_THE_SYSTEM):
            place = "check the path, its permissions and its disk"
            raise failure(f"{path} cannot be read: {error.strerror}", fix=place) from error
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise failure(f"{path} {says}".rstrip() + f": {reason(error)}", fix=fix) from error


def check_regular(path: Path, failure: type[CvxError], *, fix: str, limit: int | None = None) -> int:
    """Return the bytes of a regular file, and raise `failure` for anything else, or for one beyond `limit`.

    A pipe would be waited for without end, and a device, or a file that is nothing but a hole, fill the memory.
    """
    with reading(path, failure, fix=fix):
        found = path.stat()
        _check(path, found, failure, fix, limit)
        return found.st_size


def read_whole(path: Path, failure: type[CvxError], *, fix: str, limit: int = SMALL) -> bytes:
    """Return the content of a regular file of at most `limit` bytes; raise `failure` where there is none."""
    with reading(path, failure, fix=fix):
        # Without waiting: between a look at the path and its opening it may become a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            _check(path, found, failure, fix, limit)
            content = file.read(found.st_size + 1)
        if len(content) > found.st_size:
            raise failure(f"{path} grows while it is read", fix=fix)
        return content


def _check(path: Path, found: os.stat_result, failure: type[CvxError], fix: str, limit: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise failure(f"{path} is {_ODD.get(stat.S_IFMT(found.st_mode), 'something else')}, not a file", fix=fix)
    if limit is not None and found.st_size > limit:
        raise failure(f"{path} has {found.st_size:,} bytes, more than the {limit:,} that such a file may have", fix=fix)
