"""The bundle: one folder that holds everything the runtime needs, described by its manifest ``bundle.json``.

Every path in a bundle stays inside it, but for one kind: the manifest's weight table may say that a weight file lies in
the checkpoint it was exported from. ONNX files name their weights by that table's plain names.
"""

import hashlib
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from cvx_deploy.bundle.command import export_command
from cvx_deploy.bundle.hashes import known_sha256
from cvx_deploy.bundle.schema import AGAIN, Manifest, Network, StoredFile, WeightFile, leads_outside, manifest_from_json
from cvx_deploy.errors import BundleError, OutputError, ShapeError
from cvx_deploy.families.family import Family
from cvx_deploy.families.registry import FAMILIES, MODELS
from cvx_deploy.files import sha256_of
from cvx_deploy.miniatures import is_packaged
from cvx_deploy.progress import Progress, SilentProgress
from cvx_deploy.reading import read_whole
from cvx_deploy.shape import Shape

MANIFEST = "bundle.json"
HASHES = "SHA256SUMS"

_TRANSFORMER = "transformer/"
_SUFFIXES = {".json", ".onnx", ".safetensors"}
_OF_A_BUNDLE = {"engines", HASHES}


@dataclass(frozen=True)
class Bundle:
    """An opened bundle, whose small files have been checked, seen at one of its shapes.

    Attributes:
        path: Its folder.
        index: Which of the manifest's shapes `shape` and `network` speak of.
    """

    path: Path
    manifest: Manifest
    index: int = 0

    @classmethod
    def open(cls, path: Path) -> "Bundle":
        """Read and check a bundle.

        Every file inside the bundle must be there, stay inside it, and have its size and hash. Weight files are
        checked by `weight_path`, when a network that needs them is loaded.

        Raises:
            BundleError: Which file is missing, truncated, altered or foreign, and how to mend it.
        """
        bundle = cls.read(path)
        for stored in bundle.small_files:
            bundle.check_file(stored)
        return bundle

    @classmethod
    def read(cls, path: Path) -> "Bundle":
        """Read the manifest alone; what it names is not looked at."""
        return cls(path, _read_manifest(path))

    @property
    def family(self) -> Family:
        """The model family it is of."""
        return FAMILIES[self.manifest.family]

    @property
    def small_files(self) -> tuple[StoredFile, ...]:
        """Every file of the bundle but its manifest and its weights."""
        return (self.manifest.tokenizer, *(network.file for network in self.manifest.networks.values()))

    def check_file(self, stored: StoredFile) -> None:
        """Raise BundleError unless a file of the bundle is there, inside, with its size and hash."""
        path = self.inside(stored.path)
        _check_size(path, stored.size, self.remedy)
        if known_sha256(path, SilentProgress()) != stored.sha256:
            raise BundleError(
                f"{path} was altered, or belongs to another bundle (its SHA-256 differs)", fix=self.remedy
            )

    def content(self, stored: StoredFile) -> bytes:
        """Return the bytes of a small file of the bundle: those that were hashed, and no others that came since."""
        path = self.inside(stored.path)
        content = read_whole(path, BundleError, fix=self.remedy, limit=stored.size)
        if hashlib.sha256(content).hexdigest() != stored.sha256:
            raise BundleError(
                f"{path} was altered, or belongs to another bundle (its SHA-256 differs)", fix=self.remedy
            )
        return content

    @property
    def remedy(self) -> str:
        """How to make this bundle anew."""
        return "run: " + self.export_command(self.shapes)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Every video size the bundle makes."""
        return tuple(entry.shape for entry in self.manifest.shapes)

    @property
    def shape(self) -> Shape:
        """The video size the bundle is seen at."""
        return self.manifest.shapes[self.index].shape

    def at(self, shape: Shape) -> "Bundle":
        """Return the same bundle seen at another of its shapes."""
        if shape not in self.shapes:
            raise ShapeError(
                f"{self.path} makes no videos of {shape} (it makes {', '.join(map(str, self.shapes))})",
                fix="run: " + self.export_command((*self.shapes, shape))
                if min(shape.frames, shape.height, shape.width) > 0
                else "use one of these sizes",
            )
        return replace(self, index=self.shapes.index(shape))

    def export_command(self, shapes: Iterable[Shape]) -> str:
        """Return the command that makes this bundle, at these shapes."""
        return export_command(self.path, self.manifest, shapes)

    def inside(self, relative: str) -> Path:
        """Return the absolute path of a file of the bundle, refusing one that leaves it."""
        return _contained(self.path, relative, f"the manifest of {self.path}")

    def onnx_path(self, role: str) -> Path:
        """Return where the ONNX file of a role's network lies."""
        return self.inside(self.network(role).file.path)

    def onnx_bytes(self, role: str) -> bytes:
        """Return the ONNX file of a role's network, as it was hashed."""
        return self.content(self.network(role).file)

    def has(self, role: str) -> bool:
        """Whether this shape needs a network of that role."""
        return role in self.manifest.shapes[self.index].networks

    def network(self, role: str) -> Network:
        """Return the network that plays a role at this shape, or say that there is none."""
        return self.manifest.networks[self.network_name(role)]

    def network_name(self, role: str) -> str:
        """Return the name of the network that plays a role at this shape, or say that there is none."""
        networks = self.manifest.shapes[self.index].networks
        if role not in networks:
            have = ", ".join(sorted(networks))
            raise BundleError(f"{self.path} has no network {role} at {self.shape} (it has {have})", fix=self.remedy)
        return networks[role]

    def weight_path(self, name: str, progress: Progress) -> Path:
        """Return where a weight file lies, after making sure that it is the one the bundle was made from.

        A file whose time stamp is not the one it was hashed at is hashed again, once on a machine; see `bundle.hashes`.
        """
        path = self.locate_weight(name)
        if path.stat().st_mtime_ns != self.manifest.weights[name].mtime_ns:
            self._compare(name, path, known_sha256(path, progress))
        return path

    def check_weight(self, name: str, progress: Progress) -> None:
        """Hash a weight file, whatever its time stamp, and raise BundleError when it was altered."""
        path, entry = self.locate_weight(name), self.manifest.weights[name]
        with progress.task(f"check {path.name}", entry.size) as advance:
            self._compare(name, path, sha256_of(path, advance))

    def _compare(self, name: str, path: Path, found: str) -> None:
        if found != self.manifest.weights[name].sha256:
            raise BundleError(
                f"{path} was altered since the bundle {self.path} was made", fix=self._weight_remedy(name)
            )

    def locate_weight(self, name: str) -> Path:
        """Return where a weight file lies, with the right size; its content is not looked at."""
        if name not in self.manifest.weights:
            raise BundleError(f"{self.path}: no weight file named {name} in the manifest", fix=self.remedy)
        entry = self.manifest.weights[name]
        root, relative = self.weight_home(entry)
        path = _contained(root, relative, f"the weight table of {self.path}", resolve=entry.in_bundle)
        _check_size(path, entry.size, self._weight_remedy(name))
        return path

    def weight_home(self, entry: WeightFile) -> tuple[Path, str]:
        """Return the folder that a weight file lies in, and its path there."""
        if entry.in_bundle:
            return self.path, entry.path
        if self.manifest.transformer is not None and entry.path.startswith(_TRANSFORMER):
            return Path(self.manifest.transformer), entry.path.removeprefix(_TRANSFORMER)
        return Path(self.manifest.checkpoint), entry.path

    def _weight_remedy(self, name: str) -> str:
        entry = self.manifest.weights[name]
        if entry.in_bundle:
            return self.remedy
        root, relative = self.weight_home(entry)
        if relative != entry.path:
            return f"put the transformer back at {root}, or {self.remedy}"
        if "revision" in self.manifest.provenance:
            return self.remedy  # fetches it again
        return f"put the checkpoint back at {root}, or run the command again with --checkpoint DIR"

    def with_checkpoint(self, checkpoint: Path) -> "Bundle":
        """Return the same bundle with its outside weights taken from another copy of the checkpoint."""
        place = str(checkpoint.absolute())
        kept = {key: value for key, value in self.manifest.provenance.items() if key != "revision"}
        return replace(self, manifest=replace(self.manifest, checkpoint=place, provenance=kept | {"source": place}))


