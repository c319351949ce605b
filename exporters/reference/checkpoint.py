"""The checkpoint that a bundle should agree with: where it lies, fetched if it has to be, its adapters merged."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.bundle.safetensors import read_header
from cvx_deploy.errors import CheckpointError, WrongModelError
from cvx_deploy.exporters.sources.checkpoint import Checkpoint, DerivedTensors
from cvx_deploy.exporters.sources.hub import Source, fetch
from cvx_deploy.files import sha256_of
from cvx_deploy.progress import Progress


@dataclass(frozen=True)
class Reference:
    """Which checkpoint a bundle is held against.

    Attributes:
        where: A folder, or a hub's repository in the form of `hub.Source.where`; None for what the bundle is of.
        revision: A branch, tag or commit of the repository.
        offline: Whether to use what is on this machine only.
    """

    where: str | None = None
    revision: str | None = None
    offline: bool = False


def recorded_checkpoint(bundle: Bundle) -> Path:
    """Return the folder a bundle was exported from, be it there or not; a miniature's folder is both."""
    recorded = Path(bundle.manifest.checkpoint)
    if recorded.is_absolute() and recorded.is_dir():
        return recorded
    return bundle.path if (bundle.path / "model_index.json").is_file() else recorded


def reference_checkpoint(bundle: Bundle, reference: Reference, progress: Progress) -> Checkpoint:
    """Return the checkpoint to hold a bundle against, after fetching what of it is not on this machine.

    Raises:
        CheckpointError: It is not there, or could not be fetched whole.
        WrongModelError: It is of another model than the bundle.
    """
    manifest = bundle.manifest
    transformer = None if manifest.transformer is None else Path(manifest.transformer)
    variant = manifest.provenance.get("variant")
    where = reference.where or str(_there(bundle))
    source = Source(where, reference.revision, variant, reference.offline, own_transformer=transformer is not None)
    folder = fetch(source, lambda checkpoint: _require_same_model(checkpoint, bundle), progress).folder
    checkpoint = Checkpoint(folder, variant, transformer)
    _require_same_model(checkpoint, bundle)
    return checkpoint


def _there(bundle: Bundle) -> Path:
    recorded, known = recorded_checkpoint(bundle), bundle.manifest.provenance
    if not recorded.is_dir():
        source, revision = known.get("source", "DIR"), known.get("revision")
        again = source if source != str(recorded) else "DIR"
        raise CheckpointError(
            f"the checkpoint {recorded} that {bundle.path} was exported from is not there",
            fix=f"name it with --checkpoint {shlex.quote(again)}"
            + (f" --revision {shlex.quote(revision)}" if revision else ""),
        )
    return recorded


def _require_same_model(checkpoint: Checkpoint, bundle: Bundle) -> None:
    if checkpoint.traits != bundle.manifest.traits:
        raise WrongModelError(
            f"{checkpoint.root} is of another model than {bundle.path}, a {bundle.manifest.model}",
            fix="name the checkpoint that the bundle was exported from with --checkpoint",
        )


def with_weights(bundle: Bundle, root: Path) -> Bundle:
    """Return the bundle with weights that are neither in it nor where it says taken from the checkpoint at `root`."""
    outside = any(not entry.in_bundle for entry in bundle.manifest.weights.values())
    gone = outside and not Path(bundle.manifest.checkpoint).is_dir()
    return bundle.with_checkpoint(root) if gone else bundle


def require_adapters(bundle: Bundle) -> None:
    """Raise CheckpointError unless every adapter that was merged into a bundle is there, as it was then."""
    for lora in bundle.manifest.loras:
        path = Path(lora.path)
        state = "is not there" if not path.is_file() else "" if sha256_of(path) == lora.sha256 else "was altered since"
        if state:
            raise CheckpointError(
                f"the LoRA {path} was merged into {bundle.path}, and {state}: what the bundle should agree with "
                "cannot be made",
                fix=f"put that file back, of SHA-256 {lora.sha256}, or export the bundle again",
            )


def with_adapters(checkpoint: Checkpoint, straight: Bundle) -> Checkpoint:
    """Return the checkpoint with what adapters changed of its transformer, merged when `straight` was exported."""
    if not straight.manifest.loras:
        return checkpoint
    from cvx_deploy.exporters.sources.lora import MERGED

    path = straight.inside(MERGED)
    made = DerivedTensors(path, straight.manifest.weights[MERGED], read_header(path, MERGED))
    return checkpoint.with_made("transformer", made)
