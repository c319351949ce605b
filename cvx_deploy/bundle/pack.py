"""A bundle in one file, with all its weights, and back.

The file is a plain tar (POSIX.1-2001; not compressed, since weights hardly get smaller), which any tool opens, and
which is written and read from front to end. First comes ``bundle.json``, which says what follows, with every size and
hash; then ``SHA256SUMS`` of all the rest, in the form that ``sha256sum --check`` takes; then the tokenizer, the graphs
and the weights. Owners, permissions and time stamps are always the same: one bundle always gives the same bytes.
"""

import contextlib
import hashlib
import io
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Self

from cvx_deploy.bundle.opened import HASHES, MANIFEST, Bundle, may_replace
from cvx_deploy.bundle.schema import Manifest, StoredFile, WeightFile, leads_outside, manifest_from_json
from cvx_deploy.errors import BundleError
from cvx_deploy.files import require_space, staged_directory, staged_file, sums_of
from cvx_deploy.progress import Advance, Progress

_BLOCK = tarfile.BLOCKSIZE
_LARGEST_SMALL = 1 << 25  # bundle.json and SHA256SUMS are read into memory
_LARGEST_EXTENSION = 1 << 16  # a header that says a long name or a size beyond 8 GiB
_MODIFIED = 315_532_800  # 1980-01-01, as reproducible archives have it: GNU tar finds 1970 implausible
_PIECE = 1 << 20
_FIX = "copy the file again from where it was packed, or pack the bundle again"


def pack(bundle: Bundle, output: Path, progress: Progress, checkpoint: Path | None = None) -> int:
    """Write a bundle and all its weights, those outside it too, into one file, and return its bytes.

    Every file is hashed as it is written. An earlier file at `output` is replaced when the new one is whole.

    Args:
        bundle: What to pack.
        output: The file to appear.
        progress: Told the bytes written.
        checkpoint: Where the weights outside the bundle have moved to.

    Raises:
        BundleError: A file of the bundle or of its checkpoint is missing, truncated or altered.
        OutputError: The place cannot be written or has no room.
    """
    manifest = _portable(bundle.manifest)
    files = _files(manifest, f"the manifest of {bundle.path}")
    text = manifest.to_json()
    head = {MANIFEST: text, HASHES: _sums(text, files)}
    source = _Source(bundle if checkpoint is None else bundle.with_checkpoint(checkpoint))
    for path in files:
        source.locate(path)
    content = sum(stored.size for stored in files.values())
    with staged_file(output) as staging:
        require_space(staging.parent, _tar_size([*map(len, head.values()), *(file.size for file in files.values())]))
        with (
            progress.task(f"pack {output.name}", content) as advance,
            tarfile.TarFile(staging, "x", format=tarfile.PAX_FORMAT, copybufsize=_PIECE) as archive,
        ):
            for path, small in head.items():
                archive.addfile(_entry(path, len(small)), io.BytesIO(small))
            for path, stored in files.items():
                source.add_to(archive, path, stored, advance)
        return staging.stat().st_size


def unpack(file: Path, output: Path, progress: Progress) -> Bundle:
    """Write a packed bundle's files into a folder, each checked while it is written, and return the bundle.

    An earlier bundle at `output` is replaced when the new one is whole.

    Raises:
        BundleError: The file is none, is truncated or altered, or holds what its manifest does not know.
        OutputError: The place cannot be written, has no room, or holds something else than a bundle.
    """
    with _reading(file) as (raw, archive), staged_directory(output, replace=may_replace(output)) as staging:
        manifest, files = _read_head(archive, file)
        total = sum(stored.size for stored in files.values())
        require_space(staging, total)
        with progress.task(f"unpack {file.name}", total) as advance:
            _extract(archive, file, files, staging, advance)
        _check_end(raw, archive, file)
        (staging / MANIFEST).write_bytes(_at_home(manifest, staging).to_json())
    return Bundle.open(output)


def identity(bundle: Bundle) -> str:
    """Return a hash of all that a bundle holds, the same wherever it and its weights lie: of its packed manifest."""
    return hashlib.sha256(_portable(bundle.manifest).to_json()).hexdigest()


