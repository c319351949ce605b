"""A repository of ModelScope, fetched by its own library, which resumes and checks hashes, into its own cache."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cvx_deploy.errors import CheckpointError
from cvx_deploy.exporters.sources.checkpoint import PICKLES, only_pickles
from cvx_deploy.install import pip_install
from cvx_deploy.progress import Advance, Progress

_BRANCH = "master"
_WORKERS = 8


class ModelScopeRepository:
    """A repository of ModelScope at one revision; see `Repository`.

    Args:
        name: Its id, such as ``ZhipuAI/CogVideoX-5b``.
        revision: A branch or tag; None for its default branch.
        offline: Whether to use what the library's cache holds, and no network.

    Raises:
        CheckpointError: The library is not installed, or the repository is not there or not to be had.
    """

    def __init__(self, name: str, revision: str | None, offline: bool) -> None:
        self._name, self._offline = name, offline
        self.revision = revision or _BRANCH
        try:
            from modelscope.hub.api import HubApi
        except ImportError as error:
            raise CheckpointError(
                "modelscope:// needs the package modelscope, which is not installed",
                fix=pip_install("modelscope"),
            ) from error
        logging.getLogger("modelscope_hub").setLevel(logging.ERROR)  # what fails is raised as well
        if offline:
            folder = self._snapshot()
            self.files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
            return
        try:
            listed = HubApi().get_model_files(name, revision=self.revision, recursive=True)
        except Exception as error:
            raise self._failed(error) from error
        self.files = {str(file["Path"]) for file in listed}
        self._sizes = {str(file["Path"]): int(file["Size"] or 0) for file in listed}

    def lacks(self, file: str) -> CheckpointError:
        """Return the failure of a file that the repository, or the cache of it, does not have."""
        if self._offline:
            return CheckpointError(f"{file} of {self._name} is not in ModelScope's cache", fix="run without --offline")
        folder = file.rpartition("/")[0]
        pickles = [name for name in self.files if name.startswith(f"{folder}/") and name.endswith(PICKLES)]
        if file.endswith(".safetensors") and pickles:
            return only_pickles(f"{self._name} on ModelScope", min(pickles))
        return CheckpointError(
            f"{self._name} on ModelScope has no file {file}", fix="use a repository in diffusers layout, whole"
        )

    def fetch(self, files: Sequence[str], progress: Progress) -> Path:
        """Let the library download the files its cache lacks, and return the folder they lie in."""
        if self._offline:
            return self._snapshot()
        with progress.task(f"fetch {self._name}", sum(self._sizes[file] for file in files)) as advance:
            return self._snapshot(allow_patterns=list(files), progress_callbacks=[_reporting_to(advance)])

    def _snapshot(self, **options: Any) -> Path:
        from modelscope import snapshot_download

        try:
            return Path(
                snapshot_download(
                    self._name,
                    revision=self.revision,
                    local_files_only=self._offline,
                    max_workers=_WORKERS,
                    **options,
                )
            )
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> CheckpointError:
        """Return the failure that the library raised; its errors have no class in common."""
        causes = getattr(error, "failed_files", None) or {"": error}
        cause = (str(next(iter(causes.values()))) or type(error).__name__).splitlines()[0].rstrip(".")
        if self._offline:
            return CheckpointError(f"{self._name} is not in ModelScope's cache: {cause}", fix="run without --offline")
        return CheckpointError(
            f"{self._name} cannot be fetched from ModelScope: {cause}",
            fix="check the id, --revision and the network, and run the command again: what has come is kept",
        )


def _reporting_to(advance: Advance) -> type[Any]:
    """Return a class of which the library makes one object a file, to tell it of every piece that has come."""
    from modelscope.hub.callback import ProgressCallback

    class Reporting(ProgressCallback):  # type: ignore[misc]  # the library has no types
        def update(self, size: int) -> None:
            advance(size)

        def end(self) -> None:
            """Do nothing: the task ends by itself."""

    return Reporting
