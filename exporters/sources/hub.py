"""Where a checkpoint comes from: a folder here, a repository of the Hugging Face hub, or one of ModelScope.

Of a repository only the files that an export reads are fetched: first the small ones, so that a checkpoint that will
not do is known before its weights come, then the safetensors files that its indexes name.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cvx_deploy.errors import CheckpointError
from cvx_deploy.exporters.sources.checkpoint import COMPONENTS, Checkpoint, weight_sources
from cvx_deploy.families.registry import MODELS
from cvx_deploy.progress import Progress

MODELSCOPE = "modelscope://"
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_NEEDED = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{component}/config.json" for component in COMPONENTS),
    "tokenizer/tokenizer_config.json",
)
_TOKENIZER = ("spiece.model", "tokenizer.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class Source:
    """Which checkpoint is asked for.

    Attributes:
        where: A folder, an id on the Hugging Face hub, or ``modelscope://`` and an id there.
        revision: A branch, tag or commit of the repository; None for its default branch.
        variant: Which weight files, such as fp16; None for the plain ones.
        offline: Whether to use what is on this machine only.
        own_transformer: Whether the transformer's weights come from elsewhere, and need not be fetched.
    """

    where: str
    revision: str | None = None
    variant: str | None = None
    offline: bool = False
    own_transformer: bool = False

    @property
    def components(self) -> tuple[str, ...]:
        """Return the components whose weights are wanted."""
        return tuple(name for name in COMPONENTS if not (self.own_transformer and name == "transformer"))


@dataclass(frozen=True)
class Fetched:
    """A checkpoint on this machine.

    Attributes:
        folder: Where it lies now.
        source: The repository it is from, in the form of `Source.where`; None for a folder.
        revision: The commit that was fetched (of ModelScope the branch or tag); None for a folder.
    """

    folder: Path
    source: str | None
    revision: str | None


class Repository(Protocol):
    """One revision of a repository."""

    @property
    def revision(self) -> str:
        """Return the commit it is, where that is known."""

    @property
    def files(self) -> Collection[str]:
        """Return the names of its files."""

    def lacks(self, file: str) -> CheckpointError:
        """Return the failure of a file that is not there."""

    def fetch(self, files: Sequence[str], progress: Progress) -> Path:
        """Make sure that these files lie on this machine, and return the folder they lie in."""


def fetch(source: Source, check: Callable[[Checkpoint], object], progress: Progress) -> Fetched:
    """Return the folder of a checkpoint, after fetching what is not on this machine yet.

    Args:
        source: Which checkpoint. An existing folder always wins over a repository of the same name.
        check: Told the checkpoint when its configs are there and its weights are not; what it raises ends the matter.
        progress: Told what is fetched.

    Raises:
        CheckpointError: There is no such folder, repository, revision or file, or it could not be fetched whole.
        OutputError: The disk has no room for it.
    """
    if _is_folder(source.where):
        if source.revision is not None:
            raise CheckpointError(
                f"{source.where} is a folder, which has no revision {source.revision}", fix="leave out --revision"
            )
        return Fetched(Path(source.where), None, None)
    repository = _repository(source)
    folder = repository.fetch(_small_files(repository, source), progress)
    checkpoint = Checkpoint(folder, source.variant)
    check(checkpoint)
    repository.fetch(_weight_files(repository, checkpoint, source), progress)
    return Fetched(folder, source.where, repository.revision)


def _is_folder(where: str) -> bool:
    """Whether a folder is meant: one that is there, or a path that is not a repository's id.

    ``checkpoints/x`` could be both; with a folder ``checkpoints`` here, the missing folder is meant.
    """
    path = Path(where)
    if path.is_dir():
        return True
    if where.startswith(MODELSCOPE) or where in {model.hub_id for model in MODELS.values()}:
        return False
    return not _REPOSITORY.fullmatch(where) or path.exists() or path.parent.is_dir()


def _repository(source: Source) -> Repository:
    if source.where.startswith(MODELSCOPE):
        from cvx_deploy.exporters.sources.modelscope import ModelScopeRepository

        return ModelScopeRepository(source.where.removeprefix(MODELSCOPE), source.revision, source.offline)
    from cvx_deploy.exporters.sources.huggingface import CachedRepository, HubRepository, is_offline

    if source.offline or is_offline():
        return CachedRepository(source.where, source.revision)
    return HubRepository(source.where, source.revision)


def _small_files(repository: Repository, source: Source) -> list[str]:
    """Return the configs, the tokenizer's files, and the indexes of the weights that will be read."""
    have = repository.files
    for name in _NEEDED:
        if name not in have:
            raise repository.lacks(name)
    tokenizer = [f"tokenizer/{name}" for name in _TOKENIZER if f"tokenizer/{name}" in have]
    first = [weight_sources(component, source.variant, have.__contains__)[0] for component in source.components]
    return [*_NEEDED, *tokenizer, *(name for name in first if name.endswith(".json"))]


def _weight_files(repository: Repository, checkpoint: Checkpoint, source: Source) -> list[str]:
    have = repository.files
    files = [file for part in source.components for file in checkpoint.weight_files(part, have.__contains__)]
    for file in files:
        if file not in have:
            raise repository.lacks(file)
    return files