def _portable(manifest: Manifest) -> Manifest:
    """Return the manifest of the packed bundle: all weights inside, none of a known time, so that each is hashed."""
    return replace(
        manifest,
        weights={
            name: WeightFile(name, entry.size, entry.sha256, 0, in_bundle=True)
            for name, entry in manifest.weights.items()
        },
    )


def _at_home(manifest: Manifest, folder: Path) -> Manifest:
    """Return the manifest of an unpacked bundle: its weights have the time stamps they have just got."""
    weights = manifest.weights.items()
    return replace(
        manifest,
        weights={name: replace(entry, mtime_ns=(folder / entry.path).stat().st_mtime_ns) for name, entry in weights},
    )


def _files(manifest: Manifest, where: str) -> dict[str, StoredFile]:
    """Return what follows the head of a packed bundle, in order, by path.

    Raises:
        BundleError: A path would leave the bundle, is not written plainly, or is two files'.
    """
    networks = [network.file for network in manifest.networks.values()]
    weights = [StoredFile(entry.path, entry.size, entry.sha256) for entry in manifest.weights.values()]
    files: dict[str, StoredFile] = {}
    for stored in (manifest.tokenizer, *networks, *weights):
        if leads_outside(stored.path) or str(PurePosixPath(stored.path)) != stored.path:
            raise BundleError(f"{where} names {stored.path!r}, which is no plain path inside", fix="do not use it")
        if stored.path in (MANIFEST, HASHES) or files.setdefault(stored.path, stored) != stored:
            raise BundleError(f"{where} names {stored.path!r} for two files", fix="export the bundle again")
    if not all(entry.in_bundle for entry in manifest.weights.values()):
        raise BundleError(f"{where} names weights outside the bundle", fix=_FIX)
    return files


def _sums(text: bytes, files: dict[str, StoredFile]) -> bytes:
    """Return the content of ``SHA256SUMS``; `text` is the manifest's."""
    hashes = {MANIFEST: hashlib.sha256(text).hexdigest()} | {path: stored.sha256 for path, stored in files.items()}
    return sums_of(hashes)


