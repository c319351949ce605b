"""What was found out once, and is kept for other processes: one JSON file under the user's cache folder."""

import contextlib
import json
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
