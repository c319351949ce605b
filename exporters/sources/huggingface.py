"""A repository of the Hugging Face hub, fetched into the hub's own cache, where other programs find it too.

The cache holds each file once, as ``blobs/ETAG``, and links to it from ``snapshots/COMMIT/``. The ETag of a large file
is its SHA-256, that of a small one git's hash. huggingface_hub keeps whole files only and does not look at hashes, so
that the blobs are written here: a part of one stays as ``ETAG.incomplete`` and is gone on from, and a whole one must
have the hash the hub gives for it. The links and the rest of the cache are huggingface_hub's work.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

from huggingface_hub import HfApi, constants, get_token, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from cvx_deploy.errors import CheckpointError, CvxError, OutputError
from cvx_deploy.exporters.sources.checkpoint import PICKLES, only_pickles
from cvx_deploy.files import free_space
from cvx_deploy.progress import Advance, Progress

_WORKERS = 8
_API_SECONDS = 30
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_LOG_IN = "log in with: hf auth login (or set HF_TOKEN)"
_AGAIN = "run the command again: it goes on where it stopped"
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]  # of httpx or httpx2, whichever the hub library uses


def is_offline() -> bool:
    """Whether the environment says so (``HF_HUB_OFFLINE``)."""
    return bool(constants.HF_HUB_OFFLINE)


class CachedRepository:
    """What the hub's cache holds of a repository; see `Repository`. No network is used."""

    def __init__(self, name: str, revision: str | None) -> None:
        self._name = name
        try:
            # One file is asked for, so that a snapshot of which others are missing is found as well.
            folder = snapshot_download(
                name, revision=revision, local_files_only=True, allow_patterns=["model_index.json"]
            )
        except (LocalEntryNotFoundError, HFValidationError) as error:
            at = "" if revision is None else f" at revision {revision}"
            raise CheckpointError(
                f"{name}{at} is neither a folder nor in the cache {constants.HF_HUB_CACHE}",
                fix="run once without --offline and HF_HUB_OFFLINE",
            ) from error
        self._folder = Path(folder)
        self.revision = self._folder.name
        files = (path for path in self._folder.rglob("*") if path.is_file())
        self.files = {path.relative_to(self._folder).as_posix() for path in files}

    def lacks(self, file: str) -> CheckpointError:
        """Return the failure of a file that is not in the cache."""
        return CheckpointError(
            f"{file} of {self._name} is not in the cache {constants.HF_HUB_CACHE}",
            fix="run once without --offline and HF_HUB_OFFLINE",
        )

    def fetch(self, files: Sequence[str], progress: Progress) -> Path:
        """Return the folder the files lie in."""
        return self._folder


@dataclass(frozen=True)
class _RemoteFile:
    """A file as the hub lists it: `etag` is the SHA-256 of a large file, git's hash of a small one."""

    name: str
    size: int
    etag: str

    @classmethod
    def of(cls, listed: RepoSibling) -> "_RemoteFile":
        etag = str(listed.lfs.sha256 if listed.lfs else listed.blob_id)
        if not _ETAG.fullmatch(etag) or listed.size is None:
            raise CheckpointError(
                f"{constants.ENDPOINT} gives no hash or size of {listed.rfilename}",
                fix="use an endpoint that does (HF_ENDPOINT)",
            )
        return cls(listed.rfilename, listed.size, etag)

    def digest(self) -> "hashlib._Hash":
        """Return a new digest that ends in `etag` when it has been told the file's bytes."""
        if len(self.etag) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


