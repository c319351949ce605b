"""The clips of a long video that are whole, kept beside it until all of it is, so that a run that is cut off goes on.

They are whole files, and under a mark of all that they depend on: what is made of them equals an undisturbed run's.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cvx_deploy.errors import MediaError, OutputError
from cvx_deploy.files import sha256_of, staged_file
from cvx_deploy.longer.chain import Pixels
from cvx_deploy.reading import check_regular, read_whole, reading

_MARK: Final = "mark.json"


class Parts:
    """See the module.

    Args:
        output: The video.
        mark: What its clips depend on; see `mark_of`.

    Raises:
        OutputError: Clips of another video are there.
    """

    def __init__(self, output: Path | str, mark: str) -> None:
        self.folder, self._mark = self.place(output), mark
        if os.path.lexists(self.folder) and self._kept_mark() != mark:
            raise OutputError(
                f"{self.folder} holds clips of another run that was cut off",
                fix="run that one again to its end, remove the folder, or choose another --output",
            )

    @staticmethod
    def place(output: Path | str) -> Path:
        """Return the folder of a video's clips."""
        place = Path(os.path.realpath(output))
        return place.with_name(f"{place.name}.clips")

    def kept(self, most: int) -> list[Pixels]:
        """Return the first clips, as many as are there without a gap, `most` at the most.

        Raises:
            MediaError: One is damaged.
        """
        clips: list[Pixels] = []
        while len(clips) < most and (path := self._clip(len(clips))).exists():
            clips.append(_loaded(path))
        return clips

    def keep(self, index: int, pixels: Pixels) -> None:
        """Keep a clip, whole or not at all."""
        if not (self.folder / _MARK).exists():
            with staged_file(self.folder / _MARK) as temporary:
                temporary.write_text(json.dumps({"mark": self._mark}), encoding="utf-8")
        with staged_file(self._clip(index)) as temporary, temporary.open("wb") as file:
            np.save(file, pixels, allow_pickle=False)

    def remove(self) -> None:
        """Remove all of them: the video is there."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _clip(self, index: int) -> Path:
        return self.folder / f"{index:04d}.npy"

    def _kept_mark(self) -> str | None:
        try:
            found = json.loads(read_whole(self.folder / _MARK, OutputError, fix="remove it"))
        except (OutputError, ValueError):
            return None
        return found.get("mark") if isinstance(found, dict) else None


def _loaded(path: Path) -> Pixels:
    fix = f"remove {path}, and run it again"
    check_regular(path, MediaError, fix=fix)
    with reading(path, MediaError, fix=fix, says="is no clip"):
        pixels: NDArray[Any] = np.load(path, allow_pickle=False)
        if pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
            raise ValueError(f"it holds {pixels.dtype} of shape {pixels.shape}")
    return pixels


def mark_of(identities: Iterable[str], asked: dict[str, Any]) -> str:
    """Return a hash of all that the clips of a video depend on.

    Args:
        identities: Of the pipelines; see `Pipeline.identity`.
        asked: What is asked for; files and arrays by what is in them.
    """
    return hashlib.sha256(repr([*identities, _content(asked)]).encode()).hexdigest()


def _content(value: Any) -> Any:
    if isinstance(value, dict):
        return sorted((key, _content(one)) for key, one in value.items())
    if isinstance(value, list | tuple):
        return [_content(one) for one in value]
    if isinstance(value, Path):
        files = sorted(path for path in value.rglob("*") if path.is_file()) if value.is_dir() else [value]
        return [(path.name, sha256_of(path)) for path in files if path.exists()]
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.shape, hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()]
    return value