def may_replace(output: Path) -> bool:
    """Whether a folder is a bundle, which is replaced as a whole; raise when it holds anything of the user's too."""
    if not (output / MANIFEST).is_file():
        return False
    for entry in output.iterdir():
        if entry.name not in _OF_A_BUNDLE and not (entry.is_file() and entry.suffix in _SUFFIXES):
            raise OutputError(
                f"{output} holds {entry.name}, which is not of a bundle, and would be lost",
                fix="move it away, or choose another --output",
            )
    return True


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    if not path.is_dir():
        raise BundleError(f"there is no bundle at {path}", fix=_first_export(path))
    if not file.is_file():
        raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}", fix="name a bundle with --bundle DIR")
    return manifest_from_json(read_whole(file, BundleError, fix=AGAIN), str(file))


def _first_export(path: Path) -> str:
    """Return how to come by a bundle that is not there: a published model's checkpoint is found by its name."""
    if path.name in MODELS:
        return f"run: cvx-deploy export --model {path.name} --output {shlex.quote(str(path))}"
    return "run: cvx-deploy export --model NAME --checkpoint DIR, or name a bundle that is there"


def _contained(root: Path, relative: str, where: str, *, resolve: bool = True) -> Path:
    outside = leads_outside(relative)
    path = root / relative
    if not outside and resolve:
        home = root.parent if is_packaged(root) else root  # the miniatures share files, by links to one another's
        # Unlike Path.resolve, which raises on a loop of links.
        outside = not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(home))
    if outside:
        raise BundleError(f"{where} names {relative!r}, which lies outside", fix="do not use this bundle; export again")
    return path


def _check_size(path: Path, size: int, fix: str) -> None:
    if not path.is_file():
        raise BundleError(f"{path} is missing", fix=fix)
    if not os.access(path, os.R_OK):
        raise BundleError(f"{path} cannot be read", fix="check the file's permissions")
    found = path.stat().st_size
    if found != size:
        raise BundleError(f"{path} has {found:,} bytes instead of {size:,}", fix=fix)