class HubRepository:
    """A repository of the hub at one commit; see `Repository`.

    Raises:
        CheckpointError: It is not there, not to be had, or the hub cannot be reached; the fix says what to do.
    """

    def __init__(self, name: str, revision: str | None) -> None:
        self._name, self._asked = name, revision
        with _stating(name, revision):
            info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=_API_SECONDS)
            self.revision = str(info.sha)
            self.files = {listed.rfilename: _RemoteFile.of(listed) for listed in info.siblings or ()}
        self._storage = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
        self._snapshot = self._storage / "snapshots" / self.revision

    def lacks(self, file: str) -> CheckpointError:
        """Return the failure of a file that the repository does not have."""
        folder = file.rpartition("/")[0]
        pickles = [name for name in self.files if name.startswith(f"{folder}/") and name.endswith(PICKLES)]
        if file.endswith(".safetensors") and pickles:
            return only_pickles(f"{self._name} on {constants.ENDPOINT}", min(pickles))
        return CheckpointError(
            f"{self._name} on {constants.ENDPOINT} has no file {file}",
            fix="use a repository in diffusers layout, whole, or another --revision",
        )

    def fetch(self, files: Sequence[str], progress: Progress) -> Path:
        """Download the files that the cache lacks, several at once, and return the folder they lie in."""
        missing = [self.files[name] for name in files if not self._has(self.files[name])]
        self._require_space(missing)
        with _stating(self._name, self._asked, begun=True), _no_bars():
            if missing:
                with progress.task(f"fetch {self._name}", sum(file.size for file in missing)) as advance:
                    stop = threading.Event()
                    _in_parallel([partial(self._download, file, advance, stop) for file in missing], stop)
            if "model_index.json" in files:  # asked for by the revision's own name, so that the cache keeps that too
                hf_hub_download(self._name, "model_index.json", revision=self._asked)
        return self._snapshot

    def _has(self, file: _RemoteFile) -> bool:
        path = self._snapshot / file.name
        return path.is_file() and path.stat().st_size == file.size

    def _blob(self, file: _RemoteFile) -> Path:
        return self._storage / "blobs" / file.etag

    def _require_space(self, files: list[_RemoteFile]) -> None:
        parts = (self._blob(file).with_name(f"{file.etag}.incomplete") for file in files)
        have = sum(part.stat().st_size for part in parts if part.is_file())
        have += sum(file.size for file in files if self._blob(file).is_file())
        need = sum(file.size for file in files) - have
        free = free_space(self._storage)
        if need > free:
            raise OutputError(
                f"{self._name} needs {need / 1e9:,.1f} GB more in {constants.HF_HUB_CACHE}, which has "
                f"{free / 1e9:,.1f} GB free",
                fix="make room there, or set HF_HOME to a folder that has it",
            )

    def _download(self, file: _RemoteFile, advance: Advance, stop: threading.Event) -> None:
        """Put a file into the cache, going on from what an earlier download left."""
        blob, link = self._blob(file), self._snapshot / file.name
        blob.parent.mkdir(parents=True, exist_ok=True)
        if blob.is_file() and blob.stat().st_size == file.size:
            advance(file.size)
        else:
            link.unlink(missing_ok=True)  # one to a blob that is not whole
            with _locked(blob.with_name(f"{file.etag}.incomplete"), file.name) as part:
                self._fill(part, file, advance, stop)
                Path(part.name).replace(blob)
        hf_hub_download(self._name, file.name, revision=self.revision)  # finds the blob, and links to it

    def _fill(self, part: BinaryIO, file: _RemoteFile, advance: Advance, stop: threading.Event) -> None:
        sink = _Sink(part, file, advance, stop)
        token = get_token()
        allowed = {"Authorization": f"Bearer {token}"} if token else {}
        http_get(
            hf_hub_url(self._name, file.name, revision=self.revision),
            cast(BinaryIO, sink),
            resume_size=sink.tell(),
            headers={"Accept-Encoding": "identity", **allowed},
            expected_size=file.size,
        )
        if not sink.is_right():
            Path(part.name).unlink()
            raise CheckpointError(
                f"{file.name} of {self._name} came with another content than its hash at {constants.ENDPOINT} says",
                fix="run the command again; if that does not help, something on the way alters files",
            )
        os.fsync(part.fileno())


