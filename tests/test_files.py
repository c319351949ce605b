"""A folder appears whole or not at all, whatever stops the process that writes it."""

import fcntl
import hashlib
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from cvx_deploy import files
from cvx_deploy.errors import OutputError
from cvx_deploy.files import check_unlocked, place_file, sha256_of, staged_directory, staged_file
from tests.command import content, spawn, wait_for

STAGE = """
import sys, time
from pathlib import Path
from cvx_deploy.files import staged_directory

with staged_directory(Path(sys.argv[1]), replace=True) as staging:
    (staging / "half.onnx").write_bytes(b"half")
    print("staged", file=sys.stderr, flush=True)
    time.sleep(60)
"""


def fill(target: Path, text: str, *, replace: bool = False) -> None:
    with staged_directory(target, replace=replace) as staging:
        (staging / "file").write_text(text)
        (staging / "folder").mkdir()
        (staging / "folder" / "inner").write_text(text)


def break_off(target: Path, error: type[BaseException]) -> None:
    with staged_directory(target, replace=True) as staging:
        (staging / "file").write_text("half")
        raise error


@pytest.fixture
def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do as file systems that cannot swap two names in one step."""
    monkeypatch.setattr(files, "_exchange", lambda *_: False)


def test_the_hash_is_the_files_sha256_and_every_byte_is_reported(tmp_path: Path) -> None:
    data = os.urandom((1 << 22) + 5)
    (tmp_path / "file").write_bytes(data)
    told: list[int] = []
    assert sha256_of(tmp_path / "file", told.append) == hashlib.sha256(data).hexdigest()
    assert sum(told) == len(data)


def test_a_finished_folder_has_its_content_and_no_company(tmp_path: Path) -> None:
    fill(tmp_path / "target", "new")
    assert content(tmp_path) == {
        "target": "folder",
        "target/file": b"new",
        "target/folder": "folder",
        "target/folder/inner": b"new",
    }


def test_folders_above_are_made(tmp_path: Path) -> None:
    fill(tmp_path / "a" / "b" / "target", "new")
    assert (tmp_path / "a" / "b" / "target" / "file").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing_not_even_folders_above(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        break_off(tmp_path / "a" / "b", error)
    assert content(tmp_path) == {}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_earlier_folder_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    fill(tmp_path / "target", "old")
    before = content(tmp_path)
    with pytest.raises(error):
        break_off(tmp_path / "target", error)
    assert content(tmp_path) == before


def test_a_new_folder_takes_the_old_ones_place_whole(tmp_path: Path) -> None:
    fill(tmp_path / "target", "old")
    (tmp_path / "target" / "stale").touch()
    fill(tmp_path / "target", "new", replace=True)
    assert {path: data for path, data in content(tmp_path).items() if data != "folder"} == {
        "target/file": b"new",
        "target/folder/inner": b"new",
    }


@pytest.mark.usefixtures("without_exchange")
def test_a_new_folder_takes_the_old_ones_place_without_renameat2_too(tmp_path: Path) -> None:
    test_a_new_folder_takes_the_old_ones_place_whole(tmp_path)


@pytest.mark.usefixtures("without_exchange")
def test_an_interrupt_between_two_renames_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "target", "old")
    before = content(tmp_path)
    rename: Callable[[Path, Path], Path] = Path.rename

    def interrupted(source: Path, place: Path) -> Path:
        if source.name.endswith(f".tmp-{os.getpid()}"):
            raise KeyboardInterrupt
        return rename(source, place)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "target", "new", replace=True)
    assert content(tmp_path) == before


def test_an_old_folder_that_a_killed_process_set_aside_comes_back(tmp_path: Path) -> None:
    fill(tmp_path / ".target.tmp-old", "old")
    with pytest.raises(KeyboardInterrupt):
        break_off(tmp_path / "target", KeyboardInterrupt)
    assert (tmp_path / "target" / "file").read_text() == "old"


def test_a_folder_in_use_is_not_replaced_unless_that_is_allowed(tmp_path: Path) -> None:
    fill(tmp_path / "target", "old")
    before = content(tmp_path)
    with pytest.raises(OutputError, match="already exists and is not empty"):
        fill(tmp_path / "target", "new")
    assert content(tmp_path) == before


def test_an_empty_folder_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    fill(tmp_path / "target", "new")
    assert (tmp_path / "target" / "file").read_text() == "new"


def test_a_file_in_the_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        fill(tmp_path / "target", "new", replace=True)
    assert content(tmp_path) == {"target": b"mine"}


@pytest.mark.parametrize("name", ["file/target", "x" * 300, "/proc/target"])
def test_a_place_that_cannot_be_written_is_one_stated_failure(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"cannot write|file is a file"):
        fill(tmp_path / name, "new")
    assert content(tmp_path) == {"file": b"mine"}


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not stop root")
def test_a_folder_without_permission_is_one_stated_failure(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written"):
        fill(tmp_path / "target", "new")
    tmp_path.chmod(0o700)
    assert content(tmp_path) == {}


def test_a_disk_that_runs_full_is_one_stated_failure(tmp_path: Path) -> None:
    fill(tmp_path / "target", "old")
    before = content(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*target: File too large"):
            fill(tmp_path / "target", "x" * 2000, replace=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content(tmp_path) == before


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere" / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "real")
    fill(tmp_path / "link", "new", replace=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "real" / "file").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", "link"}


def test_a_link_to_nowhere_is_filled(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    fill(tmp_path / "link", "new")
    assert (tmp_path / "real" / "file").read_text() == "new"


def test_two_at_once_the_second_is_told_so_and_the_first_goes_on(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with staged_directory(target, replace=True) as staging:
        with pytest.raises(OutputError, match=f"another process is writing {target}"):
            fill(target, "second", replace=True)
        (staging / "file").write_text("first")
    assert content(tmp_path) == {"target": "folder", "target/file": b"first"}


def test_a_lock_on_a_file_that_was_replaced_meanwhile_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / ".target.lock"

    def late(_: object, __: int) -> None:
        # The holder let go and removed its file, and a third process made its own, before this lock was had.
        lock.unlink()
        lock.touch()

    lock.touch()
    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(OutputError, match="another process"):
        fill(tmp_path / "target", "new")


def test_targets_beside_each_other_leave_each_other_alone(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "one", replace=True) as staging:
        fill(tmp_path / "two", "two")
        fill(tmp_path / "*", "star")  # a name, not a pattern
        (staging / "file").write_text("one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["*", "one", "two"]


@pytest.mark.parametrize("earlier", [True, False])
def test_what_a_killed_process_left_is_swept_up_by_the_next(tmp_path: Path, earlier: bool) -> None:
    target = tmp_path / "target"
    if earlier:
        fill(target, "old")
    with spawn(STAGE, target) as process:
        wait_for(process, "staged")
        process.kill()
    assert process.returncode == -signal.SIGKILL
    left = {path.name for path in tmp_path.iterdir()} - {"target"}
    assert left == {f".target.tmp-{process.pid}", ".target.lock"}
    assert target.exists() == earlier
    if earlier:
        assert (target / "file").read_text() == "old"
    fill(target, "new", replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert (target / "file").read_text() == "new"


def test_content_tells_links_files_and_folders_apart(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / ".hidden").write_text("x")
    (tmp_path / "link").symlink_to("folder")
    assert content(tmp_path) == {"folder": "folder", ".hidden": b"x", "link": "link to folder"}
    shutil.rmtree(tmp_path / "folder")
    assert content(tmp_path) == {".hidden": b"x", "link": "link to folder"}


def test_a_placed_file_has_the_content_and_time_stamp_and_is_a_file_of_its_own(tmp_path: Path) -> None:
    source, link, told = tmp_path / "source", tmp_path / "link", list[int]()
    source.write_bytes(os.urandom((1 << 22) + 5))
    os.utime(source, ns=(5, 7))
    link.symlink_to(source)  # as the hub's cache has them
    place_file(link, tmp_path / "target", told.append)
    target = tmp_path / "target"
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_mtime_ns == 7
    assert sum(told) == source.stat().st_size
    assert not target.is_symlink()
    assert target.stat().st_nlink == source.stat().st_nlink == 1
    source.write_bytes(b"altered")
    assert target.stat().st_size > 7


def test_a_placed_file_shares_its_blocks_where_the_file_system_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clone(target: int, request: int, source: int) -> int:
        assert request == 0x40049409
        os.write(target, os.pread(source, 100, 0))
        return 0

    told: list[int] = []
    (tmp_path / "source").write_text("content")
    monkeypatch.setattr(fcntl, "ioctl", clone)
    monkeypatch.setattr(files, "require_space", lambda *_: pytest.fail("a shared file needs no room"))
    place_file(tmp_path / "source", tmp_path / "target", told.append)
    assert ((tmp_path / "target").read_text(), told) == ("content", [7])


def test_a_copy_without_room_is_refused_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_text("content")
    monkeypatch.setattr(files, "_share", lambda *_: False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=6))
    with pytest.raises(OutputError, match=r"7 bytes are to be written into .*, where 6 are free"):
        place_file(tmp_path / "source", tmp_path / "target")


def write(target: Path, text: str, error: BaseException | None = None) -> None:
    with staged_file(target) as staging:
        staging.write_text(text)
        if error:
            raise error


def test_a_staged_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "a" / "file"
    with pytest.raises(KeyboardInterrupt):
        write(target, "half", KeyboardInterrupt())
    assert content(tmp_path) == {}
    write(target, "old")
    with pytest.raises(KeyboardInterrupt):
        write(target, "half", KeyboardInterrupt())
    assert content(tmp_path) == {"a": "folder", "a/file": b"old"}
    (target.parent / ".file.tmp-1").write_text("what a killed process left")
    write(target, "new")
    assert content(tmp_path) == {"a": "folder", "a/file": b"new"}


@pytest.mark.parametrize("name", [".target.lock", ".target.tmp-1", ".target.tmp-old"])
def test_a_planted_link_is_neither_followed_nor_in_the_way(tmp_path: Path, name: str) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("mine")
    (tmp_path / "inside").mkdir()
    for place in ("victim", "nowhere"):
        link = tmp_path / "inside" / name
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / place)
        fill(tmp_path / "inside" / "target", "new", replace=True)
        assert (tmp_path / "victim" / "file").read_text() == "mine"
        assert not (tmp_path / "nowhere").exists()
        assert [path.name for path in (tmp_path / "inside").iterdir()] == ["target"]


def test_a_pipe_in_a_locks_place_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".target.lock")
    fill(tmp_path / "target", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_name_as_long_as_the_file_system_takes_can_be_staged(tmp_path: Path) -> None:
    target = tmp_path / ("x" * 255)
    with staged_file(target) as staging:
        staging.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_whether_a_target_is_being_written_is_known_beforehand(tmp_path: Path) -> None:
    target = tmp_path / "target"
    check_unlocked(target)
    with staged_file(target) as staging:
        with pytest.raises(OutputError, match="another process is writing"):
            check_unlocked(target)
        staging.write_text("new")
    check_unlocked(target)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
