"""What is kept in the user's cache: shown, and cleared, and nothing else with it."""

import json
from pathlib import Path

import pytest

from cvx_deploy.kept import Kept
from tests.command import cvx


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CVX_CACHE_DIR", str(tmp_path / "cache"))
    Kept("probes", "engines.json").put("a", "b")
    traces = tmp_path / "cache" / "traces"
    traces.mkdir()
    (traces / "one").write_bytes(bytes(1000))
    return tmp_path / "cache"


def test_each_part_is_shown_with_its_size(folder: Path) -> None:
    found = json.loads(cvx("cache", "--json").out)
    assert found["folder"] == str(folder)
    assert {name: part["files"] for name, part in found["parts"].items()} == {"traces": 1, "probes": 1}
    assert found["bytes"] == 1000 + (folder / "probes" / "engines.json").stat().st_size
    assert "traces" in cvx("cache").out
    assert (folder / "traces" / "one").is_file(), "to look deletes nothing"


def test_clearing_leaves_what_is_not_ours(folder: Path, tmp_path: Path) -> None:
    own = folder / "my-thesis"
    own.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    (folder / "hashes").symlink_to(elsewhere)
    (folder / "traces" / "link").symlink_to(elsewhere)
    assert "deleted from" in cvx("cache", "--clear").out
    assert sorted(path.name for path in folder.iterdir()) == ["hashes", "my-thesis"]
    assert (elsewhere / "kept").is_file()
    assert json.loads(cvx("cache", "--json").out)["parts"] == {}


def test_where_there_is_no_cache_nothing_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CVX_CACHE_DIR", str(tmp_path / "none"))
    assert json.loads(cvx("cache", "--json").out)["bytes"] == 0
    assert cvx("cache", "--clear").code == 0