class _Sink:
    """What a download is written to: hashed and counted as it comes, and stopped from outside.

    It begins with what the file holds, and has as much of a file as `http_get` uses.
    """

    def __init__(self, part: BinaryIO, file: _RemoteFile, advance: Advance, stop: threading.Event) -> None:
        self._part, self._file, self._advance, self._stop = part, file, advance, stop
        if part.seek(0, os.SEEK_END) > file.size:
            part.truncate(0)
        self._begin()
        while piece := part.read(1 << 22):
            self._count(piece)

    def _begin(self) -> None:
        self._part.seek(0)
        self._digest, self._done = self._file.digest(), 0

    def _count(self, piece: bytes) -> None:
        self._digest.update(piece)
        self._done += len(piece)
        self._advance(len(piece))

    def tell(self) -> int:
        """Return how many bytes there are."""
        return self._done

    def write(self, piece: bytes) -> None:
        """Take the next bytes."""
        if self._stop.is_set():
            raise InterruptedError
        self._part.write(piece)
        self._count(piece)

    def seek(self, offset: int) -> None:
        """Begin anew: a server that does not know ranges sends everything again."""
        assert offset == 0
        self._advance(-self._done)
        self._begin()

    def truncate(self) -> None:
        """Drop what is there."""
        self._part.truncate(0)

    def is_right(self) -> bool:
        """Whether the bytes have the file's hash."""
        self._part.flush()
        return self._digest.hexdigest() == self._file.etag


@contextlib.contextmanager
def _locked(part: Path, name: str) -> Iterator[BinaryIO]:
    """Open the part of a file that has come, for one process at a time."""
    with part.open("a+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have put it in its place meanwhile: then this is the finished file.
            if not os.path.samestat(os.fstat(stream.fileno()), part.stat()):
                raise FileNotFoundError(part)
        except (BlockingIOError, FileNotFoundError) as error:
            raise CheckpointError(
                f"another process is fetching {name}", fix="wait until it ends, then run the command again"
            ) from error
        yield stream


def _in_parallel(jobs: Sequence[Callable[[], None]], stop: threading.Event) -> None:
    """Run jobs in threads; when one fails, or the user interrupts, the others stop before the failure is raised."""
    with ThreadPoolExecutor(_WORKERS) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Keep huggingface_hub's own progress bars off the screen."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextlib.contextmanager
def _stating(name: str, revision: str | None, *, begun: bool = False) -> Iterator[None]:
    """Turn what huggingface_hub and the network raise into one stated failure; `begun` once the hub has answered."""
    try:
        yield
    except CvxError:
        raise
    except Exception as error:
        stated = _refused(error, name, revision) or _broken(error, name, begun)
        if stated is None:
            raise
        raise stated from error


def _refused(error: Exception, name: str, revision: str | None) -> CvxError | None:
    """Return the failure of a request that the hub has answered, and not granted."""
    hub = constants.ENDPOINT
    if isinstance(error, HFValidationError):
        return CheckpointError(
            f"{name} is no repository id", fix="name a folder, or an id such as zai-org/CogVideoX-5b"
        )
    if isinstance(error, GatedRepoError):
        return CheckpointError(f"{name} is gated", fix=f"ask for access at {hub}/{name}, then {_LOG_IN}")
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(f"{name} has no revision {revision}", fix="name a branch, tag or commit with --revision")
    if isinstance(error, RepositoryNotFoundError):
        return CheckpointError(
            f"there is no folder {name} here, and no repository of that name that {hub} would show you",
            fix=f"check the name; if it is private, {_LOG_IN}",
        )
    if isinstance(error, RemoteEntryNotFoundError):
        return CheckpointError(f"{hub} has lost a file of {name}: {error.response.url}", fix="name another --revision")
    if not isinstance(error, HfHubHTTPError):
        return None
    status = error.response.status_code
    fix = _LOG_IN if status in (401, 403) else "try again later; what has been fetched is kept"
    return CheckpointError(f"{hub} refuses {name} (HTTP {status})", fix=fix)


def _broken(error: Exception, name: str, begun: bool) -> CvxError | None:
    """Return the failure of a network or disk that gave up."""
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, LocalEntryNotFoundError):
        return OutputError(
            f"cannot write to the cache {constants.HF_HUB_CACHE}: {error.strerror}",
            fix="make room or give permission there, or set HF_HOME to another folder",
        )
    if not isinstance(error, OSError | _HTTP_ERROR):
        return None
    cause = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    if begun:
        return CheckpointError(f"fetching {name} was interrupted: {cause}", fix=_AGAIN)
    return CheckpointError(
        f"{constants.ENDPOINT} cannot be reached: {cause}",
        fix="check the network; --offline uses what has been fetched before",
    )
