"""Put a trained checkpoint into the package: its own files, and beside them a bundle that runs from them.

    python benchmarks/miniature/package.py --checkpoint DIR --name mini

The folder `cvx_deploy/miniatures/NAME` is then both, so that the weights are there once. What `mini-i2v` has in common
with `mini` is there once, too: it becomes a link, so that `mini` is to be packaged first.
"""

import argparse
import filecmp
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from cvx_deploy.bundle.opened import MANIFEST, Bundle
from cvx_deploy.exporters.export import ExportRequest, bundle_from_checkpoint
from cvx_deploy.files import staged_directory
from cvx_deploy.miniatures import MINIATURES, miniature


def package(checkpoint: Path, name: str, target: Path) -> Bundle:
    """Write the folder `target`, replacing an earlier one when whole; returns its bundle.

    Raises:
        CvxError: The checkpoint cannot be exported.
    """
    with staged_directory(target, replace=True) as staging, tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(checkpoint, staging, dirs_exist_ok=True)
        request = ExportRequest(model=name, checkpoint=staging, source=f"cvx_deploy/miniatures/{name}")
        bundle = bundle_from_checkpoint(request, Path(scratch) / name)
        manifest = bundle.manifest
        for stored in (manifest.tokenizer, *(network.file for network in manifest.networks.values())):
            shutil.copy(bundle.inside(stored.path), staging / stored.path)
        # No time stamp holds through an installation: the weights are hashed when they are loaded, in milliseconds.
        weights = {key: replace(file, in_bundle=True, mtime_ns=0) for key, file in manifest.weights.items()}
        (staging / MANIFEST).write_bytes(replace(manifest, weights=weights, checkpoint=".").to_json())
        if name != MINIATURES[0]:
            link_what_is_shared(staging, target.with_name(MINIATURES[0]))
    return Bundle.open(target)


def link_what_is_shared(folder: Path, first: Path) -> None:
    """Make every file of a folder that lies beside it in the folder `first`, byte for byte, a link to that one."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        same = first / file.relative_to(folder)
        if same.is_file() and filecmp.cmp(file, same, shallow=False):
            file.unlink()
            file.symlink_to(os.path.relpath(same, file.parent))


def main() -> None:
    """Read the command line and package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of assemble.py")
    parser.add_argument("--name", choices=MINIATURES, required=True)
    arguments = parser.parse_args()
    print(package(arguments.checkpoint, arguments.name, miniature(arguments.name)).path)


if __name__ == "__main__":
    main()
