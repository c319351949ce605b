"""Hashes that are known: a file is read once a machine, and again as soon as anybody has touched it."""

import os
from pathlib import Path

import pytest

from cvx_deploy.bundle import hashes
from cvx_deploy.bundle.hashes import known_sha256
from cvx_deploy.files import sha256_of
from cvx_deploy.progress import SilentProgress


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Return the files that were hashed; every file counts as large, and the cache is the test's own."""
    read: list[Path] = []

    def counted(path: Path, *rest: object) -> str:
        read.append(path)
        return sha256_of(path)

    monkeypatch.setenv("CVX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "sha256_of", counted)
    monkeypatch.setattr(hashes, "_KNOWN", {})
    monkeypatch.setattr(hashes, "_LARGE", 1)
    return read


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    return path


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this be another process."""
    monkeypatch.setattr(hashes, "_KNOWN", {})


def test_a_file_is_hashed_once_in_a_process_and_once_on_a_machine(
    reads: list[Path], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sha256_of(file)
    assert [known_sha256(file, SilentProgress()) for _ in range(2)] == [expected] * 2
    forget(monkeypatch)
    assert known_sha256(file, SilentProgress()) == expected
    assert reads == [file]


def test_a_small_file_is_not_kept_for_other_processes(
    reads: list[Path], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "_LARGE", 10)
    known_sha256(file, SilentProgress())
    forget(monkeypatch)
    known_sha256(file, SilentProgress())
    assert reads == [file, file]


def test_a_file_that_was_written_with_its_old_time_stamp_is_hashed_again(reads: list[Path], file: Path) -> None:
    before = file.stat()
    first = known_sha256(file, SilentProgress())
    file.write_bytes(b"abd")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert known_sha256(file, SilentProgress()) != first
    assert reads == [file, file]


def test_a_damaged_cache_counts_as_none(reads: list[Path], file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known_sha256(file, SilentProgress())
    hashes._KEPT._path.write_bytes(b'{"a": 1')
    forget(monkeypatch)
    assert known_sha256(file, SilentProgress()) == sha256_of(file)
    assert reads == [file, file]


def test_a_cache_that_cannot_be_written_is_done_without(
    reads: list[Path], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CVX_CACHE_DIR", str(file))
    assert known_sha256(file, SilentProgress()) == sha256_of(file)
    assert reads == [file]


def test_twin_a_cache_that_says_another_hash_is_believed(
    reads: list[Path], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the user's own; what is claimed above is that it is asked at all."""
    known_sha256(file, SilentProgress())
    place = hashes._KEPT._path
    place.write_text(place.read_text().replace(sha256_of(file), "0" * 64))
    forget(monkeypatch)
    assert known_sha256(file, SilentProgress()) == "0" * 64
