"""Foreign bytes: what is no file is not read, and whatever a parser raises is one stated failure."""

import os
from pathlib import Path

import pytest

from cvx_deploy.errors import BundleError, CvxError
from cvx_deploy.reading import check_regular, read_whole, reading

FIX = "fetch it again"


class PanicException(BaseException):
    """What a panic in a library written in Rust is in Python: its name is all there is to know it by."""


@pytest.mark.parametrize(
    "error",
    [KeyError("a"), RecursionError(), MemoryError(), AssertionError(), OSError("no number"), PanicException("\x1b[1m")],
    ids=lambda error: type(error).__name__,
)
def test_any_exception_of_a_parser_is_the_failure_that_is_asked_for(error: BaseException) -> None:
    with (
        pytest.raises(BundleError, match=r"^some\.json .*fix: fetch it again\.$") as caught,
        reading("some.json", BundleError, fix=FIX),
    ):
        raise error
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), CvxError("told", fix="so")])
def test_interrupts_and_what_is_stated_already_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, reading("some.json", BundleError, fix=FIX):
        raise error
    assert caught.value is error


def odd(folder: Path, kind: str) -> Path:
    """Return a path that is no regular file of a sensible size."""
    path = folder / "odd"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "hole":
        path.touch()
        os.truncate(path, 1 << 40)
    return path


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop", "hole", "nothing"])
def test_what_is_no_file_of_a_sensible_size_is_refused_before_it_is_read(tmp_path: Path, kind: str) -> None:
    path = odd(tmp_path, kind)
    with pytest.raises(BundleError):
        read_whole(path, BundleError, fix=FIX)
    with pytest.raises(BundleError):
        check_regular(path, BundleError, fix=FIX, limit=1 << 30)


def test_a_file_is_read_whole_and_a_link_to_one_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_whole(tmp_path / "link", BundleError, fix=FIX, limit=7) == b"content"
    assert check_regular(tmp_path / "link", BundleError, fix=FIX) == 7
    with pytest.raises(BundleError, match="more than the 6"):
        read_whole(tmp_path / "link", BundleError, fix=FIX, limit=6)
