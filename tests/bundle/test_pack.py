"""A bundle in one file: any tool opens it, one bundle gives the same bytes, and what comes back is what went in."""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cvx_deploy.bundle.opened import MANIFEST, Bundle
from cvx_deploy.bundle.pack import pack, unpack
from cvx_deploy.errors import BundleError, OutputError
from cvx_deploy.progress import SilentProgress
from tests.bundle.test_bundle import make_bundle, rewrite, use
from tests.command import TELLING, content, cvx, signalled, spawn, wait_for
from tests.conftest import Exported

SILENT = SilentProgress()
SUMS = "SHA256SUMS"
INSIDE, OUTSIDE = "in.safetensors", "vae.out.safetensors"
NAMES = [MANIFEST, SUMS, "tokenizer.json", "vae.onnx", INSIDE, OUTSIDE]
Entry = tuple[tarfile.TarInfo, bytes]


def small_bundle(root: Path) -> Bundle:
    """Write a bundle with one weight file inside and one outside, both named as weights are."""
    bundle = make_bundle(root)
    (bundle.path / "in").rename(bundle.path / INSIDE)

    def rename(raw: Any) -> None:
        inside, outside = raw["weights"].pop("in"), raw["weights"].pop("vae.out")
        raw["weights"] = {INSIDE: {**inside, "path": INSIDE}, OUTSIDE: outside}
        raw["networks"]["vae"]["weights"] = [INSIDE, OUTSIDE]

    return Bundle.open(rewrite(bundle, rename))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return small_bundle(tmp_path)


@pytest.fixture
def packed(bundle: Bundle, tmp_path: Path) -> Path:
    pack(bundle, tmp_path / "one.cvx", SILENT)
    return tmp_path / "one.cvx"


