"""Pack what `benchmarks/gpu.py` needs on a machine without a network, in pieces that can be carried.

    python benchmarks/gpu_pack.py --output DIR --bundle DIR [--wheel FILE ...] [--capability 90] [--piece 60]

Wheels (onnxruntime-gpu, cuda-bindings, diffusers) are unpacked into one folder, ``site``, and the device code of other
GPUs in their libraries is zeroed, which leaves their sizes and addresses as they are and packs to almost nothing. The
bundle goes along without its weights. All of it is one ``.tar.xz``, cut into pieces of at most `--piece` MiB:

    cat pack-* | tar -xJf -        # there, and then PYTHONPATH=site:.
"""

import argparse
import io
import lzma
import struct
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

_MAGIC = struct.pack("<I", 0xBA55ED50)
_HEADER = struct.Struct("<IHHQ")
_ENTRY = struct.Struct("<HHIQ")
_CAPABILITY = 28  # where an entry of a fat binary says what it is for
_MIB = 1 << 20


def without_other_code(library: bytes, capability: int) -> tuple[bytes, int]:
    """Return a library whose device code for other GPUs is zeroed, and how many bytes that is.

    A fat binary begins with a magic number, a version, the size of its own header and that of what follows: entries,
    each a kind, a version, the size of its header and that of its code.
    """
    data, zeroed, start = bytearray(library), 0, library.find(_MAGIC)
    while start >= 0:
        _, version, header, size = _HEADER.unpack_from(data, start)
        end = start + header + size
        if version == 1 and header == _HEADER.size and end <= len(data):
            zeroed += sum(_zero(data, *code) for code in _other_code(data, start + header, end, capability))
            start = library.find(_MAGIC, end)
        else:
            start = library.find(_MAGIC, start + len(_MAGIC))
    return bytes(data), zeroed


def _other_code(data: bytearray, start: int, end: int, capability: int) -> Iterator[tuple[int, int]]:
    """Yield place and size of the code for other GPUs in one fat binary."""
    while start + _CAPABILITY + 4 <= end:
        _, _, header, size = _ENTRY.unpack_from(data, start)
        (found,) = struct.unpack_from("<I", data, start + _CAPABILITY)
        if found != capability:
            yield start + header, size
        start += header + size


def _zero(data: bytearray, start: int, size: int) -> int:
    data[start : start + size] = bytes(size)
    return size


def wheel_files(wheel: Path, capability: int) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a wheel, its libraries without code for other GPUs."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            content = archive.read(name)
            if ".so" in Path(name).name:
                content, zeroed = without_other_code(content, capability)
                print(f"{name}: {len(content):,} bytes, {zeroed:,} zeroed", file=sys.stderr)
            if not name.endswith("/"):
                yield f"site/{name}", content


def bundle_files(bundle: Path) -> Iterator[tuple[str, bytes]]:
    """Yield a bundle's files but for its weights and engines."""
    for path in sorted(bundle.rglob("*")):
        inside = path.relative_to(bundle)
        if path.is_file() and path.suffix in (".onnx", ".json") and inside.parts[0] != "engines":
            yield f"bundle/{inside}", path.read_bytes()


def pack(files: Iterator[tuple[str, bytes]], output: Path, piece: int) -> list[Path]:
    """Write files into one packed archive, cut into pieces; return the pieces."""
    packed = io.BytesIO()
    with lzma.open(packed, "wb", preset=6) as stream, tarfile.open(fileobj=stream, mode="w|") as archive:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            archive.addfile(entry, io.BytesIO(content))
    whole, pieces = packed.getbuffer(), []
    output.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(whole), piece)):
        path = output / f"pack-{number:02}"
        path.write_bytes(whole[start : start + piece])
        pieces.append(path)
    return pieces


def main() -> None:
    """Read the command line and pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder for the pieces")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--wheel", dest="wheels", type=Path, nargs="+", default=[])
    parser.add_argument("--capability", type=int, default=90, help="of the GPU, as 90 for an H100")
    parser.add_argument("--piece", type=int, default=60, metavar="MIB", help="of each piece at most")
    arguments = parser.parse_args()

    def files() -> Iterator[tuple[str, bytes]]:
        for wheel in arguments.wheels:
            yield from wheel_files(wheel, arguments.capability)
        yield from bundle_files(arguments.bundle)

    for path in pack(files(), arguments.output, arguments.piece * _MIB):
        print(f"{path}  {path.stat().st_size / _MIB:.1f} MiB")


if __name__ == "__main__":
    main()
