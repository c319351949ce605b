"""What was found out once and is kept for other processes under the user's cache folder, and what else lies there."""

import contextlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cvx_deploy.errors import CvxError, OutputError
from cvx_deploy.files import cache_folder, staged_file
from cvx_deploy.reading import read_whole

_MOST = 2048
"""Entries that are kept; the oldest go first."""


@dataclass(frozen=True)
class Kept:
    """Texts by their keys.

    Attributes:
        folder: Of the cache.
        file: In it.
    """

    folder: str
    file: str

    def get(self, key: str) -> str | None:
        """Return what is kept under a key; a damaged file counts as an empty one."""
        return self._entries().get(key)

    def put(self, key: str, value: str) -> None:
        """Keep a text, if that can be done."""
        entries = {name: kept for name, kept in self._entries().items() if name != key} | {key: value}
        with contextlib.suppress(OutputError, OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with staged_file(self._path) as staging:
                newest = dict(list(entries.items())[-_MOST:])
                staging.write_text(json.dumps(newest, indent=0), encoding="utf-8")

    @property
    def _path(self) -> Path:
        return cache_folder(self.folder) / self.file

    def _entries(self) -> dict[str, str]:
        with contextlib.suppress(CvxError, OSError, msgspec.DecodeError):
            return msgspec.json.decode(read_whole(self._path, CvxError, fix=""), type=dict[str, str])
        return {}


@dataclass(frozen=True)
class Part:
    """A folder of the cache: what lies in it, and how much."""

    name: str
    what: str
    files: int
    size: int


_PARTS = {
    "traces": "networks that were traced, for the next export of the same",
    "hashes": "SHA-256 of large files that nobody has touched since",
    "probes": "which engine is the fastest on this machine",
    "timing": "what TensorRT has measured of kernels",
    "bundles": "bundles that came from another machine",
}
"""Folders of the cache: nothing else that lies there is this program's."""


def what_is_kept() -> list[Part]:
    """Return the folders of the cache that are there."""
    return [_part(name, cache_folder(name)) for name in _PARTS if _is_own(cache_folder(name))]


def clear_cache() -> None:
    """Delete them.

    Raises:
        OutputError: Something cannot be deleted.
    """
    for folder in filter(_is_own, map(cache_folder, _PARTS)):
        try:
            shutil.rmtree(folder)  # follows no link
        except OSError as error:
            raise OutputError(
                f"{folder} cannot be deleted: {error.strerror}",
                fix="see that you may write to it, and that nothing runs",
            ) from error


def _is_own(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink()


def _part(name: str, folder: Path) -> Part:
    sizes = [path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return Part(name, _PARTS[name], len(sizes), sum(sizes))
