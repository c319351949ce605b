"""What is carried to a GPU arrives as it was, but for the code of other GPUs."""

import io
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

from cvx_deploy.miniatures import miniature
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_pack


def entry(capability: int, code: bytes) -> bytes:
    header = struct.pack("<HHIQ", 2, 1, 64, len(code)).ljust(28, b"\0") + struct.pack("<I", capability)
    return header.ljust(64, b"\0") + code


def library(*entries: bytes) -> bytes:
    """Return bytes with a fat binary among others, and a magic number that begins none."""
    body = b"".join(entries)
    fat = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body
    return b"ELF before" + struct.pack("<I", 0xBA55ED50) + b"no fat binary    " + fat + b"and after"


def test_only_the_code_of_other_gpus_is_zeroed() -> None:
    mine, other = b"mine" * 50, b"other" * 40
    before = library(entry(80, other), entry(90, mine), entry(120, other))
    after, zeroed = gpu_pack.without_other_code(before, 90)
    assert zeroed == 2 * len(other)
    assert after == library(entry(80, bytes(len(other))), entry(90, mine), entry(120, bytes(len(other))))
    assert gpu_pack.without_other_code(before, 75)[1] == 2 * len(other) + len(mine)
    assert gpu_pack.without_other_code(b"nothing of the kind", 90) == (b"nothing of the kind", 0)


def test_the_pieces_together_are_what_was_packed(tmp_path: Path) -> None:
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some/__init__.py", "x = 1\n")
        archive.writestr("some/libsome.so.1", library(entry(80, b"other")))
    bundle = miniature("mini")

    def files() -> object:
        yield from gpu_pack.wheel_files(wheel, 90)
        yield from gpu_pack.bundle_files(bundle)

    pieces = gpu_pack.pack(files(), tmp_path / "out", 4096)  # type: ignore[arg-type]
    assert len(pieces) > 1
    assert max(piece.stat().st_size for piece in pieces) <= 4096
    joined = b"".join(piece.read_bytes() for piece in pieces)
    with tarfile.open(fileobj=io.BytesIO(joined), mode="r:xz") as packed:
        packed.extractall(tmp_path / "there", filter="data")
    there = tmp_path / "there"
    assert (there / "site" / "some" / "__init__.py").read_text() == "x = 1\n"
    assert (there / "site" / "some" / "libsome.so.1").read_bytes() == library(entry(80, bytes(5)))
    assert (there / "bundle" / "transformer.onnx").read_bytes() == (bundle / "transformer.onnx").read_bytes()
    assert not list(there.rglob("*.safetensors"))
