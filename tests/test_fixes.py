"""Every `fix:` can be followed: what the sources may print is parsed here, and the cures of common mistakes are run.

What other tests make fail is held to the same by a fixture of `tests/conftest.py`, with all that a message fills in.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.fixes import HOLE, faults

SOURCES = sorted(path for place in ("cvx_deploy", "exporters") for path in (ROOT / place).rglob("*.py"))


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield every text of a module but its docstrings, with `HOLE` for what is filled in."""
    left_out = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            left_out |= {id(part) for part in node.values}
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.JoinedStr):
            parts = (str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
            yield node.lineno, "".join(parts)


def unquoted(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield every path that stands in a command as it is: a space in it would make two words of it."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.JoinedStr):
            continue
        text = ""
        for part in node.values:
            if isinstance(part, ast.Constant):
                text += str(part.value)
            elif isinstance(part, ast.FormattedValue):
                words = ast.unparse(part.value)
                option = text.split(" ")[-2:-1] if "cvx-deploy" in text else []
                if option in (["--bundle"], ["--checkpoint"], ["--output"]) and not words.startswith("shlex.quote"):
                    yield node.lineno, words


def all_faults(tree: ast.AST) -> list[str]:
    found = [f"{line}: {fault}" for line, text in texts(tree) for fault in faults(text)]
    return found + [f"{line}: {path} is not quoted" for line, path in unquoted(tree)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_module_advises_can_be_followed(path: Path) -> None:
    assert all_faults(ast.parse(path.read_bytes())) == []


@pytest.mark.parametrize(
    "line",
    [
        'fix = "run: cvx-deploy rum --model 5b"',
        'fix = "run: cvx-deploy export"',  # without --model
        'fix = f"run: cvx-deploy build --bundle {shlex.quote(path)} --targets sm89"',
        'fix = f"run: cvx-deploy build --bundle {path}"',  # may hold a space
        'fix = "name it with --modle NAME"',
        'fix = "run it with --target sm89"',  # an option of another command
        'fix = "export with --precision int5"',
        'fix = "run with --engine tensorflow"',
        'fix = f"export with {words} --no-lora"',
        'fix = "pip install --force onnxruntime"',
        "fix = \"pip install 'cvx-deploy[exports]'\"",
    ],
)
def test_twin_advice_that_cannot_be_followed_is_found(line: str) -> None:
    assert all_faults(ast.parse(line))
