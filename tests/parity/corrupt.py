"""The twin of every parity test: the same bundle over a checkpoint with one tensor changed."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from cvx_deploy.bundle.opened import Bundle
from cvx_deploy.exporters.sources.checkpoint import Checkpoint
from cvx_deploy.files import sha256_of


def corrupted(bundle: Bundle, component: str, tensor: str, folder: Path) -> Bundle:
    """Return the bundle with one tensor of its checkpoint reversed end to end, hashes made to agree."""
    copy = folder / "corrupted"
    shutil.copytree(bundle.manifest.checkpoint, copy)
    stored = Checkpoint(copy).tensors(component)[tensor]
    path = copy / stored.file
    values = np.memmap(path, np.uint16, "r+", offset=stored.offset, shape=(stored.nbytes // 2,))
    values[:] = values[::-1].copy()
    values.flush()
    name = stored.file.replace("/", ".")
    entry = replace(bundle.manifest.weights[name], sha256=sha256_of(path), mtime_ns=path.stat().st_mtime_ns)
    weights = {**bundle.manifest.weights, name: entry}
    return Bundle(bundle.path, replace(bundle.manifest, checkpoint=str(copy), weights=weights))