def entries(file: Path) -> list[Entry]:
    with tarfile.open(file) as archive:
        return [(member, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]


def write(file: Path, members: list[Entry]) -> None:
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as archive:
        for member, data in members:
            archive.addfile(member, io.BytesIO(data))


def refused(file: Path) -> str:
    """Unpack to a new place and over an earlier bundle, see that nothing changed, and return the one line."""
    root = file.parent
    earlier = root / "earlier"
    earlier.mkdir(exist_ok=True)
    (earlier / MANIFEST).write_text("an earlier bundle")
    before = content(root)
    lines = [cvx("unpack", file, "--output", output).failure() for output in (root / "new" / "bundle", earlier)]
    assert lines[0] == lines[1]
    assert content(root) == before
    return lines[0]


def test_what_was_packed_comes_back_without_the_checkpoint(bundle: Bundle, packed: Path, tmp_path: Path) -> None:
    shutil.rmtree(bundle.manifest.checkpoint)
    back = unpack(packed, tmp_path / "back", SILENT)
    use(back.path)
    assert all(entry.in_bundle for entry in back.manifest.weights.values())
    assert {path.name: path.read_text() for path in back.path.iterdir() if path.name != MANIFEST} == {
        **{name: f"content of {name}" for name in ("tokenizer.json", "vae.onnx")},
        **{INSIDE: "content of in", OUTSIDE: "content of out"},
    }
    for field in ("model", "traits", "shapes", "networks", "scheduler", "provenance"):
        assert getattr(back.manifest, field) == getattr(bundle.manifest, field)


def test_time_stamps_are_those_of_the_new_files_so_that_no_run_hashes_again(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = unpack(packed, tmp_path / "back", SILENT)
    monkeypatch.delattr("cvx_deploy.bundle.opened.sha256_of")
    for name in back.manifest.weights:
        back.weight_path(name, SILENT)


def test_the_same_bundle_gives_the_same_bytes_wherever_it_lies(bundle: Bundle, packed: Path, tmp_path: Path) -> None:
    back = unpack(packed, tmp_path / "elsewhere" / "back", SILENT)
    os.utime(back.path / "vae.onnx", (1, 1))
    pack(back, tmp_path / "two.cvx", SILENT)
    assert (tmp_path / "two.cvx").read_bytes() == packed.read_bytes()
    moved = Path(bundle.manifest.checkpoint).rename(tmp_path / "moved")
    pack(bundle, tmp_path / "three.cvx", SILENT, moved)
    assert (tmp_path / "three.cvx").read_bytes() == packed.read_bytes()


def test_the_manifest_comes_first_then_the_hashes(packed: Path) -> None:
    found = entries(packed)
    assert [member.name for member, _ in found] == NAMES
    sums = [f"{hashlib.sha256(data).hexdigest()}  {member.name}\n" for member, data in found if member.name != SUMS]
    assert found[1][1].decode() == "".join(sums)


@pytest.mark.skipif(not (shutil.which("tar") and shutil.which("sha256sum")), reason="needs tar and sha256sum")
def test_tar_unpacks_it_and_sha256sum_checks_it_and_the_bundle_opens(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    done = subprocess.run(["tar", "-xf", packed, "-C", tmp_path / "plain"], capture_output=True, check=True)
    assert done.stderr == b""
    subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=tmp_path / "plain", capture_output=True, check=True)
    use(tmp_path / "plain")
    flip(tmp_path / "plain" / INSIDE, 0)
    with pytest.raises(BundleError, match=f"{INSIDE} was altered"):  # nothing vouches for what tar wrote: it is hashed
        use(tmp_path / "plain")
    flip(tmp_path / "plain" / INSIDE, 0)
    unpack(packed, tmp_path / "plain", SILENT)  # and such a folder is a bundle's, that may be replaced


def test_an_earlier_file_and_an_earlier_bundle_are_replaced(bundle: Bundle, packed: Path, tmp_path: Path) -> None:
    before = packed.read_bytes()
    packed.write_text("old")
    pack(bundle, packed, SILENT)
    assert packed.read_bytes() == before
    for _ in range(2):
        use(unpack(packed, tmp_path / "back", SILENT).path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "bundle", "checkpoint", "one.cvx"]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_no_altered_byte_is_more_than_a_stated_failure(packed: Path, tmp_path: Path) -> None:
    whole = packed.read_bytes()
    manifest = json.loads(entries(packed)[0][1])
    rng = random.Random(0)
    for _ in range(300):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        packed.write_bytes(data)
        try:
            back = unpack(packed, tmp_path / "back", SILENT)
        except BundleError:
            continue
        # A header's owner, mode, time stamp or padding may say anything that tar accepts; content may not.
        use(back.path)
        found = json.loads((back.path / MANIFEST).read_bytes())
        for entry in found["weights"].values():
            entry["mtime_ns"] = 0
        assert found == manifest
        shutil.rmtree(back.path)


@pytest.mark.parametrize("name", NAMES)
def test_altered_content_is_refused_in_every_file(packed: Path, name: str) -> None:
    members = [
        (member, data[:-2] + b"~" + data[-1:] if member.name == name else data) for member, data in entries(packed)
    ]
    write(packed, members)
    assert "was altered" in refused(packed) or "is damaged" in refused(packed)


def test_a_truncated_file_is_refused_wherever_it_ends(packed: Path, tmp_path: Path) -> None:
    whole = packed.read_bytes()
    ends = [member.offset_data + member.size for member, _ in entries(packed)]
    assert refused(packed.with_name("nothing")).startswith(f"error: there is no file {tmp_path}/nothing. fix: ")
    for length in (0, 1, 511, 512, 600, *(end - 1 for end in ends), *(end + (-end % 512) for end in ends[:-1])):
        packed.write_bytes(whole[:length])
        assert f"{packed} is " in refused(packed), length


def link(name: str, kind: bytes, target: str = "/etc/passwd") -> Entry:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def named(name: str, data: bytes = b"x") -> Entry:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    return member, data


HOSTILE: dict[str, tuple[Callable[[list[Entry]], list[Entry]], str]] = {
    "an absolute path": (lambda m: [*m, named("/tmp/x")], "which its manifest does not know"),
    "a path that leaves": (lambda m: [*m, named("../x")], "holds '../x', which its manifest does not know"),
    "an unknown name": (lambda m: [*m, named("run.sh")], "holds 'run.sh', which its manifest does not know"),
    "a name written otherwise": (lambda m: [*m[:-1], named(f"./{OUTSIDE}")], f"'./{OUTSIDE}', which its manifest"),
    "an unknown name of great length": (lambda m: [*m, named("x" * 5000)], "which its manifest does not know"),
    "a symbolic link": (lambda m: [*m[:-1], link(OUTSIDE, tarfile.SYMTYPE)], f"'{OUTSIDE}' is a link, a device or"),
    "a hard link": (lambda m: [*m[:-1], link(OUTSIDE, tarfile.LNKTYPE, INSIDE)], f"'{OUTSIDE}' is a link, a device or"),
    "a device": (lambda m: [*m, link("null", tarfile.CHRTYPE)], "'null' is a link, a device or"),
    "a pipe": (lambda m: [*m, link("pipe", tarfile.FIFOTYPE)], "'pipe' is a link, a device or"),
    "a folder": (lambda m: [*m, link("folder", tarfile.DIRTYPE)], "'folder' is a link, a device or"),
    "a name twice": (lambda m: [*m, m[-1]], f"holds '{OUTSIDE}', twice"),
    "the manifest twice": (lambda m: [*m, m[0]], "holds 'bundle.json', twice"),
    "a missing file": (lambda m: m[:-1], "is truncated: it lacks " + OUTSIDE),
    "another order": (lambda m: [m[1], m[0], *m[2:]], "it has 'SHA256SUMS' where bundle.json belongs"),
    "no hashes": (lambda m: [m[0], *m[2:]], "it has 'tokenizer.json' where SHA256SUMS belongs"),
    "a shorter file": (lambda m: [*m[:-1], named(OUTSIDE)], f"{OUTSIDE} has 1 bytes instead of 14"),
    "nothing": (lambda m: [], "it has nothing where bundle.json belongs"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_no_packed_bundle_holds_is_refused(packed: Path, case: str) -> None:
    change, what = HOSTILE[case]
    write(packed, change(entries(packed)))
    assert what in refused(packed)


PATHS = ["../x", "/tmp/x", "a/../x", "./in2", "a//b", INSIDE, MANIFEST, SUMS, "", ".", "a\0b"]


@pytest.mark.parametrize("path", PATHS)
def test_a_manifest_that_names_such_a_path_is_neither_packed_nor_unpacked(
    bundle: Bundle, packed: Path, path: str
) -> None:
    [manifest, sums, *rest] = entries(packed)
    raw = json.loads(manifest[1])
    raw["weights"][OUTSIDE]["path"] = path
    text = json.dumps(raw).encode()
    write(packed, [named(MANIFEST, text), sums, *rest])
    assert "which is no plain path inside" in refused(packed) or "for two files" in refused(packed)
    rewrite(bundle, lambda value: value["tokenizer"].update(path=path))
    before = content(packed.parent)
    with pytest.raises(BundleError):
        pack(Bundle.read(bundle.path), packed.with_name("two.cvx"), SILENT)
    assert content(packed.parent) == before


def test_weights_that_a_packed_manifest_places_outside_are_refused(packed: Path) -> None:
    [manifest, sums, *rest] = entries(packed)
    raw = json.loads(manifest[1])
    raw["weights"][OUTSIDE]["in_bundle"] = False
    write(packed, [named(MANIFEST, json.dumps(raw).encode()), sums, *rest])
    assert "names weights outside the bundle" in refused(packed)


def test_what_follows_the_last_file_is_refused(packed: Path) -> None:
    with packed.open("ab") as file:
        file.write(bytes(100_000) + b"x")
    assert "something follows its last file" in refused(packed)


@pytest.mark.parametrize("data", [b"PK\x03\x04" + bytes(2000), b"\x1f\x8b" + bytes(2000), b"text", os.urandom(5000)])
def test_another_kind_of_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "one.cvx").write_bytes(data)
    assert f"error: {tmp_path}/one.cvx is no packed bundle" in refused(tmp_path / "one.cvx")


def test_a_header_that_would_fill_the_memory_is_refused_at_sight(packed: Path) -> None:
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, 1 << 40
    packed.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + packed.read_bytes())
    assert "impossible size" in refused(packed)


@pytest.mark.parametrize("name", [INSIDE, OUTSIDE])
def test_an_altered_weight_is_not_packed_even_under_the_same_time_stamp(
    bundle: Bundle, tmp_path: Path, name: str
) -> None:
    path = bundle.locate_weight(name)
    stat = path.stat()
    flip(path, 0)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    before = content(tmp_path)
    line = cvx("pack", "--bundle", bundle.path, "--output", tmp_path / "one.cvx").failure()
    assert f"{path} was altered since the bundle" in line
    assert content(tmp_path) == before


def test_a_missing_checkpoint_is_said_before_anything_is_written(bundle: Bundle, tmp_path: Path) -> None:
    shutil.rmtree(bundle.manifest.checkpoint)
    line = cvx("pack", "--bundle", bundle.path, "--output", tmp_path / "one.cvx").failure()
    assert "out is missing. fix: put the checkpoint back" in line
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_disk_without_room_is_said_before_anything_is_written(
    bundle: Bundle, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    before = content(tmp_path)
    for words in (
        ("pack", "--bundle", bundle.path, "--output", tmp_path / "two.cvx"),
        ("unpack", packed, "--output", tmp_path / "back"),
    ):
        assert "bytes are to be written into" in cvx(*words).failure()
    assert content(tmp_path) == before


def test_a_folder_in_the_place_of_the_file_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is there and is not a file"):
        pack(bundle, tmp_path / "checkpoint", SILENT)


def test_what_a_user_put_into_a_bundle_is_not_lost(packed: Path, tmp_path: Path) -> None:
    unpack(packed, tmp_path / "back", SILENT)
    (tmp_path / "back" / "video.mp4").write_text("mine")
    before = content(tmp_path)
    with pytest.raises(OutputError, match=r"holds video.mp4, which is not of a bundle"):
        unpack(packed, tmp_path / "back", SILENT)
    assert content(tmp_path) == before


@pytest.mark.parametrize("command", ["pack", "unpack"])
@pytest.mark.parametrize("how", ["interrupt", "kill"])
def test_an_end_in_the_middle_leaves_the_earlier_one(bundle: Bundle, packed: Path, command: str, how: str) -> None:
    root = packed.parent
    unpack(packed, root / "back", SILENT)
    before = content(root)
    slow = TELLING + "import time\nimport cvx_deploy.bundle.pack as p\nadd = p._Hashed.read\n"
    slow += "p._Hashed.read = lambda self, size=-1: (time.sleep(60), add(self, size))[1]\nmain()\n"
    words = ["--bundle", bundle.path, "--output", packed] if command == "pack" else [packed, "--output", root / "back"]
    with spawn(slow, command, *words, "--quiet") as process:
        wait_for(process, f"now: {command} one.cvx")
        if how == "interrupt":
            assert signalled(process, signal.SIGINT).code == 130
        else:
            process.kill()
            process.wait()
    left = content(root)
    assert {name: data for name, data in left.items() if not name.startswith(".")} == before
    assert (left == before) == (how == "interrupt")
    assert cvx(command, *words).code == 0
    assert not [path.name for path in root.iterdir() if path.name.startswith(".")]


def test_memory_does_not_grow_with_the_weights(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path)
    big = tmp_path / "checkpoint" / "vae" / "out"
    big.write_bytes(bytes(1 << 26))
    digest = hashlib.sha256(big.read_bytes()).hexdigest()
    rewrite(bundle, lambda raw: raw["weights"][OUTSIDE].update(size=1 << 26, sha256=digest))
    tracemalloc.start()
    pack(Bundle.open(bundle.path), tmp_path / "one.cvx", SILENT)
    unpack(tmp_path / "one.cvx", tmp_path / "back", SILENT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 24


def test_sizes_beyond_8_gib_have_their_header(tmp_path: Path) -> None:
    from cvx_deploy.bundle.pack import _entry, _PlainEntry

    block = _entry("weights", 10**11).tobuf(tarfile.PAX_FORMAT)
    archive = tarfile.TarFile(fileobj=io.BytesIO(block + bytes(10240)), tarinfo=_PlainEntry)
    member = archive.next()
    assert member is not None
    assert (member.name, member.size) == ("weights", 10**11)


def test_a_bundle_from_a_laptop_makes_the_same_video_on_a_server(exported: Exported, tmp_path: Path) -> None:
    original = exported("5b")
    checkpoint = shutil.copytree(original.manifest.checkpoint, tmp_path / "laptop" / "checkpoint")
    laptop = tmp_path / "laptop" / "5b"
    shutil.copytree(original.path, laptop)
    rewrite(Bundle.read(laptop), lambda raw: raw.update(checkpoint=str(checkpoint)))
    words = ["--prompt", "a red circle", "--steps", "2", "--threads", "1", "--output"]
    assert cvx("run", "--bundle", laptop, *words, tmp_path / "here.npy").code == 0
    assert cvx("pack", "--bundle", laptop, "--output", tmp_path / "5b.cvx").out == f"{tmp_path}/5b.cvx\n"
    shutil.rmtree(tmp_path / "laptop")
    engines = ["--model", "mine", "--engines-dir", tmp_path / "server"]
    values = json.loads(cvx("unpack", tmp_path / "5b.cvx", *engines, "--json").out)
    assert values == {"bundle": f"{tmp_path}/server/mine", "file": f"{tmp_path}/5b.cvx", "model": "5b"}
    (tmp_path / "5b.cvx").unlink()
    assert cvx("verify", *engines).code == 0
    assert cvx("run", *engines, *words, tmp_path / "there.npy").code == 0
    here, there = np.load(tmp_path / "here.npy"), np.load(tmp_path / "there.npy")
    assert here.std() > 0
    assert np.array_equal(here, there)


@pytest.mark.parametrize("words", [["unpack", "x.cvx"], ["unpack", "x.cvx", "--model", "a", "--output", "b"], ["pack"]])
def test_wrong_usage_is_said(words: list[str]) -> None:
    assert cvx(*words).code == 2
