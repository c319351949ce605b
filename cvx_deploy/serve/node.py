"""A worker on a node of a Ray cluster: a process as on the server's machine, and its files back and forth.

The server sends along what a job starts from, and gets each point as it is saved and the video when it is done, so that
another node can go on with what this one leaves.
"""

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from cvx_deploy import __version__
from cvx_deploy.cluster.bundles import Known, at_hand
from cvx_deploy.engines.registry import engine_spec
from cvx_deploy.errors import CvxError
from cvx_deploy.files import cache_folder, open_lock
from cvx_deploy.serve.files import VARIANTS, JobFiles
from cvx_deploy.serve.process import GoneError, Word, WorkerProcess

Files = dict[str, bytes]
_HEARING = 1.0  # seconds that a call waits for a word
_OLD = 3600.0  # seconds after which a folder that nobody holds is what a killed worker left


class NodeWorker:
    """The worker of one device, on the node it was put.

    Args:
        settings: See `ServeSettings.for_worker`; what is of the server's machine is exchanged for what is here.
        bundles: By the names in `settings`.
        source: The actor that gives them; see `cluster.source`.
        version: Of this program, where the server runs.
    """

    def __init__(self, settings: Word, bundles: dict[str, Known], source: Any, version: str) -> None:
        self._settings, self._bundles, self._source, self._version = settings, bundles, source, version
        self._process: WorkerProcess | None = None
        self._folder = _own_folder()
        self._sent: dict[str, int] = {}  # of the running job: what the server has, by the time of its writing

    def start(self) -> Word | None:
        """Get the bundles and start the process; return the word that says why that cannot be."""
        from cvx_deploy.cluster.source import sender_of

        try:
            if self._version != __version__:
                what = f"a node has cvx-deploy {__version__}, and the server {self._version}"
                raise CvxError(what, fix="install the same version on all nodes")
            compiled, sender = engine_spec(self._settings["engine"]).compiled, sender_of(self._source)
            paths = {name: at_hand(known, sender, compiled=compiled) for name, known in self._bundles.items()}
        except CvxError as error:
            return {"event": "broken", "what": error.what, "fix": error.fix}
        here = {"models": {name: str(path) for name, path in paths.items()}, "lock": str(self._folder / "lock")}
        self._process = WorkerProcess(self._settings | here)
        return None

    def say(self, words: Word, files: Files) -> None:
        """Tell the process something, after writing the files of the job that it is about."""
        if "job" in words:
            words, self._sent = words | {"folder": str(self._folder / words["job"])}, {}
            _write(Path(words["folder"]), files)
        if self._process is not None:
            self._process.say(words)

    def hear(self) -> tuple[Word, Files] | None:
        """Return the next word, with the files that it speaks of; None where none came for a while."""
        assert self._process is not None
        try:
            word = self._process.heard(_HEARING)
        except GoneError as error:
            return {"event": "gone", "why": str(error)}, {}
        if word is None:
            return None
        folder = self._folder / str(word.get("job"))
        files = self._news(JobFiles(folder), word["event"])
        if word["event"] in ("done", "failed", "cancelled", "stopped"):
            shutil.rmtree(folder, ignore_errors=True)
        return word, files

    def _news(self, files: JobFiles, event: str) -> Files:
        """Return what the server has not got yet of what an event speaks of."""
        if event == "done":
            return {name: (files.folder / name).read_bytes() for name, _ in VARIANTS.values()}
        if event != "saved":
            return {}
        there = {name: (path, path.stat().st_mtime_ns) for name, path in files.kept().items()}
        news = {name: path.read_bytes() for name, (path, written) in there.items() if self._sent.get(name) != written}
        self._sent = {name: written for name, (_, written) in there.items()}
        return news


def _write(folder: Path, files: Files) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _own_folder() -> Path:
    """Make a folder for this worker, and remove those of workers that were killed long ago."""
    place = cache_folder("nodes")
    place.mkdir(parents=True, exist_ok=True)
    for folder in place.iterdir():
        if time.time() - folder.stat().st_mtime > _OLD and _is_free(folder / "lock"):
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=place))


def _is_free(lock: Path) -> bool:
    with os.fdopen(open_lock(lock), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
