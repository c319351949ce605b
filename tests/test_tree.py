"""What git tracks here: small enough to be cloned in seconds, and nothing large twice."""

import hashlib
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from tests.conftest import ROOT

MOST = 28_000_000  # bytes, the limit that CONTRIBUTING.md states
LARGE = 20_000  # bytes; below that a copy costs less than a reader's wondering at a link


def size_of(files: list[Path]) -> int:
    """Return what files take in a checkout, in bytes; a link is as long as what it says."""
    return sum(file.lstat().st_size for file in files)


def twice(files: list[Path]) -> list[list[Path]]:
    """Return the groups of large files that have the same bytes."""
    same = defaultdict(list)
    for file in files:
        if not file.is_symlink() and file.stat().st_size >= LARGE:
            same[hashlib.sha256(file.read_bytes()).digest()].append(file)
    return [group for group in same.values() if len(group) > 1]


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in names.split("\0") if name]
    return [file for file in files if file.is_symlink() or file.exists()]  # but for what is removed and not committed


def test_the_tracked_tree_stays_under_28_million_bytes(tracked: list[Path]) -> None:
    assert size_of(tracked) < MOST
    assert f"{MOST:,} bytes" in (ROOT / "CONTRIBUTING.md").read_text()


def test_no_large_file_is_tracked_twice(tracked: list[Path]) -> None:
    assert not twice(tracked)


def test_a_copy_is_found_and_counted_and_a_link_is_not(tmp_path: Path) -> None:
    """The twin: both checks above see a copy."""
    first, link, copy = (tmp_path / name for name in ("first", "link", "copy"))
    first.write_bytes(bytes(LARGE))
    link.symlink_to("first")
    assert not twice([first, link])
    assert size_of([first, link]) == LARGE + len("first")
    copy.write_bytes(bytes(LARGE))
    assert twice([first, link, copy]) == [[first, copy]]
    assert size_of([first, copy]) == 2 * LARGE
