"""A repository of the Hugging Face hub, fetched into the hub's own cache, where other programs find it too.

The downloads are huggingface_hub's; it keeps whole files only, and over HTTP it does not look at hashes. So every file
is held against the hash that the hub lists for it once it is there: of a large file its SHA-256, of a small one git's.
"""

import contextlib
import hashlib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.tqdm import tqdm

from cvx_deploy.errors import CheckpointError, CvxError, OutputError
from cvx_deploy.exporters.sources.checkpoint import PICKLES, only_pickles
from cvx_deploy.files import free_space, sha256_of
from cvx_deploy.progress import Advance, Progress

_WORKERS = 8
_API_SECONDS = 30
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_LOG_IN = "log in with: hf auth login (or set HF_TOKEN)"
_AGAIN = "run the command again: files that came whole are kept"
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

    def is_in(self, path: Path) -> bool:
        """Whether a file holds this content."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        if len(self.etag) == 64:
            return sha256_of(path) == self.etag
        return (
            hashlib.sha1(b"blob %d\0" % self.size + path.read_bytes(), usedforsecurity=False).hexdigest() == self.etag
        )


def _commit(told: str) -> str:
    """Return the commit that a hub says a revision is; it becomes a folder's name, so that nothing else will do."""
    if not _COMMIT.fullmatch(told):
        raise CheckpointError(
            f"{constants.ENDPOINT} gives {told!r:.80} for a commit", fix="use an endpoint that does (HF_ENDPOINT)"
        )
    return told


class HubRepository:
    """A repository of the hub at one commit; see `Repository`.

    Raises:
        CheckpointError: It is not there, not to be had, or the hub cannot be reached; the fix says what to do.
    """

    def __init__(self, name: str, revision: str | None) -> None:
        self._name, self._asked = name, revision
        with _stating(name, revision):
            info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=_API_SECONDS)
            self.revision = _commit(str(info.sha))
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
        missing = [file for file in map(self.files.__getitem__, files) if not self._has(file)]
        self._require_space(missing)
        with _stating(self._name, self._asked, begun=True):
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

    def _require_space(self, files: list[_RemoteFile]) -> None:
        need, free = sum(file.size for file in files), free_space(self._storage)
        if need > free:
            raise OutputError(
                f"{self._name} needs {need / 1e9:,.1f} GB more in {constants.HF_HUB_CACHE}, which has "
                f"{free / 1e9:,.1f} GB free",
                fix="make room there, or set HF_HOME to a folder that has it",
            )

    def _download(self, file: _RemoteFile, advance: Advance, stop: threading.Event) -> None:
        """Put a file into the cache; one that is there and not whole, or comes with another content, is not kept."""
        self._forget(file)
        path = Path(hf_hub_download(self._name, file.name, revision=self.revision, tqdm_class=_bar(advance, stop)))
        if not file.is_in(path):
            self._forget(file)
            raise CheckpointError(
                f"{file.name} of {self._name} came with another content than its hash at {constants.ENDPOINT} says",
                fix="run the command again; if that does not help, something on the way alters files",
            )

    def _forget(self, file: _RemoteFile) -> None:
        """Remove a file of the cache unless its content is whole."""
        link, blob = self._snapshot / file.name, self._storage / "blobs" / file.etag
        if not file.is_in(blob):
            blob.unlink(missing_ok=True)
        if not file.is_in(link):
            link.unlink(missing_ok=True)


def _bar(advance: Advance, stop: threading.Event) -> type[tqdm]:
    """Return a bar that shows nothing, tells what came to a `Progress`, and ends its download when it is to stop."""
    first: list[tqdm] = []

    class Bar(tqdm):
        def __init__(self, *values: Any, **options: Any) -> None:
            super().__init__(*values, **options | {"disable": True})  # type: ignore[no-untyped-call]
            first.append(self)  # of one file there may be a second bar, for bytes before they are decompressed

        def update(self, n: float | None = 1) -> None:
            if stop.is_set():
                raise InterruptedError
            if self is first[0]:
                advance(int(n or 0))

    return Bar


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
def _stating(name: str, revision: str | None, *, begun: bool = False) -> Iterator[None]:
    """Turn what huggingface_hub and the network raise into one stated failure; `begun` once the hub has answered."""
    try:
        yield
    except CvxError:
        raise
    except Exception as error:
        # The hub library wraps what it was answered, and looks into its cache first.
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
        within = cause if isinstance(cause, Exception) else error
        stated = _refused(within, name, revision) or _broken(within, name, begun)
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