def _entry(path: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(path)
    entry.size, entry.mtime = size, _MODIFIED
    return entry


def _tar_size(sizes: list[int]) -> int:
    """Return an upper bound of a tar's bytes: blocks of content, at most three headers a file, and the end."""
    return sum(-(-size // _BLOCK) + 4 for size in sizes) * _BLOCK + tarfile.RECORDSIZE


class _Hashed:
    """A file whose bytes are hashed and told as they are read."""

    def __init__(self, file: IO[bytes], advance: Advance) -> None:
        self._file = file
        self._advance = advance
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes."""
        piece = self._file.read(size)
        self.digest.update(piece)
        self._advance(len(piece))
        return piece


@dataclass(frozen=True)
class _Source:
    """The bundle that is packed, whose files are known by their paths in the packed one."""

    bundle: Bundle

    def locate(self, path: str) -> Path:
        """Return where a file lies, after checking that it is there."""
        weights = self.bundle.manifest.weights
        return self.bundle.locate_weight(path) if path in weights else self.bundle.inside(path)

    def add_to(self, archive: tarfile.TarFile, path: str, stored: StoredFile, advance: Advance) -> None:
        """Append a file; raise BundleError when what was written is not what the manifest knows."""
        with self.locate(path).open("rb") as file:
            hashed = _Hashed(file, advance)
            archive.addfile(_entry(path, stored.size), hashed)
        if hashed.digest.hexdigest() != stored.sha256:
            what = f"{file.name} was altered since the bundle {self.bundle.path} was made"
            raise BundleError(what, fix=self.bundle.remedy)


class _PlainEntry(tarfile.TarInfo):
    """A header of an ordinary file; every other kind, and a header that would fill the memory, is refused at sight."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Read one header block."""
        entry = super().frombuf(buf, encoding, errors)
        if entry.type == tarfile.XHDTYPE:
            largest = _LARGEST_EXTENSION
        elif entry.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            largest = 1 << 62
        else:
            raise _RefusedError(f"{entry.name!r} is a link, a device or another thing than a plain file")
        if not 0 <= entry.size <= largest:
            raise _RefusedError(f"{entry.name!r} has an impossible size")
        return entry


class _RefusedError(Exception):
    """An entry that no packed bundle has."""


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[tuple[IO[bytes], tarfile.TarFile]]:
    """Open a packed bundle; whatever is wrong with its form becomes one stated failure."""
    if not file.is_file():
        raise BundleError(f"there is no file {file}", fix="name one that cvx-deploy pack has written")
    try:
        with file.open("rb") as raw, tarfile.TarFile(fileobj=raw, tarinfo=_PlainEntry) as archive:
            yield raw, archive
    except _RefusedError as error:
        raise BundleError(f"{file} is no packed bundle: {error}", fix="do not use it") from error
    except (tarfile.TarError, ValueError, RecursionError) as error:
        raise BundleError(f"{file} is no packed bundle, or is truncated or damaged: {error}", fix=_FIX) from error


def _read_head(archive: tarfile.TarFile, file: Path) -> tuple[Manifest, dict[str, StoredFile]]:
    """Read the first two files, which must agree with each other; return what follows, too."""
    text = _small(archive, file, MANIFEST)
    manifest = manifest_from_json(text, f"{file}: {MANIFEST}")
    files = _files(manifest, f"the manifest in {file}")
    if _small(archive, file, HASHES) != _sums(text, files):
        raise BundleError(f"{file} was altered: its {MANIFEST} and {HASHES} do not agree", fix=_FIX)
    return manifest, files


def _small(archive: tarfile.TarFile, file: Path, name: str) -> bytes:
    entry = archive.next()
    if entry is None or entry.name != name:
        found = "nothing" if entry is None else repr(entry.name)
        raise BundleError(f"{file} is no packed bundle: it has {found} where {name} belongs", fix=_FIX)
    if entry.size > _LARGEST_SMALL:
        raise BundleError(f"{file} is no packed bundle: its {name} has {entry.size:,} bytes", fix=_FIX)
    content = archive.extractfile(entry)
    assert content is not None
    return content.read()


def _extract(
    archive: tarfile.TarFile, file: Path, files: dict[str, StoredFile], folder: Path, advance: Advance
) -> None:
    """Write every file that the manifest knows, once; nothing else may be there."""
    missing = dict(files)
    while (entry := archive.next()) is not None:
        if entry.name not in missing:
            known = "twice" if entry.name in (*files, MANIFEST, HASHES) else "which its manifest does not know"
            raise BundleError(f"{file} holds {entry.name!r}, {known}", fix="do not use it")
        stored = missing.pop(entry.name)
        if entry.size != stored.size or entry.issparse():
            raise BundleError(f"{file}: {entry.name} has {entry.size:,} bytes instead of {stored.size:,}", fix=_FIX)
        if _write(archive, entry, folder / stored.path, advance) != stored.sha256:
            raise BundleError(f"{file} was altered: the SHA-256 of {entry.name} differs", fix=_FIX)
    if missing:
        raise BundleError(f"{file} is truncated: it lacks {', '.join(sorted(missing))}", fix=_FIX)


def _write(archive: tarfile.TarFile, entry: tarfile.TarInfo, target: Path, advance: Advance) -> str:
    """Write an entry's content into a new file and return its hash."""
    target.parent.mkdir(parents=True, exist_ok=True)
    content = archive.extractfile(entry)
    assert content is not None
    with target.open("xb") as file:
        hashed = _Hashed(content, advance)
        shutil.copyfileobj(hashed, file, _PIECE)
    return hashed.digest.hexdigest()


def _check_end(raw: IO[bytes], archive: tarfile.TarFile, file: Path) -> None:
    """Refuse what stands after the last file: a tar is filled up with zeros there."""
    raw.seek(archive.offset)
    while piece := raw.read(_PIECE):
        if any(piece):
            raise BundleError(f"{file} was altered: something follows its last file", fix=_FIX)
