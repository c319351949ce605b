"""The miniatures: trained CogVideoX models of a few million parameters that come with the package.

Each folder here is a checkpoint in diffusers layout and a ready bundle over it at once. They draw one simple shape that
moves, on what a caption says; ``benchmarks/miniature`` trains, packages and scores them. What ``mini-i2v`` has in
common with ``mini``, its VAE first of all, is a link to it; in an installed wheel it is a file.
"""

import os
from pathlib import Path

MINIATURES = ("mini", "mini-i2v")


def miniature(name: str) -> Path:
    """Return the folder of a miniature, which is both its checkpoint and its bundle."""
    return Path(__file__).parent / name


def bundle_folder(name: str, engines_dir: Path) -> Path:
    """Return where the bundle of a name lies; a miniature that nobody has exported lies in the package."""
    path = engines_dir / name
    return miniature(name) if name in MINIATURES and not path.exists() else path


def is_packaged(bundle: Path) -> bool:
    """Whether a bundle is one of the package's own, which nothing may write to."""
    return os.path.realpath(bundle) in {os.path.realpath(miniature(name)) for name in MINIATURES}
