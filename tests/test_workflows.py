"""The workflows: every action is pinned by its commit, and none keeps the token that fetched the sources."""

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
USES = re.compile(r"uses: (\S+)(.*)$", re.MULTILINE)
PINNED = re.compile(r"[\w-]+/[\w-]+@[0-9a-f]{40}")


def loose(text: str) -> list[str]:
    """Return the actions that are named by a tag or a branch, which may come to mean something else."""
    return [name for name, version in USES.findall(text) if not PINNED.fullmatch(name) or " # v" not in version]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_and_keep_no_token(workflow: Path) -> None:
    text = workflow.read_text(encoding="utf-8")
    assert loose(text) == []
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")


def test_an_action_that_is_named_by_a_tag_is_found() -> None:
    assert loose("- uses: actions/checkout@v4\n- uses: a/b@0123456789012345678901234567890123456789 # v1") == [
        "actions/checkout@v4"
    ]
