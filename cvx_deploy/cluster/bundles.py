"""Bundles on the nodes of a cluster: seen where they lie, or sent once to each node that does not see them."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.pack import identity, pack, unpack
from cvx_deploy.errors import BundleError
from cvx_deploy.files import cache_folder, open_lock, require_space
from cvx_deploy.progress import SilentProgress

_PIECE = 1 << 26  # bytes that are sent at a time


@dataclass(frozen=True)
class Known:
    """A bundle as one machine tells another of it.

    Attributes:
        path: Where it lies on the first.
        identity: See `bundle.pack.identity`.
    """

    path: str
    identity: str

    @classmethod
    def of(cls, bundle: Bundle) -> "Known":
        """Return what is told of a bundle."""
        return cls(str(bundle.path.absolute()), identity(bundle))


class BundleSource:
    """The machine that has the bundles: it packs what is asked for, and gives it away piece by piece.

    Args:
        bundles: What it has.
    """

    def __init__(self, bundles: list[Known]) -> None:
        self._paths = {known.identity: Path(known.path) for known in bundles}
        self._folder = Path(tempfile.mkdtemp(prefix="packed-", dir=_made(cache_folder("bundles"))))

    def size(self, wanted: str) -> int:
        """Pack a bundle, unless it has been, and return the bytes of that file."""
        packed = self._packed(wanted)
        if not packed.exists():
            pack(Bundle.open(self._paths[wanted]), packed, SilentProgress())
        return packed.stat().st_size

    def piece(self, wanted: str, start: int) -> bytes:
        """Return some bytes of a packed bundle."""
        with self._packed(wanted).open("rb") as file:
            file.seek(start)
            return file.read(_PIECE)

    def close(self) -> None:
        """Remove what was packed."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _packed(self, wanted: str) -> Path:
        return self._folder / f"{wanted}.cvx"


@dataclass(frozen=True)
class Sender:
    """A `BundleSource` as a node sees it: two calls that return what its methods return."""

    size: Callable[[str], int]
    piece: Callable[[str, int], bytes]


def at_hand(known: Known, sender: Sender, *, compiled: bool) -> Path:
    """Return where a bundle lies on this node, after getting it where it does not.

    Args:
        known: Which; its path is looked at first, since nodes may share storage.
        sender: What gives it.
        compiled: Whether engines are needed that lie beside it, and are not sent.

    Raises:
        BundleError: It is not here, and cannot be sent.
        OutputError: There is no room for it.
    """
    if _is(Path(known.path), known.identity):
        return Path(known.path)
    if compiled:
        raise BundleError(
            f"{known.path} is not what the server has there, and compiled engines are not sent to nodes",
            fix="put the engines folder where all nodes see it under the same path",
        )
    place = _made(cache_folder("bundles")) / known.identity
    with os.fdopen(open_lock(place.with_suffix(".lock")), "w") as lock:  # another worker of this node waits here
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is(place, known.identity):
            _get(known.identity, sender, place)
    return place


def _is(path: Path, wanted: str) -> bool:
    """Whether a whole bundle of that identity lies there."""
    try:
        return identity(Bundle.open(path)) == wanted
    except BundleError:
        return False


def _get(wanted: str, sender: Sender, place: Path) -> None:
    size = sender.size(wanted)
    require_space(place.parent, 2 * size)
    with tempfile.NamedTemporaryFile(dir=place.parent, suffix=".cvx") as file:
        while (start := file.tell()) < size:
            file.write(sender.piece(wanted, start))
        file.flush()
        unpack(Path(file.name), place, SilentProgress())  # checks every hash


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
