"""The pip command that a failure advises is one that works from where the program was installed."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from cvx_deploy import install
from cvx_deploy.install import pip_install
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("noted", "words"),
    [
        ({"url": "file:///DIR", "dir_info": {"editable": True}}, ["pip", "install", "-e", "/DIR[export]"]),
        ({"url": "file:///DIR", "dir_info": {}}, ["pip", "install", "/DIR[export]"]),
        (
            {"url": "https://host/a.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            ["pip", "install", "cvx-deploy[export] @ git+https://host/a.git@abc"],
        ),
        (
            {"url": "https://host/a.whl", "archive_info": {}},
            ["pip", "install", "cvx-deploy[export] @ https://host/a.whl"],
        ),
        ({}, ["pip", "install", f"{ROOT}[export]"]),
    ],
)
def test_it_names_where_the_program_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noted: dict[str, Any], words: list[str]
) -> None:
    place = tmp_path / "a folder"
    place.mkdir()
    noted = {key: value.replace("/DIR", str(place)) if key == "url" else value for key, value in noted.items()}
    monkeypatch.setattr(install, "_noted", lambda: noted)
    assert shlex.split(pip_install("export")) == [word.replace("/DIR", str(place)) for word in words]


def test_from_an_index_the_name_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "_noted", dict)
    monkeypatch.setattr(install, "_checkout", lambda: None)
    assert pip_install("gpu") == 'pip install "cvx-deploy[gpu]"'


def test_no_module_names_an_index_that_the_program_is_not_on() -> None:
    files = [path for path in (ROOT / "cvx_deploy").rglob("*.py") if path.name != "install.py"]
    assert not [path for path in files if 'pip install "cvx-deploy' in path.read_text(encoding="utf-8")]
