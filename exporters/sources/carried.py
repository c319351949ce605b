"""Hashes that a checkpoint carries, so that tens of gigabytes need not be read again to know theirs.

Three kinds are understood: a ``SHA256SUMS`` file, the links of the Hugging Face cache, whose targets are named after
their content, and the notes that ``hf download --local-dir`` leaves beside what it fetched.
"""

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cvx_deploy.bundle.opened import HASHES
from cvx_deploy.errors import CheckpointError
from cvx_deploy.reading import read_whole, reading

_NOTES = Path(".cache", "huggingface", "download")
_LONGEST_NOTE = 1 << 12
_SUM = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class CarriedHash:
    """What someone wrote down about a file.

    Attributes:
        written_ns: When; it says nothing about a file that was changed later.
        where: The file or link that says so.
    """

    sha256: str
    written_ns: int
    where: Path


class CarriedHashes:
    """The hashes that a checkpoint folder carries."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def of(self, file: str) -> CarriedHash | None:
        """Return what is written down about a file of the checkpoint, whatever its age."""
        return self._sums.get(file) or self._of_link(file) or self._of_note(file)

    @cached_property
    def _sums(self) -> dict[str, CarriedHash]:
        path = self._root / HASHES
        if not path.is_file():
            return {}
        content = read_whole(path, CheckpointError, fix="fetch it again, or remove it")
        lines = content.decode("utf-8", errors="replace").splitlines()
        sums = [_SUM.fullmatch(line.rstrip()) for line in lines if line.strip()]
        if None in sums:
            raise CheckpointError(
                f"{path} is damaged: not every line is a SHA-256 and a name", fix="fetch it again, or remove it"
            )
        written = path.stat().st_mtime_ns
        return {found[2]: CarriedHash(found[1].lower(), written, path) for found in sums if found}

    def _of_link(self, file: str) -> CarriedHash | None:
        """Read a link of the cache, ``snapshots/COMMIT/file`` to ``blobs/SHA256``, made when the content was whole.

        Of a small file the name is not a SHA-256 but git's own hash. A blob that is a link itself is another store's.
        """
        path = self._root / file
        if self._root.parent.name != "snapshots" or not path.is_symlink():
            return None
        blob = Path(os.path.normpath(path.parent / path.readlink()))
        inside = blob.parent == self._root.parent.parent / "blobs" and not blob.is_symlink()
        if not inside or not _SHA256.fullmatch(blob.name):
            return None
        return CarriedHash(blob.name, path.lstat().st_mtime_ns, path)

    def _of_note(self, file: str) -> CarriedHash | None:
        """Read ``.cache/huggingface/download/FILE.metadata``: lines of commit, ETag (its SHA-256 if large) and time."""
        path = self._root / _NOTES / f"{file}.metadata"
        if not path.is_file():
            return None
        try:
            with reading(path, CheckpointError, fix=""):
                content = read_whole(path, CheckpointError, fix="", limit=_LONGEST_NOTE)
                _, etag, written = content.decode("ascii").split()
                written_ns = int(float(written) * 1e9)
        except CheckpointError:  # the hub's own reader disregards such a note, too
            return None
        return CarriedHash(etag, written_ns, path) if _SHA256.fullmatch(etag) else None
